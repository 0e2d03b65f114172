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
from moss.train.loop import Loss

CHUNK = 512  # learnt tokens whose logits exist at a time


def next_token(model: Decoder, batch: dict[str, Tensor]) -> Loss:
    """(summed cross-entropy, learnt tokens) of a packed batch: logits at t against ids[t + 1] where mask[t + 1] = 1."""
    learnt = batch["mask"].flatten().nonzero().squeeze(1)  # never 0: the first token of a row is not learnt
    targets = batch["ids"].flatten()[learnt]
    hidden = model.hidden(
        batch["ids"], positions=batch["positions"], segments=batch["segments"], places=learnt - 1
    )  # (N, D)
    head = model.embed if model.head is None else model.head
    return Loss(cross_entropy(hidden, head.weight, getattr(head, "bias", None), targets), len(targets))


def cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T + bias)[targets]; softmax in float32 or better.

    hidden (N, D), weight (V, D), bias (V,) or None, targets (N,) -> ().
    """
    return _CrossEntropy.apply(hidden, weight, bias, targets, chunk, torch.is_grad_enabled())  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, learn: bool
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if learn else None
        to_weight = torch.zeros_like(weight, dtype=exact) if learn else None
        to_bias = torch.zeros_like(bias, dtype=exact) if learn and bias is not None else None
        for begin in range(0, len(targets), chunk):
            part = hidden[begin : begin + chunk]  # (C, D)
            right = targets[begin : begin + chunk, None]  # (C, 1)
            scores = F.linear(part, weight, bias).to(exact)  # (C, V)
            top, score = scores.amax(dim=1, keepdim=True), scores.gather(1, right)
            slope = scores.softmax(dim=1)
            del scores
            scale = top - slope.amax(dim=1, keepdim=True).log()  # log of the sum of exp(scores), without another pass
            total += (scale - score).sum()
            if to_hidden is None or to_weight is None:
                continue
            slope.scatter_add_(1, right, torch.full_like(right, -1, dtype=exact))
            slope = slope.to(hidden.dtype)
            torch.mm(slope, weight, out=to_hidden[begin : begin + chunk])
            if to_weight.dtype == slope.dtype:
                to_weight.addmm_(slope.T, part)
            else:
                to_weight += slope.T @ part
            if to_bias is not None:
                to_bias += slope.sum(dim=0)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        to_hidden, to_weight, to_bias = ctx.saved_tensors
        (grad,) = grads
        to_bias = None if to_bias is None else (to_bias * grad).to(ctx.dtypes[1])
        return to_hidden * grad.to(to_hidden.dtype), (to_weight * grad).to(ctx.dtypes[0]), to_bias, None, None, None


def log_probs_at(
    hidden: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int = CHUNK
) -> Tensor:
    """log softmax(hidden[places] @ weight.T + bias)[targets] of each target, with gradients; float32 or better.

    hidden (M, D), places (N,) distinct, weight (V, D), bias (V,) or None, targets (N,) -> (N,). What the losses of
    DPO and PPO are made of: they need every token's own value, so the head runs a second time in the backward pass,
    again in chunks.
    """
    return _LogProbsAt.apply(hidden, places, weight, bias, targets, chunk)  # type: ignore[no-any-return]


class _LogProbsAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> Tensor:
        picked = hidden[places]  # (N, D)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        scale = picked.new_empty(len(places), 1, dtype=exact)
        result = picked.new_empty(len(places), dtype=exact)
        for begin in range(0, len(places), chunk):
            part = slice(begin, begin + chunk)
            scores = F.linear(picked[part], weight, bias).to(exact)  # (C, V)
            scale[part] = scores.logsumexp(dim=1, keepdim=True)
            result[part] = (scores.gather(1, targets[part, None]) - scale[part])[:, 0]
        ctx.rows, ctx.chunk = len(hidden), chunk
        ctx.save_for_backward(picked, places, weight, bias, targets, scale)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        picked, places, weight, bias, targets, scale = ctx.saved_tensors
        (grad,) = grads  # (N,)
        wants_hidden, _, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        to_picked = torch.empty_like(picked) if wants_hidden else None
        to_weight = torch.zeros_like(weight, dtype=grad.dtype) if wants_weight else None
        to_bias = torch.zeros_like(bias, dtype=grad.dtype) if wants_bias else None
        for begin in range(0, len(places), ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            slope = F.linear(picked[part], weight, bias).to(grad.dtype).sub_(scale[part]).exp_()  # softmax (C, V)
            slope.neg_().scatter_add_(1, targets[part, None], torch.ones_like(slope[:, :1]))
            slope = (slope * grad[part, None]).to(picked.dtype)
            if to_picked is not None:
                to_picked[part] = slope @ weight
            if to_weight is not None:
                to_weight += slope.T @ picked[part]
            if to_bias is not None:
                to_bias += slope.sum(dim=0)
        to_hidden = None
        if to_picked is not None:
            to_hidden = picked.new_zeros(ctx.rows, picked.shape[1])
            to_hidden[places] = to_picked  # places are distinct, so nothing is added up
        to_weight = None if to_weight is None else to_weight.to(weight.dtype)
        to_bias = None if to_bias is None else to_bias.to(bias.dtype)
        return to_hidden, None, to_weight, to_bias, None, None
