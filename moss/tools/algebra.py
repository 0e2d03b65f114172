"""Solving equations: exactly where that is readable, in numbers where it is not; every root is put back and checked.

    solve_text("x^2-4=0")                 # 'x_0 = -2\\nx_1 = 2'
    solve_text("cos(x)=x")                # 'x ≈ 0.7390851332151607'
    solve_text("x+y=25", "x")             # 'x = 25 - y'

Order and form: unknowns by name, real roots before complex ones, small before large. Fractions, square roots and
multiples of pi stay exact; anything else, and everything when the text has a decimal point, is a number with the 15 to
17 digits of a double, behind `≈` where those digits are not all. Polynomials have their complex roots too; equations
with a root, a power or a function such as sin, exp or log of an unknown are solved in real numbers, and of those that
repeat themselves the first period from 0 on is given: sin(x)=1/2 has pi/6 and 5*pi/6, without the multiples of 2*pi.
Letters that stay in an answer are taken as positive where a root is drawn.

A system is taken apart: an equation in one unknown is solved, a linear one is put into the others, polynomials are
eliminated (Groebner bases), and what stands inside one function alone is an unknown of its own for a while. Equations
that contradict each other, or have no real root, give `No result.`, which is an answer; what cannot be solved raises
`ExpressionError` with the reason.

This file runs inside the sandbox's process, which is what ends it when an elimination would take for ever.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import mpmath
import sympy
from mpmath.libmp import NoConvergence

from moss.tools.equations import TOLERANCE, Equation, System, read_system
from moss.tools.expression import ExpressionError
from moss.tools.isolate import DIGITS, exact, isolate, kernels, multiplied_out, numerator, numeric, short_roots
from moss.tools.roots import PERIODIC, real_roots

MAX_OUTPUT = 4000  # characters
MAX_EXACT = 40  # characters of a value that is shown exactly
DOUBTFUL = 1e-8  # what fulfils the equations no better than this is neither a root nor none
MAX_GUESSES = 20_000  # combinations of values that are tried in a system of polynomials
NO_RESULT = "No result."

Solution = dict[Any, Any]  # a value for each unknown it settles


def solve_text(text: str, unknown: str = "") -> str:
    """The solutions as lines `x = 4`, or `x_0 = …`, `x_1 = …` when there are several."""
    system = read_system(text, unknown)
    differences = [equation.difference for equation in system.equations]
    if not any(each.free_symbols for each in differences) and all(_is_zero(each) for each in differences):
        raise ExpressionError("there is no unknown to solve for: the equations hold always or name none")
    try:
        found = _settled(_solutions(differences), differences, system)
    except NoConvergence:
        raise ExpressionError("its roots could not be found") from None
    checked = [each for each in found if _holds(each, system, TOLERANCE)]
    if any(_holds(each, system, DOUBTFUL) for each in found if each not in checked):
        raise ExpressionError("the roots that were found do not fulfil the equations well enough")
    return _written(checked, system) if checked else NO_RESULT


def warm_up() -> None:
    """Bring in all of SymPy that solving needs, before the process loses its right to open files."""
    for text, unknown in (
        ("x^2-4=0", ""),
        ("x+y=35;2x+4y=94", ""),
        ("x+y=7;xy=12", ""),
        ("x^5-x-1=0", ""),
        ("x^3=7", ""),
        ("0.1x=5", ""),
        ("pi*r^2=50", ""),
        ("sqrt(x)+x=5", ""),
        ("2^x=8", ""),
        ("sin(x)=1/3", ""),
        ("cos(x)=x", ""),
        ("abs(x^2-4)=x+8", ""),
        ("cbrt(x)+asin(x)=cosh(x)", ""),
        ("x^2+y=7;x+y^2=11", ""),
        ("sqrt(x)+sqrt(y)=5;sqrt(x)-sqrt(y)=1", ""),
        ("A=P*(1+r)^n", "n"),
        ("y=a*sin(x)^3", "x"),
        ("a*x^2+b*x+c=0", "x"),
        ("abs(x)+b=a*tanh(c)", "c"),
        ("a*x+b*y=c;x*y=d", "x"),
    ):
        try:
            solve_text(text, unknown)
        except ExpressionError:  # warm all the same
            continue


# ---------------------------------------------------------------------------------------------- values


def _solutions(expressions: Sequence[Any]) -> list[Solution]:
    """All solutions; an unknown that is not settled is missing in them, or stands in the others' values."""
    if any(each.has(sympy.zoo, sympy.nan, sympy.oo) for each in expressions):  # divided by what turned out to be 0
        return []
    above = [numerator(each) for each in expressions]
    if not all(each.free_symbols or _is_zero(each) for each in above):
        return []
    above = sorted((each for each in above if each.free_symbols), key=sympy.count_ops)
    if not above:
        return [{}]
    for step in (_linear, _alone, _inside, _polynomials):
        found = step(above)
        if found is not None:
            return found
    if len(above) < len(_unknowns(above)):
        return [{}]
    raise ExpressionError("no way to its solutions is known here")


def _unknowns(expressions: Sequence[Any]) -> list[Any]:
    return sorted(set().union(*(each.free_symbols for each in expressions)), key=str)


def _linear(above: list[Any]) -> list[Solution] | None:
    """Put an unknown that stands only in a linear term into the other equations."""
    for expression in above:
        for x in _unknowns([expression]):
            rest, terms = expression.as_independent(x, as_Add=True)
            slope = sympy.Add(*(term / x for term in sympy.Add.make_args(terms)))
            if slope.free_symbols or _is_zero(slope):
                continue
            value = multiplied_out(-rest / slope)
            others = [each.xreplace({x: value}) for each in above if each is not expression]
            return [{x: multiplied_out(value.xreplace(more)), **more} for more in _solutions(others)]
    return None


def _alone(above: list[Any]) -> list[Solution] | None:
    """Solve an equation in one unknown, and put each root into the others."""
    single = next((each for each in above if len(each.free_symbols) == 1), None)
    if single is None:
        return None
    (x,) = single.free_symbols
    others = [each for each in above if each is not single]
    roots = _roots(single, x)
    if roots is None and not others:
        raise ExpressionError(f"every {x} fulfils it")
    if roots is None:
        return _solutions(others)
    if others and any(root.has(sympy.Float) for root in roots):  # which elimination can do without
        found = _polynomials(above)
        if found is not None:
            return found
    return [{x: root, **rest} for root in roots for rest in _solutions([each.xreplace({x: root}) for each in others])]


def _inside(above: list[Any]) -> list[Solution] | None:
    """Take a part such as 2^x for an unknown of its own, where it is all that an unknown stands in."""
    for x in _unknowns(above):
        parts = set().union(*(kernels(each, x) for each in above))
        stand_in = sympy.Dummy()
        replaced = [each.xreplace(dict.fromkeys(parts, stand_in)) for each in above]
        part = parts.pop() if len(parts) == 1 else x
        if part == x or part.free_symbols != {x} or x in _unknowns(replaced):
            continue
        found = []
        for each in _solutions(replaced):
            value = each.pop(stand_in, stand_in)
            if value.free_symbols:
                found.append({key: other.xreplace({stand_in: part}) for key, other in each.items()})
            elif not isinstance(numeric(value), mpmath.mpc):
                found += [{x: root, **each} for root in _roots(part - value, x) or ()]
        return found
    return None


def _polynomials(above: list[Any]) -> list[Solution] | None:
    """Solve a system of polynomials: the values of each unknown by elimination, then which of them belong together.

    The last polynomial of a lexical Groebner basis has exactly the values that its last unknown takes as roots.
    """
    unknowns = _unknowns(above)
    if len(above) < len(unknowns) or not all(each.is_polynomial(*unknowns) for each in above):
        return None
    values = []
    for x in unknowns:
        last = sympy.groebner(above, *(each for each in unknowns if each != x), x, order="lex").exprs[-1]
        if last.is_number:
            return []
        if last.free_symbols != {x}:
            return [{}]
        values.append([(root, numeric(root)) for root in _roots(last, x) or ()])
    if math.prod(map(len, values)) > MAX_GUESSES:
        raise ExpressionError("it has too many solutions")
    terms = [[(powers, numeric(factor)) for powers, factor in sympy.Poly(each, *unknowns).terms()] for each in above]
    guesses = ([*zip(*guess)] for guess in itertools.product(*values))
    return [dict(zip(unknowns, roots)) for roots, numbers in guesses if all(_fits(each, numbers) for each in terms)]


def _fits(terms: Sequence[tuple[tuple[int, ...], Any]], numbers: Sequence[Any]) -> bool:
    """Whether a polynomial, as pairs of exponents and coefficients, vanishes there."""
    with mpmath.workdps(DIGITS):
        parts = [factor * math.prod(x**power for x, power in zip(numbers, powers)) for powers, factor in terms]
        return abs(sum(parts)) <= TOLERANCE * max(1, *map(abs, parts))


def _roots(expression: Any, x: Any) -> list[Any] | None:
    """All roots in the one unknown; the real ones alone where it is no polynomial. None when every number is one."""
    if expression.is_polynomial(x):
        first, *others = sympy.Poly(expression, x).all_coeffs()
        polynomial = sympy.Poly([1, *(factor / first for factor in others)], x)
        rational = all(factor.is_Rational for factor in polynomial.all_coeffs())
        factors = [factor for factor, _ in polynomial.factor_list()[1]] if rational else [polynomial]
        return [root for factor in factors for root in _factor_roots(factor)]
    if not expression.has(*PERIODIC):
        values = isolate(expression, x)
        if values is not None:
            return [value for value in values if _is_real(value)]
    found = real_roots(expression, x)
    return None if found is None else [_named(root) for root in found]


def _named(root: Any) -> Any:
    short = exact(root)
    return sympy.Float(root, DIGITS) if short is None else short


def _is_real(value: Any) -> bool:
    return value.is_finite is not False and not isinstance(numeric(value), mpmath.mpc)


def _factor_roots(factor: sympy.Poly) -> list[Any]:
    """Roots of a polynomial without rational factors: by formula up to degree 2, else in numbers."""
    if factor.degree() <= 2:
        return short_roots(factor)
    if not all(coefficient.is_Rational for coefficient in factor.all_coeffs()):
        factor = sympy.Poly([coefficient.evalf(DIGITS) for coefficient in factor.all_coeffs()], factor.gen)
    return factor.nroots(n=DIGITS, maxsteps=200)


def _is_zero(constant: Any) -> bool:
    """Whether it vanishes; what was computed from rounded numbers is left to the check at the end."""
    return constant.has(sympy.Float) or abs(numeric(constant)) <= TOLERANCE


# ---------------------------------------------------------------------------------------------- what is asked


def _settled(found: list[Solution], differences: list[Any], system: System) -> list[Solution]:
    """The unknowns that have values; or the wanted ones in terms of those that stay free."""
    settled = [{x: value for x, value in each.items() if not value.free_symbols} for each in found]
    wanted = [system.symbols[name] for name in system.wanted]
    if not all(x in each for each in settled for x in wanted):
        return _formulas(differences, wanted, _unknowns(differences))
    if not all(settled):
        names = ", ".join(map(str, _unknowns(differences)))
        raise ExpressionError(
            f"{len(differences)} equation(s) do not settle the unknowns {names}; name one as the second argument"
        )
    return settled


def _formulas(differences: list[Any], wanted: list[Any], unknowns: list[Any]) -> list[Solution]:
    """The wanted unknowns in terms of others; as many of these are eliminated as there are equations, from z to a."""
    others = sorted((x for x in unknowns if x not in wanted), key=lambda x: str(x).lower(), reverse=True)
    for count in range(max(len(differences) - len(wanted), 0), -1, -1):
        for eliminated in itertools.combinations(others, count):
            chosen = [*wanted, *eliminated]
            found = [
                {x: _shortest(each[x]) for x in wanted}
                for each in _expressed(differences, chosen)
                if not any(each[x].has(*chosen) for x in wanted)
            ]
            if found:
                return found
    names = ", ".join(map(str, wanted))
    raise ExpressionError(f"the equations do not give {names} in terms of the others")


def _expressed(expressions: list[Any], unknowns: list[Any]) -> list[Solution]:
    """The unknowns in terms of other letters, isolated one after the other, the last one first."""
    expressions = [each for each in map(numerator, expressions) if each != 0]
    if not unknowns or len(expressions) < len(unknowns):
        return [] if expressions or unknowns else [{}]
    for x in reversed(unknowns):
        for expression in sorted((each for each in expressions if each.has(x)), key=sympy.count_ops):
            others = [each for each in expressions if each is not expression]
            rest = [each for each in unknowns if each != x]
            found = [
                {x: value.xreplace(more), **more}
                for value in isolate(expression, x) or ()
                for more in _expressed([each.xreplace({x: value}) for each in others], rest)
            ]
            if found:
                return found
    return []


def _shortest(value: Any) -> Any:
    forms = (sympy.factor_terms(value), sympy.factor(value), multiplied_out(value), value)
    return min(forms, key=lambda form: len(str(form)))


def _holds(solution: Solution, system: System, tolerance: Any) -> bool:
    """Whether the values fulfil every equation as written; unknowns that stay free, or cancel, get some value."""
    others = sorted(set(system.symbols.values()).difference(solution), key=str)
    given = {symbol: sympy.Rational(2 * k + 3, 7) for k, symbol in enumerate(others)}
    values = {symbol.name: numeric(value) for symbol, value in given.items()}
    values |= {symbol.name: numeric(value.xreplace(given)) for symbol, value in solution.items()}
    known = {symbol.name for symbol in (*solution, *_unknowns([*solution.values()]))}
    return all(each.holds(values, tolerance) for each in system.equations if _names(each) <= known)


def _names(equation: Equation) -> set[str]:
    return {str(symbol) for symbol in equation.difference.free_symbols}


# ---------------------------------------------------------------------------------------------- writing


def _written(solutions: list[Solution], system: System) -> str:
    """The lines that are shown."""
    solutions = sorted(({x.name: value for x, value in each.items()} for each in solutions), key=_order)
    lines = []
    names = system.wanted or sorted(set(solutions[0]).intersection(*solutions))
    for name in names:
        texts = [_shown(solution[name], decimal=system.decimal) for solution in solutions]
        if len(names) == 1:
            texts = list(dict.fromkeys(texts))
        if len(texts) == 1:
            lines.append(f"{name} {texts[0]}")
        else:
            lines += [f"{name}_{index} {text}" for index, text in enumerate(texts)]
    written = "\n".join(lines)
    if len(written) > MAX_OUTPUT:
        raise ExpressionError("the solution is too long to show")
    return written


def _order(solution: dict[str, Any]) -> tuple[Any, ...]:
    """Real before complex, small before large; expressions by their text."""
    key: list[Any] = []
    for name in sorted(solution):
        value = solution[name]
        if value.free_symbols:
            key.append((2, 0, 0, str(value)))
        else:
            number = mpmath.mpc(numeric(value))
            key.append((int(number.imag != 0), number.real, number.imag, ""))
    return tuple(key)


def _shown(value: Any, *, decimal: bool) -> str:
    """`= 1/2`, or `≈ 0.3333333333333333` where the digits are not all."""
    if value.free_symbols:
        return f"= {value}"
    with mpmath.workdps(DIGITS):  # else it is rounded here already
        number = mpmath.mpc(numeric(value))
    if not decimal:
        for form in _forms(value, number):
            if _readable(form):
                return f"= {form}"
    real, imaginary = _digits(number.real), _digits(abs(number.imag))
    sign = "≈" if _rounded(number.real, real) or _rounded(abs(number.imag), imaginary) else "="
    if number.imag == 0:
        return f"{sign} {real}"
    minus = number.imag < 0
    if number.real == 0:
        return f"{sign} {'-' * minus}{imaginary}*I"
    return f"{sign} {real} {'-' if minus else '+'} {imaginary}*I"


def _forms(value: Any, number: Any) -> Iterator[Any]:
    yield value
    yield sympy.expand(value)
    quadratic = not value.has(sympy.Float, sympy.pi)
    real, imaginary = (exact(part, quadratic=quadratic) for part in (number.real, number.imag))
    if real is not None and imaginary is not None:
        yield real + imaginary * sympy.I


def _digits(number: Any) -> str:
    """As Python writes a float, or with as many digits where a float would be too large or too small."""
    return repr(float(number)) if number == 0 or 1e-300 < abs(number) < 1e300 else str(mpmath.nstr(number, 17))


def _rounded(number: Any, digits: str) -> bool:
    with mpmath.workdps(DIGITS):
        return abs(mpmath.mpf(digits) - number) > abs(number) * mpmath.mpf(10) ** (5 - DIGITS)


def _readable(value: Any) -> bool:
    """Fractions, a fraction plus a square root, with or without I, and multiples of pi."""
    if value.has(sympy.Float) or len(str(value)) > MAX_EXACT:
        return False
    atoms_fine = all(
        part.is_Rational or part in (sympy.I, sympy.pi) or part.is_Add or part.is_Mul or _is_square_root(part)
        for part in sympy.preorder_traversal(value)
    )
    with_pi = value.has(sympy.pi)
    return atoms_fine and (not with_pi or (value / sympy.pi).is_Rational)


def _is_square_root(part: Any) -> bool:
    return bool(part.is_Pow and part.base.is_Integer and part.exp == sympy.Rational(1, 2))
