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
from collections.abc import Iterator
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


class Span(NamedTuple):
    """Tokens `begin` to `end` are a document, which goes on from tokens `first` to `last`."""

    begin: int
    end: int
    first: int = 0
    last: int = 0

    def of(self, x: Tensor) -> Tensor:
        """What its tokens may see of x (H, N, E): the document gone on from, then its own, (H, S, E)."""
        own = x[:, self.begin : self.end]
        return torch.cat((x[:, self.first : self.last], own), dim=1) if self.last > self.first else own

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """(queries, how many keys of `of` the last of them sees), from the last block to the first."""
        for begin in reversed(range(self.begin, self.end, BLOCK)):
            end = min(begin + BLOCK, self.end)
            yield slice(begin, end), self.last - self.first + end - self.begin


@dataclass(frozen=True)
class Documents:
    """The N tokens of packed rows, without padding and end to end."""

    places: Tensor  # (N,) int64, rising: where they stand in the flattened rows
    spans: list[Span]

    @classmethod
    def of(cls, segments: Tensor) -> Documents:
        """From (B, T) int as `packed_mask` takes it, but each document in one piece (ValueError)."""
        places = segments.flatten().nonzero().squeeze(1)
        rows, numbers = places // segments.shape[1], segments.flatten()[places]
        new = torch.ones_like(places, dtype=torch.bool)
        new[1:] = (rows[1:] != rows[:-1]) | (numbers[1:] != numbers[:-1])
        borders = [*new.nonzero().squeeze(1).tolist(), len(places)]
        found: dict[tuple[int, int], Span] = {}
        names = zip(rows[new].tolist(), numbers[new].tolist(), strict=True)
        for (row, number), (begin, end) in zip(names, itertools.pairwise(borders), strict=True):
            if (row, number) in found:
                raise ValueError(f"row {row}: document {number} lies in several pieces")
            before = found.get((row, number // CONTINUES))
            found[row, number] = Span(begin, end, *(before[:2] if before else ()))
        return cls(places, list(found.values()))

    def find(self, places: Tensor) -> Tensor:
        """Which of the N tokens stand at these places of the flattened rows; a place with padding is a ValueError."""
        found = torch.searchsorted(self.places, places).clamp(max=max(len(self.places) - 1, 0))
        if not torch.equal(self.places[found], places):
            raise ValueError("a place that was asked for holds padding")
        return found


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document, and to the one that it goes on from.

    q (H, N, E), k and v (G, N, E) -> (H, N, E). Softmax is float32 inside; scores are rounded to the dtype before.
    Probabilities are kept for the backward pass: H x (N x half a document) of them.
    """
    q = (q * q.shape[-1] ** -0.5).contiguous()
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0).contiguous() for x in (k, v))
    return _by_document(q, k, v, documents)


@torch.compiler.disable()
def _by_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Not for a compiler: how many products there are, and of what size, differs from batch to batch."""
    return _DocumentAttention.apply(q, k, v, documents.spans, torch.is_grad_enabled())  # type: ignore[no-any-return]


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: list[Span], learn: bool) -> Tensor:
        heads, length, size = q.shape
        out, kept = q.new_empty(length, heads, size).transpose(0, 1), []  # laid out as the next matrix reads it
        future = torch.full((BLOCK, BLOCK), -math.inf, dtype=q.dtype, device=q.device).triu(1)
        with torch.autocast(q.device.type, enabled=False):
            for span in spans:
                keys, values = span.of(k), span.of(v)
                for block, seen in span.blocks():
                    new = block.stop - block.start
                    scores = torch.bmm(q[:, block], keys[:, :seen].contiguous().transpose(1, 2))
                    scores[:, :, seen - new :] += future[:new, :new]
                    weights = scores.softmax(dim=2)
                    out[:, block] = torch.bmm(weights, values[:, :seen])
                    if learn:
                        kept.append(weights)
        ctx.spans = spans
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        (grad,) = grads
        to_q, left = torch.empty_like(q), iter(kept)
        to_k, to_v = (torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for span in ctx.spans:
            keys, values = span.of(k), span.of(v)
            sums: list[Tensor] = []  # of the keys' gradients and of the values'
            for block, seen in span.blocks():
                weights, slope = next(left), grad[:, block].contiguous()
                to_weights = torch.bmm(slope, values[:, :seen].contiguous().transpose(1, 2))
                to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, 2, q.dtype)
                to_q[:, block] = torch.bmm(to_scores, keys[:, :seen])
                parts = torch.bmm(to_scores.transpose(1, 2), q[:, block]), torch.bmm(weights.transpose(1, 2), slope)
                if not sums:  # the last block, which sees every key
                    sums = [part.to(to_k.dtype) for part in parts]
                else:
                    for whole, part in zip(sums, parts, strict=True):
                        whole[:, :seen] += part
            own = span.end - span.begin
            for whole, part in zip((to_k, to_v), sums, strict=True):
                whole[:, span.begin : span.end] = part[:, -own:]
                if span.last > span.first:  # set before, since that document stands before this one
                    whole[:, span.first : span.last] += part[:, :-own]
        return to_q, to_k.to(k.dtype), to_v.to(v.dtype), None, None


@torch.compiler.disable()
def pick(x: Tensor, places: Tensor) -> Tensor:
    """x (1, N, D) at distinct places (P,) -> (1, P, D). A gradient of indexing would add up, which takes far longer."""
    return _Pick.apply(x, places)  # type: ignore[no-any-return]


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
