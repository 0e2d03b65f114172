"""Bare expressions and equations, as text for the tool and as people type them.

Each drawer returns the canonical text (ASCII, no spaces, `^` for powers, `2x` for a product with an unknown,
`;` between equations) and a version as typed: `37 x 12`, `37×12`, `（3＋5）×2`, `x² - 5x + 6 = 0`. Equations are
built from chosen solutions, so the lines that the solver prints are known without running it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from fractions import Fraction

from moss.data.slots import whole

WIDE = str.maketrans("+-*/()=^0123456789.;", "＋－×÷（）＝＾０１２３４５６７８９．；")
LETTERS = "xxxxxxxyyzabtnmkp"
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
POWER = re.compile(r"\^(\d+)")
PRODUCT = re.compile(r"(\d)([a-z(])")
SQUARE_FREE = (2, 3, 5, 6, 7, 10, 11, 13, 14, 15, 17, 19, 21, 22, 23, 26, 29, 30, 31, 33, 34, 35, 37, 38, 39, 41, 42)


def _places(rng: random.Random, low: int, high: int) -> str:
    """A number with one or two decimals."""
    return f"{rng.uniform(low, high):.{rng.choice([1, 1, 2])}f}"


def _short(rng: random.Random) -> str:
    return str(whole(rng, 2, 999))


def _pair(rng: random.Random) -> str:
    sign = rng.choice("+-**//" if rng.random() < 0.8 else "+-*")
    if sign == "/" and rng.random() < 0.2:
        return f"{whole(rng, 10, 9999)}/{rng.choice([2, 4, 5, 8])}"
    if sign == "/":
        divisor = whole(rng, 2, 99)
        return f"{divisor * whole(rng, 2, 999)}/{divisor}"
    if sign == "*":
        return f"{whole(rng, 2, 9999)}*{whole(rng, 2, 9999)}"
    return f"{whole(rng, 2, 999999)}{sign}{whole(rng, 2, 999999)}"


def _chain(rng: random.Random) -> str:
    parts = [_short(rng)]
    for _ in range(rng.choice([2, 2, 3])):
        parts += [rng.choice("++--*"), _short(rng)]
    return "".join(parts)


def _brackets(rng: random.Random) -> str:
    a, b, c, d = (_short(rng) for _ in range(4))
    k = whole(rng, 2, 30)
    inner = int(a) + int(b)
    whole_quotient = f"({a}+{k * inner - int(a)})/{inner}" if k * inner > int(a) else f"({a}+{b})*{k}"
    return rng.choice([
        f"({a}+{b})*{c}", f"({a}-{b})*{c}", f"{c}*({a}+{b})", f"({a}+{b})*({c}-{d})", f"({a}+{b})*({c}+{d})",
        f"{a}-({b}+{c})", f"{a}*({b}-{c})+{d}", whole_quotient,
    ])  # fmt: skip


def _power(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return f"{whole(rng, 2, 999)}^2"
    if kind == 1:
        return f"{whole(rng, 2, 99)}^3"
    if kind == 2:
        return f"{rng.randint(2, 12)}^{rng.randint(3, 6)}"
    return f"2^{rng.randint(4, 20)}"


def _root(rng: random.Random) -> str:
    return f"sqrt({whole(rng, 2, 99) ** 2})"


def _decimal(rng: random.Random) -> str:
    sign = rng.choice("+-*")
    if sign == "*":
        return f"{_places(rng, 1, 99)}*{rng.choice([whole(rng, 2, 99), _places(rng, 1, 20)])}"
    return f"{_places(rng, 1, 999)}{sign}{_places(rng, 1, 999)}"


def _negative(rng: random.Random) -> str:
    a, b = _short(rng), _short(rng)
    return rng.choice([f"-{a}+{b}", f"-{a}-{b}", f"-{a}*{b}", f"{a}*(-{b})", f"{a}-(-{b})", f"(-{a})*(-{b})"])


def _factorial(rng: random.Random) -> str:
    return f"{rng.randint(3, 12)}!"


def _sum(rng: random.Random) -> str:
    return "+".join(str(whole(rng, 2, 999)) for _ in range(rng.randint(3, 6)))


def _quotients(rng: random.Random) -> str:
    b, k = whole(rng, 2, 30), whole(rng, 2, 60)
    a, c = b * k, _short(rng)
    return rng.choice([
        f"{a}/{b}+{c}", f"{a}/{b}*{c}", f"{c}+{a}/{b}", f"{c}*{a}/{b}", f"{c}-{a}/{b}", f"{a * 2}/({b}*2)",
        f"{a}/({b}*{k})",
    ])  # fmt: skip


def _powers(rng: random.Random) -> str:
    a, b = whole(rng, 2, 40), whole(rng, 2, 40)
    return rng.choice([
        f"{a}^2+{b}^2", f"{a}^2-{b}^2", f"2^{rng.randint(3, 10)}+{b}", f"{a}*{b}^2", f"({a}+{b})^2",
        f"sqrt({a * a})+{b}", f"sqrt({a * a})*{b}", f"{b}^3-{a}", f"10^{rng.randint(2, 6)}/{rng.choice([2, 4, 5, 8])}",
    ])  # fmt: skip


def _percents(rng: random.Random) -> str:
    a, d = whole(rng, 20, 9000), 5 * rng.randint(1, 19)
    return rng.choice([f"{a}*{d}%", f"{d}%*{a}", f"{a}*(1-{d}%)", f"{a}*(1+{d}%)"])


EXPRESSIONS: dict[str, Callable[[random.Random], str]] = {
    "pair": _pair, "chain": _chain, "brackets": _brackets, "power": _power, "root": _root, "decimal": _decimal,
    "negative": _negative, "factorial": _factorial, "sum": _sum, "quotients": _quotients,
    "powers": _powers, "percents": _percents,
}  # fmt: skip
SHARES = {
    "pair": 28, "chain": 12, "brackets": 16, "power": 7, "root": 4, "decimal": 10, "negative": 5, "factorial": 1.5,
    "sum": 8, "quotients": 9, "powers": 6, "percents": 4,
}  # fmt: skip


def expression(rng: random.Random, kind: str, lang: str) -> tuple[str, str]:
    """A bare expression of a kind (`mixed` for any): canonical text and text as typed."""
    plain = EXPRESSIONS[rng.choices(list(SHARES), list(SHARES.values()))[0] if kind == "mixed" else kind](rng)
    return plain, typed(rng, plain, lang)


def typed(rng: random.Random, plain: str, lang: str) -> str:
    """The same symbols as a person may type them."""
    text = plain
    has_letters = any(char.isalpha() for char in text.replace("sqrt", ""))
    if "sqrt(" in text and rng.random() < 0.5:
        text = text.replace("sqrt(", "√").replace(")", "") if text.count(")") == 1 else text
    if "*" in text and rng.random() < 0.6:
        signs = ["×", "×", "·"] if has_letters else ["×", "×", "×", "x", "x", "X"]
        text = text.replace("*", rng.choice(signs))
    if "/" in text and rng.random() < 0.5:
        text = text.replace("/", "÷")
    if "^" in text:
        draw = rng.random()
        if draw < 0.4:
            text = POWER.sub(lambda match: match[1].translate(RAISED), text)
        elif draw < 0.5:
            text = text.replace("^", "**")
    if rng.random() < (0.5 if lang == "en" else 0.35):
        text = _spaced(text)
    elif lang == "zh" and rng.random() < 0.2:
        text = text.translate(WIDE)
    if lang == "zh" and rng.random() < 0.15:
        text = text.replace("(", "（").replace(")", "）")
    return text


def _spaced(text: str) -> str:
    """Blanks around operators, except a sign at the start or after a bracket."""
    out: list[str] = []
    for i, char in enumerate(text):
        before, after = text[i - 1] if i else "", text[i + 1 : i + 2]
        sign = char in "+-*/=×÷·" or (char in "xX" and before.isdigit() and after.isdigit())
        if sign and before != "*" and after != "*":
            leading = char in "+-" and before in ("", *"(=×÷*/")
            out.append(char if leading else f" {char} ")
        else:
            out.append("; " if char == ";" else char)
    return "".join(out).replace("  ", " ")


def _term(coefficient: int, letter: str, *, first: bool = False) -> str:
    """`3x`, `-x`, `+2y`: one term with its sign; empty when it is zero."""
    if coefficient == 0:
        return ""
    sign = "-" if coefficient < 0 else "" if first else "+"
    size = abs(coefficient)
    return f"{sign}{'' if size == 1 and letter else size}{letter}"


def _linear_forms(rng: random.Random, v: str) -> tuple[str, Fraction]:
    """A linear equation in the unknown `v`, and its solution."""
    x = whole(rng, 1, 200) * (-1 if rng.random() < 0.15 else 1)
    a, b = whole(rng, 2, 60), whole(rng, 1, 300) * rng.choice([1, 1, -1])
    c = rng.choice([k for k in range(1, 40) if k != a])
    left, plus_b = _term(a, v, first=True), _term(b, "")
    form = rng.choices(range(12), [30, 8, 9, 8, 8, 8, 5, 4, 5, 5, 5, 4])[0]
    if form == 0:
        return f"{left}{plus_b}={a * x + b}", Fraction(x)
    if form == 1:
        return f"{abs(b)}{_term(a, v)}={a * x + abs(b)}", Fraction(x)
    if form == 2:
        return f"{left}{plus_b}={_term(c, v, first=True)}{_term(a * x + b - c * x, '')}", Fraction(x)
    if form == 3:
        return f"{a}({v}{plus_b})={a * (x + b)}", Fraction(x)
    if form == 4:
        return rng.choice([(f"{v}/{a}{plus_b}={x + b}", Fraction(x * a)), (f"{v}/{a}={x}", Fraction(x * a))])
    if form == 5:
        return rng.choice([f"{v}{plus_b}={x + b}", f"{left}={a * x}", f"{a * x}={left}"]), Fraction(x)
    if form == 6:
        return f"{abs(b)}-{left}={abs(b) - a * x}", Fraction(x)
    if form == 7:
        return f"{left}{_term(c, v)}={(a + c) * x}", Fraction(x)
    if form == 8:
        return f"{a}({v}{plus_b}){_term(c, '')}={a * (x + b) + c}", Fraction(x)
    if form == 9:
        c, k = rng.randint(2, 9), rng.randint(1, 9)
        a = rng.randint(2, 9)
        return f"{v}/{a}+{v}/{c}={k * (a + c)}", Fraction(k * a * c)
    if form == 10:
        right = whole(rng, 2, 400)
        return f"{left}{plus_b}={right}", Fraction(right - b, a)
    m, d = rng.randint(2, 5), rng.randint(2, 6)
    return f"{m * d}({v}{plus_b})={d}({v}{_term(m * (x + b) - x, '')})", Fraction(x)


def _decimals(rng: random.Random, v: str) -> tuple[str, str]:
    """A linear equation with decimals, and its solution as the solver prints it, as a decimal."""
    a, x, b = rng.randint(0, 9) * 10 + rng.randint(1, 9), whole(rng, 1, 90), whole(rng, 1, 200)  # a / 10 is never whole
    left = f"{a / 10:g}{v}"
    if rng.random() < 0.3:
        return f"{left}={(a * x) / 10:g}", f"{float(x)}"
    return f"{left}+{b}={(a * x + 10 * b) / 10:g}", f"{float(x)}"


def linear(rng: random.Random, lang: str, letters: str = LETTERS) -> tuple[str, str, list[str]]:
    """An equation in one unknown: canonical, as typed, lines of the result."""
    letter = rng.choice(letters)
    if rng.random() < 0.06:
        plain, value = _decimals(rng, letter)
    else:
        plain, solution = _linear_forms(rng, letter)
        value = str(solution)
    if rng.random() < 0.1:  # some write the product out: 2*x
        plain = PRODUCT.sub(r"\1*\2", plain)
    return plain, typed(rng, plain, lang), [f"{letter} = {value}"]


def quadratic(rng: random.Random, lang: str) -> tuple[str, str, list[str]]:
    """A quadratic with whole solutions."""
    letter = rng.choice("xxxxxxxytnm")
    p, q = sorted(whole(rng, 1, 30) * rng.choice([1, 1, -1]) for _ in range(2))
    form = rng.randrange(8)
    if form <= 4:
        plain = f"{letter}^2{_term(-(p + q), letter)}{_term(p * q, '')}=0"
    elif form == 5:
        a = rng.randint(2, 6)
        plain = f"{a}{letter}^2{_term(-a * (p + q), letter)}{_term(a * p * q, '')}=0"
    elif form == 6:
        plain = f"{letter}^2{_term(-(p + q), letter)}={-p * q}"
    else:
        if rng.random() < 0.3:
            n = rng.choice(SQUARE_FREE)
            plain = f"{letter}^2={n}"
            return plain, typed(rng, plain, lang), [f"{letter}_0 = -sqrt({n})", f"{letter}_1 = sqrt({n})"]
        q = whole(rng, 2, 99)
        p = -q
        plain = f"{letter}^2={q * q}"
    lines = [f"{letter} = {p}"] if p == q else [f"{letter}_0 = {p}", f"{letter}_1 = {q}"]
    return plain, typed(rng, plain, lang), lines


def system(rng: random.Random, lang: str) -> tuple[str, str, list[str]]:
    """Two equations in two unknowns with whole solutions."""
    first, second = rng.choice(["xy", "xy", "xy", "xy", "ab", "mn", "pq", "st"])
    x, y = whole(rng, 1, 99), whole(rng, 1, 99)
    if rng.random() < 0.12:
        y = -y
    a, b, c, d = (rng.choice([1, 1, whole(rng, 1, 12)]) for _ in range(4))
    d = -d if rng.random() < 0.6 else d
    if a * d == b * c:
        d = -d
    plain = (
        f"{_term(a, first, first=True)}{_term(b, second)}={a * x + b * y};"
        f"{_term(c, first, first=True)}{_term(d, second)}={c * x + d * y}"
    )
    if rng.random() < 0.25:
        k = rng.randint(2, 6)
        extra = x - k * y
        plain = f"{first}={_term(k, second, first=True)}{_term(extra, '')};{first}+{second}={x + y}"
    shown = typed(rng, plain, lang)
    glue = [" and ", ", ", "; ", " , ", "\n"] if lang == "en" else ["，", "；", "和", " 和 ", ", ", "、", "\n"]
    shown = shown.replace("；", ";").replace("; ", ";").replace(";", rng.choice(glue) if rng.random() < 0.85 else ";")
    return plain, shown, [f"{first} = {x}", f"{second} = {y}"]


def linear_x(rng: random.Random, lang: str) -> tuple[str, str, list[str]]:
    """A linear equation whose unknown is x."""
    return linear(rng, lang, "x")


EQUATIONS = {"linear": linear, "linear_x": linear_x, "quadratic": quadratic, "system": system}
