"""A line of commands: how it is read, how its calls run side by side, how their results are written.

A line is what the model writes between `<|Commands|>` and `<eoc>`:

    calls = parse_commands('Calculate("37*12"), Solve("x+2=5")')
    outcomes = run_calls(calls, standard_tools())
    format_results(calls, outcomes)                     # Calculate("37*12") => 444\\nSolve("x+2=5") =>\\nx = 3
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import math
import queue
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from moss.tools.base import Source, Tool, ToolError, on_progress, standard_tools

MAX_CALLS = 4  # calls of one line that run; those after them are dropped
NO_RESULT = "No result."
ITEM_LIMIT = 400  # characters of a source that the model reads
ITEM_LEAST = 40  # where there is less room for each, sources are left out
LONGEST = 100_000  # characters of a text; what a tool gives beyond them is cut
STUCK = 8  # calls of a tool that may outlive their deadline before it is asked no more

_NAME = re.compile(r"(?<![\w.])[A-Z][A-Za-z0-9]*[ \t]*\(")
_HEAD = re.compile(r"^(?=[A-Z][A-Za-z0-9]*[ \t]*\(.*=>)", re.MULTILINE)  # a line that looks like a call's result
# characters that no result holds: controls, and the invisible ones that turn text around or hide some in it
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e0fff]"
)


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Call:
    """One command: `raw` is the text as written; `error` says why it is none, and then it never runs."""

    name: str
    args: list[str] = field(default_factory=list)
    raw: str = ""
    error: str = ""


class Commands(NamedTuple):
    """What a line of commands holds: the calls, and the text between them that is none."""

    calls: list[Call]
    ignored: list[str]


def parse_commands(text: str) -> list[Call]:
    """The calls of a line of commands, in order; see `read_commands`."""
    return read_commands(text).calls


def read_commands(text: str) -> Commands:
    """Read `Name("argument"), Name("argument", "argument")`.

    An argument runs to the first quote that stands before `)` or before `, "`; a quote inside it may be written
    `\\"`. Whatever has a call's beginning but not its form (no quotes, no end, a quote in the rest, which might be
    the argument's own) is a `Call` with `error`: reading it would be a guess. Other text is ignored and returned.
    """
    calls: list[Call] = []
    ignored: list[str] = []
    position = 0
    while match := _NAME.search(text, position):
        _keep_rest(text[position : match.start()], calls, ignored)
        call, position = _read_call(text, match)
        if call is not None:
            calls.append(call)
        else:
            ignored.append(text[match.start() : position])
    _keep_rest(text[position:], calls, ignored)
    return Commands(calls, ignored)


def _keep_rest(rest: str, calls: list[Call], ignored: list[str]) -> None:
    """File the text after the last call: separators vanish, a quote makes that call ambiguous, the rest is ignored."""
    rest = rest.strip().strip(",;，；、").strip()
    if not rest or rest.rstrip(".") in ("None", "Non"):
        return
    if '"' in rest and calls and not calls[-1].error:
        last = calls.pop()
        reason = f'the quotes in {_shorten(last.raw + rest)} leave it open where the argument ends; write \\" inside'
        calls.append(Call(last.name, [], last.raw + rest, reason))
        return
    ignored.append(rest)


def _read_call(text: str, match: re.Match[str]) -> tuple[Call | None, int]:
    """The call that begins at `match`, and where it ends; None where the name is `None` with prose in parentheses."""
    name = match.group().rstrip("(").rstrip()
    start, position = match.start(), match.end()
    args: list[str] = []
    while True:
        position = _skip_blanks(text, position)
        if not text.startswith('"', position):
            end = _line_end(text, start)
            if name == "None":
                return None, end
            raw = text[start:end].rstrip().rstrip(",")
            return Call(name, [], raw, f'arguments must stand in double quotes: {name}("…")'), end
        closed = _argument_end(text, position + 1)
        if closed is None:
            end = len(text)
            return Call(name, [], text[start:end], f'{name}("… has no closing quote and parenthesis'), end
        args.append(text[position + 1 : closed])
        position = _skip_blanks(text, closed + 1)
        if text[position] == ")":
            break
        position += 1  # the comma before the next argument
    raw = text[start : position + 1]
    if len(args) > 1 and any(_bare_quotes(arg) for arg in args):
        return Call(name, [], raw, f'the quotes in {_shorten(raw)} do not pair up; write \\" inside'), position + 1
    return Call(name, [arg.replace('\\"', '"') for arg in args], raw), position + 1


def _argument_end(text: str, position: int) -> int | None:
    """Where the closing quote of the argument stands that begins at `position`."""
    for match in re.finditer(r'\\"|"(?=\s*(\)|,\s*"))', text[position:]):
        if match.group() == '"':
            return position + match.start()
    return None


def _bare_quotes(argument: str) -> bool:
    return '"' in argument.replace('\\"', "")


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _line_end(text: str, position: int) -> int:
    """The end of an unquoted call: before the next one on the line, else the line's end."""
    end = text.find("\n", position)
    end = len(text) if end < 0 else end
    following = _NAME.search(text, position + 1, end)
    return following.start() if following else end


def _shorten(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """What became of a call: its text or sources when `ok`, else the reason in `error`.

    `ran` is False when no tool was asked. `first` is the number of its first source in the turn.
    """

    ok: bool
    text: str = ""
    error: str = ""
    seconds: float = 0.0
    ran: bool = True
    sources: tuple[Source, ...] = ()
    first: int = 1

    @property
    def result(self) -> str:
        """What stands after `=>`, whole."""
        return cited(self.sources, self.first) if self.sources else self.text

    @property
    def references(self) -> list[dict[str, Any]]:
        """What the numbers in a reply stand for: number, title and url of each source."""
        named = enumerate(self.sources, self.first)
        return [{"number": number, "title": source.title, "url": source.url} for number, source in named]


_room: contextvars.ContextVar[int] = contextvars.ContextVar("room", default=0)
_late: dict[str, set[threading.Thread]] = {}  # calls of each tool that nobody waits for any more


def room() -> int:
    """How many characters of the result of this call the model will read; 0 = any number."""
    return _room.get()


def refusal(call: Call, tools: Mapping[str, Tool], enabled: Collection[str] | None = None) -> Tool | Outcome:
    """The tool that answers `call`, or why it does not run; `enabled` are the keys switched on (None = all)."""
    by_name = {each.name: each for each in tools.values()}
    chosen = by_name.get(call.name)
    if chosen is None:
        known = _shorten(", ".join(by_name), 300)
        return Outcome(False, error=f"no tool is called {call.name!r}; there are {known}", ran=False)
    if enabled is not None and chosen.key not in enabled:
        return Outcome(False, error=f"{call.name} is switched off", ran=False)
    return Outcome(False, error=call.error) if call.error else chosen


def _ask(chosen: Tool, call: Call) -> Outcome:
    """What the tool answers. Whatever it raises becomes an outcome: a border where nothing may escape."""
    started = time.perf_counter()
    try:
        result: Any = chosen(*chosen.read(call.args))
        outcome = _outcome(asyncio.run(result) if inspect.iscoroutine(result) else result)
    except ToolError as error:
        outcome = Outcome(False, error=_label(error, 500) or f"{call.name} failed")
    except BaseException as error:  # also SystemExit: a tool cannot end the program
        outcome = Outcome(False, error=f"{call.name} failed: {type(error).__name__}: {_label(error, 200)}")
    return replace(outcome, seconds=time.perf_counter() - started)


def _outcome(result: Any) -> Outcome:
    """What a tool returned: sources, text, or anything else, which becomes text."""
    if isinstance(result, list | tuple) and all(isinstance(each, Source) for each in result):
        sources = tuple(Source(_label(s.title, 200), _label(s.url, 2000), str(s.text)) for s in result)
        return Outcome(bool(sources), error="" if sources else "nothing found", sources=sources)
    if isinstance(result, dict | list | tuple):
        result = json.dumps(result, ensure_ascii=False, default=str)
    text = visible(str(result)).lstrip("\n").rstrip()
    return Outcome(True, text=text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")


def _label(text: object, limit: int) -> str:
    return _shorten(visible(str(text)), limit)


def visible(text: str) -> str:
    """Text from outside without the characters that nobody sees; line ends and tabs stay."""
    return _UNSEEN.sub("", text)


def run_calls(
    calls: Sequence[Call], tools: Mapping[str, Tool], enabled: Collection[str] | None = None, *, room: int = 0
) -> list[Outcome]:
    """Run the calls of one line side by side; calls after the first `MAX_CALLS` are dropped, not run.

    `tools` by key; `enabled` are the keys switched on (None = all). `room` is how many characters of each result will
    be read, 0 = any number.
    """
    found: dict[int, Outcome] = {}
    for index, news in stream_calls(calls, tools, enabled, room=room):
        if isinstance(news, Outcome):
            found[index] = news
    return numbered([found[index] for index in range(len(calls))])


def stream_calls(
    calls: Sequence[Call],
    tools: Mapping[str, Tool],
    enabled: Collection[str] | None = None,
    *,
    room: int = 0,
    seconds: float = math.inf,
) -> Iterator[tuple[int, Outcome | str]]:
    """Like `run_calls`, yielding (index, outcome) as each call ends, and (index, text) where a tool tells its progress.

    A call that outlives its tool's deadline, or `seconds`, has an outcome that says so; whatever it does after is
    ignored, and so is everything once this iterator is closed.
    """
    news: queue.SimpleQueue[tuple[int, Outcome | str]] = queue.SimpleQueue()
    waiting: dict[int, tuple[Tool, threading.Thread, float]] = {}

    def work(chosen: Tool, call: Call, index: int) -> None:
        """What the thread of a call does. Nobody reads the news of a call that is no longer waited for."""
        _room.set(room)
        on_progress(lambda text: news.put((index, _label(text, 200))) if index in waiting else None)
        news.put((index, _ask(chosen, call)))

    try:
        for index, call in enumerate(calls):
            chosen = refusal(call, tools, enabled)
            if index >= MAX_CALLS:
                chosen = Outcome(False, error=f"dropped: one line runs at most {MAX_CALLS} calls", ran=False)
            elif isinstance(chosen, Tool) and len(still_running(chosen)) >= STUCK:
                chosen = Outcome(False, error=f"{call.name} is busy with calls that took too long; try again later")
            if isinstance(chosen, Outcome):
                yield index, chosen
                continue
            run, job = contextvars.copy_context().run, (work, chosen, call, index)
            thread = threading.Thread(target=run, args=job, daemon=True, name=chosen.key)
            waiting[index] = (chosen, thread, time.monotonic() + min(chosen.seconds, seconds))
            thread.start()
        while waiting:
            for index, (late, thread, deadline) in list(waiting.items()):
                if time.monotonic() >= deadline and (thread.is_alive() or news.empty()):
                    _give_up(late, thread)
                    del waiting[index]
                    allowed = min(late.seconds, seconds)
                    reason = f"{late.name} took more than {allowed:.3g} s"
                    yield index, Outcome(False, error=reason, seconds=allowed)
            if not waiting:
                break
            patience = min(deadline for _, _, deadline in waiting.values()) - time.monotonic()
            try:
                index, what = news.get(timeout=max(0.0, patience))
            except queue.Empty:
                continue
            if index in waiting:
                if isinstance(what, Outcome):
                    del waiting[index]
                yield index, what
    finally:
        for tool, thread, _ in waiting.values():
            _give_up(tool, thread)
        waiting.clear()


def _give_up(tool: Tool, thread: threading.Thread) -> None:
    """Wait for a call no longer. A thread cannot be ended, so it is counted as long as it runs."""
    _late.setdefault(tool.name, set()).add(thread)


def still_running(tool: Tool) -> list[threading.Thread]:
    """The calls of a tool that nobody waits for any more and that have not ended."""
    late = _late.get(tool.name, set())
    for thread in [each for each in list(late) if not each.is_alive()]:
        late.discard(thread)
    return list(late)


# ---------------------------------------------------------------------------------------------- writing


def numbered(outcomes: Sequence[Outcome], first: int = 1) -> list[Outcome]:
    """The outcomes with their sources numbered on from `first`, in the order of the calls."""
    done = []
    for outcome in outcomes:
        done.append(replace(outcome, first=first))
        first += len(outcome.sources)
    return done


def cited(sources: Sequence[Source], first: int = 1, limit: int = ITEM_LIMIT) -> str:
    """Sources as the model reads them, one line each: `<|1|>: 'text'`, quoted as in the released data."""
    lines = []
    for number, source in enumerate(sources, first):
        text = _shorten(_UNSEEN.sub(" ", source.text), limit)
        quote = '"' if "'" in text else "'"
        lines.append(f"<|{number}|>: {quote}{text.replace(quote, '”')}{quote}")
    return "\n".join(lines)


def format_results(
    calls: Sequence[Call], outcomes: Sequence[Outcome], tools: Mapping[str, Tool] | None = None, *, limit: int = 0
) -> str:
    """The body of a Results section: one item per call that ran, `None` when none did.

    `limit` > 0 cuts each call's text to that many characters, and sources to their share. Reasons of failures are not
    shown to the model.
    """
    same_line = {each.name for each in (standard_tools() if tools is None else tools).values() if each.same_line}
    items = []
    for call, outcome in zip(calls, outcomes, strict=True):
        if outcome.ran:
            separator = " " if call.name in same_line else "\n"
            items.append(f"{_one_line(call.raw)} =>{separator}{shown(outcome, limit)}")
    return "\n".join(items) or "None"


def shown(outcome: Outcome, limit: int = 0) -> str:
    """What the model reads of an outcome, in at most `limit` characters (0 = any number), `ITEM_LEAST` at least.

    Each source has its share of them; where that is too little, the last sources are left out. A line of the text that
    looks like the result of a call is moved in by a blank, so that nobody takes it for one.
    """
    if not outcome.ok:
        return NO_RESULT
    if not outcome.sources:
        text = _HEAD.sub(" ", outcome.text) or NO_RESULT
        return text if not 0 < limit < len(text) else text[: limit - 1] + "…"
    around = len(f"<|{outcome.first + len(outcome.sources)}|>: ''\n")
    room = max(limit, ITEM_LEAST) if limit else len(outcome.sources) * (ITEM_LIMIT + around)
    kept = outcome.sources[: max(1, room // (ITEM_LEAST + around))]
    return cited(kept, outcome.first, min(ITEM_LIMIT, room // len(kept) - around))


def _one_line(raw: str) -> str:
    """A command on one line, so that its argument cannot look like a line of its own."""
    return " ".join(raw.split("\n")) if "\n" in raw else raw
