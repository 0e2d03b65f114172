"""The picture of a run: every figure of the log is in it, and what cannot be drawn is said before the training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moss.train import report


def written(folder: Path, lines: list[dict]) -> Path:
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_steps_and_validations_are_told_apart(tmp_path: Path) -> None:
    """Prevents a validation drawn as a step of zero loss, and a gap (a skipped step has no loss) drawn as zero."""
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "valid": {"loss": 3.0}}, {"step": 2, "loss": None, "skipped": "nan"}]
    steps, valid = report.split(lines)
    assert report.points(steps, "loss") == ([1], [2.0])
    assert report.points(valid, "loss") == ([1], [3.0])


def test_the_running_mean_by_hand() -> None:
    """Prevents a mean that begins at zero: 0.9 x 1 + 0.1 x 11 = 2."""
    assert report.smoothed([1.0, 11.0]) == pytest.approx([1.0, 2.0])


def test_a_run_becomes_a_picture(tmp_path: Path) -> None:
    """Prevents a report that fails at the end of a long training."""
    pytest.importorskip("matplotlib")
    lines = [{"step": n, "loss": 1 / n, "kl": n / 10, "lr": 1.0, "position": n} for n in range(1, 20)]
    path = report.draw(written(tmp_path, [*lines, {"step": 19, "valid": {"accuracy": 0.9}}]), "sft")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="holds no step"):
        report.draw(written(tmp_path, []), "sft")


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an ImportError after hours of training."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"\.\[train\]"):
        report.check_can_draw()
