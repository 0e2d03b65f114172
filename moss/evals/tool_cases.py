"""Where the questions of `moss eval tools` come from, and what is known about their right answers.

Scripted sets are drawn from the curriculum's reserved questions (`known` families) and from families that training
never sees (`held_out`). Honest sets are what people wrote: a file of hand-written questions, and files of one's own, of
questions or of conversations with tools such as the released ones. They are measured, never trained on.

A question that needs a tool is asked in three ways, as section 8.3 of the paper does in two: with the tool switched on,
with the same tool switched off, and switched off under the grammar that holds a model to the tools that are on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moss.chat import META_INSTRUCTION, SWITCHES, Dialog, Round, Turn
from moss.data.curriculum import TOOL_KINDS, draw_questions
from moss.data.dialogs import from_row, read_rows
from moss.data.family import Item
from moss.evals.replies import holds
from moss.log import note
from moss.tools.calls import parse_commands

LANGS = ("en", "zh")
SCRIPTED = (
    "calculator", "solver", "search", "calculator:held_out", "solver:held_out", "search:held_out",
    "calculator_off", "solver_off", "search_off",
    "chat", "chat:held_out", "harmful", "harmful:held_out", "lookalike", "lookalike:held_out", "identity",
    "identity:held_out",
)  # fmt: skip
HAND = "hand"
HAND_WRITTEN = Path(__file__).parent / "hand_written.jsonl"
DECIMALS = 4  # of a result that a reply repeats and does not round
TOOL_OF = {"calculator": "Calculate", "solver": "Solve", "search": "Search"}


@dataclass(frozen=True)
class Case:
    """One conversation whose last turn is asked; None stands for what is not known of the right answer.

    commands: the text of each round's Commands; tools: the names that must be called, () for none; answer: strings
    that the reply must hold.
    """

    set: str  # its row in the table
    lang: str
    dialog: Dialog
    commands: tuple[str, ...] | None = None
    tools: tuple[str, ...] | None = None
    answer: tuple[str, ...] | None = None
    family: str = ""  # of a scripted question: those of one family stand or fall together
    way: Literal["", "off", "held"] = ""  # as it is, its tools switched off, and then held by the grammar

    @property
    def question(self) -> str:
        return self.dialog.turns[-1].human


def scripted(name: str, lang: str, n: int, seed: int) -> list[Case]:
    """Up to `n` cases of a set such as `solver` or `solver:held_out`; fewer, or none, where no more exist."""
    kind, _, split = name.partition(":")
    items = draw_questions(kind, lang, "held_out" if split else "known", n, seed)
    return [_of_item(name, kind, lang, item) for item in items]


def _of_item(name: str, kind: str, lang: str, item: Item) -> Case:
    last, dialog = item.drafts[-1], item.dialog
    if kind not in TOOL_KINDS:  # the tools must be at hand to be left alone
        dialog = replace(dialog, switches=dialog.switches | dict.fromkeys(TOOL_OF, True))
    commands = tuple(r.commands for r in last.turn.rounds or [Round()])
    names = tuple(sorted({call.name for text in commands for call in parse_commands(text)}))
    return Case(name, lang, dialog, commands, names, last.answer or None, family=last.family)


def ways(case: Case) -> Iterator[Case]:
    """The case as it is, and where something that it calls for is on or off, as it would be without; see the head."""
    yield case
    if case.tools:
        keys = [key for key, name in TOOL_OF.items() if name in case.tools]
        dialog = replace(case.dialog, switches=case.dialog.switches | dict.fromkeys(keys, False))
        case = replace(case, set=f"{case.set}, off", dialog=dialog, commands=None, way="off")
        yield case
    elif not case.set.endswith("_off"):
        return
    yield replace(case, set=f"{case.set.removesuffix(', off')}, held", way="held")


def from_file(path: Path, name: str = "") -> list[Case]:
    """Cases of a file of JSON lines, named after it or by `name`, a row of which is a question, {"question", "lang",
    "kind": calculator | solver | search | none, "answer": [...]}, or a conversation, of which every turn is a case."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    name, left_out = name or path.stem, 0
    cases: list[Case] = []
    for place, row in read_rows(path):
        if isinstance(row, dict) and "question" in row:
            cases.append(_of_question(name, row, place))
            continue
        try:
            found, strange = _of_dialog(name, from_row(row))
        except ValueError as error:
            raise ValueError(f"{place}: a row has a question, or is a conversation: {error}") from None
        cases += found
        left_out += strange
    if left_out:
        note(f"{path}: {left_out:,} turns that call tools of other kinds are left out")
    if not cases:
        raise ValueError(f"{path} holds no question in which a tool that is here is on")
    return cases


def _of_question(name: str, row: dict[str, Any], place: str) -> Case:
    question, lang, kind, answer = (row.get(key) for key in ("question", "lang", "kind", "answer"))
    if not isinstance(question, str) or not question.strip() or kind not in (*TOOL_OF, "none"):
        raise ValueError(f"{place}: give question, lang and kind ({', '.join(TOOL_OF)} or none)")
    if lang not in LANGS:
        raise ValueError(f"{place}: lang is {lang!r}; it must be one of {', '.join(LANGS)}")
    if answer is not None and not (isinstance(answer, list) and all(isinstance(a, str) and a for a in answer)):
        raise ValueError(f'{place}: answer is {answer!r}; give a list of texts, such as ["42"]')
    tools = (TOOL_OF[kind],) if kind in TOOL_OF else ()
    return Case(f"{name} {kind}", lang, _alone(question), None, tools, tuple(answer or ()) or None)


def _of_dialog(name: str, dialog: Dialog) -> tuple[list[Case], int]:
    """A case for each turn, after those before it as they were; and how many turns call tools that are not here."""
    cases, strange = list[Case](), 0
    if not any(dialog.switches.get(key) for key in TOOL_OF):
        return [], 0
    for at, turn in enumerate(dialog.turns):
        commands = tuple(item.commands for item in turn.rounds)
        tools = tuple(sorted({call.name for text in commands for call in parse_commands(text)}))
        if set(tools) - set(TOOL_OF.values()):
            strange += 1
            continue
        kind = "both" if len(tools) > 1 else next((key for key, api in TOOL_OF.items() if api in tools), "none")
        asked = replace(dialog, turns=[*dialog.turns[:at], Turn(turn.human)])
        answer = None if TOOL_OF["search"] in tools else _answer(turn)  # other pages are found than were then
        cases.append(Case(f"{name} {kind}", _lang(turn.human), asked, commands, tools, answer))
    return cases, strange


def _answer(turn: Turn) -> tuple[str, ...] | None:
    """The numbers that a right reply holds, as far as is known: those of the last results, where each is short enough
    to be written out and the reply that was given holds it too."""
    told = turn.rounds[-1].results.rpartition("=>")[2] if turn.rounds else ""
    numbers = [f"{float(text):.10g}" for text in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])", told)]
    short = all(len(text.partition(".")[2]) <= DECIMALS and holds(turn.reply, text) for text in numbers)
    return tuple(dict.fromkeys(numbers)) if numbers and short else None


def _alone(question: str) -> Dialog:
    """A question without a history, with thoughts and the tools on."""
    switches = {key: key in ("thoughts", *TOOL_OF) for key in ("thoughts", *SWITCHES)}
    return Dialog(META_INSTRUCTION, switches, [Turn(question)])


def _lang(text: str) -> str:
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"
