"""Sampling against plain references written with lists, and against shares worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from moss.engine.sample import Plan, Sampling, draw, logprobs_of, narrow, penalize


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


def reference(row: list[float], s: Sampling, seen: set[int], u: float) -> int:
    """One row, step by step, as the papers and Hugging Face describe it."""
    row = row.copy()
    for i in seen:
        row[i] = row[i] / s.repetition_penalty if row[i] > 0 else row[i] * s.repetition_penalty
    if s.temperature == 0:
        return max(range(len(row)), key=row.__getitem__)
    row = [x / s.temperature for x in row]
    order = sorted(range(len(row)), key=lambda i: -row[i])
    kept = order[: s.top_k] if s.top_k else order
    probs = softmax([row[i] for i in kept])
    total, nucleus = 0.0, []
    for i, p in zip(kept, probs):
        if s.top_p < 1 and total >= s.top_p:
            break
        nucleus.append(i)
        total += p
    nucleus.sort()
    cumulative = 0.0
    for i, p in zip(nucleus, softmax([row[i] for i in nucleus])):
        cumulative += p
        if u < cumulative:
            return i
    return nucleus[-1]


def test_choose_equals_reference() -> None:
    """Order of the filters, batching of unlike rows, the draw: 400 random rows in batches of 8."""
    rng = random.Random(3)
    for _ in range(50):
        samplings = [
            Sampling(
                temperature=rng.choice([0, 0.3, 0.7, 1.0, 2.0]),
                top_p=rng.choice([1.0, 0.9, 0.5, 0.01]),
                top_k=rng.choice([0, 1, 3, 10, 99]),
                repetition_penalty=rng.choice([1.0, 1.02, 1.5]),
            )
            for _ in range(8)
        ]
        rows = [[rng.gauss(0, 2) for _ in range(12)] for _ in range(8)]
        seen = torch.rand(8, 12) < 0.3
        uniform = [rng.random() for _ in range(8)]
        got = Plan(samplings).choose(torch.tensor(rows, dtype=torch.float64), seen, uniform).tolist()
        want = [
            reference(row, s, {i for i in range(12) if mask[i]}, u)
            for row, s, mask, u in zip(rows, samplings, seen.tolist(), uniform)
        ]
        assert got == want


def test_row_does_not_depend_on_batch() -> None:
    """A seeded request must get the same tokens alone and beside any others."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    mixed = [Sampling(), Sampling(top_p=0.3), Sampling(temperature=0, top_k=2)]
    together = Plan(mixed).choose(logits, None, [0.62, 0.4, 0.9]).tolist()
    for i, (sampling, u) in enumerate(zip(mixed, (0.62, 0.4, 0.9))):
        assert Plan([sampling]).choose(logits[i : i + 1], None, [u]).tolist() == [together[i]]


def test_penalty_by_hand() -> None:
    """Dividing a negative logit would make a repeated token likelier."""
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize(logits, seen, torch.tensor([2.0])).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_narrow_by_hand() -> None:
    """Probabilities .5 .3 .1 .1: top_p .8 keeps two, .81 three; the token that crosses the border stays."""
    logits = torch.tensor([[0.1, 0.5, 0.1, 0.3]], dtype=torch.float64).log()

    def kept(k: int, p: float) -> list[bool]:
        return narrow(logits, torch.tensor([k]), torch.tensor([p], dtype=torch.float64))[0].isfinite().tolist()

    assert kept(0, 0.79) == [False, True, False, True]
    assert kept(0, 0.85) == [True, True, False, True]
    assert kept(0, 1e-9) == [False, True, False, False]
    assert kept(1, 1.0) == [False, True, False, False]
    assert kept(3, 0.85) == [False, True, False, True]  # top-k renormalises to .56 .33 .11


def test_draw_follows_the_distribution() -> None:
    """Uniform numbers in [0, .25) give id 0, [.25, .75) id 1, the rest id 3; id 2 is impossible."""
    logits = torch.tensor([[0.25, 0.5, 0.0, 0.25]]).log().expand(6, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [0, 0, 1, 1, 3, 3]


def test_draw_never_returns_a_dropped_id() -> None:
    """Rounding at the end of the distribution must not point past the last possible id."""
    logits = torch.full((1, 1000), -math.inf)
    logits[0, :7] = torch.randn(7)
    assert draw(logits, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 6


def test_tiny_temperature_is_greedy() -> None:
    """Dividing by 1e-40 would overflow to NaN and pick id 0."""
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    assert Plan([Sampling(temperature=1e-40)]).choose(logits, None, [0.99]).item() == 1
    assert Plan([Sampling(temperature=1e-5)]).choose(logits, None, [0.99]).item() == 1


def test_logprobs_by_hand() -> None:
    """Log-probabilities are the model's own: two equal logits are a half each."""
    assert logprobs_of(torch.tensor([[3.0, 3.0]]), torch.tensor([1])).item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0}, {"top_p": 1.1},
        {"top_k": -1}, {"repetition_penalty": 0}, {"max_tokens": 0}, {"time_limit": 0},
    ],
)  # fmt: skip
def test_bad_settings_are_named(bad: dict) -> None:
    """A wrong setting must be refused by name, not fail later inside the worker."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)
