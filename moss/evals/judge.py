"""`moss eval judge`: which of two models answers better, by a judge who sees both answers in both orders.

    moss eval judge --model runs/pat --against runs/sft                                   # the scripted truth judges
    moss eval judge --model runs/sft --against runs/old --data prompts.jsonl --judge http://gpu1:8000/v1#big

Both models answer each prompt at temperature 0 (`--temperature`), without tools. A judge at an endpoint reads a prompt
and its answers twice, once in either order, and ends with [[A]], [[B]] or [[C]] for a tie, as in MT-Bench (arXiv
2306.05685). A win in one order and a loss in the other is a contradiction and counts as a tie. A judgment without a
verdict is asked for once more; if there is none then, it counts for nothing and is told. All that the judge wrote
stays in the rows.

Where no endpoint is given, the scripted truth judges: the prompts are then held-out ones of `moss data curriculum
--kind preferences`, whose right answers a program knows. It has no order and no taste for length.

The length-controlled rate is the win rate between replies of one length (`stats.length_controlled`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from moss.chat import META_INSTRUCTION, Dialog, Turn
from moss.data import dialogs, preferences
from moss.data.messages import to_openai
from moss.engine import Sampling
from moss.errors import UsageError
from moss.evals import preference
from moss.evals.answering import answers, seeds_of
from moss.evals.base import (
    Evaluation,
    Kept,
    Results,
    Subject,
    checked,
    made_of,
    measured,
    result,
    show,
    silent,
    subject,
)
from moss.evals.stats import Figure, length_controlled, mean
from moss.evals.verdicts import gaps, judge_at, lasting, no_verdict, verdicts
from moss.log import bar
from moss.tools.run import Options

VERDICT = re.compile(r"\[\[([ABC])\]\]")
AT_ONCE = 32  # prompts that are answered or judged, and whose rows are kept, at a time
ASK = """Below are a conversation and two answers to its last message. Which answer is better? Judge by whether it is
right, helpful, honest and harmless and does what was asked for, in the language in which it was asked. Neither length
nor the order in which the answers stand is a merit. First explain in a few sentences, then end with exactly one of
[[A]], [[B]] or [[C]], where C means that both are equally good.

<conversation>
{conversation}
</conversation>

<answer A>
{a}
</answer A>

<answer B>
{b}
</answer B>"""


@dataclass(frozen=True)
class Judge(Evaluation):
    """Measure which of two models answers better: wins, ties and losses, in both orders, for equal lengths too."""

    data: Path | None = None  # JSON lines with prompt or user_prompt, or conversations, whose last turn is asked
    judge: str = "scripted"  # http://host:port/v1#name of a chat model; scripted: the truth of the scripted prompts
    n: int = 200  # scripted prompts, where no --data is given
    seed: int = 0  # which of these are drawn, and what is drawn in answers
    max_tokens: int = 512  # of an answer
    judge_tokens: int = 1024  # of a judgment, thoughts included
    temperature: float = 0.0  # of the models; the judge's is 0


def main(config: Judge) -> int:
    """Answer, judge, show."""
    show(config, *results(config))
    return 0


def results(config: Judge) -> Results:
    """What the judge finds of both models together."""
    if config.against is None:
        raise UsageError("--against is missing: a judge compares two models")
    if config.judge == "scripted" and config.data is not None:
        raise UsageError("the scripted truth knows only its own prompts; leave --data out, or give --judge an endpoint")
    if config.judge != "scripted" and "://" not in config.judge:
        raise UsageError(f"--judge is {config.judge!r}; give http://host:port/v1#name, or scripted")
    if config.judge != "scripted" and config.data is None:
        raise UsageError("--data is missing: give prompts, or leave --judge out for scripted ones")
    if config.n < 1:
        raise UsageError(f"--n is {config.n}; it must be at least 1")
    models = checked(config)
    asked = read(config.data) if config.data else [each.history for each in preference.questions(config.n, config.seed)]
    asked = asked[: config.limit or None]
    with judge_at(None if config.judge == "scripted" else config.judge, config) as judge:
        (ours, mine), (theirs, others) = (replied(config, model, asked) for model in models)
        pair = Subject(f"{ours.name}-over-{theirs.name}", made_of(ours.print, theirs.print), None)
        settings = {"judge": config.judge, "ask": ASK, "tokens": config.judge_tokens}
        with measured(config, "judge", pair, settings) as kept:
            begun = [row_of(*each, judge.print if judge else "") for each in zip(count(), asked, mine, others)]
            new = [row for row in begun if not row["unanswered"] and not kept.have(row["id"], row["made_of"])]
            if judge is None:
                by_truth(asked, new, kept)
            else:
                by_model(config, judge, new, kept)
            rows = [row if row["unanswered"] else kept.rows[row["id"]] for row in begun]
            told = result(kept, "judge", pair.name, {"judge": config.judge}, figures(rows), notes(rows))
    return [told], {}


def read(file: Path) -> list[Dialog]:
    """The conversations whose last turn is to be answered; ValueError names the line that is none."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    found: list[Dialog] = []
    for place, row in dialogs.read_rows(file):
        text = row.get("prompt", row.get("user_prompt")) if isinstance(row, dict) else None
        try:
            dialog = silent([Turn(text)]) if isinstance(text, str) and text.strip() else dialogs.from_row(row)
        except ValueError as error:
            raise ValueError(f"{place}: a row needs prompt or user_prompt, or is a conversation: {error}") from None
        turns = [*dialog.turns[:-1], Turn(dialog.turns[-1].human)]
        found.append(replace(silent(turns), meta=dialog.meta or META_INSTRUCTION))
    if not found:
        raise ValueError(f"{file} is empty: it holds no prompt")
    return found


# ---------------------------------------------------------------- answers


def replied(config: Judge, model: str | None, asked: Sequence[Dialog]) -> tuple[Subject, list[dict[str, Any]]]:
    """The model, by name alone, and a row with its reply to each prompt, or why there is none; what was replied in
    earlier runs is not asked for again."""
    settings = {"max_tokens": config.max_tokens, "temperature": config.temperature, "seed": config.seed}
    texts = [to_openai(dialog)["messages"] for dialog in asked]
    prints = [made_of(text, number) for number, text in enumerate(texts)]
    with subject(model, config) as who, measured(config, "replies", who, settings) as kept:
        new = kept.missing(prints, prints)
        sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)
        draws = seeds_of(config.seed, len(asked))
        with bar(f"answers of {who.name}", len(asked) - len(new), len(asked)) as shown:
            told = answers(who, [asked[at] for at in new], Options(sampling), seeds=[draws[at] for at in new])
            for done, (at, each) in enumerate(zip(new, told, strict=True), start=len(asked) - len(new) + 1):
                reply = each.turn.reply if each.turn else ""
                row = {"id": prints[at], "made_of": prints[at], "prompt": texts[at], "reply": reply}
                kept.add(row | ({"failed": each.failed} if each.failed else {}), lasting=each.turn is not None)
                shown.show(done, "")
        return Subject(who.name, who.print, None), [kept.rows[each] for each in prints]


# ---------------------------------------------------------------- judgments


def by_truth(asked: Sequence[Dialog], new: Sequence[dict[str, Any]], kept: Kept) -> None:
    """Rows by the scripted truth: the reply with more of the right things is better."""
    for row in new:
        levels = [preferences.truth(asked[int(row["id"])], reply) for reply in row["replies"]]
        score = 0.5 + np.sign(levels[0] - levels[1]) / 2
        kept.add(row | {"levels": levels, "score": float(score)})


def by_model(config: Judge, judge: Subject, new: Sequence[dict[str, Any]], kept: Kept) -> None:
    """Rows by a model: two judgments a prompt, the first with our model's answer as A."""
    with bar("judgments", 0, len(new)) as shown:
        for first in range(0, len(new), AT_ONCE):
            part = new[first : first + AT_ONCE]
            pairs = [(row, order) for row in part for order in ("ab", "ba")]
            told = verdicts(judge, [question(row, order) for row, order in pairs], VERDICT, config.judge_tokens)
            for number, row in enumerate(part):
                both = [{"order": order} | told[2 * number + at] for at, order in enumerate(("ab", "ba"))]
                kept.add(row | {"judgments": both, "score": score_of(both)}, lasting(both))
            shown.show(first + len(part), "")


def question(row: dict[str, Any], order: str) -> str:
    """What the judge is asked: the answers of a row in an order."""
    a, b = row["replies"] if order == "ab" else row["replies"][::-1]
    return ASK.format(conversation=row["prompt"], a=a, b=b)


def as_text(dialog: Dialog) -> str:
    """A conversation as the judge reads it; the last message is the one that is answered."""
    said = [(name, text) for turn in dialog.turns for name, text in (("User", turn.human), ("Assistant", turn.reply))]
    return "\n\n".join(f"{name}: {text}" for name, text in said[:-1])


def row_of(number: int, dialog: Dialog, mine: dict[str, Any], others: dict[str, Any], judge: str) -> dict[str, Any]:
    """The beginning of a row; without an answer of both models there is nothing to judge."""
    text, replies = as_text(dialog), [mine["reply"], others["reply"]]
    begun = {"id": str(number), "made_of": made_of(text, *replies, judge), "prompt": text, "replies": replies}
    return begun | {"unanswered": mine.get("failed") or others.get("failed") or "", "score": None}


def score_of(judgments: Sequence[dict[str, Any]]) -> float | None:
    """The mean of what both orders say of our model, 1 won, 0.5 tied, 0 lost; None where one of them has no verdict,
    for then the order in which the answers stand could decide."""
    found = [value for each in judgments if (value := value_of(each)) is not None]
    return sum(found) / 2 if len(found) == 2 else None


def value_of(judgment: dict[str, Any]) -> float | None:
    """What one judgment says of our model."""
    if not judgment["verdict"]:
        return None
    if judgment["verdict"] == "C":
        return 0.5
    return float((judgment["verdict"] == "A") == (judgment["order"] == "ab"))


# ---------------------------------------------------------------- figures


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Win rate (a tie is half), for equal lengths too; wins, ties, losses; of a model as judge its biases."""
    fair = [row for row in rows if row["score"] is not None]
    if not fair and all(row.get("unanswered") for row in rows):
        raise ValueError(f"no prompt was answered by both models: {rows[0]['unanswered']}")
    if not fair:
        raise no_verdict([each for row in rows for each in row.get("judgments", ())])
    scores = np.array([row["score"] for row in fair])
    longer = np.array([len(row["replies"][0]) - len(row["replies"][1]) for row in fair], dtype=np.float64)
    found = {"win rate": mean(scores), "win rate at equal length": length_controlled(scores, longer)}
    for name, mine in (("won", scores > 0.5), ("tied", scores == 0.5), ("lost", scores < 0.5)):
        found[f"  {name}"] = mean(mine)
    pairs = [[value_of(each) for each in row["judgments"]] for row in fair if "judgments" in row]
    firsts = [
        each["verdict"] == "A" for row in fair for each in row.get("judgments", ()) if each["verdict"] in ("A", "B")
    ]
    if firsts:
        found["judged for the answer that stands first"] = mean(firsts)
    if pairs:
        found["contradicted in the other order"] = mean([{*each} == {0.0, 1.0} for each in pairs])
    return found


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many prompts were not answered, and how many judgments say nothing."""
    failed = [row["unanswered"] for row in rows if row.get("unanswered")]
    told = (
        [f"{len(failed):,} of {len(rows):,} prompts were not answered by both, the first: {failed[0]}"]
        if failed
        else []
    )
    return told + gaps([each for row in rows for each in row.get("judgments", ())])
