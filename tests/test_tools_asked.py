"""What a question asks for: the kind of answer it is seen to want, and which sentences look like one."""

from __future__ import annotations

import time

import pytest

from moss.tools.asked import of_its_kind

DEPTH, YEAR = "The lake is 1,642 metres deep.", "It was founded in 1709."


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("How deep is Lake Baikal?", DEPTH),
        ("贝加尔湖有多深？", DEPTH),
        ("depth of Lake Baikal", "贝加尔湖深1642米。"),
        ("How heavy is a whale?", "A blue whale weighs up to 150 tonnes."),
        ("大象体重是多少", "大象重约5000千克。"),
        ("How fast does light travel?", "It covers 300,000 kilometres per second."),
        ("Where was he born?", "He was born in Zundert."),
        ("他是哪里人，出生地在哪里", "He was born in Zundert."),
        ("Who painted it?", "The painter Vincent van Gogh made it."),
        ("谁画的", "这是文森特·梵高的画。"),
        ("When was the city founded?", YEAR),
        ("它是哪年建的", YEAR),
        ("它是哪一年建的？", YEAR),
        ("它是何年何月建的", YEAR),
        ("How many cells are there?", "There are a million of them."),
        ("里面有几根柱子", "It has twenty-eight pillars."),
        ("Why is the sky blue?", "It is blue because short waves are scattered."),
    ],
)
def test_seen(question: str, sentence: str) -> None:
    """Prevents a summary that keeps everything but the year, the number or the name, in either language and across."""
    assert of_its_kind(question, sentence) > 0


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("How deep is Lake Baikal?", "The lake is in Siberia."),
        ("When was it founded?", "The city is large."),
        ("Who painted it?", "It hangs in a museum."),
        ("", DEPTH),
        ("moss", YEAR),
    ],
)
def test_not_seen(question: str, sentence: str) -> None:
    """Prevents a sentence that is preferred for nothing."""
    assert of_its_kind(question, sentence) == 0


@pytest.mark.parametrize("piece", ["1", "1,", "1.", "A'", "Aa ", "A a", "1万", "in ", "·", "一", "per "])
def test_hostile_sentences_take_no_time(piece: str) -> None:
    """Prevents a page of one long number from stopping the program that sums it up."""
    question = (
        "how high, heavy, fast, hot, old is it, how many, where, why, who and when? 多高多重多快多热多久多少哪里谁何时"
    )
    begun = time.monotonic()
    of_its_kind(question, piece * (200_000 // len(piece)))
    assert time.monotonic() - begun < 2.0
