"""A line of commands: how it is read, how its calls run side by side, how their results are written.

A line is what the model writes between `<|Commands|>` and `<eoc>`:

    calls = parse_commands('Calculate("37*12"), Solve("x+2=5")')
    outcomes = run_calls(calls, standard_tools())
    format_results(calls, outcomes)                     # Calculate("37*12") => 444\\nSolve("x+2=5") =>\\nx = 3
"""

from __future__ import annotations

import contextvars
import queue
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from moss.tools.base import Result, Source, Tool, ToolError, on_progress, standard_tools

MAX_CALLS = 4  # calls of one line that run; those after them are dropped
NO_RESULT = "No result."
ITEM_LIMIT = 400  # characters of a source that the model reads
STUCK = 8  # calls of a tool that may outlive their deadline before it is asked no more

_NAME = re.compile(r"(?<![\w.])[A-Z][A-Za-z0-9]*[ \t]*\(")
# characters that no result holds: controls, and the invisible ones that turn text around
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ud800-\udfff]"
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


_room: contextvars.ContextVar[int] = contextvars.ContextVar("room", default=0)
_late: dict[str, list[threading.Thread]] = {}  # calls of each tool that outlived their deadline


def room() -> int:
    """How many characters of the result of this call the model will read; 0 = any number."""
    return _room.get()


def refusal(call: Call, tools: Mapping[str, Tool], enabled: Collection[str] | None = None) -> Tool | Outcome:
    """The tool that answers `call`, or why it does not run; `enabled` are the keys switched on (None = all)."""
    by_name = {each.name: each for each in tools.values()}
    chosen = by_name.get(call.name)
    if chosen is None:
        return Outcome(False, error=f"no tool is called {call.name!r}; there are {', '.join(by_name)}", ran=False)
    if enabled is not None and chosen.key not in enabled:
        return Outcome(False, error=f"{call.name} is switched off", ran=False)
    return Outcome(False, error=call.error) if call.error else chosen


def execute(call: Call, tools: Mapping[str, Tool], enabled: Collection[str] | None = None) -> Outcome:
    """Run one call here and now, without a deadline; `tools` by key."""
    chosen = refusal(call, tools, enabled)
    return chosen if isinstance(chosen, Outcome) else _ask(chosen, call)


def _ask(chosen: Tool, call: Call) -> Outcome:
    """What the tool answers. Whatever it raises becomes an outcome: a border where nothing may escape."""
    started = time.perf_counter()
    try:
        result: Result = chosen(*chosen.read(call.args))
    except ToolError as error:
        return Outcome(False, error=_shorten(str(error), 500), seconds=time.perf_counter() - started)
    except Exception as error:
        reason = f"{call.name} failed: {type(error).__name__}: {_shorten(str(error), 200)}"
        return Outcome(False, error=reason, seconds=time.perf_counter() - started)
    seconds = time.perf_counter() - started
    if isinstance(result, list):
        return Outcome(bool(result), error="" if result else "nothing found", seconds=seconds, sources=tuple(result))
    return Outcome(True, text=_UNSEEN.sub("", str(result)), seconds=seconds)


def run_calls(
    calls: Sequence[Call], tools: Mapping[str, Tool], enabled: Collection[str] | None = None, *, room: int = 0
) -> list[Outcome]:
    """Run the calls of one line side by side; calls after the first `MAX_CALLS` are dropped, not run."""
    found: dict[int, Outcome] = {}
    for index, news in stream_calls(calls, tools, enabled, room=room):
        if isinstance(news, Outcome):
            found[index] = news
    return numbered([found[index] for index in range(len(calls))])


def stream_calls(
    calls: Sequence[Call], tools: Mapping[str, Tool], enabled: Collection[str] | None = None, *, room: int = 0
) -> Iterator[tuple[int, Outcome | str]]:
    """Like `run_calls`, yielding (index, outcome) as each call ends, and (index, text) where a tool tells its progress.

    A call that outlives its tool's deadline has an outcome that says so; whatever it does after is ignored, and so
    is everything once this iterator is closed.
    """
    news: queue.SimpleQueue[tuple[int, Outcome | str]] = queue.SimpleQueue()
    waiting: dict[int, tuple[Tool, threading.Thread, float]] = {}
    for index, call in enumerate(calls):
        if index >= MAX_CALLS:
            yield index, Outcome(False, error=f"dropped: one line runs at most {MAX_CALLS} calls", ran=False)
            continue
        chosen = refusal(call, tools, enabled)
        if isinstance(chosen, Tool) and len(still_running(chosen)) >= STUCK:
            chosen = Outcome(False, error=f"{call.name} is still busy with calls that took too long; try again later")
        if isinstance(chosen, Outcome):
            yield index, chosen
            continue
        job = _job(chosen, call, index, news, room)
        thread = threading.Thread(target=contextvars.copy_context().run, args=(job,), daemon=True, name=chosen.key)
        waiting[index] = (chosen, thread, time.monotonic() + chosen.seconds)
        thread.start()
    while waiting:
        patience = min(deadline for _, _, deadline in waiting.values()) - time.monotonic()
        try:
            index, what = news.get(timeout=max(0.0, patience))
        except queue.Empty:
            for index, (late, thread, deadline) in list(waiting.items()):
                if time.monotonic() >= deadline:
                    del waiting[index]
                    _late.setdefault(late.name, []).append(thread)
                    yield (
                        index,
                        Outcome(False, error=f"{late.name} took more than {late.seconds:g} s", seconds=late.seconds),
                    )
            continue
        if index in waiting:
            if isinstance(what, Outcome):
                del waiting[index]
            yield index, what


def _job(chosen: Tool, call: Call, index: int, news: queue.SimpleQueue[tuple[int, Outcome | str]], room: int):
    """What the thread of a call does."""

    def job() -> None:
        _room.set(room)
        on_progress(lambda text: news.put((index, text)))
        news.put((index, _ask(chosen, call)))

    return job


def still_running(tool: Tool) -> list[threading.Thread]:
    """The calls of a tool that outlived their deadline and have not ended."""
    _late[tool.name] = [thread for thread in _late.get(tool.name, []) if thread.is_alive()]
    return _late[tool.name]


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
        text = " ".join(_UNSEEN.sub(" ", source.text).split())
        text = text if len(text) <= limit else text[: limit - 1] + "…"
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
    """What the model reads of an outcome, in at most `limit` characters (0 = any number)."""
    if not outcome.ok:
        return NO_RESULT
    if outcome.sources:
        each = min(ITEM_LIMIT, limit // len(outcome.sources) - 10) if limit else ITEM_LIMIT
        return cited(outcome.sources, outcome.first, max(each, 20))
    return outcome.text if not 0 < limit < len(outcome.text) else outcome.text[: limit - 1] + "…"


def _one_line(raw: str) -> str:
    """A command on one line, so that its argument cannot look like a line of its own."""
    return " ".join(raw.split("\n")) if "\n" in raw else raw
