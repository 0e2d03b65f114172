"""Intervals of what is measured: Wilson's of a rate, and bootstrap ones of means and of differences of two models.

A bootstrap draws as many items as there are, with replacement, a few thousand times, and takes the percentiles of
what the draws give (Efron & Tibshirani 1993, section 13.3). Two models are drawn together, item by item: what makes a
question hard for both does not blur the difference between them. The draws are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000
AT_ONCE = 4_000_000  # numbers of counted draws at a time


class Figure(NamedTuple):
    """A measured value with its 95 % interval, over `n` items."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a rate (Wilson 1927, equation 4 of Brown, Cai & DasGupta 2001)."""
    if n == 0:
        return 0.0, 1.0
    rate = hits / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> Figure:
    """The mean of values (N,), or with weights (N,) the sum of values over that of weights, with its interval. Of items
    that are all right, or all wrong, it is Wilson's: every draw is the same, and nobody knows that all will be."""
    top = np.asarray(values, dtype=np.float64)
    if weights is None and len(top) and (not top.any() or (top == 1).all()):
        return Figure(float(top[0]), *wilson(int(top.sum()), len(top)), len(top))
    return _ratio(top, weights)


def difference(
    ours: Sequence[float] | np.ndarray,
    theirs: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
) -> Figure:
    """`mean` of ours minus that of theirs, on the same items (N,) and drawn together. Where all items differ by 0, 1 or
    -1, the interval reaches as far as Wilson's of none: a few equal answers do not show that models are equal."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} items cannot be paired; ask both models the same")
    return _ratio(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64), weights)


def _ratio(top: np.ndarray, weights: Sequence[float] | np.ndarray | None) -> Figure:
    """The sum of `top` (N,) over that of weights, or over N."""
    if not len(top):
        raise ValueError("there is no mean of nothing: no item was measured")
    below = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    if top[0] in (-1, 0, 1) and (top == top[0]).all() and (below == 1).all():  # of shares; every draw is the same
        room = wilson(0, len(top))[1]
        return Figure(float(top[0]), max(-1.0, float(top[0]) - room), min(1.0, float(top[0]) + room), len(top))
    return _figure(top.sum() / below.sum(), [drawn @ top / (drawn @ below) for drawn in _draws(len(top))], len(top))


def _figure(value: float, drawn: Sequence[np.ndarray], n: int) -> Figure:
    low, high = np.percentile(np.concatenate(drawn), (2.5, 97.5))
    return Figure(float(value), float(low), float(high), n)


def _draws(n: int) -> Iterator[np.ndarray]:
    """How often each of n items is drawn, (some draws, n) at a time."""
    rng, rows = np.random.default_rng(0), max(1, AT_ONCE // n)
    for begin in range(0, DRAWS, rows):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(rows, DRAWS - begin)).astype(np.float64)


def length_controlled(scores: Sequence[float] | np.ndarray, longer: Sequence[float] | np.ndarray) -> Figure:
    """The win rate as it would be between replies of one length.

    scores (N,): 1 for a win, 0.5 for a tie, 0 for a loss; longer (N,): by how many characters the first model's reply
    is longer. A logistic regression on the tanh of the standardised difference, as in AlpacaEval (arXiv 2404.04475,
    equation 2, without a term for the prompt): the rate where that is 0. Both weights are held back a little (a normal
    prior of standard deviation 10), so that draws in which one model always wins give a number too.
    """
    won, apart = np.asarray(scores, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    if not len(won):
        raise ValueError("there is no rate of nothing: no pair was judged")
    if (won == won[0]).all():  # no length could change what is always the same
        return mean(won)
    spread = apart.std()
    shape = np.stack([np.ones_like(won), np.tanh(apart / spread) if spread else np.zeros_like(won)])  # (2, N)
    value = _fit(shape, won, np.ones((1, len(won))))
    return _figure(float(value[0]), [_fit(shape, won, counts) for counts in _draws(len(won))], len(won))


def _fit(shape: np.ndarray, won: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Newton's method for each row of counts (D, N) at once: the share of wins at length difference 0, (D,)."""
    weights = np.zeros((len(counts), 2))
    for _ in range(25):
        share = 1 / (1 + np.exp(-np.clip(weights @ shape, -30, 30)))  # (D, N)
        slope = (counts * (won - share)) @ shape.T - 0.01 * weights
        bend = np.einsum("dn,in,jn->dij", counts * share * (1 - share), shape, shape) + 0.01 * np.eye(2)
        step = np.linalg.solve(bend, slope[:, :, None])[:, :, 0]
        weights += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return 1 / (1 + np.exp(-weights[:, 0]))
