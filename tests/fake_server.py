"""A plain HTTP server on this machine that speaks as OpenAI-compatible servers do, scripted or for an engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moss.engine import Engine, Sampling

Reply = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request, and the ways to answer it."""

    body: dict[str, Any]
    server: Any

    def do_GET(self) -> None:
        self.server.fake.headers.append(dict(self.headers))
        models = self.server.fake.models
        if models is None:
            self.refuse(404, {"detail": "Not Found"})
        else:
            self.send(200, "application/json", json.dumps({"object": "list", "data": models}).encode())

    def do_POST(self) -> None:
        fake = self.server.fake
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.asked.append(self.body)
        fake.paths.append(self.path)
        fake.headers.append(dict(self.headers))
        (fake.replies.pop(0) if len(fake.replies) > 1 or not fake.repeats else fake.replies[0])(self)

    def send(self, status: int, kind: str, content: bytes) -> None:
        """Answer with a whole body."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, error: Any) -> None:
        self.send(status, "application/json", json.dumps(error).encode())

    def open(self) -> None:
        """Begin a stream of events; it ends when the connection does."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()

    def event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        self.wfile.write(f"data: {text}\n\n".encode())

    def stream(self, events: Iterable[Any]) -> None:
        """Answer with a whole stream."""
        self.open()
        for data in (*events, "[DONE]"):
            self.event(data)

    def wait_until_left(self) -> None:
        """Say no more until the client closes the connection."""
        self.server.fake.waits.set()
        if self.connection.recv(1) == b"":
            self.server.fake.left.set()

    def log_message(self, *_: object) -> None:
        pass


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that are not yet taken; of more than 5 the default loses some


class FakeServer:
    """Gives its replies in order, the last one again and again where it `repeats`; notes what it was asked."""

    def __init__(
        self, *replies: Reply | Sequence[Any], models: Sequence[Any] | None = ({"id": "m"},), repeats: bool = False
    ) -> None:
        self.replies = [reply if callable(reply) else _streams(reply) for reply in replies]
        self.models, self.repeats = models, repeats
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.waits, self.left = threading.Event(), threading.Event()  # whether `wait_until_left` began, and ended

    def __enter__(self) -> FakeServer:
        self._http = _Http(("127.0.0.1", 0), Request)
        self._http.fake = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _streams(events: Sequence[Any]) -> Reply:
    return lambda request: request.stream(events)


# ---------------------------------------------------------------------------------------------------- completions


def completion(*ids: int, finish: str | None = None, text: str = "x", **values: Any) -> dict[str, Any]:
    """An event with new tokens, as vLLM and SGLang write it."""
    return {"choices": [{"index": 0, "text": text, "token_ids": list(ids), "finish_reason": finish, **values}]}


def completes(engine: Engine, form: str = "token_ids") -> Reply:
    """Answer with what an engine says, in one of the forms in which servers give ids; scores a prompt for `echo`."""

    def reply(request: Request) -> None:
        body = request.body
        if body.get("echo"):
            scores = [None, *engine.score(body["prompt"]), -1.0]
            request.stream([{"choices": [{"text": "", "logprobs": {"token_logprobs": scores}}]}])
            return
        sampling = Sampling(
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=max(body["top_k"], 0),
            repetition_penalty=body["repetition_penalty"],
            max_tokens=body["max_tokens"],
            stop_ids=frozenset(body["stop_token_ids"]),
            seed=body.get("seed"),
        )
        tokens = list(stream := engine.submit(body["prompt"], sampling, logprobs=body["logprobs"]))
        events = []
        for token in tokens:
            choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": None}
            top = {f"token_id:{id}": value for id, value in token.top}
            names = [f"token_id:{token.id}" if form != "text" else "x"]
            told = {"tokens": names, "token_logprobs": [token.logprob], "top_logprobs": [top]}
            if form == "content":
                tops = [{"id": id, "token": "x", "logprob": value} for id, value in token.top]
                told = {"content": [{"id": token.id, "logprob": token.logprob, "top_logprobs": tops}]}
            choice["logprobs"] = told
            if form == "token_ids":
                choice["token_ids"] = [token.id]
            events.append({"choices": [choice]})
        events[-1]["choices"][0]["finish_reason"] = stream.finish
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(tokens),
                 "prompt_tokens_details": {"cached_tokens": 7}}  # fmt: skip
        request.stream([*events, {"choices": [], "usage": usage}])

    return reply


# ----------------------------------------------------------------------------------------------------------- chat


def says(
    *pieces: str, finish: str = "stop", thoughts: Sequence[str] = (), field: str = "reasoning_content"
) -> list[Any]:
    """The events of a reply in pieces, thoughts before it."""
    deltas = [{"role": "assistant", "content": ""}]
    deltas += [{field: text} for text in thoughts] + [{"content": text} for text in pieces]
    return [*map(_chunk, deltas), {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}, USAGE]


def calls(*made: tuple[str, str], thoughts: str = "", words: str = "", finish: str = "tool_calls") -> list[Any]:
    """The events of tool calls (name, arguments), the arguments in two parts."""
    deltas: list[dict[str, Any]] = [{"reasoning_content": thoughts}] if thoughts else []
    deltas += [{"content": words}] if words else []
    for index, (name, arguments) in enumerate(made):
        half = len(arguments) // 2
        opening = {"name": name, "arguments": arguments[:half]}
        deltas.append({"tool_calls": [{"index": index, "id": f"id{index}", "type": "function", "function": opening}]})
        deltas.append({"tool_calls": [{"index": index, "function": {"arguments": arguments[half:]}}]})
    return [*map(_chunk, deltas), {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}, USAGE]


def _chunk(delta: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 5}}
