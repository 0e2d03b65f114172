"""Tests of the plain documents for pre-training: reproducible, true, and in the right language."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest

from moss.data import text
from moss.data.talk import LANGS
from moss.data.text import documents, in_words

CJK = re.compile(r"[一-鿿]")


@pytest.mark.parametrize(
    ("number", "english", "chinese"),
    [
        (0, "zero", "零"),
        (12, "twelve", "十二"),
        (20, "twenty", "二十"),
        (42, "forty-two", "四十二"),
        (105, "one hundred and five", "一百零五"),
        (110, "one hundred and ten", "一百一十"),
        (342, "three hundred and forty-two", "三百四十二"),
        (1000, "one thousand", "一千"),
        (1005, "one thousand and five", "一千零五"),
        (1010, "one thousand and ten", "一千零一十"),
        (7300, "seven thousand three hundred", "七千三百"),
        (9999, "nine thousand nine hundred and ninety-nine", "九千九百九十九"),
    ],
)
def test_numbers_in_words(number, english, chinese):
    """Prevents wrong number words, the zeros of Chinese above all."""
    assert (in_words(number, "en"), in_words(number, "zh")) == (english, chinese)


def test_numbers_without_words_are_refused():
    """Prevents a silent wrong word for numbers beyond the table."""
    with pytest.raises(ValueError, match="10000"):
        in_words(10000, "en")


def test_documents_follow_from_seed_and_position():
    """Prevents documents that change with the order or number of those drawn before."""
    first = list(islice(documents(7), 60))
    assert first == list(islice(documents(7), 60))
    assert first != list(islice(documents(8), 60))
    assert first[0::2] == list(islice(documents(7, "en"), 60))[0::2]
    assert first[1::2] == list(islice(documents(7, "zh"), 60))[1::2]


@pytest.mark.parametrize("lang", LANGS)
def test_documents_are_filled_short_and_varied(lang):
    """Prevents open slots, empty or endless documents and a stream that repeats itself."""
    drawn = list(islice(documents(1, lang), 3000))
    assert len(set(drawn)) > 2900
    for document in drawn:
        assert document.strip() == document and 5 < len(document) < 900, document
        assert not re.search(r"[{}]", document), document
    share = sum(bool(CJK.search(document)) for document in drawn) / len(drawn)
    assert share < 0.06 if lang == "en" else share > 0.8


def test_an_unknown_language_is_named():
    """Prevents a typing error from giving documents in both languages."""
    with pytest.raises(ValueError, match="'fr'"):
        next(documents(1, "fr"))


def test_statements_with_an_equals_sign_are_true():
    """Prevents false sums: each `a+b=c` of the document kind with computed values is checked by hand arithmetic."""
    sign = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a // b}
    checked = 0
    for i in range(400):
        for a, op, b, c in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", text._sums(Random(i), LANGS[i % 2])):
            assert sign[op](int(a), int(b)) == int(c) and (op != "/" or int(a) % int(b) == 0)
            checked += 1
    assert checked > 800


def test_symbols_hold_the_numbers_of_the_words():
    """Prevents a drill of copying that drops or changes a number on the way to the symbols."""
    lines = text.material("text")["symbols"]
    for lang in LANGS:
        told = lines[lang]["lines"]
        assert len(told) % 2 == 0
        for words, symbols in zip(told[::2], told[1::2], strict=True):
            assert set(re.findall(r"\{\w\}", words)) == set(re.findall(r"\{\w\}", symbols)), words
