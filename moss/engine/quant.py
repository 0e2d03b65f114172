"""Weights of 8 or 4 bits behind our own Linear, made from any model on the fly.

What    int8 keeps a scale a row, int4 a scale and an offset a group of 128 columns (4.25 bits a weight in all).
        `load_quantized(folder, "int4")` reads a model a tensor at a time and turns every linear layer, the head
        included; `quantize_(model, "int4")` does it to one that is in memory. A tied embedding keeps its table for
        lookup and gets a quantized head beside it. What is left, norms and embedding, becomes bfloat16.
Why     One token reads every weight once: at half or a quarter of the bytes it takes half or a quarter of the time.
How     model = load_quantized(folder, "int8")

For up to MANY tokens the CPU's kernels multiply the integers themselves (kernels.cpp), a few tokens at a time; for
more, as in a long prompt, a block of rows at a time is turned back into floats and multiplied by torch. On a GPU
torch.compile makes its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moss.engine.kernels import GROUP, INT4, INT8, KINDS, MAX_TOKENS, SLACK, Linear, library
from moss.log import note
from moss.model import Decoder
from moss.weights import open_model

Width = Literal["int8", "int4"]
WIDTHS: tuple[Width, ...] = ("int8", "int4")
PACKED = 1 << 19  # weights turned into integers at once: they stay in the CPU's cache
# Tokens, by the path of the kernels, above which torch is faster on a CPU although weights are turned back for it.
MANY = {"avx512": 128, "avx2": 32, "portable": MAX_TOKENS}
BLOCK = 1 << 22  # weights turned back at once for a product
GPU_BLOCK = 1 << 26  # the same on a GPU: few calls, and 128 MiB as bfloat16
FEW = 4  # tokens for which a GPU multiplies the integers as it reads them; for more there are faster products of floats
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)  # parts of a group's range that int4 tries: fewer steps lost on the rarest values
TINY = torch.finfo(torch.float32).tiny


def pack(weight: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and offset of a weight (out, in), whose columns are padded to whole groups.

    int8: codes int8 (out, in), scale float32 (out,), weight = scale * code, at most scale / 2 off.
    int4: codes uint8 (out, in / 2), column j of a group in the low half of byte j and j + 64 in the high one; scale and
    offset bfloat16 (out and some spare rows, groups), weight = scale * code + offset.
    """
    if width not in WIDTHS:
        raise ValueError(f"width is {width!r}, it must be one of {', '.join(WIDTHS)}")
    (rows, cols), groups = weight.shape, -(-weight.shape[1] // GROUP)
    if width == "int8":
        packed = [weight.new_empty(rows, groups * GROUP, dtype=torch.int8), weight.new_empty(rows, dtype=torch.float32)]
    else:
        packed = [weight.new_empty(rows, groups * GROUP // 2, dtype=torch.uint8)]
        spare = -(-SLACK // groups)
        packed += [weight.new_zeros(rows + spare, groups, dtype=torch.bfloat16) for _ in range(2)]
    step = max(1, PACKED // cols)
    for first in range(0, rows, step):
        block = weight[first : first + step].float()
        if cols % GROUP:  # padding meets zeros, and must not widen a range
            block = F.pad(block[None], (0, -cols % GROUP), mode="replicate")[0]
        parts = _pack_int8(block) if width == "int8" else _pack_int4(block.unflatten(1, (-1, GROUP)))
        for whole, part in zip(packed, parts, strict=True):
            whole[first : first + len(block)] = part
    codes, scale, *offset = packed
    return codes, scale, offset[0] if offset else None


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(1) / 127).clamp_min(TINY)
    return (weight / scale[:, None]).round_(), scale


def _pack_int4(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of groups (out, groups, 128): the range, whole or clipped, with the least squared error is cut into 15 steps."""
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)

    def cut(clip: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and offset where this part of the range is kept."""
        offset = (low * clip).bfloat16()
        scale = ((high * clip - offset.float()) / 15).clamp_min(TINY).bfloat16()
        return ((groups - offset.float()) / scale.float()).round_().clamp_(0, 15), scale, offset

    def error(clip: float) -> Tensor:
        codes, scale, offset = cut(clip)
        return codes.mul_(scale.float()).add_(offset.float()).sub_(groups).square_().sum(2, keepdim=True)

    best = torch.cat([error(clip) for clip in CLIPS], dim=2).argmin(2, keepdim=True)
    codes, scale, offset = cut(torch.tensor(CLIPS, device=groups.device)[best])
    low_half, high_half = codes.to(torch.uint8).split(GROUP // 2, dim=2)
    return (low_half | high_half << 4).flatten(1), scale[..., 0], offset[..., 0]


def unpack(codes: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack`: the rows that `codes` has, as floats (rows, padded columns)."""
    if offset is None:
        return (codes * scale[:, None]).to(dtype)
    shifts = 4 * torch.arange(2, dtype=torch.uint8, device=codes.device)[:, None]
    levels = codes.unflatten(1, (-1, 1, GROUP // 2)) >> shifts & 15  # (rows, groups, 2, 64)
    return (levels * scale.float()[..., None, None] + offset.float()[..., None, None]).flatten(1).to(dtype)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None, cols: int, dtype: torch.dtype) -> Tensor:
    """The weight (rows, cols) that was packed, as floats: by the kernels where they can."""
    kernels = library() if codes.device.type == "cpu" and dtype in KINDS else None
    if kernels is None:
        return unpack(codes, scale, offset, dtype)[:, :cols]
    pointers = (None if part is None else part.data_ptr() for part in (codes, scale, offset, None))
    return kernels.unpack(Linear(*pointers, len(codes), cols, INT8 if offset is None else INT4), 0, len(codes), dtype)


def product(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """x (n, padded columns) times the weight of `codes` -> (n, rows) float32; compiled, it reads the integers alone."""
    return (unpack(codes, scale, offset) * x[:, None]).sum(-1)


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`unpack` or `product` for a GPU, one kernel for all sizes of layers, made when first called.

    Both have been compiled and compared on a CPU only: on a GPU nobody has run them yet or measured their speed.
    """
    if find_spec("triton") is None:
        note("Triton is not installed: int8 and int4 run uncompiled on this GPU, slower than bfloat16.")
        return function
    return torch.compile(function, dynamic=True)


class QuantLinear(nn.Module):
    """A linear layer of integer weights: x (..., in) -> (..., out) in x's dtype."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, width: Width) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.width: Width = width
        codes, scale, offset = pack(weight.detach(), width)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.float32, copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Moves go through, changes of dtype do not: the integers mean something with these scales alone."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.width}, bias={self.bias is not None}"

    def describe(self) -> Linear:
        """What the kernels need; valid as long as this layer's tensors live where they are."""
        parts = (self.codes, self.scale, self.offset, self.bias)
        pointers = (None if part is None else part.data_ptr() for part in parts)
        return Linear(*pointers, self.out_features, self.in_features, INT8 if self.width == "int8" else INT4)

    def dequantize(self, first: int = 0, count: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows first to first + count as floats (count, in): the weight that this layer stands for."""
        count = self.out_features - first if count is None else count
        return dequantize(*self.rows(first, count), self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        flat = x.reshape(-1, self.in_features)
        on_cpu = x.device.type == "cpu"
        kernels = library() if on_cpu else None
        if kernels is not None and 0 < len(flat) <= MANY[kernels.path]:
            layer = self.describe()
            y = torch.cat([kernels.linear(layer, piece) for piece in flat.split(MAX_TOKENS)])
        else:
            y = self._on_cpu(flat) if on_cpu else self._on_gpu(flat)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _on_cpu(self, x: Tensor) -> Tensor:
        """x (n, in) times the weight as floats, in bfloat16 where torch's product is fast in it: with AVX-512."""
        fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
        x = x.to(torch.bfloat16 if fast else torch.float32)
        return self._by_blocks(BLOCK, lambda first, count: x @ self.dequantize(first, count, x.dtype).T)

    def _on_gpu(self, x: Tensor) -> Tensor:
        """x (n, in) times the integers where it is few tokens, else times the weight as floats of x's dtype."""
        few, x = len(x) <= FEW, F.pad(x, (0, -self.in_features % GROUP))

        def multiply(first: int, count: int) -> Tensor:
            rows = self.rows(first, count)
            return compiled(product)(x, *rows) if few else x @ compiled(unpack)(*rows, x.dtype).T

        return self._by_blocks(GPU_BLOCK, multiply)

    def _by_blocks(self, size: int, multiply: Callable[[int, int], Tensor]) -> Tensor:
        """Join what `multiply(first, count)` gives for rows of `size` weights: no more of them are floats at once."""
        step = max(1, size // self.in_features)
        starts = range(0, self.out_features, step)
        return torch.cat([multiply(first, min(step, self.out_features - first)) for first in starts], dim=1)

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scale and offset of some rows."""
        rows = slice(first, first + count)
        return self.codes[rows], self.scale[rows], None if self.offset is None else self.offset[rows]


@torch.no_grad()
def quantize_(model: Decoder, width: Width) -> Decoder:
    """Turn every linear layer of a language model into integers of `width`, in place, one layer's floats at a time."""
    _quantize(model, width, model.get_parameter)
    return model.bfloat16()


@torch.no_grad()
def load_quantized(path: str | Path, width: Width, device: str | torch.device = "cpu") -> Decoder:
    """Read a language model from a folder as `quantize_` makes it; no more than one tensor's floats exist at a time.

    Raises what `load_model` and `quantize_` raise.
    """
    model, read = open_model(path)
    _quantize(model, width, lambda name: read(name).to(device))
    rest = {name: read(name).to(device, torch.bfloat16, copy=True) for name, _ in model.named_parameters()}
    model.load_state_dict(rest, strict=False, assign=True)
    return model.bfloat16()


def _quantize(model: Decoder, width: Width, read: Callable[[str], Tensor]) -> None:
    """Put a QuantLinear in the place of every linear layer; `read` gives a parameter by its name."""
    if width not in WIDTHS:
        raise ValueError(f"width is {width!r}, it must be one of {', '.join(WIDTHS)}")
    if model.head_kind != "lm":
        raise ValueError(f"a model with a {model.head_kind} head is not quantized: its scores would move")
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("the model is quantized already; load it again to choose another width")
    # Names and no modules: a layer's floats must be free before the next one's are read.
    linears = [(name, each.bias is not None) for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    if model.head is None:
        model.head = QuantLinear(read("embed.weight"), None, width)  # pyright: ignore[reportAttributeAccessIssue]
    for name, biased in linears:
        bias = read(f"{name}.bias") if biased else None
        model.set_submodule(name, QuantLinear(read(f"{name}.weight"), bias, width))
