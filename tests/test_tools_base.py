"""Tools, command lines and results: what is read from a line, what runs, what the model sees of it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moss.tools.base import Tool, ToolError, standard_tools, tool
from moss.tools.calls import MAX_CALLS, Call, Outcome, execute, format_results, parse_commands, read_commands, run_calls


@tool(key="echo", switch="Echo", api="Echo", same_line=True)
def echo(text: str, times: int = 1) -> str:
    """Say it again.

    More about it that help leaves out.

    Args:
        text: what to say
        times: how often
    """
    if text == "error":
        raise ToolError("nothing to say")
    if text == "bug":
        raise KeyError("missing")
    return text


TOOLS: dict[str, Tool] = {"echo": echo}


def names_and_args(text: str) -> list[tuple[str, list[str]]]:
    return [(call.name, call.args) for call in parse_commands(text) if not call.error]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Calculate("37*12")', [("Calculate", ["37*12"])]),
        ('Calculate("1"), Calculate("2")', [("Calculate", ["1"]), ("Calculate", ["2"])]),
        ('Calculate("1")\nSolve("x=1")', [("Calculate", ["1"]), ("Solve", ["x=1"])]),
        ('Solve("4/3*pi*r^3=13*x^3", "x")', [("Solve", ["4/3*pi*r^3=13*x^3", "x"])]),
        ('Search("a"), None', [("Search", ["a"])]),
        ('Search("she said "hi" to me")', [("Search", ['she said "hi" to me'])]),
        ('Calculate("f(x)") = 0, Solve("x=1")', [("Calculate", ["f(x)"]), ("Solve", ["x=1"])]),
        ('Calculate("max([<|1|>], [<|2|>])")', [("Calculate", ["max([<|1|>], [<|2|>])"])]),
        ('Search("")', [("Search", [""])]),
        ("None", []),
        ("None.\n\nLet a*b = 60, so sqrt(a) = 2 and f(3) = 4", []),
        ("None (no tool is needed here)", []),
        ("", []),
    ],
)
def test_line_is_read(text: str, expected: list[tuple[str, list[str]]]) -> None:
    """Prevents: a call that is lost, split, or seen in prose."""
    assert names_and_args(text) == expected
    assert not any(call.error for call in parse_commands(text))


@pytest.mark.parametrize(
    "text",
    [
        "Calculate(1+1)",
        "Calculate()",
        "Calculate('1+1')",
        'Calculate("1+1',
        'Calculate("1+1"',
        'Calculate("1") + ("2")',
        'Calculate("say("1")")',
        'Search("a "b", c", "d "e" f")',
        'Calculate("1")"',
    ],
)
def test_what_would_be_a_guess_is_one_error(text: str) -> None:
    """Prevents: running half of an argument, or two commands made out of one (test 49 of the security list)."""
    (call,) = parse_commands(text)
    assert call.error
    assert call.args == []
    outcome = execute(call, TOOLS | {"calculator": standard_tools()["calculator"]})
    assert not outcome.ok


@pytest.mark.parametrize("argument", ['1"), Calculate("2', '")', '"', '""', '"),', 'a", "b', '\n")\n', '")' * 2000])
def test_escaped_argument_is_one_command_or_none(argument: str) -> None:
    """Prevents: an argument with quotes that breaks out into a second command."""
    text = 'Echo("' + argument.replace('"', '\\"') + '")'
    calls = parse_commands(text)
    assert len(calls) == 1
    assert calls[0].error or calls[0].args == [argument]


def test_long_argument_is_one_command() -> None:
    """Prevents: time that grows with the square of the line, and a cut argument."""
    argument = "1+" * 2500
    started = time.monotonic()
    assert names_and_args(f'Echo("{argument}")') == [("Echo", [argument])]
    parse_commands('Echo("' + '" ' * 20_000)
    assert time.monotonic() - started < 2


def test_text_between_calls_is_returned() -> None:
    """Prevents: silently dropping what the model wrote beside its commands."""
    calls, ignored = read_commands('first Echo("1") = 0, Echo("2")')
    assert [call.args for call in calls] == [["1"], ["2"]]
    assert ignored == ["first", "= 0"]


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


@pytest.mark.parametrize(
    ("call", "ran", "reason"),
    [
        (Call("Delete", ["x"]), False, "no tool is called 'Delete'"),
        (Call("Echo", ["error"]), True, "nothing to say"),
        (Call("Echo", ["bug"]), True, "Echo failed: KeyError: 'missing'"),
        (Call("Echo", []), True, "does not take 0 argument(s); write Echo(text)"),
        (Call("Echo", ["a", "b", "c"]), True, "does not take 3 argument(s)"),
        (Call("Echo", [], "Echo(", "no quotes"), True, "no quotes"),
    ],
)
def test_failures_become_outcomes(call: Call, ran: bool, reason: str) -> None:
    """Prevents: an exception that leaves the turn loop, and failures without a reason."""
    outcome = execute(call, TOOLS)
    assert (outcome.ok, outcome.ran, outcome.text) == (False, ran, "")
    assert reason in outcome.error


def test_disabled_tool_does_not_run() -> None:
    """Prevents: a switched-off tool being run because the model wrote its name."""
    outcome = execute(Call("Echo", ["a"]), TOOLS, enabled=())
    assert (outcome.ran, outcome.error) == (False, "Echo is switched off")
    assert format_results([Call("Echo", ["a"], 'Echo("a")')], [outcome], TOOLS) == "None"


def test_fifth_call_is_dropped() -> None:
    """Prevents: a line with a thousand calls (test 48 of the security list)."""
    calls = parse_commands(", ".join(f'Echo("{number}")' for number in range(MAX_CALLS + 2)))
    outcomes = run_calls(calls, TOOLS)
    assert [outcome.text for outcome in outcomes[:MAX_CALLS]] == ["0", "1", "2", "3"]
    assert [outcome.ran for outcome in outcomes[MAX_CALLS:]] == [False, False]
    assert format_results(calls, outcomes, TOOLS).count("=>") == MAX_CALLS


def test_calls_run_side_by_side() -> None:
    """Prevents: four slow tools that take four times as long."""
    barrier = threading.Barrier(3, timeout=5)

    @tool(key="meet", switch="Meet", api="Meet")
    def meet(name: str) -> str:
        """Wait for the others."""
        barrier.wait()
        return name

    calls = [Call("Meet", [name]) for name in "abc"]
    assert [outcome.text for outcome in run_calls(calls, {"meet": meet})] == ["a", "b", "c"]


def test_results_are_written_as_released() -> None:
    """Prevents: results in a form that the model was not trained on."""
    calls = parse_commands('Calculate("37*12"), Solve("x+2=5"), Calculate("1+"), Delete("x"), Solve("x>1")')
    outcomes = [
        Outcome(True, "444"),
        Outcome(True, "x = 3"),
        Outcome(False, error="it ends"),
        Outcome(False, error="no tool", ran=False),
        Outcome(False, error="inequality"),
    ]
    assert format_results(calls, outcomes) == (
        'Calculate("37*12") => 444\nSolve("x+2=5") =>\nx = 3\n'
        'Calculate("1+") => No result.\nSolve("x>1") =>\nNo result.'
    )
    assert format_results([], []) == "None"


def test_results_keep_their_lines() -> None:
    """Prevents: an argument with line breaks that writes a result of its own, and items without end."""
    call = Call("Echo", ["x"], 'Echo("1\nEcho("2") => 3")')
    assert format_results([call], [Outcome(True, "x" * 50)], TOOLS, limit=10) == (
        'Echo("1 Echo("2") => 3") => ' + "x" * 9 + "…"
    )
