"""The engine against a naive generator that recomputes everything, and how requests end."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moss.engine import RELEASED, Engine, EngineError, QueueFull, Sampling, Stream
from moss.engine import engine as engine_module
from moss.engine.cache import Cache
from moss.engine.step import Runner
from moss.model import Decoder
from tests.fakes import toy_model
from tests.test_sample import reference

VOCAB = 97


def naive(model: Decoder, ids: list[int], num_tokens: int) -> list[int]:
    """Greedy generation without any cache: the slow reference."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-num_tokens:]


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def ids_of(stream: Stream) -> list[int]:
    return [token.id for token in stream]


def greedy(num_tokens: int, **values: object) -> Sampling:
    return Sampling(temperature=0, max_tokens=num_tokens, **values)  # type: ignore[arg-type]


class Recorder:
    """A model or its runner; notes the ids of every pass, and lets each begin only when `gate` returns."""

    def __init__(self, model: Runner, gate: Callable[[], object] = lambda: None) -> None:
        self.model, self.gate = model, gate
        self.passes: list[list[list[int]]] = []

    def hidden(self, ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        self.gate()
        self.passes.append(ids.tolist())
        return self.model.hidden(ids, **rest)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.logits(hidden)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return toy_model()


@pytest.fixture
def engine(model: Decoder) -> Iterator[Engine]:
    with Engine(model, slots=4) as engine:
        yield engine


def test_greedy_equals_naive(model: Decoder, engine: Engine) -> None:
    """Cache, positions or mask off by one would change tokens sooner or later."""
    for seed, length in enumerate((1, 2, 7, 63, 300)):
        stream = engine.submit(prompt(seed, length), greedy(20))
        assert ids_of(stream) == naive(model, prompt(seed, length), 20)
        assert stream.finish == "length"


def test_grouped_heads_equal_naive() -> None:
    """Fewer key heads than query heads: the cache holds the former."""
    model = toy_model(num_kv_heads=1)
    with Engine(model) as engine:
        assert ids_of(engine.submit(prompt(1, 30), greedy(10))) == naive(model, prompt(1, 30), 10)


def test_batched_equals_single(model: Decoder, engine: Engine) -> None:
    """Thirty ragged requests over four rows, joining and leaving at different steps: none may disturb another."""
    rng = random.Random(0)
    wanted = {seed: (rng.randrange(1, 90), rng.randrange(1, 25)) for seed in range(30)}
    come = threading.Event()
    engine.runner = recorder = Recorder(engine.runner, come.wait)
    streams = {seed: engine.submit(prompt(seed, n), greedy(k)) for seed, (n, k) in wanted.items()}
    come.set()
    got = {seed: ids_of(stream) for seed, stream in streams.items()}
    assert got == {seed: naive(model, prompt(seed, n), k) for seed, (n, k) in wanted.items()}
    assert max(map(len, recorder.passes)) == 4  # one after the other would give the same


def test_long_prompt_is_read_in_pieces(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces must join without a seam, and others must go on between them."""
    monkeypatch.setattr(engine_module, "PIECE", 16)
    with Engine(model) as engine:
        streams = [engine.submit(prompt(s, n), greedy(12)) for s, n in ((1, 5), (2, 200), (3, 33))]
        assert [ids_of(s) for s in streams] == [naive(model, prompt(s, n), 12) for s, n in ((1, 5), (2, 200), (3, 33))]


def test_long_prompt_stalls_nobody(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever decodes gets a token after every piece; a short prompt behind a long one need not wait for its end."""
    monkeypatch.setattr(engine_module, "SHARED_PIECE", 16)
    gate = threading.Event()
    gate.set()
    with Engine(model, lookup=False) as engine:
        engine.runner = recorder = Recorder(model, gate.wait)
        running = engine.submit([1, 2, 3], greedy(300))
        next(running)
        gate.clear()
        long, short = [5] * 320, [6] * 20
        streams = [engine.submit(ids, greedy(3)) for ids in (long, short)]
        gate.set()
        for stream in streams:
            ids_of(stream)
        running.cancel()
        # Pieces of prompts have one row of several ids, steps one id for each of several rows.
        read = [ids[0] for ids in recorder.passes if len(ids[0]) > 1][1:]
        assert max(map(len, read)) <= 16
        last_short = max(i for i, ids in enumerate(read) if 6 in ids)
        assert last_short < len(read) - 10 and read[-1][-1] == 5
        kinds = "".join("r" if len(ids[0]) > 1 else "d" for ids in recorder.passes[1:])
        assert "rrr" not in kinds  # two at most: the end of one prompt and the beginning of another in one step
        assert sum(map(len, read)) == len(long) + len(short)


def test_queue_is_bounded_and_has_places(model: Decoder) -> None:
    """A request must know its place, and one too many be refused at once instead of waiting for ever."""
    open_gate = threading.Event()
    with Engine(model, slots=1, queue=2) as engine:
        engine.runner = Recorder(model, open_gate.wait)
        running = engine.submit([1, 2], greedy(2))
        while engine._waiting:
            time.sleep(0.001)
        waiting = [engine.submit([1, 2], greedy(2)) for _ in range(2)]
        assert [stream.position for stream in (running, *waiting)] == [0, 1, 2]
        with pytest.raises(QueueFull, match="2 requests wait already"):
            engine.submit([1, 2], greedy(2))
        open_gate.set()
        assert [len(ids_of(stream)) for stream in (running, *waiting)] == [2, 2, 2]
        assert [stream.position for stream in waiting] == [0, 0]
        assert len(ids_of(engine.submit([1, 2], greedy(2)))) == 2


def test_free_rows_take_a_burst(model: Decoder) -> None:
    """With all rows free the fifth of a quick burst was refused, because the worker had not yet taken the first."""
    gate = threading.Event()
    with Engine(model, slots=3, queue=2) as engine:
        engine.runner = Recorder(model, gate.wait)
        for _ in range(2):  # a row that is given back counts again
            burst = [engine.submit([1, 2], greedy(2)) for _ in range(5)]
            with pytest.raises(QueueFull):
                engine.submit([1, 2], greedy(2))
            burst.pop().cancel()
            gate.set()
            assert [len(ids_of(stream)) for stream in burst] == [2] * 4
            while engine._waiting:
                time.sleep(0.001)
            gate.clear()


def test_owners_take_turns(model: Decoder) -> None:
    """One owner's fifty questions must not keep another one's single question waiting behind them."""
    open_gate = threading.Event()
    with Engine(model, slots=1) as engine:
        engine.runner = recorder = Recorder(model, open_gate.wait)
        first = engine.submit([90, 1], greedy(1), owner="a")
        while engine._waiting:
            time.sleep(0.001)
        orders = [("a", 1), ("a", 2), ("a", 3), ("b", 11), ("c", 21), ("c", 22), ("b", 12)]
        streams = [engine.submit([id, 1], greedy(1), owner=owner) for owner, id in orders]
        assert [stream.position for stream in streams] == [1, 4, 7, 2, 3, 6, 5]
        open_gate.set()
        for stream in (first, *streams):
            ids_of(stream)
        assert [ids[0][0] for ids in recorder.passes] == [90, 1, 11, 21, 2, 12, 22, 3]


def test_conversation_is_not_read_again(model: Decoder, engine: Engine) -> None:
    """The next turn must reuse prompt and answer, and give exactly what a cold engine gives."""
    first = engine.submit(prompt(1, 100), greedy(10), conversation="a")
    answer = ids_of(first)
    following = [*prompt(1, 100), *answer, *prompt(2, 20)]
    second = engine.submit(following, greedy(10), conversation="a")
    assert ids_of(second) == naive(model, following, 10)
    assert (first.reused, second.reused) == (0, 109)  # all but the last answer id, which was never read


def test_changed_conversation_is_cut(model: Decoder, engine: Engine) -> None:
    """After an edit in the middle only the common beginning may be reused: stale keys would change the answer."""
    ids_of(engine.submit(prompt(1, 100), greedy(5), conversation="a"))
    edited = prompt(1, 100)
    edited[50] = (edited[50] + 1) % VOCAB
    stream = engine.submit(edited, greedy(10), conversation="a")
    assert ids_of(stream) == naive(model, edited, 10) and stream.reused == 50


def test_common_beginning_is_shared(model: Decoder, engine: Engine) -> None:
    """The same meta instruction in two conversations is read once, also while the first one still runs."""
    prompts = [[*prompt(1, 80), *prompt(seed, 10)] for seed in (2, 3, 4)]
    streams = [engine.submit(p, greedy(8), conversation=i) for i, p in enumerate(prompts)]
    assert [ids_of(s) for s in streams] == [naive(model, p, 8) for p in prompts]
    assert streams[0].reused == 0 and min(streams[1].reused, streams[2].reused) >= 80


def test_switched_tools_are_read_again_alone(model: Decoder) -> None:
    """Meta instruction and switches are read once: after a switch only what changed is read, and back nothing of it."""
    meta, all_on, some_off = prompt(1, 60), prompt(2, 40), prompt(3, 40)
    some_off[:5] = all_on[:5]
    with Engine(model, slots=1) as engine:

        def reused(switches: list[int], question: int) -> int:
            ids = [*meta, *switches, *prompt(question, 20)]
            stream = engine.submit(ids, greedy(4), conversation="a", prefix=100)
            assert ids_of(stream) == naive(model, ids, 4)
            return stream.reused

        assert [reused(all_on, 4), reused(some_off, 5), reused(all_on, 6), reused(some_off, 7)] == [0, 65, 100, 100]


def test_stop_id_ends_and_is_delivered(model: Decoder, engine: Engine) -> None:
    """The id that stops is part of what the model said; nothing may follow it."""
    tokens = naive(model, prompt(5, 20), 10)
    stop = next(t for i, t in enumerate(tokens) if i >= 2 and t not in tokens[:i])
    stream = engine.submit(prompt(5, 20), greedy(10, stop_ids=frozenset({stop})))
    assert ids_of(stream) == tokens[: tokens.index(stop) + 1] and stream.finish == "stop"


def test_ends_at_the_cache_limit(model: Decoder) -> None:
    """Generation beyond the last column must end as length, not overflow."""
    with Engine(model, max_length=64) as engine:
        stream = engine.submit(prompt(1, 60), greedy(100))
        assert len(ids_of(stream)) == 4 and stream.finish == "length"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "empty"),
        ([1] * 64, "at most 63 fit"),
        ([3, VOCAB], f"id {VOCAB} in the prompt is not"),
        ([-1], "id -1 in the prompt is not"),
    ],
)
def test_bad_prompts(model: Decoder, ids: list[int], message: str) -> None:
    """A prompt that cannot work is refused at submit, with the value, not in the worker."""
    with Engine(model, max_length=64) as engine, pytest.raises(ValueError, match=message):
        engine.submit(ids, greedy(1))


def test_cancel_frees_the_row(model: Decoder) -> None:
    """A cancelled request must end at the next step and let the one waiting behind it run."""
    come = threading.Event()

    def gate() -> None:
        come.wait()
        if len(recorder.passes) == 2:
            dropped.cancel()
            running.cancel()

    with Engine(model, slots=1, lookup=False) as engine:
        engine.runner = recorder = Recorder(engine.runner, gate)
        running = engine.submit(prompt(1, 10), greedy(500))
        waiting = engine.submit(prompt(2, 10), greedy(5))
        dropped = engine.submit(prompt(3, 10), greedy(5))
        come.set()
        assert ids_of(running) == naive(model, prompt(1, 10), 3)  # that of the pass under way is the last
        assert running.finish == "cancelled"
        assert ids_of(waiting) == naive(model, prompt(2, 10), 5)
        assert ids_of(dropped) == [] and dropped.finish == "cancelled"
        assert recorder.passes[3] == [prompt(2, 10)] and len(recorder.passes) == 3 + 5


@pytest.mark.parametrize("finish", ["cancelled", "time"])
def test_a_prompt_need_not_be_read_to_its_end(model: Decoder, finish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leaves while a long prompt is read must not hold the row for the rest of it; what was read is not lost."""
    monkeypatch.setattr(engine_module, "PIECE", 16)
    come = threading.Event()

    def gate() -> None:
        come.wait()
        if len(recorder.passes) == 2:
            long.cancel() if finish == "cancelled" else time.sleep(0.6)

    ids, limit = prompt(1, 320), {"time_limit": 0.5} if finish == "time" else {}
    with Engine(model, slots=1) as engine:
        engine.runner = recorder = Recorder(engine.runner, gate)
        long = engine.submit(ids, greedy(3, **limit), conversation="a")
        again = engine.submit(ids, greedy(3), conversation="a")
        come.set()
        assert ids_of(long) == [] and long.finish == finish
        assert ids_of(again) == naive(model, ids, 3)
        # The third piece was under way; where the machine is very busy the time is over before.
        assert again.reused == 48 or (finish == "time" and again.reused < 48)


def test_time_limit(model: Decoder, engine: Engine) -> None:
    """A request past its time must end as time, with what it has."""
    started = time.monotonic()
    stream = engine.submit(prompt(1, 10), Sampling(temperature=0, max_tokens=550, time_limit=0.05))
    got = ids_of(stream)
    assert stream.finish == "time" and 0 < len(got) < 550 and time.monotonic() - started < 5


def test_seed_decides(model: Decoder, engine: Engine) -> None:
    """The same seed gives the same tokens alone and in a crowd; another seed gives others."""

    def ask(seed: int) -> Stream:
        return engine.submit(prompt(1, 10), Sampling(max_tokens=20, seed=seed))

    alone = ids_of(ask(7))
    crowd = [ask(seed) for seed in (1, 7, 2)]
    got = [ids_of(s) for s in crowd]
    assert got[1] == alone and got[0] != alone and got[2] != alone


def test_repetition_penalty_covers_prompt_and_answer(model: Decoder, engine: Engine) -> None:
    """With an enormous penalty nothing of the prompt and nothing said may come back."""
    start = prompt(1, 10)
    got = ids_of(engine.submit(start, greedy(40, repetition_penalty=100)))
    # A negative logit times 100 is below any other; a positive one becomes about zero: both lose to fresh ids
    # with positive logits, of which the toy model has dozens.
    assert len(set(got)) == len(got) and not set(got) & set(start)


def test_released_defaults_equal_the_reference(model: Decoder, engine: Engine) -> None:
    """Temperature, top-p, penalty over the whole conversation, length penalty, seed: together, against plain lists."""
    sampling = replace(RELEASED, length_penalty=1.3, length_start=5, max_tokens=40, stop_ids=frozenset({3, 4}), seed=5)
    ids, rng = prompt(1, 15), random.Random(5)
    stream = engine.submit(ids, sampling)
    with torch.inference_mode():
        while len(ids) < 55 and not (len(ids) > 15 and ids[-1] in (3, 4)):
            row = model(torch.tensor([ids]))[0, -1].tolist()
            ids.append(reference(row, sampling, set(ids), rng.random(), len(ids) - 15))
    assert ids_of(stream) == ids[15:] and stream.finish == "stop"


class Alternating:
    """A grammar for tests: ids below 10 and above 80 by turns, three of each and then none at all."""

    def __init__(self) -> None:
        self.said: list[int] = []

    def start(self) -> Alternating:
        return Alternating()

    def mask(self) -> torch.Tensor:
        low = len(self.said) % 2 == 0 and len(self.said) < 6
        high = len(self.said) % 2 == 1
        return torch.tensor([low] * 10 + [False] * 71 + [high] * 10)  # the last six ids are not the tokenizer's

    def advance(self, id: int) -> None:
        if not self.mask()[id : id + 1].any():
            raise ValueError(f"id {id} cannot come")
        self.said.append(id)


def test_grammar_masks_its_own_request(model: Decoder, engine: Engine) -> None:
    """Only what the grammar allows, with the model's own probabilities; the neighbour is free; its end is an error."""
    start = prompt(1, 10)
    free = engine.submit(start, greedy(9))
    bound = engine.submit(start, Sampling(max_tokens=6, seed=1), grammar=Alternating())
    tokens = list(bound)
    assert ids_of(free) == naive(model, start, 9)
    assert [token.id < 10 for token in tokens] == [True, False] * 3
    assert [80 < token.id < 91 for token in tokens] == [False, True] * 3
    with torch.inference_mode():
        rows = model(torch.tensor([start + [token.id for token in tokens]]))[0, 9:-1].log_softmax(-1)
    assert [t.logprob for t in tokens] == pytest.approx([row[t.id].item() for row, t in zip(rows, tokens)], abs=1e-4)
    for temperature in (0.0, 1.0):
        stuck = engine.submit(start, Sampling(temperature=temperature, top_p=0.9), grammar=Alternating())
        with pytest.raises(EngineError, match="allows no token"):
            ids_of(stuck)
    assert ids_of(engine.submit(start, greedy(9))) == naive(model, start, 9)


class Counting(Alternating):
    """Allows two thirds of all ids, and counts its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = 0

    def start(self) -> Counting:
        return self

    def mask(self) -> torch.Tensor:
        self.masks += 1
        return torch.arange(VOCAB) % 3 > 0

    def advance(self, id: int) -> None:
        if id % 3 == 0:
            raise ValueError(f"id {id} cannot come")
        self.said.append(id)


def test_greedy_asks_for_a_mask_only_where_it_must(model: Decoder, engine: Engine) -> None:
    """To make a mask for every token costs more than a tenth of a small model's step."""
    grammar, ids, refused = Counting(), prompt(2, 10), 0
    got = ids_of(engine.submit(ids, greedy(30), grammar=grammar))
    for id in got:
        with torch.inference_mode():
            row = model(torch.tensor([ids]))[0, -1]
        refused += int(row.argmax()) % 3 == 0
        assert id == int(row.masked_fill(torch.arange(VOCAB) % 3 == 0, -torch.inf).argmax())
        ids = [*ids, id]
    assert got == grammar.said and 0 < refused == grammar.masks < 30


class Faulty(Alternating):
    """A grammar that goes wrong at its second id: it raises, or has a mask that cannot be used."""

    def __init__(self, raises: Exception | None = None, at: str = "mask", mask: Any = None) -> None:
        super().__init__()
        self.error, self.at, self.second = raises, at, mask

    def start(self) -> Faulty:
        return Faulty(self.error, self.at, self.second)

    def mask(self) -> Any:
        if self.said and self.error is not None:
            raise self.error
        return self.second if self.said else torch.ones(VOCAB, dtype=torch.bool)

    def advance(self, id: int) -> None:
        self.said.append(id)
        if self.at == "advance" and self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [ValueError("no such state"), KeyError("no such state")], ids=["value", "key"])
@pytest.mark.parametrize("at", ["mask", "advance"])
def test_error_of_a_grammar_ends_its_own_request(model: Decoder, engine: Engine, at: str, error: Exception) -> None:
    """An error in one user's grammar was raised at every user's stream."""
    ends_alone(model, engine, Faulty(error, at), "no such state")


MASKS = {
    "short": (torch.zeros(VOCAB - 9, dtype=torch.bool), "no token to follow"),
    "long": (torch.tensor([False] * VOCAB + [True]), "no token to follow"),
    "kind": (torch.ones(VOCAB), r"is bool \(V,\), not torch.float32 \(97,\)"),
    "rows": (torch.ones(1, VOCAB, dtype=torch.bool), r"is bool \(V,\), not torch.bool \(1, 97\)"),
    "list": ([True], "'list' object"),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_that_cannot_be_used_ends_its_own_request(model: Decoder, engine: Engine, name: str) -> None:
    """A mask of another length, dtype or shape than promised went into the step of all requests."""
    mask, words = MASKS[name]
    ends_alone(model, engine, Faulty(mask=mask), words)


def ends_alone(model: Decoder, engine: Engine, grammar: Faulty, words: str) -> None:
    """Requests with this grammar fail with these words; the one beside them does not."""
    innocent = engine.submit(prompt(1, 10), greedy(60))
    drawn = [
        Sampling(max_tokens=9, seed=seed) for seed in range(8)
    ]  # a greedy one asks for no mask where it needs none
    for sampling in [*drawn, greedy(9)] if grammar.at == "advance" else drawn:
        stream = engine.submit(prompt(3, 5), sampling, grammar=grammar)
        with pytest.raises(EngineError, match=words):
            ids_of(stream)
    assert ids_of(innocent) == naive(model, prompt(1, 10), 60)


def test_extreme_settings_harm_no_neighbour(model: Decoder, engine: Engine) -> None:
    """What is just allowed must not overflow: the error would end the requests beside it, too."""
    innocent = engine.submit(prompt(1, 10), greedy(60))
    extremes: list[dict[str, Any]] = [
        {"repetition_penalty": 0.01}, {"repetition_penalty": 100}, {"top_k": 2**31 - 1}, {"length_start": 2**31 - 1},
        {"length_penalty": 100, "length_start": 0}, {"length_penalty": 0.01, "length_start": 0}, {"top_p": 5e-324},
        {"temperature": 100}, {"temperature": 1e-6}, {"max_tokens": 10**30},
    ]  # fmt: skip
    values = {"length_penalty": 2.0, "max_tokens": 20, "stop_ids": frozenset({3}), "seed": 1}
    for stream in [engine.submit(prompt(2, 10), Sampling(**values | extreme)) for extreme in extremes]:
        assert ids_of(stream)
    assert ids_of(innocent) == naive(model, prompt(1, 10), 60)


def test_logprobs(model: Decoder, engine: Engine) -> None:
    """Reported values must be the model's log-softmax at that place, likeliest first."""
    start = prompt(4, 30)
    tokens = list(engine.submit(start, greedy(3), logprobs=4))
    with torch.inference_mode():
        want = model(torch.tensor([start + [t.id for t in tokens[:2]]]))[0, -3:].log_softmax(-1)
    for token, row in zip(tokens, want):
        values, ids = row.topk(4)
        assert [id for id, _ in token.top] == ids.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)


def test_score(model: Decoder, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """score(ids)[i] belongs to ids[i+1], across pieces; one id has nothing to score."""
    monkeypatch.setattr(engine_module, "PIECE", 7)
    ids = prompt(1, 30)
    with torch.inference_mode():
        rows = model(torch.tensor([ids]))[0].log_softmax(-1)
    want = [rows[i, ids[i + 1]].item() for i in range(29)]
    assert engine.score(ids) == pytest.approx(want, abs=1e-4)
    assert engine.score([3]) == []
    with pytest.raises(ValueError, match="601 ids"):
        engine.score([1] * 601)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_are_named(temperature: float) -> None:
    """Weights that are not numbers gave an empty answer, or an index error from deep inside the sampler."""
    model = toy_model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with Engine(model, slots=1) as engine, pytest.raises(EngineError, match="not finite"):
        ids_of(engine.submit(prompt(1, 5), Sampling(temperature=temperature, max_tokens=3)))


def test_error_reaches_the_streams(model: Decoder, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the thread must be raised at every reader, and the next request must work."""
    want = ids_of(engine.submit(prompt(1, 5), greedy(3)))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "hidden", broken)
        streams = [engine.submit(prompt(1, 5), greedy(3)) for _ in range(2)]
        for stream in streams:
            with pytest.raises(EngineError, match="out of memory"):
                ids_of(stream)
    assert ids_of(engine.submit(prompt(1, 5), greedy(3))) == want


def test_close_ends_streams(model: Decoder) -> None:
    """Closing must not leave a reader waiting for ever, and later requests are refused."""
    engine = Engine(model)
    stream = engine.submit(prompt(1, 5), greedy(590))
    next(stream)
    engine.close()
    ids_of(stream)
    assert stream.finish == "cancelled"
    with pytest.raises(EngineError, match="closed"):
        engine.submit([1], greedy(1))


@pytest.mark.parametrize("used", [False, True])
def test_close_frees_the_model(used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed engine that somebody still holds kept the model, and made itself a cache that nobody would use."""
    made: list[int] = []
    monkeypatch.setattr(engine_module, "Cache", lambda *a, **k: made.append(1) or Cache(*a, **k))
    engine = Engine(toy_model(), slots=1)
    held = [weakref.ref(part) for part in (engine.model, engine.runner, engine._cache)]
    if used:
        engine.submit([1, 2], greedy(500))
    for _ in range(2):
        engine.close()
    gc.collect()
    assert [part() for part in held] == [None] * 3 and made == [1]
    for call in (lambda: engine.submit([1], greedy(1)), lambda: engine.score([1, 2])):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_dropped_engine_ends() -> None:
    """An engine that nobody holds lived on in its thread, model and all; what it was asked before, it still answers."""
    engine = Engine(toy_model(), slots=1)
    held, stream = weakref.ref(engine.model), engine.submit([1, 2], greedy(40))
    thread = engine._thread
    del engine
    assert thread is not None and len(ids_of(stream)) == 40
    thread.join(10)
    gc.collect()
    assert held() is None and not thread.is_alive()


def test_program_exits_while_a_request_runs() -> None:
    """A thread left inside torch at exit crashes or hangs the program that forgot to close its engine."""
    code = (
        "from tests.fakes import toy_model; from moss.engine import Engine, Sampling; "
        "next(Engine(toy_model(max_length=100_000)).submit([1], Sampling(max_tokens=90_000)))"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=300, check=False).returncode == 0
