"""Choosing the next token: pure functions over logits, batched, every row with its own settings.

The order is the usual one: repetition penalty, temperature, top-k, top-p, draw. A draw turns one uniform
number per row into a token by the inverse of the cumulative distribution in id order, so that what a request
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
    """How one request chooses its tokens and when it ends. Temperature 0 always takes the likeliest token."""

    temperature: float = 1.0
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    top_k: int = 0  # keep this many of the likeliest tokens; 0 keeps all
    repetition_penalty: float = 1.0  # > 1 makes every id of the prompt and of the answer so far less likely
    max_tokens: int = 512
    stop_ids: frozenset[int] = frozenset()  # the id that ends the request is delivered as its last token
    seed: int | None = None
    time_limit: float | None = None  # seconds from submission

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is off"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("time_limit", self.time_limit is None or self.time_limit > 0, "above 0 seconds, or None"),
        )
        for name, good, fix in checks:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {fix}")


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019, section 4.1), applied to signed logits as usual.

    logits (B, V), seen (B, V) bool, penalty (B,); a seen logit is divided if positive, multiplied if negative.
    """
    weight = torch.where(seen, penalty[:, None], 1.0)
    return torch.where(logits > 0, logits / weight, logits * weight)


def narrow(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits (B, V) with -inf where top-k (B,) and then top-p (B,) drop a token; the likeliest always stays."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    kept = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    probs = ordered.masked_fill(~kept, -math.inf).softmax(-1, dtype=torch.float64)
    before = probs.cumsum(-1) - probs  # probability of all likelier tokens
    kept &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept[:, 0] = True
    return logits.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), -math.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Token ids (B,) for uniform numbers (B,) in [0, 1): the first id whose cumulative probability exceeds it."""
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the true total, so that rounding can never point past the last possible id.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


class Plan:
    """The settings of the rows of one batch as tensors; made anew only when rows join or leave."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device | str = "cpu") -> None:
        self.greedy = all(s.temperature < COLD for s in samplings)
        self.penalizes = any(s.repetition_penalty != 1 for s in samplings)
        self.narrows = any(s.temperature >= COLD and (s.top_k or s.top_p < 1) for s in samplings)
        self.device = device
        self.cold = torch.tensor([s.temperature < COLD for s in samplings], device=device)  # (B,)
        self.temperature = torch.tensor([max(s.temperature, COLD) for s in samplings], device=device)
        self.top_k = torch.tensor([s.top_k for s in samplings], device=device)
        self.top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)
        self.penalty = torch.tensor([s.repetition_penalty for s in samplings], device=device)

    def choose(self, logits: Tensor, seen: Tensor | None, uniform: Sequence[float]) -> Tensor:
        """Next ids (B,) from float logits (B, V). `seen` (B, V) is needed only where a row has a penalty."""
        if self.penalizes:
            assert seen is not None
            logits = penalize(logits, seen, self.penalty)
        best = logits.argmax(-1)
        if self.greedy:
            return best
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature[:, None]  # below 0: cannot overflow
        if self.narrows:
            logits = narrow(logits, self.top_k, self.top_p)
        drawn = draw(logits, torch.tensor(uniform, dtype=torch.float64, device=self.device))
        return torch.where(self.cold, best, drawn)


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability (B,) of ids (B,) under the model itself: before penalty, temperature and filters."""
    return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)
