"""Closed forms: what an unknown is where an expression vanishes, and which number fifty digits belong to.

    isolate(a*exp(k*x) - b, x)                        # [log(b/a)/k]
    exact(mpmath.mpf("1.6180339887498948…"))          # 1/2 + sqrt(5)/2

SymPy's own solver is not asked: it takes seconds where it finds nothing, and leaves out solutions now and then.

This file runs inside the sandbox's process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import sympy
from sympy.polys.polyerrors import PolynomialError

DIGITS = 50  # that numbers are known to


class Cbrt(sympy.Function):
    """The real cube root; SymPy's own is not real below 0."""

    @classmethod
    def eval(cls, value: Any) -> Any:
        return None if value.free_symbols else sympy.real_root(value, 3)


_INVERSES: dict[Any, Callable[[Any], tuple[Any, ...]]] = {
    sympy.exp: lambda value: (sympy.log(value),),
    sympy.log: lambda value: (_power_of_e(value),),
    sympy.sin: lambda value: (sympy.asin(value), sympy.pi - sympy.asin(value)),
    sympy.cos: lambda value: (sympy.acos(value), 2 * sympy.pi - sympy.acos(value)),
    sympy.tan: lambda value: (sympy.atan(value),),
    sympy.asin: lambda value: (sympy.sin(value),),
    sympy.acos: lambda value: (sympy.cos(value),),
    sympy.atan: lambda value: (sympy.tan(value),),
    sympy.sinh: lambda value: (sympy.asinh(value),),
    sympy.cosh: lambda value: (sympy.acosh(value), -sympy.acosh(value)),
    sympy.tanh: lambda value: (sympy.atanh(value),),
    sympy.Abs: lambda value: (value, -value),
    Cbrt: lambda value: (value**3,),
}


def isolate(expression: Any, x: Any) -> list[Any] | None:
    """What `x` is where the expression vanishes; None where no step of ours leads there.

    Letters below a root are taken as positive; of functions that repeat themselves the values are the principal ones.
    """
    above = numerator(expression)
    if above.is_polynomial(x):
        return _factors_isolated(above, x)
    inner = kernels(above, x)
    if len(inner) != 1:
        return None
    (kernel,) = inner
    stand_in = sympy.Dummy()
    outer = above.xreplace({kernel: stand_in})
    values = None if outer.has(x) else isolate(outer, stand_in)
    if values is None:
        return None
    found = []
    for value in values:
        steps = [isolate(argument - target, x) for argument, target in _inverted(kernel, x, value)]
        if not steps or None in steps:
            return None
        found += [each for step in steps for each in step or ()]
    return [each for each in dict.fromkeys(found) if not each.has(sympy.I)]


def _power_of_e(exponent: Any) -> Any:
    """exp(a*log(2)) as 2^a."""
    for factor in sympy.Mul.make_args(exponent):
        if factor.func == sympy.log and not factor.free_symbols:
            return factor.args[0] ** (exponent / factor)
    return sympy.exp(exponent)


def numerator(expression: Any) -> Any:
    """What vanishes where the expression does, multiplied out."""
    if not expression.is_polynomial():
        expression, _ = sympy.fraction(sympy.together(expression))
    return multiplied_out(expression)


def multiplied_out(expression: Any) -> Any:
    """Without parentheses, functions and powers left as they are."""
    return sympy.expand(expression, log=False, power_base=False, power_exp=False)


def kernels(expression: Any, x: Any) -> set[Any]:
    """The largest parts of an expression that are no polynomial in `x`, such as exp(2*x)."""
    if not expression.has(x) or expression == x:
        return set()
    if expression.is_Add or expression.is_Mul or (expression.is_Pow and expression.exp.is_Integer):
        return set().union(*(kernels(part, x) for part in expression.args))
    return {expression}


def _inverted(kernel: Any, x: Any, value: Any) -> list[tuple[Any, Any]]:
    """Pairs (part of the kernel, what it is where the kernel has this value)."""
    if not kernel.is_Pow:
        inverse = _INVERSES.get(kernel.func, lambda _: ())
        return [(kernel.args[0], target) for target in inverse(value)]
    base, exponent = kernel.args
    if exponent.has(x):
        return [] if base.has(x) else [(exponent, sympy.log(value) / sympy.log(base))]
    root = value ** (1 / exponent)
    return [(base, root), (base, -root)] if exponent.is_Rational and exponent.p % 2 == 0 else [(base, root)]


def _factors_isolated(above: Any, x: Any) -> list[Any] | None:
    found = []
    factors = [sympy.Poly(above, x, expand=False)]
    if factors[0].degree() > 1 and not above.has(sympy.Float):
        with contextlib.suppress(PolynomialError):  # of numbers such as 10^sinh(1)
            split = sympy.factor_list(above, x, expand=False)[1]
            factors = [sympy.Poly(factor, x, expand=False) for factor, _ in split]
    for polynomial in factors:
        first, *others = polynomial.all_coeffs()
        if len(others) <= 2:
            found += short_roots(polynomial)
        elif not any(others[:-1]):
            found += _power_roots(len(others), -others[-1] / first)
        else:
            return None
    return found


def _power_roots(degree: int, value: Any) -> list[Any]:
    """The real x with x^degree = value."""
    if degree % 2 == 0:
        root = value ** sympy.Rational(1, degree)
        return [-root, root]
    if value.could_extract_minus_sign():
        return [-((-value) ** sympy.Rational(1, degree))]
    return [value ** sympy.Rational(1, degree)]


def short_roots(polynomial: sympy.Poly) -> list[Any]:
    """The roots of a polynomial of degree 1 or 2 by formula."""
    first, *others = polynomial.all_coeffs()
    if first.could_extract_minus_sign():
        first, *others = (-factor for factor in (first, *others))
    if len(others) < 2:
        return [multiplied_out(-factor) / first for factor in others]
    a, b, c = first, *others
    if b != 0 and (a.free_symbols or b.free_symbols or c.free_symbols):
        root = sympy.sqrt(sympy.factor_terms(sympy.expand(b**2 - 4 * a * c)))
        return [(-b - root) / (2 * a), (-b + root) / (2 * a)]
    half, square = -b / (2 * a), sympy.expand((b / (2 * a)) ** 2 - c / a)
    return list(dict.fromkeys(half + sign * sympy.sqrt(square) for sign in (-1, 1)))


def exact(number: Any, *, quadratic: bool = True) -> Any:
    """The fraction, multiple of pi or root of a quadratic equation that has these digits; None for other numbers."""
    with mpmath.workdps(DIGITS):
        if abs(number) < mpmath.mpf(10) ** (10 - DIGITS):
            return sympy.Integer(0)
        for unit, most in ((sympy.Integer(1), 10**6), (sympy.pi, 1000)):
            ratio = number / numeric(unit)
            near = fraction(ratio).limit_denominator(most)
            error = abs(ratio - mpmath.mpf(near.numerator) / near.denominator)
            if error < abs(ratio) * mpmath.mpf(10) ** (8 - DIGITS) and abs(near.numerator) < 10**20:
                return sympy.Rational(near.numerator, near.denominator) * unit
        if not quadratic or not 1e-4 < abs(number) < 1e4:
            return None
        found = mpmath.findpoly(number, 2, maxcoeff=10**4, tol=mpmath.mpf(10) ** (15 - DIGITS))
    if not found:
        return None
    roots = short_roots(sympy.Poly(found, sympy.Dummy()))
    return min(roots, key=lambda root: abs(numeric(root) - number))


def fraction(number: Any) -> Fraction:
    """The very value of a real mpmath number."""
    sign, mantissa, power, _ = number._mpf_
    return (-1) ** sign * Fraction(int(mantissa)) * Fraction(2) ** power


def numeric(value: Any, digits: int = DIGITS) -> Any:
    """The mpmath number of a SymPy number; an imaginary part that is but noise is left out."""
    with mpmath.workdps(digits):
        if value.is_Rational:
            return mpmath.mpf(value.p) / value.q
        real, imaginary = (
            mpmath.mp.make_mpf(sympy.Float(part, digits)._mpf_) for part in value.evalf(digits).as_real_imag()
        )
        noise = abs(imaginary) <= abs(real) * mpmath.mpf(10) ** (10 - DIGITS)
        return real if noise else mpmath.mpc(real, imaginary)
