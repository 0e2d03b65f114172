"""Values for phrasings: numbers, money, names and things, drawn by small specs that stand in the material files.

A spec is a few words (`int 2 90`, `money 3 400`, `times b 2 12`, `= {a}*{x}+{b}`); `compile_spec` turns it into
a function that draws one value. A number keeps two texts: the plain digits that go into a tool call, and what the
person wrote (`three`, `1,250`, `两`), so that filling in a call means reading, not echoing.

    draw = compile_spec("count 2 90"); draw(random.Random(1), {}, "en")      # ("3", "three")
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from moss.data.text import in_words
from moss.tools.arithmetic import evaluate

CURRENCIES = {  # (before, after) the amount; some more often than others
    "en": [("$", "")] * 5 + [("", " dollars")] * 2
    + [("£", ""), ("€", ""), ("", " euros"), ("", " yuan"), ("", " bucks"), ("", " pounds"), ("", " USD")],
    "zh": [("", "元")] * 6 + [("", "块")] * 3 + [("", "块钱")] * 2 + [("￥", ""), ("", "美元"), ("¥", "")],
}  # fmt: skip
PERCENTS = (5, 8, 10, 12, 15, 18, 20, 25, 30, 35, 40, 45, 50, 60, 65, 70, 75, 80, 85, 90)
CENTS = ("99", "50", "25", "75", "95", "20", "49")


class Number(str):
    """Plain digits that know how the person wrote them: `{n}` as written, `{n:$}` with the currency."""

    shown: str
    money: tuple[str, str]

    def __new__(cls, plain: str, shown: str = "", money: tuple[str, str] = ("", "")) -> Number:
        number = super().__new__(cls, plain)
        number.shown = shown or plain
        number.money = money
        return number

    def __format__(self, spec: str) -> str:
        if spec != "$":
            return self.shown
        sign, amount = ("-", self.shown[1:]) if self.shown.startswith("-") else ("", self.shown)
        return f"{sign}{self.money[0]}{amount}{self.money[1]}"

    def plain(self) -> Number:
        """The same number, written in digits."""
        return Number(str(self), money=self.money)


Values = Mapping[str, str]
Drawn = tuple[str, str]  # plain digits, as written
Draw = Callable[[random.Random, Values, str], Drawn]  # the values are those drawn before; then the language


def whole(rng: random.Random, low: int, high: int) -> int:
    """An integer of the range, every number of digits about as likely as another."""
    digits = rng.randint(len(str(low)), len(str(high)))
    return rng.randint(max(low, 10 ** (digits - 1) if digits > 1 else 0), min(high, 10**digits - 1))


def trim(value: str) -> str:
    """A result as people write it: `12.0` is `12`."""
    return value.removesuffix(".0")


def word(value: int, lang: str) -> str:
    """A count in words; before a Chinese measure word 2 is 两."""
    return "两" if lang == "zh" and value == 2 else in_words(value, lang)


def written(plain: str, rng: random.Random, lang: str) -> Drawn:
    """Large numbers are sometimes written as people do: 12,500, 15k, 1.5万."""
    if len(plain) < 4 or not plain.isdigit() or rng.random() > 0.3:
        return plain, plain
    value = int(plain)
    if lang == "zh":
        return plain, f"{value / 10000:g}万" if value >= 10000 and value % 1000 == 0 else plain
    return plain, f"{value // 1000}k" if value % 1000 == 0 and rng.random() < 0.3 else f"{value:,}"


def _int(rng: random.Random, values: Values, lang: str, low: str, high: str, step: str = "1") -> Drawn:
    even = rng.randrange(int(low), int(high) + 1, int(step))
    return written(str(even if step != "1" else whole(rng, int(low), int(high))), rng, lang)


def _num(rng: random.Random, values: Values, lang: str, low: str, high: str) -> Drawn:
    """As `int`, now and then with a decimal."""
    if rng.random() < 0.15:
        plain = f"{whole(rng, int(low), min(int(high), 99))}.{rng.randint(1, 9)}"
        return plain, plain
    return written(str(whole(rng, int(low), int(high))), rng, lang)


def _year(rng: random.Random, values: Values, lang: str, low: str, high: str) -> Drawn:
    """A number that is a name, never written with separators."""
    plain = str(rng.randint(int(low), int(high)))
    return plain, plain


def _count(rng: random.Random, values: Values, lang: str, low: str, high: str) -> Drawn:
    """A number of things, small ones sometimes in words."""
    value = whole(rng, int(low), int(high))
    if value < 100 and rng.random() < (0.3 if value <= 12 else 0.08):
        return str(value), word(value, lang)
    return written(str(value), rng, lang)


def _money(rng: random.Random, values: Values, lang: str, low: str, high: str) -> Drawn:
    value = whole(rng, int(low), int(high))
    if value < 1000 and rng.random() < 0.25:
        plain = f"{value}.{rng.choice(CENTS) if lang == 'en' else rng.randint(1, 9)}"
        return plain, plain
    return written(str(value), rng, lang)


def _dec(rng: random.Random, values: Values, lang: str, low: str, high: str, places: str) -> Drawn:
    plain = f"{rng.uniform(float(low), float(high)):.{places}f}"
    return plain, plain


def _one(rng: random.Random, values: Values, lang: str, *words: str) -> Drawn:
    plain = rng.choice(words)
    return plain, plain


def _percent(rng: random.Random, values: Values, lang: str, low: str, high: str) -> Drawn:
    draw = rng.random()
    usual = [p for p in PERCENTS if int(low) <= p <= int(high)]
    plain = str(rng.choice(usual) if draw < 0.7 else rng.randint(int(low), int(high)))
    plain += rng.choice([".5", ".5", ".2", ".8"]) if draw > 0.94 else ""
    return plain, plain


def _times(rng: random.Random, values: Values, lang: str, slot: str, low: str, high: str) -> Drawn:
    """A multiple of another value."""
    return written(str(int(values[slot]) * whole(rng, int(low), int(high))), rng, lang)


def _above(rng: random.Random, values: Values, lang: str, slot: str, low: str, high: str) -> Drawn:
    """Another value and so much more."""
    return written(str(int(values[slot]) + whole(rng, int(low), int(high))), rng, lang)


def _below(rng: random.Random, values: Values, lang: str, slot: str, low: str) -> Drawn:
    """Less than another value."""
    plain = str(whole(rng, int(low), max(int(low), int(values[slot]) - 1)))
    return plain, plain


def _quantity(rng: random.Random, values: Values, lang: str, low: str, high: str) -> Drawn:
    """A quantity to convert by `*60` or `/60`: where it is divided, a multiple."""
    factor = values["by"]
    value = whole(rng, int(low), int(high)) if factor[0] == "*" else int(factor[1:]) * whole(rng, 2, 90)
    return written(str(value), rng, lang)


def _equals(rng: random.Random, values: Values, lang: str, *words: str) -> Drawn:
    """Computed from other values."""
    expression = " ".join(words).format_map({name: str(value) for name, value in values.items()})
    plain = trim(evaluate(expression))
    return plain, plain


SPECS: dict[str, Callable[..., Drawn]] = {
    "int": _int, "num": _num, "year": _year, "count": _count, "money": _money, "dec": _dec, "one": _one,
    "percent": _percent, "times": _times, "above": _above, "below": _below, "quantity": _quantity, "=": _equals,
}  # fmt: skip


def compile_spec(spec: str) -> Draw:
    """The drawing function of a spec such as `int 2 90`; the first word names the kind, see `SPECS`."""
    kind, *words = spec.split()
    if kind not in SPECS:
        raise ValueError(f"unknown slot spec {spec!r}: it must start with one of {', '.join(SPECS)}")
    drawer = SPECS[kind]
    return lambda rng, values, lang: drawer(rng, values, lang, *words)
