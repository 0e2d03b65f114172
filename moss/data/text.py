"""Plain documents for pre-training: short, varied texts in English and Chinese.

Half of them are language (stories, letters, facts in prose, lists, sentence pairs, code), half drill what tool
calls need later: copying numbers exactly, saying numbers in words, and writing "a third of 24" as 24/3; some say which
acts are dangerous and which are not. All of it is composed from `material/text.toml`, the fact base, the lists and the
acts of `harmful.toml` and `lookalike.toml`; of the conversations' phrasings nothing appears here but these acts.

    next(documents(seed=1, lang="zh"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from random import Random

from moss.data.talk import FRAMED, LANGS, Filler, material, sentence, topics

SHORT = 60  # a composed document goes on until it has this many characters, or a third of it in Chinese
ENDING = {"en": ". ", "zh": "。"}
VERDICTS = {
    "en": {"harmful": "dangerous.", "lookalike": "harmless."},
    "zh": {"harmful": "有害。", "lookalike": "没问题。"},
}
HOURS = {"hour": ["6..12"]}
UNITS_EN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS_EN = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
DIGITS_ZH = "零一二三四五六七八九"


def in_words(number: int, lang: str) -> str:
    """A whole number from 0 to 9999 in words: 342 is `three hundred and forty-two`, 三百四十二.

    Raises ValueError outside that range.
    """
    if not 0 <= number <= 9999:
        raise ValueError(f"{number} is outside of 0 to 9999; write it in digits")
    return _english(number) if lang == "en" else _chinese(number)


def _english(number: int) -> str:
    if number < 20:
        return UNITS_EN[number]
    if number < 100:
        tens, units = divmod(number, 10)
        return TENS_EN[tens] + (f"-{UNITS_EN[units]}" if units else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = divmod(number, size)
    link = " and " if rest < 100 else " "
    return f"{_english(head)} {name}" + (link + _english(rest) if rest else "")


def _chinese(number: int) -> str:
    text, gap = "", False
    for size, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, number = divmod(number, size)
        if digit:
            text += ("零" if gap and text else "") + DIGITS_ZH[digit] + name
            gap = False
        else:
            gap = True
    if text.startswith("一十"):
        text = text[1:]
    return text or "零"


def _number(rng: Random) -> str:
    """Digits of any usual kind: one to five digits, decimals, leading places as in prices."""
    digits = rng.randint(1, 5)
    whole = rng.randint(10 ** (digits - 1), 10**digits - 1)
    return f"{whole % 1000}.{rng.randint(1, 99):02d}".rstrip("0") if rng.random() < 0.15 else str(whole)


def _fill(rng: Random, lang: str, **own: list[str]) -> Filler:
    return Filler(rng, (own, HOURS, material("slots")[lang]))


def _numbers(rng: Random) -> dict[str, list[str]]:
    letter = rng.choices("xyznabm", (8, 4, 2, 2, 1, 1, 1))[0]
    pools = {key: [_number(rng)] for key in "def"}
    return pools | {"p": [str(rng.randint(1, 99))], "s": [str(rng.randint(2, 12))], "x": [letter]}


def _again(rng: Random, lang: str, line: Callable[[], str], between: str) -> str:
    """Lines, one after another, until the document is long enough."""
    lines = [line()]
    goal = rng.randint(SHORT, 4 * SHORT) // (1 if lang == "en" else 3)
    while len(between.join(lines)) < goal:
        lines.append(line())
    return between.join(lines)


# The kinds of documents ----------------------------------------------------------------------------------------------


def _story(rng: Random, lang: str) -> str:
    parts, fill = material("text")["story"][lang], _fill(rng, lang)
    lines = [rng.choice(parts["open"]), *rng.sample(parts["turn"], 1), *rng.sample(parts["deed"], 2)]
    lines.append(rng.choice(parts["close"]))
    return (" " if lang == "en" else "").join(sentence(fill(line), lang) for line in lines)


def _prose(rng: Random, lang: str) -> str:
    return sentence(_fill(rng, lang)(rng.choice(rng.choice(list(material("text")["prose"][lang].values())))), lang)


def _facts(rng: Random, lang: str) -> str:
    """Facts of one relation in sentences that hold key and value."""
    told = []
    while not told:
        topic = rng.choice(topics("fact", lang))
        told = [text for text in topic.sides[lang].reply if "{k}" in text and "{v}" in text and topic.follows]
    rows = rng.sample(topic.rows, min(len(topic.rows), rng.randint(2, 6)))
    lines = []
    for row in rows:
        key, value = row[:2] if lang == "en" else row[2:4]
        lines.append(sentence(Filler(rng, (), {"k": key, "v": value})(rng.choice(told)), lang))
    return (" " if lang == "en" else "").join(lines)


def _list(rng: Random, lang: str) -> str:
    group = rng.choice(material("list")["group"])
    items = [item[LANGS.index(lang)] for item in group["items"]]
    chosen = rng.sample(items, rng.randint(3, 6))
    name, comma, colon = group[lang]["name"], *((", ", ": ") if lang == "en" else ("、", "："))
    if rng.random() < 0.5:
        return name + colon + "\n" + "\n".join(f"{i}. {item}" for i, item in enumerate(chosen, 1))
    line = sentence(name, lang) + colon + comma.join(chosen)
    if lang == "en":
        return f"{line}. The first is {chosen[0]}, the last is {chosen[-1]}. That makes {len(chosen)}."
    return f"{line}。第一个是{chosen[0]}，最后一个是{chosen[-1]}，一共{len(chosen)}个。"


def _pairs(rng: Random, lang: str) -> str:
    """Sentences and words in both languages, one below the other."""
    text = material("text")["pairs"]["lines"]
    words = next(topic for topic in topics("fact", "en") if topic.name == "translation").rows
    chosen = rng.sample(text, 2) + [list(row[:2]) for row in rng.sample(words, 3)]
    rng.shuffle(chosen)
    return "\n".join(f"{a} {b}" if lang == "en" else f"{b} {a}" for a, b in chosen)


def _code(rng: Random, lang: str) -> str:
    table = material("text")["code"]
    text = Filler(rng, (table["slots"],))(rng.choice(table["programs"]))
    note = {"en": "# a small program\n", "zh": "# 一个小程序\n"}[lang]
    return (note if rng.random() < 0.3 else "") + text


def _counting(rng: Random, lang: str) -> str:
    start, step = rng.choice((rng.randint(0, 20), rng.randint(20, 900))), rng.choice((1, 1, 1, 2, 5, 10))
    numbers = [start + i * step for i in range(rng.randint(6, 12))]
    if rng.random() < 0.3:
        numbers.reverse()
    style = rng.randrange(3)
    if style == 0:
        return (", " if lang == "en" else "、").join(in_words(number, lang) for number in numbers)
    if style == 1:
        return " ".join(map(str, numbers))
    return "\n".join(f"{number} {in_words(number, lang)}" for number in numbers[:6])


def _spoken(rng: Random, lang: str) -> str:
    """Numbers in words and in digits, both ways round."""

    def line() -> str:
        number = rng.randint(0, rng.choice((20, 99, 999, 9999)))
        words = in_words(number, lang)
        if lang == "en":
            return rng.choice((f"{number} is said {words}.", f"{words} is written {number}."))
        return rng.choice((f"{number}读作{words}。", f"{words}写作{number}。"))

    return _again(rng, lang, line, " " if lang == "en" else "")


def _copy(rng: Random, lang: str) -> str:
    lines = material("text")["copy"][lang]["lines"]
    return _again(rng, lang, lambda: _fill(rng, lang, **_numbers(rng))(rng.choice(lines)), "\n")


def _symbols(rng: Random, lang: str) -> str:
    """Words and the symbols that say the same."""
    lines = material("text")["symbols"][lang]["lines"]

    def line() -> str:
        at = 2 * rng.randrange(len(lines) // 2)
        fill = _fill(rng, lang, **_numbers(rng))
        words, symbols = fill(lines[at]), fill(lines[at + 1])
        if lang == "en":
            return rng.choice((f"{words}: {symbols}", f"{words} = {symbols}", f"{symbols} means {words}"))
        return rng.choice((f"{words}：{symbols}", f"{words}写成{symbols}", f"{symbols}表示{words}"))

    return _again(rng, lang, line, rng.choice(("\n", "; " if lang == "en" else "；")))


def _sums(rng: Random, lang: str) -> str:
    """True statements with small numbers, in symbols and in words."""

    def line() -> str:
        a, b = rng.randint(1, rng.choice((9, 20, 60))), rng.randint(1, 12)
        sign, name, text, value = rng.choice(
            (
                ("+", "plus", "加", a + b),
                ("-", "minus", "减", a),
                ("*", "times", "乘", a * b),
                ("/", "divided by", "除以", a),
            )
        )
        first = {"-": a + b, "/": a * b}.get(sign, a)
        symbols = f"{first}{sign}{b}={value}"
        if lang == "en":
            return rng.choice((symbols, f"{first} {name} {b} is {value}.", f"{first} {name} {b} is {value}: {symbols}"))
        return rng.choice((symbols, f"{first}{text}{b}等于{value}。", f"{first}{text}{b}等于{value}：{symbols}"))

    return _again(rng, lang, line, rng.choice(("\n", " ")))


def _echo(rng: Random, lang: str) -> str:
    """A row of words or digits, said again as it was, or from the end."""
    pool = material("slots")[lang][rng.choice(("name", "food", "colour", "city", "animal"))]
    row = (
        rng.sample(pool, rng.randint(3, 5)) if rng.random() < 0.5 else [_number(rng) for _ in range(rng.randint(3, 5))]
    )
    comma = ", " if lang == "en" else "、"
    said, back = comma.join(row), comma.join(reversed(row))
    if lang == "en":
        return rng.choice((f"Say: {said}\nAgain: {said}", f"Forwards: {said}. Backwards: {back}."))
    return rng.choice((f"说：{said}\n再说：{said}", f"顺着说：{said}。倒着说：{back}。"))


def _verdicts(rng: Random, lang: str) -> str:
    """What is dangerous and what only sounds like it, in the words with which a thought says so."""

    def line() -> str:
        kind = rng.choice(FRAMED)
        side = rng.choice([side for topic in topics(kind, lang) if (side := topic.sides[lang]).act or side.thing])
        said = Filler(rng, (side.slots, material("slots")[lang]))(rng.choice(side.act + side.thing))
        return f"{said}: {VERDICTS[lang][kind]}" if lang == "en" else f"{said}：{VERDICTS[lang][kind]}"

    return _again(rng, lang, line, "\n")


KINDS: dict[Callable[[Random, str], str], int] = {
    _story: 12, _prose: 9, _facts: 9, _list: 5, _pairs: 4, _code: 4,
    _counting: 4, _spoken: 7, _copy: 14, _symbols: 20, _sums: 7, _echo: 5,
    _verdicts: 25,
}  # fmt: skip


def documents(seed: int, lang: str | None = None) -> Iterator[str]:
    """Documents without end; item i follows from (seed, lang, i) alone. `lang` None takes both languages by turns.

    Raises ValueError for a language that the material does not have.
    """
    if lang is not None and lang not in LANGS:
        raise ValueError(f"no documents in {lang!r}; choose one of {LANGS}, or None for both")
    makers, weights = list(KINDS), list(KINDS.values())
    for i in count():
        rng = Random(f"text:{seed}:{i}")
        chosen = lang or LANGS[i % len(LANGS)]
        yield rng.choices(makers, weights)[0](rng, chosen)
