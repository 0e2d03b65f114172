"""What a model answers: conversations through the turn loop that users have, many at a time.

for told in answers(who, dialogs, Options(Sampling(temperature=0))):
    print(told.turn.reply if told.turn else told.failed)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from moss.chat import Dialog, Turn
from moss.engine import Engine, Sampling
from moss.evals.base import Subject
from moss.tools.base import Tool
from moss.tools.chat_server import answer
from moss.tools.run import Done, Error, Options

T = TypeVar("T")

AT_ONCE = 16  # conversations under way


@dataclass(frozen=True)
class Told:
    """An answered turn, or why there is none."""

    turn: Turn | None
    failed: str = ""


def answers(
    who: Subject,
    dialogs: Sequence[Dialog],
    options: Options,
    tools: Mapping[str, Tool] | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[Told]:
    """The answer to the last turn of each conversation, in their order, with those tools that are switched on; with
    `seeds` each draws by its own."""

    def one(at: int, engine: Any) -> Told:
        mine = replace(options, seed=seeds[at] if seeds else options.seed, quality=options.quality or who.quality)
        for event in answer(dialogs[at], engine, who.tok, tools or {}, mine):
            if isinstance(event, Error):
                return Told(None, event.text)
            if isinstance(event, Done):
                return Told(event.turn)
        return Told(None, "the answer broke off")

    yield from _together(who, one, len(dialogs))


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


def _engine(who: Subject) -> AbstractContextManager[Any]:
    """What answers for a model; a server is left open, as it was found."""
    if who.model is not None:
        return Engine(who.model, slots=AT_ONCE, queue=2 * AT_ONCE)
    return nullcontext(who.server)


def _together(who: Subject, one: Callable[[int, Any], T], count: int) -> Iterator[T]:
    """`one(0, engine)`, `one(1, engine)`, … in their order, `AT_ONCE` under way."""
    with ThreadPoolExecutor(AT_ONCE) as pool, _engine(who) as engine:  # closed first: what is under way ends at once
        try:
            yield from pool.map(lambda at: one(at, engine), range(count))
        finally:  # on Ctrl-C what waits must not be asked
            pool.shutdown(wait=False, cancel_futures=True)
