"""Solving equations exactly where that is readable, in numbers where it is not; every root is put back and checked.

    solve_text("x^2-4=0")                 # 'x_0 = -2\\nx_1 = 2'
    solve_text("x+y=25", "x")             # 'x = 25 - y'

Order and form: unknowns by name, real roots before complex ones, small before large. Fractions, square roots and
multiples of pi stay exact; anything else, and everything when the text has a decimal point, is a number with the 15 to
17 digits of a double. Equations with functions such as sin, exp or log are solved in real numbers, and of those that
repeat themselves the first period from 0 on is given. Equations that contradict each other
give `No result.`, which is an answer; what cannot be solved raises `ExpressionError` with the reason.

This file runs inside the sandbox's process, which is what ends it when SymPy would search for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import mpmath
import sympy
from mpmath.libmp import NoConvergence
from sympy.solvers.solveset import linsolve

from moss.tools.equations import DIGITS, TOLERANCE, Equation, System, read_system
from moss.tools.expression import ExpressionError

MAX_OUTPUT = 4000  # characters
MAX_EXACT = 40  # characters of a value that is shown exactly
NO_RESULT = "No result."

_PERIODIC = (sympy.sin, sympy.cos, sympy.tan)
_INVERSE = (sympy.asin, sympy.acos, sympy.atan, sympy.log)
_TRANSCENDENTAL = (*_PERIODIC, *_INVERSE, sympy.sinh, sympy.cosh, sympy.tanh, sympy.exp)
_ZERO = sympy.Float("1e-12")

Solution = dict[str, Any]  # a value for each unknown it settles


def solve_text(text: str, unknown: str = "") -> str:
    """The solutions as lines `x = 4`, or `x_0 = …`, `x_1 = …` when there are several."""
    system = read_system(text, unknown)
    equations = _without_constants(system.equations)
    if equations is None:
        return NO_RESULT
    names = sorted(system.symbols)
    solutions = _solve(equations, names, system)
    if solutions is None:
        return NO_RESULT
    checked = [each for each in solutions if _holds(each, system)]
    if not checked:
        if solutions:
            raise ExpressionError("the roots that were found do not fulfil the equations")
        return NO_RESULT
    return _written(checked, system)


def warm_up() -> None:
    """Bring in all of SymPy that solving needs, before the process loses its right to open files."""
    for text, unknown in (
        ("x^2-4=0", ""),
        ("x+y=35;2x+4y=94", ""),
        ("x+y=7;xy=12", ""),
        ("x^3-6x^2+11x-6=0", ""),
        ("x^5-x-1=0", ""),
        ("x^3=7", ""),
        ("100*x/(x+50)=80", ""),
        ("0.1x=5", ""),
        ("pi*r^2=50", ""),
        ("2*pi*r=24*pi", ""),
        ("sqrt(x)+x=6", ""),
        ("2^x=8", ""),
        ("sin(x)=1/2", ""),
        ("5^2+5^2-2*5*5*cos(x)=8^2", ""),
        ("tan(x)+sin(x)=0", ""),
        ("5*ln(x+1)+3.5=0", ""),
        ("sin(x)=cos(x)", ""),
        ("x^2=y;y^2=x", ""),
        ("abs(x-3)=2", ""),
        ("exp(2x)=e^x+2", ""),
        ("x^2+y^2=25;x^2-y=5", ""),
        ("4*pi*r^2=15*pi;r^3*4/3*pi=v", ""),
        ("4/3*pi*r^3=13*x^3", "x"),
        ("x*y*z=12;x=y", "z"),
        ("a=6;b=8;c=sqrt(a^2+b^2);2R=c", "R"),
        ("log(x,2)+log(x+2,2)=3", ""),
    ):
        try:
            solve_text(text, unknown)
        except ExpressionError:  # warm all the same
            continue


def _without_constants(equations: Sequence[Equation]) -> list[Equation] | None:
    """The equations that say something about an unknown; None when one of the others is false."""
    kept = [equation for equation in equations if equation.difference.free_symbols]
    for equation in equations:
        if not equation.difference.free_symbols and abs(_numeric(equation.difference)) > TOLERANCE:
            return None
    if not kept:
        raise ExpressionError("there is no unknown to solve for: the equations hold always or name none")
    return kept


def _solve(equations: list[Equation], names: list[str], system: System) -> list[Solution] | None:
    """Candidates, each a value by name; None when there is certainly no solution."""
    symbols = [system.symbols[name] for name in names]
    present = set().union(*(equation.difference.free_symbols for equation in equations))
    symbols = [symbol for symbol in symbols if symbol in present]
    try:
        if len(symbols) == 1:
            roots = _common_roots(equations, symbols[0])
            return None if roots is None else [{symbols[0].name: root} for root in roots]
        found = _system(equations, symbols)
        if found is None:
            return None
        return _settled(found, equations, symbols, system)
    except (NotImplementedError, NoConvergence):
        raise ExpressionError("no closed form was found") from None


def _common_roots(equations: list[Equation], x: sympy.Symbol) -> list[Any] | None:
    """Roots of the first equation (the check drops those that are none of the others)."""
    first = min(equations, key=lambda equation: sympy.count_ops(equation.difference))
    roots = _roots(first.difference, x)
    if roots is not None and len(equations) > 1:
        roots = [root for root in roots if all(each.holds({x.name: _numeric(root)}) for each in equations)]
        return roots or None
    return roots


def _roots(expression: sympy.Expr, x: sympy.Symbol) -> list[Any] | None:
    """All roots of an expression in one unknown; None when there are none."""
    above, _ = sympy.fraction(sympy.together(expression))
    polynomial = sympy.Poly(above, x) if above.is_polynomial(x) else None
    if polynomial is None:
        roots = _both_branches(sympy.solve(expression, x))
        if expression.has(*_TRANSCENDENTAL) or any(power.exp.has(x) for power in expression.atoms(sympy.Pow)):
            roots = _one_period(expression, x, [root for root in roots if mpmath.im(_numeric(root)) == 0])
        return roots or None
    if polynomial.degree() <= 0:
        return None
    if not all(coefficient.is_Rational for coefficient in polynomial.all_coeffs()):
        return _factor_roots(polynomial)
    _, factors = polynomial.factor_list()
    return [root for factor, _ in factors for root in _factor_roots(factor)]


def _both_branches(roots: list[Any]) -> list[Any]:
    """The roots, each once, with those on the other real branch of Lambert's W, which SymPy often leaves out."""
    others = [
        root.xreplace({part: sympy.LambertW(part.args[0], -1)})
        for root in roots
        for part in root.atoms(sympy.LambertW)
        if len(part.args) == 1
    ]
    return list({mpmath.nstr(_numeric(root), 20): root for root in [*others, *roots]}.values())


def _one_period(expression: sympy.Expr, x: sympy.Symbol, roots: list[Any]) -> list[Any]:
    """Of an expression that repeats itself, the roots in its first period from 0 on; of others, just the roots.

    SymPy gives some root of each kind; those half and quarter a period away, and the mirrored ones, are tried too.
    """
    rates = {sympy.Abs(sympy.diff(part.args[0], x)) for part in expression.atoms(*_PERIODIC) if part.has(x)}
    if not rates or not roots:
        return roots
    periods = (2 * sympy.pi / rate / m for rate in rates if not rate.has(x) for m in range(12, 0, -1))
    period = next((period for period in periods if _repeats(expression, x, period)), None)
    if period is None:
        raise ExpressionError("it may have more solutions than can be listed")
    kept: dict[str, Any] = {}
    for root, mirrored, quarter in itertools.product(roots, (1, -1), range(4)):
        candidate = mirrored * root + quarter * period / 4
        candidate = sympy.expand(candidate - period * sympy.floor(candidate / period))
        number = _numeric(candidate)
        if abs(_at(expression, x, candidate)) < _ZERO:
            kept.setdefault(str(mpmath.nstr(number, 20)), candidate)
    return list(kept.values())


def _repeats(expression: sympy.Expr, x: sympy.Symbol, period: Any) -> bool:
    points = (sympy.Rational(1, 3), sympy.Rational(5, 7))
    return all(abs(_at(expression, x, point) - _at(expression, x, point + period)) < _ZERO for point in points)


def _at(expression: sympy.Expr, x: sympy.Symbol, value: Any) -> Any:
    return expression.evalf(20, subs={x: value})


def _factor_roots(factor: sympy.Poly) -> list[Any]:
    """Roots of a polynomial without rational factors: by formula up to degree 2, else in numbers."""
    coefficients = factor.all_coeffs()
    if len(coefficients) == 2:
        a, b = coefficients
        return [-b / a]
    if len(coefficients) == 3:
        a, b, c = coefficients
        half, square = -b / (2 * a), sympy.expand((b / (2 * a)) ** 2 - c / a)
        return list(dict.fromkeys(half + sign * sympy.sqrt(square) for sign in (-1, 1)))
    if not all(coefficient.is_Rational for coefficient in coefficients):
        factor = sympy.Poly([coefficient.evalf(DIGITS) for coefficient in coefficients], factor.gen)
    return factor.nroots(n=DIGITS, maxsteps=200)


def _system(equations: list[Equation], symbols: list[Any]) -> list[dict[Any, Any]] | None:
    """Solutions of several equations by symbol, possibly in terms of other unknowns; None when there are none."""
    fractions = [sympy.fraction(sympy.together(equation.difference)) for equation in equations]
    above = [each for each, _ in fractions]
    polynomial = all(each.is_polynomial(*symbols) for each in above)
    if polynomial and all(sympy.Poly(each, *symbols).total_degree() <= 1 for each in above):
        solved: list[Any] = list(linsolve(above, *symbols))
        return [dict(zip(symbols, solved[0]))] if solved else None
    found = sympy.solve([equation.difference for equation in equations], symbols, dict=True)
    if polynomial and not any(_free(each) or len(each) < len(symbols) for each in found):
        below = sympy.Mul(*(each for _, each in fractions))
        found = [each for each in found if all(equation.holds(_values(each)) for equation in equations)]
        _check_complete(above, below, symbols, found)
    return found or None


def _check_complete(above: list[Any], below: Any, symbols: list[Any], found: list[dict[Any, Any]]) -> None:
    """Refuse when SymPy has lost solutions of a polynomial system.

    The last polynomial of a lexical Groebner basis has exactly the values that its unknown takes as roots, so their
    number is known; `below` must not vanish, which one more unknown (Rabinowitsch) says.
    """
    apart = sympy.Dummy("t")
    extra = [apart * below - 1] if below.free_symbols else []
    for symbol in symbols:
        order = [*([apart] if extra else []), *(each for each in symbols if each != symbol), symbol]
        last = sympy.groebner([*above, *extra], *order, order="lex").exprs[-1]
        count = 0 if last.is_number else sympy.Poly(last, symbol).sqf_part().degree()
        if count != len({mpmath.nstr(_numeric(each[symbol]), 20) for each in found}):
            raise ExpressionError("not all solutions could be found in closed form")


def _values(solution: dict[Any, Any]) -> dict[str, Any]:
    return {symbol.name: _numeric(value) for symbol, value in solution.items()}


def _settled(
    found: list[dict[Any, Any]], equations: list[Equation], symbols: list[Any], system: System
) -> list[Solution]:
    """The solutions by name; when unknowns stay free, the settled ones, or the wanted one in terms of the rest."""
    found = [{symbol: value for symbol, value in each.items() if symbol != value} for each in found]
    if all(len(each) == len(symbols) and not _free(each) for each in found):
        return [{symbol.name: value for symbol, value in each.items()} for each in found]
    if system.wanted:
        return _in_terms_of_rest(equations, symbols, system)
    settled = [{symbol.name: value for symbol, value in each.items() if not value.free_symbols} for each in found]
    if not all(settled):
        names = ", ".join(symbol.name for symbol in symbols)
        raise ExpressionError(
            f"{len(equations)} equation(s) do not settle the unknowns {names}; name one as the second argument"
        )
    return settled


def _free(solution: dict[Any, Any]) -> bool:
    return any(value.free_symbols for value in solution.values())


def _in_terms_of_rest(equations: list[Equation], symbols: list[Any], system: System) -> list[Solution]:
    """The wanted unknowns, with as many of the others as there are equations, expressed by those that stay free."""
    wanted = [system.symbols[name] for name in system.wanted]
    others = [symbol for symbol in symbols if symbol not in wanted]
    differences = [equation.difference for equation in equations]
    for count in range(max(len(equations) - len(wanted), 0), -1, -1):
        for helpers in itertools.combinations(others, count):
            chosen = [*wanted, *helpers]
            found = sympy.solve(differences, chosen, dict=True)
            good = [
                {symbol.name: sympy.factor_terms(value) for symbol, value in each.items()}
                for each in found
                if all(symbol in each and not each[symbol].has(*chosen) for symbol in wanted)
            ]
            if good:
                return good
    raise ExpressionError(f"the equations do not give {', '.join(system.wanted)} in terms of the others")


def _numeric(value: Any) -> Any:
    """The mpmath number of a SymPy number."""
    with mpmath.workdps(DIGITS):
        if value.is_Rational:
            return mpmath.mpf(value.p) / value.q
        real, imaginary = (
            mpmath.mp.make_mpf(sympy.Float(part, DIGITS)._mpf_) for part in value.evalf(DIGITS).as_real_imag()
        )
        return mpmath.mpc(real, imaginary) if imaginary else real


def _holds(solution: Solution, system: System) -> bool:
    """Whether the values fulfil every equation as written; unknowns that stay free get some value."""
    free: set[Any] = set().union(*(value.free_symbols for value in solution.values()))
    given = {symbol: sympy.Rational(2 * k + 3, 7) for k, symbol in enumerate(sorted(free, key=str))}
    values = {symbol.name: _numeric(value) for symbol, value in given.items()}
    values |= {name: _numeric(value.xreplace(given)) for name, value in solution.items()}
    usable = [each for each in system.equations if _names(each) <= values.keys()]
    return all(each.holds(values) for each in usable)


def _names(equation: Equation) -> set[str]:
    return {str(symbol) for symbol in equation.difference.free_symbols}


def _written(solutions: list[Solution], system: System) -> str:
    """The lines that are shown."""
    solutions = sorted(solutions, key=_order)
    names = system.wanted or sorted(solutions[0])
    lines = []
    for name in names:
        texts = [_shown(solution[name], decimal=system.decimal) for solution in solutions]
        if len(names) == 1:
            texts = list(dict.fromkeys(texts))
        if len(texts) == 1:
            lines.append(f"{name} = {texts[0]}")
        else:
            lines += [f"{name}_{index} = {text}" for index, text in enumerate(texts)]
    written = "\n".join(lines)
    if len(written) > MAX_OUTPUT:
        raise ExpressionError("the solution is too long to show")
    return written


def _order(solution: Solution) -> tuple[Any, ...]:
    """Real before complex, small before large; expressions by their text."""
    key: list[Any] = []
    for name in sorted(solution):
        value = solution[name]
        if value.free_symbols:
            key.append((2, 0, 0, str(value)))
        else:
            number = mpmath.mpc(_numeric(value))
            key.append((int(number.imag != 0), float(number.real), float(number.imag), ""))
    return tuple(key)


def _shown(value: Any, *, decimal: bool) -> str:
    if value.free_symbols:
        return str(value)
    if not decimal:
        for form in (value, sympy.expand(value)):
            if _readable(form):
                return str(form)
    number = mpmath.mpc(_numeric(value))
    real, imaginary = float(number.real), float(number.imag)
    if imaginary == 0:
        return repr(real)
    sign = "-" if imaginary < 0 else "+"
    part = f"{abs(imaginary)!r}*I"
    if real == 0:
        return f"-{part}" if imaginary < 0 else part
    return f"{real!r} {sign} {part}"


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
