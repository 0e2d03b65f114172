"""Choosing the next token: pure functions over logits, batched, every row with its own settings.

The order is the usual one: repetition penalty, temperature, top-k, top-p, length penalty, draw. A draw turns one
uniform number per row into a token by the inverse of the cumulative distribution in id order, so that what a request
gets depends on its seed and its logits alone, never on which other requests share the step or on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLD = 1e-6  # a temperature below this is greedy


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


# The defaults that the released models were served with (moss-moon-003; their demos also had top_k 40).
RELEASED = Sampling(temperature=0.7, top_p=0.8, repetition_penalty=1.02, max_tokens=512, time_limit=60)


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019, section 4.1), applied to signed logits as usual.

    logits (B, V), seen (B, V) bool, penalty (B,); a seen logit is divided if positive, multiplied if negative.
    """
    weight = torch.where(seen, penalty[:, None], 1.0)
    return torch.where(logits > 0, logits / weight, logits * weight)


def narrow(logits: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """What top-k (B,) and then top-p (B,) leave of logits (B, V), the likeliest at least: (ids, logits), both (B, K).

    The ids ascend; the logits are -inf where an id is dropped. Only what may stay is sorted: an id of probability p is
    dropped by top-p if p <= (1 - top_p) / V, since all that are no likelier make up at most V * p.
    """
    size = logits.shape[-1]
    logprobs = logits.log_softmax(-1)
    possible = logprobs > ((1 - top_p) / size).log()[:, None]
    possible |= logprobs == logprobs.amax(-1, keepdim=True)
    most = int(top_k.max())
    if most > 0:
        best = logits.topk(min(most, size)).values
        least = best.gather(-1, (top_k.clamp(1, size) - 1)[:, None])
        possible = torch.where(top_k[:, None] > 0, (logits >= least) & (logits > -math.inf), possible)
    ids = possible.any(0).nonzero()[:, 0].expand(len(logits), -1)
    ordered, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    kept = possible.gather(-1, ids).gather(-1, order)
    kept &= (torch.arange(ids.shape[-1], device=ids.device) < top_k[:, None]) | (top_k[:, None] == 0)
    probs = logprobs.gather(-1, ids).gather(-1, order).double().exp() * kept
    upto = probs.cumsum(-1)  # one after the other: zeros of ids that only other rows may choose change nothing
    before = upto - probs  # probability of all likelier ids
    before = torch.where(top_k[:, None] > 0, before / upto[:, -1:], before)
    kept &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept[:, 0] = True
    ordered = ordered.masked_fill(~kept, -math.inf)
    return ids, torch.empty_like(ordered).scatter_(-1, order, ordered)


def urge(logits: Tensor, stops: Tensor, past: Tensor, penalty: Tensor) -> Tensor:
    """Length penalty: the probability of the stop ids times penalty ** past, before the draw makes the sum 1 again.

    logits (B, V), stops (B, V) bool, past (B,) tokens beyond the start (below 0 counts as 0), penalty (B,).
    """
    return logits + torch.where(stops, (past.clamp(min=0) * penalty.log())[:, None], 0.0)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Places (B,) in logits (B, K) for uniform numbers (B,) in [0, 1): the first whose cumulative share exceeds it."""
    weights = (logits - logits.amax(-1, keepdim=True)).double().exp()
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the true total, so that rounding can never point past the last possible id.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


class Plan:
    """The settings of the rows of one batch as tensors; made anew only when rows join or leave."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device | str = "cpu") -> None:
        self.samplings, self.device = samplings, device
        self.greedy = all(s.temperature < COLD for s in samplings)
        self.penalizes = any(s.repetition_penalty != 1 for s in samplings)
        self.urges = any(s.length_penalty != 1 for s in samplings)
        self.temperature = torch.tensor([s.temperature for s in samplings], device=device)
        self.top_k = torch.tensor([s.top_k for s in samplings], device=device)
        self.top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)
        self.penalty = torch.tensor([s.repetition_penalty for s in samplings], device=device)
        self._stops: Tensor | None = None  # (B, V) bool
        self.length_penalty = torch.tensor([s.length_penalty for s in samplings], device=device)
        # Rows that are drawn, those that top-k or top-p narrow apart: they sort only what one of them may choose.
        self.drawn = [(narrows, rows) for narrows in (False, True) if (rows := self._drawn(narrows)) is not None]

    def _drawn(self, narrows: bool) -> Tensor | slice | None:
        """The rows that are drawn and narrowed, or drawn and not; None where there are none."""
        rows = [
            row
            for row, s in enumerate(self.samplings)
            if s.temperature >= COLD and (s.top_k > 0 or s.top_p < 1) == narrows
        ]
        if len(rows) == len(self.samplings):
            return slice(None)  # a view, where an index would copy
        return torch.tensor(rows, device=self.device) if rows else None

    def choose(
        self, logits: Tensor, seen: Tensor | None, uniform: Sequence[float], lengths: Sequence[int] = ()
    ) -> Tensor:
        """Next ids (B,) from float logits (B, V).

        `seen` (B, V) is needed only where a row has a penalty, `uniform` (B) only where one is drawn, `lengths` (B),
        the tokens of each answer so far, only where one has a length penalty.
        """
        if self.penalizes:
            assert seen is not None
            logits = penalize(logits, seen, self.penalty)
        chosen = self._urge(logits, slice(None), None, lengths).argmax(-1)
        if self.greedy:
            return chosen
        numbers = torch.tensor(uniform, dtype=torch.float64, device=self.device)
        for narrows, rows in self.drawn:
            part, ids = logits[rows], None
            part = (part - part.amax(-1, keepdim=True)) / self.temperature[rows][:, None]  # below 0: cannot overflow
            if narrows:
                ids, part = narrow(part, self.top_k[rows], self.top_p[rows])
            places = draw(self._urge(part, rows, ids, lengths), numbers[rows])
            chosen[rows] = places if ids is None else ids.gather(-1, places[:, None])[:, 0]
        return chosen

    def _urge(self, logits: Tensor, rows: Tensor | slice, ids: Tensor | None, lengths: Sequence[int]) -> Tensor:
        """Apply the length penalty to logits of `rows` and `ids` (None: of all), where any row is past its start."""
        if not self.urges:
            return logits
        past = [length - s.length_start for length, s in zip(lengths, self.samplings, strict=True)]
        if max(past) <= 0:
            return logits
        if self._stops is None:
            assert ids is None, "greedy comes first and sees all"
            self._stops = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)
            for row, sampling in zip(self._stops, self.samplings):
                row[[id for id in sampling.stop_ids if 0 <= id < len(row)]] = True
        stops = self._stops[rows] if ids is None else self._stops[rows].gather(-1, ids)
        return urge(logits, stops, torch.tensor(past, device=self.device)[rows], self.length_penalty[rows])


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability (B,) of ids (B,) under the model itself: before penalty, temperature and filters.

    Through log_softmax, which works row by row: a sum over the vocabulary is split differently in other batches.
    """
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
