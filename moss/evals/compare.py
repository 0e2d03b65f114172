"""`moss eval compare`: results of evaluations side by side.

    moss eval compare runs/evals                                # all that stands there
    moss eval compare runs/evals/mmlu/sft-… runs/evals/mmlu/base-…

Reads the `result.json` beside the rows of each run: one table a task, a column a run, with intervals. Settings in which
runs differ (style, number of examples) stand below the model's name. Intervals of single runs say less than a paired
difference: for that, `--against` measures both models on the same items.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moss.config import option
from moss.evals.base import WIDTH, cell
from moss.files import json_object
from moss.log import note

SHOWN = range(1, 30)  # lengths of settings that are shown below a model's name; the text of a template is not
NEEDED = ("task", "model", "settings", "figures", "notes")


@dataclass(frozen=True)
class Compare:
    """Put results of evaluations side by side: a table for each task, a column for each model."""

    runs: list[Path] = option(list, positional=True)  # folders of runs, or folders that hold some
    json: bool = False  # print all results as one JSON list


def main(config: Compare) -> int:
    """Run the command."""
    found = results(config.runs or [Path("runs/evals")])
    if config.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    screen = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDTH)
    for _, group in groupby(found, key=lambda each: each["task"]):
        screen.print(side_by_side(list(group)))
    return 0


def results(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The results in these folders, in order of task and model; ValueError where there are none."""
    found: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        files = sorted(folder.rglob("result.json"))
        if not files:
            raise ValueError(f"{folder} holds no result of an evaluation; `moss eval mmlu --data …` makes one")
        for file in files:
            told = json_object(file)
            if all(name in told for name in NEEDED):
                found[file.resolve()] = told | {"folder": file.parent.name}
            else:
                note(f"{file} is no result of an evaluation, and is left out")
    return sorted(found.values(), key=lambda told: (told["task"], told["model"]))


def side_by_side(group: Sequence[Mapping[str, Any]]) -> Table:
    """A table of runs of one task; a figure that a run does not have is left blank."""
    every = [each["settings"] for each in group]
    apart = [name for name in dict.fromkeys(name for each in every for name in each) if differs(name, every)]
    table = Table(title=group[0]["task"], title_justify="left", header_style="bold")
    table.add_column("")
    for each in group:
        own = [
            f"{name} {each['settings'][name]}" for name in apart if len(str(each["settings"].get(name, ""))) in SHOWN
        ]
        alike = sum(other["model"] == each["model"] for other in group) > 1
        head = each["folder"] if alike and not own else each["model"]
        table.add_column("\n".join([head, *own]), justify="right")
    for name in dict.fromkeys(name for each in group for name in each["figures"]):
        told = [each["figures"].get(name) for each in group]
        table.add_row(name, *("" if figure is None else cell(figure) for figure in told))
    return table


def differs(name: str, every: Sequence[Mapping[str, Any]]) -> bool:
    """Whether runs have a setting of this name with other values."""
    return any(each.get(name) != every[0].get(name) for each in every)
