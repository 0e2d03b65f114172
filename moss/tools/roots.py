"""Where an expression in one unknown vanishes, found by search: all real roots, to fifty digits.

    real_roots(cos(x) - x, x)             # [0.7390851332151606416553120876738734040134117589007…]

Some thousand points between -10^60 and 10^60, dense near 0, are looked at for changes of sign, for ends of the domain
and for minima that nearly touch 0, and what is found there is refined. Of an expression that repeats itself the roots
of one period are given, from 0 on. Roots much closer to each other than the points are missed.

This file runs inside the sandbox's process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import sympy

from moss.tools.expression import ExpressionError
from moss.tools.isolate import DIGITS, fraction, numeric

MAX_ROOTS = 24
MAX_RATE = 200  # of a periodic function inside an expression that does not repeat itself
PERIODIC = (sympy.sin, sympy.cos, sympy.tan)

_TOO_MANY = "it has more solutions than can be listed"
_SAMPLES = (0.37, 0.71, 1.93, 2.71, 3.7, 5.3, 11.9, 23.1, 101.7, -0.6, -1.3, -4.1, -17.3)
_TINY = mpmath.mpf(10) ** (5 - DIGITS)

Function = Callable[[Any], Any]


def real_roots(expression: Any, x: Any) -> list[Any] | None:
    """The real roots as mpmath numbers, small before large; None when the expression vanishes everywhere."""
    real = sympy.Dummy(real=True)
    expression, x = expression.xreplace({x: real}), real
    rough, fine = (_real(function_of(expression, x, library), library.isfinite) for library in (math, mpmath))
    rates = [rate for rate in _rates(expression, x) if not rate.has(x)]
    density = max((float(numeric(rate)) for rate in rates), default=0.0)
    period = _period(rates, rough)
    if period is None and density > MAX_RATE:
        raise ExpressionError(_TOO_MANY)
    with mpmath.workdps(2 * DIGITS):
        values = [value for value in map(fine, map(mpmath.mpf, _SAMPLES)) if value is not None]
        if values and max(map(abs, values)) < _TINY:
            return None
        length = None if period is None else numeric(period, 2 * DIGITS)
        found: dict[str, Any] = {}
        for start in _candidates(rough, fine, _points(density, length)):
            root = _refined(fine, mpmath.mpf(start))
            if root is None:
                continue
            if length is not None:
                root = root % length
                root = root - length if length - root < _TINY else root
            if abs(root) < _TINY:
                root = mpmath.mpf(0)
            found.setdefault(str(mpmath.nstr(root, 30)), root)
            if len(found) > MAX_ROOTS:
                raise ExpressionError(_TOO_MANY)
    return sorted(found.values())


def function_of(expression: Any, x: Any, library: Any) -> Function:
    """The expression as a function of numbers of `library`, `math` or `mpmath`; a sum is 0 where only noise is left."""
    if expression == x:
        return lambda value: value
    if not expression.has(x):
        number = numeric(expression, 2 * DIGITS)
        if isinstance(number, mpmath.mpc):
            raise ExpressionError("a number in it is not real, such as a square root of what is below 0")
        constant: Any = float(number) if library is math else number
        return lambda _: constant
    parts = [function_of(part, x, library) for part in expression.args]
    if expression.is_Add:
        noise = 1e-15 if library is math else mpmath.mpf(10) ** (8 - 2 * DIGITS)
        return lambda value: _sum([part(value) for part in parts], noise)
    if expression.is_Mul:
        return lambda value: math.prod([part(value) for part in parts])
    if expression.is_Pow:
        base, exponent = parts
        power = math.pow if library is math else mpmath.power
        return lambda value: power(base(value), exponent(value))
    (inner,) = parts
    name = type(expression).__name__
    compute = {"Abs": abs, "Cbrt": math.cbrt if library is math else _cube_root}.get(name) or getattr(library, name)
    return lambda value: compute(inner(value))


def _sum(values: list[Any], noise: Any) -> Any:
    total = sum(values)
    return total if abs(total) > noise * max(map(abs, values)) else total * 0


def _cube_root(value: Any) -> Any:
    return _sign(value) * mpmath.cbrt(abs(value))


def _sign(value: Any) -> int:
    return (value > 0) - (value < 0)


def _real(function: Function, is_finite: Callable[[Any], bool]) -> Function:
    """The function with None where it has no real and finite value."""

    def value_at(point: Any) -> Any:
        try:
            value = function(point)
            return value if is_finite(value) and not isinstance(value, mpmath.mpc) else None
        except (ValueError, ZeroDivisionError, OverflowError, TypeError):
            return None

    return value_at


def _rates(expression: Any, x: Any) -> list[Any]:
    """How fast the arguments of the periodic functions grow."""
    arguments = {part.args[0] for part in expression.atoms(*PERIODIC) if part.has(x)}
    return sorted({sympy.Abs(sympy.diff(argument, x)) for argument in arguments}, key=sympy.default_sort_key)


def _period(rates: list[Any], rough: Function) -> Any:
    """The shortest period, when the expression repeats itself."""
    ratios = sorted({sympy.Rational(p, q) for p in range(1, 13) for q in range(1, 13)})
    for ratio in ratios if rates else ():
        period = ratio * 2 * sympy.pi / min(rates, key=numeric)
        length = float(numeric(period))
        pairs = [(rough(point), rough(point + length)) for point in _SAMPLES]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        same = all(math.isclose(a, b, rel_tol=1e-8, abs_tol=1e-8) for a, b in known)
        if same and len(known) > 2 and all(a is b is None for a, b in pairs if a is None or b is None):
            return period
    return None


def _points(density: float, length: Any) -> list[float]:
    """Where the search looks: one period and a little more, or all numbers, close to each other near 0."""
    if length is not None:
        number = int(max(400, min(8000, 40 * density * length)))
        return [index * float(length) / number for index in range(-2, number + 3)]
    step = min(0.05, 0.3 / density) if density else 0.05
    right = [10.0**power for power in range(-30, -3)] + [step * 1.3**-power for power in range(20, 0, -1)]
    right = sorted({*right, *(step * index for index in range(1, int(20 / step) + 1))})
    while right[-1] < 1e60:
        right.append(right[-1] * (1.02 if right[-1] < 1e6 else 1.2))
    return [*(-point for point in reversed(right)), 0.0, *right]


def _candidates(rough: Function, fine: Function, points: list[float]) -> Iterator[float]:
    """Points near which a root may be: where the sign changes or the domain ends, and minima that nearly touch 0."""

    def sign(point: float) -> int | None:
        value = rough(point)
        return None if value is None else _sign(value)

    values = [rough(point) for point in points]
    signs = [None if value is None else _sign(value) for value in values]
    changes = [index for index in range(1, len(points)) if signs[index] != signs[index - 1]]
    if len(changes) > 20 * MAX_ROOTS:
        raise ExpressionError(_TOO_MANY)
    for index in changes:
        yield _boundary(sign, points[index - 1], points[index])
        if signs[index] == 0 == fine(mpmath.mpf(points[index]) + (points[index] - points[index - 1]) / 3):
            raise ExpressionError(_TOO_MANY)
    for index in range(1, len(points) - 1):
        left, middle, right = (abs(value or 0) for value in values[index - 1 : index + 2])
        if 0 < middle <= min(left, right) < max(left, right) and signs[index - 1] == signs[index] == signs[index + 1]:
            lowest = _lowest(rough, points[index - 1], points[index + 1], values[index])
            if sign(lowest) == -(signs[index] or 0):
                yield from (_boundary(sign, lowest, points[index - 1]), _boundary(sign, lowest, points[index + 1]))
            elif abs(rough(lowest) or 0) < 1e-6 * max(left, right):
                yield lowest


def _boundary(sign: Function, inside: float, outside: float) -> float:
    """The last point between, as floats come, with the sign that `inside` has."""
    like = sign(inside)
    while (middle := (inside + outside) / 2) not in (inside, outside):
        inside, outside = (middle, outside) if sign(middle) == like else (inside, middle)
    return inside


def _lowest(rough: Function, left: float, right: float, value: float) -> float:
    """Where it is least between, or most if `value` is below 0, by golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = right - ratio * (right - left), left + ratio * (right - left)
        left, right = (left, b) if (rough(a) or 0) * value < (rough(b) or 0) * value else (a, right)
    return (left + right) / 2


def _refined(fine: Function, start: Any) -> Any:
    """The root at `start` to all digits, by the secant method on f/f', whose roots are simple; None: there is none."""
    for near in (start, *_round_numbers(start)):
        if fine(near) == 0:
            return near
    near, step = start, _newton(fine, start)
    if step is None:
        return None
    following = near - step
    for _ in range(60):
        next_step = _newton(fine, following)
        if next_step is None or abs(following - start) > abs(start) / 1000 + mpmath.mpf(10) ** -30:
            return None
        if abs(next_step) <= abs(following) * _TINY or next_step == step:
            break
        near, step, following = following, next_step, following - next_step * (following - near) / (next_step - step)
    aside = abs(following) * mpmath.mpf(10) ** -6 + mpmath.mpf(10) ** -40
    left, value, right = [fine(point) for point in (following - aside, following, following + aside)]
    beside = max(abs(left or 0), abs(right or 0))  # small where it is no root but a pole
    return following if value is not None and abs(value) < beside * mpmath.mpf(10) ** -20 else None


def _newton(fine: Function, point: Any) -> Any:
    """f/f' there, by differences."""
    aside = (abs(point) or mpmath.mpf(1)) * mpmath.mpf(10) ** (10 - DIGITS)
    left, value, right = fine(point - aside), fine(point), fine(point + aside)
    if left is None or value is None or right is None:
        return None
    return mpmath.mpf(0) if value == 0 else None if left == right else value * 2 * aside / (right - left)


def _round_numbers(start: Any) -> Iterator[Any]:
    """The fractions and the multiples of pi that a float may stand for: a root at the end of the domain has no f'."""
    for unit in (mpmath.mpf(1), +mpmath.pi):
        near = fraction(start / unit).limit_denominator(1000)
        yield mpmath.mpf(near.numerator) / near.denominator * unit
