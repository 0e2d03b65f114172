"""A command's dataclass turned into flags, help and JSON.

Every command is one frozen dataclass in the file that does the work; this file is the only one that knows how its
fields become a command line. Nothing is said twice: the docstring of the class is the help of the command, and the
comment beside, above or below a field is the help of its flag.

    @dataclass(frozen=True)
    class Chat:
        "Talk to a model in the terminal."
        prompt: str | None = option(None, short="-p")  # ask this once and leave
        temperature: float = 0.7  # 0 = always the likeliest token

    config = parse(Chat, ["-p", "Hello", "--temperature", "0"], prog="moss chat")

Rules: `max_tokens` becomes `--max-tokens`; a field without a default is a positional argument; a bool that is False
becomes `--name`, one that is True `--no-name`; a list takes several values, `--data a b`; every command takes
`--config FILE` (JSON or YAML with the field names), which flags after it override. Bad usage raises `UsageError` with
one line.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import itertools
import textwrap
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from moss.errors import UsageError

T = TypeVar("T")
WIDTH = 100  # of help texts; fixed, so that docs/commands.md is the same wherever it is made


def option(default: Any = dataclasses.MISSING, *, short: str | None = None, positional: bool = False) -> Any:
    """A field with what its annotation cannot say: a one-letter flag, or that it stands without a flag.

    A mutable default (a list) is given as a function without arguments that makes it.
    """
    metadata = {"short": short, "positional": positional}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(command: type[T], argv: Sequence[str], *, prog: str) -> T:
    """The command's dataclass filled from `argv`; `--help` prints and exits 0, bad usage raises `UsageError`."""
    parser = build_parser(command, prog=prog)
    try:
        return _instance(command, parser.parse_args(_join_values(parser, argv)))
    except argparse.ArgumentError as error:
        raise UsageError(f"{_unknown(parser, str(error)) or _one_line(str(error))}; see {prog} --help") from None


def from_json(command: type[T], values: dict[str, Any]) -> T:
    """The command's dataclass from what `to_json` gave; unknown keys and wrong types raise `UsageError`."""
    parser = build_parser(command, prog=command.__name__)
    try:
        return _instance(command, parser.parse_object(values))
    except argparse.ArgumentError as error:
        raise UsageError(f"{command.__name__}: {_one_line(str(error))}") from None


def to_json(config: Any) -> dict[str, Any]:
    """Field names and values with paths as text, ready for `json.dumps`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))


def build_parser(command: type, *, prog: str) -> ArgumentParser:
    """The parser of one command."""
    parser = ArgumentParser(
        prog=prog,
        description=inspect.cleandoc(command.__doc__ or ""),
        exit_on_error=False,
        formatter_class=_Help,
        print_config=None,
        allow_abbrev=False,
    )
    docs = field_docs(command)
    hints = get_type_hints(command)
    for field in dataclasses.fields(command):
        _add(parser, field, hints[field.name], docs.get(field.name, ""))
    parser.add_argument(
        "--config", metavar="FILE", action="config", help="JSON or YAML file with values for these flags"
    )
    return parser


def flags(command: type) -> list[str]:
    """The flags and positional names of a command in order, as users type them."""
    names = []
    for action in build_parser(command, prog="moss")._actions:
        names.append("/".join(action.option_strings) or str(action.metavar or action.dest))
    return names


def field_docs(command: type) -> dict[str, str]:
    """What the source says about each field: a comment beside it, comment lines above it, or a string below it."""
    docs: dict[str, str] = {}
    for base in reversed(command.__mro__):
        if dataclasses.is_dataclass(base) and isinstance(base, type):
            docs.update(_class_docs(base))
    return docs


def _class_docs(command: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(command))
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            where = beside if token.line[: token.start[1]].strip() else alone
            where[token.start[0]] = token.string.lstrip("#").strip()
    docs = {}
    for node, after in itertools.zip_longest(tree.body, tree.body[1:]):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        text = [beside[line] for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in beside]
        line = node.lineno - 1
        while not beside.get(node.lineno) and line in alone:
            text.insert(0, alone[line])
            line -= 1
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            text.append(inspect.cleandoc(after.value.value))
        docs[node.target.id] = " ".join(text)
    return docs


def _add(parser: ArgumentParser, field: dataclasses.Field[Any], hint: Any, doc: str) -> None:
    default = field.default_factory() if callable(field.default_factory) else field.default
    required = default is dataclasses.MISSING
    doc = doc.replace("%", "%%")
    several = get_origin(hint) is list
    if required or field.metadata.get("positional"):
        nargs: dict[str, Any] = {} if required else {"nargs": "*" if several else "?", "default": default}
        kind = get_args(hint)[0] if several else _plain(hint)
        parser.add_argument(field.name, type=kind, help=doc + _choices(hint), **nargs)
        return
    name = field.name.replace("_", "-")
    short = [field.metadata["short"]] if field.metadata.get("short") else []
    if hint is bool:
        flag, action = (f"--no-{name}", "store_false") if default else (f"--{name}", "store_true")
        parser.add_argument(*short, flag, dest=field.name, action=action, default=default, help=doc)
        return
    shown = "" if default is None or default in ("", []) else f" (default: {_shown(default)})"
    many: dict[str, Any] = {"nargs": "*"} if several else {}
    kind = get_args(hint)[0] if many else _plain(hint)
    parser.add_argument(
        *short, f"--{name}", type=kind, default=default, metavar=_metavar(field.name, hint), help=doc + shown, **many
    )


def _plain(hint: Any) -> Any:
    """`str | None` becomes `str`: jsonargparse would read the text "null" as None, and a user may well say null."""
    return str if {str, type(None)} == set(get_args(hint)) else hint


def _choices(hint: Any) -> str:
    return f": {', '.join(map(str, get_args(hint)))}" if get_origin(hint) is Literal else ""


def _metavar(name: str, hint: Any) -> str:
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            return "{" + ",".join(str(choice) for choice in get_args(part)) + "}"
        if part is Path:
            return "PATH"
    return name.upper()


def _shown(default: Any) -> str:
    if isinstance(default, list):
        return " ".join(map(str, default))
    return str(default).replace("%", "%%")


def _join_values(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """`-p "-3+4"` becomes `-p=-3+4`: a text that starts with a minus sign is no flag unless it is one of ours."""
    known = {text: action for action in parser._actions for text in action.option_strings}
    joined: list[str] = []
    waiting: str | None = None
    for argument in argv:
        if waiting is not None and argument.startswith("-") and argument.split("=")[0] not in known:
            joined[-1] = f"{waiting}={argument}"
            waiting = None
            continue
        waiting = argument if argument in known and known[argument].nargs is None else None
        joined.append(argument)
    return joined


def _instance(command: type[T], values: Any) -> T:
    hints = get_type_hints(command)
    fields = {field.name: values[field.name] for field in dataclasses.fields(command)}  # type: ignore[arg-type]
    for name, value in fields.items():
        if hints[name] is bool and not isinstance(value, bool):  # "false" in a file must not mean yes
            raise UsageError(f"{name}: expected true or false, got {value!r}")
    return command(**fields)


def _unknown(parser: ArgumentParser, message: str) -> str:
    """What to say about an argument that no flag takes; nothing when the message is about something else."""
    head, _, rest = message.partition("unrecognized arguments: ")
    if head or not rest:
        return ""
    name = rest.split()[0].split("=")[0]
    known = [flag for action in parser._actions for flag in action.option_strings]
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown argument {name}" + (f", did you mean {close[0]}?" if close else "")


def _one_line(message: str) -> str:
    """jsonargparse's several lines about one bad value, as "--quality: expected int or nothing, got 'x'"."""
    lines = [line.strip() for line in message.splitlines()]
    head = lines[0]
    if head.startswith('Parser key "'):
        name = head.split('"')[1]
        rest = head.split('":', 1)[1].strip()
        value = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("Given value:")), "")
        expected = next((line for line in lines if line.startswith("Subtypes:")), "")
        if expected:
            rest = f"expected {_type_words(expected.removeprefix('Subtypes:'))}, got {value!r}"
        elif len(lines) > 1:
            wanted, _, got = lines[1].partition(". Got value:")
            rest = f"expected {_type_words(wanted.removeprefix('Expected a'))}, got {got.strip()!r}"
        return f"--{name.replace('_', '-')}: {rest}"
    return " ".join(line for line in lines if line)


def _type_words(text: str) -> str:
    for old, new in (
        ("<class '", ""),
        ("'>", ""),
        ("typing.Literal", "one of "),
        ("NoneType", "null"),
        ("pathlib.", ""),
    ):
        text = text.replace(old, new)
    return text.strip().strip("[]").replace("one of [", "one of ").replace("'", "")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help at a fixed width, and no second copy of a long flag's value name beside its short one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.dest.upper())}"
