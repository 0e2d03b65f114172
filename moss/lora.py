"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen model learns through two thin matrices beside its linear layers.

What    y = base(x) + alpha / r * (x A^T) B^T with A (r, in) random and B (out, r) zero: a fresh adapter changes
        nothing. The base may be integers (int8, int4): each weight becomes floats for the time of one product, in
        forward and again in backward, and is never kept. Rows of new tokens are learnt beside the frozen table.
Why     Gradients, optimizer and float32 weights exist for the adapter alone: a card trains what it can just hold.
How     spec = parse("r=16,alpha=32,targets=q+v,base=int4")          # what is left out has a default; "16" is r=16
        model = load_base(folder, spec, dtype=torch.bfloat16, device="cuda")
        inject(model, spec, seed=0, rows=range(old_size, new_size))  # rows: of the markers, where they were added
        peft.save(model, run, spec, base=folder)                     # and peft.load(model, run), on the same base
        merge(model)                                                 # for good: a plain model again

Several roles on one base, as PPO has them, are several decoders whose frozen layers are the same objects. Each has its
own adapter and head, so there is nothing to switch:

    policy, reference, critic, reward = view(base), view(base), view(base, "scalar"), view(base, "scalar")
    peft.load(policy, sft_run); peft.load(reference, sft_run)   # or inject(policy, spec), and `base` is the reference
    peft.load(critic, reward_run); peft.load(reward, reward_run)     # adapter and head of the preference model
    engine = Engine(view(policy, live=True))                         # generates with the policy as it then is

Move the base to its device before it is viewed. Roles that only compute are brought to the base's dtype when that is
settled (`reward.to(dtype)`), for a scalar head is float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moss.engine.kernels import GROUP, SLACK
from moss.engine.quant import WIDTHS, QuantLinear, dequantize
from moss.errors import UsageError
from moss.model import Decoder, Head, ModelConfig, rotary_frequencies
from moss.weights import load_model, open_model

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
PIECE = 1 << 24  # integers turned into floats at once: beside the result that takes less than 0.3 GB


@dataclass(frozen=True)
class Spec:
    """What an adapter is: its rank, its weight (alpha / r), where it sits, and what the base becomes."""

    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()  # of TARGETS; (): every linear layer of the blocks
    base: Literal["", "int8", "int4"] = ""  # "": as it is

    def __str__(self) -> str:
        """As `parse` reads it."""
        told = {"r": self.r, "alpha": f"{self.alpha:g}", "targets": "+".join(self.targets), "base": self.base}
        return ",".join(f"{name}={value}" for name, value in told.items() if value)


def parse(text: str) -> Spec:
    """'r=16,alpha=32,targets=q+v,base=int4' in any order, all of it optional; '16' is r=16. UsageError for the rest."""
    values: dict[str, str] = {}
    for part in text.replace(" ", "").split(","):
        name, equals, value = part.partition("=")
        name, value = (name, value) if equals else ("r", name)
        if name not in ("r", "alpha", "targets", "base") or name in values:
            raise UsageError(f"--lora {text}: {part!r} is not one of r=16, alpha=32, targets=q+v, base=int4, each once")
        values[name] = value
    r, base = values.get("r", "16"), values.get("base", "")
    if not r.isdecimal() or int(r) < 1:
        raise UsageError(f"--lora {text}: r is {r!r}, it must be a whole number from 1 up, such as 16")
    alpha = _number(values.get("alpha", str(2 * int(r))))
    if not 0 < alpha < math.inf:
        raise UsageError(f"--lora {text}: alpha is {values['alpha']!r}, it must be a number above 0, such as 32")
    targets = values["targets"].split("+") if "targets" in values else []
    if unknown := [name for name in targets if name not in TARGETS]:
        raise UsageError(f"--lora {text}: unknown target {unknown[0]!r}; there are {'+'.join(TARGETS)}")
    if base not in ("", *WIDTHS):
        raise UsageError(f"--lora {text}: base is {base!r}, it must be {' or '.join(WIDTHS)}, or left out")
    return Spec(int(r), alpha, tuple(name for name in TARGETS if name in targets), base)  # type: ignore[arg-type]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# ---------------------------------------------------------------- layers


@torch.library.custom_op(
    "moss::integer_product",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor scale, Tensor? offset, int cols, bool back) -> Tensor",
)
def integer_product(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, cols: int, back: bool) -> Tensor:
    """x (..., cols) @ W^T -> (..., rows), or `back`: x (..., rows) @ W -> (..., cols); W (rows, cols) in x's dtype.

    W is exactly what the integers stand for. The kernels that the engine multiplies integers with round x to integers
    too: that is another function, and has no gradient. To torch.compile this is one operation: could it look inside,
    it would find the same weight made in forward and in backward, and keep that of every layer from one to the other.
    """
    weight = torch.empty(len(codes), cols, dtype=x.dtype, device=x.device)
    step = max(1, PIECE // cols)
    for first in range(0, len(codes), step):
        rows = slice(first, first + step)
        weight[rows] = dequantize(codes[rows], scale[rows], None if offset is None else offset[rows], cols, x.dtype)
    return x @ weight if back else F.linear(x, weight)


@integer_product.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, cols: int, back: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], cols if back else len(codes))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, offset, ctx.cols, _ = inputs
    ctx.save_for_backward(codes, scale, offset)  # these live anyway; neither x nor the floats do


def _to_x(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, offset = ctx.saved_tensors
    return integer_product(grad, codes, scale, offset, ctx.cols, True), None, None, None, None, None


integer_product.register_autograd(_to_x, setup_context=_keep)


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter; without one (A and B None) integers that pass gradients on."""

    A: nn.Parameter | None  # (r, in)
    B: nn.Parameter | None  # (out, r)

    def __init__(self, base: nn.Linear | QuantLinear, A: Tensor | None, B: Tensor | None, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.exact = True  # False: integers are multiplied as the engine does, fast and without gradient
        self.A, self.B = (None if part is None else nn.Parameter(part) for part in (A, B))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        if self.exact and isinstance(self.base, QuantLinear):
            y = integer_product(x, *self.base.rows(0, self.base.out_features), self.base.in_features, False)
            y = y if self.base.bias is None else y + self.base.bias.to(y.dtype)
        else:
            y = self.base(x)
        if self.A is None or self.B is None:
            return y
        return y + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def merged(self, dtype: torch.dtype) -> nn.Linear:
        """The layer alone: W + scale * B A, computed in float32 or better and then rounded to `dtype`."""
        weight = self.base.dequantize() if isinstance(self.base, QuantLinear) else self.base.weight
        if self.A is not None and self.B is not None:
            weight = weight.to(self.A.dtype) + self.scale * (self.B @ self.A)
        return _linear(weight.to(dtype), None if self.base.bias is None else self.base.bias.to(dtype))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of these tensors themselves."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


class LearntRows(nn.Module):
    """An embedding or a head some of whose rows, from `first` on, are learnt: they stand in for the frozen ones."""

    def __init__(self, base: nn.Embedding | nn.Linear, first: int, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.first, self.rows = base, first, rows

    @property
    def weight(self) -> Tensor:
        """The whole table (V, D), made anew; gradients reach the learnt rows alone."""
        table, last = self.base.weight, self.first + len(self.rows)
        return torch.cat((table[: self.first], self.rows.to(table.dtype), table[last:]))

    @property
    def bias(self) -> Tensor | None:
        """The head's, frozen."""
        return getattr(self.base, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """ids (...) -> (..., D), or hidden states (..., D) -> logits (..., V)."""
        if not isinstance(self.base, nn.Embedding):
            return F.linear(x, self.weight, self.bias)
        mine = (x >= self.first) & (x < self.first + len(self.rows))
        rows = F.embedding((x - self.first) * mine, self.rows.to(self.base.weight.dtype))
        return torch.where(mine[..., None], rows, self.base(x))


# ---------------------------------------------------------------- making, sharing, merging


def linears(model: Decoder) -> Iterator[tuple[str, str, nn.Linear | QuantLinear]]:
    """(name, target, layer) of the linear layers of the blocks, those that have an adapter left out."""
    for name, module in model.blocks.named_modules(prefix="blocks"):
        target = name.rpartition(".")[2]
        if isinstance(module, nn.Linear | QuantLinear) and target in TARGETS:
            yield name, target, module


def adapters(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """(name, layer) of what `inject` put in; empty for a plain model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def _chosen(model: Decoder, spec: Spec) -> list[tuple[str, bool]]:
    """(name, whether an adapter goes there) of each linear layer; no layers, for their floats must be free to go."""
    found = [(name, target) for name, target, _ in linears(model)]
    known = {target for _, target in found}
    if absent := [target for target in spec.targets if target not in known]:
        raise UsageError(f"--lora: this model has no {absent[0]!r}, only {'+'.join(t for t in TARGETS if t in known)}")
    return [(name, not spec.targets or target in spec.targets) for name, target in found]


@torch.no_grad()
def inject(model: Decoder, spec: Spec, *, seed: int = 0, rows: range = range(0)) -> None:
    """Put adapters into a model and freeze all else but a scalar head and the table's `rows` (ids of new tokens).

    A starts as in PEFT (uniform up to 1 / sqrt(in), drawn from `seed`), B at zero; both are float32 or better whatever
    the base is. With `spec.base` every linear layer of the blocks becomes integers, as `quant.pack` makes them;
    embedding, head and norms stay floats.
    """
    if adapters(model):
        raise ValueError("the model has adapters already; merge them first, or begin with the base")
    exact, device = torch.promote_types(model.embed.weight.dtype, torch.float32), model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, learns in _chosen(model, spec):
        base = cast(nn.Linear | QuantLinear, model.get_submodule(name))
        if isinstance(base, QuantLinear) and spec.base != base.width:
            raise ValueError(
                f"the base is {base.width}, the adapter is for {spec.base or 'floats'}; load the base anew"
            )
        if isinstance(base, nn.Linear) and spec.base:
            base = QuantLinear(base.weight, base.bias, spec.base)
        A = B = None
        if learns:
            bound = base.in_features**-0.5
            A = torch.empty(spec.r, base.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
            A, B = A.to(device, exact), torch.zeros(base.out_features, spec.r, device=device, dtype=exact)
        if learns or isinstance(base, QuantLinear):
            model.set_submodule(name, LoRALinear(base, A, B, spec.alpha / spec.r))
    if rows:
        _learn(model, rows, exact)
    if model.head_kind == "scalar" and model.head is not None:
        model.head.to(exact).requires_grad_(True)


def _learn(model: Decoder, rows: range, exact: torch.dtype) -> None:
    """Make rows of the embedding trainable, and those of the head: the same parameter where the two are tied."""
    if rows.step != 1 or not 0 <= rows.start < rows.stop <= model.config.vocab_size:
        raise ValueError(f"{rows} does not lie within the {model.config.vocab_size} rows of the table")
    table, head = model.embed.weight, model.head
    learnt = nn.Parameter(table[rows.start : rows.stop].to(exact, copy=True))
    model.embed = LearntRows(model.embed, rows.start, learnt)  # pyright: ignore[reportAttributeAccessIssue]
    if model.head_kind == "scalar":
        return
    if head is None:
        head = _linear(table, None)
    else:
        learnt = nn.Parameter(head.weight[rows.start : rows.stop].to(exact, copy=True))
    model.head = LearntRows(head, rows.start, learnt)  # pyright: ignore[reportAttributeAccessIssue]


def view(model: Decoder, head: Head | None = None, *, live: bool = False) -> Decoder:
    """Another decoder on the same frozen layers: of the base nothing is copied, adapters and a scalar head are.

    head 'scalar' puts a fresh one, of zeros, on a language model. live: the adapters are the same tensors too, for an
    engine that generates while they are trained; integers are then multiplied as the engine does, so that its
    log-probabilities are near those of training and not equal to them.
    """
    if head == "lm" != model.head_kind:
        raise ValueError("a model with a scalar head has no language-model head to view")
    own = model.head if model.head_kind == "scalar" else None
    shared: list[Any] = [module for module in model.modules() if module is not own and not list(module.children())]
    shared += model.parameters() if live else []
    twin = copy.deepcopy(model, {id(each): each for each in shared})
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # a compiled one is bound to the original
    for _, layer in adapters(twin):
        layer.exact = not live
    if head == "scalar" != model.head_kind:
        table = model.embed.weight
        twin.head_kind, twin.head = "scalar", _linear(torch.zeros_like(table[:1]), None)
    return twin


@torch.no_grad()
def merge(model: Decoder) -> None:
    """Turn an adapted model into a plain one that computes the same, in place; views of its base stay as they are.

    What is not replaced, norms for one, stays frozen, for a view may have it too.

    Over integers the merged weights are floats of the table's dtype: what the integers stand for, and the adapter on
    it. To make integers of them again loses what of the adapter is below half a step.
    """
    dtype = model.embed.weight.dtype
    for name, layer in adapters(model):
        model.set_submodule(name, layer.merged(dtype))
    merge_rows(model)


@torch.no_grad()
def merge_rows(model: Decoder) -> None:
    """Put the learnt rows into tables of the model's own, in place; else each use of a table makes it anew."""
    embed, head = cast(tuple[Any, Any], (model.embed, model.head))
    if isinstance(head, LearntRows):
        model.head = None if model.config.tie_embeddings else _linear(head.weight, head.bias)
    if isinstance(embed, LearntRows):
        table = embed.weight
        model.embed = nn.Embedding(table.shape[0], table.shape[1], _weight=table)


def load_base(
    folder: str | Path, spec: Spec, *, dtype: torch.dtype, device: str | torch.device, head: Head | None = None
) -> Decoder:
    """The model of a folder for `inject`: with `spec.base` a tensor at a time, so that its floats never exist whole.

    Raises what `load_model` raises.
    """
    if not spec.base:
        return load_model(folder, dtype=dtype, device=device, head=head)
    model, read = open_model(folder, head)
    for name, biased in [(name, layer.bias is not None) for name, _, layer in linears(model)]:
        bias = read(f"{name}.bias").to(device) if biased else None
        model.set_submodule(name, QuantLinear(read(f"{name}.weight").to(device), bias, spec.base))
    rest = {name: read(name).to(device, dtype, copy=True) for name, _ in model.named_parameters()}
    model.load_state_dict(rest, strict=False, assign=True)
    model.rotary = rotary_frequencies(model.config)[0].to(device)
    return model


# ---------------------------------------------------------------- counting


def num_trainable(config: ModelConfig, spec: Spec, head: Head = "lm", rows: int = 0) -> int:
    """Trainable parameters of an adapted model of this config with so many learnt rows, without allocating it."""
    with torch.device("meta"):
        model = Decoder(config, head)
    learns = dict(_chosen(model, spec))
    sizes = sum(layer.in_features + layer.out_features for name, _, layer in linears(model) if learns[name])
    tables = 1 if head == "scalar" or config.tie_embeddings else 2
    return spec.r * sizes + rows * config.hidden * tables + (config.hidden if head == "scalar" else 0)


def base_bytes(config: ModelConfig, width: str, dtype: torch.dtype = torch.bfloat16, head: Head = "lm") -> int:
    """Bytes of a frozen base: linear layers of the blocks as `width` (int8, int4, "": floats), all else in `dtype`."""
    with torch.device("meta"):
        model = Decoder(config, head).to(dtype)
    total = sum(parameter.nbytes for parameter in model.parameters())
    for _, _, layer in linears(model) if width else ():
        rows, groups = layer.out_features, -(-layer.in_features // GROUP)
        packed = rows * groups * GROUP + 4 * rows  # int8: a byte a column, and a scale in float32
        if width == "int4":  # half a byte a column; scale and offset in bfloat16, with some spare rows
            packed = rows * groups * GROUP // 2 + 4 * groups * (rows + -(-SLACK // groups))
        total += packed + (4 * rows if layer.bias is not None else 0) - sum(p.nbytes for p in layer.parameters())
    return total
