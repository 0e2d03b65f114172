"""Checkpoints: whole or not there, and a damaged one never hides a good one."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from moss import checkpoint
from moss.model import Decoder, ModelConfig
from moss.tokenizer import Tokenizer, train
from moss.weights import load_model

ROOT = Path(__file__).parent.parent
INFO: dict[str, Any] = {"stage": "test", "model": {}, "tokenizer_sha256": "", "run": {}, "loop": {}, "data": {}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["one two three", "一二三"], 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return Decoder(ModelConfig.from_depth(1, tokenizer.vocab_size, 64))


def save(folder: Path, step: int, model: Decoder, tokenizer: Tokenizer, keep: int = 2) -> Path:
    state = {"optimizer": {"lr": torch.tensor([float(step)])}, "rng": {"cpu": torch.get_rng_state()}, "data": {}}
    folder.mkdir(exist_ok=True)
    return checkpoint.save(folder, step, parts={"": model}, tokenizer=tokenizer, state=state, info=INFO, keep=keep)


def quiet(text: str) -> None:
    """For reports that a test does not look at."""


def test_what_is_saved_comes_back(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Prevents a checkpoint that lacks a part of the promised layout, or that changes what it holds."""
    path = save(tmp_path, 7, model, tokenizer)
    assert path.name == "step-000007" and checkpoint.newest(tmp_path, quiet) == path
    info, state = checkpoint.load(path)
    assert info == {"format": 1, **INFO} and float(state["optimizer"]["lr"]) == 7.0
    back = load_model(path)
    for mine, theirs in zip(model.parameters(), back.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert Tokenizer.load(path).sha256 == tokenizer.sha256


def test_the_newest_are_kept(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Prevents a disk that fills up, an order by text instead of number, and a run that keeps only one."""
    for step in (9, 10, 100, 2000000):
        save(tmp_path, step, model, tokenizer)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [2000000, 100]
    with pytest.raises(ValueError, match="at least 2"):
        save(tmp_path, 2000001, model, tokenizer, keep=1)
    assert not list(tmp_path.glob(".*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "one bit of the weights": (lambda p: flip(p / "model.safetensors"), "model.safetensors is damaged"),
    "one bit of the optimizer": (lambda p: flip(p / "optimizer/state.pt"), "optimizer/state.pt is damaged"),
    "cut": (lambda p: os.truncate(p / "model.safetensors", 1000), "has 1000 bytes instead of"),
    "moss.json gone": (lambda p: (p / "moss.json").unlink(), "moss.json is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "manifest of nothing": (lambda p: (p / "manifest.json").write_text('{"files": {}}'), "does not list"),
    "manifest of nonsense": (lambda p: (p / "manifest.json").write_text('{"files": [1]}'), "cannot be read"),
    "empty folder": (lambda p: (shutil.rmtree(p), p.mkdir()), "manifest.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_passed_over(name: str, tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Prevents a run that dies of, or goes on from, a damaged newest checkpoint: the one before it is taken."""
    damage, reason = DAMAGE[name]
    good, bad = save(tmp_path, 1, model, tokenizer), save(tmp_path, 2, model, tokenizer)
    damage(bad)
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == good
    assert len(said) == 1 and said[0].startswith("skipped step-000002: ") and reason in said[0]
    assert bad.exists()  # never deleted behind the user's back
    again = save(tmp_path, 2, model, tokenizer)  # and its name can be used again
    assert checkpoint.newest(tmp_path, quiet) == again


def test_all_damaged_is_an_error(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Prevents a silent start from nothing in a folder where work was lost."""
    flip(save(tmp_path, 1, model, tokenizer) / "moss.json")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoint.newest(tmp_path, quiet)
    assert checkpoint.newest(tmp_path / "elsewhere", quiet) is None


@pytest.mark.parametrize("what", ["optimizer", "rng", "data"])
def test_missing_state_is_named(what: str, tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Prevents a resume that quietly starts with a fresh optimizer, random state or state of the data."""
    path = save(tmp_path, 1, model, tokenizer)
    state = torch.load(path / "optimizer/state.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if name != what}, path / "optimizer/state.pt")
    with pytest.raises(ValueError, match=f"lacks '{what}'"):
        checkpoint.load(path)


@pytest.mark.parametrize("what", ["stage", "model", "tokenizer_sha256", "run", "loop", "data"])
def test_missing_info_is_named(what: str, tmp_path: Path) -> None:
    """Prevents a resume with the data position or the settings lost."""
    told = {"format": 1, **INFO}
    del told[what]
    (tmp_path / "moss.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"lacks '{what}'"):
        checkpoint.read_info(tmp_path)
    (tmp_path / "moss.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="not of format 1"):
        checkpoint.read_info(tmp_path)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MOSS_TEST_PAYLOAD"],)


def test_a_hostile_optimizer_file_runs_nothing(
    tmp_path: Path, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents code in a pickle from running when a checkpoint of someone else is opened."""
    monkeypatch.setenv("MOSS_TEST_PAYLOAD", str(tmp_path / "ran"))
    path = save(tmp_path, 1, model, tokenizer)
    torch.save({"optimizer": Payload(), "rng": {}, "data": {}}, path / "optimizer/state.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_keeps_the_old_one(
    tmp_path: Path, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents half a checkpoint, or the loss of the last whole one, when there is no space: seen before or while."""
    good = save(tmp_path, 1, model, tokenizer)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(torch, "save", fails)
        save(tmp_path, 2, model, tokenizer)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space for a checkpoint"):
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
        save(tmp_path, 3, model, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [good.name] and checkpoint.newest(tmp_path, quiet) == good


def test_a_really_full_disk(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Prevents an error of torch or safetensors, which hide the system's own, from escaping as a traceback."""
    small = tmp_path / "small"
    small.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        state = {"optimizer": {}, "rng": {}}
        with pytest.raises(OSError):
            checkpoint.publish(small, 1, lambda into: torch.save(torch.zeros(500_000), into / "state.pt"))
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(
                small, 1, parts={"": model}, tokenizer=tokenizer, state=state | {"x": torch.zeros(500_000)}, info=INFO
            )
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    """Prevents two runs that overwrite each other's checkpoints; the message names the holder."""
    run = tmp_path / "run"
    with checkpoint.lock(run):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "), checkpoint.lock(run):
            pass
        assert (run / ".lock").exists()
    assert not run.exists()  # nothing was written, so nothing is left
    run.mkdir()
    (run / ".step-000003.tmp").mkdir()  # what a killed run leaves
    (run / ".mine.tmp").mkdir()  # what is not ours
    (run / ".lock").write_text("process 1 on elsewhere\n")
    with checkpoint.lock(run):
        assert not (run / ".step-000003.tmp").exists() and (run / ".mine.tmp").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """Prevents a traceback for a read-only disk or a file in the way."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/moss")):
        with pytest.raises(ValueError, match=r"cannot write in .*; choose another --out"), checkpoint.lock(folder):
            pass


def test_export_is_a_model_of_its_own(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Prevents a finished model that is not bfloat16, lacks its tokenizer, or changes the one in training."""
    checkpoint.export(tmp_path, model=model, tokenizer=tokenizer, info=INFO)
    names = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "moss.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == tokenizer.eos  # where `generate` stops
    back = load_model(tmp_path, dtype=torch.bfloat16)
    for mine, theirs in zip(model.parameters(), back.parameters(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine.to(torch.bfloat16), theirs)
    assert 2 * sum(p.numel() for p in model.parameters()) <= (tmp_path / "model.safetensors").stat().st_size < 2.2e6


def test_damaged_weights_of_a_finished_model_are_told(
    tmp_path: Path, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a model of the right size that chats nonsense, or is trained further, without a word."""
    checkpoint.export(tmp_path, model=model, tokenizer=tokenizer, info=INFO)
    info = checkpoint.read_info(tmp_path)
    checkpoint.check_weights(tmp_path, info)
    flip(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        checkpoint.check_weights(tmp_path, info)
    checkpoint.check_weights(tmp_path, {"format": 1, **INFO})  # one that was made before this was written down
    monkeypatch.setattr(checkpoint, "CHECKED", 1000)
    checkpoint.check_weights(tmp_path, info)


def test_an_export_that_fails_leaves_what_was_there(
    tmp_path: Path, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents half a model beside the old one, or new weights under the old `moss.json`, however the writing ends."""
    checkpoint.export(tmp_path, model=model, tokenizer=tokenizer, info=INFO)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(checkpoint, "_write_json", fails)
        checkpoint.export(tmp_path, model=model, tokenizer=tokenizer, info=INFO)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save_model", lambda *_, **__: patch.setattr(Path, "replace", killed))
        patch.setattr(checkpoint, "sha256", lambda file: "")
        patch.setattr(tokenizer.__class__, "save", lambda *_: None)
        checkpoint.export(tmp_path, model=model, tokenizer=tokenizer, info=INFO)
    assert not (tmp_path / "moss.json").exists()  # so that nothing takes the rest for a finished model


SAVER = """
import sys, torch
from pathlib import Path
from tests.test_checkpoint import save
from moss.model import Decoder, ModelConfig
from moss.tokenizer import load
tokenizer = load(sys.argv[2])
model = Decoder(ModelConfig.from_depth(1, tokenizer.vocab_size, 64))
for step in range(int(sys.argv[3]), 10**6):
    save(Path(sys.argv[1]), step, model, tokenizer)
    print(step, flush=True)
"""


@pytest.mark.repeated
def test_kill_nine_at_random_moments(tmp_path: Path, tokenizer: Tokenizer, repeats: int) -> None:
    """Prevents a latest checkpoint that is torn, or older than the last one that was published."""
    tokenizer.save(tmp_path / "tok")
    run = tmp_path / "run"
    run.mkdir()
    published, rng = 0, random.Random(0)
    for _ in range(repeats):
        command = [sys.executable, "-c", SAVER, str(run), str(tmp_path / "tok"), str(published + 1)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout
        first = child.stdout.readline()
        assert first, "the saving process did not start"
        time.sleep(rng.uniform(0.01, 0.3))
        child.send_signal(signal.SIGKILL)
        seen = [first, *child.stdout.read().split("\n")]
        child.wait()
        told = max(int(line) for line in seen if line.strip())
        with checkpoint.lock(run):
            newest = checkpoint.newest(run, quiet)
        assert newest is not None
        published = int(newest.name.removeprefix("step-"))
        assert published >= told
        checkpoint.load(newest)
        load_model(newest)
