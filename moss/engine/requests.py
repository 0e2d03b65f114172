"""What the engine and its callers share: a request's stream of tokens, and the queue that requests wait in.

The queue is bounded and fair: the next row goes to the owner who has the fewest, and among equals they take turns, each
with its oldest request. So one who asks for a hundred things at once delays the others by one thing a turn.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import InitVar, dataclass
from itertools import zip_longest
from queue import SimpleQueue
from typing import Protocol

from torch import Tensor

from moss.engine.cache import Slot
from moss.engine.lookup import Lookup
from moss.engine.sample import Sampling


class EngineError(RuntimeError):
    """The engine failed while it worked on a request; the cause is attached."""


class QueueFull(EngineError):
    """As many requests wait as may wait; the same request can be put again later."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated id, its log-probability under the model, and the likeliest ids where they were asked for."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Following(Protocol):
    """Where a grammar stands in one answer. An error from here ends this answer alone."""

    def mask(self) -> Tensor | None:
        """Which ids may come next, bool (V,) on the CPU; None where all may."""
        ...

    def advance(self, id: int) -> None:
        """Take this id. ValueError where it cannot come; all is then as before.

        It may take what the mask leaves out, such as another way to cut the same text into ids.
        """
        ...


class Grammar(Protocol):
    """What an answer may look like (`grammar.py` has the one of commands)."""

    def start(self) -> Following: ...


class Stream:
    """The tokens of one request, in order; `finish` says why it ended, None while it runs."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.reused = 0  # prompt tokens that needed no reading, because the cache held them
        self.position = 0  # place in the queue, 1 is next; 0 once the engine works on it
        self.drafted = self.accepted = 0  # tokens guessed by prompt lookup, and those the model then said
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
        self.position = 0
        self.finish, self._error = finish, error
        self._tokens.put(None)


def checked_prompt(ids: Sequence[int], max_length: int, vocab_size: float) -> list[int]:
    """The prompt as a list. ValueError where it is empty, leaves no room for one token, or holds an unknown id."""
    ids = list(ids)
    if not ids:
        raise ValueError("the prompt is empty; give at least one id")
    if len(ids) >= max_length:
        raise ValueError(f"the prompt has {len(ids)} tokens; at most {max_length - 1} fit, so shorten it")
    check_ids(ids, vocab_size, "the prompt")
    return ids


def check_ids(ids: Sequence[int], vocab_size: float, where: str) -> None:
    """ValueError for an id that the model does not have; `where` it stood is said."""
    for id in ids:
        if not 0 <= id < vocab_size:
            raise ValueError(f"id {id} in {where} is not in the vocabulary of {vocab_size}; is this its tokenizer?")


@dataclass(eq=False)
class Request:
    """What the worker knows about one stream."""

    ids: list[int]  # prompt and answer so far
    sampling: Sampling
    conversation: Hashable | None = None
    owner: str = ""
    grammar: InitVar[Grammar | None] = None
    num_top: int = 0
    prefix: int = 0  # so many leading ids will open other prompts too
    lookup: Lookup | None = None
    slot: Slot | None = None
    num_read: int = 0  # ids of the prompt that were read, where the others were reused
    seen: Tensor | None = None  # (V,) bool, only with a repetition penalty

    def __post_init__(self, grammar: Grammar | None) -> None:
        self.stream = Stream(len(self.ids))
        self.following = None if grammar is None else grammar.start()
        self.limit = len(self.ids) + self.sampling.max_tokens
        seconds = self.sampling.time_limit
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds
        self.random = random.Random(self.sampling.seed)  # its own numbers, so that neighbours change nothing

    @property
    def num_new(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.stream.prompt_tokens


class Queue:
    """Requests that wait: at most `size`, and one more for each of the `rows` that is free. Any thread may use it.

    Whoever waits already leaves a quarter of `size` to owners of whom nothing does, so that nobody can fill the queue
    for all others.
    """

    def __init__(self, size: int, rows: int) -> None:
        if size < 1:
            raise ValueError(f"queue is {size}; at least one request must be able to wait")
        self.size, self.rows = size, rows
        self.taken = 0  # requests that were taken and have a row
        self._owners: dict[str, deque[Request]] = {}  # in the order of their turns; none is empty
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._owners)

    def all(self) -> list[Request]:
        """Every request that waits, in the order of turns, in which they are taken while all have equally many rows."""
        with self._lock:
            return self._ordered()

    def put(self, request: Request) -> None:
        """Let a request wait; QueueFull where no more may."""
        with self._lock:
            waiting = sum(map(len, self._owners.values()))
            kept = self.size // 4 if request.owner in self._owners else 0
            if waiting + self.taken >= self.size + self.rows - kept:
                raise QueueFull(f"{waiting} requests wait already, which is all that may; try again in a while")
            self._owners.setdefault(request.owner, deque()).append(request)
            self._number()

    def take(self, busy: Iterable[str] = (), excluded: Collection[str] = ()) -> Request | None:
        """The oldest request of the owner who has the fewest rows, and among equals of the one whose turn it is.

        He goes to the end of the line. busy: the owner of each row in use. excluded: owners who get no row now.
        """
        with self._lock:
            rows = Counter(busy)
            owners = [owner for owner in self._owners if owner not in excluded]
            if not owners:
                return None
            owner = min(owners, key=lambda owner: rows[owner])
            requests = self._owners[owner]
            request = requests.popleft()
            del self._owners[owner]
            if requests:
                self._owners[owner] = requests
            request.stream.position = 0
            self.taken += 1
            self._number()
            return request

    def returned(self) -> None:
        """A request that was taken has given its row back."""
        with self._lock:
            self.taken -= 1

    def remove(self, request: Request) -> None:
        """This request waits no longer."""
        with self._lock:
            requests = self._owners[request.owner]
            requests.remove(request)
            if not requests:
                del self._owners[request.owner]
            self._number()

    def _ordered(self) -> list[Request]:
        return [request for turn in zip_longest(*self._owners.values()) for request in turn if request is not None]

    def _number(self) -> None:
        for place, request in enumerate(self._ordered(), 1):
            request.stream.position = place
