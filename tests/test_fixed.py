"""Deterministic mode: the bits of all scores in any company, both ways of keeping them, and when it is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from moss.engine import Engine, Stream, fixed
from moss.engine import engine as engine_module
from tests.fakes import toy_model
from tests.test_engine import VOCAB, Recorder, greedy, ids_of, naive, prompt


def scores(stream: Stream) -> list[tuple[int, tuple[tuple[int, float], ...]]]:
    """The id and all log-probabilities of every step, to the last bit."""
    return [(token.id, token.top) for token in stream]


@pytest.fixture(params=["kernels", "torch"])
def remedy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic mode has two ways to keep its promise; where there are no kernels the first is the second."""
    if request.param == "torch":
        monkeypatch.setattr(fixed, "runner", lambda model: model)


@pytest.mark.repeated
@pytest.mark.usefixtures("remedy")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.soak)])
def test_deterministic(repeats: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of all scores: eight prompts at once and each alone, warm turns and cold ones, pieces of any size."""
    model = toy_model(num_kv_heads=1).to(dtype)
    options: dict[str, Any] = {"deterministic": True}

    def ask(engine: Engine, ids: list[int], **values: Any) -> Stream:
        return engine.submit(ids, greedy(4), logprobs=VOCAB, **values)

    for seed in range(max(1, repeats // 2)):  # each of eight prompts
        rng = random.Random(seed)
        prompts = [prompt(8 * seed + i, rng.randrange(1, 60)) for i in range(7)]
        prompts.append(prompt(8 * seed + 7, rng.choice([200, 505, 515])))  # the last crosses a block of keys
        with Engine(model, slots=8, **options) as engine:
            monkeypatch.setattr(engine_module, "PIECE", rng.choice([5, 16, 512]))
            streams = [ask(engine, ids, conversation=i) for i, ids in enumerate(prompts)]
            together = [scores(stream) for stream in streams]
            longer = [[*ids, *(id for id, _ in said), 1, 2] for ids, said in zip(prompts, together)]
            warm = [ask(engine, ids, conversation=i) for i, ids in enumerate(longer)]
            second = [scores(stream) for stream in warm]
            assert [stream.reused for stream in warm] == [len(ids) - 3 for ids in longer]
        monkeypatch.setattr(engine_module, "PIECE", rng.choice([7, 64]))
        for ids, want in zip([*prompts, *longer], [*together, *second]):
            with Engine(model, slots=1, lookup=False, **options) as engine:
                assert scores(ask(engine, ids)) == want, (seed, len(ids))


@pytest.mark.usefixtures("remedy")
def test_deterministic_equals_naive() -> None:
    """Bits that are always the same can still be wrong: padding, blocks and rows against the plain model."""
    model = toy_model()
    with Engine(model, slots=20, deterministic=True) as engine:
        streams = [engine.submit(prompt(seed, 3 * seed + 1), greedy(8)) for seed in range(20)]
        assert [ids_of(s) for s in streams] == [naive(model, prompt(seed, 3 * seed + 1), 8) for seed in range(20)]


class Uneven(Recorder):
    """Passes of several tokens come out a little larger."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.logits(hidden) * (1 + len(hidden) / 1000)


def test_deterministic_refuses_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a library computes the rows of a batch differently the promise cannot be kept, and must not be given."""
    monkeypatch.setattr(fixed, "runner", lambda model: Uneven(model))  # kernels that let it down as well
    model = toy_model()
    uneven = torch.linspace(1, 1.001, 16)[:, None, None]
    monkeypatch.setattr(model.norm, "forward", lambda x: x * uneven)
    with pytest.raises(ValueError, match=r"torch\.float32 the same row has other bits"):
        Engine(model, deterministic=True)
