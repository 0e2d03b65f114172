"""Weights of 8 or 4 bits behind our own Linear, made from any loaded model on the fly.

What    int8 keeps a scale a row, int4 a scale and an offset a group of 128 columns (4.25 bits a weight in all).
        `quantize_(model, "int4")` turns every linear layer of a decoder, the head included; a tied embedding keeps its
        table for lookup and gets a quantized head beside it. What is left, norms and embedding, becomes bfloat16.
Why     One token reads every weight once: at half or a quarter of the bytes it takes half or a quarter of the time.
How     model = quantize_(load_model(folder), "int8")

For a few tokens the kernels multiply the integers themselves (kernels.cpp); for many, as in a prompt, a block of rows
at a time is turned back into floats and multiplied by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moss.engine.kernels import GROUP, INT4, INT8, MAX_TOKENS, SLACK, Linear, library
from moss.model import Decoder

Width = Literal["int8", "int4"]
WIDTHS: tuple[Width, ...] = ("int8", "int4")
BLOCK = 1 << 22  # weights turned into integers or back at once: they stay near the CPU's cache
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
    parts = []
    for block in weight.split(max(1, BLOCK // weight.shape[1])):  # the floats of a whole head would not fit everywhere
        padding = (0, -weight.shape[1] % GROUP)
        block = F.pad(block.float()[None], padding, mode="replicate")[0]  # meets zeros, and must not widen a range
        parts.append(_pack_int8(block) if width == "int8" else _pack_int4(block.unflatten(1, (-1, GROUP))))
    codes, scale, *offset = map(torch.cat, zip(*parts))
    if width == "int8":
        return codes, scale, None
    spare = (0, 0, 0, -(-SLACK // scale.shape[1]))
    return codes, F.pad(scale, spare), F.pad(offset[0], spare)


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(1) / 127).clamp_min(TINY)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def _pack_int4(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of groups (out, groups, 128): the range, whole or clipped, with the least squared error is cut into 15 steps."""
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    best = tuple(torch.empty(0) for _ in range(4))
    for clip in CLIPS:
        offset = (low * clip).bfloat16()
        scale = ((high * clip - offset.float()) / 15).clamp_min(TINY).bfloat16()
        codes = ((groups - offset.float()) / scale.float()).round_().clamp_(0, 15)
        error = (codes * scale.float() + offset.float() - groups).square_().sum(2, keepdim=True)
        new = (error, codes, scale, offset)
        best = tuple(torch.where(error < best[0], a, b) for a, b in zip(new, best)) if clip < 1 else new
    _, codes, scale, offset = best
    low_half, high_half = codes.to(torch.uint8).split(GROUP // 2, dim=2)
    return (low_half | high_half << 4).flatten(1), scale[..., 0], offset[..., 0]


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
        self.register_buffer("bias", None if bias is None else bias.detach().float())

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
        kernels = library() if self.codes.device.type == "cpu" else None
        if kernels is not None and dtype in (torch.float32, torch.bfloat16):
            return kernels.unpack(self.describe(), first, count, dtype)
        rows = slice(first, first + count)
        if self.offset is None:
            weight = self.codes[rows] * self.scale[rows, None]
        else:
            packed = self.codes[rows].view(count, -1, GROUP // 2)
            codes = torch.cat((packed & 15, packed >> 4), dim=2)
            weight = codes * self.scale[rows, :, None].float() + self.offset[rows, :, None].float()
        return weight.view(count, -1)[:, : self.in_features].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        flat = x.reshape(-1, self.in_features)
        on_cpu = x.device.type == "cpu"
        if on_cpu and 0 < len(flat) <= MAX_TOKENS and (kernels := library()) is not None:
            y = kernels.linear(self.describe(), flat)
        else:
            y = self._multiply(flat, _matmul_dtype() if on_cpu else x.dtype)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (n, in) times the weight turned back into floats of `dtype`, a block of rows at a time."""
        step = max(1, BLOCK // self.in_features)
        x = x.to(dtype)
        y = x.new_empty(len(x), self.out_features)
        for first in range(0, self.out_features, step):
            count = min(step, self.out_features - first)
            y[:, first : first + count] = x @ self.dequantize(first, count, dtype).T
        return y if self.bias is None else y + self.bias.to(dtype)


def _matmul_dtype() -> torch.dtype:
    """bfloat16 where torch's matrix product is fast in it: with AVX-512; elsewhere it would crawl."""
    return torch.bfloat16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else torch.float32


@torch.no_grad()
def quantize_(model: Decoder, width: Width) -> Decoder:
    """Turn every linear layer of a language model into integers of `width`, in place, one layer's floats at a time."""
    if width not in WIDTHS:
        raise ValueError(f"width is {width!r}, it must be one of {', '.join(WIDTHS)}")
    if model.head_kind != "lm":
        raise ValueError(f"a model with a {model.head_kind} head is not quantized: its scores would move")
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("the model is quantized already; load it again to choose another width")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantLinear(child.weight, child.bias, width))
    if model.head is None:
        model.head = QuantLinear(model.embed.weight, None, width)  # pyright: ignore[reportAttributeAccessIssue]
    return model.bfloat16()
