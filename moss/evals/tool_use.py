"""`moss eval tools`: does the model call the right tool with the right arguments, and leave tools alone otherwise?

    moss eval tools --n 100
    moss eval tools --model out/nano --n 500 --data own.jsonl
    moss eval tools --model http://gpu1:8000/v1#big --sets calculator,hand

Every question goes through the turn loop that users have, greedy, without grammar or filter; one that needs a tool also
with that tool off, and then held by the grammar too, which an engine of others does not follow. Sets are kinds of the
curriculum (`chat`, or `chat:held_out` for families never trained on), `hand` (questions as people type them) and the
files of `--data` (`tool_cases.py`). What a metric means stands in `tool_metrics.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moss.chat import Round, Turn, render
from moss.data.curriculum import KINDS
from moss.engine import Sampling
from moss.errors import UsageError
from moss.evals import tool_cases
from moss.evals.answering import Told, answers
from moss.evals.base import WIDTH, Evaluation, Kept, Subject, Values, made_of, results, show
from moss.evals.tool_cases import HAND, HAND_WRITTEN, LANGS, SCRIPTED, TOOL_OF, Case
from moss.evals.tool_metrics import ALL, Seen, judge, meets, targets
from moss.log import bar, note
from moss.tools.run import Options
from moss.tools.search import offline_tools

PARTS = ("thoughts", "commands", "results")  # of a round


@dataclass(frozen=True)
class EvalTools(Evaluation):
    """Measure how a model uses calculator, equation solver and search: right tool, arguments, answer, and restraint."""

    data: list[Path] = field(default_factory=list)  # JSON lines of one's own: questions, or conversations with tools
    n: int = 100  # questions of each scripted set and language
    sets: str = "all"  # names separated by commas, such as calculator,solver:held_out,hand
    langs: str = "en,zh"  # languages, separated by commas
    seed: int = 0  # which questions are drawn
    max_tokens: int = 256  # longest pass of an answer
    deterministic: bool = False  # the same answers to the last bit, whatever else is under way


def main(config: EvalTools) -> int:
    """Run the command."""
    asked = task(config)
    told, apart = results(config, asked)
    if config.json or apart:
        show(config, told, apart)
        return 0
    screen = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDTH)
    screen.print(table(asked.parts, told[0]["figures"]))
    for line in told[0]["notes"]:
        note(line)
    note(f"rows: {told[0]['rows']}")
    return 0


def task(config: EvalTools) -> ToolUse:
    """The cases of the chosen sets and languages, each in all its ways; UsageError for a set that does not exist."""
    if config.n < 1:
        raise UsageError(f"--n is {config.n}; it must be at least 1")
    known = (*KINDS, HAND)
    chosen = [*SCRIPTED, HAND] if config.sets == "all" else [name.strip() for name in config.sets.split(",")]
    for name in chosen:
        kind, _, split = name.partition(":")
        if kind not in known or split not in ("", "held_out"):
            raise UsageError(f"there is no set {name!r}; choose from {', '.join(known)}, or KIND:held_out")
    langs = [lang.strip() for lang in config.langs.split(",")]
    if not set(langs) <= set(LANGS):
        raise UsageError(f"languages are {', '.join(LANGS)}, not {config.langs!r}")
    found: list[Case] = []
    for name in chosen:
        if name == HAND:
            found += tool_cases.from_file(HAND_WRITTEN, HAND)
            continue
        for lang in langs:
            drawn = tool_cases.scripted(name, lang, config.n, config.seed)
            if len(drawn) < config.n:
                note(f"{name} {lang}: only {len(drawn)} different questions exist, not {config.n}")
            found += drawn
    for path in config.data:
        found += tool_cases.from_file(path)
    found = [case for case in found if case.lang in langs]
    return ToolUse(config, [each for case in first(found, config.limit) for each in tool_cases.ways(case)])


def first(cases: Sequence[Case], limit: int) -> Iterator[Case]:
    """The first `limit` cases of each set and language; 0: all."""
    counts: dict[tuple[str, str], int] = {}
    for case in cases:
        counts[case.set, case.lang] = counts.get((case.set, case.lang), 0) + 1
        if not limit or counts[case.set, case.lang] <= limit:
            yield case


# ---------------------------------------------------------------- the task

Part = tuple[str, str, str]  # set, metric, language


@dataclass(frozen=True)
class ToolUse:
    """The task of `moss eval tools`."""

    config: EvalTools
    cases: Sequence[Case]
    name: str = "tools"

    @property
    def parts(self) -> list[Part]:
        """What is told of each set: the sets in their order, then all together."""
        sets = [*dict.fromkeys(case.set for case in self.cases), ALL]
        return [(name, metric, lang) for name in sets for metric in targets(name) for lang in LANGS]

    def template(self, who: Subject) -> dict[str, Any]:
        """How long an answer may be, and whether batches may change its last bits."""
        return {"max_tokens": self.config.max_tokens, "deterministic": self.config.deterministic}

    def measure(self, who: Subject, kept: Kept) -> list[dict[str, Any]]:
        """A row a case and way: what was asked, rounds and reply, and the verdicts. A server follows no grammar: what
        is held by it is left out there."""
        cases = [case for case in self.cases if case.way != "held" or who.server is None]
        counts: dict[tuple[str, str], int] = {}
        ids = []
        for case in cases:
            at = counts[case.set, case.lang] = counts.get((case.set, case.lang), 0) + 1
            ids.append(f"{case.set}/{case.lang}/{at}")
        prints = [made_of(asdict(case)) for case in cases]
        new = kept.missing(ids, prints)
        with bar("questions", len(cases) - len(new), len(cases)) as shown:
            for done, (at, told) in enumerate(self._asked(who, cases, new), start=len(cases) - len(new) + 1):
                kept.add(row_of(ids[at], prints[at], cases[at], told, who), lasting=told.turn is not None)
                shown.show(done, f"{cases[at].set} {cases[at].lang}")
        return [kept.rows[id] for id in ids]

    def _asked(self, who: Subject, cases: Sequence[Case], new: Sequence[int]) -> Iterator[tuple[int, Told]]:
        """The answers to the new cases with their numbers: first those without the grammar."""
        for grammar in (False, True):
            mine = [at for at in new if (cases[at].way == "held") == grammar]
            sampling = Sampling(temperature=0, max_tokens=self.config.max_tokens)
            options = Options(sampling, grammar=grammar)
            dialogs = [cases[at].dialog for at in mine]
            told = answers(who, dialogs, options, offline_tools(), deterministic=self.config.deterministic)
            yield from zip(mine, told, strict=True)

    def values(self, rows: Sequence[dict[str, Any]]) -> dict[str, Values]:
        """For each tool what its switch does and what it brings, over all questions that need it alone; then each
        metric of each set and language."""
        seens = map(seen_of, rows)
        judged = [(case, seen, judge(case, seen)) for case, seen in zip(self._of(rows), seens, strict=True)]
        found: dict[str, Values] = {}
        for key, tool in TOOL_OF.items():
            for way, words in (("", "on"), ("off", "off"), ("held", "off, held by the grammar")):
                mine = [each for each in judged if each[0].tools == (tool,) and each[0].way == way]
                # No answer: a call that was wanted is missed, one that was not is neither made nor avoided.
                called = [tool in seen.called or (None if seen.failed and way else False) for _, seen, _ in mine]
                found |= values_of(f"{key}: called when {words}", called)
                right = [verdicts.get("answer right") for *_, verdicts in mine]
                found |= values_of(f"{key}: right answer when {words}", right)
        for name, metric, lang in self.parts:
            mine = [
                verdicts.get(metric)
                for case, _, verdicts in judged
                if case.lang == lang and (case.set == name or (name == ALL and not case.way))
            ]
            found |= values_of(part_name(name, metric, lang), mine)
        return found

    def _of(self, rows: Sequence[dict[str, Any]]) -> list[Case]:
        """The cases of rows, which are all or those without the grammar."""
        held = any(row["way"] == "held" for row in rows)
        return [case for case in self.cases if held or case.way != "held"]

    def notes(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """What was not asked, and what was not answered."""
        failed = [row["failed"] for row in rows if row["failed"]]
        told = list[str]()
        if failed:
            told.append(f"{len(failed):,} of {len(rows):,} questions were not answered, the first: {failed[0]}")
        if len(rows) < len(self.cases):
            told.append("a server follows no grammar, so nothing was held by it")
        return told


def row_of(id: str, print: str, case: Case, told: Told, who: Subject) -> dict[str, Any]:
    """The row of one case."""
    turn = told.turn or Turn(case.question)
    row: dict[str, Any] = {"id": id, "made_of": print, "set": case.set, "way": case.way, "lang": case.lang}
    row |= {"family": case.family, "question": case.question}
    row["prompt"] = who.tok and render(case.dialog, who.tok, until="thoughts")[0]
    row["expected"] = {"commands": case.commands, "tools": case.tools, "answer": case.answer}
    row |= {name: [getattr(item, name) for item in turn.rounds] for name in PARTS}
    row |= {"reply": turn.reply, "asked": told.asked, "ran": told.ran, "errors": told.errors, "failed": told.failed}
    return row | {"verdicts": judge(case, seen_of(row))}


def seen_of(row: Mapping[str, Any]) -> Seen:
    """What a model did, as its row tells."""
    rounds = [Round(*texts) for texts in zip(*(row[name] for name in PARTS), strict=True)]
    turn = Turn(row["question"], rounds, row["reply"])
    return Seen(turn, row["errors"], row["asked"], row["ran"], row["failed"])


def values_of(name: str, told: Sequence[bool | None]) -> dict[str, Values]:
    """Truths as numbers; nothing at all where none tells."""
    numbers = [None if each is None else float(each) for each in told]
    return {name: (numbers, None)} if any(each is not None for each in numbers) else {}


# ---------------------------------------------------------------- the table


def part_name(name: str, metric: str, lang: str) -> str:
    """The figure of a part."""
    return f"  {name}: {metric} ({lang})"


def table(parts: Sequence[Part], figures: Mapping[str, Mapping[str, float]]) -> Table:
    """One line a set and metric, the languages side by side: per cent with the interval."""
    shown = Table(title="Tool use, % with 95 % interval", title_justify="left", header_style="bold")
    for column in ("set", "metric", *LANGS, "n", "target"):
        shown.add_column(column, justify="left" if column in ("set", "metric") else "right")
    before = "both languages"
    for name, figure in figures.items():
        if not name.startswith(" "):
            key, _, metric = name.partition(": ")
            shown.add_row(key, metric, cell(figure, ""), "", f"{figure['n']:.0f}", "")
    for name, metric in dict.fromkeys((name, metric) for name, metric, _ in parts):
        found = {lang: figures[key] for lang in LANGS if (key := part_name(name, metric, lang)) in figures}
        if not found:
            continue
        if name != before:
            shown.add_section()
        target = targets(name)[metric]
        goal = f"{target[:2].replace('>=', '≥').replace('<=', '≤')} {float(target[2:]) * 100:g}" if target else ""
        cells = [cell(found[lang], target) if lang in found else "" for lang in LANGS]
        sizes = "/".join(f"{figure['n']:.0f}" for figure in found.values())
        shown.add_row(name if name != before else "", metric, *cells, sizes, goal)
        before = name
    return shown


def cell(figure: Mapping[str, float], target: str) -> str:
    """`98.0 (93.0-99.5)`, green or red where there is a target."""
    text = f"{figure['value'] * 100:.1f} ({figure['low'] * 100:.1f}-{figure['high'] * 100:.1f})"
    return f"[{'green' if meets(target, figure['value']) else 'red'}]{text}[/]" if target else text
