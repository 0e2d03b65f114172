"""Attention inside the documents of packed rows, for training on a CPU.

What    `Documents` says where the documents of packed rows lie once padding is left out and the rows stand end to end;
        `document_attention` computes attention within them and nothing else.
Why     A mask over whole rows costs what it forbids: PyTorch's kernel for CPUs computes the scores of other documents
        and of the future too. And what is not laid out need not be computed by any other layer either: padding costs
        nothing, however badly rows are filled.
How     documents = Documents.of(segments)                    # of `pack.Packed`
        y = document_attention(q, k, v, documents)            # (H, N, E) each, N tokens in all

The reference is `scaled_dot_product_attention` under `packed_mask`, and the tests compare the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 192  # queries that meet their keys together
CONTINUES = 2**16  # see `packed_mask`; more documents than a row can hold


def packed_mask(segments: Tensor) -> Tensor:
    """Which tokens of a packed row see each other: same document, not later. (B, T) int -> bool (B, 1, T, T).

    A document numbered d + `CONTINUES` x p goes on from document p, which several may share, and sees that too. Padding
    (document 0) sees padding, so that no row of the softmax is empty.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    return (((query == key) | ((query // CONTINUES == key) & (key > 0))) & causal)[:, None]


class Block(NamedTuple):
    """Queries `begin` to `end`, which meet the keys `first` to `end` together."""

    begin: int
    end: int
    first: int
    mask: Tensor  # (queries, M) of the last M keys: -inf where a query may not look; all see the keys before those

    @property
    def queries(self) -> slice:
        return slice(self.begin, self.end)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.end)


@dataclass(frozen=True)
class Documents:
    """The N tokens of packed rows, without padding and end to end."""

    places: Tensor  # (N,) int64, rising: where they stand in the flattened rows
    blocks: list[Block]  # short documents share one, long ones have several

    @classmethod
    def of(cls, segments: Tensor, dtype: torch.dtype = torch.float32) -> Documents:
        """From (B, T) int as `packed_mask` takes it, but each document in one piece (ValueError); masks of `dtype`."""
        places = segments.flatten().nonzero().squeeze(1)
        rows, numbers = places // segments.shape[1], segments.flatten()[places]
        new = torch.ones_like(places, dtype=torch.bool)
        new[1:] = (rows[1:] != rows[:-1]) | (numbers[1:] != numbers[:-1])
        own = new.cumsum(0) - 1  # (N,) each token's document, and the one that it goes on from, itself where none
        borders = [*new.nonzero().squeeze(1).tolist(), len(places)]
        found: dict[tuple[int, int], int] = {}
        before: list[int] = []
        for document, (row, number) in enumerate(zip(rows[new].tolist(), numbers[new].tolist(), strict=True)):
            if (row, number) in found:
                raise ValueError(f"row {row}: document {number} lies in several pieces")
            before.append(found.get((row, number // CONTINUES), document))
            found[row, number] = document
        earlier = torch.tensor(before, dtype=torch.long, device=own.device)[own]
        blocks = []
        for begin, end, first in _cut(borders, before):
            query, key = own[begin:end, None], own[first:end]
            unseen = (query != key) & (earlier[begin:end, None] != key)
            unseen[:, begin - first :] |= torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
            needed = unseen.any(dim=0).nonzero()
            partly = unseen[:, int(needed[0]) if len(needed) else end - first :]
            blocks.append(
                Block(begin, end, first, torch.zeros(partly.shape, dtype=dtype).masked_fill_(partly, -math.inf))
            )
        return cls(places, blocks)

    def find(self, places: Tensor) -> Tensor:
        """Which of the N tokens stand at these places of the flattened rows; a place with padding is a ValueError."""
        found = torch.searchsorted(self.places, places).clamp(max=max(len(self.places) - 1, 0))
        if not torch.equal(self.places[found], places):
            raise ValueError("a place that was asked for holds padding")
        return found


def _cut(borders: Sequence[int], before: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first key) of blocks of documents, which lie between `borders` and go on from those in `before`."""
    last: tuple[int, int, int] | None = None  # may still grow
    for document, (begin, end) in enumerate(itertools.pairwise(borders)):
        first = borders[before[document]]
        if last and end - last[0] <= BLOCK and end - min(last[2], first) <= 2 * BLOCK:
            last = last[0], end, min(last[2], first)
            continue
        if last:
            yield last
        *whole, rest = range(begin, end, BLOCK)
        yield from ((at, at + BLOCK, first) for at in whole)
        last = rest, end, first
    if last:
        yield last


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document, and to the one that it goes on from.

    q (H, N, E), k and v (G, N, E) -> (H, N, E). Softmax is float32 inside; scores are rounded to the dtype before.
    Probabilities are kept for the backward pass: H x (N x half a document) of them.
    """
    q = (q * q.shape[-1] ** -0.5).contiguous()
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0).contiguous() for x in (k, v))
    return _apply(_DocumentAttention, q, k, v, documents.blocks, torch.is_grad_enabled())


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], learn: bool) -> Tensor:
        heads, length, size = q.shape
        out, kept = q.new_empty(length, heads, size).transpose(0, 1), []  # laid out as the next matrix reads it
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks:
                scores = torch.bmm(q[:, block.queries], k[:, block.keys].contiguous().transpose(1, 2))
                scores[:, :, scores.shape[2] - block.mask.shape[1] :] += block.mask
                weights = scores.softmax(dim=2)
                out[:, block.queries] = torch.bmm(weights, v[:, block.keys])
                if learn:
                    kept.append(weights)
        ctx.blocks = blocks
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        (grad,) = grads
        to_q = torch.empty_like(q)
        to_k, to_v = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for block, weights in zip(ctx.blocks, kept, strict=True):
            slope = grad[:, block.queries].contiguous()
            to_weights = torch.bmm(slope, v[:, block.keys].contiguous().transpose(1, 2))
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, 2, q.dtype)
            to_q[:, block.queries] = torch.bmm(to_scores, k[:, block.keys])
            to_k[:, block.keys] += torch.bmm(to_scores.transpose(1, 2), q[:, block.queries])
            to_v[:, block.keys] += torch.bmm(weights.transpose(1, 2), slope)
        return to_q, to_k.to(k.dtype), to_v.to(v.dtype), None, None


def pick(x: Tensor, places: Tensor) -> Tensor:
    """x (1, N, D) at distinct places (P,) -> (1, P, D). A gradient of indexing would add up, which takes far longer."""
    return _apply(_Pick, x, places)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.size = x.shape[1]
        ctx.save_for_backward(places)
        return x.index_select(1, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        (grad,) = grads
        return grad.new_zeros(1, ctx.size, grad.shape[2]).index_copy_(1, places, grad), None


def _apply(function: type[torch.autograd.Function], *given: Any) -> Tensor:
    return function.apply(*given)  # type: ignore[no-any-return]


def keep_compiler_out() -> None:
    """To call before a model is compiled: how many products there are here, and of what size, differs from batch to
    batch. As a decorator it would import the compiler, a second and a half, into every program that loads a model."""
    global _apply
    if not hasattr(_apply, "_torchdynamo_disable"):
        _apply = torch.compiler.disable(_apply)  # type: ignore[assignment]
