"""Many owners and one engine: who may wait, who gets the next row, who reads; and that nobody reads what others did."""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import pairwise

import pytest

from moss.engine import Engine, QueueFull, Sampling, Stream
from moss.engine import engine as engine_module
from moss.engine.requests import Queue, Request
from moss.model import Decoder
from tests.fakes import toy_model
from tests.test_engine import Recorder, greedy, ids_of, naive, prompt


@pytest.fixture(scope="module")
def model() -> Decoder:
    return toy_model()


def asked(owner: str) -> Request:
    return Request([1], Sampling(), owner=owner)


def settled(engine: Engine, waiting: int) -> None:
    """Return when so many requests wait and the others have their rows."""
    while len(engine._waiting.all()) != waiting:
        time.sleep(0.001)


def test_nobody_fills_the_queue_for_others() -> None:
    """One owner with a thousand requests made everybody else get QueueFull; the bound must hold all the same."""
    queue = Queue(8, rows=2)
    for _ in range(8):
        queue.put(asked("greedy"))
    with pytest.raises(QueueFull):
        queue.put(asked("greedy"))
    for owner in "ab":
        queue.put(asked(owner))
        with pytest.raises(QueueFull):
            queue.put(asked(owner))
    with pytest.raises(QueueFull, match="10 requests wait"):
        queue.put(asked("c"))
    queue.take()
    with pytest.raises(QueueFull):  # it has a row now, so as many may wait as before
        queue.put(asked("c"))
    queue.returned()
    queue.put(asked("c"))


def test_the_next_row_goes_to_whoever_has_fewest() -> None:
    """Taking turns alone gave every second free row to an owner who held thirty rows already."""
    queue = Queue(20, rows=4)
    for owner in "aaabbc":
        queue.put(asked(owner))

    def taken(*busy: str, excluded: str = "") -> str | None:
        request = queue.take(busy, excluded)
        return None if request is None else request.owner

    assert taken("a", "a", "b") == "c"
    assert taken("a", "a", "b") == "b"
    assert taken("a", "b") == "a"
    assert taken("a", "b") == "b"  # equally many: it is b's turn
    assert taken("a", excluded="a") is None
    assert [taken("a"), taken("a"), taken()] == ["a", "a", None]


def test_rows_are_shared_by_owner(model: Decoder) -> None:
    """The engine must count rows for `take`: those of one owner that came first keep nobody else from the next."""
    gate = threading.Event()
    with Engine(model, slots=3, lookup=False) as engine:
        engine.runner = recorder = Recorder(model, gate.wait)
        first = [engine.submit([80 + n, 1], greedy(1 if n == 0 else 9), owner="a") for n in range(3)]
        gate.set()
        for stream in first[1:]:
            next(stream)
        gate.clear()
        ids_of(first[0])
        settled(engine, 0)
        orders = [("a", 11), ("a", 12), ("b", 21), ("b", 22)]
        streams = [engine.submit([id, 1], greedy(1), owner=owner) for owner, id in orders]
        gate.set()
        for stream in streams:
            ids_of(stream)
    order = [ids[0][0] for ids in recorder.passes if ids[0][0] in (11, 12, 21, 22) and len(ids[0]) == 2]
    assert order[0] == 21


def test_long_prompts_of_one_owner_block_nobody(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four long prompts were read before anybody else's short one got a row; and with four of one owner and one of
    another, the one had every fifth turn instead of every second."""
    monkeypatch.setattr(engine_module, "PIECE", 16)
    gate = threading.Event()
    with Engine(model, slots=8, lookup=False) as engine:
        engine.runner = recorder = Recorder(model, gate.wait)
        long = [engine.submit([n] * 320, greedy(1), owner="a") for n in range(6)]
        short = engine.submit([50] * 48, greedy(1), owner="b")
        gate.set()
        assert len(ids_of(short)) == 1
        for stream in long:
            ids_of(stream)
    read = [ids[0][0] for ids in recorder.passes]
    turns = [turn for turn, id in enumerate(read) if id == 50]
    assert turns[-1] < 12 and [b - a for a, b in pairwise(turns)] == [2] * (len(turns) - 1)
    assert set(read[:60]) == {0, 1, 2, 3, 50}  # no more than four of one owner at once
    assert sorted(Counter(read).values()) == [3] + [20] * 6


def test_burst_reads_its_beginning_once(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts that came together each read the whole meta instruction; the count of what was reused must say
    what really needed no reading, and the answers must not change."""
    monkeypatch.setattr(engine_module, "PIECE", 64)
    prompts = [[*prompt(1, 400), *prompt(seed, 20 + seed)] for seed in range(2, 8)]
    gate = threading.Event()
    with Engine(model, slots=8, lookup=False) as engine:
        engine.runner = recorder = Recorder(model, gate.wait)
        streams: list[Stream] = [
            engine.submit(ids, greedy(5), owner=str(seed % 2), prefix=400) for seed, ids in enumerate(prompts)
        ]
        gate.set()
        assert [ids_of(stream) for stream in streams] == [naive(model, ids, 5) for ids in prompts]
    read = sum(len(piece) for ids in recorder.passes for piece in ids) - 6 * 4  # steps read one id each
    assert read == sum(len(ids) - stream.reused for ids, stream in zip(prompts, streams))
    assert read < 1.1 * 400 + sum(len(ids) - 400 for ids in prompts)
