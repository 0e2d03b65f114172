"""What a model answers: conversations through the turn loop that users have, many at a time.

for told in answers(who, dialogs, Options(Sampling(temperature=0))):
    print(told.turn.reply if told.turn else told.failed)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

from moss.chat import Dialog, Turn
from moss.engine import Engine
from moss.evals.base import Subject
from moss.tools.base import Tool
from moss.tools.chat_server import answer
from moss.tools.run import Done, Error, Options

AT_ONCE = 16  # conversations under way


@dataclass(frozen=True)
class Told:
    """An answered turn, or why there is none."""

    turn: Turn | None
    failed: str = ""


def answers(
    who: Subject, dialogs: Sequence[Dialog], options: Options, tools: Mapping[str, Tool] | None = None
) -> Iterator[Told]:
    """The answer to the last turn of each conversation, in their order, with those tools that are switched on."""
    if who.model is None:
        assert who.server is not None
        opened = nullcontext(who.server)
    else:
        opened = Engine(who.model, slots=AT_ONCE, queue=2 * AT_ONCE)
    with opened as engine, ThreadPoolExecutor(AT_ONCE) as pool:

        def one(dialog: Dialog) -> Told:
            for event in answer(dialog, engine, who.tok, tools or {}, options):
                if isinstance(event, Error):
                    return Told(None, event.text)
                if isinstance(event, Done):
                    return Told(event.turn)
            return Told(None, "the answer broke off")

        try:
            yield from pool.map(one, dialogs)
        finally:  # on Ctrl-C what waits must not be asked, and what is under way ends at once
            pool.shutdown(wait=False, cancel_futures=True)
