"""Conversations: a tree that only its owner can see, and the same dialog for the model however it is walked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import event

from moss.chat import META_INSTRUCTION
from moss.serve.store.database import Database
from moss.serve.store.tables import Base, Conversation, Message, Round, User
from moss.serve.store.types import now
from moss.serve.talks import MOST_TEXT, Talks
from tests.stores import refused


def person(store: Database, email: str) -> Talks:
    with store.write() as db:
        user = User(email=email)
        db.add(user)
    return Talks(store, user.id)


@pytest.fixture
def mine(store: Database) -> Talks:
    return person(store, "a@example.org")


@pytest.fixture
def theirs(store: Database) -> Talks:
    return person(store, "b@example.org")


def answer(store: Database, question: Message, text: str, state: str = "whole", commands: str = "None") -> Message:
    """An answer as a run leaves it."""
    made = Message(
        owner=question.owner,
        conversation=question.conversation,
        parent=question.id,
        role="assistant",
        text=text,
        state=state,
    )
    with store.write() as db:
        db.add(made)
        db.flush()
        db.add(Round(message=made.id, number=0, owner=made.owner, thoughts="t", commands=commands, results="r"))
    return made


def texts(talks: Talks, question: Message) -> list[tuple[str, str]]:
    return [(turn.human, turn.reply) for turn in talks.dialog(question.id).turns]


def test_a_conversation_as_the_model_reads_it(mine: Talks, store: Database) -> None:
    """Prevents a model that reads another branch, its own failures, or what was never said."""
    talk = mine.create(switches={"calculator": True})
    first = mine.ask(talk.id, " 今天天气？ ")
    good = answer(store, first, "晴。", commands='Search("天气")')
    worse = answer(store, first, "雨。")
    second = mine.ask(talk.id, "And tomorrow?", good.id)
    answer(store, second, "", "failed")
    failed = answer(store, second, "half", "failed")
    third = mine.ask(talk.id, "Again?", failed.id)
    assert texts(mine, third) == [(" 今天天气？ ", "晴。"), ("Again?", "")]
    stopped = answer(store, third, "I was", "stopped")
    fourth = mine.ask(talk.id, "Go on", stopped.id)
    assert texts(mine, fourth)[1:] == [("Again?", "I was"), ("Go on", "")]
    assert texts(mine, mine.ask(talk.id, "Why?", worse.id)) == [(" 今天天气？ ", "雨。"), ("Why?", "")]
    assert texts(mine, first) == [(" 今天天气？ ", "")]
    dialog = mine.dialog(fourth.id)
    assert dialog.switches == {"calculator": True} and dialog.meta == META_INSTRUCTION
    assert [(each.thoughts, each.commands, each.results) for each in dialog.turns[0].rounds] == [
        ("t", 'Search("天气")', "r")
    ]
    assert mine.get(talk.id).title == "今天天气？" and len(mine.messages(talk.id)) == 10


def test_lists_and_search(mine: Talks, theirs: Talks, store: Database) -> None:
    """Prevents conversations that cannot be found by two Chinese characters, or that appear on two pages of a list."""
    made = [mine.create(title=title) for title in ("Weather 天气", "100%", "a_b", "x" * 200)]
    mine.ask(made[2].id, "Where is 上海 in CHINA?")
    theirs.ask(theirs.create().id, "上海")
    for search, hits in {
        "天气": [0],
        "weather": [0],
        "上海": [2],
        "china": [2],
        "%": [1],
        "_": [2],
        "'": [],
        "\0": [],
    }.items():
        assert [each.id for each in mine.find(search)] == [made[number].id for number in hits], search
    assert mine.get(made[3].id).title == "x" * 79 + "…"
    same = now() - timedelta(days=1)
    with store.write() as db:
        for conversation in db.query(Conversation).filter_by(owner=mine.owner):
            conversation.changed = same
    pages, before = [], ""
    while page := mine.find(before=before, limit=3):
        pages += [each.id for each in page]
        before = page[-1].id
    assert sorted(pages) == sorted(each.id for each in made) and len(pages) == 4


def test_what_is_not_a_message(mine: Talks, store: Database) -> None:
    """Prevents empty questions, endless ones, and questions that hang on the wrong thing."""
    talk, other = mine.create(), mine.create()
    for empty in ("", "  \n\t", "\u3000"):
        with refused(400, "must say something"):
            mine.ask(talk.id, empty)
    with refused(400, "at most 100,000"):
        mine.ask(talk.id, "x" * (MOST_TEXT + 1))
    question = mine.ask(talk.id, "1?")
    with refused(400, "follows an answer"):
        mine.ask(talk.id, "2?", question.id)
    with refused(404):
        mine.ask(other.id, "2?", answer(store, question, "1").id)
    with refused(404):
        mine.change(other.id, leaf=question.id)
    with refused(400, "only answers"):
        mine.rate(question.id, 1)
    assert [each.message.text for each in mine.messages(talk.id)] == ["1?", "1"]


def test_ratings(mine: Talks, store: Database) -> None:
    """Prevents two opinions of one person on one answer, and one that cannot be taken back."""
    talk = mine.create()
    reply = answer(store, mine.ask(talk.id, "1?"), "1")
    mine.rate(reply.id, 1)
    mine.rate(reply.id, -1, "错了")
    found = mine.messages(talk.id)[1].feedback
    assert found and (found.rating, found.text) == (-1, "错了")
    assert mine.rate(reply.id, 0) is None and mine.messages(talk.id)[1].feedback is None
    with refused(400, "rating is 5"):
        mine.rate(reply.id, 5)


STRANGE: dict[str, Callable[[Talks, Conversation, Message, Message], object]] = {
    "get": lambda talks, talk, question, reply: talks.get(talk.id),
    "change": lambda talks, talk, question, reply: talks.change(talk.id, title="mine"),
    "delete": lambda talks, talk, question, reply: talks.delete(talk.id),
    "messages": lambda talks, talk, question, reply: talks.messages(talk.id),
    "ask": lambda talks, talk, question, reply: talks.ask(talk.id, "?"),
    "ask behind": lambda talks, talk, question, reply: talks.ask(talks.create().id, "?", reply.id),
    "rate": lambda talks, talk, question, reply: talks.rate(reply.id, 1),
    "dialog": lambda talks, talk, question, reply: talks.dialog(question.id),
    "page": lambda talks, talk, question, reply: talks.find(before=talk.id),
}


@pytest.mark.parametrize("deed", STRANGE)
def test_what_belongs_to_others_does_not_exist(deed: str, mine: Talks, theirs: Talks, store: Database) -> None:
    """Prevents reading, changing or deleting by id what somebody else wrote (case 82)."""
    talk = mine.create(title="secret")
    question = mine.ask(talk.id, "1?")
    reply = answer(store, question, "1")
    with refused(404):
        STRANGE[deed](theirs, talk, question, reply)
    assert mine.get(talk.id).title == "secret" and len(mine.messages(talk.id)) == 2
    ghost = Message(owner=mine.owner, conversation="", role="")
    with refused(404):
        STRANGE[deed](mine, Conversation(owner=mine.owner), ghost, ghost)


def test_every_query_names_the_owner(mine: Talks, store: Database) -> None:
    """Prevents a query that forgets whose rows it reads or changes."""
    said: list[str] = []
    for engine in (store._reader, store._writer):
        event.listen(engine, "before_cursor_execute", lambda *args: said.append(" ".join(args[2].split())))
    talk = mine.create(title="x")
    reply = answer(store, mine.ask(talk.id, "1?"), "1")
    mine.find("x", before=talk.id)
    mine.ask(talk.id, "2?", reply.id)
    mine.change(talk.id, title="y", leaf=reply.id)
    mine.rate(reply.id, 1)
    mine.rate(reply.id, 0)
    mine.messages(talk.id)
    mine.dialog(reply.parent or "")
    mine.delete(talk.id)
    owned = [table.name for table in Base.metadata.sorted_tables if "owner" in table.c]
    reading = [
        each for each in said if any(f" {name} " in f"{each} " for name in owned) and not each.startswith("INSERT")
    ]
    without = [each for each in reading if ".owner = " not in each and "owner = " not in each.partition(" WHERE ")[2]]
    assert len(reading) > 20
    assert without == []
