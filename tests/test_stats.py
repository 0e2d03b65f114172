"""Intervals: published values, the normal approximation where it holds, and pairs that are drawn as pairs."""

from __future__ import annotations

import numpy as np
import pytest

from moss.evals.stats import difference, length_controlled, mean, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(hits: int, n: int, low: float, high: float) -> None:
    """Published values (Newcombe 1998, table I, for 81/263): a wrong formula is off in the third digit."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_is_that_of_a_mean() -> None:
    """Prevents intervals of single values or of another level: for many values it is near mean ± 1.96 s / sqrt(n)."""
    values = np.random.default_rng(1).normal(3, 2, 400)
    half = 1.96 * values.std() / 20
    value, low, high, n = mean(values)
    assert (value, n) == (pytest.approx(values.mean()), 400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert mean(values) == mean(values)
    assert mean(np.full(7, 3.0))[:3] == (3.0, 3.0, 3.0)
    assert mean(np.ones(7)) == (1.0, *wilson(7, 7), 7)  # of seven that are all right nobody knows that all will be
    with pytest.raises(ValueError, match="no item was measured"):
        mean([])


def test_a_ratio_is_not_a_mean_of_ratios() -> None:
    """Prevents short texts that count as much as long ones: 10 bits in 1 byte and 10 in 9 are 2 a byte, not 5.6."""
    value, low, high, _ = mean([10.0, 10.0], [1.0, 9.0])
    assert value == 2.0 and low == pytest.approx(10 / 9) and high == 10.0


def test_pairs_are_drawn_together() -> None:
    """Prevents the spread of the questions in the difference of two models that differ by a tenth on each of them."""
    hard = np.random.default_rng(2).normal(0, 5, 100)
    assert difference(hard + 0.1, hard)[:3] == pytest.approx((0.1, 0.1, 0.1))
    room = wilson(0, 6)[1]
    assert difference([1] * 6, [1] * 6) == (0.0, -room, room, 6)  # six equal answers do not make equal models
    assert difference([0] * 6, [1] * 6) == (-1.0, -1.0, room - 1, 6)
    with pytest.raises(ValueError, match="2 and 3 items"):
        difference([1, 2], [1, 2, 3])


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Prevents an interval that is only named so: of 200 samples of 80 coins of 30 %, 95 % hold the 30 %."""
    rng = np.random.default_rng(3)
    inside = [low <= 0.3 <= high for _, low, high, _ in (mean(rng.random(80) < 0.3) for _ in range(200))]
    assert 0.90 <= np.mean(inside) <= 0.99


def judged(n: int, better: float, longer: float, lean: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts of a judge that knows the better model (`better`, in logits) and leans to the longer reply by `lean`."""
    rng = np.random.default_rng(seed)
    apart = rng.normal(longer, 100, n)
    return (rng.random(n) < 1 / (1 + np.exp(-better - lean * np.tanh(apart / 100)))).astype(float), apart


def test_a_judge_that_likes_length_is_seen_through() -> None:
    """Prevents a length-controlled rate that is the plain one by another name: the models are equally good, one writes
    longer, the judge likes that; and where the judge does not care, both rates agree."""
    won, apart = judged(4000, 0.0, 80.0, 2.0, 0)
    value, low, high, _ = length_controlled(won, apart)
    assert won.mean() > 0.65 and abs(value - 0.5) < 0.04 and low < 0.5 < high
    won, apart = judged(4000, 1.0, 80.0, 0.0, 1)
    assert length_controlled(won, apart)[0] == pytest.approx(won.mean(), abs=0.03)


def test_the_interval_of_a_biased_judge_holds_the_truth() -> None:
    """Prevents intervals that are too narrow for a rate that is fitted: of 60 judges 95 % hold the true 62 %."""
    truth = 1 / (1 + np.exp(-0.5))
    figures = [length_controlled(*judged(300, 0.5, 50.0, 1.0, seed)) for seed in range(60)]
    assert 0.88 <= np.mean([low <= truth <= high for _, low, high, _ in figures]) <= 1.0


def test_length_control_without_a_spread() -> None:
    """Prevents a division by nothing, and a fit without end, where all lengths are alike or one model always wins."""
    assert length_controlled([1, 0, 1, 0.5], [7, 7, 7, 7])[0] == pytest.approx(0.625, abs=0.01)
    assert length_controlled([1] * 5, list(range(5))) == mean([1] * 5)  # five wins prove little, whatever their lengths
    value, low, high, n = length_controlled([1] * 49 + [0], list(range(50)))
    assert 0.5 < low < value < high <= 1.0 and n == 50
