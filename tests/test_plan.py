"""The plan of a run: what it picks, what it says where nothing fits, and what it measures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from moss.log import console
from moss.lora import Spec
from moss.model import ModelConfig
from moss.train import plan as planning
from moss.train.memory import Job, Net, moments
from moss.train.plan import (
    MARGIN,
    Plan,
    Timing,
    Watch,
    beside,
    chosen,
    explained,
    explained_outside,
    plan,
    refused,
    table,
    timed,
)
from moss.train.scaling import MOSS

NANO = Job((Net(ModelConfig.from_depth(4, 2048)),), length=256, batch_tokens=8192)
BIG = Job((Net(MOSS),), length=2048, batch_tokens=65536, dtype=torch.bfloat16, device="cuda", muon=False)


def needs(job: Job, micro: int) -> float:
    return plan(replace(job, micro_tokens=micro)).total


def test_the_largest_micro_batch_that_fits_is_picked() -> None:
    """Prevents a pick that does not fit, one smaller than need be, and one that does not divide the step."""
    assert plan(NANO).micro_tokens == 8192 and plan(NANO).accumulate == 1
    for rows in (1, 2, 4, 8, 16, 32):
        free = needs(NANO, rows * 256) / MARGIN
        found = plan(NANO, free * 1.0001)
        assert (found.micro_tokens, found.accumulate, found.fits) == (rows * 256, 32 // rows, True)
    assert plan(NANO, needs(NANO, 4096) / MARGIN * 0.999).micro_tokens == 2048
    odd = replace(NANO, batch_tokens=6 * 256)
    assert plan(odd, needs(odd, 4 * 256) / MARGIN * 1.01).micro_tokens == 3 * 256  # not 4: they do not divide 6
    too_little = plan(NANO, 1e6)
    assert too_little.micro_tokens == 256 and not too_little.fits


def test_what_is_asked_for_is_what_is_planned() -> None:
    """Prevents a plan for another micro-batch than the one that will run; less than a row is an error."""
    found = plan(replace(NANO, micro_tokens=512), 1e6)
    assert (found.micro_tokens, found.accumulate, found.fits) == (512, 16, False)
    with pytest.raises(ValueError, match="--micro-tokens 128 is less than a row of --length 256"):
        plan(replace(NANO, micro_tokens=128))


def test_ranks_share_rows_and_weights() -> None:
    """Prevents a plan for eight GPUs that gives each the whole batch or the whole optimizer."""
    one, eight = plan(replace(BIG, checkpointing=True)), plan(replace(BIG, checkpointing=True, ranks=8))
    assert one.micro_tokens == 65536 and eight.micro_tokens == 8192
    assert eight.bytes["optimizer"] == one.bytes["optimizer"] / 8
    adapted = replace(BIG, nets=(replace(BIG.nets[0], lora=Spec()),), micro_tokens=8192)
    one, eight = plan(adapted), plan(replace(adapted, ranks=8))
    assert all(eight.bytes[part] == one.bytes[part] for part in ("weights", "optimizer", "frozen base"))
    assert "gathered weights" not in eight.bytes


def test_the_fullest_moment_counts() -> None:
    """Prevents adding up parts that are never there together; and the allocator's holes are those of a CPU."""
    found = plan(NANO)
    every = {name: sum(parts.values()) for name, parts in moments(NANO, 8192).items()}
    tensors = sum(value for part, value in found.bytes.items() if part != "heap")
    assert found.moment in every and tensors == pytest.approx(every[found.moment])
    assert found.bytes["heap"] > 0
    assert "heap" not in plan(replace(NANO, device="cuda")).bytes


def test_what_does_not_fit_names_what_would() -> None:
    """Prevents `out of memory` without a way out: a smaller micro-batch, else adapters, else adapters on integers."""
    job = replace(NANO, micro_tokens=8192)
    free = needs(NANO, 1024) / MARGIN * 1.01
    assert "--micro-tokens 1024 needs" in refused(plan(job, free))
    card = replace(BIG, checkpointing=True, batch_tokens=2048)
    for memory, words in ((60e9, "--lora r=16 --micro"), (30e9, "r=16,base=int8"), (24e9, "r=16,base=int4")):
        told = refused(plan(card, memory))
        assert words in told and "are needed" in told
    assert "a smaller model" in refused(plan(card, 8e9))


def test_adapters_are_offered_to_those_who_can_train_them() -> None:
    """Prevents advice that the next command refuses: for a model from nothing and a run that goes on."""
    card = replace(BIG, checkpointing=True, batch_tokens=2048)
    for able in (card, replace(card, ranks=8, batch_tokens=8 * 2048)):
        assert "--lora" in refused(plan(able, 21e9))
    told = refused(plan(replace(card, adaptable=False), 21e9))
    assert "--lora" not in told and "a smaller model" in told


def test_the_reference_is_the_base_of_adapters() -> None:
    """Prevents advice against --lora for a copy of the model that would not be there; the judge would."""
    card = replace(BIG, checkpointing=True, batch_tokens=2048)
    assert "--lora r=16 " in refused(plan(replace(card, frozen={"reference": 60e9}), 60e9))
    assert "a smaller model" in refused(plan(replace(card, frozen={"preference model": 60e9}), 60e9))


def test_blocks_are_computed_again_where_nothing_else_fits() -> None:
    """Prevents a third more time for runs that fit, and runs refused that would fit."""
    again = plan(replace(NANO, checkpointing=True))
    free = needs(replace(NANO, checkpointing=True), 256) / MARGIN * 1.001
    assert again.total < plan(NANO).total and needs(NANO, 256) > free
    assert chosen(NANO, free).job.checkpointing and chosen(NANO, free).fits
    assert chosen(NANO, 1e12) == plan(NANO, 1e12)


def test_models_beside_are_counted_once() -> None:
    """Prevents a plan for PPO in which each role brings its own copy of the base."""
    trained, judge = torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10)
    shared = torch.nn.ModuleList([trained, torch.nn.Linear(10, 1)])
    assert beside([trained], {"reference": shared, "judge": judge, "again": judge}) == {
        "reference": 44,
        "judge": 440,
        "again": 0,
    }
    job = replace(NANO, frozen={"reference": 3e9, "preference model": 2e9})
    found = plan(job)
    assert found.total == plan(NANO).total + 5e9 and found.bytes["reference"] == 3e9
    assert "preference model" in shown(found)


def test_out_of_memory_outside_the_steps_is_one_line_too() -> None:
    """Prevents a traceback of the allocator while a model is loaded or made."""
    free = plan(replace(NANO, micro_tokens=256, checkpointing=True)).total * 0.9
    words = "out of memory outside the steps; .* are needed .*; --lora r=16 --micro-tokens"
    with pytest.raises(ValueError, match=words), explained_outside(lambda: NANO, free):
        torch.empty(2**50)
    with pytest.raises(ValueError, match=words), explained_outside(lambda: NANO, free):
        raise MemoryError("Cannot allocate memory (os error 12)")
    with pytest.raises(ValueError, match=words), explained_outside(lambda: NANO, free):
        raise RuntimeError("unable to mmap 470 bytes from file <model.safetensors>: Cannot allocate memory (12)")
    with pytest.raises(RuntimeError, match="shapes"), explained_outside(lambda: NANO, free):
        raise RuntimeError("shapes do not match")


def test_out_of_memory_becomes_one_line_that_names_the_setting() -> None:
    """Prevents a traceback of the allocator; any other error must come through as it is."""
    job = replace(NANO, micro_tokens=8192)
    words = "out of memory with micro-batches of 8192 tokens; "
    with pytest.raises(ValueError, match=f"{words}--micro-tokens 4096"), explained(job, 1e12):
        torch.empty(2**50)
    free = needs(NANO, 256) / MARGIN * 1.01
    with pytest.raises(ValueError, match=f"{words}.* are needed .*; --micro-tokens 256 needs"), explained(job, free):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    with pytest.raises(RuntimeError, match="shapes"), explained(job, 1e12):
        raise RuntimeError("shapes do not match")


def test_steps_are_timed_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an hour planned from a step that compiled: by hand, 9 s once, then 2, 2, 3, 2 and 2 s."""
    seconds = iter([0, 9, 9, 11, 11, 13, 13, 16, 16, 18, 18, 20])
    monkeypatch.setattr(planning.time, "perf_counter", lambda: next(seconds))
    steps: list[int] = []
    found = timed(lambda: steps.append(1))
    assert len(steps) == 6 and found == Timing(9, [2, 2, 3, 2, 2])
    assert found.step == 2 and found.whole(1000) == 9 + 999 * 2


def test_work_for_several_steps_is_shared_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a plan for PPO without the replies of all blocks but the first: by hand, the first of three steps takes
    10 s and the others 1 s, so a step takes 4 s wherever the plan begins; six steps, since five are no whole blocks."""
    for offset in range(3):
        clock, number = [0.0], [offset]

        def step(clock: list[float] = clock, number: list[int] = number) -> None:
            clock[0] += 10 if number[0] % 3 == 0 else 1
            number[0] += 1

        monkeypatch.setattr(planning.time, "perf_counter", lambda clock=clock: clock[0])
        found = timed(step, period=3)
        assert number[0] - offset == 7 and found.each == [4, 4]
        assert found.whole(100) == found.first + 99 * 4


def test_a_watch_sees_the_peak_and_what_was_there() -> None:
    """Prevents a measurement of what is left at the end, or of all that the process ever took."""
    before = torch.ones(30_000_000)  # 120 MB that came before
    watch = Watch("cpu", held=120e6)
    first = watch.taken()
    torch.ones(50_000_000).sum()  # 200 MB that go again
    taken = watch.taken()
    assert before.sum() == 30_000_000
    assert first == pytest.approx(120e6, abs=20e6)
    assert taken == pytest.approx(320e6, abs=30e6)


def shown(found: Plan, **more: Any) -> str:
    with console.capture() as seen:
        console.print(table(found, **more))
    return seen.get()


def test_the_table_says_parts_sum_and_time() -> None:
    """Prevents parts that do not add up, and a table that hides what was measured."""
    found = plan(NANO, 10e9)
    text = shown(found, steps=1000, timing=Timing(9, [2.0]))
    for words in ("in all ", "heap", "of 10.00 GB that are free", "1 micro-batches of 8,192 tokens\n"):
        assert words in text
    assert "2.00 s a step, 4,096 places a second; 1,000 steps take 33m27s" in text
    tensors = sum(value for part, value in found.bytes.items() if part != "heap")
    text = shown(replace(found, measured=tensors + 123e6))
    line = next(line for line in text.splitlines() if "heap" in line)
    assert "123 MB" in line and "in all, measured" in text
    assert "It does not fit" in shown(plan(replace(NANO, micro_tokens=8192), 100e6))


def test_an_adapter_needs_less_than_all_weights() -> None:
    """Prevents a 16B plan without what LoRA saves; and a 24 GB card holds it over four bits, blocks recomputed."""
    job = replace(BIG, batch_tokens=2048, checkpointing=True)
    totals = [
        plan(replace(job, nets=(Net(MOSS, lora=spec),))).total
        for spec in (None, Spec(), Spec(base="int8"), Spec(base="int4"))
    ]
    assert totals == sorted(totals, reverse=True) and not math.isinf(totals[0])
    assert totals[0] > 250e9 and totals[-1] < 24e9
