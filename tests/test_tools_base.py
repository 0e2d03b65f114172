"""What a tool is: its names, API line and schema are read from the function, and texts become its arguments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

import pytest

from moss.tools.base import Source, Tool, ToolError, as_text, command_name, standard_tools, tool
from moss.tools.calls import parse_commands

if TYPE_CHECKING:
    from moss.chat import Turn


@tool(key="echo", switch="Echo", api="Echo", same_line=True)
def echo(text: str, times: int = 1) -> str:
    """Say it again.

    More about it that help leaves out.

    Args:
        text: what to say
        times: how often
    """
    return text * times


def test_tool_describes_itself() -> None:
    """Prevents: a schema or API line that differs from the function."""
    assert echo.api == "Echo(text)"
    assert echo.help == "Say it again."
    assert echo("hello") == "hello"
    assert echo.schema["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "what to say"},
            "times": {"type": "integer", "description": "how often"},
        },
        "required": ["text"],
    }


def test_tool_without_docstring_is_refused() -> None:
    """Prevents: a tool that says nothing about itself to the model."""
    with pytest.raises(ValueError, match="needs a docstring"):
        tool(key="a", switch="A", api="A")(lambda text: text)


def test_standard_tools_have_their_names() -> None:
    """Prevents: renaming a switch or API that trained models know."""
    tools = standard_tools()
    assert [(key, each.switch, each.api) for key, each in tools.items()] == [
        ("search", "Web search", "Search(query)"),
        ("calculator", "Calculator", "Calculate(expression)"),
        ("solver", "Equation solver", "Solve(equation)"),
    ]


def test_importing_tools_does_not_import_sympy() -> None:
    """Prevents: half a second before every first token, and SymPy in the process that holds the secrets."""
    code = "import sys; from moss.tools.base import standard_tools; standard_tools(); print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "False", done.stderr


# ---------------------------------------------------------------------------------------------------------- arguments


def typed(annotation: Any, default: Any = ...) -> Tool:
    """A tool `Take(value)` with one argument of this type, which gives back what it got."""

    def take(value):  # type: ignore[no-untyped-def]
        """Take a value."""
        return value

    take.__annotations__["value"] = annotation
    take.__defaults__ = None if default is ... else (default,)
    return tool(take)


@pytest.mark.parametrize(
    ("annotation", "text", "value", "kind"),
    [
        (str, " as it is ", " as it is ", "string"),
        (int, " -12 ", -12, "integer"),
        (float, "1.5e3", 1500.0, "number"),
        (float, "2", 2.0, "number"),
        (bool, "True", True, "boolean"),
        (bool, "no", False, "boolean"),
        (list, '[1, "a"]', [1, "a"], "array"),
        (list[int], "[1]", [1], "array"),
        (list[float], "[1, 2.5]", [1, 2.5], "array"),
        (list[int | str], '[1, "a"]', [1, "a"], "array"),
        (list[list[dict[str, int]]], "[]", [], "array"),
        (dict, '{"a": {"b": 1}}', {"a": {"b": 1}}, "object"),
        (dict[str, float], "{}", {}, "object"),
        (Optional[int], "3", 3, "integer"),  # noqa: UP045
        (Union[None, int], "3", 3, "integer"),  # noqa: UP007
        (int | None, "3", 3, "integer"),
        (None | list[int], "[3]", [3], "array"),
        (Annotated[int, "more"], "3", 3, "integer"),
        ("int", "3", 3, "integer"),
        ("int | None", "3", 3, "integer"),
        ("Optional[int]", "3", 3, "integer"),
        ("Union[int, None]", "3", 3, "integer"),
        ("dict[str, Any]", "{}", {}, "object"),
    ],
)
def test_texts_become_what_the_function_wants(annotation: Any, text: str, value: Any, kind: str) -> None:
    """Prevents: a function that gets "3" for 3, however its author writes the type."""
    made = typed(annotation)
    assert made.read([text]) == [value] and type(made.read([text])[0]) is type(value)
    schema = made.schema["function"]["parameters"]
    assert schema["properties"]["value"]["type"] == kind
    assert schema["required"] == ["value"] and made.api == "Take(value)"


@pytest.mark.parametrize(
    ("annotation", "text", "wants"),
    [
        (int, "twelve", "integer"),
        (int, "1.5", "integer"),
        (int, "9" * 5000, "integer"),
        (float, "", "number"),
        (bool, "maybe", "boolean"),
        (list, "{}", "array"),
        (list, "a, b", "array"),
        (list[int], '[1, "a"]', "array of integer"),
        (list[int], "[1.5]", "array of integer"),
        (list[bool], "[1]", "array of boolean"),
        (list[int], "[true]", "array of integer"),
        (Optional[list[str]], "[1]", "array of string"),  # noqa: UP045
        (list[list[float]], "[[1, 2.5], 3]", "array of array of number"),
        ("list[Missing]", "{}", "array"),
        (dict, "[1]", "object"),
        (dict, "[" * 100_000, "object"),
    ],
)
def test_texts_of_another_kind_are_one_line(annotation: Any, text: str, wants: str) -> None:
    """Prevents: a traceback, or a page of the model's text, in place of what was wrong."""
    with pytest.raises(ToolError, match=f"^Take was given '.*' where it takes {wants}$") as raised:
        typed(annotation).read([text])
    assert len(str(raised.value)) < 100


@pytest.mark.parametrize(
    ("annotation", "items"),
    [
        (list, {"type": "string"}),
        (list[Any], {"type": "string"}),
        (list[int], {"type": "integer"}),
        (list[float] | None, {"type": "number"}),
        ("Optional[list[bool]]", {"type": "boolean"}),
        ("list[Missing]", {"type": "string"}),
        (list[list[int]], {"type": "array", "items": {"type": "integer"}}),
        (list[list], {"type": "array", "items": {"type": "string"}}),
        (list[dict[str, int]], {"type": "object"}),
    ],
)
def test_every_array_names_its_elements(annotation: Any, items: dict[str, Any]) -> None:
    """Prevents: one tool with a list for whose sake OpenAI refuses the whole request."""
    form = typed(annotation).schema["function"]["parameters"]["properties"]["value"]
    assert form == {"type": "array", "items": items, "description": ""}


@pytest.mark.parametrize("annotation", [Literal["a"], int | str, bytes, Any, "Nowhere", "bytes", Tool, 3, "1 +"])
def test_what_no_text_can_become_is_refused(annotation: Any) -> None:
    """Prevents: a tool that is offered and then fails at every call."""
    with pytest.raises(ValueError, match=r"argument value is a .*; a tool takes str, int, float, bool, list, dict"):
        typed(annotation)


def test_annotations_that_only_type_checkers_see() -> None:
    """Prevents: a file whose imports stand under `if TYPE_CHECKING`, as linters make them, being refused."""

    @tool
    def history(number: int, names: Optional[list[str]] = None) -> list[Turn]:  # noqa: UP045
        """Say what was said."""
        return []

    assert history.read(["3", "[]"]) == [3, []]
    assert history.api == "History(number)"


def test_defaults_stand_in_for_what_is_left_out() -> None:
    """Prevents: an argument behind an optional one that no command can reach."""

    @tool
    def find(text: str, limit: int = 10, exact: bool = False, tags: list | None = None, way: str = "up") -> str:
        """Find it."""
        return repr((text, limit, exact, tags, way))

    assert find.api == "Find(text)"
    assert find(*find.read(["a"])) == "('a', 10, False, None, 'up')"
    assert find.read(["a", "", "", "", "down"]) == ["a", 10, False, None, "down"]
    assert find.read(["", "3", "yes", "", ""]) == ["", 3, True, None, ""]  # to text, nothing is a text as well


def test_any_number_of_arguments() -> None:
    """Prevents: `*numbers` taken for one argument that every call has."""

    @tool
    def add(*numbers: float) -> str:
        """Add numbers.

        Args:
            *numbers: what to add
        """
        return f"{sum(numbers):g}"

    @tool
    def join(first: str, *others: int) -> str:
        """Join."""
        return f"{first} {others}"

    assert (add.api, join.api) == ("Add(*numbers)", "Join(first)")
    assert add(*add.read(["1", "2", "3.5"])) == "6.5"
    assert join.read(["a"]) == ["a"] and join.read(["a", "1", "2"]) == ["a", 1, 2]
    assert add.schema["function"]["parameters"]["properties"] == {
        "numbers": {"type": "array", "items": {"type": "number"}, "description": "what to add"}
    }
    with pytest.raises(ToolError, match="Add was given 'x' where it takes number"):
        add.read(["1", "x"])
    with pytest.raises(ToolError, match=r"Join does not take 0 argument\(s\); write Join\(first\)"):
        join.read([])


def test_functions_without_arguments_are_called_with_one_that_is_ignored() -> None:
    """Prevents: a tool that no command can call, for a command has at least one argument."""

    @tool
    def now() -> str:
        """The time."""
        return "noon"

    @tool
    def loose(**options: int) -> str:
        """Only names."""
        return repr(options)

    @tool
    def asks(request: str = "") -> str:
        """Its argument is not the ignored one."""
        return request

    for made in (now, loose):
        assert made.api == f"{made.name}(request)" and made.read(["x"]) == []
        assert made.schema["function"]["parameters"]["required"] == []
    assert (now(), loose(), asks.read(["x"])) == ("noon", "{}", ["x"])


def test_names_that_a_command_cannot_give_are_left_out_or_refused() -> None:
    """Prevents: an argument in the API line that the model writes and the function never takes."""

    @tool
    def speak(text: str, *, loud: bool = False, **more: int) -> str:
        """Speak."""
        return text

    assert speak.api == "Speak(text)" and list(speak.parameters) == ["text"]
    with pytest.raises(ValueError, match="argument loud needs a default or a place"):

        @tool
        def shout(text: str, *, loud: bool) -> str:
            """Shout."""
            return text


# -------------------------------------------------------------------------------------------------- arguments by name


@tool
def book(city: str, nights: int = 1, breakfast: bool = True, room: str = "double", *guests: str) -> str:
    """Book a room."""
    return repr((city, nights, breakfast, room, guests))


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"city": "Oslo"}, ["Oslo"]),
        ({"city": "Oslo", "nights": None}, ["Oslo"]),
        ({"nights": 2, "city": "Oslo"}, ["Oslo", "2"]),
        ({"city": "Oslo", "breakfast": False}, ["Oslo", "", "false"]),
        ({"city": "Oslo", "guests": ["a", "b"]}, ["Oslo", "", "", "double", "a", "b"]),
        ({"city": {"name": "奥斯陆"}}, ['{"name": "奥斯陆"}']),
    ],
)
def test_named_arguments_find_their_places(given: dict[str, Any], texts: list[str]) -> None:
    """Prevents: a value that moves into the place of one that was left out."""
    assert book.spelled(given) == texts
    book.read(texts)


@pytest.mark.parametrize(("given", "words"), [({}, "nothing"), ({"nights": 1}, "nights"), ({"city": "x", "y": 1}, "y")])
def test_named_arguments_that_do_not_fit(given: dict[str, Any], words: str) -> None:
    """Prevents: a call with an argument that is guessed."""
    with pytest.raises(ToolError, match=rf"Book was given .*{words}; write Book\(city\)"):
        book.spelled(given)


def test_names_of_arguments_and_back() -> None:
    """Prevents: a history that tells a chat server other arguments than were given."""
    assert book.named(["Oslo", "2"]) == {"city": "Oslo", "nights": "2"}
    assert book.named(["Oslo", "2", "no", "single", "a", "b"])["guests"] == ["a", "b"]
    assert echo.named(["a", "2", "too", "many"]) == {
        "text": "a",
        "times": "2",
        "argument_3": "too",
        "argument_4": "many",
    }
    for args in (["Oslo"], ["Oslo", "2", "true", "double", "a"]):
        assert book.spelled(book.named(args)) == args
    assert (as_text("a"), as_text(True), as_text({"a": "é"})) == ("a", "true", '{"a": "é"}')


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("convert_money", "ConvertMoney"),
        ("getWeather", "GetWeather"),
        ("get-weather 2", "GetWeather2"),
        ("2nd", "Tool2nd"),
        ("天气", "Tool"),
        ("__", "Tool"),
    ],
)
def test_any_name_becomes_one_that_models_write(name: str, command: str) -> None:
    """Prevents: a tool whose name no line of commands can hold."""
    assert command_name(name) == command
    assert parse_commands(f'{command}("x")')[0].name == command


def test_the_bare_decorator_reads_all_names_from_the_function() -> None:
    """Prevents: three names to invent for a function that has a good one."""

    @tool
    def convert_money(amount: float) -> str:
        """Convert."""
        return ""

    @tool(api="Euro(amount)", seconds=3)
    def _to_euro(amount: float) -> str:
        """Convert."""
        return ""

    assert (convert_money.key, convert_money.switch, convert_money.api) == (
        "convert_money", "Convert money", "ConvertMoney(amount)"
    )  # fmt: skip
    assert (_to_euro.key, _to_euro.switch, _to_euro.api, _to_euro.seconds) == ("to_euro", "To euro", "Euro(amount)", 3)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"api": "get weather"}, "api 'get weather' is no name of a command"),
        ({"api": "weather"}, "api 'weather' is no name"),
        ({"api": "None"}, "api 'None' is no name"),
        ({"api": "Wetter天"}, "is no name"),
        ({"key": "thoughts"}, "key 'thoughts' cannot name a tool"),
        ({"key": "all"}, "cannot name a tool"),
        ({"key": "a b"}, "cannot name a tool"),
        ({"key": "a,b"}, "cannot name a tool"),
        ({"switch": "A\n- Calculator"}, "cannot stand in the prompt"),
        ({"switch": "Calculator: enabled"}, "cannot stand in the prompt"),
    ],
)
def test_names_that_cannot_work_are_told_at_once(names: dict[str, str], words: str) -> None:
    """Prevents: an error in the middle of the first question, or lines in the prompt that nobody wrote."""
    with pytest.raises(ValueError, match=words):

        @tool(**names)  # type: ignore[arg-type]
        def take(value: str) -> str:
            """Take."""
            return value


def with_docstring(text: str) -> Callable[..., str]:
    def take(value: str, other: int = 1) -> str:
        return value

    take.__doc__ = text
    return take


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("Take.", {}),
        ("Take.\n\nArgs:", {}),
        ("Take.\n\nArgs:\n    value: a thing\n    other: how often", {"value": "a thing", "other": "how often"}),
        (
            "Take.\n\n    Args:\n        value (str): a thing\n            that goes on: here\n\n        other: 2\n\n"
            "    Returns:\n        value: not this",
            {"value": "a thing that goes on: here", "other": "2"},
        ),
        ("Take.\n\nArgs:\nvalue: not indented", {}),
        ("Take.\n\nArgs:\n    : odd\n    value:", {"value": ""}),
    ],
)
def test_docstrings_as_people_write_them(text: str, notes: dict[str, str]) -> None:
    """Prevents: a docstring that breaks the tool, and notes that end at the first line of two."""
    schema = tool(with_docstring(text)).schema["function"]
    assert schema["description"] == "Take."
    seen = {name: each["description"] for name, each in schema["parameters"]["properties"].items()}
    assert seen == {"value": "", "other": ""} | notes
    with pytest.raises(ValueError, match="needs a docstring"):
        tool(with_docstring(" \n "))


def test_sources_are_plain_values() -> None:
    """Prevents: a source that a tool changes after it was numbered."""
    with pytest.raises(AttributeError):
        Source("title", "url", "text").title = "other"  # type: ignore[misc]
