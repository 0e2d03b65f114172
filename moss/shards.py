"""The tensors of a model folder, whatever files they lie in: safetensors or `pytorch_model.bin`, whole or in shards.

Files from outside are material, not program: pickles are read as tensors alone, no file outside the folder is opened,
and what is damaged is a ValueError that names the file. Nothing is read before it is asked for.

    shards = Shards(Path("models/Qwen3-0.6B"))
    shards.check({"model.norm.weight": (1024,), ...}, spare=set())     # names and shapes, before memory is taken
    norm = shards.read("model.norm.weight")
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moss.files import json_object

JSON_LIMIT = 64 * 2**20  # bytes of a config or an index that will be parsed
SHOWN = 4  # names listed in an error before "and so many more"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Buffers that some versions of the original code saved; they follow from the config.
IGNORED = re.compile(r".*(\.attn\.(causal_mask|bias|masked_bias|embed_positions)|\.rotary_emb\.inv_freq)")
# What torch.load raises, reading plain tensors alone, on damaged or hostile files.
UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, AssertionError)


class Shards:
    """All tensors of a folder by name, checked when opened and read one at a time from the mapped files.

    For each tensor its file is mapped anew, so that what was read before takes no memory any more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.read_from: dict[str, Callable[[], Tensor]] = {}
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (folder / name).exists():
                return self._open(name)
            if (folder / f"{name}.index.json").exists():
                return self._open_index(f"{name}.index.json")
        raise FileNotFoundError(f"{folder} has no model.safetensors and no pytorch_model.bin, whole or with an index")

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        return self.read_from[name]()

    def check(self, expected: dict[str, tuple[int, ...]], spare: set[str]) -> None:
        """Refuse missing, unknown and misshapen tensors; `spare` names ones that may be there unused."""
        missing = [name for name in expected if name not in self.shapes]
        extra = [n for n in self.shapes if n not in expected and n not in spare and not IGNORED.fullmatch(n)]
        wrong = [
            f"{name} {list(self.shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in self.shapes and self.shapes[name] != shape
        ]
        for problem, names in (("lack", missing), ("have unknown", extra), ("have wrongly shaped", wrong)):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                raise ValueError(
                    f"{self.folder}: the weights {problem} tensors: {', '.join(names[:SHOWN])}{more}; they do not fit"
                    " config.json"
                )

    def _open_index(self, index: str) -> None:
        places = read_json(self.folder, index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{self.folder / index}: weight_map must map tensor names to file names")
        for file in sorted(set(places.values())):
            if not _inside(self.folder, file).exists():
                raise ValueError(f"{self.folder / index} names {file}, which is not there: download or copy it again")
            self._open(file)
        absent = [name for name in places if name not in self.shapes]
        if absent:
            raise ValueError(f"{self.folder / index}: {absent[0]} is not in {places[absent[0]]}")

    def _open(self, name: str) -> None:
        file = _inside(self.folder, name)
        if name.endswith(".safetensors"):
            self._open_safetensors(file)
        else:
            self._open_pickle(file)

    def _open_safetensors(self, file: Path) -> None:
        try:
            handle = safe_open(file, framework="pt")
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())
                self.read_from[name] = lambda name=name: self._floating(file, name, _mapped_tensor(file, name))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}): copy it again") from None

    def _open_pickle(self, file: Path) -> None:
        try:
            values = _unpickle(file)
        except (*UNREADABLE, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{file} cannot be read as plain tensors ({reason}); nothing in it was run") from None
        if not isinstance(values, dict):
            raise ValueError(f"{file} holds a {type(values).__name__}, not a dict of tensors")
        kept = None if zipfile.is_zipfile(file) else values  # what cannot be mapped is not read again
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
                raise ValueError(f"{file}: {name} is not a dense tensor")
            if value.untyped_storage().nbytes() < value.nbytes:
                raise ValueError(f"{file}: {name} of shape {list(value.shape)} is larger than its data")
            self.shapes[name] = tuple(value.shape)
            self.read_from[name] = lambda name=name: self._floating(file, name, (kept or _unpickle(file))[name])

    @staticmethod
    def _floating(file: Path, name: str, value: Tensor) -> Tensor:
        if value.dtype not in DTYPES:
            raise ValueError(f"{file}: {name} has dtype {value.dtype}, it must be one of {[str(d) for d in DTYPES]}")
        return value


def _mapped_tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as handle:
        return handle.get_tensor(name)


def _unpickle(file: Path) -> Any:
    """The plain tensors of a pickle, mapped where its format can be."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _inside(folder: Path, name: str) -> Path:
    """The file of that name if it really lies in the folder. A hub cache's links to its own blobs are followed."""
    file = folder / name
    real, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if real.parent not in (home, blobs):
        raise ValueError(f"{folder}: the weights name {name!r}, a file outside the folder; it was not opened")
    return file


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder. FileNotFoundError without it, ValueError for what is wrong with it."""
    file = _inside(folder, name)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {name}: it is not a model folder")
    if file.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than the {JSON_LIMIT} that are read")
    return json_object(file)
