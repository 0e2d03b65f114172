"""Packing: nothing lost, nothing leaked, nothing that depends on order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moss.data.pack import Packed, Rows, best_fit, lay, pack
from moss.model import Decoder, ModelConfig
from moss.train.loss import next_token
from moss.train.machine import to_device


def random_rows(count: int, longest: int, seed: int = 0, vocab: int = 50) -> Rows:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, longest + 1, count)
    return Rows.of([(rng.integers(0, vocab, size), rng.integers(0, 2, size)) for size in sizes])


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    """Prevents first-fit or next-fit in its place, which waste more: worked out by hand for a length of 7."""
    # 5 opens bin 0 (2 left); 4 opens bin 1 (3 left); 3 fits only bin 1 (full); 2 fits bin 0 (full); 1 opens bin 2
    assert best_fit([5, 3, 4, 2, 1], 7, [0, 2, 1, 3, 4]) == [[0, 3], [2, 1], [4]]
    # with 3 and 1 left over, a row of 1 goes where 1 is left, not into the first bin
    assert best_fit([4, 6, 1], 7, [0, 1, 2]) == [[0], [1, 2]]


def test_lay_by_hand() -> None:
    """Prevents a first token learnt without context, positions that run on, and segments that count from 0."""
    rows = Rows.of([([11, 12, 13], [1, 1, 0]), ([21, 22], [1, 1])])
    laid = lay(rows, [[0, 1]], 7, pad=9)
    assert laid["ids"].tolist() == [[11, 12, 13, 21, 22, 9, 9]]
    assert laid["mask"].tolist() == [[0, 1, 0, 0, 1, 0, 0]]
    assert laid["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert laid["segments"].tolist() == [[1, 1, 1, 2, 2, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(0, 5), st.integers(0, 3))
def test_every_row_once_an_epoch(sizes: list[int], seed: int, epoch: int) -> None:
    """Prevents rows lost or seen twice, bins that overflow, and epochs of different size (which would break resume)."""
    rows = Rows.of([([i + 1] * size, [1] * size) for i, size in enumerate(sizes)])
    packed = Packed(rows, 12, seed)
    bins = packed.plan(epoch)
    assert sorted(row for members in bins for row in members) == list(range(len(sizes)))
    assert all(sum(sizes[row] for row in members) <= 12 for members in bins)
    assert len(bins) == len(packed) == len(packed.plan(epoch + 1))
    laid = lay(rows, bins, 12)
    assert int((laid["segments"] > 0).sum()) == sum(sizes)
    assert all(int((laid["ids"] == i + 1).sum()) == size for i, size in enumerate(sizes))


def test_a_position_is_all_there_is_to_know() -> None:
    """Prevents a resumed run from seeing other data than an unbroken one, also across the end of an epoch."""
    rows = random_rows(200, 30)
    unbroken, count = Packed(rows, 32, seed=3), 8
    seen = [unbroken.batch(at, count) for at in range(0, 3 * len(unbroken), count)]
    for index in (len(seen) - 1, len(seen) // 2, 1):
        resumed = Packed(rows, 32, seed=3).batch(index * count, count)
        for name, value in resumed.items():
            assert np.array_equal(value, seen[index][name]), name


def test_epochs_and_seeds_differ_in_order() -> None:
    """Prevents an order that is the same in every epoch or whatever the seed, or neighbours that never change."""
    rows = random_rows(300, 30)
    packed = Packed(rows, 32, seed=1)
    first, second, other = packed.plan(0), packed.plan(1), Packed(rows, 32, seed=2).plan(0)
    assert first != second and first != other
    neighbours = [{frozenset(members) for members in plan if len(members) > 1} for plan in (first, second)]
    assert len(neighbours[0] & neighbours[1]) < 0.5 * len(neighbours[0])


def test_little_is_wasted() -> None:
    """Prevents packing that is correct but leaves the machine computing padding."""
    packed = Packed(random_rows(2000, 128), 128)
    assert packed.fill > 0.98


def test_documents_do_not_see_each_other() -> None:
    """Prevents leakage: losses of packed rows are the sum of the losses of the rows alone."""
    rows = random_rows(12, 20, seed=5)
    model = Decoder(ModelConfig.from_depth(2, 50, 64))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.empty_like(weight).normal_(0, 0.2, generator=generator))
    cpu = torch.device("cpu")
    packed = Packed(rows, 40)
    with torch.no_grad():
        together, learnt, _ = next_token(model, to_device(packed.batch(0, len(packed)), cpu))
        alone = [next_token(model, to_device(lay(rows, [[index]], 20), cpu)) for index in range(len(rows))]
    assert len(packed) < len(rows) and learnt == sum(loss.count for loss in alone)
    assert float(together) == pytest.approx(float(sum(loss.total for loss in alone)), rel=1e-5)


def test_pack_gives_packed_rows() -> None:
    """Prevents the plain form from differing from the one that training uses."""
    packed = list(pack([([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])], 5))
    assert len(packed) == 1 and sorted(packed[0]) == ["ids", "mask", "positions", "segments"]
    assert packed[0]["ids"].tolist() == [1, 2, 3, 4, 5] and packed[0]["mask"].tolist() == [0, 1, 1, 0, 1]


def test_rows_join_and_fingerprint() -> None:
    """Prevents borders that shift when parts are joined, and changed data that looks unchanged to --resume."""
    a, b = Rows.of([([1, 2], [0, 1]), ([3], [1])]), Rows.of([([4, 5], [1, 1])])
    joined = Rows.join([a, Rows.of([]), b])
    assert [joined.row(i)[0].tolist() for i in range(len(joined))] == [[1, 2], [3], [4, 5]]
    assert joined.sha256() == Rows.of([([1, 2], [0, 1]), ([3], [1]), ([4, 5], [1, 1])]).sha256()
    changed = (
        Rows.of([([1, 2, 3], [0, 1, 1]), ([4, 5], [1, 1])]),  # another border
        Rows.of([([1, 2], [1, 1]), ([3], [1]), ([4, 5], [1, 1])]),  # another mask
    )
    assert joined.sha256() not in [rows.sha256() for rows in changed]


def test_rows_that_cannot_be_packed_are_refused() -> None:
    """Prevents a silent cut of a long row, a run on nothing, and a mask that is off by one."""
    with pytest.raises(ValueError, match="9 tokens but the length is 8"):
        Packed(Rows.of([([1] * 9, [1] * 9)]), 8)
    with pytest.raises(ValueError, match="no row"):
        Packed(Rows.of([]), 8)
    with pytest.raises(ValueError, match="3 ids and 2 mask"):
        Rows.of([([1, 2, 3], [1, 1])])
