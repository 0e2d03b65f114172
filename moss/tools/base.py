"""The frame of every tool: what a tool is, what is shown of it, and what it may give back.

A tool is one typed, documented function with one decorator:

    @tool
    def convert_money(amount: float, currency: str) -> str:
        '''Convert an amount of euros into another currency.

        Args:
            amount: euros, for example 12.5
            currency: three letters, for example USD
        '''

The name that the model writes, the switch line, the API line, the JSON schema and the help are read from the name,
the signature and the docstring; `@tool(key=…, switch=…, api=…)` names them otherwise. It stays callable from plain
Python. It raises `ToolError` for whatever the asker can mend; the reason goes to the user, the model reads
`No result.`. What a tool returns is text, or a list of `Source`s, which are numbered and can be cited in the reply.
`calls.py` reads the lines in which a model calls tools, and runs them; `own.py` finds the tools of a user's file.
"""

from __future__ import annotations

import builtins
import contextlib
import contextvars
import importlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

MODULES = ("moss.tools.search", "moss.tools.calculator", "moss.tools.solver")  # one line per file of standard tools
SECONDS = 10.0  # how long a call may take where its tool says nothing else

_SCHEMA = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object"}
_IGNORED = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")


class ToolError(Exception):
    """A call that cannot be answered; the message says why, and what to do, in one line for the user."""


@dataclass(frozen=True)
class Source:
    """One item of a result that the reply can cite by its number."""

    title: str
    url: str
    text: str


Result = str | list[Source]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call, with what is shown of it.

    `key` names it in options and files, `switch` in the prompt, `name` is what the model writes. `same_line` says
    that the result stands right after `=>`; otherwise it begins on the next line. `seconds` is the deadline of a call.
    `prepare`, if any, begins to start what the tool needs without waiting for it. `missing`, if any, says in one line
    what it would take for the tool to work here, "" when it does.
    """

    key: str
    switch: str
    name: str
    function: Callable[..., Result]
    same_line: bool = False
    seconds: float = SECONDS
    prepare: Callable[[], None] | None = None
    missing: Callable[[], str] | None = None
    arguments: Mapping[str, Any] = field(
        default_factory=dict
    )  # JSON schema of each, where the signature says too little

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return self.function(*args, **kwargs)

    @property
    def lacks(self) -> str:
        """What it would take for the tool to work here, in one line; "" when it does."""
        return "" if self.missing is None else self.missing()

    @property
    def api(self) -> str:
        """The API as the prompt shows it, required arguments only: `Calculate(expression)`."""
        return f"{self.name}({', '.join(self.required)})"

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The arguments. A function without any has one that is ignored: a command has at least one."""
        return inspect.signature(self.function).parameters or {"request": _IGNORED}

    @property
    def required(self) -> list[str]:
        """The names of the arguments that every call has."""
        return [name for name, parameter in self.parameters.items() if parameter.default is parameter.empty]

    @property
    def help(self) -> str:
        """The docstring's first paragraph as one line."""
        return " ".join(inspect.cleandoc(self.function.__doc__ or "").split("\n\n")[0].split())

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as a function in OpenAI's `tools` list."""
        notes = _argument_notes(self.function)
        properties = {
            name: self.arguments.get(name) or {"type": _SCHEMA[_kind(parameter)], "description": notes.get(name, "")}
            for name, parameter in self.parameters.items()
        }
        parameters = {"type": "object", "properties": properties, "required": self.required}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.help, "parameters": parameters},
        }

    def read(self, args: Sequence[str]) -> list[Any]:
        """The arguments of a command as the function wants them; `ToolError` where number or kind do not fit."""
        signature = inspect.signature(self.function)
        if not signature.parameters:
            return []
        try:
            bound = signature.bind(*args)
        except TypeError:
            raise ToolError(f"{self.name} does not take {len(args)} argument(s); write {self.api}") from None
        kinds = [_kind(self.parameters[name]) for name in bound.arguments]
        kinds += [kinds[-1]] * (len(args) - len(kinds)) if kinds else []  # *args: all of the same kind
        return [_converted(text, kind, self.name) for text, kind in zip(args, kinds)]


@overload
def tool(function: Callable[..., Result], /) -> Tool: ...
@overload
def tool(
    *,
    key: str = "",
    switch: str = "",
    api: str = "",
    same_line: bool = False,
    seconds: float = SECONDS,
    prepare: Callable[[], None] | None = None,
    missing: Callable[[], str] | None = None,
) -> Callable[[Callable[..., Result]], Tool]: ...
def tool(
    function: Callable[..., Result] | None = None, /, *, key: str = "", switch: str = "", api: str = "", **rest: Any
) -> Any:
    """Make a function a tool; see the head of this file.

    A function `convert_money` is the tool `convert_money`, called as `ConvertMoney`, with the switch "Convert money",
    where `key`, `api` and `switch` do not say otherwise. ValueError for a function without a docstring.
    """

    def decorate(function: Callable[..., Result]) -> Tool:
        given = function.__name__.strip("_")
        name = api.split("(")[0] or command_name(given)
        if not function.__doc__:
            raise ValueError(f"tool {name} needs a docstring: it is what the model and the user read about it")
        label = switch or given.replace("_", " ").capitalize()
        made = Tool(key or given, label, name, function, **rest)
        for parameter in made.parameters.values():
            _kind(parameter)
        return made

    return decorate if function is None else decorate(function)


def command_name(name: str) -> str:
    """A name in any spelling as models write commands: `get_weather` and `getWeather` are `GetWeather`."""
    parts = re.findall(r"[A-Za-z0-9]+", name)
    joined = "".join(part[0].upper() + part[1:] for part in parts)
    return joined if joined[:1].isalpha() else "Tool" + joined


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


# ------------------------------------------------------------------------------------------------------- progress

_progress: contextvars.ContextVar[Callable[[str], None]] = contextvars.ContextVar("progress")


def progress(text: str) -> None:
    """Tell whoever waits for this call where it is; does nothing outside of a call."""
    _progress.get(lambda text: None)(text)


def on_progress(tell: Callable[[str], None]) -> None:
    """Have `progress` call `tell` from here on, in this thread."""
    _progress.set(tell)


# ------------------------------------------------------------------------------------------------------ arguments


def _kind(parameter: inspect.Parameter) -> str:
    """The name of the type of an argument, `str` where there is none; ValueError for one that no text can become."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return "str"
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    name = re.split(r"\W", name.replace(" ", "").removesuffix("|None").removeprefix("Optional["))[0]
    if name not in _SCHEMA:
        raise ValueError(f"argument {parameter.name} is a {annotation}; a tool takes {', '.join(_SCHEMA)}")
    return name


def _converted(text: str, kind: str, tool: str) -> Any:
    """The text of an argument as its kind."""
    try:
        if kind == "bool":
            return (_YES + _NO).index(text.strip().lower()) < len(_YES)
        if kind in ("list", "dict"):
            value = json.loads(text)
            if not isinstance(value, getattr(builtins, kind)):
                raise ValueError
            return value
        return getattr(builtins, kind)(text)
    except (ValueError, RecursionError):
        shown = text if len(text) <= 40 else text[:39] + "…"
        raise ToolError(f"{tool} was given {shown!r} where it takes {_SCHEMA[kind]}") from None


def _argument_notes(function: Callable[..., Result]) -> dict[str, str]:
    """What the docstring's `Args:` section says about each argument."""
    _, _, section = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
    notes: dict[str, str] = {}
    for line in section.split("\n"):
        name, colon, note = line.strip().partition(": ")
        if not colon or " " in name:
            break
        notes[name] = note
    return notes
