"""Fixtures of the adapter service's tests: a data directory, its database, store and queue."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.database import Database, sqlite_url
from tests.adapters.helpers import Service


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(sqlite_url(tmp_path / "data" / "eda.sqlite3"))
    yield database
    database.close()


@pytest.fixture
def setup(tmp_path: Path, database: Database) -> Service:
    return Service(tmp_path / "data", database)
