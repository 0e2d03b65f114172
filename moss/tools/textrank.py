"""Summaries by TextRank with the question in mind, for English and Chinese.

    summarize("Moss is a small plant. …", limit=400, query="Where does moss grow?")

A sentence is important where it shares words with important ones: the words that two sentences share, over the
logarithms of their lengths, are the edges of a graph (Mihalcea and Tarau, 2004, equation in section 4), and the rank is
the stationary distribution of a random walk on it. The walk starts anew not anywhere, but at sentences that hold words
of the question (the bias of topic-sensitive PageRank, Haveliwala 2002), the rarer the word the more. The best
sentences that fit are returned in the order of the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from moss.tools.words import sentences, terms

DAMPING = 0.85
ROUNDS = 30  # of the walk; the rank of the third decimal stands long before
LEAST = 6  # characters of a sentence that says anything
UNASKED = 0.1  # of a restart goes anywhere, so that sentences without a word of the question have a rank too
FROM_QUESTION = 0.6  # of the final order: the sentence's own words of the question; the rest is the walk
OF_ITS_KIND = 0.4  # more, where it holds what the question asks for: a year, a number, a name

# what a question asks for, and how a sentence looks that holds it
_KINDS = (
    (
        re.compile(r"\b(when|(what|which) (year|date)|century)\b|[哪几]年|何时|什么时候|年份|世纪", re.IGNORECASE),
        re.compile(r"(?<!\d)\d{3,4}(?!\d)|\bcentury\b|世纪", re.IGNORECASE),
    ),
    (
        re.compile(
            r"\bhow (many|much|long|tall|high|deep|far|old|fast|big|large|wide|heavy|hot|cold)\b"
            r"|\b(height|length|speed|area|number|weight|temperature|percentage|distance)\b"
            r"|多[少高长大深远快重宽久]|几",
            re.IGNORECASE,
        ),
        re.compile(r"\d"),
    ),
    (
        re.compile(
            r"\bwho(se|m)?\b|\bwhich (\w+ )?(man|woman|person|king|queen|emperor|scientist|doctor|physician|poet|writer"
            r"|architect|explorer|inventor|engineer)\b|谁|哪位|何人",
            re.IGNORECASE,
        ),
        re.compile(r"(?<!^)\b[A-Z][a-z]+ (?:[a-z]+ )?[A-Z][a-z]+|·"),
    ),
)


def summarize(text: str, *, limit: int, query: str = "") -> str:
    """The sentences of `text` that matter most for `query`, in at most `limit` characters."""
    every = [sentence for sentence in sentences(text) if len(sentence) >= LEAST]
    if not every:
        return text.strip()[:limit]
    glue = "" if is_chinese(text) else " "
    chosen: set[int] = set()
    room = limit
    for index in rank(every, query).argsort()[::-1]:
        needed = len(every[index]) + (len(glue) if chosen else 0)
        if needed <= room:
            chosen.add(int(index))
            room -= needed
        elif not chosen:  # the best one alone is too long
            return every[index][: limit - 1] + "…"
    return glue.join(every[index] for index in sorted(chosen))


def rank(every: Sequence[str], query: str = "") -> np.ndarray:
    """The importance of each sentence, shape (sentences,), highest first to choose."""
    vocabulary: dict[str, int] = {}
    bags = [{vocabulary.setdefault(term, len(vocabulary)) for term in terms(sentence)} for sentence in every]
    holds = np.zeros((len(bags), len(vocabulary) or 1), dtype=np.float32)
    for row, bag in enumerate(bags):
        holds[row, list(bag)] = 1
    logs = np.log(holds.sum(axis=1) + 1)
    edges = holds @ holds.T / np.maximum(logs[:, None] + logs[None, :], 1e-6)
    np.fill_diagonal(edges, 0)
    sums = edges.sum(axis=1, keepdims=True)
    step = np.divide(edges, sums, out=np.full_like(edges, 1 / len(bags)), where=sums > 0)
    asked = _asked(holds, vocabulary, query)
    restart = np.full(len(bags), 1 / len(bags))
    if asked.sum() > 0:
        restart = UNASKED * restart + (1 - UNASKED) * asked / asked.sum()
    walk = restart
    for _ in range(ROUNDS):
        walk = (1 - DAMPING) * restart + DAMPING * walk @ step
    own = FROM_QUESTION * asked / max(asked.max(), 1e-6) + OF_ITS_KIND * _of_its_kind(every, query)
    return (1 - FROM_QUESTION) * walk / walk.max() + own


def _of_its_kind(every: Sequence[str], query: str) -> np.ndarray:
    """1 for sentences that hold the kind of thing the question asks for."""
    wanted = [looks for asks, looks in _KINDS if asks.search(query)]
    return np.array([any(looks.search(sentence) for looks in wanted) for sentence in every], dtype=float)


def _asked(holds: np.ndarray, vocabulary: dict[str, int], query: str) -> np.ndarray:
    """How much of the question stands in each sentence, the rarer a word in the text the more."""
    columns = [vocabulary[term] for term in dict.fromkeys(terms(query)) if term in vocabulary]
    found = holds[:, columns]
    rarity = np.log(1 + len(holds) / np.maximum(found.sum(axis=0), 1))
    return found @ rarity


def is_chinese(text: str) -> bool:
    """Whether a text is mostly written in Chinese characters."""
    return sum("\u3400" <= character <= "\u9fff" for character in text[:2000]) * 4 > len(text[:2000])
