"""The frame of every tool: what a tool is, how a line of commands is read and run, how results are written.

A tool is one function with one decorator, and one line in `MODULES` below:

    @tool(key="calculator", switch="Calculator", api="Calculate")
    def calculate(expression: str) -> str:
        '''Compute an arithmetic expression.

        Args:
            expression: the expression, for example 1.5*4+3
        '''

The JSON schema, the API line and the help are read from its signature and docstring, and it stays callable from plain
Python. A tool raises `ToolError` for whatever the asker can mend; the reason goes to the user, the model reads
`No result.`. A line of commands is what the model writes between `<|Commands|>` and `<eoc>`:

    calls = parse_commands('Calculate("37*12"), Solve("x+2=5")')
    outcomes = run_calls(calls, standard_tools())
    format_results(calls, outcomes)                     # Calculate("37*12") => 444\\nSolve("x+2=5") =>\\nx = 3
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MODULES = ("moss.tools.calculator", "moss.tools.solver")  # one line per file that holds standard tools
MAX_CALLS = 4  # calls of one line that run; those after them are dropped
NO_RESULT = "No result."

_NAME = re.compile(r"(?<![\w.])[A-Z][A-Za-z0-9]*[ \t]*\(")
_JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


class ToolError(Exception):
    """A call that cannot be answered; the message says why, and what to do, in one line for the user."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call, with what is shown of it.

    `key` names it in options and files, `switch` in the prompt, `name` is what the model writes. `same_line` says
    that the result stands right after `=>`; otherwise it begins on the next line. `prepare`, if any, begins to start
    what the tool needs without waiting for it.
    """

    key: str
    switch: str
    name: str
    function: Callable[..., str]
    same_line: bool = False
    prepare: Callable[[], None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self.function(*args, **kwargs)

    @property
    def api(self) -> str:
        """The API as the prompt shows it, required arguments only: `Calculate(expression)`."""
        required = [name for name, parameter in self.parameters.items() if parameter.default is parameter.empty]
        return f"{self.name}({', '.join(required)})"

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def help(self) -> str:
        """The docstring's first paragraph as one line."""
        return " ".join(inspect.cleandoc(self.function.__doc__ or "").split("\n\n")[0].split())

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as a function in OpenAI's `tools` list."""
        notes = _argument_notes(self.function)
        properties = {}
        for name, parameter in self.parameters.items():
            kind = re.split(r"\W", str(parameter.annotation))[0]
            properties[name] = {"type": _JSON_TYPES.get(kind, "string"), "description": notes.get(name, "")}
        required = [name for name, parameter in self.parameters.items() if parameter.default is parameter.empty]
        parameters = {"type": "object", "properties": properties, "required": required}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.help, "parameters": parameters},
        }

    def check(self, args: Sequence[str]) -> None:
        """Raise `ToolError` when the number of arguments does not fit the function."""
        try:
            inspect.signature(self.function).bind(*args)
        except TypeError:
            raise ToolError(f"{self.name} does not take {len(args)} argument(s); write {self.api}") from None


def tool(
    *, key: str, switch: str, api: str, same_line: bool = False, prepare: Callable[[], None] | None = None
) -> Callable[[Callable[..., str]], Tool]:
    """Make a function a tool; see the head of this file. `api` is the name the model writes."""

    def decorate(function: Callable[..., str]) -> Tool:
        if not function.__doc__:
            raise ValueError(f"tool {api} needs a docstring: it is what the model and the user read about it")
        return Tool(key, switch, api.split("(")[0], function, same_line, prepare)

    return decorate


def standard_tools() -> dict[str, Tool]:
    """The tools that come with the project, by key; only their files are imported, nothing is started."""
    tools = {}
    for module in map(importlib.import_module, MODULES):
        tools.update({value.key: value for value in vars(module).values() if isinstance(value, Tool)})
    return tools


def prepare(tools: Mapping[str, Tool], enabled: Collection[str] | None = None) -> None:
    """Begin to start what the enabled tools need, so that their first call does not wait: SymPy takes a second.

    What cannot start says so at its first call.
    """
    for key, each in tools.items():
        if each.prepare is not None and (enabled is None or key in enabled):
            with contextlib.suppress(ToolError, OSError):
                each.prepare()


def _argument_notes(function: Callable[..., str]) -> dict[str, str]:
    """What the docstring's `Args:` section says about each argument."""
    _, _, section = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
    notes: dict[str, str] = {}
    for line in section.split("\n"):
        name, colon, note = line.strip().partition(": ")
        if not colon or " " in name:
            break
        notes[name] = note
    return notes


# ---------------------------------------------------------------------------------------------- reading commands


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


# ---------------------------------------------------------------------------------------------- running and writing


@dataclass(frozen=True)
class Outcome:
    """What became of a call: its text when `ok`, else the reason in `error`; `ran` is False when no tool was asked."""

    ok: bool
    text: str = ""
    error: str = ""
    seconds: float = 0.0
    ran: bool = True


def execute(call: Call, tools: Mapping[str, Tool], enabled: Collection[str] | None = None) -> Outcome:
    """Run one call; `tools` by key, `enabled` the keys switched on (None = all of `tools`).

    Whatever the tool raises becomes an outcome: this is one of the borders where nothing may escape.
    """
    by_name = {each.name: each for each in tools.values()}
    chosen = by_name.get(call.name)
    if chosen is None:
        return Outcome(False, error=f"no tool is called {call.name!r}; there are {', '.join(by_name)}", ran=False)
    if enabled is not None and chosen.key not in enabled:
        return Outcome(False, error=f"{call.name} is switched off", ran=False)
    if call.error:
        return Outcome(False, error=call.error)
    started = time.perf_counter()
    try:
        chosen.check(call.args)
        text = chosen(*call.args)
    except ToolError as error:
        return Outcome(False, error=str(error), seconds=time.perf_counter() - started)
    except Exception as error:
        reason = f"{call.name} failed: {type(error).__name__}: {_shorten(str(error), 200)}"
        return Outcome(False, error=reason, seconds=time.perf_counter() - started)
    return Outcome(True, text=text, seconds=time.perf_counter() - started)


def run_calls(
    calls: Sequence[Call], tools: Mapping[str, Tool], enabled: Collection[str] | None = None
) -> list[Outcome]:
    """Run the calls of one line side by side; calls after the first `MAX_CALLS` are dropped, not run."""
    return [outcome for _, outcome in sorted(stream_calls(calls, tools, enabled), key=lambda pair: pair[0])]


def stream_calls(
    calls: Sequence[Call], tools: Mapping[str, Tool], enabled: Collection[str] | None = None
) -> Iterator[tuple[int, Outcome]]:
    """Like `run_calls`, yielding (index, outcome) as each call ends."""
    for index in range(MAX_CALLS, len(calls)):
        yield index, Outcome(False, error=f"dropped: one line runs at most {MAX_CALLS} calls", ran=False)
    active = calls[:MAX_CALLS]
    if len(active) <= 1:
        for index, call in enumerate(active):
            yield index, execute(call, tools, enabled)
        return
    with ThreadPoolExecutor(len(active), thread_name_prefix="tool") as pool:
        futures = {pool.submit(execute, call, tools, enabled): index for index, call in enumerate(active)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def format_results(
    calls: Sequence[Call], outcomes: Sequence[Outcome], tools: Mapping[str, Tool] | None = None, *, limit: int = 0
) -> str:
    """The body of a Results section: one item per call that ran, `None` when none did.

    `limit` > 0 cuts each item's text to that many characters. Reasons of failures are not shown to the model.
    """
    same_line = {each.name for each in (standard_tools() if tools is None else tools).values() if each.same_line}
    items = []
    for call, outcome in zip(calls, outcomes, strict=True):
        if outcome.ran:
            body = outcome.text if outcome.ok else NO_RESULT
            if 0 < limit < len(body):
                body = body[: limit - 1] + "…"
            separator = " " if call.name in same_line else "\n"
            items.append(f"{_one_line(call.raw)} =>{separator}{body}")
    return "\n".join(items) or "None"


def _one_line(raw: str) -> str:
    """A command on one line, so that its argument cannot look like a line of its own."""
    return " ".join(raw.split("\n")) if "\n" in raw else raw
