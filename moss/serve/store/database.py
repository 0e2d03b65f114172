"""Opening the store: one door to read, one to write, always at the newest schema.

    with Database.open("sqlite:///moss.db") as database:      # or postgresql://user:password@host/name
        with database.write() as db:                          # one transaction, a `sqlalchemy.orm.Session`
            db.add(User(email="a@example.org"))
        with database.read() as db:
            db.scalars(select(User)).all()

SQLite: write-ahead log, every commit on the disk (`synchronous=FULL`), foreign keys on. All writes of a process go
through one connection and begin with BEGIN IMMEDIATE: a transaction that reads first and writes later would fail with
"database is locked" however long it may wait. One process serves a file, and a lock beside it keeps it so, for SQLite
before 3.51.3 can damage the log where several processes write; several workers want PostgreSQL.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from moss.errors import one_line
from moss.serve.store.tables import Base

READERS = 8  # connections that read at a time
WAIT = 30.0  # seconds for a connection
LOG_BYTES = 64 << 20  # of a write-ahead log, beyond which its file is cut when it can be
MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATING = 0x6D6F7373  # the lock that two workers take in PostgreSQL before they migrate


class Database:
    """An open store. Any number of threads may use it at once."""

    def __init__(self, url: URL, engines: tuple[Engine, Engine], held: ExitStack) -> None:
        self.url = url
        self._reader, self._writer = engines
        self._held = held

    @classmethod
    def open(cls, url: str, *, migrate: bool = True) -> Self:
        """The store at `url`, made where there is none.

        migrate: it is moved to the newest schema.
        ValueError where it cannot be opened: in use by another process, newer than this program, no database.
        """
        place = read_url(url)
        try:
            with ExitStack() as held:
                if file := file_of(place):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    check_file(file)
                    held.enter_context(_alone(file))
                engines = _engines(place)
                held.callback(engines[1].dispose)
                held.callback(engines[0].dispose)
                database = cls(place, engines, held)
                if migrate:
                    database.migrate()
                database._held = held.pop_all()
                return database
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise ValueError(f"{shown(place)} cannot be opened: {one_line(getattr(error, 'orig', error))}") from None

    def close(self) -> None:
        """Give back all connections and the lock."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that sees one state and changes nothing."""
        with Session(self._reader, expire_on_commit=False) as db, db.begin():
            yield db

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is kept as a whole when the block ends, or not at all when it raises."""
        with Session(self._writer, expire_on_commit=False) as db, db.begin():
            yield db

    def schema(self) -> str:
        """The revision of the schema, "" before the first."""
        with self._reader.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision() or ""

    def migrate(self, to: str = "head") -> list[str]:
        """Move the schema to a revision, in one transaction, and name the steps; ValueError where it is newer."""
        done: list[str] = []
        with _migrating(self._writer) as connection:
            found = MigrationContext.configure(connection).get_current_revision() or ""
            if found not in ("", *_revisions()):
                raise ValueError(
                    f"{shown(self.url)} has schema {found}, made by a newer moss; this one knows {newest()}"
                )

            def steps(revision: Any, context: MigrationContext) -> Any:
                chosen = SCRIPTS._upgrade_revs(to, revision)
                done.extend(step.revision.revision for step in chosen)
                return chosen

            with EnvironmentContext(Config(), SCRIPTS, fn=steps) as environment:
                environment.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
                environment.run_migrations()
        return done


SCRIPTS = ScriptDirectory(str(MIGRATIONS))


def newest() -> str:
    """The revision that this program works with."""
    head = SCRIPTS.get_current_head()
    assert head
    return head


def _revisions() -> set[str]:
    return {script.revision for script in SCRIPTS.walk_revisions()}


def read_url(url: str) -> URL:
    """The address of a database: `sqlite:///file`, `postgresql://…`, or the path of a file alone."""
    try:
        place = make_url(url if "://" in url else f"sqlite:///{Path(url).expanduser()}")
    except ArgumentError:
        raise ValueError(f"--database-url {url!r} is no address such as sqlite:///moss.db") from None
    backend = place.get_backend_name()
    if backend == "sqlite" and place.database not in (None, "", ":memory:"):
        return place.set(drivername="sqlite+pysqlite", database=str(Path(place.database or "").expanduser()))
    if backend in ("postgresql", "postgres") and place.database:
        return place.set(drivername="postgresql+psycopg")
    raise ValueError(f"--database-url {shown(place)} is neither sqlite:///FILE nor postgresql://USER@HOST/NAME")


def shown(place: URL) -> str:
    """The address for people, without its password."""
    return place.database or "" if place.get_backend_name() == "sqlite" else place.render_as_string(hide_password=True)


def file_of(place: URL) -> Path | None:
    """The file of a SQLite database."""
    return Path(place.database or "") if place.get_backend_name() == "sqlite" else None


def check_file(file: Path) -> None:
    """ValueError where a file is no database, or a newer one, found out without touching it."""
    if not file.exists() or not file.stat().st_size:
        return
    with file.open("rb") as opened:
        if opened.read(16) != b"SQLite format 3\0":
            raise ValueError(f"{file} is no SQLite database")
    if file.with_name(f"{file.name}-wal").exists():
        return  # a reader would have to write the log's index; `migrate` looks again
    connection = sqlite3.connect(f"{file.absolute().as_uri()}?immutable=1", uri=True)
    try:
        found = {row[0] for row in connection.execute("SELECT version_num FROM alembic_version")}
    except sqlite3.DatabaseError:
        found = set()
    finally:
        connection.close()
    if unknown := found - _revisions():
        raise ValueError(f"{file} has schema {', '.join(unknown)}, made by a newer moss; this one knows {newest()}")


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    lock = FileLock(f"{file}.lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"{file} is in use by another moss; several workers need --database-url postgresql://…"
        ) from None


def _engines(place: URL) -> tuple[Engine, Engine]:
    """A reading and a writing engine."""
    if place.get_backend_name() == "postgresql":
        engine = create_engine(place, pool_size=READERS, max_overflow=READERS, pool_timeout=WAIT, pool_pre_ping=True)
        return engine.execution_options(postgresql_readonly=True, isolation_level="REPEATABLE READ"), engine
    reader = create_engine(place, pool_size=READERS, max_overflow=0, pool_timeout=WAIT)
    writer = create_engine(place, pool_size=1, max_overflow=0, pool_timeout=WAIT)
    for engine, begin in ((reader, "BEGIN"), (writer, "BEGIN IMMEDIATE")):
        event.listen(engine, "connect", _connected)
        event.listen(engine, "begin", lambda connection, begin=begin: connection.exec_driver_sql(begin))
    event.listen(reader, "connect", lambda raw, record: raw.execute("PRAGMA query_only=ON"))
    return reader, writer


def _connected(raw: sqlite3.Connection, record: object) -> None:
    raw.isolation_level = None  # transactions begin where we say so
    for pragma in (
        "busy_timeout=5000",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"journal_size_limit={LOG_BYTES}",
    ):
        raw.execute(f"PRAGMA {pragma}")


@contextmanager
def _migrating(engine: Engine) -> Iterator[Connection]:
    """A transaction in which tables may be made anew."""
    with engine.connect() as connection:
        sqlite = connection.dialect.name == "sqlite"
        if sqlite:  # not within a transaction; a table that is made anew must not take its children with it
            connection.connection.execute("PRAGMA foreign_keys=OFF")  # type: ignore[attr-defined]
        try:
            with connection.begin():
                if not sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATING})
                yield connection
                if sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").first()):
                    raise ValueError(f"after the migration a row of {broken[0]} points to none of {broken[2]}")
        finally:
            if sqlite:
                connection.connection.execute("PRAGMA foreign_keys=ON")  # type: ignore[attr-defined]
