"""`moss store`: the whole store in one file, back from it, and to the newest schema.

moss store backup moss-2026-11-20.db                        # while the service runs
moss store restore moss-2026-11-20.db --database-url postgresql://moss@localhost/moss
moss store migrate

A backup is a SQLite database, whatever it was made from: it can be looked at with any tool, and it is the way from
SQLite to PostgreSQL and back. It holds all that was committed before it began, and is checked before it gets its name.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from moss.config import option
from moss.errors import UsageError
from moss.files import replacing

try:
    from sqlalchemy import insert, select

    from moss.serve.store.database import Database, check_file, file_of, newest, read_url, shown
    from moss.serve.store.tables import Base
except ImportError as error:
    raise UsageError(f"the service needs some packages: pip install -e '.[serve]' ({error})") from None

STORE = "~/.local/share/moss/moss.db"  # where it is unless another place is named
ROWS = 500  # written at a time


@dataclass(frozen=True)
class Backup:
    """Copy the service's store into one file, while it runs."""

    file: Path = option(positional=True)  # SQLite file to write
    database_url: str = STORE  # the store: a SQLite file or postgresql://USER@HOST/NAME


@dataclass(frozen=True)
class Restore:
    """Fill an empty store from a backup."""

    file: Path = option(positional=True)  # what `moss store backup` wrote
    database_url: str = STORE  # the store to fill, which must not hold anything yet


@dataclass(frozen=True)
class Migrate:
    """Bring the store to the newest schema; `moss serve` does so too when it starts."""

    database_url: str = STORE  # the store: a SQLite file or postgresql://USER@HOST/NAME


def main(config: Backup | Restore | Migrate) -> int:
    """Run `moss store backup`, `restore` or `migrate`."""
    if isinstance(config, Migrate):
        return _migrate(config.database_url)
    work = backup if isinstance(config, Backup) else restore
    print(f"{work(config.database_url, config.file)} rows, checked: {config.file}")
    return 0


def backup(url: str, file: Path) -> int:
    """Copy the store at `url` into a SQLite file; how many rows it has."""
    place = read_url(url)
    with replacing(file) as beside, TemporaryDirectory() as folder:
        source = file_of(place)
        if source is None:
            source = Path(folder, "copy.db")
            with Database.open(url, migrate=False) as full, Database.open(str(source)) as empty:
                if full.schema() != newest():
                    raise ValueError(f"{shown(place)} has an older schema; bring it up with: moss store migrate")
                _copy_rows(full, empty)
        if not source.is_file():
            raise ValueError(f"there is no store at {source}")
        check_file(source)
        _copy_file(source, beside)
        return _checked(beside)


def restore(url: str, file: Path) -> int:
    """Fill the store at `url` from a backup; how many rows it has now."""
    if not file.is_file():
        raise ValueError(f"there is no backup {file}")
    check_file(file)
    place = read_url(url)
    if target := file_of(place):
        if target.exists():
            raise ValueError(f"{target} is there already; move it away, or name another --database-url")
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as beside:
            _copy_file(file, beside)
            rows = _checked(beside)
        with Database.open(url):  # brings an older backup to the newest schema
            return rows
    with TemporaryDirectory() as folder:
        copy = Path(folder, "copy.db")
        _copy_file(file, copy)
        with Database.open(str(copy)) as full, Database.open(url) as empty:
            if not _is_empty(empty):
                raise ValueError(f"{shown(place)} holds something already; restore into an empty database")
            _copy_rows(full, empty)
        return _checked(copy)


def _migrate(url: str) -> int:
    with Database.open(url, migrate=False) as database:
        before = database.schema()
        done = database.migrate()
    steps = f"{before or 'none'} -> {done[-1]}" if done else f"{before}, the newest"
    print(f"{shown(database.url)}: schema {steps}")
    return 0


def _copy_file(source: Path, target: Path) -> None:
    """The whole of a SQLite database, as it is at one moment, in one file."""
    with _reading(source) as full, closing(sqlite3.connect(target)) as empty:
        full.backup(empty)
        empty.execute("PRAGMA journal_mode=DELETE")  # nothing beside the file


def _checked(file: Path) -> int:
    """The rows in a SQLite file, which is whole; ValueError where it is not."""
    with _reading(file) as database:
        found = database.execute("PRAGMA integrity_check").fetchone()[0]
        if found != "ok":
            raise ValueError(f"{file} is damaged: {found}")
        names = [row[0] for row in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        own = [name for name in names if name in Base.metadata.tables]
        return sum(database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in own)


@contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    """A SQLite file, to read from; ValueError where it cannot be."""
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            yield database
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def _copy_rows(full: Database, empty: Database) -> None:
    with full.read() as source, empty.write() as target:
        for table in Base.metadata.sorted_tables:
            found = source.execute(select(table).execution_options(yield_per=ROWS))
            for rows in found.mappings().partitions():
                target.execute(insert(table), [dict(row) for row in rows])


def _is_empty(database: Database) -> bool:
    with database.read() as db:
        return all(db.execute(select(table).limit(1)).first() is None for table in Base.metadata.sorted_tables)
