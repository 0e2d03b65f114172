"""Where the questions of `moss eval tools` come from, and what is known about their right answers.

Scripted sets are drawn from the curriculum's reserved questions (`known` families) and from families that training
never sees (`held_out`). Honest sets are what people wrote: a file of hand-written questions, the first turns of the
released conversations, and grade-school problems. They are measured, never trained on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from moss.chat import META_INSTRUCTION, SWITCHES, Dialog, Round, Turn
from moss.data.curriculum import TOOL_KINDS, draw_questions
from moss.data.family import Item
from moss.data.rows import json_lines
from moss.tools.base import parse_commands

LANGS = ("en", "zh")
SCRIPTED = (
    "calculator", "solver", "calculator:held_out", "solver:held_out", "calculator_off", "solver_off",
    "chat", "chat:held_out", "harmful", "harmful:held_out", "lookalike", "lookalike:held_out", "identity",
    "identity:held_out",
)  # fmt: skip
HAND, RELEASED, GSM8K = "hand", "released", "gsm8k"
HAND_WRITTEN = Path(__file__).parent / "hand_written.jsonl"
NUM_GSM8K = 200
TOOL_OF = {"calculator": "Calculate", "solver": "Solve", "equation_solver": "Solve"}


@dataclass(frozen=True)
class Case:
    """One conversation whose last turn is asked; None stands for what is not known of the right answer.

    commands: the text of each round's Commands; tools: the names that must be called, () for none; answer: strings
    that the reply must hold; number: what the last number of the reply must be.
    """

    set: str  # its row in the table
    lang: str
    dialog: Dialog
    commands: tuple[str, ...] | None = None
    tools: tuple[str, ...] | None = None
    answer: tuple[str, ...] | None = None
    number: float | None = None
    family: str = ""  # of a scripted question: those of one family stand or fall together

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
        dialog = replace(dialog, switches=dialog.switches | {"calculator": True, "solver": True})
    commands = tuple(r.commands for r in last.turn.rounds or [Round()])
    names = tuple(sorted({call.name for text in commands for call in parse_commands(text)}))
    return Case(name, lang, dialog, commands, names, last.answer or None, family=last.family)


def hand_written(path: Path) -> list[Case]:
    """Questions from a file: {"question", "lang", "kind": calculator | solver | none, "answer": [...]} a line."""
    cases = []
    for number, row in json_lines(path):
        question, lang, kind, answer = (row.get(key) for key in ("question", "lang", "kind", "answer"))
        if not isinstance(question, str) or kind not in ("calculator", "solver", "none"):
            raise ValueError(f"{path} line {number}: give question, lang and kind (calculator, solver or none)")
        if lang not in LANGS:
            raise ValueError(f"{path} line {number}: lang is {lang!r}; it must be one of {', '.join(LANGS)}")
        if answer is not None and not (isinstance(answer, list) and all(isinstance(a, str) and a for a in answer)):
            raise ValueError(f'{path} line {number}: answer is {answer!r}; give a list of texts, such as ["42"]')
        tools = (TOOL_OF[kind],) if kind in TOOL_OF else ()
        cases.append(Case(f"{HAND} {kind}", lang, _alone(question), None, tools, tuple(answer or ()) or None))
    return cases


def released(folder: Path) -> list[Case]:
    """The first questions of the released conversations with calculator or solver, both switched on."""
    cases = []
    for _, row in json_lines(folder / "moss_003_sft_sample.jsonl"):
        kind = str(row.get("source")).partition("conversation_with_plugins/")[2]
        if kind not in TOOL_OF:
            continue
        first = row["chat"]["turn_1"]
        question = first["Human"].removeprefix("<|Human|>: ").rstrip().removesuffix("<eoh>")
        written = first["Commands"].removeprefix("<|Commands|>: ").rstrip().removesuffix("<eoc>")
        names = tuple(sorted({call.name for call in parse_commands(written)}))
        name = f"{RELEASED} {'solver' if 'solver' in kind else kind}" + ("" if names else " (no call)")
        cases.append(Case(name, _lang(question), _alone(question), None, names))
    return cases


def gsm8k(folder: Path) -> list[Case]:
    """The first 200 grade-school problems, each with its final number."""
    cases = []
    for _, row in json_lines(folder / "gsm8k_train_2k.jsonl"):
        number = float(row["answer"].rpartition("####")[2].replace(",", ""))
        cases.append(Case(GSM8K, "en", _alone(row["question"]), None, ("Calculate",), None, number))
    return cases[:NUM_GSM8K]


def _alone(question: str) -> Dialog:
    """A question without a history, with thoughts, calculator and solver on."""
    switches = {key: key in ("thoughts", "calculator", "solver") for key in ("thoughts", *SWITCHES)}
    return Dialog(META_INSTRUCTION, switches, [Turn(question)])


def _lang(text: str) -> str:
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"
