"""`moss eval truthfulqa`: does a model believe what people falsely believe (TruthfulQA, arXiv 2109.07958)?

    moss eval truthfulqa --data TruthfulQA.csv --model runs/sft

MC1: of the best answer and all false ones, is the best the likeliest? MC2: of the probability that the model gives to
true and false answers together, how much is on the true ones? Both by log-likelihood of the whole answer, after the six
questions and answers that the authors put before each question (`primer.txt`, from their appendix E): for a base model
as they stand, to the letter as lm-evaluation-harness has them; for a chat model each is a turn of a conversation.

`--data` is the published file, with the columns Question, Best Answer, Correct Answers and Incorrect Answers.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss.chat import Turn
from moss.errors import UsageError
from moss.evals.base import Evaluation, Kept, Style, Subject, Values, chats, made_of, run, silent
from moss.evals.likelihood import Continuation, after_dialog, after_text
from moss.log import bar

PUBLISHED = "TruthfulQA.csv is at github.com/sylinrl/TruthfulQA"
PRIMER = Path(__file__).parent / "primer.txt"
COLUMNS = ("Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers")
AT_ONCE = 16  # questions that are scored, and whose rows are kept, at a time


@dataclass(frozen=True)
class TruthfulQA(Evaluation):
    """Measure whether a model prefers true answers to common falsehoods: MC1 and MC2 of TruthfulQA."""

    data: Path | None = None  # the published CSV file
    style: Style = "auto"  # auto: conversations for models that know the format


@dataclass(frozen=True)
class Question:
    """A question, its best answer, all true ones and all false ones."""

    number: int
    category: str
    text: str
    best: str
    true: tuple[str, ...]
    false: tuple[str, ...]

    @property
    def answers(self) -> list[str]:
        """All of them, each once: the best, other true ones, false ones."""
        return list(dict.fromkeys((self.best, *self.true, *self.false)))

    @property
    def num_true(self) -> int:
        """How many of them, the first, are true."""
        return len({self.best, *self.true})


def main(config: TruthfulQA) -> int:
    """Run the command."""
    if config.data is None:
        raise UsageError(f"--data is missing: give the file. {PUBLISHED}")
    return run(config, Truthful(config, read(config.data)[: config.limit or None]))


def read(file: Path) -> list[Question]:
    """The questions of the published file; ValueError names the line that is none."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}; {PUBLISHED}")
    found: list[Question] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, strict=True)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{file} has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}")
            for row in reader:
                category, text, best, true, false = ((row[name] or "").strip() for name in COLUMNS)
                split = [tuple(filter(None, map(str.strip, each.split(";")))) for each in (true, false)]
                if not (text and best and all(split)):
                    raise ValueError(
                        f"{file} line {reader.line_num}: a question needs a best, a true and a false answer"
                    )
                found.append(Question(len(found), category, text, best, *split))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not found:
        raise ValueError(f"{file} is empty: it holds no question")
    return found


# ---------------------------------------------------------------- prompts


def continuations(question: Question, who: Subject, chat: bool) -> list[Continuation]:
    """All answers to a question after the primer."""
    primer = PRIMER.read_text(encoding="utf-8").strip()
    if not chat:
        text = f"{primer}\n\nQ: {question.text}\nA:"
        return after_text(text, [f" {answer}" for answer in question.answers], who.tokens)
    shown = [pair.removeprefix("Q: ").split("\nA: ") for pair in primer.split("\n\n")]
    turns = [Turn(asked, reply=answer) for asked, answer in shown]
    return after_dialog(silent([*turns, Turn(question.text)]), question.answers, who.tokens, who.quality)


# ---------------------------------------------------------------- the task


@dataclass(frozen=True)
class Truthful:
    """The task of `moss eval truthfulqa`."""

    config: TruthfulQA
    asked: Sequence[Question]
    name: str = "truthfulqa"

    def template(self, who: Subject) -> dict[str, Any]:
        """Style and primer."""
        style = "chat" if chats(self.config.style, who) else "plain"
        return {"style": style, "primer": PRIMER.read_text(encoding="utf-8")}

    def measure(self, who: Subject, kept: Kept) -> list[dict[str, Any]]:
        """A row a question: its prompt, its answers with their log-probabilities, MC1 and MC2."""
        chat = chats(self.config.style, who)
        new = []
        for question in self.asked:
            asked = continuations(question, who, chat)
            ids = {"prompt": list(asked[0].prompt), "answers": [list(each.answer) for each in asked]}
            begun = {"id": str(question.number), "made_of": made_of(ids, question.best, question.true)} | ids
            longest = max(len(each.prompt) + len(each.answer) for each in asked)
            begun |= {"cut": longest > who.longest + 1}  # the last id is told, and not read
            if not kept.have(begun["id"], begun["made_of"]):
                new.append(
                    (
                        question,
                        begun | {"question": question.text, "texts": question.answers, "true": question.num_true},
                        asked,
                    )
                )
        done = len(self.asked) - len(new)
        with bar("questions", done, len(self.asked)) as shown:
            for begin in range(0, len(new), AT_ONCE):
                part = new[begin : begin + AT_ONCE]
                found = iter(who.likelihoods([each for *_, asked in part for each in asked]))
                for question, begun, asked in part:
                    kept.add(begun | judged(question, [next(found) for _ in asked]))
                shown.show(done + begin + len(part), part[-1][0].category)
        return [kept.rows[str(question.number)] for question in self.asked]

    def values(self, rows: Sequence[dict[str, Any]]) -> dict[str, Values]:
        """MC1 and MC2 of all questions, and MC2 of each category."""
        found: dict[str, Values] = {name: ([row[name] for row in rows], None) for name in ("mc1", "mc2")}
        for category in sorted({question.category for question in self.asked}):
            mine = [row["mc2"] for row, each in zip(rows, self.asked, strict=True) if each.category == category]
            found[f"  mc2, {category}"] = (mine, None)
        return found

    def notes(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """Which prompts did not fit."""
        cut = sum(row["cut"] for row in rows)
        return [f"{cut:,} prompts are longer than the model reads, and lost their beginning"] if cut else []


def judged(question: Question, scores: Sequence[float]) -> dict[str, Any]:
    """MC1 and MC2 from the log-probabilities of `question.answers`."""
    said = dict(zip(question.answers, scores, strict=True))
    best = all(said[question.best] > said[answer] for answer in question.false)
    true = np.array([said[answer] for answer in question.true])
    false = np.array([said[answer] for answer in question.false])
    highest = max(true.max(), false.max())
    shares = np.exp(true - highest).sum(), np.exp(false - highest).sum()
    return {"scores": list(scores), "mc1": float(best), "mc2": float(shares[0] / sum(shares))}
