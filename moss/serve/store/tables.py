"""The tables. Whatever a person owns has `owner`, and goes with the account.

Ids are random, so that nobody can guess one; of secrets (sessions, keys, codes) only the SHA-256 is kept.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import ForeignKey, Index, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from moss.serve.store.types import Ids, Json, Moment, Words, now

NAMES = {  # of constraints, so that a migration can name what it changes
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


def new_id() -> str:
    """A random id that nobody can guess."""
    return uuid.uuid4().hex


class Base(MappedAsDataclass, DeclarativeBase):
    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map: ClassVar = {
        str: Words(),
        datetime: Moment(),
        dict[str, Any]: Json(),
        list[Any]: Json(),
        list[int]: Ids(),
    }


def _id() -> Any:
    return mapped_column(primary_key=True, default_factory=new_id)


def _of(table: str, *, key: bool = False) -> Any:
    """A reference that takes this row with it when the other goes."""
    return mapped_column(ForeignKey(f"{table}.id", ondelete="CASCADE"), index=not key, primary_key=key)


def _json() -> Any:
    return mapped_column(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- people


class User(Base, kw_only=True):
    __tablename__ = "users"
    id: Mapped[str] = _id()
    email: Mapped[str] = mapped_column(unique=True)  # in lower case
    name: Mapped[str] = mapped_column(default="")
    password: Mapped[str] = mapped_column(default="", repr=False)  # argon2id; empty: cannot log in
    role: Mapped[str] = mapped_column(default="user")  # user, admin
    created: Mapped[datetime] = mapped_column(default_factory=now)
    verified: Mapped[datetime | None] = mapped_column(default=None)  # when the address was shown to be theirs
    banned: Mapped[datetime | None] = mapped_column(default=None)  # until then
    offences: Mapped[int] = mapped_column(default=0)  # since the last ban
    limits: Mapped[dict[str, Any]] = _json()  # what differs from the policy's
    settings: Mapped[dict[str, Any]] = _json()  # their own: language, theme, tools


class Login(Base, kw_only=True):
    """A browser that is logged in."""

    __tablename__ = "logins"
    id: Mapped[str] = _id()
    owner: Mapped[str] = _of("users")
    digest: Mapped[str] = mapped_column(unique=True, repr=False)
    created: Mapped[datetime] = mapped_column(default_factory=now)
    used: Mapped[datetime | None] = mapped_column(default_factory=now)
    expires: Mapped[datetime]
    agent: Mapped[str] = mapped_column(default="")  # what the browser calls itself


class Key(Base, kw_only=True):
    """A key of the API."""

    __tablename__ = "keys"
    id: Mapped[str] = _id()
    owner: Mapped[str] = _of("users")
    name: Mapped[str]
    start: Mapped[str]  # its first characters, to tell keys apart
    digest: Mapped[str] = mapped_column(unique=True, repr=False)
    created: Mapped[datetime] = mapped_column(default_factory=now)
    used: Mapped[datetime | None] = mapped_column(default=None)
    limits: Mapped[dict[str, Any]] = _json()


class Invite(Base, kw_only=True):
    """Lets a number of people register where registration is by invitation."""

    __tablename__ = "invites"
    id: Mapped[str] = _id()
    digest: Mapped[str] = mapped_column(unique=True, repr=False)
    note: Mapped[str] = mapped_column(default="")
    left: Mapped[int] = mapped_column(default=1)
    created: Mapped[datetime] = mapped_column(default_factory=now)
    expires: Mapped[datetime]


class Code(Base, kw_only=True):
    """A code that was mailed, to verify an address or to set a new password."""

    __tablename__ = "codes"
    digest: Mapped[str] = mapped_column(primary_key=True, repr=False)
    owner: Mapped[str] = _of("users")
    purpose: Mapped[str]  # verify, reset
    expires: Mapped[datetime]


class Consent(Base, kw_only=True):
    """What a person agreed to, in which words, and until when it held; the newest one of a purpose counts."""

    __tablename__ = "consents"
    id: Mapped[str] = _id()
    owner: Mapped[str] = _of("users")
    purpose: Mapped[str]
    version: Mapped[str]  # of the words they saw
    given: Mapped[datetime] = mapped_column(default_factory=now)
    withdrawn: Mapped[datetime | None] = mapped_column(default=None)


class Usage(Base, kw_only=True):
    """What an account used in a day (UTC), by key; key "" is the web page."""

    __tablename__ = "usage"
    owner: Mapped[str] = _of("users", key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[str] = mapped_column(primary_key=True)  # 2026-11-20
    requests: Mapped[int] = mapped_column(default=0)
    tokens: Mapped[int] = mapped_column(default=0)


# ------------------------------------------------------------------------------------------------------ conversations


class Conversation(Base, kw_only=True):
    __tablename__ = "conversations"
    __table_args__ = (Index(None, "owner", "changed"),)
    id: Mapped[str] = _id()
    owner: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    title: Mapped[str] = mapped_column(default="")
    meta: Mapped[str] = mapped_column(default="")  # the meta instruction; empty: the standard one
    switches: Mapped[dict[str, Any]] = _json()  # tools by key, on or off
    model: Mapped[str] = mapped_column(default="")
    leaf: Mapped[str] = mapped_column(default="")  # the message that ends the branch last looked at
    created: Mapped[datetime] = mapped_column(default_factory=now)
    changed: Mapped[datetime] = mapped_column(default_factory=now)


class Message(Base, kw_only=True):
    """A question or an answer. A question's parent is the answer before it, so that a conversation is a tree."""

    __tablename__ = "messages"
    id: Mapped[str] = _id()
    owner: Mapped[str] = _of("users")
    conversation: Mapped[str] = _of("conversations")
    parent: Mapped[str | None] = mapped_column(  # no cascade: SQLite follows one a thousand rows deep at most
        ForeignKey("messages.id", ondelete="SET NULL", deferrable=True, initially="DEFERRED"), default=None, index=True
    )
    role: Mapped[str]  # user, assistant
    text: Mapped[str] = mapped_column(default="")
    state: Mapped[str] = mapped_column(default="whole")  # whole, running, stopped, failed
    finish: Mapped[str] = mapped_column(default="")  # why an answer ended: stop, length, time, cancelled
    notice: Mapped[str] = mapped_column(default="")  # what its reader should know: cut, blocked, an error
    model: Mapped[str] = mapped_column(default="")
    quality: Mapped[int | None] = mapped_column(default=None)  # the preference tag
    ids: Mapped[list[int] | None] = mapped_column(default=None, repr=False)  # of the reply, as the model wrote it
    usage: Mapped[dict[str, Any]] = _json()
    created: Mapped[datetime] = mapped_column(default_factory=now)


class Round(Base, kw_only=True):
    """Thoughts, commands and results of an answer, before its reply."""

    __tablename__ = "rounds"
    message: Mapped[str] = _of("messages", key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = _of("users")
    thoughts: Mapped[str]
    commands: Mapped[str]
    results: Mapped[str]
    ids: Mapped[list[int] | None] = mapped_column(default=None, repr=False)


class Artefact(Base, kw_only=True):
    """What one call of a tool gave: its result, sources to cite, perhaps a file."""

    __tablename__ = "artefacts"
    id: Mapped[str] = _id()
    owner: Mapped[str] = _of("users")
    message: Mapped[str] = _of("messages")
    call: Mapped[int]  # counts the calls of an answer
    name: Mapped[str]
    args: Mapped[list[Any]]
    ok: Mapped[bool]
    result: Mapped[str] = mapped_column(default="")
    error: Mapped[str] = mapped_column(default="")
    seconds: Mapped[float] = mapped_column(default=0.0)
    sources: Mapped[list[Any]] = mapped_column(default_factory=list)
    kind: Mapped[str] = mapped_column(default="")  # the media type of `data`
    data: Mapped[bytes | None] = mapped_column(default=None, repr=False)


class Run(Base, kw_only=True):
    """An answer in the making. It belongs to its conversation: whoever started it may leave."""

    __tablename__ = "runs"
    __table_args__ = (UniqueConstraint("owner", "request"),)
    id: Mapped[str] = _id()
    owner: Mapped[str] = _of("users")
    conversation: Mapped[str] = _of("conversations")
    message: Mapped[str] = _of("messages")  # the answer
    request: Mapped[str | None] = mapped_column(default=None)  # the caller's name for it, so that it starts once
    state: Mapped[str] = mapped_column(default="running", index=True)  # running, done, stopped, failed
    stop: Mapped[bool] = mapped_column(default=False)  # its owner asked for an end
    worker: Mapped[str] = mapped_column(default="")  # which process works on it
    created: Mapped[datetime] = mapped_column(default_factory=now)
    seen: Mapped[datetime] = mapped_column(default_factory=now)  # when its worker last wrote


class RunEvent(Base, kw_only=True):
    """What happened in a run, as it is sent to clients; `number` counts from 1."""

    __tablename__ = "run_events"
    run: Mapped[str] = _of("runs", key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = _of("users")
    event: Mapped[dict[str, Any]]


class Feedback(Base, kw_only=True):
    """What a person thinks of an answer; one a message."""

    __tablename__ = "feedback"
    message: Mapped[str] = _of("messages", key=True)
    owner: Mapped[str] = _of("users")
    rating: Mapped[int]  # 1, -1
    text: Mapped[str] = mapped_column(default="")
    created: Mapped[datetime] = mapped_column(default_factory=now)


# ------------------------------------------------------------------------------------------------------------- service


class Setting(Base, kw_only=True):
    """One field of the service's policy that differs from its default."""

    __tablename__ = "settings"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[Any] = mapped_column(Json())


class Audit(Base, kw_only=True):
    """Who did what to whom. It outlives accounts, so it names nobody by more than an id."""

    __tablename__ = "audit"
    id: Mapped[str] = _id()
    at: Mapped[datetime] = mapped_column(default_factory=now, index=True)
    actor: Mapped[str] = mapped_column(default="")
    action: Mapped[str]
    subject: Mapped[str] = mapped_column(default="", index=True)  # whom it concerns; they can see it
    detail: Mapped[dict[str, Any]] = _json()
