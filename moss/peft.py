"""Adapters in and out, in the layout of Hugging Face's PEFT: what it saves we read, what we save it reads.

What    `save(model, folder, spec, base)` writes `adapter_model.safetensors` and `adapter_config.json`: A and B of every
        adapted layer, the learnt rows of the table, a scalar head. `load(model, folder)` puts them into a base.
        `load_adapted(folder)` finds the base itself: an adapter's folder is a model.
Why     An adapter (of Qwen3-0.6B at r 16: 40 MB) is all that a run has to keep, and can share; what takes adapters at
        all takes this layout.
How     spec = parse("16"); inject(model, spec); …; save(model, "run", spec, base="models/Qwen3-0.6B")
        load(load_model("models/Qwen3-0.6B"), "run", "models/Qwen3-0.6B")

Names are those of the base's layout in Hugging Face's files. Family moss goes by GPT-J's: CodeGen's fused qkv_proj has
no place for three adapters, so PEFT reads such an adapter over a base that was saved with `layout="gptj"` (and, where
rows were learnt, drops the head's bias until it has merged them: seen in 0.21.2). PEFT wants the new tokens' rows to be
there: `resize_token_embeddings` comes first where the base has no spare ones. An adapter from outside is material, not
program: tensors and known keys count, what we do not compute is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moss.engine.quant import WIDTHS
from moss.files import replacing, sha256
from moss.grow import grow
from moss.lora import TARGETS, LearntRows, LoRALinear, Spec, inject, linears, load_base, merge, merge_rows
from moss.model import Decoder, Head
from moss.shards import SHOWN, read_json
from moss.tokenizer import Tokenizer
from moss.weights import LAYOUTS, file_name, pick_layout, read_config

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SAMPLES, SAMPLE = 64, 4096  # places of a weights file that tell it from another, and bytes read at each
# What PEFT may say of an adapter without changing what it computes; the first value stands for a missing key.
KNOWN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    **dict.fromkeys(("layer_replication", "target_parameters", "alora_invocation_tokens"), (None, [])),
}


def save(model: Decoder, folder: str | Path, spec: Spec, base: str | Path = "") -> None:
    """Write what an adapted model has beside its base, each file whole or not at all.

    base: folder or hub id of the base; of a folder, a fingerprint is kept with the adapter.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in tensors_of(model).items()}
    rows: list[int] = []
    if isinstance(model.embed, LearntRows):
        rows = list(range(model.embed.first, model.embed.first + len(model.embed.rows)))
    scalar = model.head_kind == "scalar"
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": spec.r,
        "lora_alpha": int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,
        "target_modules": sorted(layers_with(".lora_A.", tensors)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": ["score"] if scalar else None,
        "trainable_token_indices": dict.fromkeys(sorted(layers_with(".token_adapter.", tensors)), rows) or None,
    }
    # One key, for safetensors writes several in any order, and equal adapters are to be equal files.
    metadata = {"moss": json.dumps({"base": fingerprint(base) if base else "", "width": spec.base})}
    with replacing(folder / WEIGHTS) as file:
        try:
            save_file(tensors, file, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from None
    with replacing(folder / CONFIG) as file:
        file.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(
    model: Decoder,
    folder: str | Path,
    base: str | Path = "",
    *,
    width: str | None = None,
    rows: range = range(0),
) -> Spec:
    """Put an adapter into its base, ready to be trained on or merged, and give its spec.

    base: the folder that `model` is from; when the adapter is known to be another's it is refused. width: what the
    base becomes (int8, int4, "": as it is); None: what it was in training. rows: those to learn next to the adapter's.
    A language model's adapter under a scalar head leaves that as it is. ValueError says what does not fit.
    """
    folder = Path(folder)
    config, file = read_json(folder, CONFIG), folder / WEIGHTS
    for key, allowed in KNOWN.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{folder / CONFIG}: {key} is {config[key]!r}, supported is {allowed[0]!r}")
    tensors, told = _read(file)
    if base and told.get("base") and fingerprint(base) not in ("", told["base"]):
        named = config.get("base_model_name_or_path")
        raise ValueError(f"{folder} is an adapter of {named}, whose weights are not those of {base}; give its own base")
    spec = _spec_of(model, config, tensors, told.get("width", "") if width is None else width, file)
    held = _rows_of(config, folder / CONFIG)
    if held and rows.stop > held.stop != rows.start:
        raise ValueError(f"{folder} has learnt the rows {held}, the new ones are {rows}; they must be neighbours")
    inject(model, spec, rows=range(held.start, max(held.stop, rows.stop)) if held else rows)
    mine = {name: value.detach() for name, value in tensors_of(model).items()}
    mine |= {name: value[: len(held)] for name, value in mine.items() if ".token_adapter." in name}
    mine = {name: value for name, value in mine.items() if len(value)}
    if model.head_kind == "scalar" and not _has_score(tensors):
        mine = {name: value for name, value in mine.items() if not _has_score([name])}
        tensors = {name: value for name, value in tensors.items() if ".lm_head." not in name}
    wrong = [f"no {name}" for name in mine if name not in tensors] + [f"unknown {n}" for n in tensors if n not in mine]
    for name in mine.keys() & tensors.keys():
        if tensors[name].shape != mine[name].shape:
            wrong.append(f"{name} {list(tensors[name].shape)} instead of {list(mine[name].shape)}")
    if wrong:
        raise ValueError(f"{file} does not fit this model: {', '.join(sorted(wrong)[:SHOWN])}")
    for name, value in mine.items():
        value.copy_(tensors[name])
    return spec


# ---------------------------------------------------------------- an adapter's folder as a model


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in the place of a model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_folder(folder: Path) -> Path:
    """The model that an adapter was trained on; any other folder itself."""
    if not is_adapter(folder):
        return folder
    base = Path(str(read_json(folder, CONFIG).get("base_model_name_or_path")))
    if not (base / "config.json").is_file():
        raise ValueError(f"{folder / CONFIG} names the base {base}, which is not there; write down where it is now")
    return base


def weights_sha256(folder: Path) -> str:
    """What tells the model in `folder` from any other: the SHA-256 of its weights, an adapter's with its base's."""
    files = [file for suffix in ("safetensors", "bin") for file in sorted(folder.glob(f"*.{suffix}"))]
    found = [sha256(file) for file in files] + ([weights_sha256(base_folder(folder))] if is_adapter(folder) else [])
    if not files:
        raise ValueError(f"{folder} holds no weights; copy its .safetensors or .bin files there")
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer of a model or of an adapter, which may have brought none of its own."""
    return Tokenizer.load(folder if (folder / "tokenizer.json").is_file() else base_folder(folder))


def spec_of(folder: Path) -> Spec:
    """What the adapter in a folder is."""
    tensors, told = _read(folder / WEIGHTS)
    model = _without_weights(folder)
    return _spec_of(model, read_json(folder, CONFIG), tensors, told.get("width", ""), folder / WEIGHTS)


def is_of(folder: Path, wanted: Spec) -> bool:
    """Whether the adapter in a folder is what `wanted` says."""
    known = {target for _, target, _ in linears(_without_weights(folder))}
    return spec_of(folder) == replace(wanted, targets=wanted.targets or tuple(t for t in TARGETS if t in known))


def _without_weights(folder: Path) -> Decoder:
    """The base of an adapter, on `meta`."""
    with torch.device("meta"):
        return Decoder(read_config(base_folder(folder)))


def load_base_of(
    folder: Path, spec: Spec, *, dtype: torch.dtype, device: str | torch.device, head: Head | None = None
) -> Decoder:
    """The model of a folder as `spec` has it; of an adapter's its base, with a row for each id of its tokenizer."""
    base = base_folder(folder)
    model = load_base(base, spec, dtype=dtype, device=device, head=head)
    return model if base == folder else grow(model, Tokenizer.load(base), tokenizer_of(folder))


def load_adapted(folder: Path, *, dtype: torch.dtype, device: str | torch.device, merged: bool = False) -> Decoder:
    """An adapter on its base, frozen: integers as in training unless `merged`, one plain model where there are none."""
    spec, head = spec_of(folder), "scalar" if _has_score(_read(folder / WEIGHTS)[0]) else "lm"
    model = load_base_of(folder, spec, dtype=dtype, device=device, head=head)
    load(model, folder, base_folder(folder))
    if merged or not spec.base:
        merge(model)
    else:
        merge_rows(model)
    return model.requires_grad_(False)


def _has_score(tensors: Iterable[str]) -> bool:
    return any(name.endswith(".score.weight") for name in tensors)


# ---------------------------------------------------------------- names


def tensors_of(model: Decoder) -> dict[str, nn.Parameter]:
    """All that an adapted model has beside its base, by the names that PEFT gives it."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and module.A is not None and module.B is not None:
            stem = _stem(model, name)
            found |= {f"{stem}.lora_A.weight": module.A, f"{stem}.lora_B.weight": module.B}
        elif isinstance(module, LearntRows) and not any(module.rows is other for other in found.values()):
            found[f"{_stem(model, name)}.token_adapter.trainable_tokens_delta"] = module.rows
    if model.head_kind == "scalar" and model.head is not None:
        found[f"{_stem(model, 'head')}.weight"] = cast(nn.Parameter, model.head.weight)
    return found


def layers_with(part: str, tensors: Iterable[str]) -> set[str]:
    """The last names of the layers that have such a tensor: '….self_attn.q_proj.lora_A.weight' -> 'q_proj'."""
    return {name.partition(part)[0].rpartition(".")[2] for name in tensors if part in name}


def _stem(model: Decoder, layer: str) -> str:
    """Our layer's name -> PEFT's: 'blocks.0.attn.q' -> 'base_model.model.model.layers.0.self_attn.q_proj'."""
    moss, head = model.config.family == "moss", model.head_kind
    layout = LAYOUTS["gptj"] if moss else pick_layout(model.config, head)
    return "base_model.model." + file_name(f"{layer}.weight", layout, head).removesuffix(".weight")


def fingerprint(folder: str | Path) -> str:
    """Samples of a model's weights as one sha256: other weights, and the same ones after training, have another.

    "" where there is no such folder.
    """
    digest, folder = hashlib.sha256(), Path(folder)
    for file in sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size = file.stat().st_size
        with file.open("rb") as opened:
            for place in range(SAMPLES):
                opened.seek(size * place // SAMPLES)
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest() if folder.is_dir() else ""


def base_of(folder: str | Path) -> str:
    """The fingerprint of the base that an adapter of ours was trained on; "" where it says nothing."""
    return str(_read(Path(folder) / WEIGHTS)[1].get("base", ""))


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a safetensors file, and what `save` noted beside them."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; adapters are read from this file alone, never from a pickle")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            told = json.loads((opened.metadata() or {}).get("moss", "{}"))
            return tensors, told if isinstance(told, dict) else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): copy it again") from None


def _spec_of(model: Decoder, config: dict[str, Any], tensors: dict[str, Tensor], width: str, file: Path) -> Spec:
    """Where an adapter sits is told by its tensors: PEFT's target_modules may be a pattern."""
    places = {_stem(model, name).rpartition(".")[2]: target for name, target, _ in linears(model)}
    used = layers_with(".lora_", tensors)
    if not used or not used <= set(places):
        raise ValueError(f"{file} adapts {sorted(used)}; this model has {sorted(places)}")
    r, alpha = config.get("r"), config.get("lora_alpha")
    ranks = {len(value) if value.dim() else 0 for name, value in tensors.items() if ".lora_A." in name}
    if ranks != {r} or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(
            f"{file}: A has {sorted(ranks)} rows where adapter_config.json has r {r!r}, lora_alpha {alpha!r}"
        )
    if width not in ("", *WIDTHS):
        raise ValueError(f"{file}: width is {width!r}, it must be one of {', '.join(WIDTHS)}, or empty")
    targets = tuple(target for target in TARGETS if target in {places[name] for name in used})
    return Spec(*ranks, float(alpha), targets, width)  # type: ignore[arg-type]


def _rows_of(config: dict[str, Any], file: Path) -> range:
    """The table rows that an adapter learnt: PEFT has a list of them, or one for each layer."""
    told = config.get("trainable_token_indices") or []
    lists = list(told.values()) if isinstance(told, dict) else [told]
    rows = lists[0]
    if not rows:
        return range(0)
    if isinstance(rows, list) and isinstance(rows[0], int) and all(each == rows for each in lists):
        learnt = range(rows[0], rows[0] + len(rows))
        if rows == list(learnt):
            return learnt
    raise ValueError(f"{file}: trainable_token_indices is {str(told)[:80]}; supported are neighbours, in every layer")
