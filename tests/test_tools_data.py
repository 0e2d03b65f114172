"""The calculator and solver on real material: the calls of the released conversations, and the attack list.

The material lies in the folder that MOSS_TEST_DATA names. `verdicts/tool_calls.json` says, by the hash of each call
that the original tool failed, whether an answer exists; and which of its answers were wrong, with the reason.
"""

from __future__ import annotations

import cmath
import hashlib
import json
import os
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moss.tools import calculator, solver
from moss.tools.base import ToolError
from moss.tools.calculator import calculate
from moss.tools.expression import Node, parse
from moss.tools.solver import solve

DATA = os.environ.get("MOSS_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="MOSS_TEST_DATA does not name the folder of the test data")
VERDICTS = json.loads((Path(__file__).parent / "verdicts" / "tool_calls.json").read_text(encoding="utf-8"))
FAILED = {"None", "No result.", "No calculation results."}
RELATIVE = 1e-12
MOST_UNANSWERED = 3


@cache
def rows(name: str) -> list[dict[str, Any]]:
    if DATA is None:
        return []
    return [json.loads(line) for line in (Path(DATA) / name).read_text(encoding="utf-8").splitlines()]


def attacks() -> list[dict[str, Any]]:
    return [row for row in rows("attacks.jsonl") if row["tool"] in ("calculate", "solve")]


def key(row: dict[str, Any]) -> str:
    return hashlib.sha256(f"{row['tool']}\n{row['argument']}".encode()).hexdigest()


def original(row: dict[str, Any]) -> str | None:
    """The original tool's answer, None when it had none."""
    result = str(row["original_result"]).strip("'")
    return None if result in FAILED else result


def ours(tool: str, argument: str) -> str | None:
    try:
        return calculate(argument) if tool.lower() == "calculate" else solve(argument)
    except ToolError as error:
        assert not re.search("failed|crashed|forbidden", str(error)), argument  # a refusal was foreseen
        return None


def number(text: str) -> complex:
    """The value of a result such as `11/2 - sqrt(41)/2` or `-1 - sqrt(3)*I`."""

    def value(node: Node) -> complex:
        if node[0] == "num":
            return complex(int(node[1]) if node[1].isdigit() else float(node[1]))
        if node[0] == "name":
            return {"I": 1j, "pi": cmath.pi}[node[1]]
        if node[0] == "neg":
            return -value(node[1])
        if node[0] == "call":
            return cmath.sqrt(value(node[2][0]))
        a, b = value(node[2]), value(node[3])
        return {"+": a + b, "-": a - b, "*": a * b, "/": a / (b or 1), "^": a**b if abs(b) < 9 else 0}[node[1]]

    (statement,) = parse(text, ("sqrt",))
    return value(statement.left)


def solutions(text: str) -> list[dict[str, complex]]:
    """The solutions in lines `x_0 = 3`, or `x_0 ≈ 3.3` where digits are left out, one dictionary each."""
    found: dict[str, dict[str, complex]] = {}
    for line in text.split("\n"):
        match = re.fullmatch(r"(\w+?)(?:_(\d+))? [=≈] (.+)", line)
        assert match, line
        found.setdefault(match[2] or "0", {})[match[1]] = number(match[3])
    return list(found.values())


def same(a: str, b: str) -> bool:
    """Equal text, equal number, or the same solutions in any order, to 1e-12 of their size."""
    if a == b:
        return True
    if not re.search(" [=≈] ", a) or not re.search(" [=≈] ", b):
        return a.isascii() and _close(number(a), number(b))
    left, right = solutions(a), solutions(b)
    return len(left) == len(right) and all(any(_equal(one, other) for other in right) for one in left)


def _equal(a: dict[str, complex], b: dict[str, complex]) -> bool:
    return a.keys() == b.keys() and all(_close(a[name], b[name]) for name in a)


def _close(a: complex, b: complex) -> bool:
    return abs(a - b) <= RELATIVE * max(abs(a), abs(b))


@needs_data
@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row['tool']}-{n}") for n, row in enumerate(attacks())])
def test_attack_row_behaves_as_it_must(row: dict[str, Any]) -> None:
    """Prevents: every failure that the list of hostile and odd inputs describes."""
    assert calculator.BOX.layers and solver.BOX.layers  # their start is no part of a call
    started = time.monotonic()
    result = ours(row["tool"], row["input"])
    assert time.monotonic() - started < 3.5
    if row["must"] == "value":
        assert result is not None
        assert same(result, row["value"])
    elif row["must"] == "error":
        assert result is None
    else:
        assert row["must"] == "timeout"
        assert ours("calculate", "1+1") == "2"


@needs_data
def test_everything_the_original_answered_is_answered_alike() -> None:
    """Prevents: results that differ from those the released conversations were written with."""
    wrong = []
    for row in rows("moss_tool_calls.jsonl"):
        expected = original(row)
        result = ours(row["tool"], row["argument"])
        if expected is None:
            continue
        refused = result is None
        if refused != (key(row) in VERDICTS["original_wrong"]) or not (refused or same(result or "", expected)):
            wrong.append((row["argument"], expected, result))
    assert wrong == []


@needs_data
def test_what_the_original_failed_has_a_verdict_that_holds() -> None:
    """Prevents: calls that have an answer staying without one, and answers where none exists."""
    failed = [row for row in rows("moss_tool_calls.jsonl") if original(row) is None]
    assert {key(row) for row in failed} == set(VERDICTS["failed"])
    unanswered = 0
    for row in failed:
        verdict = VERDICTS["failed"][key(row)]
        assert verdict["reason"]
        result = ours(row["tool"], row["argument"])
        answered = result is not None and result != "No result."
        assert answered == (verdict["verdict"] == "answered"), row["argument"]
        unanswered += verdict["verdict"] == "unanswered"
    assert unanswered <= MOST_UNANSWERED


def test_comparison_tells_different_from_equal() -> None:
    """Prevents: a comparison so generous that the tests above cannot fail."""
    assert same("91.0", "91")
    assert not same("91.0", "91.0000001")
    assert same("x_0 = 2\nx_1 = -sqrt(4)", "x_0 = -2\nx_1 = 2")
    assert not same("x_0 = 2\nx_1 = 3", "x_0 = 2\nx_1 = 2")
    assert not same("x = 2", "y = 2")
    assert not same("x_0 = 3\nx_1 = 4\ny_0 = 3\ny_1 = 4", "x_0 = 3\nx_1 = 4\ny_0 = 4\ny_1 = 3")
    assert same("x = -1 - sqrt(3)*I", "x ≈ -1.0 - 1.7320508075688772*I")
