"""Cross-entropy at the learnt tokens only, without ever holding all logits.

In supervised fine-tuning most tokens are not learnt, and in any stage a (tokens x vocabulary) table is by far the
largest thing in memory. So the hidden states of learnt targets are picked first, and the head runs over them in
chunks; each chunk's gradient is worked out on the spot, so that the head is not computed a second time in the
backward pass and no chunk outlives its turn.

Sums, not means: the loop divides by the number of learnt tokens of the whole step, however it is split.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moss.model import Decoder

CHUNK = 512  # learnt tokens whose logits exist at a time


def next_token(model: Decoder, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(summed cross-entropy, learnt tokens) of a packed batch: logits at t against ids[t + 1] where mask[t + 1] = 1."""
    hidden = model.hidden(batch["ids"], positions=batch["positions"], segments=batch["segments"])  # (B, T, D)
    places = batch["mask"].flatten().nonzero().squeeze(1)  # never 0: the first token of a row is not learnt
    targets = batch["ids"].flatten()[places]
    head = model.embed if model.head is None else model.head
    bias = getattr(head, "bias", None)
    return cross_entropy_at(hidden.flatten(0, 1), places - 1, head.weight, bias, targets), len(targets)


def cross_entropy_at(
    hidden: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Sum of -log softmax(hidden[places] @ weight.T + bias)[targets]; softmax in float32 or better.

    hidden (M, D), places (N,) distinct, weight (V, D), bias (V,) or None, targets (N,) -> ().
    """
    return _CrossEntropyAt.apply(hidden, places, weight, bias, targets, chunk, torch.is_grad_enabled())  # type: ignore[no-any-return]


class _CrossEntropyAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        places: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        learn: bool,
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        to_hidden = hidden.new_empty(len(places), hidden.shape[1]) if learn else None
        to_weight = torch.zeros_like(weight, dtype=exact) if learn else None
        to_bias = torch.zeros_like(bias, dtype=exact) if learn and bias is not None else None
        for begin in range(0, len(places), chunk):
            part = hidden[places[begin : begin + chunk]]  # (C, D)
            right = targets[begin : begin + chunk, None]  # (C, 1)
            scores = F.linear(part, weight, bias).to(exact)  # (C, V)
            scale = scores.logsumexp(dim=1, keepdim=True)
            total += (scale - scores.gather(1, right)).sum()
            if to_hidden is None or to_weight is None:
                continue
            slope = scores.sub_(scale).exp_()  # softmax, in the same memory
            slope.scatter_add_(1, right, torch.full_like(right, -1, dtype=exact))
            slope = slope.to(hidden.dtype)
            to_hidden[begin : begin + chunk] = slope @ weight
            to_weight += slope.T @ part
            if to_bias is not None:
                to_bias += slope.sum(dim=0)
        ctx.shape, ctx.dtypes = hidden.shape, (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(places, to_hidden, to_weight, to_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        places, to_hidden, to_weight, to_bias = ctx.saved_tensors
        (grad,) = grads
        spread = torch.zeros(ctx.shape, dtype=to_hidden.dtype, device=to_hidden.device)
        spread[places] = to_hidden * grad.to(to_hidden.dtype)  # places are distinct, so nothing is added up
        to_bias = None if to_bias is None else (to_bias * grad).to(ctx.dtypes[1])
        return spread, None, (to_weight * grad).to(ctx.dtypes[0]), to_bias, None, None, None
