"""Choosing the next token: pure functions of the scores of one row, every row with its own settings.

The order is the usual one: repetition penalty, temperature, top-k, top-p, length penalty, draw. A draw turns one
uniform number per row into a token by the inverse of the cumulative distribution in id order, so that what a request
gets depends on its seed and its logits alone, never on which other requests share the step. What concerns the whole
vocabulary is done by torch where the logits lie; the few ids that may stay are a matter of numpy, whose operations
start in a fraction of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray

COLD = 1e-6  # a temperature below this is greedy
HEADS = 128, 2048  # so many of the likeliest ids are looked at before all are: nearly always enough


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens and when it ends. Temperature 0 always takes the likeliest token.

    ValueError for a value out of its bounds, which are those of the arithmetic: rows share a batch, and what overflows
    in one would end them all.
    """

    temperature: float = 1.0
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    top_k: int = 0  # keep this many of the likeliest tokens; 0 keeps all
    repetition_penalty: float = 1.0  # > 1 makes every id of the prompt and of the answer so far less likely
    length_penalty: float = 1.0  # > 1 makes stop ids likelier in long answers: its power of the tokens past the start
    length_start: int = 512  # tokens of the answer before the length penalty sets in
    max_tokens: int = 512
    stop_ids: frozenset[int] = frozenset()  # the id that ends the request is delivered as its last token
    seed: int | None = None
    time_limit: float | None = None  # seconds from submission

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature <= 100, "0 (greedy) to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (off) or more, and below 2**31"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100; 1 is off"),
            ("length_penalty", 0.01 <= self.length_penalty <= 100, "0.01 to 100; 1 is off"),
            ("length_start", 0 <= self.length_start < 2**31, "0 or more, and below 2**31"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("time_limit", self.time_limit is None or self.time_limit > 0, "above 0 seconds, or None"),
        )
        for name, good, fix in checks:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {fix}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < COLD

    @property
    def narrows(self) -> bool:
        """Whether a token is drawn from a part of the vocabulary."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1)


# The defaults that the released models were served with (moss-moon-003; their demos also had top_k 40).
RELEASED = Sampling(temperature=0.7, top_p=0.8, repetition_penalty=1.02, max_tokens=512, time_limit=60)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019, section 4.1), applied to signed logits as usual.

    logits (V,), seen (V,) bool; a seen logit is divided if positive, multiplied if negative.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def likeliest(logits: Tensor, count: int) -> tuple[Array, Array]:
    """The `count` largest of logits (…, V) and their ids, (…, count) each, in any order."""
    values, ids = logits.topk(count, sorted=False)
    return values.cpu().numpy(), ids.cpu().numpy()


def narrow(logits: Tensor, sampling: Sampling, head: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
    """What top-k and then top-p leave of logits (V,), at least one: ids (K,), and (logit - largest) / temperature (K,).

    The ids ascend. `head`: what `likeliest` gives for HEADS[0], where the caller has it already.
    """
    size, top_k, top_p = len(logits), sampling.top_k, sampling.top_p
    if not sampling.narrows:
        values = logits.cpu().numpy().astype(np.float64)
        ids = np.flatnonzero(values > -math.inf)
        return ids, (values[ids] - values.max()) / (1 if sampling.greedy else sampling.temperature)
    for count in (*(count for count in HEADS if top_k <= count < size), size):
        if count == size:
            values, ids = logits.cpu().numpy(), np.arange(size)
        else:
            values, ids = head if head is not None and count == HEADS[0] else likeliest(logits, count)
            values, ids = values[order := ids.argsort()], ids[order]
        order = (-values).argsort(kind="stable")  # of equals the smaller id comes first
        values, ids = values[order], ids[order]
        exponents = (values.astype(np.float64) - values[0]) / sampling.temperature
        weights = np.exp(exponents)
        total = math.inf
        if top_k:
            weights[top_k:] = 0
            total = weights.sum()
        elif top_p < 1:
            total = ((logits - float(values[0])) / sampling.temperature).exp().sum(dtype=torch.float64).item()
        before = weights.cumsum() - weights  # of all likelier ids
        enough = top_p * total if top_p < 1 else math.inf
        kept = max(1, np.count_nonzero((before < enough) & (weights > 0)))
        if count == size or values[kept - 1] > values[-1]:  # of ids like the last one there may be more
            break
    order = ids[:kept].argsort()
    return ids[order], exponents[order]


def urge(exponents: Array, stops: Array, past: int, penalty: float) -> Array:
    """Length penalty: the probability of the stop ids times penalty ** past, before the draw makes the sum 1 again.

    exponents (K,) as of `narrow`, stops (K,) bool, past: tokens of the answer beyond the start.
    """
    return exponents + past * math.log(penalty) * stops


def draw(exponents: Array, uniform: float) -> int:
    """The place in exponents (K,), logarithms of unscaled probabilities, of a uniform number in [0, 1)."""
    cumulative = np.exp(exponents - exponents.max()).cumsum()
    # Strictly below the true total, so that rounding can never point past the last possible one.
    target = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0))
    return int(cumulative.searchsorted(target, side="right"))


def choose(
    logits: Tensor,
    samplings: Sequence[Sampling],
    uniforms: Sequence[float] = (),
    *,
    seen: Sequence[Tensor | None] = (),
    lengths: Sequence[int] = (),
) -> list[int]:
    """Next ids (B) from float logits (B, V), each under its own settings.

    `uniforms` (B) are needed only where a row is drawn, `seen` (B), (V,) bool each, only where one has a repetition
    penalty, `lengths` (B), the tokens of each answer so far, only where one has a length penalty.
    """
    penalized = {
        row: penalize(logits[row], mask, sampling.repetition_penalty)
        for row, (sampling, mask) in enumerate(zip(samplings, seen))
        if mask is not None and sampling.repetition_penalty != 1
    }
    if penalized:
        logits = torch.stack([penalized.get(row, part) for row, part in enumerate(logits)])
    best = logits.argmax(-1).tolist() if any(sampling.greedy for sampling in samplings) else []
    heads = None
    if logits.shape[-1] > HEADS[0] and any(sampling.narrows for sampling in samplings):
        heads = likeliest(logits, HEADS[0])
    chosen = []
    for row, sampling in enumerate(samplings):
        past = max(0, lengths[row] - sampling.length_start) if sampling.length_penalty != 1 else 0
        if sampling.greedy and not past:
            chosen.append(best[row])
            continue
        ids, exponents = narrow(logits[row], sampling, heads and (heads[0][row], heads[1][row]))
        if past:
            exponents = urge(exponents, np.isin(ids, list(sampling.stop_ids)), past, sampling.length_penalty)
        chosen.append(int(ids[exponents.argmax() if sampling.greedy else draw(exponents, uniforms[row])]))
    return chosen


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability (B,) of ids (B,) under the model itself: before penalty, temperature and filters.

    Through log_softmax, which works row by row: a sum over the vocabulary is split differently in other batches.
    """
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
