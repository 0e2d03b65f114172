"""Models on OpenAI-compatible chat servers, in the same turn loop: `answer` here takes any engine.

    engine, tok = connect("http://gpu1:8000/v1#Qwen/Qwen3-32B")        # a chat server; tok is None
    engine, tok = connect("http://gpu1:8000/v1#moss", "models/moss")   # a completion server, with its tokenizer
    for event in answer(dialog, engine, tok, standard_tools(), Options()): ...

A chat server renders the conversation itself, so it has neither ids nor our format: the tools that are switched on go
there as `tools`, its `tool_calls` become commands, which run as everybody's do, and its `reasoning_content` (or
`reasoning`) becomes the thoughts. What is said beside a call is part of the reply. A call that no line of commands can
spell (an argument that does not exist, text that is no JSON) is shown with its error and does not run. Thoughts that
came with calls are sent back with them, as some servers insist. `Options.quality`, `form` and `grammar` belong to our
format; `usage` holds only what the server tells.

Whoever wants our format from a server gives the tokenizer: then the ids are made here, and it is asked to complete.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moss.chat import MAX_ROUNDS, NONE, Dialog, Round, Turn
from moss.engine import EngineError
from moss.engine.remote import GARBAGE, Refused, RemoteEngine, Server
from moss.tokenizer import Tokenizer
from moss.tokenizer import load as load_tokenizer
from moss.tools import run
from moss.tools.base import Tool, ToolError, as_text
from moss.tools.calls import MAX_CALLS, NO_RESULT, Call, format_results, parse_commands, shown
from moss.tools.run import BROKEN, PASSES, Command, Done, Error, Event, Options, Reply, Submits, Thoughts

OPTIONS = Options()
Message = dict[str, Any]
WHOLE = ("stop", "tool_calls", "function_call")  # how a pass ends that was not cut
_TOO_LONG = re.compile(r"context.?(length|size|window)", re.IGNORECASE)


class ChatServer(Server):
    """A chat server as a model for `answer`; `thoughts` is the field in which it sends them, None while it has not."""

    thoughts: str | None = None


def connect(
    model: str, tokenizer: str | Path | None = None, *, chat: bool = True
) -> tuple[RemoteEngine, Tokenizer] | tuple[ChatServer, None]:
    """The model at `http://host:port/v1#name` (the name may be missing where there is one model).

    With a tokenizer (a folder or a file) the server is asked to complete ids, without one to chat. ValueError where
    nothing answers, the model is not named, or a tokenizer with which it is to `chat` is none of a MOSS chat model.
    """
    url, _, name = model.partition("#")
    try:
        if tokenizer is None:
            return ChatServer(url, name or None), None
        tok = load_tokenizer(tokenizer)
        if chat and not tok.has_markers:
            raise ValueError(f"{tok.origin} knows none of the chat markers; leave it out to talk to a chat server")
        return RemoteEngine(url, name or None, vocab_size=tok.vocab_size), tok
    except EngineError as error:
        raise ValueError(str(error)) from error


def answer(
    dialog: Dialog,
    engine: Submits | ChatServer,
    tok: Tokenizer | None,
    tools: Mapping[str, Tool],
    options: Options = OPTIONS,
) -> Iterator[Event]:
    """Answer the last turn of `dialog` as `moss.tools.run.answer` does, whatever the engine; `tok` None for a server.

    A completion server follows no grammar: what leaves the format ends the pass and is not run.
    """
    if not isinstance(engine, ChatServer):
        assert tok is not None, "an engine that speaks ids needs their tokenizer"
        follows = options.grammar and not isinstance(engine, RemoteEngine)
        yield from run.answer(dialog, engine, tok, tools, replace(options, grammar=follows))
        return
    if not dialog.turns:
        raise ValueError("the conversation has no turn to answer; append a Turn with the question")
    if options.quality is not None or options.sampling.length_penalty != 1:
        raise ValueError("a chat server knows neither a quality tag nor a length penalty; leave them out")
    try:
        yield from _ChatTurn(dialog, engine, tools, options).events()
    except EngineError as error:
        yield Error(str(error))


@dataclass
class _Said:
    """What the server said in one pass; `calls` by their index: id, name, arguments."""

    server: ChatServer
    thoughts: str = ""
    reply: str = ""
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    finish: str | None = None
    usage: dict[str, int] = field(default_factory=dict)

    def read(self, chunk: Any) -> list[tuple[str, str]]:
        """Take one event; returns its pieces of (section, text). Runs where every error becomes an EngineError."""
        if usage := chunk.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            counts = {"prompt_tokens": usage.get("prompt_tokens"), "cached_tokens": details.get("cached_tokens"),
                      "completion_tokens": usage.get("completion_tokens")}  # fmt: skip
            self.usage = {name: int(value) for name, value in counts.items() if value is not None}
        pieces: list[tuple[str, str]] = []
        for choice in (chunk.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            name = next((name for name in ("reasoning_content", "reasoning") if delta.get(name)), None)
            if name is not None:
                self.server.thoughts = name
                self.thoughts += delta[name]
                pieces.append(("thoughts", delta[name]))
            if text := delta.get("content"):
                self.reply += text
                pieces.append(("reply", text))
            for call in delta.get("tool_calls") or ():
                self._call(call)
            self.finish = choice.get("finish_reason") or self.finish
        return pieces

    def _call(self, piece: dict[str, Any]) -> None:
        """A piece of a call: its name comes once, its arguments in parts."""
        index = piece.get("index")
        if index is None:  # then calls come whole, or one after the other
            index = len(self.calls) if piece.get("id") else len(self.calls) - 1
        call = self.calls.setdefault(int(index), {"id": "", "name": "", "arguments": ""})
        function = piece.get("function") or {}
        call["id"] = call["id"] or piece.get("id") or ""
        call["name"] = call["name"] or function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""


class _ChatTurn:
    """One turn in the making."""

    def __init__(self, dialog: Dialog, server: ChatServer, tools: Mapping[str, Tool], options: Options) -> None:
        self.server, self.tools, self.options = server, tools, options
        self.turn = Turn(dialog.turns[-1].human)
        self.enabled = {key for key, on in dialog.switches.items() if on and run.at_hand(key, tools)}
        self.shows_thoughts = dialog.switches.get("thoughts", True)
        self.ids = (f"call{number:05}" for number in itertools.count())  # nine letters and digits, as Mistral wants
        self.system: list[Message] = [{"role": "system", "content": dialog.meta}] if dialog.meta else []
        self.past = [list(self._told(turn)) for turn in dialog.turns[:-1]]
        self.now: list[Message] = [{"role": "user", "content": self.turn.human}]
        self.num_calls = self.num_passes = self.num_sources = 0
        self.usage: dict[str, int] = {}
        self.started = time.perf_counter()
        self.first_token = self.tool_seconds = 0.0

    def events(self) -> Iterator[Event]:
        while True:
            may_call = len(self.turn.rounds) < self.options.max_rounds
            said = yield from self._ask(may_call)
            if not (said.calls and may_call):
                self._keep_thoughts(said)
                break
            yield from self._round(said)
            if said.finish == "time":
                break
        if said.finish != "stop":
            yield run.cut(said.finish or "")
        timing = {
            "first_token": self.first_token,
            "tools": self.tool_seconds,
            "total": time.perf_counter() - self.started,
        }
        finish = said.finish if said.finish in ("length", "time") else "stop"
        yield Done(self.turn, finish, self.usage, timing)

    def _ask(self, may_call: bool) -> Generator[Event, None, _Said]:
        """One pass; where the conversation is too long for the model, without its oldest turns."""
        dropped = 1
        while True:
            try:
                return (yield from self._pass(may_call))
            except Refused as error:
                if error.status != 400 or not _TOO_LONG.search(f"{error.code} {error}"):
                    raise
                if not self.past and not self._shorten():
                    raise
            if self.past:
                dropped = min(dropped, len(self.past))
                del self.past[:dropped]
                yield run.left_out(dropped)
                dropped *= 2

    def _shorten(self) -> bool:
        """Cut the longest result of this turn in half; False where none is long."""
        results = [message for message in self.now if message["role"] == "tool"]
        longest = max(results, key=lambda message: len(message["content"]), default={"content": ""})
        text = longest["content"]
        if len(text) > run.SHORTEST:
            longest["content"] = text[: len(text) // 2 - 1] + "…"
        return len(text) > run.SHORTEST

    def _pass(self, may_call: bool) -> Generator[Event, None, _Said]:
        """Let the server speak once and pass on what it says."""
        said, number, begins = _Said(self.server), len(self.turn.rounds), True
        limit = self.options.sampling.time_limit
        left = None if limit is None else run.time_left(limit, self.started)
        try:
            events = self.server.events("/chat/completions", self._body(may_call), said.read, left)
            with contextlib.closing(events):
                for section, text in itertools.chain.from_iterable(events):
                    self.first_token = self.first_token or time.perf_counter() - self.started
                    if section == "reply":
                        yield from self._reply(text, begins)
                        begins = begins and not text.strip()
                    elif self.shows_thoughts:
                        yield Thoughts(text, number)
        except TimeoutError:
            said.finish = "time"
        if said.finish is None:
            raise EngineError(f"{self.server.url} broke off its answer")
        self.first_token = self.first_token or time.perf_counter() - self.started
        self.num_passes += 1
        before = self.usage.get("completion_tokens", 0)
        self.usage = said.usage | self.usage  # of the prompt: that of the first pass
        if "completion_tokens" in said.usage:
            self.usage["completion_tokens"] = before + said.usage["completion_tokens"]
        return said

    def _body(self, may_call: bool) -> dict[str, Any]:
        """The request. What is off stays unsaid: a strict server refuses what it does not know."""
        sampling, seed = self.options.sampling, self.options.seed
        body: dict[str, Any] = {
            "messages": [*self.system, *itertools.chain(*self.past), *self.now],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1:
            body["repetition_penalty"] = sampling.repetition_penalty
        if seed is not None:
            body["seed"] = seed * PASSES + self.num_passes
        if self.enabled:
            body["tools"] = [tool.schema for key, tool in self.tools.items() if key in self.enabled]
            body["tool_choice"] = "auto" if may_call else "none"
        return body

    def _round(self, said: _Said) -> Iterator[Event]:
        """Run the calls of a pass, show the server their results, and add the round to the turn."""
        given = list(said.calls.values())
        calls = [_read_call(call["name"], call["arguments"], self.tools) for call in given]
        if said.finish not in WHOLE:
            calls = [replace(call, error=BROKEN) for call in calls]
        first, self.num_calls = self.num_calls, self.num_calls + len(calls)
        for index, call in enumerate(calls):
            yield Command(first + index, call.name, call.args, call.raw, len(self.turn.rounds))
        started = time.perf_counter()
        share = self.server.max_length // 2 ** (len(self.turn.rounds) + 1)  # characters; a token or more each
        limit = share // max(1, min(len(calls), MAX_CALLS))
        seconds = run.time_left(self.options.sampling.time_limit, self.started)
        outcomes = yield from run.work(calls, self.tools, self.enabled, first, self.num_sources + 1, limit, seconds)
        self.num_sources += sum(len(outcome.sources) for outcome in outcomes)
        self.tool_seconds += time.perf_counter() - started
        kept = [index for index, call in enumerate(calls) if not call.error]
        commands, done = [calls[index] for index in kept], [outcomes[index] for index in kept]
        results = format_results(commands, done, self.tools, limit=limit)
        line = ", ".join(call.raw for call in commands)
        self.turn.rounds.append(Round(said.thoughts.strip() or NONE, line or NONE, results))
        sent = [(call["id"] or next(self.ids), call["name"], _valid(call["arguments"])) for call in given]
        contents = [shown(outcome, limit) for outcome in outcomes]
        self.now += self._exchange(sent, contents, said.thoughts, said.reply)

    def _reply(self, text: str, begins: bool) -> Iterator[Event]:
        """A piece of the reply; what later passes say stands in a paragraph of its own."""
        if not self.turn.reply:
            text = text.lstrip()
        elif begins and text.strip() and not self.turn.reply.endswith("\n"):
            text = "\n\n" + text.lstrip()
        self.turn.reply += text
        if text:
            yield Reply(text)

    def _keep_thoughts(self, said: _Said) -> None:
        """Thoughts before the reply are a round without commands, unless there are as many as the format has."""
        rounds, thoughts = self.turn.rounds, said.thoughts.strip()
        if not rounds or (thoughts and len(rounds) < MAX_ROUNDS):
            rounds.append(Round(thoughts or NONE))
        elif thoughts:
            before = rounds[-1].thoughts
            rounds[-1].thoughts = thoughts if before == NONE else f"{before}\n{thoughts}"

    def _told(self, turn: Turn) -> Iterator[Message]:
        """An earlier turn as messages."""
        yield {"role": "user", "content": turn.human}
        for item in turn.rounds:
            calls = [call for call in parse_commands(item.commands) if not call.error]
            if calls:
                sent = [(next(self.ids), call.name, _arguments(call, self.tools)) for call in calls]
                thoughts = "" if item.thoughts == NONE else item.thoughts
                yield from self._exchange(sent, _contents(calls, item.results), thoughts)
        if turn.reply:
            yield {"role": "assistant", "content": turn.reply}

    def _exchange(
        self, sent: Sequence[tuple[str, str, str]], contents: Iterable[str], thoughts: str, words: str = ""
    ) -> Iterator[Message]:
        """Calls (id, name, arguments) and their results as messages."""
        calls = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id, name, arguments in sent
        ]
        own = {self.server.thoughts: thoughts} if self.server.thoughts and thoughts else {}
        yield {"role": "assistant", "content": words or None, **own, "tool_calls": calls}
        for (id, _, _), content in zip(sent, contents, strict=True):
            yield {"role": "tool", "tool_call_id": id, "content": content}


def _by_name(tools: Mapping[str, Tool]) -> dict[str, Tool]:
    return {tool.name: tool for tool in tools.values()}


def _read_call(name: str, arguments: str, tools: Mapping[str, Tool]) -> Call:
    """A call of the server as a command; its `error` says why it can be none."""
    raw = f"{name}({arguments})"
    try:
        given = json.loads(arguments or "{}")
        given = {key: value for key, value in given.items() if value is not None}
    except GARBAGE:
        return Call(name, [], raw, f"the arguments of {name} are no JSON object")
    tool = _by_name(tools).get(name)
    try:
        texts = [as_text(value) for value in given.values()] if tool is None else tool.spelled(given)
    except ToolError as error:
        return Call(name, [], raw, str(error))
    quoted = ('"' + text.replace('"', '\\"') + '"' for text in texts)
    raw = f"{name}({', '.join(quoted)})"
    read = parse_commands(raw)
    if len(read) == 1 and (read[0].name, read[0].args, read[0].error) == (name, texts, ""):
        return read[0]
    return Call(name, texts, raw, f"{name} cannot be written as a command with these arguments")


def _valid(arguments: str) -> str:
    """Arguments that may go back to a server: some read them as JSON and fail at anything else."""
    try:
        return arguments if isinstance(json.loads(arguments), dict) else "{}"
    except GARBAGE:
        return "{}"


def _arguments(call: Call, tools: Mapping[str, Tool]) -> str:
    """The arguments of a command by name, as JSON."""
    tool = _by_name(tools).get(call.name)
    nameless = {f"argument_{number}": text for number, text in enumerate(call.args, 1)}
    return json.dumps(nameless if tool is None else tool.named(call.args), ensure_ascii=False)


def _contents(calls: Sequence[Call], results: str) -> list[str]:
    """What each call of a round gave: the inverse of `format_results`. `No result.` where nothing is written of it."""
    heads = ["\n" + " ".join(call.raw.split("\n")) + " =>" for call in calls]
    results = "\n" + results
    places: list[int] = []
    for head in heads:
        places.append(results.find(head, places[-1] + 1 if places else 0))
        if places[-1] < 0:
            return [results[1:], *[NO_RESULT] * (len(calls) - 1)]
    ends = [*places[1:], len(results)]
    texts = [results[place + len(head) : end] for place, head, end in zip(places, heads, ends)]
    return [text[1:] if text[:1] in ("\n", " ") else text for text in texts]
