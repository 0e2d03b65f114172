"""`moss train … --report`: what `log.jsonl` says of a run, as one picture, `report.png` in the run's folder.

One small chart a figure: the loss with its validation, the gradient's norm, the rate, tokens a second, and whatever
else the stage logs (accuracy, KL, reward, reply length, …), over the steps. Updates that were passed over are marked.
Needs matplotlib: the extra `train`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from moss.log import read

COLUMNS = 3
NOT_DRAWN = {"step", "position", "seconds", "tokens", "learnt", "skipped", "valid"}
EXACT = {"lr"}  # figures that are no measurement, and are drawn as they are
SMOOTH = 0.9  # of the running mean that is drawn over a noisy curve


def check_can_draw() -> None:
    """Said before the training, not after it: ValueError where matplotlib is missing."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise ValueError("--report needs matplotlib; install it with: pip install -e '.[train]'") from None


def draw(folder: Path, title: str) -> Path:
    """Draw `folder`/log.jsonl into `folder`/report.png and return that path; ValueError where there is no step."""
    check_can_draw()
    from matplotlib.figure import Figure

    steps, valid = split(read(folder / "log.jsonl"))
    if not steps:
        raise ValueError(f"{folder / 'log.jsonl'} holds no step that could be drawn")
    names = list(dict.fromkeys([name for line in steps for name in line if name not in NOT_DRAWN]))
    names += [name for name in dict.fromkeys(name for line in valid for name in line) if name not in {*names, "step"}]
    figure = Figure(figsize=(4.2 * COLUMNS, 2.8 * math.ceil(len(names) / COLUMNS)), layout="constrained")
    figure.suptitle(title)
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(math.ceil(len(names) / COLUMNS), COLUMNS, place)
        axes.set_title(name.replace("_", " "), fontsize=10)
        x, y = points(steps, name)
        if y:
            axes.plot(x, y, alpha=1.0 if name in EXACT else 0.35, linewidth=0.8)
        if y and name not in EXACT:
            axes.plot(x, smoothed(y), linewidth=1.6, label="smoothed")
        x, y = points(valid, name)
        if y:
            axes.plot(x, y, "o-", markersize=3, label="held out")
            axes.legend(fontsize=8)
        for line in steps:
            if "skipped" in line:
                axes.axvline(line["step"], color="red", alpha=0.3, linewidth=0.8)
        axes.grid(alpha=0.2)
    path = folder / "report.png"
    figure.savefig(path, dpi=110)
    return path


def split(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(steps, validations) of a log, the figures of a validation beside its step."""
    steps = [record for record in records if "valid" not in record]
    valid = [{"step": record["step"], **record["valid"]} for record in records if "valid" in record]
    return steps, valid


def points(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one figure, without the steps that have no finite one."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    return [step for step, _ in found], [float(value) for _, value in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """The running mean, which begins at the first value."""
    means = [values[0]]
    for _, value in pairwise(values):
        means.append(SMOOTH * means[-1] + (1 - SMOOTH) * value)
    return means
