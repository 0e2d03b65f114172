"""Training checkpoints that are never lost: whole or not there at all.

A run's folder holds `step-000120/` for each checkpoint that is kept:

    model.safetensors  config.json  tokenizer.json     what stock transformers loads
    adapter_model.safetensors  adapter_config.json     instead of the first two where adapters are trained (`--lora`)
    optimizer/state.pt                                 optimizer and random state (`torch.load(weights_only=True)`)
    optimizer/shard-*.safetensors                      of a run over several ranks: each rank's part of the optimizer
    moss.json                                          format 1: stage, model, tokenizer sha256, run config, loop, data
    manifest.json                                      size and sha256 of every other file

Everything is written into a hidden folder beside, synced to disk, and published by one rename; so a kill or a full
disk at any moment leaves the earlier checkpoints as they were. Reading takes the newest step whose manifest holds;
others are reported with the reason and passed over, never deleted. `export` writes what a stage is for, the finished
model, into the run's folder itself, in the same way but file by file with `moss.json` last; that one has the weights'
sha256 too (`weights_sha256`), which `check_weights` looks at.

Over several ranks (`moss/dist.py`) all of them call `save` and `export` together: rank 0 gathers and writes the model
and publishes, each rank writes its own part of the optimizer's tensors through `torch.distributed.checkpoint`, and an
error on one is an error on all. In `state.pt` those tensors are named by shape and dtype alone (tensors on `meta`).
`load` fills them in for the ranks that there are, so that a run goes on with more or fewer of them, or on one.

The manifest tells damage, not malice: whoever can write in the folder can write a manifest too. Therefore nothing in
a checkpoint can run code when it is read: safetensors, JSON, and a pickle of tensors and plain values only.

Two runs cannot share a folder: `lock` holds `.lock` (an advisory lock that dies with the process, even under kill -9).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from moss import dist
from moss.files import sha256
from moss.model import Decoder
from moss.tokenizer import Tokenizer
from moss.weights import save_model

FORMAT = 1
FILES = ("tokenizer.json", "optimizer/state.pt", "moss.json")  # what every checkpoint has, and
WEIGHTS = (("model.safetensors", "config.json"), ("adapter_model.safetensors", "adapter_config.json"))  # one of these
STATE = ("optimizer", "rng", "data")  # what state.pt must hold
INFO = ("format", "stage", "model", "tokenizer_sha256", "run", "loop", "data")  # what moss.json must hold
KEEP = 2  # whole checkpoints that a run's folder holds; never fewer
ROOM = 1.05  # free space asked for before saving, as a multiple of what will be written
CHECKED = 10**9  # bytes of weights up to which they are read once more to see that they are whole
LEFT_OVER = (".step-*.tmp", ".final.tmp")  # what a kill while writing leaves; nobody else has such names

Report = Callable[[str], None]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make the run's folder and hold it for this process; unwritable or already held raises ValueError."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"cannot write in {folder}: {error.strerror}; choose another --out") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
            raise ValueError(f"{folder} is in use by {holder}; wait for it or choose another --out") from None
        named = folder / ".lock"
        if not named.exists() or not os.path.samestat(os.fstat(handle), named.stat()):
            raise ValueError(f"{folder} has just been given up by another run; try again")
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for pattern in LEFT_OVER:
            for left_over in folder.glob(pattern):
                shutil.rmtree(left_over, ignore_errors=True)
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()
    finally:
        os.close(handle)


def steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, the newest first, whether it is whole or not."""
    found = []
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and path.is_dir():
            found.append((int(number), path))
    return sorted(found, reverse=True)


def newest(folder: Path, report: Report) -> Path | None:
    """The newest whole checkpoint; those passed over are reported. None where there is none at all."""
    found = steps(folder)
    for _, path in found:
        try:
            check(path)
            return path
        except ValueError as error:
            report(f"skipped {path.name}: {error}")
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints in {folder} is whole; start anew in another --out")
    return None


def check(path: Path) -> None:
    """Raise ValueError with the reason unless every file of this checkpoint is what its manifest says."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise ValueError("manifest.json is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        raise ValueError("manifest.json cannot be read") from None
    weights = WEIGHTS[1] if WEIGHTS[1][0] in listed else WEIGHTS[0]
    for name in (*weights, *FILES):
        if name not in listed:
            raise ValueError(f"manifest.json does not list {name}")
    for name, (size, expected) in listed.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes instead of {size}")
        if sha256(file) != expected:
            raise ValueError(f"{name} is damaged (its sha256 differs)")


def save(
    folder: Path,
    step: int,
    *,
    parts: Mapping[str, Decoder],
    tokenizer: Tokenizer,
    state: dict[str, Any],
    info: dict[str, Any],
    keep: int = KEEP,
    adapter: Callable[[Decoder, Path], None] | None = None,
) -> Path:
    """Publish `step-N`, then drop all but the newest `keep` up to it; OSError leaves everything as it was. All ranks
    call it together, with the same `state` but for sharded tensors in it.

    `parts`: the model under "", and what trains beside it (PPO's critic) under the name of its subfolder. `adapter`
    writes what is trained of a model that is frozen else; without it models are written whole.
    """
    if keep < KEEP:
        raise ValueError(f"keep is {keep}; at least {KEEP}, so that damage to the newest does not end a run")

    weights = [p for model in parts.values() for p in model.parameters() if p.requires_grad or not adapter]
    need = sum(tensor.nbytes for tensor in _tensors([state, weights]))
    with dist.agreed():
        if dist.rank() == 0 and (free := shutil.disk_usage(folder).free) < need * ROOM:
            words = f"no space for a checkpoint ({need / 1e6:.0f} MB, {free / 1e6:.0f} MB free)"
            raise OSError(errno.ENOSPC, words, str(folder))
    shards = dict[str, torch.Tensor]()
    held = _map(state, "", lambda name, tensor: _set_aside(name, tensor, shards))

    models = parts if adapter else {name: dist.whole(model) for name, model in parts.items()}

    def write(into: Path) -> None:
        for name, model in models.items():
            if adapter:
                adapter(model, into / name)
            else:
                save_model(model, into / name, eos=tokenizer.eos)
        tokenizer.save(into)
        (into / "optimizer").mkdir()
        torch.save(held, into / "optimizer" / "state.pt")
        _write_json(into / "moss.json", {"format": FORMAT, **info})

    path = publish(folder, step, write, shards)
    if dist.rank() == 0:
        _prune(folder, step, keep)
    return path


def publish(
    folder: Path, step: int, write: Callable[[Path], None], shards: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Let `write` fill a hidden folder (on rank 0), and each rank add its part of `shards`; then add the manifest, and
    make it `step-N` in one rename."""
    final = folder / f"step-{step:06d}"
    fresh = folder / f".{final.name}.tmp"
    with _cleared(fresh, final):
        with dist.agreed():
            if dist.rank() == 0:
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir()
                write(fresh)
        if shards:
            dist.write_shards(fresh / "optimizer", shards)
        with dist.agreed():
            if dist.rank() == 0:
                _add_manifest(fresh)
                _rename(folder, fresh, final)
    return final


def _rename(folder: Path, fresh: Path, final: Path) -> None:
    """Give what was written its name, in one move."""
    if final.exists():  # a damaged one that was passed over: set it aside, so that the name is free for one rename
        aside = folder / f".{final.name}.old.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        fresh.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        fresh.rename(final)
    _sync(folder)


@contextmanager
def _cleared(fresh: Path, final: Path) -> Iterator[None]:
    """When writing fails, the hidden folder is gone again, and the OSError names what was to be made."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if dist.rank() == 0:
            shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(errno.EIO, f"writing failed: {error}", str(final)) from error  # torch and safetensors hide errno


def load(path: Path, *, sharded: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """(moss.json, state.pt) of a checkpoint that `newest` gave; anything missing in them is named in a ValueError.

    `sharded`: cut the optimizer's tensors over the ranks of now, from however many they are; all call it together.
    """
    info = read_info(path)
    try:
        state = torch.load(path / "optimizer" / "state.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path / 'optimizer/state.pt'} cannot be read: {str(error).splitlines()[0]}") from None
    for name in STATE:
        if not isinstance(state, dict) or name not in state:
            raise ValueError(f"{path / 'optimizer/state.pt'} lacks {name!r}; the run cannot go on exactly from here")
    named = dict[str, torch.Tensor]()
    _map(state, "", lambda name, tensor: named.setdefault(name, tensor) if tensor.is_meta else tensor)
    found = dist.read_shards(path / "optimizer", named) if named else {}
    if sharded and not named:  # of one process; what has rows is a parameter's size, and cut as parameters are
        spread = _map(state["optimizer"], "", lambda _, tensor: dist.spread(tensor) if tensor.ndim else tensor)
        return info, state | {"optimizer": spread}
    return info, _map(state, "", lambda name, tensor: found.get(name, tensor))


def read_info(path: Path) -> dict[str, Any]:
    """`moss.json` of a checkpoint or of a finished model."""
    file = path / "moss.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{file} is not JSON") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{file} is not of format {FORMAT}; use the version of moss that wrote it")
    for name in INFO:
        if name not in info:
            raise ValueError(f"{file} lacks {name!r}; the run cannot go on exactly from here")
    return info


def export(
    folder: Path,
    *,
    model: Decoder,
    tokenizer: Tokenizer,
    info: dict[str, Any],
    adapter: Callable[[Decoder, Path], None] | None = None,
) -> None:
    """The finished model in `folder` itself, in bfloat16: what `--model FOLDER` loads. `moss.json` says that it is
    there: the one of an earlier end goes before any other file changes, the new one comes last. All ranks call it.
    `adapter` as in `save`: it writes what is there instead."""
    model = model if adapter else dist.whole(model)
    with dist.agreed():
        if dist.rank() == 0:
            keep = adapter or partial(save_model, dtype=torch.bfloat16, eos=tokenizer.eos)
            _export(folder, partial(keep, model), tokenizer, info)


def _export(folder: Path, write: Callable[[Path], None], tokenizer: Tokenizer, info: dict[str, Any]) -> None:
    fresh = folder / ".final.tmp"
    with _cleared(fresh, folder):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
        tokenizer.save(fresh)
        told = {"format": FORMAT, **info, "weights_sha256": sha256(_weights(fresh))}
        _write_json(fresh / "moss.json", told)
        for file in fresh.iterdir():
            _sync(file)
    (folder / "moss.json").unlink(missing_ok=True)
    for file in sorted(fresh.iterdir(), key=lambda file: file.name == "moss.json"):
        file.replace(folder / file.name)
    fresh.rmdir()
    _sync(folder)


def check_weights(folder: Path, info: dict[str, Any]) -> None:
    """ValueError where a finished model's weights are not those that `info`, its `moss.json`, was written for.

    Taken as they are: weights of more than `CHECKED` bytes, where reading them twice would take seconds, and those
    of a model that says nothing about them.
    """
    file = _weights(folder)
    expected = info.get("weights_sha256")
    if expected is None or not file.is_file() or file.stat().st_size > CHECKED:
        return
    if sha256(file) != expected:
        raise ValueError(f"{file} is damaged (its sha256 is not the one in moss.json); copy the model again")


def _weights(folder: Path) -> Path:
    """The file with a model's weights, or an adapter's where there is no model."""
    return next((folder / name for name, _ in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0][0])


def _prune(folder: Path, step: int, keep: int) -> None:
    """Drop checkpoints older than the newest `keep`; one that cannot be dropped must not stop the run."""
    for _, path in [(number, path) for number, path in steps(folder) if number <= step][keep:]:
        doomed = folder / f".{path.name}.old.tmp"
        try:
            path.rename(doomed)  # out of sight in one move: a half-deleted checkpoint is never found by name
        except OSError:
            continue
        shutil.rmtree(doomed, ignore_errors=True)


def _add_manifest(folder: Path) -> None:
    """Sync every file to disk and write `manifest.json` over them."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(file)
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    _write_json(folder / "manifest.json", {"format": FORMAT, "files": files})
    _sync(folder / "manifest.json")
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync(path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Have the system write this file or folder to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor anywhere inside nested dicts and lists."""
    found = list[torch.Tensor]()
    _map(value, "", lambda _, tensor: found.append(tensor))
    return found


def _map(value: Any, name: str, change: Callable[[str, torch.Tensor], Any]) -> Any:
    """The same nested dicts and lists, with `change(its place, tensor)` for each tensor; `a.0.b` is a place."""
    if isinstance(value, torch.Tensor):
        return change(name, value)
    if isinstance(value, dict):
        return {key: _map(item, f"{name}.{key}" if name else str(key), change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, f"{name}.{index}", change) for index, item in enumerate(value))
    return value


def _set_aside(name: str, tensor: torch.Tensor, shards: dict[str, torch.Tensor]) -> torch.Tensor:
    """A sharded tensor goes into `shards`, and in its place stands one without content."""
    if not dist.is_sharded(tensor):
        return tensor
    shards[name] = tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
