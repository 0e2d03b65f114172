"""The scripts in runs/: the whole road once, small, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moss.resolve import load

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "runs" / "nano.sh"


def nano(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *argv], capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--scala", "1"], "--scala"),
        (["--scale", "x"], "x"),
        (["--seed", "-1"], "-1"),
        (["--bundle", "--scale", "0.05"], "0.05"),  # it would leave a model that learnt nothing in the package
    ],
)
def test_bad_options_are_refused_before_anything_is_made(argv: list[str], words: str):
    """A misspelt option that is ignored starts a quarter of an hour of the wrong run."""
    result = nano(*argv)
    assert result.returncode == 2
    assert result.stdout == ""
    assert words in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="the script runs in the project's .venv")
def test_the_whole_road_small(tmp_path: Path):
    """Every stage hands the next what it needs; starting again repeats nothing and mixes nothing."""
    out = tmp_path / "nano"
    result = nano("--scale", "0.05", "--out", str(out))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    model, tok = load(out / "sft")
    assert tok.vocab_size <= model.config.vocab_size
    assert json.loads((out / "eval.json").read_text())["rows"]
    ask = [
        sys.executable,
        "-m",
        "moss",
        "chat",
        "--model",
        str(out / "sft"),
        "-p",
        "What is 37*12?",
        "--max-tokens",
        "32",
    ]
    answer = subprocess.run([*ask, "--json"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert {"reply", "commands", "timing"} <= json.loads(answer.stdout).keys()

    again = nano("--scale", "0.05", "--out", str(out))
    assert again.returncode == 0
    assert again.stdout.count("done before") == 6
    other = nano("--scale", "0.5", "--out", str(out))
    assert other.returncode == 1
    assert "was made with" in other.stderr
