"""The calculator's arithmetic: Python's own numbers, with every size foretold before it is computed.

    evaluate("x=1.5;y=x^2;x+y=?")        # '3.75'

Integers stay exact up to `MAX_BITS`, `/` always gives a float, floats print as Python prints them. Because no step can
grow without bound, the longest legal text takes milliseconds, even without a sandbox around it. Covered: numbers,
percent, powers, factorials, the functions below, assignments to names. Refused by reason: unknown names and units,
comparisons and equations, complex and infinite results, numbers beyond the limits.

This file runs inside the sandbox's process: it imports the standard library and the grammar, nothing else.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import NoReturn

from moss.tools.expression import ExpressionError, Node, Statement, parse

MAX_BITS = 14_000  # of an integer: 4,214 digits, below the 4,300 that Python prints
MAX_LITERAL = 400  # digits of a number in the text
MAX_FACTORIAL = 1000

Number = int | float


def evaluate(text: str) -> str:
    """The value of the last statement; raises `ExpressionError` with the reason when there is none."""
    values: dict[str, Number] = {}
    result: Number = 0
    statements = parse(text, FUNCTIONS)
    try:
        for statement in statements:
            result = _run(statement, values, last=statement is statements[-1])
    except ZeroDivisionError:
        raise ExpressionError("division by zero") from None
    except OverflowError:
        raise ExpressionError("the number is too large") from None
    except RecursionError:
        raise ExpressionError("nested too deep") from None
    except ExpressionError:
        raise
    except (ValueError, TypeError):  # from the functions of `math`, as for log(0) or sqrt(-1)
        raise ExpressionError("a value lies outside its function's domain, or the result is not real") from None
    return repr(result)


def _run(statement: Statement, values: dict[str, Number], *, last: bool) -> Number:
    """The statement's value; an assignment stores it."""
    left, relation, right, _ = statement
    if relation == "" or (relation == "=" and right is None and last):
        return _value(left, values)
    if relation != "=":
        raise ExpressionError(f"{relation!r} compares; the calculator only computes")
    if left[0] != "name" or right is None:
        raise ExpressionError("an equation is for Solve; the calculator takes expressions and name = expression")
    name = left[1]
    if name in CONSTANTS or name.lower() in FUNCTIONS:
        raise ExpressionError(f"{name!r} has a fixed meaning; choose another name")
    values[name] = _value(right, values)
    return values[name]


def _value(node: Node, values: dict[str, Number]) -> Number:
    kind = node[0]
    if kind == "num":
        return _literal(node[1])
    if kind == "bin":
        return _bounded(BINARY[node[1]](_value(node[2], values), _value(node[3], values)))
    if kind == "neg":
        return -_value(node[1], values)
    if kind == "name":
        return _name(node[1], values)
    if kind == "post":
        value = _value(node[2], values)
        return _bounded(_factorial(value) if node[1] == "!" else value / 100)
    function = FUNCTIONS.get(node[1]) or FUNCTIONS.get(node[1].lower())
    if function is None:
        raise ExpressionError(f"there is no function {node[1]!r}")
    low, high, compute = function
    if not low <= len(node[2]) <= high:
        wanted = str(low) if low == high else f"{low} to {high}"
        raise ExpressionError(f"{node[1]} takes {wanted} argument(s), not {len(node[2])}")
    return _bounded(compute(*[_value(argument, values) for argument in node[2]]))


def _literal(text: str) -> Number:
    if len(text) > MAX_LITERAL:
        raise ExpressionError(f"a number of {len(text)} digits is too long; at most {MAX_LITERAL}")
    if text.isdigit():
        return int(text)
    if text[:2] in ("0x", "0X", "0o", "0O", "0b", "0B"):
        return int(text, 0)
    return _bounded(float(text))


def _name(name: str, values: dict[str, Number]) -> Number:
    if name in values:
        return values[name]
    if name in CONSTANTS:
        return CONSTANTS[name]
    if name in FUNCTIONS or name.lower() in FUNCTIONS:
        raise ExpressionError(f"{name} needs arguments in parentheses")
    raise ExpressionError(f"{name!r} has no value; write numbers without names or units, or assign it: {name}=…;")


def _bounded(value: object) -> Number:
    """The value, when it is a real number of a size we compute with."""
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            _too_large()
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            _too_large()
        return value
    raise ExpressionError("the result is not a real number")


def _too_large() -> NoReturn:
    raise ExpressionError(f"the number is too large; at most {MAX_BITS} bits, about 4,200 digits")


def _multiply(a: Number, b: Number) -> Number:
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() + b.bit_length() > MAX_BITS + 1:
        _too_large()
    return a * b


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1
    if whole and (int(base).bit_length() - 1) * abs(exponent) > MAX_BITS:  # |base| >= 2^(bits-1)
        _too_large()
    return base**exponent


def _cube_root(value: Number) -> float:
    """The real cube root; exact for cubes, where some C libraries miss by the last bit."""
    root = math.cbrt(value)
    return float(round(root)) if round(root) ** 3 == value else root


def _factorial(n: Number) -> int:
    if not isinstance(n, int) or n < 0:
        raise ExpressionError("the factorial is defined for whole numbers from 0")
    if n > MAX_FACTORIAL:
        raise ExpressionError(f"factorials go up to {MAX_FACTORIAL}!")
    return math.factorial(n)


def _whole(*values: Number) -> list[int]:
    if not all(isinstance(value, int) for value in values):
        raise ExpressionError("whole numbers are needed there")
    return [int(value) for value in values]


def _combinations(n: Number, k: Number) -> int:
    n, k = _whole(n, k)
    if n < 0 or k < 0:
        raise ExpressionError("combinations are defined for whole numbers from 0")
    small = min(k, n - k)
    if small > 0 and (small > MAX_BITS or small * (n.bit_length() - small.bit_length()) > MAX_BITS):
        _too_large()  # C(n, k) >= (n / k)^k
    return math.comb(n, k)


def _permutations(n: Number, k: Number) -> int:
    n, k = _whole(n, k)
    if n < 0 or k < 0:
        raise ExpressionError("permutations are defined for whole numbers from 0")
    if k <= n and (k > MAX_BITS or k * max(n.bit_length() - 1, 1) > 2 * MAX_BITS):
        _too_large()
    return math.perm(n, k)


def _round(value: Number, digits: Number = 0) -> Number:
    (places,) = _whole(digits)
    if abs(places) > 100:
        raise ExpressionError("round takes at most 100 digits")
    return round(value, places) if places else round(value)


def _log(value: Number, base: Number = math.e) -> float:
    """The logarithm, natural without a base; 10 and 2 go to the exact forms, so that log(1000, 10) is 3."""
    if base == 10:
        return math.log10(value)
    if base == 2:
        return math.log2(value)
    return math.log(value) if base == math.e else math.log(value, base)


def _median(*values: Number) -> Number:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _mean(*values: Number) -> float:
    return sum(values) / len(values)


def _divisor(*values: Number) -> int:
    return math.gcd(*_whole(*values))


def _multiple(*values: Number) -> int:
    result = 1
    for value in _whole(*values):
        _multiply(result, value)
        result = math.lcm(result, value)
    return result


def _sum(*values: Number) -> Number:
    return sum(values)


def _product(*values: Number) -> Number:
    return functools.reduce(_multiply, values)


def _whole_root(value: Number) -> int:
    return math.isqrt(*_whole(value))


BINARY: dict[str, Callable[[Number, Number], Number]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": _multiply,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "^": _power,
}
CONSTANTS: dict[str, float] = {"pi": math.pi, "PI": math.pi, "Pi": math.pi, "e": math.e, "tau": math.tau}
_MANY = 64
FUNCTIONS: dict[str, tuple[int, int, Callable[..., object]]] = {  # name: fewest and most arguments, function
    **{name: (1, 1, getattr(math, name)) for name in ("sqrt", "exp", "sin", "cos", "tan", "asin", "acos")},
    **{name: (1, 1, getattr(math, name)) for name in ("atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh")},
    **{name: (1, 1, getattr(math, name)) for name in ("degrees", "radians", "floor", "ceil", "trunc", "log10", "log2")},
    **{name: (1, 1, getattr(math, name)) for name in ("exp2", "expm1", "log1p", "erf", "erfc", "gamma", "lgamma")},
    **{name: (2, 2, getattr(math, name)) for name in ("fmod", "remainder", "copysign")},
    "fabs": (1, 1, math.fabs),
    "isqrt": (1, 1, _whole_root),
    **{f"arc{name}": (1, 1, getattr(math, f"a{name}")) for name in ("sin", "cos", "tan")},
    **dict.fromkeys(("cbrt", "cuberoot"), (1, 1, _cube_root)),
    "atan2": (2, 2, math.atan2),
    "hypot": (1, _MANY, math.hypot),
    "ln": (1, 1, math.log),
    "lg": (1, 1, math.log10),  # ISO 80000-2
    "log": (1, 2, _log),
    "abs": (1, 1, abs),
    "round": (1, 2, _round),
    "pow": (2, 2, _power),
    "mod": (2, 2, operator.mod),
    "factorial": (1, 1, _factorial),
    **dict.fromkeys(("comb", "C", "ncr", "binomial"), (2, 2, _combinations)),
    **dict.fromkeys(("perm", "P", "npr"), (2, 2, _permutations)),
    "gcd": (1, _MANY, _divisor),
    "lcm": (1, _MANY, _multiple),
    "max": (1, _MANY, lambda *values: max(values)),
    "min": (1, _MANY, lambda *values: min(values)),
    **dict.fromkeys(("sum", "fsum"), (1, _MANY, _sum)),
    **dict.fromkeys(("prod", "product"), (1, _MANY, _product)),
    **dict.fromkeys(("mean", "average", "avg"), (1, _MANY, _mean)),
    "median": (1, _MANY, _median),
}
