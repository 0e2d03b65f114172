"""The engine: many requests over one model, each a stream of tokens.

`submit` hands a prompt of ids to one background thread and returns at once. The thread repeats one step:
read a piece of at most one waiting prompt, then decode one token for every request that is under way. So
requests join and leave at every step and a long prompt holds up nobody for longer than one piece. What a
request read stays in its cache row (`cache.py`), and the next prompt reads only what differs.

    engine = Engine(model)
    stream = engine.submit(ids, Sampling(temperature=0, stop_ids=frozenset({eom})), conversation="a")
    for token in stream:
        print(token.id, token.logprob)
    print(stream.finish)  # stop | length | time | cancelled

The engine speaks token ids only. Whatever goes wrong in the thread is raised where the stream is read.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from moss.engine.cache import Cache, Slot
from moss.engine.sample import Plan, Sampling, logprobs_of
from moss.model import Decoder

PIECE = 512  # prompt tokens read between two decode steps; also positions scored at once


class EngineError(RuntimeError):
    """The engine failed while it worked on a request; the cause is attached."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated id, its log-probability under the model, and the likeliest ids where they were asked for."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Stream:
    """The tokens of one request, in order; `finish` says why it ended, None while it runs."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.reused = 0  # prompt tokens that some cache row already held
        self.finish: str | None = None
        self._tokens: SimpleQueue[Token | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._cancelled = False

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        token = self._tokens.get()
        if token is not None:
            return token
        self._tokens.put(None)  # the end stays readable
        if self._error is not None:
            told = str(self._error) if isinstance(self._error, EngineError) else f"the engine failed: {self._error!r}"
            raise EngineError(told) from self._error
        raise StopIteration

    def cancel(self) -> None:
        """Ask the request to end; its row is free at the engine's next step. Tokens already made can be read."""
        self._cancelled = True

    def _end(self, finish: str | None, error: BaseException | None = None) -> None:
        self.finish, self._error = finish, error
        self._tokens.put(None)


class _Request:
    """What the worker knows about one stream."""

    def __init__(self, ids: list[int], sampling: Sampling, conversation: Hashable | None, owner: str, num_top: int):
        self.ids = ids  # prompt and answer so far
        self.sampling = sampling
        self.conversation = conversation
        self.owner = owner
        self.num_top = num_top
        self.stream = Stream(len(ids))
        self.limit = len(ids) + sampling.max_tokens
        self.deadline = math.inf if sampling.time_limit is None else time.monotonic() + sampling.time_limit
        self.random = random.Random(sampling.seed)  # its own numbers, so that neighbours change nothing
        self.slot: Slot | None = None
        self.seen: Tensor | None = None  # (V,) bool, only with a repetition penalty


class _Border:
    """Around the worker's loop: whatever ends it goes to the requests, and the next one finds a fresh engine."""

    def __init__(self, fail: Callable[[BaseException], None]) -> None:
        self.fail = fail

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is not None:
            self.fail(error)
        return True


class Engine:
    """Continuous batching of up to `slots` requests over one model and one cache.

    `max_length` bounds prompt and answer together; it is the model's own length unless a shorter one is given.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        slots: int = 32,
        device: torch.device | str | None = None,
        max_length: int | None = None,
    ) -> None:
        self.model = (model if device is None else model.to(device)).eval()
        weight = next(self.model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.slots = slots
        self.max_length = min(model.config.max_length, max_length or model.config.max_length)
        self._inbox: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()  # guards the inbox, the thread and `_closed`
        self._thread: threading.Thread | None = None
        self._closed = False
        self._reset()
        _open_engines.add(self)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        conversation: Hashable | None = None,
        owner: str = "",
        grammar: None = None,
        logprobs: int = 0,
    ) -> Stream:
        """Continue `ids`; returns at once with the stream of new tokens, the one that stops it included.

        conversation: the cache row is kept under this name, so that the next prompt reads only what is new.
        owner: who asks. grammar: what may come next; there is none yet. logprobs: how many likeliest ids to report.
        ValueError where the prompt is empty, holds an unknown id, or leaves no room for one token.
        """
        ids = list(ids)
        vocab_size = self.model.config.vocab_size
        if not ids:
            raise ValueError("the prompt is empty; give at least one id")
        if len(ids) >= self.max_length:
            raise ValueError(f"the prompt has {len(ids)} tokens; at most {self.max_length - 1} fit, so shorten it")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            bad = next(id for id in ids if not 0 <= id < vocab_size)
            raise ValueError(f"id {bad} is not in the model's vocabulary of {vocab_size}; is this its tokenizer?")
        if grammar is not None:
            raise ValueError("this engine follows no grammar; leave it None")
        if not 0 <= logprobs <= vocab_size:
            raise ValueError(f"logprobs is {logprobs}; ask for 0 to {vocab_size}")
        request = _Request(ids, sampling, conversation, owner, logprobs)
        self._post(lambda: self._waiting.append(request))
        return request.stream

    def forget(self, conversation: Hashable) -> None:
        """This conversation will not go on: its cache row may be given to others. A closed engine has forgotten all."""
        with contextlib.suppress(EngineError):
            self._post(lambda: self._cache.forget(conversation))

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> list[float]:
        """The model's log-probability of ids[1:], each given all ids before it. Runs in the caller's thread."""
        if not 1 <= len(ids) <= self.max_length:
            raise ValueError(f"{len(ids)} ids to score; give 1 to {self.max_length}")
        result: list[float] = []
        if len(ids) == 1:
            return result
        row = torch.tensor([ids], device=self.device)  # (1, T)
        hidden = self.model.hidden(row[:, :-1])[0]
        for states, targets in zip(hidden.split(PIECE), row[0, 1:].split(PIECE)):
            result += logprobs_of(self.model.logits(states).float(), targets).tolist()
        return result

    def close(self) -> None:
        """End every request as cancelled and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _post(self, action: Callable[[], None]) -> None:
        """Let the worker do something before its next step; starts it where it does not run."""
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed")
            self._inbox.append(action)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="moss-engine", daemon=True)
                self._thread.start()
            self._changed.notify()

    # What follows runs in the worker thread only.

    def _reset(self) -> None:
        """Nothing waits, nothing runs, nothing is remembered."""
        config = self.model.config
        self._waiting: deque[_Request] = deque()
        self._reading: _Request | None = None
        self._plan: Plan | None = None  # of the rows that decode; None after any of them joined or left
        self._cache = Cache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            slots=self.slots,
            max_length=self.max_length,
            dtype=self.dtype,
            device=self.device,
        )

    def _work(self) -> None:
        open_ = True
        while open_:
            with _Border(self._fail), torch.inference_mode():
                while open_ := self._take():
                    self._sweep()
                    self._read()
                    if self._cache.live:
                        self._decode()

    def _take(self) -> bool:
        """Do what was posted, waiting for it when there is nothing else to do. False when the engine is closed."""
        with self._changed:
            while not (self._closed or self._inbox or self._waiting or self._reading or self._cache.live):
                self._changed.wait()
            while self._inbox:
                self._inbox.popleft()()
            if not self._closed:
                return True
        for request in self._requests():
            request.stream._end("cancelled")
        return False

    def _requests(self) -> list[_Request]:
        reading = [self._reading] if self._reading else []
        return [slot.user for slot in self._cache.live] + reading + list(self._waiting)

    def _fail(self, error: BaseException) -> None:
        for request in self._requests():
            request.stream._end(None, error)
        self._reset()

    def _sweep(self) -> None:
        """End what was cancelled or ran out of time."""
        now = time.monotonic()
        for request in self._requests():
            if request.stream._cancelled:
                self._end(request, "cancelled")
            elif now > request.deadline:
                self._end(request, "time")

    def _read(self) -> None:
        """Read up to PIECE tokens of the prompts that wait, in their order; a prompt that is read joins the others."""
        budget = PIECE
        while budget > 0 and (request := self._reading or self._admit()):
            slot = request.slot
            assert slot is not None
            piece = request.ids[len(slot.ids) : len(slot.ids) + budget]
            hidden = self._forward(slot.row, [len(slot.ids)], [piece])
            slot.ids += piece
            budget -= len(piece)
            if len(slot.ids) == len(request.ids):
                self._cache.join(slot)
                self._reading = self._plan = None
                self._choose([request], Plan([request.sampling], self.device), hidden)

    def _admit(self) -> _Request | None:
        """The next waiting request with a row of its own; None where nobody waits or no row is free."""
        if not self._waiting:
            return None
        request = self._waiting[0]
        slot = self._cache.acquire(request.ids, request, request.conversation)
        if slot is None:
            return None
        self._waiting.popleft()
        request.slot, self._reading = slot, request
        request.stream.reused = len(slot.ids)
        if request.sampling.repetition_penalty != 1:
            request.seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.device)
            request.seen[torch.tensor(request.ids, device=self.device)] = True
        return request

    def _decode(self) -> None:
        """One token for every request that is under way."""
        live = self._cache.live
        requests: list[_Request] = [slot.user for slot in live]
        last = [request.ids[-1] for request in requests]
        hidden = self._forward(live[0].row, [len(slot.ids) for slot in live], [[id] for id in last])
        for slot, id in zip(live, last):
            slot.ids.append(id)
        if self._plan is None:
            self._plan = Plan([request.sampling for request in requests], self.device)
        self._choose(requests, self._plan, hidden)

    def _forward(self, first: int, starts: list[int], ids: list[list[int]]) -> Tensor:
        """Run the model over new ids of neighbouring rows; returns the last position's hidden states (B, D)."""
        window = self._cache.window(first, starts, len(ids[0]))
        batch = torch.tensor(ids, device=self.device)
        return self.model.hidden(batch, positions=window.positions, cache=window)[:, -1]

    def _choose(self, requests: list[_Request], plan: Plan, hidden: Tensor) -> None:
        """Pick the next token of each row from its hidden state (B, D) and deliver it."""
        logits = self.model.logits(hidden).float()  # (B, V)
        if not logits.isfinite().all():
            raise EngineError(
                f"the model's scores are not finite: its weights are damaged, or too large for {self.dtype}"
            )
        seen = None
        if plan.penalizes:
            nothing = logits.new_zeros(logits.shape[-1], dtype=torch.bool)
            seen = torch.stack([nothing if request.seen is None else request.seen for request in requests])
        uniform = [] if plan.greedy else [request.random.random() for request in requests]
        chosen = plan.choose(logits, seen, uniform)
        tops = self._tops(logits, max(request.num_top for request in requests))
        for request, id, logprob, top in zip(requests, chosen.tolist(), logprobs_of(logits, chosen).tolist(), tops):
            self._deliver(request, Token(id, logprob, top[: request.num_top]))

    def _tops(self, logits: Tensor, number: int) -> Iterable[tuple[tuple[int, float], ...]]:
        """For each row the `number` likeliest ids with their log-probabilities."""
        if number == 0:
            return itertools.repeat(())
        values, ids = logits.log_softmax(-1).topk(number)
        return [tuple(zip(*row)) for row in zip(ids.tolist(), values.tolist())]

    def _deliver(self, request: _Request, token: Token) -> None:
        request.ids.append(token.id)
        request.stream._tokens.put(token)
        if request.seen is not None:
            request.seen[token.id] = True
        if token.id in request.sampling.stop_ids:
            self._end(request, "stop")
        elif len(request.ids) >= min(request.limit, self.max_length):
            self._end(request, "length")

    def _end(self, request: _Request, finish: str) -> None:
        """Take a request out from wherever it is, keep what its row holds, and close its stream."""
        slot = request.slot
        if slot is None:
            self._waiting.remove(request)
        else:
            if request is self._reading:
                self._reading = None
            else:
                self._cache.leave(slot)
                self._plan = None
            self._cache.release(slot)
        request.stream._end(finish)


_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that is still inside torch when the interpreter goes down would crash it."""
    for engine in list(_open_engines):
        engine.close()
