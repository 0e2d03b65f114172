"""One decoder for two families of language models, picked by its config and not by its class.

What    `ModelConfig` (every size and switch) and `Decoder` (ids in, logits or scores out). Family *moss* is
        CodeGen and GPT-J: LayerNorm, attention and MLP side by side on one norm, rotary on the first part of
        each head with neighbouring pairs, gelu_new, biases in MLP and head. Family *llama* is RMSNorm, SwiGLU,
        grouped-query attention, full rotary with its scalings; `qkv_bias` makes it Qwen2, `qk_norm` Qwen3.
Why     Every stage, from a nano on a laptop to 16B on GPUs, trains, aligns and serves this one file.
How     model = Decoder(ModelConfig.from_depth(4, vocab_size=4096)); logits = model(ids)

Letters in shapes: B rows, T tokens given now, S tokens that can be attended to, D hidden size, H heads,
G key/value heads, E head_dim, R rotary_dim, V vocabulary. The projections of queries, keys and values stay
apart: one fused matrix measured no faster, and Muon, LoRA and every checkpoint layout want them apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moss.attention import Documents, document_attention, packed_mask, pick

Head = Literal["lm", "scalar"]
Mask = Tensor | Documents | None  # bool (B, 1, T, S); a row of documents; None: causal

# Upper bounds of what a config may ask for: far above any model of these families, low enough that a hostile
# config is refused before anything is built.
LIMITS = {
    "vocab_size": 4_194_304,
    "num_layers": 512,
    "hidden": 65_536,
    "num_heads": 1_024,
    "num_kv_heads": 1_024,
    "head_dim": 4_096,
    "ffn": 524_288,
    "max_length": 16_777_216,
    "rotary_dim": 4_096,
}
# Keys that each kind of rotary scaling must have and may have, as in Hugging Face's `rope_scaling`.
SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def _is_number(value: object) -> bool:
    """A positive number that float32 can hold and that some model might mean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


@dataclass(frozen=True)
class ModelConfig:
    """All that shapes a model. A 0 in a size means: derive it (see `__post_init__`)."""

    vocab_size: int
    num_layers: int
    hidden: int
    num_heads: int
    family: str = "llama"  # or "moss"
    num_kv_heads: int = 0  # 0: as many as num_heads
    head_dim: int = 0  # 0: hidden / num_heads
    ffn: int = 0  # 0: 4 x hidden for moss, 8/3 x hidden to a multiple of 64 for llama
    max_length: int = 2048
    rope_base: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": "llama3" | "yarn", ...}
    rotary_dim: int = 0  # 0: the whole head
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        derived = {
            "num_kv_heads": lambda: self.num_heads,
            "head_dim": lambda: self.hidden // self.num_heads,
            "ffn": lambda: 4 * self.hidden if self.family == "moss" else max(64, round(self.hidden / 24) * 64),
            "rotary_dim": lambda: self.head_dim,
        }
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if value == 0 and name in derived:
                value = derived[name]()
                object.__setattr__(self, name, value)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise ValueError(f"model config: {name} is {value!r}, it must be a whole number from 1 to {limit}")
        self._check()

    def _check(self) -> None:
        """Refuse combinations that no model of the two families has."""
        if self.family not in ("llama", "moss"):
            raise ValueError(f"model config: family is {self.family!r}, it must be 'llama' or 'moss'")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model config: num_heads {self.num_heads} is not a multiple of {self.num_kv_heads=}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"model config: rotary_dim {self.rotary_dim} must be even and at most {self.head_dim=}")
        for name in ("rope_base", "norm_eps"):
            value = getattr(self, name)
            if not _is_number(value):
                raise ValueError(f"model config: {name} is {value!r}, it must be a positive number")
        for name in ("tie_embeddings", "qkv_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"model config: {name} is {getattr(self, name)!r}, it must be true or false")
        if self.rope_base <= 1:
            raise ValueError(f"model config: rope_base is {self.rope_base}, it must be above 1")
        if self.rope_scaling is not None:
            check_scaling(self.rope_scaling)
        if self.family == "moss":
            if self.num_kv_heads * self.head_dim != self.hidden:
                raise ValueError(f"model config: moss needs {self.hidden=} equal to heads x head_dim, all heads alike")
            if self.tie_embeddings or self.qkv_bias or self.qk_norm or self.rope_scaling or self.rope_base != 10_000:
                raise ValueError(
                    "model config: moss has no tie_embeddings, qkv_bias, qk_norm or rope_scaling, and rope_base 10000"
                )
        elif self.rotary_dim != self.head_dim:
            raise ValueError(f"model config: llama rotates whole heads, so rotary_dim must be {self.head_dim}")
        elif self.qkv_bias and self.qk_norm:
            raise ValueError("model config: set qkv_bias (Qwen2) or qk_norm (Qwen3), no known model has both")

    @property
    def head_bias(self) -> bool:
        """Whether the language-model head has a bias: in family moss it always does."""
        return self.family == "moss"

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, max_length: int = 1024, **values: Any) -> ModelConfig:
        """The one dial for models of our own (llama family in Qwen3's layout); `values` sets any field by hand."""
        derived: dict[str, Any] = {"num_layers": depth, "hidden": 64 * depth, "num_heads": depth, "head_dim": 64}
        derived |= {"tie_embeddings": True, "qk_norm": True}
        return cls(vocab_size=vocab_size, max_length=max_length, **(derived | values))

    def to_json(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any] | str) -> ModelConfig:
        """Read what `to_json` gave (a dict or its JSON text); an unknown key is an error."""
        values = json.loads(data) if isinstance(data, str) else data
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"model config: unknown keys {unknown}; known are {[f.name for f in fields(cls)]}")
        return cls(**values)


class Cache(Protocol):
    """What a key/value cache offers to the decoder. Positions are given by the caller, not by the cache."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take k and v (B, G, T, E) of the new tokens; give all of them so far, (B, G, S, E) each."""
        ...

    def mask(self, length: int) -> Tensor | None:
        """Which of the S tokens each of the `length` new ones may attend to: bool (B, 1, T, S).

        None where there are no others and each attends to those before it and itself.
        """
        ...


# ---------------------------------------------------------------- rotary


def check_scaling(scaling: dict[str, Any]) -> None:
    """Refuse a rotary scaling that `rotary_frequencies` would misread."""
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_scaling: rope_type is {kind!r}, known are {sorted(SCALINGS)}")
    needed, optional = SCALINGS[kind]
    keys = set(scaling) - {"rope_type"}
    if needed - keys or keys - needed - optional:
        raise ValueError(
            f"rope_scaling {kind} has {sorted(keys)}; needed: {sorted(needed)}, optional: {sorted(optional)}"
        )
    for key, value in scaling.items():
        allowed = _is_number(value) or (value is None and key in optional)
        if key not in ("rope_type", "truncate") and not allowed:
            raise ValueError(f"rope_scaling {kind}: {key} is {value!r}, it must be a positive number")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"rope_scaling llama3: low_freq_factor must be below high_freq_factor, got {scaling}")


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, float32 (R/2,), and the factor on cosine and sine (1 but for yarn)."""
    steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu") / config.rotary_dim
    plain = 1.0 / config.rope_base**steps
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    return (_llama3 if scaling["rope_type"] == "llama3" else _yarn)(plain, config, scaling)


def _llama3(plain: Tensor, config: ModelConfig, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """Llama 3.1: slow pairs are slowed by `factor`, fast ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # in the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (keep + (1 - keep) / scaling["factor"]), 1.0


def _yarn(plain: Tensor, config: ModelConfig, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3.2 and 3.4): blend by the number of turns, and warm the softmax."""
    dim, factor = config.rotary_dim, scaling["factor"]
    original = scaling["original_max_position_embeddings"]

    def pair_with(turns: float) -> float:  # index of the pair that makes so many turns in the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low, high = pair_with(scaling.get("beta_fast") or 32), pair_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = ((torch.arange(dim // 2, device=plain.device) - low) / max(high - low, 0.001)).clamp(0, 1)

    def warmth(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = warmth(m) / warmth(m_all) if m and m_all else warmth(1.0)
    return plain * (slow / factor + 1 - slow), float(attention)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbours (0,1), (2,3)… of the first R of x (B, T, H, E); cos, sin (B, T, 1, R/2). Family moss."""
    size = 2 * cos.shape[-1]
    a, b = x[..., 0:size:2], x[..., 1:size:2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension i with i + E/2 of x (B, T, H, E); cos, sin (B, T, 1, E/2). Family llama."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 or better that gives back its input's dtype, also under autocast."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(exact), self.weight.shape, self.weight.to(exact), self.eps).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of the residual stream, by family."""
    return (nn.LayerNorm if config.family == "moss" else RMSNorm)(config.hidden, config.norm_eps)


class Attention(nn.Module):
    """Causal self-attention. Scores and softmax are float32 inside `scaled_dot_product_attention` in every dtype; in
    `document_attention`, for packed rows on a CPU, scores are rounded to the dtype before."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.grouped = config.num_kv_heads != config.num_heads
        self.rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
        self.rotate = rotate_pairs if config.family == "moss" else rotate_halves
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.hidden, queries, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden, keys, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden, keys, bias=config.qkv_bias)
        self.o = nn.Linear(queries, config.hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        cache: Cache | None,
        only: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), or (1, P, D) of the P tokens `only`."""
        batch, length, _ = x.shape
        q, k, v = (proj(x).view(batch, length, -1, self.head_dim) for proj in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, *rotary).transpose(1, 2), self.rotate(k, *rotary).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if isinstance(mask, Documents):
            y = document_attention(q[0], k[0], v[0], mask)[None]
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        y = y.transpose(1, 2).reshape(batch, length, -1)
        return self.o(y if only is None else pick(y, only))


class MLP(nn.Module):
    """SwiGLU without biases (llama) or gelu_new with biases (moss)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moss = config.family == "moss"
        self.gate = None if moss else nn.Linear(config.hidden, config.ffn, bias=False)
        self.up = nn.Linear(config.hidden, config.ffn, bias=moss)
        self.down = nn.Linear(config.ffn, config.hidden, bias=moss)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer. In family moss there is one norm, and attention and MLP both read it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = None if config.family == "moss" else make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        cache: Cache | None,
        only: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), or (1, P, D) of the P tokens `only`: every token is a key, but only those go on."""
        normed = self.attn_norm(x)
        attended = self.attn(normed, rotary, mask, cache, only)
        if only is not None:
            x, normed = pick(x, only), normed if self.mlp_norm is not None else pick(normed, only)
        if self.mlp_norm is None:
            return x + attended + self.mlp(normed)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """The model, with head 'lm' (logits over the vocabulary) or 'scalar' (a score a token, for rewards and values)."""

    rotary: Tensor  # (R/2,) float32, see _apply

    def __init__(self, config: ModelConfig, head: Head = "lm") -> None:
        super().__init__()
        if head not in ("lm", "scalar"):
            raise ValueError(f"head is {head!r}, it must be 'lm' or 'scalar'")
        self.config = config
        self.head_kind: Head = head
        self.embed = nn.Embedding(
            config.vocab_size, config.hidden, _weight=torch.empty(config.vocab_size, config.hidden)
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        self.head: nn.Linear | None = None  # tied embeddings need none
        if head == "scalar":
            self.head = nn.Linear(config.hidden, 1, bias=False)
        elif not config.tie_embeddings:
            self.head = nn.Linear(config.hidden, config.vocab_size, bias=config.head_bias)
        frequencies, self.rotary_factor = rotary_frequencies(config)
        self.register_buffer("rotary", frequencies.to(self.embed.weight.device), persistent=False)
        if not self.embed.weight.is_meta:
            self.init_weights(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Every move (`to`, `bfloat16`, `to_empty` from meta) ends here: the rotary angles stay float32 and real."""
        super()._apply(fn, recurse)
        self.rotary = rotary_frequencies(self.config)[0].to(self.embed.weight.device)
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fresh weights: what writes to the residual stream starts at zero, so each block starts as the identity."""
        generator = torch.Generator(device=self.embed.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif parameter.ndim < 2 or name.endswith((".o.weight", ".down.weight")) or parameter.shape[0] == 1:
                parameter.zero_()  # biases, residual outputs, the scalar head
            elif name in ("embed.weight", "head.weight"):
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """ids (B, T) -> hidden states after the final norm (B, T, D). Arguments as in `forward`.

        places (P,) asks for those of the flattened rows alone, (P, D); distinct, and with segments none of padding.
        """
        length = ids.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"{length} tokens are more than the model's max_length {self.config.max_length}")
        if cache is not None and (positions is None or segments is not None):
            raise ValueError("with a cache give positions (B, T), and no segments")
        if positions is None:
            positions = torch.arange(length, device=ids.device)[None]
        if segments is not None and ids.device.type == "cpu" and not torch.compiler.is_compiling():
            documents = Documents.of(segments, self.embed.weight.dtype)
            return self._hidden_of_documents(ids, positions.expand_as(ids), documents, places)
        mask = None
        if cache is not None:
            mask = cache.mask(length)
        elif segments is not None:
            mask = packed_mask(segments)
        x = self._through(ids, positions, mask, cache)
        return x if places is None else x.flatten(0, 1)[places]

    def _hidden_of_documents(
        self, ids: Tensor, positions: Tensor, documents: Documents, places: Tensor | None
    ) -> Tensor:
        """`hidden` of packed rows: nothing is computed for padding, where it gives zeros."""
        ids_there, positions_there = (x.flatten()[None, documents.places] for x in (ids, positions))
        only = None if places is None else documents.find(places)
        x = self._through(ids_there, positions_there, documents, None, only)[0]
        if places is not None:
            return x
        return x.new_zeros(ids.numel(), x.shape[1]).index_put((documents.places,), x).view(*ids.shape, -1)

    def _through(
        self, ids: Tensor, positions: Tensor, mask: Mask, cache: Cache | None, only: Tensor | None = None
    ) -> Tensor:
        """Embedding, blocks and final norm; what `only` leaves out goes no further than it must, to the last keys."""
        angles = positions[..., None, None].float() * self.rotary  # (B, T, 1, R/2)
        rotary = angles.cos() * self.rotary_factor, angles.sin() * self.rotary_factor
        x = self.embed(ids)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, rotary, mask, cache, only if number == len(self.blocks) else None)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V), or scores (...) with the scalar head."""
        if self.head is None:
            return F.linear(hidden, self.embed.weight)
        values = self.head(hidden)
        return values.squeeze(-1) if self.head_kind == "scalar" else values

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V), or scores (B, T) with the scalar head.

        positions (B, T) default to 0, 1, 2…; segments (B, T) number the documents of packed rows, between which
        attention never crosses; with a cache, T new tokens are appended and attend as the cache's mask says.
        """
        return self.logits(self.hidden(ids, positions=positions, segments=segments, cache=cache))


# ---------------------------------------------------------------- counting


def num_parameters(config: ModelConfig, head: Head = "lm") -> int:
    """Parameters of a model of this config, counted without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config, head).parameters())


def flops_per_token(config: ModelConfig, length: int, *, training: bool = True) -> float:
    """Multiplications and additions a token in rows of `length`: matrices and causal attention, forward and backward.

    Norms, rotary and softmax are left out, as is usual for model FLOPs utilisation (PaLM, arXiv 2204.02311, B).
    """
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = (2 if config.family == "moss" else 3) * config.hidden * config.ffn
    matrices = config.num_layers * (config.hidden * (2 * queries + 2 * keys) + mlp) + config.vocab_size * config.hidden
    attention = config.num_layers * 2 * queries * (length + 1) / 2
    return 2 * (matrices + attention) * (3 if training else 1)
