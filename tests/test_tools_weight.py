"""How much of a question a page holds: weights worked out by hand, and names that count once in two languages."""

from __future__ import annotations

from math import log

import pytest

from moss.tools.index import Entry, Found, Index
from moss.tools.weight import Question

NOTES = Index.of([Entry("Garden", "Moss likes shade.", "g"), Entry("Trip", "We meet at the Great Wall.", "t")])
OTHERS = Index.of([Entry("Moss", "A plant.", "m"), Entry("长城", "很长。", "c", "Great Wall"), Entry("Rest", "-", "r")])
ONE, TWO = (log(1 + 5 / (1 + count)) for count in (1, 2))  # a word of as many of the five pages
NONE = log(1 + 5)


def weight(question: str, text: str, title: str = "", keywords: str = "", **named: str) -> float:
    return Question(question, named, (NOTES, OTHERS)).weight(Found(title, "url", text, keywords, 0.0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Moss, mosses and moss.", TWO),  # once, however often
        ("The shade of trees", ONE),
        ("Moss in the shade", ONE + TWO),
        ("an unheard thing", NONE),
        ("nothing of it", 0),
    ],
)
def test_words_by_hand(text: str, expected: float) -> None:
    """Prevents a common word from weighing as much as a rare one, and the rarity in one index from being that in the
    other: "moss" is in both."""
    assert weight("Which unheard moss likes the shade?", text) == pytest.approx(expected)


def test_where_a_word_may_stand() -> None:
    """Prevents a page from being less than what it was found by: its title and keywords."""
    assert weight("moss shade", "text", "Moss", "shade") == weight("moss shade", "moss shade")


def test_names_count_once() -> None:
    """Prevents a page that says a name in two languages from standing before one that says it, and one that says half
    of a name from counting as nothing or as all of it."""
    both, english, chinese = "长城 Great Wall", "the Great Wall", "长城"
    assert weight("长城", both, 长城="Great Wall") == weight("长城", english, 长城="Great Wall") == pytest.approx(ONE)
    assert weight("great wall", both, **{"great wall": "长城"}) == pytest.approx(2 * TWO)
    assert weight("great wall", chinese, **{"great wall": "长城"}) == pytest.approx(2 * TWO)
    assert weight("长城", "a wall", 长城="Great Wall") == pytest.approx(ONE / 2)
    assert weight("长城", "a wall", 长城="Unheard wall") == pytest.approx(ONE * TWO / (TWO + NONE))
    assert weight("长城 moss", "moss", 长城="The") == pytest.approx(TWO)  # a name without a word to look for
    assert weight("长城", "the wall") == 0
