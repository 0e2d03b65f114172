"""What a model answers: conversations through the turn loop that users have, many at a time.

for told in answers(who, dialogs, Options(Sampling(temperature=0))):
    print(told.turn.reply if told.turn else told.failed)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from moss.chat import Dialog, Turn
from moss.engine import Engine, Sampling
from moss.evals.base import Subject
from moss.tools.base import Result, Tool
from moss.tools.chat_server import answer
from moss.tools.run import Command, Done, Error, Options, ToolDone

T = TypeVar("T")

AT_ONCE = 16  # conversations under way
TOOLS_AT_ONCE = 4  # calls under way: the sandbox refuses crowds, and a measurement waits instead
WAITING = 3600.0  # seconds that a call may take with its waiting for a place


@dataclass
class Told:
    """An answered turn, or why there is none; and what was done with tools on the way."""

    turn: Turn | None = None
    failed: str = "the answer broke off"
    asked: list[str] = field(default_factory=list)  # names of all commands, those of a line that broke off included
    ran: list[str] = field(default_factory=list)  # names of the tools that were really executed
    errors: list[str] = field(default_factory=list)  # of calls


def answers(
    who: Subject,
    dialogs: Sequence[Dialog],
    options: Options,
    tools: Mapping[str, Tool] | None = None,
    seeds: Sequence[int] | None = None,
    deterministic: bool = False,
) -> Iterator[Told]:
    """The answer to the last turn of each conversation, in their order, with those tools that are switched on; with
    `seeds` each draws by its own. `deterministic`: the same to the last bit, whatever else is under way."""
    places = threading.Semaphore(TOOLS_AT_ONCE)

    def one(at: int, engine: Any) -> Told:
        told = Told()
        mine = replace(options, seed=seeds[at] if seeds else options.seed, quality=options.quality or who.quality)
        for event in answer(dialogs[at], engine, who.tok, _watched(tools or {}, told.ran, places), mine):
            if isinstance(event, Command):
                told.asked.append(event.name)
            elif isinstance(event, ToolDone) and not event.ok:
                told.errors.append(event.error)
            elif isinstance(event, Error):
                told.failed = event.text
            elif isinstance(event, Done):
                told.turn, told.failed = event.turn, ""
        return told

    yield from _together(who, one, len(dialogs), deterministic)


def _watched(tools: Mapping[str, Tool], ran: list[str], places: threading.Semaphore) -> dict[str, Tool]:
    """The tools, noting in `ran` what really runs, and waiting for a place instead of being refused."""

    def noting(tool: Tool) -> Callable[..., Result]:
        @functools.wraps(tool.function)
        def run(*args: Any) -> Result:
            ran.append(tool.name)
            with places:
                return tool.function(*args)

        return run

    return {key: replace(tool, function=noting(tool), seconds=WAITING) for key, tool in tools.items()}


def continued(
    who: Subject, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
) -> Iterator[str]:
    """The text with which a model goes on after each prompt, up to the end of a document; not of a chat server."""
    tok = who.tokens

    def one(at: int, engine: Any) -> str:
        mine = replace(sampling, stop_ids=tok.control_ids, seed=seeds[at])
        ids = [token.id for token in engine.submit(prompts[at], mine)]
        return tok.decode([id for id in ids if id not in tok.control_ids])

    yield from _together(who, one, len(prompts))


def seeds_of(seed: int, count: int, first: int = 0) -> list[int]:
    """A seed for each item from `first` on, from (seed, item) alone."""
    items = range(first, first + count)
    return [int(np.random.SeedSequence([seed, item]).generate_state(1, np.uint64)[0]) for item in items]


def _engine(who: Subject, deterministic: bool) -> AbstractContextManager[Any]:
    """What answers for a model; a server is left open, as it was found."""
    if who.model is not None:
        return Engine(who.model, slots=AT_ONCE, queue=2 * AT_ONCE, deterministic=deterministic)
    return nullcontext(who.server)


def _together(who: Subject, one: Callable[[int, Any], T], count: int, deterministic: bool = False) -> Iterator[T]:
    """`one(0, engine)`, `one(1, engine)`, … in their order, `AT_ONCE` under way."""
    with ThreadPoolExecutor(AT_ONCE) as pool, _engine(who, deterministic) as engine:
        try:  # the engine is closed first, so that what is under way ends at once
            yield from pool.map(lambda at: one(at, engine), range(count))
        finally:  # on Ctrl-C what waits must not be asked
            pool.shutdown(wait=False, cancel_futures=True)
