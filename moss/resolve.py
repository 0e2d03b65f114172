"""From what a user writes after `--model`, `--dtype` and `--device` to a model and its tokenizer that fit each other.

    model, tok = load()                             # the bundled moss-nano, found through the package's data
    model, tok = load("out/nano")                   # a folder: one that we trained, or any in the Hugging Face layout
    model, tok = load("models/7B", dtype="int8")    # quantized on the way in
    model, tok = load("runs/sft/adapter")           # an adapter, on the base that it names

Whatever is missing, broken or does not fit is a ValueError of one line that says which file and what to do.
"""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from moss.chat import QUALITIES
from moss.checkpoint import FORMAT, check_weights
from moss.engine.quant import WIDTHS, QuantLinear, load_quantized, quantize_
from moss.files import json_object
from moss.lora import view
from moss.model import Decoder, ModelConfig, num_parameters
from moss.peft import base_folder, is_adapter, load_adapted, spec_of, tokenizer_of
from moss.tokenizer import Tokenizer, require_markers
from moss.weights import load_model, read_config

Dtype = Literal["auto", "float32", "bfloat16", "int8", "int4"]
Device = Literal["auto", "cpu", "cuda"]

SMALL = 64_000_000  # parameters of a model that a CPU reads in 20 ms a token even as float32: no need for anything else
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.54}  # a weight, its share of the scales included
FILL = 0.85  # share of the free memory that weights may take; the cache and the work on a prompt need the rest


def load(
    model: str | Path | None = None, *, dtype: Dtype = "auto", device: Device = "auto", chat: bool = True
) -> tuple[Decoder, Tokenizer]:
    """The model in a folder (None: the bundled one) with its tokenizer; for `auto` see `choose`.

    An adapter that was trained over integers stays beside them; over floats, or where `dtype` asks for these, base and
    adapter become one model.
    ValueError where there is no model, a file is broken (weights of more than a gigabyte are not read for that alone,
    see `checkpoint.check_weights`), the tokenizer is another model's, or lacks the markers of the chat format, which
    only a model needs that is to `chat`.
    """
    folder = locate(model)
    tok = tokenizer_of(folder)
    if chat:
        require_markers(tok)
    _check_record(folder, tok)
    return _of_text(_load(folder, tok, dtype, device), folder), tok


def _load(folder: Path, tok: Tokenizer, dtype: Dtype, device: Device) -> Decoder:
    """The model in a folder, as it is."""
    if is_adapter(folder):
        return _load_adapted(folder, dtype, device)
    config = read_config(folder)
    if tok.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tok.vocab_size} ids but the model only {config.vocab_size}; "
            "this is another model's tokenizer.json, copy the one that belongs to the weights"
        )
    width, place = choose(config, dtype, device)
    if width in WIDTHS:
        return load_quantized(folder, width, place)
    return load_model(folder, dtype=getattr(torch, width), device=place)


def _of_text(model: Decoder, folder: Path) -> Decoder:
    """The model, refused where it gives scores and no text."""
    if model.head_kind != "lm":
        raise ValueError(f"{folder} holds a preference model, which scores replies and writes none; give another")
    return model


def _load_adapted(folder: Path, dtype: Dtype, device: Device) -> Decoder:
    """The model that an adapter and its base are."""
    own = spec_of(folder).base
    if own and dtype in WIDTHS and dtype != own:
        raise ValueError(f"{folder} was trained over {own}, as {dtype} it would be another model; leave dtype out")
    width, place = choose(read_config(base_folder(folder)), own if own and dtype == "auto" else dtype, device)
    if own and width == own:
        floats = getattr(torch, _widths(place, small=False)[0])
        return view(load_adapted(folder, dtype=floats, device=place).to(floats), live=True)
    if width not in WIDTHS:
        return load_adapted(folder, dtype=getattr(torch, width), device=place, merged=True)
    return quantize_(load_adapted(folder, dtype=torch.bfloat16, device="cpu"), width).to(place)


def choose(config: ModelConfig, dtype: Dtype = "auto", device: Device = "auto") -> tuple[str, str]:
    """What `auto` means for a model on this machine: (dtype, device). What the user names stays as named.

    A small model runs as float32 on the CPU, where a GPU would only add waiting. A larger one runs on the GPU, in the
    finest of bfloat16, int8 and int4 that fits its free memory; else on the CPU, again in the finest that fits, with
    float32 before them where the CPU is slow in bfloat16. ValueError where there is no such device, or nothing that is
    left open fits.
    """
    for name, value, known in (("dtype", dtype, get_args(Dtype)), ("device", device, get_args(Device))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise ValueError("PyTorch finds no CUDA GPU here; choose the device cpu, or install PyTorch's build for CUDA")
    small = num_parameters(config) <= SMALL
    places = [device] if device != "auto" else ["cuda", "cpu"] if gpu and not small else ["cpu"]
    tried = [(width, place) for place in places for width in ([dtype] if dtype != "auto" else _widths(place, small))]
    for width, place in tried:
        if num_bytes(config, width) <= FILL * free_memory(place):
            return width, place
    width, place = tried[-1]
    if dtype == "auto":
        needed, free = num_bytes(config, width) / 1e9, free_memory(place) / 1e9
        raise ValueError(
            f"the weights take {needed:.1f} GB as {width}, and {free:.1f} GB of memory are free on the {place}; "
            f"close other programs, or name the dtype to try all the same"
        )
    return width, place


def _widths(place: str, small: bool) -> tuple[str, ...]:
    """The dtypes that `auto` takes on a device, the best first."""
    if small:
        return ("float32",)
    if place == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "int8", "int4") if fast else ("float32",)
    # Without AVX-512 torch's matrix product crawls in bfloat16, and so would the reading of a prompt.
    slow = torch.backends.cpu.get_cpu_capability() != "AVX512"
    return (*(["float32"] if slow else []), "bfloat16", *WIDTHS)


def num_bytes(config: ModelConfig, dtype: str) -> float:
    """The memory of a model's weights in a dtype; where it is quantized, the embedding stays as bfloat16 beside it."""
    total, table = num_parameters(config), config.vocab_size * config.hidden
    if dtype not in WIDTHS:
        return total * BYTES[dtype]
    linear = total if config.tie_embeddings else total - table  # a tied head becomes a matrix of its own
    return linear * BYTES[dtype] + table * BYTES["bfloat16"]


def free_memory(device: str) -> float:
    """Bytes that a process could take now: of the device, or of the machine and of the control group it runs in;
    infinite where the system does not tell."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    free = next((int(line.split()[1]) * 1024.0 for line in told if line.startswith("MemAvailable")), math.inf)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdecimal():
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    return free


def dtype_of(model: Decoder) -> str:
    """The dtype of a loaded model's weights, by the names that `load` takes."""
    quantized = next((module.width for module in model.modules() if isinstance(module, QuantLinear)), None)
    return quantized or str(model.embed.weight.dtype).removeprefix("torch.")


def locate(model: str | Path | None = None) -> Path:
    """The folder of a model; None is the bundled one."""
    if model is None:
        folder = Path(str(resources.files("moss"))) / "models" / "nano"
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"no model is bundled in {folder}; make one with `make nano` and give --model out/nano/sft"
            )
        return folder
    if on_server(model):
        raise ValueError(f"{model} is on a server, and its weights are needed here: give a folder on this disk")
    folder = Path(model)
    if not folder.exists():
        raise ValueError(f"there is no model folder {str(model)!r}; give one with config.json, or none for the bundled")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder that holds it")
    if not holds_model(folder):
        raise ValueError(
            f"{folder} holds no config.json; {beside(folder) or 'a model folder holds config.json and its weights'}"
        )
    return folder


def holds_model(folder: Path) -> bool:
    """Whether a model stands in this folder, or an adapter with the name of its base."""
    return (folder / "config.json").is_file() or is_adapter(folder)


def beside(folder: Path) -> str:
    """What to say where a run's folder was given, whose model is within: its adapter, or its last checkpoint."""
    steps = sorted(step for step in folder.glob("step-*") if holds_model(step))
    found = [each for each in (folder / "adapter", *reversed(steps)) if holds_model(each)]
    return f"did you mean {found[0]}?" if found else ""


def on_server(model: str | Path) -> bool:
    """Whether this is the address of a model on a server, `http://host:port/v1#name`."""
    return "://" in str(model)


def stage(model: str | Path | None = None) -> str | None:
    """The training stage that made a model of ours, such as `pretrain` or `sft`; None for one from elsewhere."""
    return None if model is not None and on_server(model) else _record(locate(model)).get("stage")


def quality(model: str | Path | None = None, wanted: int | None = None) -> int | None:
    """The preference tag that opens a model's replies: what the user wants, else the best for a model of
    `moss train pat`, which is made to be asked for it (section 7.2 of the paper), and none for any other."""
    return QUALITIES[-1] if wanted is None and stage(model) == "pat" else wanted


def _check_record(folder: Path, tok: Tokenizer) -> None:
    """A model that we trained says which tokenizer and weights are its own; others would give nonsense."""
    record = _record(folder)
    expected = record.get("tokenizer_sha256")
    if expected is not None and expected != tok.sha256:
        raise ValueError(
            f"{folder}: tokenizer.json is not the one this model was trained with (sha256 {tok.sha256[:12]}, "
            f"not {str(expected)[:12]}); copy the one that belongs to the weights"
        )
    check_weights(folder, record)


def _record(folder: Path) -> dict[str, Any]:
    """What training wrote down beside a model of ours; empty for one from elsewhere."""
    path = folder / "moss.json"
    record = json_object(path) if path.is_file() else {}
    if record.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}; use the version of moss that wrote it")
    return record
