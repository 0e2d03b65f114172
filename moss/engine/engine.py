"""The engine: many requests over one model, each a stream of tokens.

`submit` hands a prompt of ids to one background thread and returns at once. The thread repeats one step: read a
piece of a prompt, then decode one token for every request that is under way. So requests join and leave at every
step and a long prompt holds up nobody for longer than one piece; prompts that are being read take turns, and those
that wait for a row stand in a bounded queue that is fair to owners (`requests.py`). What a request read stays in its
cache row (`cache.py`), and the next prompt reads only what differs. Where one request decodes alone, what it copies
is guessed and read several tokens at a time (`lookup.py`).

    engine = Engine(model)
    stream = engine.submit(ids, Sampling(temperature=0, stop_ids=frozenset({eom})), conversation="a")
    for token in stream:
        print(token.id, token.logprob)
    print(stream.finish)  # stop | length | time | cancelled

The engine speaks token ids only. Whatever goes wrong in the thread is raised where the stream is read; what is wrong
with one request ends that one. Close the engine, or use it with `with`; one that is dropped ends when its work is done.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from moss.engine.cache import Cache
from moss.engine.fixed import WIDTH, fixed_runner, logits_in_passes
from moss.engine.kernels import rest
from moss.engine.lookup import Account, Lookup
from moss.engine.requests import EngineError, Following, Grammar, Queue, Request, Stream, Token, checked_prompt
from moss.engine.sample import Sampling, choose, logprobs_of
from moss.engine.step import Runner, runner
from moss.model import Decoder

PIECE = 512  # prompt tokens read in one step; also positions scored at once
SHARED_PIECE = 128  # the same while others decode and wait for the step to end
LOOKUP_BYTES = 64 << 20  # of weights: the bundled model, with 15 MB, loses by guesses as often as it wins
READERS = 4  # prompts that are read in turns, but for the first of each owner; more of them would only all be late


class Engine:
    """Continuous batching of up to `slots` requests over one model and one cache; `queue` more may wait for a row, a
    quarter of them only as the first of their owner.

    `max_length` bounds prompt and answer together; it is the model's own length unless a shorter one is given.
    `deterministic` makes the scores of a prompt the same to the last bit whatever else runs or is remembered, at a
    price (`fixed.py`). `lookup` guesses what is copied; None does so for models of LOOKUP_BYTES and more, whose steps
    are dear enough.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        slots: int = 32,
        max_length: int | None = None,
        queue: int = 256,
        deterministic: bool = False,
        lookup: bool | None = None,
    ) -> None:
        self.model, self.config = model, model.config
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        large = sum(each.nbytes for each in (*model.parameters(), *model.buffers())) >= LOOKUP_BYTES
        self.slots, self.lookup = slots, large if lookup is None else lookup
        self._account = Account()
        self.max_length = min(model.config.max_length, max_length or model.config.max_length)
        self._fixed = fixed_runner(model) if deterministic else None
        self.runner: Runner = self._fixed or runner(model)
        self.most = WIDTH if deterministic else sys.maxsize  # tokens of a pass
        self._waiting = Queue(queue, slots)
        self._inbox: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()  # guards the inbox, the thread and `_closed`
        self._wakes: SimpleQueue[Engine | None] = SimpleQueue()  # an engine with something to do; None ends the thread
        weakref.finalize(self, self._wakes.put, None).atexit = False  # (closed at exit instead)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._reset()
        _open_engines.add(self)
        rest()  # of whoever loaded the model; and again of whoever submits

    def __enter__(self) -> Self:
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
        grammar: Grammar | None = None,
        logprobs: int = 0,
        prefix: int = 0,
    ) -> Stream:
        """Continue `ids`; returns at once with the stream of new tokens, the one that stops it included.

        conversation: the cache row is kept under this name, so that the next prompt reads only what is new.
        owner: who asks; owners take turns. grammar: what may come next. logprobs: how many likeliest ids to report.
        prefix: so many leading ids will open other conversations too, and are kept for them.
        ValueError where the prompt is empty, holds an unknown id, or leaves no room for one token; QueueFull where
        too many requests wait; EngineError where the engine is closed.
        """
        vocab_size = self.config.vocab_size
        ids = checked_prompt(ids, self.max_length, vocab_size)
        if not 0 <= prefix <= len(ids):
            raise ValueError(f"prefix is {prefix}; the prompt has {len(ids)} ids")
        if not 0 <= logprobs <= vocab_size:
            raise ValueError(f"logprobs is {logprobs}; ask for 0 to {vocab_size}")
        lookup = Lookup(self._account) if self.lookup else None
        request = Request(ids, sampling, conversation, owner, grammar, logprobs, prefix, lookup)
        self._wake(lambda: self._waiting.put(request))
        rest()
        return request.stream

    def forget(self, conversation: Hashable) -> None:
        """This conversation will not go on: its cache row may be given to others. A closed engine has forgotten all."""
        with contextlib.suppress(EngineError):
            self._wake(lambda: self._inbox.append(lambda: self._cache.forget(conversation)))

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> list[float]:
        """The model's log-probability of ids[1:], each given all ids before it. Runs in the caller's thread."""
        model = self._model()
        if not 1 <= len(ids) <= self.max_length:
            raise ValueError(f"{len(ids)} ids to score; give 1 to {self.max_length}")
        result: list[float] = []
        if len(ids) > 1:
            targets = torch.tensor(ids[1:], device=self.device)
            for logits in self._logits_after(model, ids[:-1]):
                result += logprobs_of(logits, targets[len(result) : len(result) + len(logits)]).tolist()
        return result

    def _logits_after(self, model: Decoder, ids: Sequence[int]) -> Iterator[Tensor]:
        """The scores (…, V) of what follows each of ids (T), in pieces."""
        if self._fixed is not None:
            yield from logits_in_passes(self._fixed, ids)
            return
        hidden = model.hidden(torch.tensor([ids], device=self.device))[0]
        for states in hidden.split(PIECE):
            yield model.logits(states).float()

    def close(self) -> None:
        """End every request as cancelled, stop the thread and let go of the model and the cache."""
        with self._lock:
            first, self._closed = not self._closed, True
            thread = self._thread
            if first and thread is None:
                self._release()
        if thread is not None:
            self._wakes.put(self)
            if thread is not threading.current_thread():
                thread.join()

    def _model(self) -> Decoder:
        """The model; EngineError where the engine is closed."""
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            return self.model

    def _wake(self, post: Callable[[], None]) -> None:
        """Post something for the worker and wake it; starts it where it does not run."""
        with self._lock:
            self._model()
            post()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=_serve, args=(self._wakes,), name="moss-engine", daemon=True)
                self._thread.start()
        self._wakes.put(self)

    # What follows runs in the worker thread only.

    def _reset(self) -> None:
        """Nothing runs, nothing is remembered."""
        config = self.config
        self._reading: list[Request] = []  # they have a row; their prompts are read in turns, the next one first
        self._cache = Cache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            slots=self.slots,
            max_length=self.max_length,
            dtype=self.dtype,
            device=self.device,
        )

    def _release(self) -> None:
        """Let go of all that is large; nothing can run afterwards."""
        del self.model, self.runner, self._fixed, self._cache

    def _work(self) -> bool:
        """Work until nothing is left to do. False when the engine is closed."""
        while True:
            try:
                with torch.inference_mode():
                    while self._take():
                        self._sweep()
                        self._read()
                        if self._cache.live:
                            self._decode()
                break
            except BaseException as error:  # it goes to the requests, and the next one finds a fresh engine
                self._drop(None, error)
                self._reset()
        if not self._closed:
            return True
        self._drop("cancelled")
        self._release()
        return False

    def _take(self) -> bool:
        """Do what was posted. False when nothing is to do, or the engine is closed."""
        with self._lock:
            while self._inbox:
                self._inbox.popleft()()
            return not self._closed and bool(self._waiting or self._reading or self._cache.live)

    def _requests(self) -> list[Request]:
        return [*(slot.user for slot in self._cache.live), *self._reading, *self._waiting.all()]

    def _drop(self, finish: str | None, error: BaseException | None = None) -> None:
        """End all requests, wherever they are; their rows are worth nothing afterwards."""
        dropped = [*(slot.user for slot in self._cache.live), *self._reading]
        self._reading.clear()
        while (request := self._waiting.take()) is not None:
            dropped.append(request)
        for request in dropped:
            self._waiting.returned()
            request.stream._end(finish, error)

    def _sweep(self) -> None:
        """End what was cancelled or ran out of time."""
        now = time.monotonic()
        for request in self._requests():
            if request.stream._cancelled:
                self._end(request, "cancelled")
            elif now > request.deadline:
                self._end(request, "time")

    def _read(self) -> None:
        """Read a piece of the prompts that have a row; a prompt that is read joins those that decode.

        Owners take turns, and the prompts of each. What another has read by then need not be read again.
        """
        budget = SHARED_PIECE if self._cache.live else PIECE
        while budget > 0:
            self._admit()
            if not self._reading:
                return
            request = self._reading[0]
            slot = request.slot
            assert slot is not None
            request.stream.reused = self._cache.reuse(slot, request.ids) - request.num_read
            piece = request.ids[len(slot.ids) : len(slot.ids) + min(budget, self.most)]
            hidden = self._forward(slot.row, [len(slot.ids)], [piece])[:, -1]
            slot.ids += piece
            request.num_read += len(piece)
            budget -= len(piece)
            self._reading.sort(key=lambda other: (other.owner == request.owner, other is request))
            if len(slot.ids) == len(request.ids):
                self._cache.keep(slot, request.prefix)
                self._cache.join(slot)
                self._reading.remove(request)
                budget = min(budget, SHARED_PIECE)
                self._choose([request], self._logits(hidden))

    def _admit(self) -> None:
        """Give a waiting request a row, if a row is free and few prompts are being read, or none of its owner's."""
        if not self._waiting or not self._cache.room:
            return
        readers = {request.owner for request in self._reading} if len(self._reading) >= READERS else ()
        request = self._waiting.take([slot.user.owner for slot in self._cache.slots if slot.user], readers)
        if request is None:
            return
        self._reading.append(request)
        request.slot = self._cache.acquire(request, request.conversation)
        if request.sampling.repetition_penalty != 1:
            request.seen = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.device)
            request.seen[torch.tensor(request.ids, device=self.device)] = True

    def _decode(self) -> None:
        """One token for every request that is under way; several for one that is alone and copies."""
        live = self._cache.live
        requests: list[Request] = [slot.user for slot in live]
        lookup = requests[0].lookup if len(requests) == 1 else None
        if lookup is not None and not self._account.waits():
            self._look_up(requests[0], lookup)
            return
        logits = []
        for part in (live[first : first + self.most] for first in range(0, len(live), self.most)):
            last = [slot.user.ids[-1] for slot in part]
            hidden = self._forward(part[0].row, [len(slot.ids) for slot in part], [[id] for id in last])
            logits.append(self._logits(hidden[:, -1]))
            for slot, id in zip(part, last):
                slot.ids.append(id)
        self._choose(requests, logits[0] if len(logits) == 1 else torch.cat(logits))

    def _look_up(self, request: Request, lookup: Lookup) -> None:
        """Read the last token and a guess of what follows in one pass, and go as far as the guess was right.

        Each token is chosen exactly as it would be step by step; keys of guesses that were wrong are overwritten.
        """
        slot, stream = request.slot, request.stream
        assert slot is not None
        room = min(request.limit, self.max_length) - len(request.ids) - 1
        draft = lookup.propose(request.ids, room)
        started = time.perf_counter()
        read = [request.ids[-1], *draft]
        logits = self._logits(self._forward(slot.row, [len(slot.ids)], [read])[0])  # (T, V)
        stream.drafted += len(draft)
        accepted = 0
        for place, id in enumerate(read):
            if slot.user is not request or request.ids[-1] != id:
                break
            accepted = place
            stream.accepted += place > 0
            slot.ids.append(id)
            self._choose([request], logits[place : place + 1])
        seconds = time.perf_counter() - started
        if draft:
            lookup.passed(accepted, seconds)
        else:
            lookup.stepped(seconds)

    def _forward(self, first: int, starts: list[int], ids: list[list[int]]) -> Tensor:
        """Run the model over new ids (B, T) of neighbouring rows; returns their hidden states (B, T, D)."""
        window = self._cache.window(first, starts, len(ids[0]))
        batch = torch.tensor(ids, device=self.device)
        return self.runner.hidden(batch, positions=window.positions, cache=window)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, D) -> scores (B, V) in float32."""
        logits = self.runner.logits(hidden).float()
        if not all(map(math.isfinite, torch.stack(logits.aminmax()).tolist())):
            raise EngineError(
                f"the model's scores are not finite: its weights are damaged, or too large for {self.dtype}"
            )
        return logits

    def _choose(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Pick the next token of each row from its scores (B, V) and deliver it."""
        masks: list[Tensor | None] = [None] * len(requests)
        errors: dict[int, Exception] = {}
        for row, request in enumerate(requests):
            # The likeliest of all ids is also the likeliest of those that may come, if it may: it needs no mask.
            if request.following is not None and not request.sampling.greedy:
                with _noted(errors, row):
                    masks[row] = _allowed(request.following, logits.shape[-1])
        ids = self._pick(requests, logits, masks)
        for row, request in enumerate(requests):
            if request.following is not None and row not in errors:
                with _noted(errors, row):
                    ids[row] = self._follow(request, logits[row : row + 1], ids[row])
        tops = self._tops(logits, max(request.num_top for request in requests))
        logprobs = logprobs_of(logits, torch.tensor(ids, device=self.device)).tolist()
        for row, (request, id, logprob, top) in enumerate(zip(requests, ids, logprobs, tops)):
            if row in errors:
                self._end(request, None, errors[row])
            else:
                self._deliver(request, Token(id, logprob, top[: request.num_top]))

    def _pick(self, requests: Sequence[Request], logits: Tensor, masks: Sequence[Tensor | None]) -> list[int]:
        """An id for each row of scores (B, V), of those that its mask allows."""
        return choose(
            _masked(logits, masks),
            [request.sampling for request in requests],
            [request.random.random() for request in requests],
            seen=[request.seen for request in requests],
            lengths=[request.num_new for request in requests],
        )

    def _follow(self, request: Request, logits: Tensor, id: int) -> int:
        """Lead a request's grammar on by an id, or by the likeliest that it allows; returns which."""
        assert request.following is not None
        if request.sampling.greedy:
            with contextlib.suppress(ValueError):
                request.following.advance(id)
                return id
            id = self._pick([request], logits, [_allowed(request.following, logits.shape[-1])])[0]
        request.following.advance(id)
        return id

    def _tops(self, logits: Tensor, number: int) -> Iterable[tuple[tuple[int, float], ...]]:
        """For each row the `number` likeliest ids with their log-probabilities."""
        if number == 0:
            return itertools.repeat(())
        values, ids = logits.log_softmax(-1).topk(number)
        return [tuple(zip(*row)) for row in zip(ids.tolist(), values.tolist())]

    def _deliver(self, request: Request, token: Token) -> None:
        request.ids.append(token.id)
        request.stream._tokens.put(token)
        if request.seen is not None:
            request.seen[token.id] = True
        if token.id in request.sampling.stop_ids:
            self._end(request, "stop")
        elif len(request.ids) >= min(request.limit, self.max_length):
            self._end(request, "length")

    def _end(self, request: Request, finish: str | None, error: BaseException | None = None) -> None:
        """Take a request out from wherever it is, keep what its row holds, and close its stream."""
        slot = request.slot
        if slot is None:
            self._waiting.remove(request)
        else:
            if request in self._reading:
                self._reading.remove(request)
            else:
                self._cache.leave(slot)
            self._cache.release(slot)
            self._waiting.returned()
        request.stream._end(finish, error)


@contextlib.contextmanager
def _noted(errors: dict[int, Exception], row: int) -> Iterator[None]:
    """Note an error of this row's grammar. A grammar is anybody's code; it must end nobody else's request."""
    try:
        yield
    except Exception as error:
        errors[row] = error


def _allowed(following: Following, vocab_size: int) -> Tensor | None:
    """Which ids may come next, bool (V,) or None for all. EngineError where none may, TypeError for what is no mask."""
    mask = following.mask()
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.dim() != 1:
        raise TypeError(f"the mask of a grammar is bool (V,), not {mask.dtype} {tuple(mask.shape)}")
    if len(mask) != vocab_size:
        mask = pad(mask, (0, vocab_size - len(mask)))  # ids that the tokenizer does not have
    if not mask.any():
        raise EngineError("the grammar of this request allows no token to follow")
    return mask


def _masked(logits: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """Scores (B, V) with -inf where a row's mask forbids the id."""
    if all(mask is None for mask in masks):
        return logits
    rows = [
        row if mask is None else torch.where(mask.to(row.device), row, -torch.inf)
        for row, mask in zip(logits.split(1), masks)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _serve(wakes: SimpleQueue[Engine | None]) -> None:
    """The worker thread. It holds no engine that has nothing to do, so that one that is dropped is freed."""
    while (engine := wakes.get()) is not None and engine._work():
        del engine


_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that is still inside torch when the interpreter goes down would crash it."""
    for engine in list(_open_engines):
        engine.close()
