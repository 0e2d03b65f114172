"""Text as a search sees it: passages, sentences, and terms that compare across word forms, for English and Chinese.

    sentences("Moss grows slowly. It needs shade.")     # ['Moss grows slowly.', 'It needs shade.']
    terms("The mosses are growing")                     # ['moss', 'grow']
    terms("苔藓生长")                                     # ['苔藓', '藓生', '生长']: Chinese as overlapping pairs

English words are lowercased and cut to a stem; Chinese needs no dictionary that way, and a pair that is no word does
no harm, since it is rare. Words that stand in every question ("what", "是什么") are left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator
from functools import cache, lru_cache
from itertools import pairwise

from moss.errors import UsageError

try:
    from tantivy import Filter, TextAnalyzer, TextAnalyzerBuilder, Tokenizer
except ImportError:
    raise UsageError("search needs the package tantivy: pip install -e '.[search]'") from None

MAX_TEXT = 200_000  # characters of a page that are read
PASSAGE = 2000  # characters of a passage at most
MAX_WORD = 64  # characters of a word that count
MAX_TERMS = 64  # of a question

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_RUNS = re.compile(rf"[{_CJK}]+|[^\W_{_CJK}]+(?:['’.][^\W_{_CJK}]+)*")
_CHINESE = re.compile(f"[{_CJK}]")
_WHITE = re.compile(r"[ \t\r\f\v\u00a0\u3000]+")
_END = re.compile(
    r"(?<![。！？…])[。！？…]++[”’」』）]*+"  # Chinese sentences end without a blank
    r"|(?<![.!?])[.!?]++[\"'”’)]*+(?=\s[\"'“‘(]?[A-Z0-9À-ÖØ-ÞА-Я\u3400-\u9fff])"
    r"|\n"
)
_SHORT = re.compile(r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|No|vs|etc|e\.g|i\.e|approx|ca|Jr|Sr|Prof|Inc|Ltd)\.\Z")

_STOP = frozenset(
    """a about after all also am an and any are as at be because been before being between both but by can could did do
    does doing done during each for from further get had has have having he her here hers him his how i if in into is
    it its itself just kind let many may me might more most much must my name no nor not now of off on once one only or
    other our out over own please same she should so some such tell than that the their them then there these they
    this those through to too under until up upon us use used very was we were what when where which while who whom
    whose why will with would you your""".split()
)
# single characters that carry grammar or the question rather than its matter
_STOP_ZH = re.compile("[的了是在和与或吗呢吧啊么什哪谁怎这那有个就都也很被把从为以及其之于对你我他她它们请问几多少样]")


@cache
def _stemmer() -> TextAnalyzer:
    return TextAnalyzerBuilder(Tokenizer.raw()).filter(Filter.stemmer("english")).build()


@lru_cache(maxsize=1 << 14)
def _stem(word: str) -> str:
    """A word without the endings of its forms: `studies`, `studied` and `studying` are one."""
    return _stemmer().analyze(word)[0] if word.isascii() else word


def terms(text: str, *, stop: bool = True) -> list[str]:
    """The terms of a text in their order; without those of `stop` that every question has."""
    found: list[str] = []
    for run in _RUNS.findall(_plain(text)):
        if _CHINESE.match(run):
            found += _pairs(run, stop)
            continue
        word = _word(run)
        if not (stop and word in _STOP):
            found.append(_stem(word))
    return found


def question_terms(question: str) -> list[str]:
    """The terms that a question looks for, each once; where all of its words stand in every question, those."""
    return list(dict.fromkeys(terms(question) or terms(question, stop=False)))[:MAX_TERMS]


def held(asked: Collection[str], text: str) -> set[str]:
    """Those of `asked`, which are terms, that a text holds; quicker than to make all of its terms."""
    text, first = _plain(text), {term[0] for term in asked}
    runs = (run for run in set(_RUNS.findall(text)) if run[0] in first)  # a stem begins as its word does
    there = {run if _CHINESE.match(run) else _stem(_word(run)) for run in runs}
    return {term for term in asked if term in there or (len(term) == 2 and _CHINESE.match(term) and term in text)}


def _plain(text: str) -> str:
    """A text without capitals and wide letters."""
    return unicodedata.normalize("NFKC", text).lower()


def _word(run: str) -> str:
    return run[:MAX_WORD].replace("’", "'").removesuffix("'s")


def _pairs(run: str, stop: bool) -> list[str]:
    """Every two neighbours of a run of Chinese; a character that stands alone is its own term."""
    if stop:
        return [pair for part in _STOP_ZH.split(run) if part for pair in _pairs(part, False)]
    return [run] if len(run) == 1 else [run[i : i + 2] for i in range(len(run) - 1)]


def sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line; headings and menu entries are among them."""
    text = _WHITE.sub(" ", text[:MAX_TEXT])
    begins = [0, *_ends(text, 0, len(text)), len(text)]
    pieces = (text[begin:end].strip() for begin, end in pairwise(begins))
    return [piece for piece in pieces if piece]


def passages(text: str) -> Iterator[str]:
    """A text in pieces of at most `PASSAGE` characters. A piece ends with a paragraph, else with a sentence, else with
    a word, if one ends in its second half."""
    begin = 0
    while len(text) - begin > PASSAGE:
        half, end = begin + PASSAGE // 2, begin + PASSAGE
        line, word = (text.rfind(sign, half, end) + 1 for sign in "\n ")
        end = line or max(_ends(text, half, end), default=word) or end
        if piece := text[begin:end].strip():
            yield piece
        begin = end
    yield text[begin:].strip()


def _ends(text: str, begin: int, end: int) -> Iterator[int]:
    """Where sentences end between two places of a text."""
    for match in _END.finditer(text, begin, end):
        if not _SHORT.search(text, max(begin, match.end() - 12), match.end()):  # it goes on after "Dr."
            begin = match.end()
            yield begin
