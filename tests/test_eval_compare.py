"""Results side by side: what stands in the folders, one table a task, and what differs between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moss.evals import compare
from moss.evals.compare import Compare


def write(folder: Path, task: str, model: str, value: float, **settings: Any) -> Path:
    figure = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}
    told = {"task": task, "model": model, "settings": settings, "figures": {"accuracy": figure}, "notes": []}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(told))
    return folder


def test_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents figures under another model, a table of two tasks, and runs of other settings that look alike."""
    write(tmp_path / "mmlu/a", "mmlu", "first", 0.25, style="chat", head="A long text that is no name of a setting")
    write(tmp_path / "mmlu/b", "mmlu", "second", 0.75, style="plain", head="Another long text of another template")
    one = write(tmp_path / "gsm8k/a", "gsm8k", "first", 0.5)
    write(tmp_path / "truthfulqa/sft-1", "truthfulqa", "sft", 0.5)
    write(tmp_path / "truthfulqa/sft-2", "truthfulqa", "sft", 0.5)
    assert compare.main(Compare([tmp_path])) == 0
    shown, alike = capsys.readouterr().out.split("truthfulqa")
    assert "sft-1" in alike and "sft-2" in alike  # models of one name
    gsm8k, mmlu = shown.split("mmlu")
    assert "0.500 (0.400 to 0.600)" in gsm8k and "second" not in gsm8k
    lines = mmlu.splitlines()
    assert any("first" in line and "second" in line for line in lines)
    assert any("style chat" in line and "style plain" in line for line in lines) and "long text" not in mmlu
    assert any("0.250 (0.150 to 0.350) │ 0.750 (0.650 to 0.850)" in line for line in lines)
    assert compare.main(Compare([one, one], json=True)) == 0
    assert [each["task"] for each in json.loads(capsys.readouterr().out)] == ["gsm8k"]


def test_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents a traceback for a folder without results, or with a file of the same name."""
    with pytest.raises(ValueError, match="holds no result of an evaluation"):
        compare.main(Compare([tmp_path]))
    write(tmp_path / "a", "mmlu", "first", 0.25)
    (tmp_path / "result.json").write_text("{}")
    assert compare.main(Compare([tmp_path])) == 0 and "is left out" in capsys.readouterr().err
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match="is broken"):
        compare.main(Compare([tmp_path]))
