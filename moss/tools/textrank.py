"""Summaries by TextRank with the question in mind, for English and Chinese.

    summarize("Moss is a small plant. …", limit=400, query="Where does moss grow?")

A sentence is important where it shares words with important ones: the words that two sentences share, over the
logarithms of their lengths, are the edges of a graph (Mihalcea and Tarau, 2004, equation in section 4), and the rank is
the stationary distribution of a random walk on it. The walk starts anew not anywhere, but at sentences that hold words
of the question (the bias of topic-sensitive PageRank, Haveliwala 2002), the rarer the word the more. The best
sentences that fit are returned in the order of the text: by rank, words of the question, and whether a sentence
holds the kind of thing that is asked for (`asked.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moss.tools.asked import of_its_kind
from moss.tools.words import sentences, terms

DAMPING = 0.85
ROUNDS = 30  # of the walk; the rank of the third decimal stands long before
LEAST = 6  # characters of a sentence that says anything
UNASKED = 0.1  # of a restart goes anywhere, so that sentences without a word of the question have a rank too
FROM_QUESTION = 0.6  # of the final order: the sentence's own words of the question; the rest is the walk


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
    own = FROM_QUESTION * asked / max(asked.max(), 1e-6) + [of_its_kind(query, sentence) for sentence in every]
    return (1 - FROM_QUESTION) * walk / walk.max() + own


def _asked(holds: np.ndarray, vocabulary: dict[str, int], query: str) -> np.ndarray:
    """How much of the question stands in each sentence, the rarer a word in the text the more."""
    columns = [vocabulary[term] for term in dict.fromkeys(terms(query)) if term in vocabulary]
    found = holds[:, columns]
    rarity = np.log(1 + len(holds) / np.maximum(found.sum(axis=0), 1))
    return found @ rarity


def is_chinese(text: str) -> bool:
    """Whether a text is mostly written in Chinese characters."""
    return sum("\u3400" <= character <= "\u9fff" for character in text[:2000]) * 4 > len(text[:2000])
