"""How much of a question a page holds, so that pages of several indexes stand in one order.

    question = Question("Who discovered penicillin?", {"penicillin": "青霉素"}, (own, encyclopedia))
    question.weight(page)

The scores of two indexes do not compare: in a few notes every word is rare. Here a word weighs the same in every page,
the more the rarer it is in all indexes together (inverse document frequency), and it counts once, however often and in
whichever of two languages a page says it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from moss.tools.index import Found, Index
from moss.tools.words import held, question_terms, terms


class Question:
    """A question, with what the things that it names are called in the other language."""

    def __init__(self, question: str, named: Mapping[str, str], indexes: Sequence[Index]) -> None:
        self._words = question_terms(question)
        self._names = [(set(terms(name)), other) for name, twin in named.items() if (other := terms(twin))]
        pages = sum(index.num_pages for index in indexes)
        every = {*self._words, *(word for _, other in self._names for word in other)}
        count = {word: sum(index.num_with(word) for index in indexes) for word in every}
        self._weights = {word: math.log(1 + pages / (1 + count[word])) for word in every}

    def weight(self, page: Found) -> float:
        """The weight of the question's words that the page holds, by its keywords too; of one that it does not, the
        part of its name in the other language that it does."""
        there = held(self._weights, f"{page.title}\n{page.keywords}\n{page.text}")
        return sum(self._weights[word] * (1 if word in there else self._named(word, there)) for word in self._words)

    def _named(self, word: str, there: set[str]) -> float:
        """How much of a name in the other language, of those that the word is part of, is there; 0 to 1."""
        names = (other for name, other in self._names if word in name)
        return max((self._sum(there.intersection(other)) / self._sum(set(other)) for other in names), default=0.0)

    def _sum(self, words: Iterable[str]) -> float:
        return math.fsum(self._weights[word] for word in words)
