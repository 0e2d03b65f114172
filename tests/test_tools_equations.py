"""The solver on some hundred equations of each kind, each answer put back by arithmetic that is not the solver's.

`equations.txt` has the equations with their answers. Here they are read by the project's grammar, but computed by
Python's complex numbers: without SymPy, without mpmath and without the solver's own check.
"""

from __future__ import annotations

import cmath
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from moss.tools.algebra import solve_text
from moss.tools.equations import FUNCTIONS, split_name
from moss.tools.expression import Node, Statement, parse
from moss.tools.solver import solve

KNOWN = ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "sqrt")
COMPUTED: dict[str, Callable[[complex], complex]] = {
    **{name: getattr(cmath, name) for name in KNOWN},
    **{f"arc{name}": getattr(cmath, f"a{name}") for name in ("sin", "cos", "tan")},
    "abs": abs,
    "cbrt": lambda value: math.cbrt(value.real),
    **dict.fromkeys(("ln", "log"), cmath.log),
    **dict.fromkeys(("lg", "log10"), cmath.log10),
    "log2": lambda value: cmath.log(value, 2),
}
CONSTANTS = {"pi": cmath.pi, "e": cmath.e, "I": 1j}
GRID = [0.05 * step + 0.0137 for step in range(-200, 200)]  # where changes of sign are looked for
FAR = 20.0  # a change of sign between values as large as this is a pole's


class Case(NamedTuple):
    """An equation or a system, the unknown that is named, and the answer."""

    kind: str
    text: str
    unknown: str
    answer: str


def cases() -> Iterator[Case]:
    kind = ""
    for line in (Path(__file__).parent / "equations.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            kind = line.removeprefix("## ")
        elif line and not line.startswith("#"):
            asked, answer = line.split(" => ")
            text, _, unknown = asked.partition(" for ")
            yield Case(kind, text, unknown, answer.replace(" | ", "\n"))


CASES = list(cases())
KINDS = dict.fromkeys(case.kind for case in CASES)


def value(node: Node, given: Mapping[str, complex]) -> complex:
    kind = node[0]
    if kind == "num":
        return complex(float(node[1]))
    if kind == "name":
        return given[node[1]] if node[1] in given else CONSTANTS[node[1]]
    if kind == "neg":
        return -value(node[1], given)
    if kind == "post":
        return value(node[2], given) / 100
    if kind == "call":
        first, *others = [value(argument, given) for argument in node[2]]
        return cmath.log(first, others[0]) if others else COMPUTED[node[1]](first)
    a, b = value(node[2], given), value(node[3], given)
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b, "^": lambda: a**b}[
        node[1]
    ]()


def names(node: object) -> set[str]:
    if not isinstance(node, (tuple, list)):
        return set()
    own = {node[1]} - CONSTANTS.keys() if len(node) == 2 and node[0] == "name" else set()
    return own.union(*map(names, node))


def equations(text: str) -> list[Statement]:
    read = parse(text, (*FUNCTIONS, "pow"), split=split_name, commas_separate=True)
    return [statement for statement in read if statement.right is not None]


def solutions(answer: str) -> list[dict[str, Node]]:
    """The tree of each value by name, one dictionary for each solution."""
    found: dict[str, dict[str, Node]] = {}
    for line in answer.split("\n") if answer != "No result." else ():
        match = re.fullmatch(r"(\w+?)(?:_(\d+))? [=≈] (.+)", line)
        assert match, line
        (shown,) = parse(match[3], (*COMPUTED, "log"), split=lambda word: [word])
        found.setdefault(match[2] or "0", {})[match[1]] = shown.left
    return list(found.values())


def difference(equation: Statement, given: Mapping[str, complex]) -> complex | None:
    try:
        return value(equation.left, given) - value(equation.right or (), given)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_that_stand_in_the_list(kind: str) -> None:
    """Prevents: another answer than yesterday's, and a part of SymPy that the shut-in process cannot load any more."""
    chosen = [case for case in CASES if case.kind == kind]
    assert len(chosen) >= 60
    assert [(case.text, solve(case.text, case.unknown)) for case in chosen] == [
        (case.text, case.answer) for case in chosen
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_fulfil_the_equations(kind: str) -> None:
    """Prevents: a wrong root, or a formula that does not hold, which the solver's own check lets through."""
    rng = random.Random(1)
    checked = 0
    for case in (case for case in CASES if case.kind == kind):
        for solution in solutions(case.answer):
            letters = set().union(*map(names, solution.values()))
            given: dict[str, complex] = {name: complex(rng.uniform(0.3, 2.5)) for name in sorted(letters)}
            given |= {name: value(node, given) for name, node in solution.items()}
            for equation in equations(case.text):
                if names(equation) <= given.keys():
                    sides = [abs(value(side, given)) for side in (equation.left, equation.right) if side]
                    assert abs(difference(equation, given) or 0) <= 1e-8 * max(1, *sides), (case, solution)
                    checked += 1
    assert checked >= 60


@pytest.mark.parametrize("case", [case for case in CASES if not case.unknown], ids=lambda case: case.text)
def test_no_real_root_is_missing(case: Case) -> None:
    """Prevents: a root that is lost; equations in one unknown change their sign nowhere else between -10 and 10."""
    read = equations(case.text)
    if len(read) > 1 or len(names(read)) > 1:
        return
    (x,) = names(read)
    roots = [value(solution[x], {}) for solution in solutions(case.answer)]

    def real(point: float) -> float | None:
        found = difference(read[0], {x: complex(point)})
        return None if found is None or abs(found.imag) > 1e-12 else found.real

    values = list(map(real, GRID))
    period = _period(real) if re.search("sin|cos|tan", case.text) else None
    for left, right, a, b in zip(GRID, GRID[1:], values, values[1:]):
        if a is not None and b is not None and a * b < 0 and min(abs(a), abs(b)) < FAR:
            root = _between(real, left, right)
            found = real(root)
            if found is not None and abs(found) < 1e-6:
                distances = [abs(root - each) for each in roots]
                if period:
                    distances = [abs((root - each.real + period / 2) % period - period / 2) for each in roots]
                assert min(distances, default=9) < 1e-6, root
    assert all(period is None or 0 <= root.real < period for root in roots)


def _period(function: Callable[[float], float | None]) -> float | None:
    lengths = {unit * p / q for unit in (math.pi, 2.0) for p in range(1, 13) for q in range(1, 13)}
    points = (0.37, 1.93, 2.71, 5.3)
    for length in sorted(lengths):
        pairs = [(function(point), function(point + length)) for point in points]
        if all(a is not None and b is not None and math.isclose(a, b, abs_tol=1e-8) for a, b in pairs):
            return length
    return None


def _between(function: Callable[[float], float | None], left: float, right: float) -> float:
    positive = (function(left) or 0) > 0
    for _ in range(60):
        middle = (left + right) / 2
        left, right = (middle, right) if ((function(middle) or 0) > 0) == positive else (left, middle)
    return left


def test_no_text_reaches_sympys_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: text that SymPy evaluates on a way that no search of the source shows."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"SymPy was to read {arguments[0]!r}")

    monkeypatch.setattr("sympy.parsing.sympy_parser.parse_expr", refuse)
    for case in CASES[::5]:
        assert solve_text(case.text, case.unknown) == case.answer
