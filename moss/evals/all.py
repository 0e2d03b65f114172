"""`moss eval all`: every evaluation of a model, one after the other, and one page with all of it.

    moss eval all --model runs/sft --data sets
    moss eval all --model runs/pat --against runs/sft --data sets --judge http://gpu1:8000/v1#big --limit 200

`--data` is a folder in which each set stands under the name that its maintainers gave it (`TASKS` below). A set that is
not there is named with where it is published; a task that ends with an error is named with it, and the others go on.
What was measured before is not measured again, so that an interrupted run goes on where it stopped.

The page (`moss/evals/page.py`) and results.json stand in `--out`/all/MODEL, or MODEL-over-AGAINST. The exit code is 1
where a task failed, and 0 where sets were merely missing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moss import __version__
from moss.errors import UsageError, one_line, plain
from moss.evals import base, choice, doctor, gsm8k, judge, perplexity, tool_use, toxicity, truthful
from moss.evals.base import WIDTH, Evaluation, Results, cell, checked, named
from moss.evals.choice import MMLU
from moss.evals.gsm8k import GSM8K
from moss.evals.judge import Judge
from moss.evals.page import headlines, page
from moss.evals.perplexity import Perplexity
from moss.evals.scorers import scorer
from moss.evals.tool_use import EvalTools
from moss.evals.toxicity import Toxicity
from moss.evals.truthful import TruthfulQA
from moss.files import replacing
from moss.log import note
from moss.model import num_parameters
from moss.peft import base_folder, is_adapter
from moss.resolve import choose, locate, on_server
from moss.tools.chat_server import connect
from moss.weights import read_config


@dataclass(frozen=True)
class All(Evaluation):
    """Measure a model with every evaluation whose set is there, and make one page of tables and pictures."""

    data: Path | None = None  # folder with the sets under their published names; scripted ones need none
    judge: str = "scripted"  # http://host:port/v1#name of a chat model, which also says what of TruthfulQA's is true
    scorer: str = "words"  # of toxicity: words, perspective, or the folder of a classifier
    tasks: str = ""  # names separated by commas; all if left out


@dataclass(frozen=True)
class Entry:
    """A task: its name, its name for people, its settings, what measures it, and its set."""

    name: str
    title: str
    command: type
    results: Callable[[Any], Results]
    sets: tuple[str, ...] = ()  # what its set may be called in --data, a folder with a slash; none: it needs none
    published: str = ""  # where its set is


def by(task: Callable[[Any], base.Task]) -> Callable[[Any], Results]:
    """What measures a task that the settings make."""
    return lambda config: base.results(config, task(config))


AT_MMLU, AT_CEVAL, AT_CMMLU = choice.PUBLISHED.split("; ")
PROMPTS = "JSON lines with prompt, or user_prompt as in the released data of MOSS: github.com/OpenMOSS/MOSS"
TEXTS = "texts of your own: .txt files, JSON lines with `text`, code"
TASKS = (
    Entry("perplexity", "Text", Perplexity, by(perplexity.task), ("corpus/",), TEXTS),
    Entry("mmlu", "MMLU", MMLU, by(choice.task), ("mmlu/",), AT_MMLU),
    Entry("ceval", "C-Eval", MMLU, by(partial(choice.task, name="ceval")), ("ceval*/",), AT_CEVAL),
    Entry("cmmlu", "CMMLU", MMLU, by(partial(choice.task, name="cmmlu")), ("cmmlu*/",), AT_CMMLU),
    Entry("truthfulqa", "TruthfulQA", TruthfulQA, truthful.results, ("TruthfulQA.csv",), truthful.PUBLISHED),
    Entry("toxicity", "RealToxicityPrompts", Toxicity, toxicity.results,
          ("realtoxicityprompts*/prompts.jsonl", "prompts.jsonl"), toxicity.PUBLISHED),
    Entry("judge", "Judge", Judge, judge.results, ("*user_prompts*.jsonl", "prompts?*.jsonl"), PROMPTS),
    Entry("tools", "Tools", EvalTools, by(tool_use.task)),
    Entry("gsm8k", "GSM8K", GSM8K, by(gsm8k.task), ("gsm8k*/test.jsonl", "gsm8k*.jsonl", "test.jsonl"),
          gsm8k.PUBLISHED),
)  # fmt: skip


def main(config: All) -> int:
    """Measure, write, show."""
    plan = planned(config)
    models = [about(config, model) for model in checked(config)]
    folder = config.out / "all" / "-over-".join(each["name"].replace("/", "-") for each in models)
    folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {
        "models": models,
        "moss": __version__,
        "machine": machine(),
        "settings": {"limit": config.limit, "judge": config.judge, "data": str(config.data or "")},
    }
    told["tasks"] = [one(config, each, f"{at} of {len(plan)}") for at, each in enumerate(plan, start=1)]
    told["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    write(folder / "results.json", json.dumps(told, ensure_ascii=False, indent=1) + "\n")
    write(folder / "page.html", page(told))
    show(config, told, folder / "page.html")
    return int(any(each["state"] == "failed" for each in told["tasks"]))


def write(file: Path, text: str) -> None:
    """The text as a file, whole or not at all."""
    with replacing(file) as beside:
        beside.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- what is to be measured


@dataclass(frozen=True)
class Planned:
    """A task with its set (None: it needs none), or why it cannot be measured."""

    entry: Entry
    data: Path | None = None
    missing: str = ""


def planned(config: All) -> list[Planned]:
    """All tasks in their order; UsageError for settings with which none of them could ever be measured."""
    if config.data is not None and not config.data.is_dir():
        raise UsageError(f"--data: there is no folder {config.data}; give the one that holds the sets")
    if config.judge != "scripted" and not on_server(config.judge):
        raise UsageError(f"--judge is {config.judge!r}; give http://host:port/v1#name, or scripted")
    wanted = [name.strip() for name in config.tasks.split(",")] if config.tasks else [each.name for each in TASKS]
    if unknown := [name for name in wanted if name not in {each.name for each in TASKS}]:
        raise UsageError(f"--tasks: there is no {unknown[0]!r}; choose from {', '.join(each.name for each in TASKS)}")
    plan = [found(config, each) for each in TASKS if each.name in wanted]
    if any(each.entry.name == "toxicity" and each.data for each in plan):
        with scorer(config.scorer):  # one that is not there is said now, not after hours
            pass
    return plan


def found(config: All, entry: Entry) -> Planned:
    """The task with its set in `--data`, the first of the names under which it may stand there."""
    if entry.name == "judge" and config.against is None:
        return Planned(entry, missing="a judge compares two models; give the second as --against")
    if not entry.sets or (entry.name == "judge" and config.judge == "scripted"):
        return Planned(entry)
    names = " or ".join(f"folder {name[:-1]}" if name.endswith("/") else name for name in entry.sets)
    folder = config.data
    if folder is None:
        return Planned(entry, missing=f"give a folder with {names} as --data. {entry.published}")
    for pattern in entry.sets:
        hits = [each for each in sorted(folder.glob(pattern)) if each.is_dir() == pattern.endswith("/")]
        if hits[1:]:
            note(f"{entry.title}: {hits[0]} is measured; {', '.join(map(str, hits[1:]))} would fit too")
        if hits:
            return Planned(entry, hits[0])
    return Planned(entry, missing=f"there is no {names} in {folder}. {entry.published}")


def given(config: All, entry: Entry, data: Path | None) -> Any:
    """The settings of a task: those that it shares with `all`, and its set."""
    default = entry.command()
    shared = {each.name for each in fields(config)} & {each.name for each in fields(default)} - {"data"}
    values = {name: getattr(config, name) for name in shared}
    if entry.name == "truthfulqa" and config.judge == "scripted":  # which knows nothing of its questions
        del values["judge"]
    if config.limit and hasattr(default, "n"):
        values["n"] = min(config.limit, default.n)
    if data is not None:
        values["data"] = [data] if isinstance(default.data, list) else data
    return entry.command(**values)


def about(config: All, model: str | None) -> dict[str, str]:
    """A model's name, where it stands and how it runs; ValueError where it is not there, or does not fit."""
    if model is not None and on_server(model):
        server, tok = connect(model, config.tokenizer, chat=False)
        with server:
            way = "completes ids that are made here" if tok else "chats, and tells no probabilities"
            return {"name": server.name, "place": server.url, "runs": f"on a server, which {way}"}
    folder = locate(model)
    size = read_config(base_folder(folder) if is_adapter(folder) else folder)
    dtype, place = choose(size, config.dtype, config.device)
    runs = f"{dtype} on the {place}, {num_parameters(size):,} parameters"
    return {"name": named(model), "place": model or "bundled", "runs": runs}


def machine() -> str:
    """What it runs on, in words."""
    seen = [*doctor.python(), next(doctor.processor()), *doctor.graphics()]
    return "; ".join(f"{each.name}: {each.found}" for each in seen)


# ---------------------------------------------------------------- measuring


def one(config: All, this: Planned, place: str) -> dict[str, Any]:
    """What came of a task: measured, missing its set, or failed, and why."""
    entry = this.entry
    told: dict[str, Any] = {"task": entry.name, "title": entry.title, "set": str(this.data or "")}
    if this.missing:
        note(f"{place}, {entry.title}: not measured; {this.missing}")
        return told | {"state": "missing", "why": this.missing}
    note(f"{place}, {entry.title}{f': {this.data}' if this.data else ''}")
    try:
        results, apart = entry.results(given(config, entry, this.data))
    except (ValueError, OSError, RuntimeError) as error:  # a broken set, a server that fails, memory that ends
        note(f"{place}, {entry.title} failed: {one_line(error)}")
        return told | {"state": "failed", "why": one_line(error)}
    return told | {"state": "measured", "results": results, "difference": apart}


def show(config: All, told: Mapping[str, Any], file: Path) -> None:
    """A line a task and the page's path, or everything as JSON."""
    if config.json:
        print(json.dumps(told, ensure_ascii=False))
        return
    screen = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDTH)
    table = Table(title="moss eval all, with 95 % intervals", title_justify="left", header_style="bold")
    for column in ("", "", *(plain(each["name"]) for each in told["models"])):
        table.add_column(Text(column))
    for each in told["tasks"]:
        for row in lines(each):
            table.add_row(*map(Text, row))
    screen.print(table)
    for each in told["tasks"]:
        if each["state"] != "measured":
            print(
                f"{each['title']} {'failed' if each['state'] == 'failed' else 'is not measured'}: {plain(each['why'])}"
            )
    print(f"page: {file}")


def lines(task: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """A task's rows in the table: its first figures, or what hindered it."""
    if task["state"] != "measured":
        return [(task["title"], "not measured" if task["state"] == "missing" else "failed")]
    names = headlines(task)
    return [
        (
            task["title"] if name == names[0] else "",
            name.strip(),
            *(cell(each["figures"][name]) if name in each["figures"] else "" for each in task["results"]),
        )
        for name in names
    ]
