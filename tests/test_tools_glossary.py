"""The names of things in the other language: found in a question, and asked for together with it."""

from __future__ import annotations

import pytest

from moss.tools.glossary import Glossary
from moss.tools.index import Entry, Index

PAGES = [
    Entry("Great Wall of China", "A wall.", "a", "长城; walls"),
    Entry("Penguin", "A bird.", "b", "企鹅; bird"),
    Entry("企鹅", "一种鸟。", "c", "Penguin; 鸟"),
    Entry("金", "一种金属。", "d", "Gold"),
    Entry("Nameless", "No keywords.", "e"),
]


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("How long is the Great Wall of China?", "长城"),
        ("what do penguins eat", "企鹅"),
        ("the penguin's nest, and penguins again", "企鹅"),
        ("企鹅吃什么？", "Penguin"),
        ("现金多少", ""),  # one character is more often a part of another word
        ("Nameless things", ""),
        ("", ""),
    ],
)
def test_names_in_the_other_language(question: str, names: str) -> None:
    """Prevents names that are missed for their endings or length, and such that are no names."""
    assert Glossary(PAGES).other_names(question) == names
    assert " ".join(dict.fromkeys(Glossary(PAGES).named(question).values())) == names


def test_a_page_of_the_other_language_is_found() -> None:
    """Prevents a Chinese question from finding nothing among English pages, which have another name for it."""
    index = Index.of(
        [Entry("Visit to the zoo", "We saw a penguin.", "z"), Entry("Visit to the lake", "We saw a duck.", "l")]
    )
    assert index.search("哪里看到了企鹅") == []
    assert [page.title for page in index.search("哪里看到了企鹅", 3, "Penguin")] == ["Visit to the zoo"]
