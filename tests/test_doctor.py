"""The doctor: what it finds here, what it says of gaps, and that a check that fails is a finding."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from moss.evals import doctor
from moss.evals.doctor import Doctor, Finding
from moss.tools.base import ToolError


def found(capsys: pytest.CaptureFixture) -> dict[str, Finding]:
    assert doctor.main(Doctor(json=True)) in (0, 1)
    return {each["name"]: Finding(**each) for each in json.loads(capsys.readouterr().out)}


def test_a_machine_that_runs_the_tests_runs_the_model(capsys: pytest.CaptureFixture) -> None:
    """Prevents a doctor who finds nothing, or who looks at another machine."""
    told = found(capsys)
    for name in ("Python", "PyTorch", "bundled model", "tools"):
        assert told[name].fine, told[name]
    assert torch.__version__ in told["PyTorch"].found and "M parameters" in told["bundled model"].found
    assert "calculator" in told["tools"].found and "GB free" in told["memory"].found
    assert all(bool(each.mend) <= (not each.fine) for each in told.values())
    assert doctor.main(Doctor()) == 0 and "bundled model" in capsys.readouterr().out


def test_gaps_come_with_what_mends_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Prevents a gap without a way out, a GPU that PyTorch cannot use in silence, and a model too large to fit."""
    monkeypatch.setattr(doctor, "library", lambda: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "free_memory", lambda place: 6e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = found(capsys)
    for name, words in (
        ("engine's kernels", "g++"),
        ("compiled training", "g++"),
        ("GPU", "TORCH_INDEX="),
        ("toxicity by a classifier", "pip install -e '.[eval]'"),
    ):
        assert not told[name].fine and words in told[name].mend
    assert "0.6B as float32, 1.7B as bfloat16, 4B as int8, 8B as int4" in told["memory"].found
    assert doctor.main(Doctor()) == 0 and "sudo apt install g++" in capsys.readouterr().out


def test_without_the_model_nothing_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Prevents exit code 0 where `moss chat` will not start, and a check whose failure ends all others."""

    def broken() -> tuple[object, object]:
        raise ValueError("model.safetensors is damaged")

    def fails() -> Iterator[Finding]:
        raise OSError("no such thing")
        yield

    monkeypatch.setattr(doctor, "load", broken)
    monkeypatch.setattr(doctor, "CHECKS", (fails, doctor.model, doctor.terminal))
    assert doctor.main(Doctor(json=True)) == 1
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told] == ["fails", "bundled model", "terminal"]
    assert "no such thing" in told[0]["found"] and "is damaged" in told[1]["found"] and told[1]["mend"]


def test_walls_around_tools_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Prevents a traceback where the kernel refuses the walls, and fewer walls than on Linux without a word."""
    monkeypatch.setattr(doctor, "CHECKS", (doctor.tools,))
    monkeypatch.setattr(doctor.calculator, "BOX", Walls({"mode": "process"}))
    assert "mode process; without the kernel's walls" in found(capsys)["tools"].found
    monkeypatch.setattr(doctor.calculator, "BOX", Walls(ToolError("the sandbox cannot start: no seccomp")))
    told = found(capsys)["tools"]
    assert not told.fine and "no seccomp" in told.found and "MOSS_SANDBOX=process" in told.mend


class Walls:
    """A sandbox with these layers, or this reason why there is none."""

    def __init__(self, told: dict[str, str] | ToolError) -> None:
        self.told = told

    @property
    def layers(self) -> dict[str, str]:
        if isinstance(self.told, ToolError):
            raise self.told
        return self.told
