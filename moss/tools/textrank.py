"""Summaries by TextRank with the question in mind, for English and Chinese.

    summarize("Moss is a small plant. …", limit=400, query="Where does moss grow?")

A sentence is important where it shares words with important ones: the words that two sentences share, over the
logarithms of their lengths, are the edges of a graph (Mihalcea and Tarau, 2004, equation in section 4), and the rank is
the stationary distribution of a random walk on it. The walk starts anew not anywhere, but at sentences that hold words
of the question (the bias of topic-sensitive PageRank, Haveliwala 2002), the rarer the word the more. The best
sentences that fit are returned in the order of the text. Of a long page those are compared that hold most of the
question's words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain

import numpy as np

from moss.tools.asked import of_its_kind
from moss.tools.words import sentences, terms

MAX_SENTENCES = 300  # that are compared with each other
DAMPING = 0.85
AT_ONCE = 2048  # words that are compared at a time
LEAST = 6  # characters of a sentence that says anything
UNASKED = 0.1  # of a restart goes anywhere, so that sentences without a word of the question have a rank too
FROM_QUESTION = 0.6  # of the final order: the sentence's own words of the question; the rest is the walk


def summarize(text: str, *, limit: int, query: str = "") -> str:
    """The sentences of `text` that matter most for `query`, in at most `limit` characters."""
    every = list(dict.fromkeys(sentence for sentence in sentences(text) if len(sentence) >= LEAST))
    if not every:
        return text.strip()[:limit]
    every = _most_asked(every, query)
    glue = "" if is_chinese(text) else " "
    chosen: set[int] = set()
    room = limit
    for index in (-rank(every, query)).argsort(kind="stable"):
        needed = len(every[index]) + (len(glue) if chosen else 0)
        if needed <= room:
            chosen.add(int(index))
            room -= needed
        elif not chosen:  # the best one alone is too long
            return every[index][: limit - 1] + "…"
    return glue.join(every[index] for index in sorted(chosen))


def _most_asked(every: list[str], query: str) -> list[str]:
    """The sentences that hold most of the question's words, the rarer the more, then the first ones; in their order."""
    if len(every) <= MAX_SENTENCES:
        return every
    asked = set(terms(query))
    found = [asked.intersection(terms(sentence)) for sentence in every]
    count = Counter(chain.from_iterable(found))
    weight = [round(sum(math.log(1 + len(every) / count[word]) for word in words), 9) for words in found]
    best = sorted(range(len(every)), key=lambda at: -weight[at])[:MAX_SENTENCES]
    return [every[at] for at in sorted(best)]


def rank(every: Sequence[str], query: str = "") -> np.ndarray:
    """The importance of each sentence, shape (sentences,), highest first to choose."""
    bags = [set(terms(sentence)) for sentence in every]
    asked = _asked(bags, query)
    own = FROM_QUESTION * asked / max(asked.max(), 1e-6) + [of_its_kind(query, sentence) for sentence in every]
    walked = walk(bags, asked)
    return np.round((1 - FROM_QUESTION) * walked / walked.max() + own, 9)  # no order by the last bit of a machine


def walk(bags: Sequence[Collection[str]], asked: np.ndarray) -> np.ndarray:
    """TextRank of sentences given by their words; `asked` says how much of the question stands in each.

    The stationary distribution of the walk, shape (sentences,).
    """
    logs = np.log([len(bag) + 1 for bag in bags])
    edges = _shared(bags) / np.maximum(logs[:, None] + logs[None, :], 1e-6)
    sums = edges.sum(axis=1, keepdims=True)
    step = np.divide(edges, sums, out=np.full_like(edges, 1 / len(bags)), where=sums > 0)
    restart = np.full(len(bags), 1 / len(bags))
    if asked.sum() > 0:
        restart = UNASKED * restart + (1 - UNASKED) * asked / asked.sum()
    return np.linalg.solve(np.eye(len(bags)) - DAMPING * step.T, (1 - DAMPING) * restart)


def _shared(bags: Sequence[Collection[str]]) -> np.ndarray:
    """How many words each two sentences share, shape (sentences, sentences); 0 with itself."""
    count = Counter(chain.from_iterable(bags))
    column = {word: at for at, word in enumerate(word for word, often in count.items() if often > 1)}
    row_of = np.array([row for row, bag in enumerate(bags) for word in bag if word in column], dtype=int)
    column_of = np.array([column[word] for bag in bags for word in bag if word in column], dtype=int)
    shared = np.zeros((len(bags), len(bags)))
    for begin in range(0, len(column), AT_ONCE):
        part = (column_of >= begin) & (column_of < begin + AT_ONCE)
        holds = np.zeros((len(bags), AT_ONCE), dtype=np.float32)
        holds[row_of[part], column_of[part] - begin] = 1
        shared += holds @ holds.T
    np.fill_diagonal(shared, 0)
    return shared


def _asked(bags: Sequence[Collection[str]], query: str) -> np.ndarray:
    """How much of the question stands in each sentence, the rarer a word in the text the more."""
    words = list(dict.fromkeys(terms(query)))
    found = np.array([[word in bag for word in words] for bag in bags], dtype=float).reshape(len(bags), len(words))
    return found @ np.log(1 + len(bags) / np.maximum(found.sum(axis=0), 1))


def is_chinese(text: str) -> bool:
    """Whether a text is mostly written in Chinese characters."""
    return len(re.findall("[\u3400-\u9fff]", text[:2000])) * 4 > len(text[:2000])
