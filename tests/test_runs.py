"""The scripts in runs/ and the set-up in the Makefile: the whole road once, small, as a user starts it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moss.resolve import load

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "runs" / "nano.sh"


def program(path: Path, lines: str) -> None:
    """A shell script in the place of a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


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


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("exit 0", 143, "stopped in plain text (1000 documents) before"),  # SIGTERM saves, and that is a success
        ("exit 1", 1, ""),
        ("exit 2", 2, ""),
        ("exit 137", 137, ""),  # killed for memory: the same command would be killed again
        ("exit 130", 130, "stopped in plain text (1000 documents); the same command goes on from there"),
        ("kill -TERM $$", 143, "stopped in plain text (1000 documents); the same command goes on from there"),
    ],
)
def test_a_stage_that_ends_without_its_result_ends_the_run(tmp_path: Path, command: str, code: int, words: str):
    """The next stage failed for want of a file that it did not make; and `goes on from there` was said of any crash."""
    script = tmp_path / "runs" / "nano.sh"
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    program(tmp_path / ".venv" / "bin" / "python", command)
    argv = [str(script), "--scale", "0.05", "--out", "out"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    assert result.stdout.strip() == "== plain text (1000 documents)"
    assert words in result.stderr
    assert bool(words) == bool(result.stderr)


def test_a_set_up_that_failed_for_want_of_a_package_can_be_done_again(tmp_path: Path):
    """Where Python comes without venv, the half-made .venv that its failure leaves was taken for a whole one."""
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    version_is_fine = 'test "$1" = -c && exit 0\n'
    half = version_is_fine + "mkdir -p .venv/bin; touch .venv/bin/python; chmod +x .venv/bin/python; exit 1"
    make = ["make", "-C", str(tmp_path), ".venv/.torch", f"PYTHON={python}"]
    for _ in range(2):
        program(python, half)
        result = subprocess.run(make, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2
        assert "sudo apt install python3-venv" in result.stderr
    program(python, version_is_fine + 'echo "$@" >> asked; cp pip .venv/bin')
    program(tmp_path / "pip", "exit 0")
    result = subprocess.run(make, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / ".venv" / ".torch").exists()
    assert (tmp_path / "asked").read_text() == "-m venv --clear .venv\n"


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
