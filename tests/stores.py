"""Stores for tests, on SQLite and on a PostgreSQL.

PostgreSQL is tested where MOSS_TEST_POSTGRES names a server on which databases may be made; `.ci/run` starts one.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from moss.serve.refused import Refused
from moss.serve.store.database import Database, read_url
from moss.serve.store.tables import Base

ENGINES = ["sqlite", "postgresql"]


@contextlib.contextmanager
def place(kind: str, folder: Path) -> Iterator[str]:
    """The address of a database that does not exist yet, or is empty."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/{uuid.uuid4().hex}.db"
        return
    server = os.environ.get("MOSS_TEST_POSTGRES")
    if not server:
        pytest.skip("MOSS_TEST_POSTGRES names no PostgreSQL")
    name = f"moss_{uuid.uuid4().hex}"
    admin = create_engine(read_url(server), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            yield make_url(server).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


def empty(store: Database) -> None:
    """Make a store as it was when it was new, for the next test."""
    with store.write() as db:
        for table in reversed(Base.metadata.sorted_tables):
            db.execute(table.delete())


def refused(status: int, words: str = "") -> Any:
    """What is refused with this status, in these words."""
    return pytest.raises(Refused, match=words or None, check=lambda error: error.status == status)
