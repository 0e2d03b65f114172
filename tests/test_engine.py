"""The engine against a naive generator that recomputes everything, and how requests end."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moss.engine import Engine, EngineError, Sampling, Stream
from moss.engine import engine as engine_module
from moss.model import Decoder
from tests.fakes import toy_model

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
    streams = {seed: engine.submit(prompt(seed, n), greedy(k)) for seed, (n, k) in wanted.items()}
    got = {seed: ids_of(stream) for seed, stream in streams.items()}
    assert got == {seed: naive(model, prompt(seed, n), k) for seed, (n, k) in wanted.items()}


def test_long_prompt_is_read_in_pieces(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces must join without a seam, and others must go on between them."""
    monkeypatch.setattr(engine_module, "PIECE", 16)
    with Engine(model) as engine:
        streams = [engine.submit(prompt(s, n), greedy(12)) for s, n in ((1, 5), (2, 200), (3, 33))]
        assert [ids_of(s) for s in streams] == [naive(model, prompt(s, n), 12) for s, n in ((1, 5), (2, 200), (3, 33))]


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
    [([], "empty"), ([1] * 64, "at most 63 fit"), ([3, VOCAB], f"id {VOCAB} is not"), ([-1], "id -1 is not")],
)
def test_bad_prompts(model: Decoder, ids: list[int], message: str) -> None:
    """A prompt that cannot work is refused at submit, with the value, not in the worker."""
    with Engine(model, max_length=64) as engine, pytest.raises(ValueError, match=message):
        engine.submit(ids, greedy(1))


def test_cancel_frees_the_row(model: Decoder) -> None:
    """A cancelled request must stop within steps and let the one waiting behind it run."""
    with Engine(model, slots=1) as engine:
        running = engine.submit(prompt(1, 10), greedy(500))
        waiting = engine.submit(prompt(2, 10), greedy(5))
        dropped = engine.submit(prompt(3, 10), greedy(5))
        next(running)
        dropped.cancel()
        running.cancel()
        assert len(ids_of(running)) < 500 and running.finish == "cancelled"
        assert ids_of(waiting) == naive(model, prompt(2, 10), 5)
        assert ids_of(dropped) == [] and dropped.finish == "cancelled"


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
    got = ids_of(engine.submit(start, greedy(40, repetition_penalty=1e9)))
    # A negative logit times 1e9 is below any other; a positive one becomes about zero: both lose to fresh ids
    # with positive logits, of which the toy model has dozens.
    assert len(set(got)) == len(got) and not set(got) & set(start)


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
        patch.setattr(model, "hidden", broken)
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


def test_program_exits_while_a_request_runs() -> None:
    """A thread left inside torch at exit crashes or hangs the program that forgot to close its engine."""
    code = (
        "from tests.fakes import toy_model; from moss.engine import Engine, Sampling; "
        "next(Engine(toy_model(max_length=100_000)).submit([1], Sampling(max_tokens=90_000)))"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False).returncode == 0
