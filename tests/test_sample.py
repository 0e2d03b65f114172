"""Sampling against plain references written with lists, and against shares worked out by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from moss.engine import sample
from moss.engine.sample import RELEASED, Sampling, choose, draw, logprobs_of, narrow, penalize, urge


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


def reference(row: list[float], s: Sampling, seen: set[int], u: float, length: int = 0) -> int:
    """One row, step by step, as the papers and Hugging Face describe it; `length` tokens of the answer stand."""
    row = row.copy()
    for i in seen:
        row[i] = row[i] / s.repetition_penalty if row[i] > 0 else row[i] * s.repetition_penalty
    factors = [s.length_penalty ** max(length - s.length_start, 0) if i in s.stop_ids else 1 for i in range(len(row))]
    if s.temperature == 0:
        row = [x + math.log(f) for x, f in zip(row, factors)]
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
    probs = [p * factors[i] for i, p in zip(nucleus, softmax([row[i] for i in nucleus]))]
    for i, p in zip(nucleus, probs):
        cumulative += p / sum(probs)
        if u < cumulative:
            return i
    return nucleus[-1]


@pytest.mark.parametrize(("size", "rounds"), [(12, 50), (700, 10)])
def test_choose_equals_reference(size: int, rounds: int) -> None:
    """Order of the filters, batching of unlike rows, the draw, in batches of 8 random rows."""
    rng = random.Random(3)
    for _ in range(rounds):
        samplings = [
            Sampling(
                temperature=rng.choice([0, 0.3, 0.7, 1.0, 2.0]),
                top_p=rng.choice([1.0, 0.9, 0.5, 0.01]),
                top_k=rng.choice([0, 1, 3, 10, 99]),
                repetition_penalty=rng.choice([1.0, 1.02, 1.5]),
                length_penalty=rng.choice([1.0, 1.1, 3.0]),
                length_start=rng.choice([0, 4]),
                stop_ids=frozenset(rng.sample(range(size), 2)),
            )
            for _ in range(8)
        ]
        rows = [[rng.gauss(0, 2) for _ in range(size)] for _ in range(8)]
        seen = torch.tensor([[rng.random() < 0.3 for _ in range(size)] for _ in range(8)])
        uniform = [rng.random() for _ in range(8)]
        lengths = [rng.randrange(9) for _ in range(8)]
        got = choose(torch.tensor(rows, dtype=torch.float64), samplings, uniform, seen=list(seen), lengths=lengths)
        want = [
            reference(row, s, {i for i in range(size) if mask[i]}, u, length)
            for row, s, mask, u, length in zip(rows, samplings, seen.tolist(), uniform, lengths)
        ]
        assert got == want


def test_row_does_not_depend_on_batch() -> None:
    """A seeded request must get the same tokens alone and beside any others."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    mixed = [Sampling(), Sampling(top_p=0.3), Sampling(temperature=0, top_k=2)]
    together = choose(logits, mixed, [0.62, 0.4, 0.9])
    for i, (sampling, u) in enumerate(zip(mixed, (0.62, 0.4, 0.9))):
        assert choose(logits[i : i + 1], [sampling], [u]) == [together[i]]


def test_penalty_by_hand() -> None:
    """Dividing a negative logit would make a repeated token likelier."""
    logits, seen = torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([True, True, False, False])
    assert penalize(logits, seen, 2.0).tolist() == [1.0, -4.0, 2.0, -2.0]


def test_length_penalty_by_hand() -> None:
    """Two tokens past the start at penalty 3: the stop id is nine times as likely, so 1:1 becomes 9:1."""
    weights = np.exp(urge(np.zeros(2), np.array([True, False]), 2, 3.0))
    assert (weights / weights.sum()).tolist() == pytest.approx([0.9, 0.1])


def test_length_penalty_sets_in_after_its_start() -> None:
    """The stop id must stay as the model has it until then, and in rows that have no penalty."""
    rows = [Sampling(temperature=0, stop_ids=frozenset({2, 99}), length_penalty=2.0, length_start=5)] * 2
    logits = torch.tensor([[3.0, 0.0, 0.5]] * 2)
    assert choose(logits, rows, lengths=[5, 0]) == [0, 0]
    assert choose(logits, rows, lengths=[8, 9]) == [0, 2]  # 0.5 + 3 log 2 = 2.58, 0.5 + 4 log 2 = 3.27


def test_released_defaults() -> None:
    """Answers of the released models are compared at the settings they were served with."""
    assert (RELEASED.temperature, RELEASED.top_p, RELEASED.top_k) == (0.7, 0.8, 0)
    assert (RELEASED.repetition_penalty, RELEASED.max_tokens, RELEASED.time_limit) == (1.02, 512, 60)
    assert RELEASED.length_start == 512


def test_narrow_by_hand() -> None:
    """Probabilities .5 .3 .1 .1: top_p .8 keeps two, .81 three; the token that crosses the border stays."""
    logits = torch.tensor([0.1, 0.5, 0.1, 0.3], dtype=torch.float64).log()

    def kept(k: int, p: float) -> list[int]:
        return narrow(logits, Sampling(top_k=k, top_p=p))[0].tolist()

    assert kept(0, 0.79) == [1, 3]
    assert kept(0, 0.85) == [0, 1, 3]
    assert kept(0, 1e-9) == [1]
    assert kept(1, 1.0) == [1]
    assert kept(3, 0.85) == [1, 3]  # top-k renormalises to .56 .33 .11


def test_narrow_looks_far_enough() -> None:
    """Rows with ties and unlike settings in a large vocabulary: what is left equals a full sort."""
    rng = random.Random(2)
    for _ in range(200):
        row = torch.tensor([rng.gauss(0, rng.choice([0.1, 2, 5])) for _ in range(700)])
        row = (row * 4).round() / 4  # ties
        if rng.random() < 0.2:
            row[rng.randrange(1, 700) :] = -math.inf  # what a grammar forbids
        s = Sampling(top_k=rng.choice([0, 0, 1, 40, 127, 128, 129, 900]), top_p=rng.choice([0.1, 0.8, 0.999, 1.0]))
        ordered, order = row.double().sort(descending=True, stable=True)
        most = s.top_k or 700
        probs = ordered[:most].softmax(-1)
        want = order[:most][(probs.cumsum(-1) - probs < (s.top_p if s.top_p < 1 else 2)) & (probs > 0)]
        assert narrow(row, s)[0].tolist() == want.sort().values.tolist(), s


def test_narrow_keeps_one_of_equals() -> None:
    """Where all ids are alike, rounding put each of them below what top-p asked for, and nothing was left."""
    assert narrow(torch.zeros(3000), Sampling(top_p=1e-9))[0].tolist() == [0]


def test_narrow_reads_little_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """To sort a whole vocabulary at each step costs more than a small model's step."""
    counts: list[int] = []
    largest = sample.likeliest
    monkeypatch.setattr(sample, "likeliest", lambda logits, count: counts.append(count) or largest(logits, count))
    logits = 8 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    choose(logits, [Sampling(top_p=0.8), Sampling(top_k=40), Sampling(top_p=0.5)], [0.5] * 3)
    assert counts == [128]  # once for all rows
    choose(logits, [Sampling(), Sampling(temperature=0, top_k=4), Sampling()], [0.5] * 3)
    assert counts == [128]


def test_draw_follows_the_distribution() -> None:
    """Uniform numbers in [0, .25) give id 0, [.25, .75) id 1, the rest id 3; id 2 is impossible."""
    with np.errstate(divide="ignore"):
        exponents = np.log(np.array([0.25, 0.5, 0.0, 0.25]))
    uniform = [0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53]
    assert [draw(exponents, number) for number in uniform] == [0, 0, 1, 1, 3, 3]


def test_draw_never_returns_a_dropped_id() -> None:
    """Rounding at the end of the distribution must not point past the last possible id."""
    exponents = np.full(1000, -math.inf)
    exponents[:7] = np.random.default_rng(0).normal(size=7)
    assert draw(exponents, 1 - 2**-53) == 6


def test_tiny_temperature_is_greedy() -> None:
    """Dividing by 1e-40 would overflow to NaN and pick id 0."""
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    assert choose(logits, [Sampling(temperature=1e-40)], [0.99]) == [1]
    assert choose(logits, [Sampling(temperature=1e-5)], [0.99]) == [1]


def test_logprobs_by_hand() -> None:
    """Log-probabilities are the model's own: two equal logits are a half each."""
    assert logprobs_of(torch.tensor([[3.0, 3.0]]), torch.tensor([1])).item() == pytest.approx(math.log(0.5))


def test_logprobs_do_not_depend_on_the_batch() -> None:
    """A sum over a large vocabulary is split over threads when it stands alone: other bits than in company."""
    logits = torch.randn(8, 100_000, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(8)
    alone = [logprobs_of(logits[i : i + 1], ids[i : i + 1]).item() for i in range(8)]
    assert logprobs_of(logits, ids).tolist() == alone


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0}, {"top_p": 1.1},
        {"top_k": -1}, {"repetition_penalty": 0}, {"max_tokens": 0}, {"time_limit": 0}, {"length_penalty": 0},
        {"length_start": -1}, {"repetition_penalty": 1e-39}, {"length_penalty": 1e39}, {"top_k": 10**30},
        {"length_start": 10**30}, {"temperature": 1e39},
    ],
)  # fmt: skip
def test_bad_settings_are_named(bad: dict) -> None:
    """A wrong setting must be refused by name, not fail later inside the worker."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)
