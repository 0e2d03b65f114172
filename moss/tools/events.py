"""What happens in a turn, as it happens: the events of `run.answer`, and their form for programs.

{"type": "tool_done", "call": 0, "name": "Calculate", "ok": true, "result": "444", ...}
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from moss.chat import Turn


@dataclass(frozen=True)
class Event:
    """Something that happened in a turn; `to_json` is the wire format everywhere."""

    type: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Thoughts(Event):
    """A piece of the inner thoughts; `round` counts from 0."""

    type: ClassVar[str] = "thoughts"
    text: str
    round: int = 0


@dataclass(frozen=True)
class Command(Event):
    """A command as the model wrote it; `call` numbers the commands of a turn from 0 and returns in what follows."""

    type: ClassVar[str] = "command"
    call: int
    name: str
    args: list[str]
    raw: str
    round: int = 0


@dataclass(frozen=True)
class ToolStarted(Event):
    """A command is running. Commands that may not run have no such event, only `ToolDone` with the reason."""

    type: ClassVar[str] = "tool_started"
    call: int
    name: str


@dataclass(frozen=True)
class ToolProgress(Event):
    """A tool that takes long says where it is."""

    type: ClassVar[str] = "tool_progress"
    call: int
    name: str
    text: str


@dataclass(frozen=True)
class ToolDone(Event):
    """A command has its result, or else `error` tells the user why not (the model reads `No result.`).

    `sources` are numbered through all searches of a turn, so that a `<sup><|2|></sup>` in the reply names one.
    """

    type: ClassVar[str] = "tool_done"
    call: int
    name: str
    ok: bool
    result: str = ""
    error: str = ""
    seconds: float = 0.0
    sources: list[dict[str, Any]] = field(default_factory=list)  # number, title, url: what the reply can cite


@dataclass(frozen=True)
class Reply(Event):
    """A piece of the reply."""

    type: ClassVar[str] = "reply"
    text: str


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should know: old turns left out, an answer that was cut or is empty."""

    type: ClassVar[str] = "notice"
    text: str


@dataclass(frozen=True)
class Error(Event):
    """The turn could not be finished; nothing follows."""

    type: ClassVar[str] = "error"
    text: str


@dataclass(frozen=True)
class Done(Event):
    """The turn as it goes into the conversation; `finish` is why the reply ended (stop, length, time).

    usage: `prompt_tokens` of the first pass, of which the cache held `cached_tokens`, and all `completion_tokens`.
    timing in seconds: `first_token`, `tools`, `total`.
    """

    type: ClassVar[str] = "done"
    turn: Turn
    finish: str
    usage: dict[str, int] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
