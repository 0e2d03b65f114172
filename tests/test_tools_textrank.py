"""Summaries: the rank of tiny texts worked out by hand, the same as another program's, and where they end."""

from __future__ import annotations

import math
import random
import time
import tracemalloc
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from moss.tools.asked import of_its_kind
from moss.tools.textrank import DAMPING, FROM_QUESTION, MAX_SENTENCES, UNASKED, is_chinese, rank, summarize, walk
from moss.tools.words import sentences, terms

NOBODY = np.zeros


def test_three_sentences_by_hand() -> None:
    """Prevents a formula that is another than the paper's: shared words over the sum of the logarithms, and a walk.

    Of {a, b, c}, {a, b}, {c} the first shares two words with the second and one with the third, these two none with
    each other. The walker comes to the first from both; from there it goes on by the weights.
    """
    bags = [["a", "b", "c"], ["a", "b"], ["c"]]
    first, second = 2 / (math.log(4) + math.log(3)), 1 / (math.log(4) + math.log(2))
    to_second = first / (first + second)
    middle = (0.15 / 3 + 0.85 * 2 * 0.15 / 3) / (1 - 0.85**2)
    expected = [middle, 0.05 + 0.85 * middle * to_second, 0.05 + 0.85 * middle * (1 - to_second)]
    assert walk(bags, NOBODY(3)) == pytest.approx(expected, abs=1e-12)
    assert sum(expected) == pytest.approx(1)


def test_the_question_by_hand() -> None:
    """Prevents a restart that ignores the question: of two equal sentences, and one apart from them, the walker begins
    nine times of ten at the one that is asked for."""
    assert UNASKED == 0.1 and DAMPING == 0.85
    restart = [0.1 / 2 + 0.9, 0.1 / 2]
    first = 0.15 * (restart[0] + 0.85 * restart[1]) / (1 - 0.85**2)
    assert walk([["a", "b"], ["a", "c"]], np.array([2.0, 0.0])) == pytest.approx([first, 1 - first], abs=1e-12)
    alone = walk([["a"], ["b"]], np.array([0.0, 1.0]))  # that share nothing: from each the walker goes anywhere
    assert alone == pytest.approx([0.15 * 0.05 + 0.85 / 2, 0.15 * 0.95 + 0.85 / 2], abs=1e-12)


def test_the_order_by_hand() -> None:
    """Prevents a sentence that has the question's words, and what it asks for, from standing behind popular ones."""
    every = ["Moss is green.", "Moss is small.", "Anna Lund found the fern in 1801."]
    scores = rank(every, "When was the fern found?")
    assert scores.argmax() == 2
    walked = walk([terms(sentence) for sentence in every], np.array([0, 0, 1.0]))
    own = np.array([0, 0, FROM_QUESTION + of_its_kind("When was it?", "It was in 1801.")])
    assert scores == pytest.approx((1 - FROM_QUESTION) * walked / walked.max() + own, abs=1e-8)
    assert rank(every).argmax() == 0  # of equal ones the first


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_same_as_networkx(seed: int, asked: bool) -> None:
    """Prevents a slip in the algebra: another program's PageRank of the same graph, personal restart included."""
    pagerank: Any = pytest.importorskip("networkx.algorithms.link_analysis.pagerank_alg")._pagerank_python
    graph: Any = pytest.importorskip("networkx").Graph()
    rng = random.Random(seed)
    bags = [set(rng.sample("abcdefghijklmnop", rng.randint(0, 8))) for _ in range(20)]
    wanted = np.array([rng.random() * asked for _ in bags])
    graph.add_nodes_from(range(20))
    for i, one in enumerate(bags):
        for j, other in enumerate(bags[:i]):
            if one & other:
                graph.add_edge(i, j, weight=len(one & other) / (math.log(len(one) + 1) + math.log(len(other) + 1)))
    even = dict.fromkeys(range(20), 1 / 20)
    start = {i: UNASKED / 20 + 0.9 * wanted[i] / wanted.sum() for i in range(20)} if asked else even
    expected = pagerank(graph, alpha=DAMPING, personalization=start, dangling=even, tol=1e-13, max_iter=1000)
    assert walk(bags, wanted) == pytest.approx([expected[i] for i in range(20)], abs=1e-9)


def test_shared_words_are_counted_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a count that depends on how many words are compared at a time."""
    rng = random.Random(1)
    bags = [rng.sample([str(n) for n in range(300)], rng.randint(0, 80)) for _ in range(30)]
    expected = walk(bags, NOBODY(30))
    monkeypatch.setattr("moss.tools.textrank.AT_ONCE", 7)
    assert walk(bags, NOBODY(30)) == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------------------------- summaries

PLANT = (
    "Moss is a small plant without flowers. It grows in damp and shady places. Moss has no true roots. "
    "Peat is made of moss that died long ago. In 1907 a doctor used dried moss for wounds. Menu. Cookies help us."
)
CHINESE = (
    "苔藓是一种矮小的植物。它长在潮湿阴凉的地方。苔藓没有真正的根。泥炭由死去的苔藓形成。1907年有医生用干苔藓包扎伤口。"
)


@pytest.mark.parametrize(
    ("text", "query", "words"),
    [
        (PLANT, "Where does moss grow?", "damp and shady"),
        (PLANT, "When was moss used for wounds?", "1907"),
        (PLANT, "what is peat made of", "Peat is made of moss"),
        (CHINESE, "苔藓长在什么地方？", "潮湿阴凉"),
        (CHINESE, "哪一年医生用苔藓包扎伤口", "1907年"),
        (CHINESE, "泥炭是怎么来的", "泥炭由死去的苔藓形成"),
    ],
)
def test_the_answer_is_kept(text: str, query: str, words: str) -> None:
    """Prevents a summary of everything but what was asked for."""
    assert words in summarize(text, limit=60 if text is PLANT else 25, query=query)


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("When was it built?", "in 1420"),
        ("which year was it built", "in 1420"),
        ("它是哪年建的", "in 1420"),
        ("它是哪一年建的？", "in 1420"),
        ("它什么时候建成？", "in 1420"),
        ("How many pillars does it have?", "twenty-eight"),
        ("里面有几根柱子", "twenty-eight"),
        ("它有多少根柱子", "twenty-eight"),
        ("Who built it?", "Kuai Xiang"),
        ("它是谁建的", "Kuai Xiang"),
    ],
)
def test_the_kind_of_thing_that_is_asked_for(query: str, kept: str) -> None:
    """Prevents a Chinese question about an English page, which share no word, from losing the year, number or name."""
    text = (
        "It stands in the city. It is made of wood. Some like it much. The hall was done in 1420. It has twenty-eight "
    )
    text += "pillars. The craftsman Kuai Xiang led the work. Many people go there. It is round and blue."
    assert kept in summarize(text, limit=60, query=query)


def test_sentences_stand_as_they_stood() -> None:
    """Prevents a summary that jumps, repeats, or runs English words together."""
    short = summarize(PLANT, limit=170, query="moss roots peat")
    at = [PLANT.index(sentence) for sentence in sentences(short)]
    assert at == sorted(at) and len(at) > 2
    assert summarize(CHINESE, limit=1000) == CHINESE
    assert summarize(PLANT, limit=1000) == PLANT.replace(" Menu.", "")
    assert summarize("Buy now! " * 50 + "Moss is a plant.", limit=400) == "Buy now! Moss is a plant."


@pytest.mark.parametrize("text", [PLANT, CHINESE, PLANT + CHINESE, "one sentence without any end " * 100, "苔" * 3000])
@pytest.mark.parametrize("limit", [10, 20, 57, 100, 400])
def test_no_longer_than_the_limit(text: str, limit: int) -> None:
    """Prevents a result that is cut afterwards, in the middle of the answer."""
    for query in ("", "moss", "苔藓", "nothing of it"):
        got = summarize(text, limit=limit, query=query)
        assert 0 < len(got) <= limit


def test_texts_that_say_nothing() -> None:
    """Prevents an error for a page without a sentence, or without a word."""
    for text in ("", " \n ", "Hi.", "!!! ??? ...", "。。。", "a\nb\nc", "的的的的的的的的。了了了了了了了。"):
        for query in ("", "?", "moss", "的"):
            assert len(summarize(text, limit=50, query=query)) <= 50
    assert summarize("Hi.", limit=50) == "Hi."


def test_three_hundred_sentences_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a graph that grows with the square of a page's length, and the answer at the end of a long one from
    not being among what is read."""
    compared: list[Sequence[str]] = []
    monkeypatch.setattr("moss.tools.textrank.rank", lambda every, query: compared.append(every) or rank(every, query))
    text = " ".join(f"Sentence number {n} is about the moss." for n in range(2000))
    assert "number 1999" in summarize(text, limit=400, query="Where is number 1999?")
    assert summarize(text, limit=30) == "Sentence number 0 is about th…"
    assert [len(every) for every in compared] == [MAX_SENTENCES] * 2
    assert [each[0][:17] for each in compared] == ["Sentence number 0"] * 2  # of equal ones the first, in their order
    chinese = "".join(f"第{n}句说的是苔藓。" for n in range(2000)) + "泥炭值七元。"
    assert "泥炭值七元。" in summarize(chinese, limit=60, query="泥炭多少钱？")


def test_chinese_is_told_from_english() -> None:
    """Prevents blanks between Chinese sentences, and English ones without."""
    assert [
        is_chinese(text) for text in (CHINESE, "MOSS 是什么", PLANT, "Moss (苔藓) is a small plant.", "", "123")
    ] == [*(True, True, False, False, False, False)]


@cache
def hostile() -> dict[str, str]:
    rng = random.Random(0)
    signs = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(1_000_000))
    words = [f"w{rng.randrange(10**6)}" for _ in range(150_000)]
    return {
        "one character": "a" * 1_000_000,
        "one sign": "中" * 1_000_000,
        "initials": "A. " * 333_333,
        "stops": ". " * 500_000,
        "lines": "\n" * 1_000_000,
        "quotes": '."' * 500_000,
        "numbers": " ".join(map(str, range(160_000))),
        "signs": signs,
        "sentences of signs": "。".join(signs[at : at + 666] for at in range(0, len(signs), 666)),
        "names": "Aa " * 333_333,
        "sentences of words": "".join(" ".join(words[at : at + 90]) + ". X" for at in range(0, len(words), 90)),
        "repeated": "Moss is green. " * 66_666,
        "one number": "1" * 1_000_000,
        "apostrophes": "A'" * 500_000,
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_text_has_bounds(name: str) -> None:
    """Prevents a page that stops the program which sums it up, or fills its memory."""
    text, query = hostile()[name], "When did the first 中国 king find moss? How high, heavy and old is it? 多高多重多久"
    summarize(text[:1000], limit=400, query=query)
    begun = time.monotonic()
    assert len(summarize(text, limit=400, query=query)) <= 400
    assert time.monotonic() - begun < 3.0
    tracemalloc.start()
    summarize(text, limit=400, query=query)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20
