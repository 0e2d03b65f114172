"""Deterministic mode: the bits of all scores in any company, and when it is refused."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from moss.engine import Engine, Stream, fixed, quant
from moss.engine import engine as engine_module
from moss.engine.kernels import library
from moss.engine.quant import quantize_
from moss.engine.step import Step
from tests.fakes import toy_model
from tests.test_engine import VOCAB, Recorder, greedy, ids_of, naive, prompt


def scores(stream: Stream) -> list[tuple[int, tuple[tuple[int, float], ...]]]:
    """The id and all log-probabilities of every step, to the last bit."""
    return [(token.id, token.top) for token in stream]


SMALL: dict[str, Any] = {"hidden": 64, "num_heads": 2, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "num_kv_heads": 1},
    "moss": {**SMALL, "family": "moss", "qk_norm": False, "rotary_dim": 16},
}
PIECES = [5, 7, 11, 16, 21, 37]  # of those above the width of a pass the last pass gets what is left


@pytest.mark.repeated
@pytest.mark.parametrize("kind", ["float32", "bfloat16", *quant.WIDTHS])
@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic(family: str, kind: str, repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of all scores: eight prompts at once and each alone, warm turns and cold ones, pieces of any size."""
    model = toy_model(**FAMILIES[family])
    model = quantize_(model, kind) if kind in quant.WIDTHS else model.to(getattr(torch, kind))
    come, passes = threading.Event(), list[list[list[int]]]()

    def engine_for(slots: int, pieces: list[int]) -> Engine:
        for name in ("PIECE", "SHARED_PIECE"):
            monkeypatch.setattr(engine_module, name, rng.choice(pieces))
        engine = Engine(model, slots=slots, deterministic=True, lookup=slots > 1)
        engine.runner = recorder = Recorder(engine.runner, come.wait)
        recorder.passes = passes
        return engine

    def ask(engine: Engine, prompts: list[list[int]]) -> list[Stream]:
        """All of them; none begins before the last one has come."""
        come.clear()
        streams = [engine.submit(ids, greedy(8), conversation=i, logprobs=VOCAB) for i, ids in enumerate(prompts)]
        come.set()
        return streams

    for seed in range(repeats):
        rng = random.Random(f"{family} {kind} {seed}")
        lengths = [*(rng.randrange(1, 60) for _ in range(7)), rng.choice([200, 505, 515])]
        prompts = [prompt(rng.randrange(10**9), length) for length in lengths]
        with engine_for(8, PIECES) as engine:
            together = [scores(stream) for stream in ask(engine, prompts)]
            longer = [[*ids, *(id for id, _ in said), 1, 2] for ids, said in zip(prompts, together)]
            warm = ask(engine, longer)
            second = [scores(stream) for stream in warm]
            assert [stream.reused for stream in warm] == [len(ids) - 3 for ids in longer]
        for ids, want in zip([*prompts, *longer], [*together, *second]):
            with engine_for(1, PIECES if len(ids) < 100 else PIECES[2:]) as engine:
                assert [scores(stream) for stream in ask(engine, [ids])] == [want], (seed, len(ids))
    assert max(map(len, passes)) == 8 and len({len(ids[0]) for ids in passes}) > 8  # or less was tested than it says


def test_score_has_the_bits_of_an_answer() -> None:
    """A choice that is scored and the same one that is made must not differ."""
    with Engine(toy_model(), deterministic=True) as engine:
        said = list(engine.submit(prompt(3, 40), greedy(8)))
        logprobs = engine.score([*prompt(3, 40), *(token.id for token in said)])
        assert logprobs[-8:] == [token.logprob for token in said]


def test_deterministic_equals_naive() -> None:
    """Bits that are always the same can still be wrong."""
    model = toy_model()
    with Engine(model, slots=20, deterministic=True) as engine:
        streams = [engine.submit(prompt(seed, 3 * seed + 1), greedy(8)) for seed in range(20)]
        assert [ids_of(s) for s in streams] == [naive(model, prompt(seed, 3 * seed + 1), 8) for seed in range(20)]


class Uneven(Step):
    """Passes of several tokens come out a little larger."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().logits(hidden) * (1 + len(hidden) / 1000)


def test_deterministic_refuses_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rows of a batch are computed differently the promise cannot be kept, and must not be given."""
    kernels, model = library(), toy_model()
    assert kernels is not None
    monkeypatch.setattr(fixed, "runner", lambda model: Uneven(model, kernels))
    with pytest.raises(ValueError, match="scores depend on its company"):
        Engine(model, deterministic=True)
    monkeypatch.setattr(fixed, "runner", lambda model: model)
    with pytest.raises(ValueError, match="install g"):
        Engine(model, deterministic=True)
