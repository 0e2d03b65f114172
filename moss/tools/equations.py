"""Equations read from text into SymPy objects, built by constructors alone and bounded before SymPy sees them.

SymPy's own reader runs what it reads, and its solvers have no idea of an expression's size; so the text goes through
our grammar, each name, degree, exponent and number of terms is checked here, and only then an object is built.

`Equation.holds` puts values back into the equation *as it was written*, with mpmath and without SymPy's rewriting, so
that it is an independent check of every root.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import mpmath
import sympy

from moss.tools.expression import ExpressionError, Node, parse
from moss.tools.isolate import DIGITS, Cbrt

MAX_EQUATIONS = 8
MAX_UNKNOWNS = 8
MAX_DEGREE = 24
MAX_EXPONENT = 64
MAX_TERMS = 2000  # foretold, of either side of a fraction, multiplied out
MAX_DIGITS = 60  # of a number in the text
MAX_BITS = 14_000  # of a number computed from the text
TOLERANCE = mpmath.mpf(10) ** -25  # between the sides of an equation, relative to the larger

FUNCTIONS: dict[str, tuple[Any, Any]] = {  # name: SymPy's, mpmath's
    **{name: (getattr(sympy, name), getattr(mpmath, name)) for name in ("sin", "cos", "tan", "asin", "acos", "atan")},
    **{f"arc{name}": (getattr(sympy, f"a{name}"), getattr(mpmath, f"a{name}")) for name in ("sin", "cos", "tan")},
    **{name: (getattr(sympy, name), getattr(mpmath, name)) for name in ("sinh", "cosh", "tanh", "exp", "sqrt")},
    "cbrt": (Cbrt, lambda x: mpmath.sign(x) * mpmath.cbrt(abs(x))),
    "abs": (sympy.Abs, mpmath.fabs),
    "ln": (sympy.log, mpmath.log),
    "log": (sympy.log, mpmath.log),
    "lg": (lambda x: sympy.log(x) / sympy.log(10), mpmath.log10),
    "log10": (lambda x: sympy.log(x) / sympy.log(10), mpmath.log10),
    "log2": (lambda x: sympy.log(x) / sympy.log(2), lambda x: mpmath.log(x, 2)),
}
_CONSTANTS = {"pi": (sympy.pi, mpmath.pi), "e": (sympy.E, mpmath.e)}
_GREEK = frozenset("alpha beta gamma delta epsilon theta kappa lambda mu nu rho sigma tau phi chi psi omega".split())
_MARKED = re.compile(r"[A-Za-z]+[0-9]*(_[A-Za-z0-9]+)+")
_LETTER = re.compile(r"[A-Za-z][0-9]*")


class _Size(NamedTuple):
    """Upper bounds of an expression written as one fraction: degrees and numbers of terms above and below the line."""

    degree: int
    below: int
    terms: int
    terms_below: int

    def times(self, other: _Size) -> _Size:
        return _Size(*(a + b for a, b in zip(self[:2], other[:2])), *(a * b for a, b in zip(self[2:], other[2:])))

    def over(self, other: _Size) -> _Size:
        return self.times(_Size(other.below, other.degree, other.terms_below, other.terms))

    def plus(self, other: _Size) -> _Size:
        degree = max(self.degree + other.below, other.degree + self.below)
        terms = self.terms * other.terms_below + other.terms * self.terms_below
        return _Size(degree, self.below + other.below, terms, self.terms_below * other.terms_below)

    def power(self, n: int) -> _Size:
        """To the n-th power, n >= 0: a sum of t terms gets C(n+t-1, n) terms."""
        terms = (math.comb(n + t - 1, n) for t in self[2:])
        return _Size(self.degree * n, self.below * n, *terms)

    def checked(self) -> _Size:
        if max(self.degree, self.below) > MAX_DEGREE:
            raise ExpressionError(f"the degree may reach {max(self.degree, self.below)}; at most {MAX_DEGREE}")
        if max(self.terms, self.terms_below) > MAX_TERMS:
            raise ExpressionError(f"multiplied out it may have more than {MAX_TERMS} terms")
        return self


_CONSTANT, _ATOM = _Size(0, 0, 1, 1), _Size(1, 0, 1, 1)


@dataclass(frozen=True)
class Equation:
    """`left = right` as written, and the SymPy expression `left - right`."""

    left: Node
    right: Node
    difference: sympy.Expr

    def holds(self, values: Mapping[str, Any], tolerance: Any = TOLERANCE) -> bool:
        """Whether it is true for these mpmath numbers, by name; `tolerance` is relative to the larger side."""
        try:
            with mpmath.workdps(DIGITS):
                left, right = _number(self.left, values), _number(self.right, values)
                error, size = abs(left - right), max(1, abs(left), abs(right))
                return bool(mpmath.isfinite(error) and error <= tolerance * size)
        except (ZeroDivisionError, OverflowError, ValueError):
            return False


@dataclass
class System:
    """What the text asks: its equations, the unknowns in them, and those of them that are wanted (empty = all)."""

    equations: list[Equation] = field(default_factory=list)
    symbols: dict[str, sympy.Symbol] = field(default_factory=dict)
    wanted: list[str] = field(default_factory=list)
    decimal: bool = False  # a number has a decimal point: so shall the answers


def read_system(text: str, unknown: str = "") -> System:
    """The equations of `text`, kept apart by `;` or commas; a lone name among them, or `unknown`, is wanted."""
    statements = parse(text, (*FUNCTIONS, "pow"), split=split_name, commas_separate=True)
    builder = _Builder()
    system = System(symbols=builder.symbols)
    for statement in statements:
        if statement.relation not in ("", "=", "=="):
            raise ExpressionError(f"{statement.relation!r}: inequalities are not solved here, only equations")
        if statement.relation == "" or (statement.right is None and statement.asked):
            if statement.left[0] == "name":
                system.wanted.append(_one_name(statement.left[1]))
        elif statement.right is None:
            raise ExpressionError("nothing stands after the equals sign")
        else:
            system.equations.append(builder.equation(statement.left, statement.right))
    if not system.equations:
        raise ExpressionError("there is no equation, such as x+2=5; expressions are for Calculate")
    if len(system.equations) > MAX_EQUATIONS:
        raise ExpressionError(f"{len(system.equations)} equations are too many; at most {MAX_EQUATIONS}")
    system.wanted += [_one_name(name) for name in re.split(r"[,;，；、\s]+", unknown.strip()) if name]
    system.wanted = list(dict.fromkeys(system.wanted))
    for name in system.wanted:
        if name not in system.symbols:
            raise ExpressionError(f"the unknown {name!r} does not stand in the equations")
    system.decimal = builder.decimal
    return system


def _one_name(word: str) -> str:
    names = split_name(word)
    if len(names) != 1 or names[0] in _CONSTANTS:
        raise ExpressionError(f"{word!r} does not name one unknown")
    return names[0]


def split_name(word: str) -> list[str]:
    """The names a word stands for: `x`, `a1`, `total_cost` and `theta` are one, `xy` is x times y.

    What could be read in two ways, or looks like a word of a language, is refused.
    """
    if word in _CONSTANTS or word in _GREEK or _LETTER.fullmatch(word) or (_MARKED.fullmatch(word) and len(word) <= 32):
        return [word]
    if word.lower() in FUNCTIONS or word.lower() == "pow":
        raise ExpressionError(f"{word} needs its argument in parentheses")
    if not word.isalpha():
        raise ExpressionError(f"{word!r} can be read in more than one way; write the products with *")
    if len(word) > 3:
        raise ExpressionError(f"{word!r} is too long for an unknown; use one letter, or join words as in total_cost")
    if "e" in word or "pi" in word.lower() or any(word.lower().startswith(name) for name in FUNCTIONS):
        raise ExpressionError(f"{word!r} can be read in more than one way; write the products with *")
    return list(word)


class _Builder:
    """Trees to SymPy expressions, with their sizes; gathers the unknowns on the way."""

    def __init__(self) -> None:
        self.symbols: dict[str, sympy.Symbol] = {}
        self.decimal = False

    def equation(self, left: Node, right: Node) -> Equation:
        a, size_a = self.build(left)
        b, size_b = self.build(right)
        size_a.plus(size_b).checked()
        return Equation(left, right, sympy.Add(a, sympy.Mul(sympy.Integer(-1), b)))

    def build(self, node: Node) -> tuple[Any, _Size]:
        kind = node[0]
        if kind == "num":
            return self._literal(node[1]), _CONSTANT
        if kind == "name":
            return self._name(node[1])
        if kind == "neg":
            inner, size = self.build(node[1])
            return sympy.Mul(sympy.Integer(-1), inner), size
        if kind == "post":
            if node[1] == "!":
                raise ExpressionError("'!' (a factorial, or 'not equal') is not solved here")
            inner, size = self.build(node[2])
            return _bounded(sympy.Mul(sympy.Rational(1, 100), inner)), size
        if kind == "call":
            return self._call(node[1].lower(), node[2])
        return self._binary(node[1], node[2], node[3])

    def _literal(self, text: str) -> Any:
        value = literal(text)
        self.decimal = self.decimal or not text.isdigit()
        return sympy.Rational(value.numerator, value.denominator)

    def _name(self, name: str) -> tuple[Any, _Size]:
        if name in _CONSTANTS:
            return _CONSTANTS[name][0], _CONSTANT
        if name not in self.symbols:
            self.symbols[name] = sympy.Symbol(name)
            if len(self.symbols) > MAX_UNKNOWNS:
                raise ExpressionError(f"more than {MAX_UNKNOWNS} unknowns")
        return self.symbols[name], _ATOM

    def _call(self, name: str, arguments: list[Node]) -> tuple[Any, _Size]:
        if name == "pow" and len(arguments) == 2:
            return self._binary("^", *arguments)
        if name == "log" and len(arguments) == 2:
            (value, _), (base, _) = map(self.build, arguments)
            return self._atom(sympy.log(value) / sympy.log(base))
        if len(arguments) != 1:
            raise ExpressionError(f"{name} takes one argument here")
        inner, size = self.build(arguments[0])
        if name == "sqrt":
            return sympy.sqrt(inner), size if inner.free_symbols else _CONSTANT
        return self._atom(FUNCTIONS[name][0](inner))

    def _atom(self, expression: Any) -> tuple[Any, _Size]:
        if not expression.is_finite and expression.is_finite is not None:
            raise ExpressionError("a value lies outside its function's domain")
        return expression, _ATOM if expression.free_symbols else _CONSTANT

    def _binary(self, operator: str, left: Node, right: Node) -> tuple[Any, _Size]:
        if operator in ("//", "%"):
            raise ExpressionError(f"{operator!r} is not solved here")
        a, size_a = self.build(left)
        b, size_b = self.build(right)
        if operator == "^":
            return _power(a, size_a, b)
        if operator == "/":
            if b.is_zero:
                raise ExpressionError("division by zero")
            return _bounded(sympy.Mul(a, sympy.Pow(b, sympy.Integer(-1)))), size_a.over(size_b).checked()
        if operator == "*":
            return _bounded(sympy.Mul(a, b)), size_a.times(size_b).checked()
        if operator == "-":
            b = sympy.Mul(sympy.Integer(-1), b)
        return _bounded(sympy.Add(a, b)), size_a.plus(size_b).checked()


def literal(text: str) -> Fraction:
    """The exact value of a number in the text; a decimal is the fraction that it writes."""
    mantissa, _, exponent = text.lower().partition("e") if text[:2] not in ("0x", "0X") else (text, "", "")
    if len(text) > MAX_DIGITS or len(exponent) > 4 or abs(int(exponent or 0)) > MAX_DIGITS:
        raise ExpressionError(f"the number {text[:20]}… is too long; at most {MAX_DIGITS} digits")
    if text[:2].lower() in ("0x", "0o", "0b"):
        return Fraction(int(text, 0))
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _bounded(expression: Any) -> Any:
    if expression.is_Rational and max(abs(expression.p), expression.q).bit_length() > MAX_BITS:
        raise ExpressionError(f"a number in it is too large; at most {MAX_BITS} bits")
    return expression


def _power(base: Any, size: _Size, exponent: Any) -> tuple[Any, _Size]:
    """`base` to the `exponent`, when the result can be foretold to be small."""
    if exponent.free_symbols:
        if base.free_symbols & exponent.free_symbols:
            raise ExpressionError("an unknown in the exponent must not stand below it too")
        if not base.free_symbols and not base.is_positive:
            raise ExpressionError("an unknown in the exponent needs a positive number below it")
        return sympy.Pow(base, exponent), _ATOM
    if not exponent.is_Rational:
        if base.free_symbols:
            raise ExpressionError("the exponent of an unknown must be a fraction or a whole number")
        return sympy.Pow(base, exponent), _CONSTANT
    if base.is_zero and exponent.is_negative:
        raise ExpressionError("division by zero")
    if base.is_Rational:
        bits = max(abs(base.p), base.q).bit_length() - (abs(base.p) == base.q == 1)
        if bits * abs(exponent) > MAX_BITS or exponent.q > MAX_EXPONENT:
            raise ExpressionError(f"a power in it is too large; at most {MAX_BITS} bits")
        return sympy.Pow(base, exponent), _CONSTANT
    if base == sympy.E and abs(exponent) <= MAX_BITS:
        return sympy.exp(exponent), _CONSTANT
    if abs(exponent) > MAX_EXPONENT or exponent.q > MAX_EXPONENT:
        raise ExpressionError(f"an exponent is too large; at most {MAX_EXPONENT}")
    whole = math.ceil(abs(exponent))
    grown = size.power(whole).checked()
    if exponent.is_negative:
        grown = _CONSTANT.over(grown)
    return sympy.Pow(base, exponent), grown


def _number(node: Node, values: Mapping[str, Any]) -> Any:
    """The tree's value in mpmath numbers."""
    kind = node[0]
    if kind == "num":
        exact = literal(node[1])
        return mpmath.mpf(exact.numerator) / exact.denominator
    if kind == "name":
        return _CONSTANTS[node[1]][1] if node[1] in _CONSTANTS else values[node[1]]
    if kind == "neg":
        return -_number(node[1], values)
    if kind == "post":
        return _number(node[2], values) / 100
    if kind == "call":
        arguments = [_number(argument, values) for argument in node[2]]
        if node[1].lower() == "pow":
            return mpmath.power(*arguments)
        return (mpmath.log if len(arguments) == 2 else FUNCTIONS[node[1].lower()][1])(*arguments)
    a, b = _number(node[2], values), _number(node[3], values)
    if node[1] == "^":
        return mpmath.power(a, b)
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[node[1]]()
