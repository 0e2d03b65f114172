"""What the things that a question names are called in the other language, after the twins of the bundled pages.

    Glossary(pages).other_names("Who painted the Mona Lisa?")     # '蒙娜丽莎'

Asked together with the question it finds pages that exist in the other language only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from moss.tools.index import Entry
from moss.tools.textrank import is_chinese

LONGEST = 4  # words of an English name

_WORD = re.compile(r"\w+(?:['’.-]\w+)*")


class Glossary:
    """The titles of pages with the first of their keywords, which is the title in the other language."""

    def __init__(self, pages: Iterable[Entry]) -> None:
        twins = ((page.title.lower(), page.keywords.split(";")[0].strip()) for page in pages)
        self._twins = {title: twin for title, twin in twins if twin}
        self._chinese = [title for title in self._twins if is_chinese(title) and len(title) > 1]

    def named(self, question: str) -> dict[str, str]:
        """What the question names, with the name in the other language."""
        titles = self._in_chinese(question.lower()) if is_chinese(question) else self._in_english(question.lower())
        return {title: self._twins[title] for title in titles}

    def other_names(self, question: str) -> str:
        """The names in the other language, one after the other; "" where the question names nothing that is known."""
        return " ".join(dict.fromkeys(self.named(question).values()))

    def _in_chinese(self, question: str) -> Iterator[str]:
        return (title for title in self._chinese if title in question)

    def _in_english(self, question: str) -> Iterator[str]:
        words = _WORD.findall(question)
        for length in range(LONGEST, 0, -1):
            for begin in range(len(words) - length + 1):
                name = " ".join(words[begin : begin + length])
                forms = (name, name.removesuffix("s"), name.removesuffix("'s"))
                yield from (form for form in dict.fromkeys(forms) if form in self._twins)
