"""Fixtures of the adapter service's tests: a data directory, its database, store and queue."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from eda.adapters.database import Database
from tests.adapters.databases import BACKENDS, new_database
from tests.adapters.helpers import Service


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with new_database(request.param, tmp_path / "data") as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def setup(tmp_path: Path, database: Database) -> Service:
    return Service(tmp_path / "data", database)
