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

Arguments are `str`, `int`, `float`, `bool`, `list` (also `list[int]`) or `dict`, the last two written as JSON, and may
be optional, have defaults, or be any number (`*amounts`). A line of commands gives them by their place; `""` leaves out
one whose default is no text.
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
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, overload

MODULES = ("moss.tools.search", "moss.tools.calculator", "moss.tools.solver")  # one line per file of standard tools
SECONDS = 10.0  # how long a call may take where its tool says nothing else

_SCHEMA = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object"}
_IGNORED = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="")
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")
_COMMAND = re.compile(r"(?!None$)[A-Z][A-Za-z0-9]*")  # the name of a command
_KEY = re.compile(r"(?!(?:thoughts|all|none)$)[\w-]+")


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
    arguments: Mapping[str, Any] = field(default_factory=dict)  # JSON schema of those whose type says too little
    definitions: Mapping[str, Any] = field(default_factory=dict)  # what those schemas refer to: `$defs`

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return self.function(*args, **kwargs)

    @property
    def lacks(self) -> str:
        """What it would take for the tool to work here, in one line; "" when it does."""
        return "" if self.missing is None else self.missing()

    @property
    def api(self) -> str:
        """The API as the prompt shows it, required arguments only: `Calculate(expression)`. One is shown always."""
        names = self.required or [f"*{name}" if _many(each) else name for name, each in self.parameters.items()][:1]
        return f"{self.name}({', '.join(names)})"

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of a command. A function without any has one that is ignored: a command has at least one."""
        given = {}
        for name, each in _signature(self.function).parameters.items():
            by_name_only = each.kind is each.KEYWORD_ONLY and each.default is not each.empty
            if each.kind is not each.VAR_KEYWORD and not by_name_only:
                given[name] = each
        return given or {"request": _IGNORED}

    @property
    def required(self) -> list[str]:
        """The names of the arguments that every call has."""
        return [name for name, each in self.parameters.items() if each.default is each.empty and not _many(each)]

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
            form = _form([*["list"] * _many(parameter), *_kinds(parameter)])
            properties[name] = self.arguments.get(name) or {**form, "description": notes.get(name, "")}
        parameters = {"type": "object", "properties": properties, "required": self.required, **self.definitions}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.help, "parameters": parameters},
        }

    def read(self, args: Sequence[str]) -> list[Any]:
        """The arguments of a command as the function wants them; `ToolError` where number or kind do not fit."""
        wanted = list(self.parameters.values())
        if wanted[0] is _IGNORED:
            return []
        if _many(wanted[-1]):
            wanted += [wanted.pop()] * max(0, len(args) - len(wanted) + 1)
        if not len(self.required) <= len(args) <= len(wanted):
            raise ToolError(f"{self.name} does not take {len(args)} argument(s); write {self.api}")
        return [_converted(text, parameter, self.name) for text, parameter in zip(args, wanted)]

    def spelled(self, given: Mapping[str, Any]) -> list[str]:
        """Arguments that come by name, as JSON has them, as the texts of a command; the inverse of `named`.

        `ToolError` where one is missing, or there is none of that name.
        """
        given = {name: value for name, value in given.items() if value is not None}
        parameters = self.parameters
        if not set(self.required) <= given.keys() <= parameters.keys():
            raise ToolError(f"{self.name} was given {', '.join(given) or 'nothing'}; write {self.api}")
        last = max((place for place, name in enumerate(parameters) if name in given), default=0)
        values: list[Any] = []
        for name, each in list(parameters.items())[: last + 1]:
            value = given.get(name, each.default if isinstance(each.default, str) else "")
            values += value if _many(each) and isinstance(value, list) else [value]
        return [as_text(value) for value in values]

    def named(self, args: Sequence[str]) -> dict[str, Any]:
        """The arguments of a command by their names."""
        names = list(self.parameters)
        if _many(self.parameters[names[-1]]):
            places, rest = names[:-1], list(args[len(names) - 1 :])
            return {**dict(zip(places, args)), **({names[-1]: rest} if rest else {})}
        return dict(zip([*names, *(f"argument_{number + 1}" for number in range(len(names), len(args)))], args))


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
    where `key`, `api` and `switch` do not say otherwise. ValueError for a function that no command can call, and for
    one without a docstring.
    """

    def decorate(function: Callable[..., Result]) -> Tool:
        given = function.__name__.strip("_")
        name = api.split("(")[0] or command_name(given)
        if not (function.__doc__ or "").strip():
            raise ValueError(f"tool {name} needs a docstring: it is what the model and the user read about it")
        label = switch or given.replace("_", " ").capitalize()
        made = Tool(key or given, label, name, function, **rest)
        if not _COMMAND.fullmatch(name):
            raise ValueError(f"api {name!r} is no name of a command: a capital letter, then letters and digits")
        if not _KEY.fullmatch(made.key):
            raise ValueError(f"key {made.key!r} cannot name a tool; take letters, digits, - and _ for it")
        if len(label.splitlines()) != 1 or ":" in label:
            raise ValueError(f"switch {label!r} cannot stand in the prompt; write one line without a colon")
        for parameter in made.parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise ValueError(f"argument {parameter.name} needs a default or a place: a command has no names")
            _kinds(parameter)
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


def _signature(function: Callable[..., Result]) -> inspect.Signature:
    """The signature, its annotations as types where that can be: they are texts under `annotations` of `__future__`."""
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, TypeError, AttributeError, SyntaxError):  # a name that is there for type checkers alone, say
        return inspect.signature(function)


def _many(parameter: inspect.Parameter) -> bool:
    """Whether it is `*args`."""
    return parameter.kind is parameter.VAR_POSITIONAL


def _kinds(parameter: inspect.Parameter) -> list[str]:
    """The names of an argument's type, `str` where there is none; ValueError for one that no text can become."""
    kinds = ["str"] if parameter.annotation is parameter.empty else _names(parameter.annotation)
    if not kinds:
        raise ValueError(f"argument {parameter.name} is a {parameter.annotation}; a tool takes {', '.join(_SCHEMA)}")
    return kinds


def _names(wanted: Any) -> list[str]:
    """The name of a type, behind `list` those of its elements, as far as JSON knows them: list, int for `list[int]`."""
    if get_origin(wanted) is Annotated:
        wanted = get_args(wanted)[0]
    if get_origin(wanted) in (Union, UnionType):
        kinds = [each for each in get_args(wanted) if each is not NoneType]
        wanted = kinds[0] if len(kinds) == 1 else wanted
    if isinstance(wanted, str):
        bare = re.sub(r"\s|\|None$|^(?:\w+\.)?Optional\[", "", wanted)
        name, _, inner = re.split(r"(\W|$)", bare, maxsplit=1)
    else:
        name = getattr(get_origin(wanted) or wanted, "__name__", "")
        inner = next(iter(get_args(wanted)), "")
    return [name, *(_names(inner) if name == "list" else [])] if name in _SCHEMA else []


def _form(kinds: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of such a type. Every array names its elements, or OpenAI refuses the whole request."""
    if kinds[0] == "list":
        return {"type": "array", "items": _form(kinds[1:] or ["str"])}
    return {"type": _SCHEMA[kinds[0]]}


def _fits(value: Any, kinds: Sequence[str]) -> bool:
    """Whether a value of JSON is of such a type, its elements too; True is no integer there."""
    if not kinds:
        return True
    wanted = (int, float) if kinds[0] == "float" else (getattr(builtins, kinds[0]),)
    return type(value) in wanted and (kinds[0] != "list" or all(_fits(each, kinds[1:]) for each in value))


def _converted(text: str, parameter: inspect.Parameter, tool: str) -> Any:
    """The text of an argument as its kind."""
    default, kinds = parameter.default, _kinds(parameter)
    if not text and default is not parameter.empty and not isinstance(default, str):
        return default
    try:
        if kinds[0] == "bool":
            return (_YES + _NO).index(text.strip().lower()) < len(_YES)
        if kinds[0] in ("list", "dict"):
            value = json.loads(text)
            if not _fits(value, kinds):
                raise ValueError
            return value
        return getattr(builtins, kinds[0])(text)
    except (ValueError, RecursionError):
        shown = text if len(text) <= 40 else text[:39] + "…"
        wanted = " of ".join(_SCHEMA[kind] for kind in kinds)
        raise ToolError(f"{tool} was given {shown!r} where it takes {wanted}") from None


def as_text(value: Any) -> str:
    """A value of JSON as the text of an argument."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _argument_notes(function: Callable[..., Result]) -> dict[str, str]:
    """What the docstring's `Args:` section says about each argument."""
    _, _, section = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
    notes: dict[str, str] = {}
    outer = 0  # how far the names are indented; what stands further in goes on with a note
    for line in filter(str.strip, section.split("\n")):
        depth = len(line) - len(line.lstrip())
        outer = outer or depth
        if not depth:  # the next section
            break
        named = re.match(r"\*{0,2}(\w+)(?: \(.*?\))?:(.*)", line.strip())
        if named and depth == outer:
            notes[named[1]] = named[2].strip()
        elif notes:
            notes[next(reversed(notes))] += " " + line.strip()
    return notes
