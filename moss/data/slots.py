"""Values for phrasings: numbers, money, names and things, drawn by small specs that stand in the material files.

A spec is a few words (`int 2 90`, `money 3 400`, `times b 2 12`, `= {a}*{x}+{b}`); `compile_spec` turns it into
a function that draws one value. Numbers keep two texts: the plain digits that go into a tool call, and what the
person wrote (`three`, `1,250`, `两`), so that copying into the call means reading, not echoing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from moss.data.text import in_words
from moss.tools.arithmetic import evaluate as calculate

CURRENCIES = {
    "en": [("$", "")] * 5 + [("£", ""), ("€", ""), ("", " dollars"), ("", " dollars"), ("", " euros"), ("", " yuan")]
    + [("", " bucks"), ("", " pounds"), ("", " USD")],
    "zh": [("", "元")] * 6 + [("", "块")] * 3 + [("", "块钱")] * 2 + [("￥", ""), ("", "美元"), ("¥", "")],
}
PERCENTS = [5, 8, 10, 12, 15, 18, 20, 25, 30, 35, 40, 45, 50, 60, 65, 70, 75, 80, 85, 90]


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
        if spec == "$":
            amount = self.shown
            if amount.startswith("-"):
                return f"-{self.money[0]}{amount[1:]}{self.money[1]}"
            return f"{self.money[0]}{amount}{self.money[1]}"
        return self.shown

    def plain(self) -> Number:
        """The same number, written in digits."""
        return Number(str(self), money=self.money)


Draw = Callable[[random.Random, Mapping[str, Number], str], tuple[str, str]]  # (rng, earlier, lang) -> plain, shown


def whole(rng: random.Random, low: int, high: int) -> int:
    """An integer of the range, every number of digits about as likely as another."""
    digits = rng.randint(len(str(low)), len(str(high)))
    return rng.randint(max(low, 10 ** (digits - 1) if digits > 1 else 0), min(high, 10**digits - 1))


def trim(value: str) -> str:
    """A result as people write it: `12.0` is `12`."""
    return value[:-2] if value.endswith(".0") else value


def word(value: int, lang: str) -> str:
    """A count in words; before a Chinese measure word 2 is 两."""
    return "两" if lang == "zh" and value == 2 else in_words(value, lang)


def _commas(plain: str, rng: random.Random, lang: str) -> str:
    """Large numbers sometimes as people write them: 12,500, 15k, 1.5万."""
    if len(plain) < 4 or not plain.isdigit() or rng.random() > 0.3:
        return plain
    value = int(plain)
    if lang == "zh":
        return f"{value / 10000:g}万" if value >= 10000 and value % 1000 == 0 else plain
    return f"{value // 1000}k" if value % 1000 == 0 and rng.random() < 0.3 else f"{value:,}"


def _int(words: list[str]) -> Draw:
    low, high, step = int(words[0]), int(words[1]), int(words[2]) if len(words) > 2 else 1

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        plain = str(whole(rng, low, high) if step == 1 else rng.randrange(low, high + 1, step))
        return plain, _commas(plain, rng, lang)

    return draw


def _year(words: list[str]) -> Draw:
    low, high = int(words[0]), int(words[1])

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        plain = str(rng.randint(low, high))
        return plain, plain

    return draw


def _num(words: list[str]) -> Draw:
    low, high = int(words[0]), int(words[1])

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        if rng.random() < 0.15:
            plain = f"{whole(rng, low, min(high, 99))}.{rng.randint(1, 9)}"
            return plain, plain
        plain = str(whole(rng, low, high))
        return plain, _commas(plain, rng, lang)

    return draw


def _count(words: list[str]) -> Draw:
    low, high = int(words[0]), int(words[1])

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        value = whole(rng, low, high)
        spoken = rng.random() < (0.3 if value <= 12 else 0.08) and value < 100
        return str(value), word(value, lang) if spoken else _commas(str(value), rng, lang)

    return draw


def _money(words: list[str]) -> Draw:
    low, high = int(words[0]), int(words[1])

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        value = whole(rng, low, high)
        if value < 1000 and rng.random() < 0.25:
            plain = f"{value}.{rng.choice(['99', '50', '25', '75', '95', '20', '49']) if lang == 'en' else rng.randint(1, 9)}"
            return plain, plain
        return str(value), _commas(str(value), rng, lang)

    return draw


def _dec(words: list[str]) -> Draw:
    low, high, places = float(words[0]), float(words[1]), int(words[2])

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        plain = f"{rng.uniform(low, high):.{places}f}"
        return plain, plain

    return draw


def _one(words: list[str]) -> Draw:
    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        plain = rng.choice(words)
        return plain, plain

    return draw


def _percent(words: list[str]) -> Draw:
    low, high = (int(words[0]), int(words[1])) if words else (1, 99)
    usual = [p for p in PERCENTS if low <= p <= high]

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        draw = rng.random()
        plain = str(rng.choice(usual) if draw < 0.7 else rng.randint(low, high))
        plain += rng.choice([".5", ".5", ".2", ".8"]) if draw > 0.94 else ""
        return plain, plain

    return draw


def _times(words: list[str]) -> Draw:
    slot, low, high = words[0], int(words[1]), int(words[2])

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        plain = str(int(earlier[slot]) * whole(rng, low, high))
        return plain, _commas(plain, rng, lang)

    return draw


def _above(words: list[str]) -> Draw:
    slot, low, high = words[0], int(words[1]), int(words[2])

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        plain = str(int(float(earlier[slot])) + whole(rng, low, high))
        return plain, _commas(plain, rng, lang)

    return draw


def _below(words: list[str]) -> Draw:
    slot, low = words[0], int(words[1])

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        plain = str(whole(rng, low, int(earlier[slot]) - 1))
        return plain, plain

    return draw


def _quantity(words: list[str]) -> Draw:
    """A quantity to convert: where the row divides, a multiple of its factor."""
    low, high = int(words[0]), int(words[1])

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        factor = earlier["by"]
        value = whole(rng, low, high) if factor[0] == "*" else int(factor[1:]) * whole(rng, 2, 90)
        return str(value), _commas(str(value), rng, lang)

    return draw


def _equals(words: list[str]) -> Draw:
    expression = " ".join(words)

    def draw(rng: random.Random, earlier: Mapping[str, Number], lang: str) -> tuple[str, str]:
        plain = trim(calculate(expression.format_map({name: str(value) for name, value in earlier.items()})))
        return plain, plain

    return draw


SPECS: dict[str, Callable[[list[str]], Draw]] = {
    "int": _int, "num": _num, "year": _year, "count": _count, "money": _money, "dec": _dec, "one": _one, "percent": _percent, "times": _times,
    "above": _above, "below": _below, "quantity": _quantity, "=": _equals,
}


def compile_spec(spec: str) -> Draw:
    """The drawing function of a spec such as `int 2 90`; the first word names the kind, see `SPECS`."""
    kind, *words = spec.split()
    if kind not in SPECS:
        raise ValueError(f"unknown slot spec {spec!r}: it must start with one of {', '.join(SPECS)}")
    return SPECS[kind](words)
