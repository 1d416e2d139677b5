"""Databases for tests: a SQLite file, and a fresh schema of the PostgreSQL that ``EDA_TEST_POSTGRES_URL`` names.

    EDA_TEST_POSTGRES_URL=postgresql://user@127.0.0.1/empty_database python -m pytest tests/adapters

``tests/with_postgres.sh COMMAND`` starts one of its own for COMMAND where PostgreSQL is installed.
"""

import importlib.util
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from eda.adapters.database import Database, sqlite_url

BACKENDS = ("sqlite", "postgresql")
VARIABLE = "EDA_TEST_POSTGRES_URL"


@contextmanager
def new_database(backend: str, directory: Path) -> Iterator[str]:
    """The URL of an empty database, which is gone afterwards. Skips the test where there is no PostgreSQL."""
    if backend == "sqlite":
        yield sqlite_url(directory / "eda.sqlite3")
        return
    address = os.environ.get(VARIABLE)
    if not address:
        pytest.skip(f"{VARIABLE} names no PostgreSQL database")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (the extra 'postgres')")
    url = make_url(address).set(drivername="postgresql+psycopg")
    schema = f"eda_test_{uuid.uuid4().hex}"
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with admin.connect() as connection:
            connection.execute(text(f"CREATE SCHEMA {schema}"))
        try:
            yield url.update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(
                hide_password=False
            )
        finally:
            with admin.connect() as connection:
                connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    finally:
        admin.dispose()


def url_of(database: Database) -> str:
    """With its password, for another process or a second pool."""
    return database.engine.url.render_as_string(hide_password=False)
