"""Sixteen billion parameters on paper: counts as PyTorch makes them, rates by hand, and the page as the code has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from moss.model import Decoder
from moss.train.memory import Job, Net, moments, sizes, standing
from moss.train.scaling import LENGTH, MOSS, PAGE, TABLES, Cluster, fsdp, stages_of, with_tables, zero1


def on_meta() -> Decoder:
    with torch.device("meta"):
        return Decoder(MOSS)


@pytest.fixture(params=[8, 128])
def world(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many ranks, of which this process is the first and the others do not exist."""
    ranks.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    ranks.destroy_process_group()


def test_a_shard_is_what_fully_shard_leaves(world: int) -> None:
    """Prevents P / R where PyTorch cuts by rows and rounds up: the bytes of one rank's parts of the 16B model."""
    model, mesh = on_meta(), init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = sum(parameter.to_local().nbytes for parameter in model.parameters())  # type: ignore[attr-defined]
    needs = fsdp(MOSS, Cluster(world), rows=world)
    job = Job((Net(MOSS),), LENGTH, world * LENGTH, dtype=torch.bfloat16, muon=False, device="cuda", ranks=world)
    assert standing(job)["weights"] == own == needs.memory["weights"]
    assert standing(job)["optimizer"] == 2 * own
    assert moments(job, LENGTH)["the update"]["gradients"] == own


def test_counts_are_those_of_the_model() -> None:
    """Prevents a shape that is not the released model's, and stages that lose or double a layer."""
    parts = dict(on_meta().named_parameters())
    every = sum(parameter.numel() for parameter in parts.values())
    found = sizes(Net(MOSS), torch.bfloat16)
    assert found.trained == every == 16_717_980_160
    assert found.tables == parts["embed.weight"].numel() + parts["head.weight"].numel()
    assert found.block == sum(p.numel() for name, p in parts.items() if name.startswith("blocks.33."))
    first, second = stages_of(MOSS, 2)
    assert first == found.block * 17 + parts["embed.weight"].numel()
    assert first + second == every and sum(stages_of(MOSS, 17)) == every


def test_a_collective_by_hand() -> None:
    """Prevents bits taken for bytes, and a node whose eight ports count as one: 48 GB over 1 and over 16 nodes."""
    assert Cluster(8).collective(48e9) == pytest.approx(48e9 * 7 / 8 / 300e9)
    assert Cluster(128).collective(48e9) == pytest.approx(48e9 * 15 / 16 / (8 * 25e9))
    assert Cluster(128).collective(48e9, groups=2) == pytest.approx(48e9 * 15 / 16 / (4 * 25e9))


def test_zero1_by_hand() -> None:
    """Prevents ZeRO-1 that cuts weights too, and a pipeline without idle time or with one micro-batch under way."""
    largest = max(stages_of(MOSS, 2))
    needs = zero1(MOSS, Cluster(128), rows=1280)
    assert needs.memory["weights"] == needs.memory["gradients"] == 2 * largest
    assert needs.memory["optimizer"] == pytest.approx(12 * largest / 64)
    assert needs.moved["weights"] == pytest.approx(2 * largest * 63 / 64)
    assert needs.moved["hidden states"] == 20 * 2048 * 6144 * 2
    assert needs.compute == pytest.approx(21 / 20 * fsdp(MOSS, Cluster(128), rows=1280).compute)
    few = zero1(MOSS, Cluster(8), rows=32, recomputed=False)
    assert (
        few.memory["activations"] > 2 * 17 * 2048 * 6144 * 2
    )  # two micro-batches in the first stage, all that is kept


def test_fsdp_by_hand() -> None:
    """Prevents communication counted once a step instead of once a micro-batch, and in the wrong dtype."""
    found = sizes(Net(MOSS), torch.bfloat16)
    for recomputed in (True, False):
        needs = fsdp(MOSS, Cluster(8), rows=32, recomputed=recomputed)
        turns = int(needs.micro.split()[0])
        assert needs.moved["gradients"] == pytest.approx(turns * 4 * found.trained * 7 / 8)
        assert needs.moved["weights"] == pytest.approx(turns * (4 * found.trained - 2 * found.tables) * 7 / 8)
        assert needs.total < 80e9
    flops = 6 * (found.trained - MOSS.vocab_size * MOSS.hidden)  # a token, attention and vectors aside
    assert needs.compute == pytest.approx(32 * 2048 * flops / (8 * 156e12), rel=0.05)


def test_what_the_page_says_follows() -> None:
    """Prevents conclusions that the tables beside them do not bear."""
    one, many = Cluster(8), Cluster(128)
    assert fsdp(MOSS, one, rows=32).total < 80e9 * 2 / 3
    assert zero1(MOSS, one, rows=32).total < 80e9
    again, kept = (fsdp(MOSS, many, rows=1280, recomputed=each) for each in (True, False))
    assert kept.seconds[1] < again.seconds[1]
    slow = fsdp(MOSS, replace(many, network=many.network / 5), rows=1280, recomputed=False)
    assert slow.waiting > slow.compute and kept.waiting < kept.compute
    assert zero1(MOSS, many, rows=1280).total > again.total


@pytest.mark.parametrize("name", TABLES)
def test_the_page_holds_the_tables_of_the_code(name: str) -> None:
    """Prevents a page that says what the formulae said once: `python -m moss.train.scaling` writes it anew."""
    page = PAGE.read_text(encoding="utf-8")
    assert f"<!-- table: {name} -->" in page
    assert with_tables(page) == page
