"""Engines on other machines: OpenAI-compatible completion servers that take token ids, behind the same `submit`.

    engine = RemoteEngine("http://gpu1:8000/v1", "moss-16b")
    for token in engine.submit(ids, Sampling(temperature=0, max_tokens=64)):
        print(token.id, token.logprob)

vLLM and SGLang hold the models that one machine cannot; `moss.answer` does not see the difference. A prompt goes to
`/completions` as a list of ids, and the new ids come back in one of these forms, tried in this order:

* `choices[].token_ids`, what `return_token_ids` asks for: vLLM (since August 2025), SGLang (since July 2026);
* `choices[].logprobs.tokens` spelt `token_id:123`, what `return_tokens_as_token_ids` asks for: vLLM before that;
* `choices[].logprobs.content[].id`: llama.cpp.

A server that sends text alone is refused: text cut into tokens once more is not what the model said. Stop ids and
`max_tokens` are held here as well, for servers that do not know `stop_token_ids`. A grammar cannot be followed there,
nor a length penalty, and both are refused; `moss.answer` asks for no grammar and ends a pass that leaves the format.
A key, where the server wants one, stands in the environment variable MOSS_API_KEY; it goes to this server alone, and
into no message.

Whatever goes wrong is an `EngineError` of one line. All requests of a server share one background thread; cancelling
one closes its connection, by which the server knows that nobody listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Self, TypeVar, cast

import httpx2

from moss.engine.requests import EngineError, Grammar, Stream, Token, check_ids, checked_prompt
from moss.engine.sample import Sampling

KEY = "MOSS_API_KEY"
CONNECT = 10.0  # seconds in which a server has to take the connection and to name its models
PATIENCE = 300.0  # seconds without a word from the server: its queue and the reading of a long prompt
MAX_LENGTH = 2048  # tokens of prompt and answer where neither the server nor the caller says
HINTS = {
    401: f"; put the server's key into the environment variable {KEY}",
    403: f"; put the server's key into the environment variable {KEY}",
    404: "; is this the server's address (most end in /v1), and the model's name?",
    429: "; try again in a while",
    503: "; try again in a while",
}
GARBAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)  # of reading JSON from afar
REASONS = (  # the first that fits
    ((httpx2.ConnectError, httpx2.ConnectTimeout), "does not answer; is the server running?"),
    (httpx2.TimeoutException, "took the request, but sent nothing for too long"),
    (httpx2.SSEError, "does not stream its answer"),
    (httpx2.HTTPError, "broke off its answer"),
    (GARBAGE, "sent something else than an answer"),
)

ID = "token_id:"  # how vLLM writes an id where a text belongs

T = TypeVar("T")


class Refused(EngineError):
    """The server answered with an error: the HTTP `status`, and the `code` that stood in it."""

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Server:
    """An OpenAI-compatible server and one of its models. Its requests run on one background thread until `close`."""

    def __init__(
        self, base_url: str, name: str | None = None, *, max_length: int | None = None, patience: float = PATIENCE
    ) -> None:
        """`name` may be left out where the server has one model. EngineError where it does not answer.

        max_length: bounds prompt and answer together, in tokens; the model's own length where the server tells it.
        patience: seconds without a word after which a request is given up.
        """
        self.url = _address(base_url)
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"{KEY} holds characters that no key has; copy it anew")
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(patience, connect=CONNECT, pool=None),
            limits=httpx2.Limits(max_connections=None),  # the server has the queue
            trust_env=httpx2.URL(self.url).host not in ("localhost", "127.0.0.1", "::1"),  # no proxy to oneself
        )
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()  # under way; touched in the thread only
        self._lock = threading.Lock()  # guards `_closed`: nothing may be started after the end
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="moss-remote", daemon=True)
        self._thread.start()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.name, length = self._model(name)
            undo.pop_all()
        self.max_length = min(filter(None, (length, max_length)), default=MAX_LENGTH)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forget(self, conversation: Hashable) -> None:
        """Nothing: what a server keeps of a conversation is its own affair."""

    def close(self) -> None:
        """End every request as cancelled and stop the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def events(
        self, path: str, body: dict[str, Any], read: Callable[[Any], T], time_limit: float | None = None
    ) -> Generator[T]:
        """What `read` makes of each JSON object of a streamed answer, as it comes; closing this ends the request.

        EngineError for what goes wrong, in `read` as well; TimeoutError after `time_limit` seconds.
        """
        arrived: SimpleQueue[T | asyncio.Task[None]] = SimpleQueue()

        def take(chunk: Any) -> None:
            arrived.put(read(chunk))

        cancel = self._start(self._post(path, body, take, time_limit), arrived.put)
        try:
            while not isinstance(item := arrived.get(), asyncio.Task):
                yield item
            if item.cancelled():
                raise EngineError("the engine was closed")
            item.result()
        finally:
            cancel()

    def _model(self, name: str | None) -> tuple[str, int | None]:
        """The name of the model to ask, and its length where the server tells it."""
        found: SimpleQueue[asyncio.Task[list[dict[str, Any]]]] = SimpleQueue()
        self._start(self._models(), found.put)
        models = found.get().result()
        if name is None:
            if len(models) != 1:
                served = ", ".join(str(model.get("id")) for model in models[:10]) or "it does not list them"
                raise ValueError(f"name one of the models of {self.url}, as in {self.url}#name ({self._clean(served)})")
            name = str(models[0].get("id"))
        known = next((model for model in models if model.get("id") == name), {})
        length = known.get("max_model_len") or known.get("context_length")
        return name, length if isinstance(length, int) and length > 0 else None

    def _start(self, work: Coroutine[Any, Any, T], done: Callable[[asyncio.Task[T]], object]) -> Callable[[], None]:
        """Run `work` in the thread, where `done` gets its task at the end; returns what cancels it."""
        begun: list[asyncio.Task[T]] = []

        def begin() -> None:
            begun.append(self._loop.create_task(work))
            self._tasks.add(begun[0])
            begun[0].add_done_callback(self._tasks.discard)
            begun[0].add_done_callback(done)

        def cancel() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and so everything has ended
                self._loop.call_soon_threadsafe(lambda: begun[0].cancel())

        with self._lock:
            if self._closed:
                work.close()
                raise EngineError("the engine is closed")
            self._loop.call_soon_threadsafe(begin)
        return cancel

    def _clean(self, text: str) -> str:
        """Text from elsewhere as a part of one line, without the key."""
        text = " ".join(text.replace(self._key, "***").split()) if self._key else " ".join(text.split())
        return text if len(text) <= 400 else text[:399] + "…"

    # What follows runs in the thread.

    def _work(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        async with self._client:
            await self._stop.wait()
            for task in self._tasks:
                task.cancel()
            while others := asyncio.all_tasks() - {asyncio.current_task()}:  # and what they have begun
                await asyncio.gather(*others, return_exceptions=True)

    async def _models(self) -> list[dict[str, Any]]:
        """The models that the server lists; none where it has no list."""
        with self._border():
            response = await self._client.get(f"{self.url}/models", timeout=CONNECT)
            if response.status_code in (404, 405, 501):
                return []
            if response.status_code != 200:
                raise self._refusal(response.status_code, response.content)
            return [dict(model) for model in response.json()["data"]]

    async def _post(
        self, path: str, body: dict[str, Any], take: Callable[[Any], object], time_limit: float | None = None
    ) -> None:
        """Send a request and hand each JSON object of the streamed answer to `take`, until that says True: enough."""
        body = {"model": self.name, "stream": True, "stream_options": {"include_usage": True}, **body}
        with self._border():
            async with asyncio.timeout(time_limit), self._client.stream("POST", self.url + path, json=body) as response:
                if response.status_code != 200:
                    raise self._refusal(response.status_code, await response.aread())
                events = cast(AsyncGenerator[httpx2.ServerSentEvent], aiter(httpx2.EventSource(response)))
                async with contextlib.aclosing(events):
                    async for event in events:
                        if event.data.strip() == "[DONE]":
                            return
                        if not event.data:
                            continue
                        chunk = json.loads(event.data)
                        if chunk.get("error"):
                            raise EngineError(self._clean(f"{self.url} failed: {_error(chunk)[0]}"))
                        if take(chunk):
                            return

    @contextlib.contextmanager
    def _border(self) -> Iterator[None]:
        """Whatever goes wrong between here and the server becomes one line."""
        try:
            yield
        except (httpx2.HTTPError, *GARBAGE) as error:
            why = next(why for kinds, why in REASONS if isinstance(error, kinds))
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise EngineError(self._clean(f"{self.url} {why} ({what})")) from error

    def _refusal(self, status: int, content: bytes) -> Refused:
        try:
            message, code = _error(json.loads(content))
        except GARBAGE:
            message, code = content[:1000].decode("utf-8", errors="replace") or "without a word", ""
        hint = HINTS.get(status, "")
        return Refused(f"{self.url} answered {status}: {self._clean(message)}{hint}", status, code)


class RemoteStream(Stream):
    """The tokens of one request to a server. Cancelling closes the connection."""

    stop: Callable[[], None]

    def cancel(self) -> None:
        super().cancel()
        self.stop()

    def _over(self, task: asyncio.Task[str]) -> None:
        """The request is over, in whatever way."""
        if task.cancelled():
            self._end("cancelled")
        elif (error := task.exception()) is not None:
            self._end(None, error)
        else:
            self._end(task.result())


class RemoteEngine(Server):
    """A completion server that takes token ids, as an engine. `vocab_size` bounds the ids that go there and come."""

    def __init__(self, base_url: str, name: str | None = None, *, vocab_size: int | None = None, **values: Any) -> None:
        super().__init__(base_url, name, **values)
        self.vocab_size = math.inf if vocab_size is None else vocab_size

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
    ) -> RemoteStream:
        """As `Engine.submit`. `conversation`, `owner` and `prefix` mean nothing to these servers.

        ValueError where the prompt is empty, too long or holds an unknown id, for a length penalty or a grammar.
        """
        ids = checked_prompt(ids, self.max_length, self.vocab_size)
        if sampling.length_penalty != 1:
            raise ValueError(f"length_penalty is {sampling.length_penalty}; no server knows it, so leave it at 1")
        if grammar is not None:
            raise ValueError("a grammar is given; no server knows it, so leave it out")
        body = {
            "prompt": ids,
            "max_tokens": min(sampling.max_tokens, self.max_length - len(ids)),
            # Everything is said, what is off as well: servers fill gaps with the taste of the model's makers.
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": sorted(sampling.stop_ids),
            "logprobs": max(logprobs, 1),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **({} if sampling.seed is None else {"seed": sampling.seed}),
        }
        stream = RemoteStream(len(ids))
        answer = _Answer(stream, sampling.stop_ids, body["max_tokens"], logprobs, self.vocab_size)
        stream.stop = self._start(self._complete(body, answer, sampling.time_limit), stream._over)
        return stream

    def score(self, ids: Sequence[int]) -> list[float]:
        """The model's log-probability of ids[1:], each given all ids before it. EngineError where it does not tell."""
        if not 1 <= len(ids) <= self.max_length - 1:
            raise ValueError(f"{len(ids)} ids to score; give 1 to {self.max_length - 1}")
        check_ids(ids, self.vocab_size, "what is to be scored")
        if len(ids) == 1:
            return []
        body = {"prompt": list(ids), "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0.0}
        pieces = self.events("/completions", body, lambda chunk: [_scores(each) for each in chunk.get("choices") or ()])
        values = [value for piece in pieces for choice in piece for value in choice]
        values = values[1 : len(ids)]
        if len(values) < len(ids) - 1 or any(map(math.isnan, values)):
            raise EngineError(f"{self.url} does not score prompts; it sent {len(values)} of {len(ids) - 1} scores")
        return values

    async def _complete(self, body: dict[str, Any], answer: _Answer, time_limit: float | None) -> str:
        """Ask for a completion, deliver it, and return why it ended."""
        try:
            await self._post("/completions", body, answer.take, time_limit)
        except TimeoutError:
            answer.finish = answer.finish or "time"
        except EngineError:
            if answer.finish is None:
                raise
        if answer.finish is None:
            raise EngineError(f"{self.url} broke off its answer")
        answer.deliver()
        return answer.finish


@dataclass
class _Answer:
    """What has come of one answer. The tokens of its last event wait for the usage, which comes after them."""

    stream: Stream
    stop_ids: frozenset[int]
    max_tokens: int
    num_top: int
    vocab_size: float
    finish: str | None = None
    count: int = 0
    held: list[Token] = field(default_factory=list)

    def take(self, chunk: Any) -> bool:
        """Read one event; True where the answer is over although the server would go on."""
        details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
        self.stream.reused = int(details.get("cached_tokens") or self.stream.reused)
        if self.finish is not None or not chunk.get("choices"):
            return False
        choice = chunk["choices"][0]
        self._take(choice)
        if self.finish is None or choice.get("finish_reason") is None:
            self.deliver()
        return self.finish is not None and choice.get("finish_reason") is None

    def _take(self, choice: dict[str, Any]) -> None:
        tokens, reason = _tokens(choice, self.num_top), choice.get("finish_reason")
        if not tokens and not self.count and choice.get("text"):
            raise EngineError("the server sends text but no token ids; talk to it as a chat server (no tokenizer)")
        if reason not in (None, "stop", "length"):
            raise EngineError(f"the server ended the answer itself: {reason}")
        matched = choice.get("stop_reason", choice.get("matched_stop"))
        if isinstance(matched, int) and matched in self.stop_ids and matched not in [token.id for token in tokens]:
            tokens.append(Token(matched, math.nan))  # servers differ in whether the id that stops is part of the answer
        check_ids([token.id for token in tokens], self.vocab_size, "the answer")
        for token in tokens:
            self.held.append(token)
            self.count += 1
            if token.id in self.stop_ids or self.count == self.max_tokens:
                self.finish = "stop" if token.id in self.stop_ids else "length"
                return
        self.finish = reason

    def deliver(self) -> None:
        """Hand over the tokens that wait."""
        for token in self.held:
            self.stream._tokens.put(token)
        self.held.clear()


def _tokens(choice: dict[str, Any], num_top: int) -> list[Token]:
    """The tokens of one choice of an event, in whichever form they come; a logprob that is not told is nan."""
    told = choice.get("logprobs") or {}
    if content := told.get("content"):
        return [
            Token(int(each["id"]), _number(each.get("logprob")), _top(each.get("top_logprobs"), num_top))
            for each in content
        ]
    ids = choice.get("token_ids")
    if ids is None:
        ids = [name.removeprefix(ID) for name in told.get("tokens") or () if name.startswith(ID)]
    values, tops = told.get("token_logprobs") or (), told.get("top_logprobs") or ()
    if len(values) != len(ids):
        values = [None] * len(ids)
    if len(tops) != len(ids):
        tops = [None] * len(ids)
    return [Token(int(id), _number(value), _top(top, num_top)) for id, value, top in zip(ids, values, tops)]


def _top(told: Any, number: int) -> tuple[tuple[int, float], ...]:
    """The likeliest ids, from `{"token_id:5": -0.1}` or `[{"id": 5, "logprob": -0.1}]`; none where these are texts."""
    if isinstance(told, dict):
        told = [{"id": name.removeprefix(ID), "logprob": told[name]} for name in told if name.startswith(ID)]
    pairs = [(int(each["id"]), float(each["logprob"])) for each in told or ()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:number])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _scores(choice: dict[str, Any]) -> list[float]:
    """The log-probabilities of all tokens, nan for the first, which nothing stands before."""
    return [_number(value) for value in (choice.get("logprobs") or {}).get("token_logprobs") or ()]


def _error(body: Any) -> tuple[str, str]:
    """(message, code) of an error, in the forms in which servers give it."""
    inner = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(inner, dict):
        return str(inner), ""
    return str(inner.get("message") or inner.get("detail") or inner), f"{inner.get('code')} {inner.get('type')}"


def _address(base_url: str) -> str:
    """The address without a slash at its end. ValueError for anything but http(s) without secrets in it."""
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.userinfo or url.query:
        raise ValueError(f"the address of a server holds no password and no query; the key goes into {KEY}")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{base_url!r} is no address of a server; write http://host:port/v1")
    return base_url.rstrip("/")
