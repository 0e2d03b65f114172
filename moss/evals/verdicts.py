"""What a judge at an endpoint says: it is asked in words, and its verdict stands in double brackets at the end.

    verdicts(judge, ["Is … true? … End with [[yes]] or [[no]]."], re.compile(r"\\[\\[(yes|no)\\]\\]"), max_tokens=1024)

A judgment without a verdict is asked for once more; if there is none then, it counts for nothing, is never guessed, and
is told. One that did not come, for the server failed, is told with the reason; whoever keeps rows does not keep it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from moss.chat import Turn
from moss.engine import Sampling
from moss.evals.answering import answers
from moss.evals.base import Evaluation, Subject, silent, subject
from moss.tools.run import Options

TRIES = 2  # of a judgment without a verdict
JOINED = re.compile(r"[\s,、/*`]*(?:or|and|或者?|和)?[\s*`]*")  # what stands between verdicts that are listed


def judge_at(address: str | None, config: Evaluation) -> AbstractContextManager[Subject | None]:
    """The judge at an address, where there is one; ValueError where nothing answers, before anything is measured."""
    return nullcontext() if address is None else subject(address, replace(config, tokenizer=None))


def verdicts(judge: Subject, asked: Sequence[str], wanted: re.Pattern[str], max_tokens: int) -> list[dict[str, str]]:
    """For each question what the judge writes, the verdict in it or "", and why nothing came or ""."""
    options = Options(Sampling(temperature=0, max_tokens=max_tokens))
    said = [{"text": "", "verdict": "", "failed": ""} for _ in asked]
    for _ in range(TRIES):
        todo = [at for at, each in enumerate(said) if not each["verdict"]]
        told = answers(judge, [silent([Turn(asked[at])]) for at in todo], options)
        for at, each in zip(todo, told, strict=True):
            text = each.turn.reply if each.turn else ""
            said[at] = {"text": text, "verdict": verdict_in(text, wanted), "failed": each.failed}
    return said


def verdict_in(text: str, wanted: re.Pattern[str]) -> str:
    """The last verdict in a text; "" where it is one of a list, as in a judge's "I end with [[A]], [[B]] or [[C]]"."""
    found = list(wanted.finditer(text))
    if not found:
        return ""
    told = found[-1].group(1)
    before = found[-2] if found[1:] else None
    listed = before and before.group(1) != told and JOINED.fullmatch(text, before.end(), found[-1].start())
    return "" if listed else told


def lasting(said: Sequence[dict[str, Any]]) -> bool:
    """Whether all judgments came, so that they need not be asked for again."""
    return not any(each["failed"] for each in said)


def gaps(said: Sequence[dict[str, Any]]) -> list[str]:
    """How many judgments say nothing, and how many of them did not come."""
    none = sum(not each["verdict"] for each in said)
    failed = [each["failed"] for each in said if each.get("failed")]
    told = [f"{none:,} of {len(said):,} judgments have no verdict and count for nothing"] if none else []
    return told + ([f"{len(failed):,} of them did not come; run again to ask: {failed[0]}"] if failed else [])


def no_verdict(said: Sequence[dict[str, Any]]) -> ValueError:
    """What to raise where no verdict is left to count."""
    failed = next((each["failed"] for each in said if each.get("failed")), "")
    return ValueError(f"the judge gave no verdict at all; {failed or 'its judgments stand in the rows'}")
