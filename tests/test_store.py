"""What the service remembers: the same on SQLite and PostgreSQL, whatever is put into it and whoever is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event, func, inspect, select, text
from sqlalchemy.exc import DBAPIError, StatementError

from moss.__main__ import main
from moss.serve.store import database as database_module
from moss.serve.store.backup import backup, restore
from moss.serve.store.database import SCRIPTS, Database, newest, read_url
from moss.serve.store.tables import Artefact, Base, Conversation, Feedback, Login, Message, Round, Setting, User
from moss.serve.store.types import mended, now
from tests.stores import ENGINES, place


@pytest.fixture(params=ENGINES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with place(request.param, tmp_path) as address:
        yield address


@pytest.fixture
def store(url: str) -> Iterator[Database]:
    with Database.open(url) as opened:
        yield opened


def person(store: Database, email: str = "a@example.org") -> str:
    with store.write() as db:
        user = User(email=email)
        db.add(user)
    return user.id


def talk(store: Database, owner: str, turns: int = 1) -> str:
    """A conversation of some turns, each with all that can hang on it."""
    with store.write() as db:
        conversation = Conversation(owner=owner, title="天气")
        db.add(conversation)
        db.flush()
        parent = None
        for number in range(turns):
            question = Message(owner=owner, conversation=conversation.id, parent=parent, role="user", text=f"{number}?")
            answer = Message(
                owner=owner,
                conversation=conversation.id,
                parent=question.id,
                role="assistant",
                ids=[0, 70_000, 2**32 - 1],
            )
            db.add_all([question, answer])
            parent = answer.id
        db.flush()
        db.add(Round(message=parent or "", number=0, owner=owner, thoughts="t", commands="c", results="r"))
        db.add(Artefact(owner=owner, message=parent or "", call=0, name="Search", args=["x"], ok=True, data=b"\0\xff"))
        db.add(Feedback(message=parent or "", owner=owner, rating=1))
    return conversation.id


def count(store: Database) -> dict[str, int]:
    with store.read() as db:
        return {
            table.name: db.scalar(select(func.count()).select_from(table)) or 0 for table in Base.metadata.sorted_tables
        }


# ------------------------------------------------------------------------------------------------------------- values

HARD = [
    "",
    "plain",
    "a\0b",
    "\0",
    "\ud800",
    "\udfff tail",
    "\ud83d\ude00 a pair of surrogates is one character",
    "😀 天气 \u202e \ufeff \u2028",
    "'; DROP TABLE users; --",
    "%",
    "_",
    "\\",
    "x" * 1_000_000,
    "\U0010ffff",
]


@pytest.mark.parametrize("words", HARD, ids=range(len(HARD)))
def test_text_comes_back_the_same_from_both(words: str, store: Database) -> None:
    """Prevents a message that one database takes and the other refuses, or a half character that ends a request."""
    owner = person(store)
    with store.write() as db:
        conversation = Conversation(owner=owner, title=words, switches={words: [words, 1, None, True, 0.1]})
        db.add(conversation)
    kept = mended(words)
    assert kept == words.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    with store.read() as db:
        found = db.scalars(select(Conversation).where(Conversation.title == words)).one()
        assert found.title == kept
        said = words if "\0" in words else kept  # JSON can say NUL
        assert found.switches == {said: [said, 1, None, True, 0.1]}
        assert (found.id, found.created) == (conversation.id, conversation.created)


def test_ids_and_times_come_back(store: Database) -> None:
    """Prevents ids that no longer fit, and times that change with the machine's time zone."""
    owner = person(store)
    at = datetime(2026, 11, 20, 23, 59, 59, 123_456, timezone(timedelta(hours=8)))
    with store.write() as db:
        db.add(Login(owner=owner, digest="d", expires=at))
    talk(store, owner)
    with store.read() as db:
        expires = db.scalars(select(Login.expires)).one()
        assert (expires, expires.tzinfo) == (at, UTC)
        assert db.scalars(select(Message.ids).where(Message.role == "assistant")).one() == [0, 70_000, 2**32 - 1]
        assert db.scalars(select(Message.ids).where(Message.role == "user")).one() is None
        assert db.scalars(select(Artefact.data)).one() == b"\0\xff"
        assert db.scalars(select(Login.expires).where(Login.expires < at + timedelta(microseconds=1))).all()
        assert not db.scalars(select(Login.expires).where(Login.expires < at)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_say_is_refused(value: object, store: Database) -> None:
    """Prevents a setting that SQLite keeps and no reader can parse."""
    with pytest.raises(StatementError), store.write() as db:
        db.add(Setting(name="x", value=value))
    assert count(store)["settings"] == 0


# ------------------------------------------------------------------------------------------------------- transactions


def test_a_transaction_is_whole(store: Database) -> None:
    """Prevents half a message: what raises leaves nothing, and readers see nothing before the end."""
    with pytest.raises(RuntimeError), store.write() as db:
        db.add(User(email="a@example.org"))
        db.flush()
        raise RuntimeError
    assert count(store)["users"] == 0
    with store.write() as db:
        db.add(User(email="b@example.org"))
        db.flush()
        assert count(store)["users"] == 0
    assert count(store)["users"] == 1


def test_the_reading_door_changes_nothing(store: Database) -> None:
    """Prevents a write past the one connection that may write."""
    with pytest.raises(DBAPIError), store.read() as db:
        db.add(User(email="a@example.org"))
    assert count(store)["users"] == 0


def test_reading_sees_one_state(store: Database) -> None:
    """Prevents a page that shows a conversation of before and messages of after."""
    with store.read() as db:
        assert db.scalar(select(func.count()).select_from(User)) == 0
        person(store)
        assert db.scalar(select(func.count()).select_from(User)) == 0


def test_read_then_write_from_many_threads(store: Database) -> None:
    """Prevents "database is locked", which SQLite says at once to a transaction that reads before it writes."""
    owner, waits, faults = person(store), list[float](), list[BaseException]()

    def work() -> None:
        try:
            for _ in range(20):
                began = time.perf_counter()
                with store.write() as db:
                    user = db.get(User, owner, with_for_update=True)
                    assert user
                    time.sleep(0)  # another thread reads now
                    user.offences += 1
                waits.append(time.perf_counter() - began)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and len(waits) == 160
    with store.read() as db:
        assert db.scalars(select(User.offences)).one() == 160


def test_an_account_takes_everything_along(store: Database) -> None:
    """Prevents rows of people who have left, and a conversation too long to be deleted (SQLite follows a thousand)."""
    owner, other = person(store), person(store, "b@example.org")
    talk(store, owner, turns=1500)
    talk(store, other)
    assert count(store)["messages"] == 3002
    with store.write() as db:
        db.delete(db.get_one(User, owner))
    left = count(store)
    names = ("users", "conversations", "messages", "rounds", "artefacts", "feedback")
    assert {name: left[name] for name in names} == dict(zip(names, (1, 1, 2, 1, 1, 1)))


def test_foreign_keys_hold_on_every_connection(store: Database) -> None:
    """Prevents rows that belong to nobody, which SQLite allows on a connection that did not ask for foreign keys."""
    with contextlib.ExitStack() as several:
        for _ in range(3):
            several.enter_context(store.read())
    with pytest.raises(DBAPIError), store.write() as db:
        db.add(Conversation(owner="nobody"))
    if store.url.get_backend_name() == "sqlite":
        for engine in (store._reader, store._writer):
            with engine.connect() as connection:
                pragma = {
                    name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                    for name in ("foreign_keys", "synchronous", "journal_mode")
                }
                assert pragma == {"foreign_keys": 1, "synchronous": 2, "journal_mode": "wal"}


def test_everything_of_a_person_says_whose_it_is() -> None:
    """Prevents a table of people's things that could be read without naming the owner."""
    without = {table.name for table in Base.metadata.sorted_tables if "owner" not in table.c}
    assert without == {"users", "invites", "settings", "audit"}
    for table in Base.metadata.sorted_tables:
        if "owner" in table.c:
            keys = {key.column.table.name: key.ondelete for key in table.c.owner.foreign_keys}
            assert keys == {"users": "CASCADE"}, table.name


# --------------------------------------------------------------------------------------------------------- being ended

WRITER = """
import sys
from moss.serve.store.database import Database
from moss.serve.store.tables import User
with Database.open(sys.argv[1]) as store:
    print("ready", flush=True)
    for number in range(100_000):
        with store.write() as db:
            db.add(User(email=f"{sys.argv[2]}-{number}@example.org", settings={"text": "x" * 2000}))
        print(number, flush=True)
"""


@pytest.mark.repeated
def test_what_was_acknowledged_survives_a_kill(url: str, repeats: int) -> None:
    """Prevents a message that its sender saw stored and that is gone after kill -9 (case 112)."""
    writers = 1 if url.startswith("sqlite") else 3  # one process writes to a file
    told: set[str] = set()
    for attempt in range(repeats):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, url, f"{attempt}-{number}"], stdout=subprocess.PIPE, text=True
            )
            for number in range(writers)
        ]
        for number, process in enumerate(processes):
            assert process.stdout and process.stdout.readline() == "ready\n"
            lines = [process.stdout.readline().strip() for _ in range(1 + attempt % 7)]
            time.sleep(0.001 * (attempt % 5))
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.read().split("\n")[:-1]
            process.wait()
            told.update(f"{attempt}-{number}-{line}@example.org" for line in lines)
        with Database.open(url) as store:
            with store.read() as db:
                kept = set(db.scalars(select(User.email)))
            assert told <= kept and len(kept) <= len(told) + (attempt + 1) * writers
            if store.url.get_backend_name() == "sqlite":
                with store._reader.connect() as connection:
                    assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    assert told


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    """Prevents a full disk that damages what was stored, or that lasts longer than it is full."""
    with Database.open(str(tmp_path / "a.db")) as store:
        person(store)
        with store._writer.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        with pytest.raises(DBAPIError, match="full"), store.write() as db:
            db.add(User(email="b@example.org", settings={"text": "x" * 100_000}))
        assert count(store)["users"] == 1
        with store._writer.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=1000000")
        person(store, "b@example.org")
        assert count(store)["users"] == 2


def test_the_log_is_cut_after_a_long_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a write-ahead log that keeps the size of the busiest hour for ever, and a reader that stops writers."""
    monkeypatch.setattr(database_module, "LOG_BYTES", 1 << 20)
    file, log = tmp_path / "a.db", tmp_path / "a.db-wal"
    with Database.open(str(file)) as store:
        with store.read() as db:
            db.scalars(select(User)).all()
            for number in range(60):
                with store.write() as other:
                    other.add(User(email=f"{number}@example.org", settings={"text": "x" * 100_000}))
            assert log.stat().st_size > 4 << 20
        for number in range(60, 63):
            person(store, f"{number}@example.org")
        assert log.stat().st_size <= 1 << 20
        assert count(store)["users"] == 63


# -------------------------------------------------------------------------------------------------------------- opening


def test_one_process_serves_a_file(tmp_path: Path) -> None:
    """Prevents two servers on one file, which SQLite before 3.51.3 does not survive for sure."""
    file = str(tmp_path / "deep" / "a.db")
    with Database.open(file), pytest.raises(ValueError, match=r"a\.db is in use by another moss; .* postgresql"):
        Database.open(file)
    Database.open(file).close()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("mysql://a@b/c", "neither sqlite:///FILE nor postgresql://USER@HOST/NAME"),
        ("sqlite://", "neither"),
        ("sqlite:///:memory:", "neither"),
        ("postgresql://a:secret@b", "neither"),
        ("postgresql://a:secret@127.0.0.1:1/c", "cannot be opened"),
        ("://", "is no address such as"),
        ("{folder}", "directory"),
        ("{folder}/photo.jpg", "is no SQLite database"),
        ("/proc/moss/a.db", "/proc"),
    ],
)
def test_what_is_no_store(address: str, words: str, tmp_path: Path) -> None:
    """Prevents a traceback, or a password, for an address that is wrong."""
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff" + bytes(500))
    with pytest.raises((ValueError, OSError), match=words) as told:
        Database.open(address.format(folder=tmp_path))
    assert "secret" not in str(told.value) and "\n" not in str(told.value)


# ----------------------------------------------------------------------------------------------------------- migrations


def test_a_new_store_has_the_tables_that_the_program_names(store: Database) -> None:
    """Prevents a column that was added to the tables and to no migration."""
    with store._reader.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    assert store.schema() == newest() and store.migrate() == []


@pytest.mark.parametrize("revision", [script.revision for script in SCRIPTS.walk_revisions()])
def test_every_schema_comes_to_the_newest(revision: str, url: str) -> None:
    """Prevents a release that cannot open the stores of an earlier one, or that loses what they hold."""
    with Database.open(url, migrate=False) as store:
        assert store.migrate(revision)
        before = _rows(store)
        assert len(before) == len(inspect(store._reader).get_table_names()) - 1, (
            f"schemas/{revision}.sql leaves tables out"
        )
        store.migrate()
        assert store.schema() == newest()
        after = _rows(store)
        assert {name: len(rows) for name, rows in after.items() if rows} == {
            name: len(rows) for name, rows in before.items()
        }
        with store._reader.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def _rows(store: Database) -> dict[str, list[object]]:
    """All rows; first some, where there are none, by what the schema of that time asks for."""
    with store._writer.begin() as connection:
        tables = inspect(connection).get_table_names()
        if not connection.execute(text("SELECT count(*) FROM users")).scalar():
            for statement in (Path(__file__).parent / "schemas" / f"{store.schema()}.sql").read_text().split(";\n"):
                if statement.strip():
                    connection.execute(text(statement))
        return {
            name: list(connection.execute(text(f"SELECT * FROM {name}")))
            for name in sorted(tables)
            if name != "alembic_version" and connection.execute(text(f"SELECT 1 FROM {name}")).first()
        }


def test_a_migration_that_breaks_leaves_the_old_schema(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a store between two schemas after a power cut in the middle (case 114)."""
    with Database.open(url, migrate=False) as store:
        statements = 0

        def cut(connection: object, cursor: object, statement: str, *rest: object) -> None:
            nonlocal statements
            statements += statement.lstrip().startswith("CREATE TABLE")
            if statements == 7:
                raise OSError("power cut")

        event.listen(store._writer, "before_cursor_execute", cut)
        with pytest.raises(OSError, match="power cut"):
            store.migrate()
        event.remove(store._writer, "before_cursor_execute", cut)
        with store._reader.connect() as connection:
            assert inspect(connection).get_table_names() == []
        assert store.migrate() and store.schema() == newest()


def test_a_newer_store_is_refused_untouched(url: str) -> None:
    """Prevents an old program that writes into a store that it does not understand (case 115)."""
    with Database.open(url) as store, store.write() as db:
        db.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    file = read_url(url).database if url.startswith("sqlite") else None
    before = Path(file).read_bytes() if file else b""
    with pytest.raises(ValueError, match=r"schema 9999, made by a newer moss"):
        Database.open(url)
    assert not file or Path(file).read_bytes() == before


# -------------------------------------------------------------------------------------------------------------- backups


def test_a_backup_moves_between_engines(url: str, tmp_path: Path) -> None:
    """Prevents a backup that cannot be restored, or that only fits what it was made from."""
    with Database.open(url) as store:
        talk(store, person(store), turns=700)
        before = count(store)
    rows = backup(url, tmp_path / "backup.db")
    assert rows == sum(before.values())
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(("backup", ".backup"))] == ["backup.db"]
    for kind in ENGINES if "MOSS_TEST_POSTGRES" in os.environ else ENGINES[:1]:
        with place(kind, tmp_path) as empty:
            assert restore(empty, tmp_path / "backup.db") == rows
            with Database.open(empty) as store:
                assert count(store) == before
                with store.read() as db:
                    assert db.scalars(select(Message.ids).where(Message.role == "assistant")).first() == [
                        0,
                        70_000,
                        2**32 - 1,
                    ]
            with pytest.raises(ValueError, match="already"):
                restore(empty, tmp_path / "backup.db")


def test_a_backup_while_the_service_writes(url: str, tmp_path: Path) -> None:
    """Prevents a backup that lacks what was stored before it began, or holds half of a transaction (case 116)."""
    stop = threading.Event()
    with Database.open(url) as store:
        owner = person(store)

        def work() -> None:
            while not stop.is_set():
                talk(store, owner, turns=3)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            while count(store)["conversations"] < 5:
                time.sleep(0.01)
            before = count(store)
            backup(url, tmp_path / "backup.db")
        finally:
            stop.set()
            thread.join()
    with Database.open(str(tmp_path / "backup.db")) as copy:
        kept = count(copy)
        assert all(kept[name] >= before[name] for name in before)
        assert kept["messages"] == 6 * kept["conversations"] and kept["feedback"] == kept["conversations"]


def test_the_store_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents commands that say nothing, or a traceback for a wrong file."""
    file, copy = tmp_path / "a.db", tmp_path / "copy.db"
    assert main(["store", "backup", str(copy), "--database-url", str(file)]) == 1
    assert f"moss store backup: there is no store at {file}" in capsys.readouterr().err and not copy.exists()
    assert main(["store", "migrate", "--database-url", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: schema none -> {newest()}\n"
    assert main(["store", "migrate", "--database-url", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: schema {newest()}, the newest\n"
    assert main(["store", "backup", str(copy), "--database-url", str(file)]) == 0
    assert capsys.readouterr().out == f"0 rows, checked: {copy}\n"
    assert main(["store", "restore", str(copy), "--database-url", str(file)]) == 1
    assert "is there already; move it away" in capsys.readouterr().err
    assert main(["store", "restore", str(tmp_path / "none.db"), "--database-url", str(file)]) == 1
    assert "there is no backup" in capsys.readouterr().err
    copy.write_bytes(copy.read_bytes()[:5000])
    assert main(["store", "restore", str(copy), "--database-url", str(tmp_path / "b.db")]) == 1
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "b.db").exists()


def test_a_damaged_backup_is_found(tmp_path: Path) -> None:
    """Prevents a restore that fills the store with what a disk has eaten."""
    file, copy = tmp_path / "a.db", tmp_path / "copy.db"
    with Database.open(str(file)) as store:
        talk(store, person(store), turns=400)
    backup(str(file), copy)
    whole = copy.read_bytes()
    copy.write_bytes(whole[:8192] + bytes(16384) + whole[24576:])
    with pytest.raises(ValueError, match="is damaged"):
        restore(str(tmp_path / "b.db"), copy)
    assert not (tmp_path / "b.db").exists()


def test_times_are_utc() -> None:
    """Prevents times of the machine's own zone."""
    assert now().utcoffset() == timedelta(0)
