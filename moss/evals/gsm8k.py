"""`moss eval gsm8k`: grade-school problems, with the calculator and without (GSM8K, arXiv 2110.14168).

    moss eval gsm8k --data test.jsonl --model runs/sft

Each problem is asked twice through the turn loop that users have: with thoughts, calculator and equation solver on, and
with thoughts alone. An answer is right where the last number of the reply is the one behind `####` in the set; a reply
without a number, or none at all, is wrong and counted. Nothing else in the reply counts.

`--data` is the published file: JSON lines with question and answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss.chat import META_INSTRUCTION, SWITCHES, Dialog, Turn, render
from moss.data.rows import json_lines
from moss.engine import Sampling
from moss.errors import UsageError
from moss.evals.answering import answers
from moss.evals.base import Evaluation, Kept, Subject, Values, made_of, run, unanswered
from moss.evals.replies import last_number
from moss.log import bar
from moss.tools.base import standard_tools
from moss.tools.calls import parse_commands
from moss.tools.run import Options

PUBLISHED = "GSM8K is at github.com/openai/grade-school-math"
TOOLS = ("calculator", "solver")
PARTS = ("thoughts", "commands", "results")  # of a round
WAYS = {"with the calculator": True, "without": False}


@dataclass(frozen=True)
class GSM8K(Evaluation):
    """Measure arithmetic in words: grade-school problems, with the calculator and without."""

    data: Path | None = None  # JSON lines with question and answer, as published
    max_tokens: int = 512  # of a pass of an answer


@dataclass(frozen=True)
class Problem:
    """A problem and its final number."""

    number: int
    text: str
    answer: float


def main(config: GSM8K) -> int:
    """Run the command."""
    return run(config, task(config))


def task(config: GSM8K) -> Arithmetic:
    """The task over the set that the settings name."""
    if config.data is None:
        raise UsageError(f"--data is missing: give the file. {PUBLISHED}")
    return Arithmetic(config, read(config.data)[: config.limit or None])


def read(file: Path) -> list[Problem]:
    """The problems of a file; ValueError names the line that is none."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}; {PUBLISHED}")
    found: list[Problem] = []
    for line, row in json_lines(file):
        text, answer = row.get("question"), row.get("answer")
        if not isinstance(text, str) or not text.strip() or not isinstance(answer, str):
            raise ValueError(f"{file} line {line}: a problem needs question and answer, both texts")
        try:
            number = float(answer.rpartition("####")[2].replace(",", ""))
        except ValueError:
            raise ValueError(f"{file} line {line}: answer must end with #### and a number") from None
        found.append(Problem(len(found), text, number))
    if not found:
        raise ValueError(f"{file} is empty: it holds no problem")
    return found


# ---------------------------------------------------------------- the task


@dataclass(frozen=True)
class Arithmetic:
    """The task of `moss eval gsm8k`."""

    config: GSM8K
    asked: Sequence[Problem]
    name: str = "gsm8k"

    def template(self, who: Subject) -> dict[str, Any]:
        """The instruction, and how long an answer may be."""
        return {"meta": META_INSTRUCTION, "max_tokens": self.config.max_tokens, "tools": list(TOOLS)}

    def measure(self, who: Subject, kept: Kept) -> list[dict[str, Any]]:
        """A row a problem and way: what was asked, commands and reply, and whether the last number is right."""
        wanted = [(way, problem) for way in WAYS for problem in self.asked]
        ids = [f"{way}/{problem.number}" for way, problem in wanted]
        prints = [made_of(problem.text, problem.answer) for _, problem in wanted]
        new = kept.missing(ids, prints)
        dialogs = [asked(wanted[at][1].text, WAYS[wanted[at][0]]) for at in new]
        options = Options(Sampling(temperature=0, max_tokens=self.config.max_tokens))
        first = len(wanted) - len(new)
        with bar("problems", first, len(wanted)) as shown:
            replies = answers(who, dialogs, options, standard_tools())
            for done, (at, each) in enumerate(zip(new, replies, strict=True), start=first):
                way, problem = wanted[at]
                turn = each.turn or Turn(problem.text)
                number = last_number(turn.reply)
                row = {"id": ids[at], "made_of": prints[at], "way": way, "question": problem.text}
                row |= {"prompt": who.tok and render(dialogs[done - first], who.tok, until="thoughts")[0]}
                row |= {name: [getattr(item, name) for item in turn.rounds] for name in PARTS}
                row |= {"reply": turn.reply, "failed": each.failed, "number": number, "answer": problem.answer}
                right = number is not None and math.isclose(number, problem.answer, rel_tol=1e-6)
                kept.add(row | {"right": right}, lasting=each.turn is not None)
                shown.show(done + 1, way)
        return [kept.rows[id] for id in ids]

    def values(self, rows: Sequence[dict[str, Any]]) -> dict[str, Values]:
        """Exact match in either way, what the calculator brings, and how often it was used."""
        right = {way: [told(row, row["right"]) for row in rows if row["way"] == way] for way in WAYS}
        found: dict[str, Values] = {f"right {way}": (values, None) for way, values in right.items()}
        brought = [None if a is None or b is None else a - b for a, b in zip(*right.values(), strict=True)]
        found["what it brings"] = (brought, [1.0] * len(brought))  # no share: it may be less than nothing
        used = [told(row, any(map(parse_commands, row["commands"]))) for row in rows if WAYS[row["way"]]]
        return found | {"problems with a call": (used, None)}

    def notes(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """How many replies hold no number, and how many problems have no reply."""
        none = sum(row["number"] is None and not row["failed"] for row in rows)
        lines = [f"{none:,} of {len(rows):,} replies hold no number and count as wrong"] if none else []
        return lines + unanswered([row["failed"] for row in rows])


def told(row: dict[str, Any], truth: bool) -> float | None:
    """A truth as a number; None where the problem was not answered."""
    return None if row["failed"] else float(truth)


def asked(text: str, tools: bool) -> Dialog:
    """The problem alone, thoughts on, with tools or without."""
    switches = {key: key == "thoughts" or (tools and key in TOOLS) for key in ("thoughts", *SWITCHES)}
    return Dialog(META_INSTRUCTION, switches, [Turn(text)])
