"""Weights in and out, in Hugging Face's layouts: what stock transformers saves we read, what we save it reads.

What    `load_model(folder)` reads CodeGen and released MOSS, GPT-J, Llama, Qwen2 and Qwen3: one `safetensors` file,
        shards with an index, or `pytorch_model.bin` in the same two forms. `save_model(model, folder)` writes
        `model.safetensors` and a `config.json` that `AutoModelForCausalLM` understands.
Why     A checkpoint from outside is material, not program: of the config only known keys count, `auto_map` is never
        looked at, pickles are read as tensors alone, no file outside the folder is opened, and shapes are compared
        before memory is taken. Whatever does not fit is one ValueError that names it.
How     model = load_model("models/Qwen3-0.6B", dtype=torch.bfloat16); save_model(model, "out")
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from moss.files import replacing
from moss.model import Decoder, Head, ModelConfig, rotary_frequencies
from moss.shards import Shards, read_json

LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"attn.{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    **{f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    "blocks": "model.layers",
}
GPTJ_NAMES = {
    "embed": "transformer.wte",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attn_norm": "ln_1",
    **{f"attn.{x}": f"attn.{x}_proj" for x in "qkv"},
    "attn.o": "attn.out_proj",
    "mlp.up": "mlp.fc_in",
    "mlp.down": "mlp.fc_out",
    "blocks": "transformer.h",
}
CODEGEN_NAMES = GPTJ_NAMES | {f"attn.{x}": "attn.qkv_proj" for x in "qkv"}
# CodeGen was trained on TPU cores: the rows of qkv_proj come in four blocks, each with a quarter of the heads as
# queries, values, keys in this order. Released MOSS (model_type "moss") and transformers' CodeGen agree in it.
CODEGEN_BLOCKS = 4
CODEGEN_ORDER = ("attn.q", "attn.v", "attn.k")


@dataclass(frozen=True)
class Layout:
    """How one `model_type` names its tensors and itself."""

    model_type: str  # as we write it
    prefix: str  # of transformers' class names
    names: dict[str, str]


LAYOUTS = {
    "llama": Layout("llama", "Llama", LLAMA_NAMES),
    "qwen2": Layout("qwen2", "Qwen2", LLAMA_NAMES),
    "qwen3": Layout("qwen3", "Qwen3", LLAMA_NAMES),
    "gptj": Layout("gptj", "GPTJ", GPTJ_NAMES),
    "codegen": Layout("codegen", "CodeGen", CODEGEN_NAMES),
    "moss": Layout("codegen", "CodeGen", CODEGEN_NAMES),
}


# ---------------------------------------------------------------- config.json


def read_config(path: str | Path) -> ModelConfig:
    """The config of the model in a folder, or an error that says what about it we do not support."""
    return _read_config(Path(path))[0]


def _read_config(folder: Path) -> tuple[ModelConfig, Layout, Head]:
    data = read_json(folder, "config.json")
    try:
        kind = data.get("model_type")
        if not isinstance(kind, str) or kind not in LAYOUTS:
            raise ValueError(f"model_type is {kind!r}, known are {sorted(LAYOUTS)}")
        if data.get("quantization_config") or data.get("wbits", 32) not in (16, 32):
            raise ValueError("the weights are quantized; load the unquantized checkpoint")
        names = data.get("architectures") or [""]
        scalar = isinstance(names, list) and str(names[0]).endswith("ForSequenceClassification")
        config = _from_gptj(data) if LAYOUTS[kind].names is not LLAMA_NAMES else _from_llama(data, kind)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    return config, LAYOUTS[kind], "scalar" if scalar else "lm"


def _need(data: dict[str, Any], *keys: str) -> list[Any]:
    missing = [key for key in keys if data.get(key) is None]
    if missing:
        raise ValueError(f"lacks {missing}")
    return [data[key] for key in keys]


def _expect(data: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    """Refuse values that would change the computation in a way we do not follow."""
    for key, values in allowed.items():
        if data.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {data[key]!r}, supported is {' or '.join(map(repr, values))}")


def _from_gptj(data: dict[str, Any]) -> ModelConfig:
    """Config of CodeGen, released MOSS and GPT-J."""
    _expect(data, {"activation_function": ("gelu_new",), "tie_word_embeddings": (False,)})
    vocab_size, hidden, layers, heads, rotary = _need(data, "vocab_size", "n_embd", "n_layer", "n_head", "rotary_dim")
    return ModelConfig(
        family="moss",
        vocab_size=vocab_size,
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        ffn=data.get("n_inner") or 0,
        max_length=data.get("n_positions", 2048),
        rotary_dim=rotary,
        norm_eps=data.get("layer_norm_epsilon", 1e-5),
    )


def _from_llama(data: dict[str, Any], kind: str) -> ModelConfig:
    """Config of Llama, Qwen2 and Qwen3."""
    _expect(
        data,
        {
            "hidden_act": ("silu",),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "use_sliding_window": (False, None),
            "partial_rotary_factor": (1.0, None),
        },
    )
    kinds = data.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"layer_types is {kinds!r}, supported is 'full_attention' everywhere")
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vocab_size, hidden, ffn, layers, heads = _need(data, *keys)
    max_length = data.get("max_position_embeddings", 2048 if kind == "llama" else 32_768)
    base, scaling = _rope(data, max_length)
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads") or 0,
        head_dim=data.get("head_dim") or (128 if kind == "qwen3" else 0),  # transformers' own defaults
        ffn=ffn,
        max_length=max_length,
        rope_base=base,
        rope_scaling=scaling,
        norm_eps=data.get("rms_norm_eps", 1e-6),
        tie_embeddings=data.get("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def _rope(data: dict[str, Any], max_length: int) -> tuple[float, dict[str, Any] | None]:
    """Rotary base and scaling, from the keys of transformers 5 (`rope_parameters`) or those before it."""
    values = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(values, dict):
        raise ValueError(f"rope_scaling is {values!r}, it must be an object")
    values = dict(values)
    base = values.pop("rope_theta", None) or data.get("rope_theta") or 10_000.0
    old_name = values.pop("type", None)
    kind = values.pop("rope_type", None) or old_name or "default"
    if values.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor must be 1 in this family")
    if kind == "default":
        return base, None
    values.setdefault("original_max_position_embeddings", max_length)
    return base, {"rope_type": kind, **values}


def _to_json(config: ModelConfig, layout: Layout, head: Head, dtype: torch.dtype, eos: int | None) -> dict[str, Any]:
    """The config.json of a model, with the keys of transformers 4 and 5 where they differ."""
    name = str(dtype).removeprefix("torch.")
    data: dict[str, Any] = {
        "architectures": [layout.prefix + ("ForCausalLM" if head == "lm" else "ForSequenceClassification")],
        "model_type": layout.model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        **{f"{token}_token_id": eos for token in ("bos", "eos", "pad")},
        "dtype": name,
        "torch_dtype": name,
    }
    if head == "scalar":
        data |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    if config.family == "moss":
        return data | {
            "n_positions": config.max_length,
            "n_ctx": config.max_length,
            "n_embd": config.hidden,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.ffn,
            "rotary_dim": config.rotary_dim,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            **{f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")},
        }
    return data | {
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": config.rope_scaling,
        "attention_bias": False,
        "use_sliding_window": False,
    }


# ---------------------------------------------------------------- names and fused tensors


def file_name(own: str, layout: Layout, head: Head) -> str:
    """Our parameter's name -> the tensor's name in a file ('blocks.3.attn.q.weight' -> 'model.layers.3.self_attn…')."""
    if own.startswith("head.") and head == "scalar":
        return "score.weight"
    match = re.fullmatch(r"(?:(blocks)\.(\d+)\.)?(.+)\.(weight|bias)", own)
    assert match is not None, own
    blocks, number, part, kind = match.groups()
    start = f"{layout.names[blocks]}.{number}." if blocks else ""
    return f"{start}{layout.names[part]}.{kind}"


def _fused_part(own: str, layout: Layout) -> int | None:
    """Which third of a fused qkv_proj a parameter of ours is, or None when it has a tensor of its own."""
    if layout.names is not CODEGEN_NAMES:
        return None
    return next((part for part, name in enumerate(CODEGEN_ORDER) if f".{name}." in own), None)


def split_qkv(fused: Tensor, part: int) -> Tensor:
    """Rows of CodeGen's qkv_proj (3D, D) -> the plain projection (D, D) of one part, heads in order."""
    size = fused.shape[1]
    return fused.reshape(CODEGEN_BLOCKS, 3, size // CODEGEN_BLOCKS, size)[:, part].reshape(size, size)


def join_qkv(parts: list[Tensor]) -> Tensor:
    """The inverse: projections (D, D) in `CODEGEN_ORDER` -> qkv_proj (3D, D)."""
    size = parts[0].shape[1]
    blocks = [part.reshape(CODEGEN_BLOCKS, 1, size // CODEGEN_BLOCKS, size) for part in parts]
    return torch.cat(blocks, dim=1).reshape(3 * size, size)


# ---------------------------------------------------------------- reading


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    head: Head | None = None,
) -> Decoder:
    """Read a model from a folder into `dtype` on `device`, a tensor at a time.

    head: None takes the one in the checkpoint; 'scalar' on a language model starts a fresh scalar head of zeros.
    Raises FileNotFoundError without config or weights, ValueError for everything that does not fit.
    """
    model, read = open_model(path, head)
    tensors = {
        name: torch.empty(parameter.shape, dtype=dtype, device=device).copy_(read(name))
        for name, parameter in model.named_parameters()
    }
    model.load_state_dict(tensors, assign=True)
    model.rotary = rotary_frequencies(model.config)[0].to(device)
    return model


def open_model(path: str | Path, head: Head | None = None) -> tuple[Decoder, Callable[[str], Tensor]]:
    """The model of a folder without its weights (on `meta`), and what reads one of its parameters, by our name.

    A parameter comes in the dtype of its file, mapped from there: it must not be changed, and takes memory until it is
    dropped. `head` and errors as in `load_model`.
    """
    folder = Path(path)
    config, layout, stored = _read_config(folder)
    wanted = head or stored
    with torch.device("meta"):
        model = Decoder(config, wanted)
    fresh = {"head.weight"} if wanted == "scalar" and stored == "lm" else set()
    shards = Shards(folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in fresh}
    spare = {"lm_head.weight", "lm_head.bias"} if fresh or config.tie_embeddings else set()
    expected = {
        file_name(own, layout, wanted): shape if _fused_part(own, layout) is None else (3 * shape[0], shape[1])
        for own, shape in shapes.items()
    }
    shards.check(expected, spare)

    def read(own: str) -> Tensor:
        if own in fresh:
            return torch.zeros(1, config.hidden)
        source, part = shards.read(file_name(own, layout, wanted)), _fused_part(own, layout)
        return source if part is None else split_qkv(source, part)

    return model, read


# ---------------------------------------------------------------- writing


def pick_layout(config: ModelConfig, head: Head) -> Layout:
    """The layout of stock transformers that says all of a config."""
    if config.family == "moss":
        # CodeGen's fused rows need heads in fours, and transformers has no CodeGen with a scalar head; GPT-J is the
        # same computation with plain projections.
        return LAYOUTS["gptj" if head == "scalar" or config.num_heads % CODEGEN_BLOCKS else "codegen"]
    return LAYOUTS["qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"]


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    eos: int | None = None,
) -> None:
    """Write `model.safetensors` and `config.json` into a folder, each complete or not at all.

    model may be compiled; dtype None keeps the weights' own; layout 'gptj' writes family moss with plain projections
    (for servers that know GPT-J only); eos is the end-of-text id that stock `generate` stops at.
    """
    decoder = getattr(model, "_orig_mod", model)
    assert isinstance(decoder, Decoder)
    config, head = decoder.config, decoder.head_kind
    chosen = pick_layout(config, head)
    if layout is not None and layout != chosen.model_type:
        if layout != "gptj" or config.family != "moss":
            raise ValueError(f"layout {layout!r} does not fit this model; it is saved as {chosen.model_type!r}")
        chosen = LAYOUTS[layout]
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_to_file(decoder, chosen, dtype))
    with replacing(folder / "model.safetensors") as file:
        try:
            save_file(tensors, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / 'model.safetensors'}: {error}") from None
    stored = dtype or decoder.embed.weight.dtype
    text = json.dumps(_to_json(config, chosen, head, stored, eos), indent=2, ensure_ascii=False)
    with replacing(folder / "config.json") as file:
        file.write_text(text + "\n", encoding="utf-8")


def _to_file(decoder: Decoder, layout: Layout, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as they stand in the file, on the CPU."""
    parameters = dict(decoder.named_parameters())
    for own, parameter in parameters.items():
        part, value = _fused_part(own, layout), parameter.detach()
        if part is not None:
            if part != 0:
                continue  # written with its query
            names = [own.replace(".attn.q.", f".{name}.") for name in CODEGEN_ORDER]
            value = join_qkv([parameters[name].detach() for name in names])
        yield file_name(own, layout, decoder.head_kind), value.to("cpu", dtype or value.dtype).contiguous()
