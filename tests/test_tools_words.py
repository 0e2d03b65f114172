"""Sentences and terms, in English and Chinese: what a search compares, worked out by hand."""

from __future__ import annotations

import random
import threading
import time

import pytest

from moss.tools.words import MAX_TEXT, MAX_WORD, PASSAGE, held, passages, sentences, terms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Moss grows slowly. It needs shade.", ["Moss grows slowly.", "It needs shade."]),
        ("Does it grow? Yes! It does.", ["Does it grow?", "Yes!", "It does."]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("It is 3.5 metres high, e.g. a tree.", ["It is 3.5 metres high, e.g. a tree."]),
        ("Dr. Who met Mr. Smith. They spoke.", ["Dr. Who met Mr. Smith.", "They spoke."]),
        ("J. S. Bach was born in 1685. He died in 1750.", ["J. S. Bach was born in 1685.", "He died in 1750."]),
        ("It costs 5 dollars. 10 people came.", ["It costs 5 dollars.", "10 people came."]),
        ("Wait... What? Really?!", ["Wait...", "What?", "Really?!"]),
        ("Il est né. Émile aussi. Да. Нет.", ["Il est né.", "Émile aussi.", "Да.", "Нет."]),
        ("苔藓长得慢。它喜欢阴凉！真的吗？是的", ["苔藓长得慢。", "它喜欢阴凉！", "真的吗？", "是的"]),
        ("他说：“不。”然后走了。", ["他说：“不。”", "然后走了。"]),
        ("真的吗……不知道。", ["真的吗……", "不知道。"]),
        ("苔藓。Moss is small. 它很小。", ["苔藓。", "Moss is small.", "它很小。"]),
        ("Home\nLogin\n\nMoss is\na plant.", ["Home", "Login", "Moss is", "a plant."]),
        ("It contains vitamin C.\nIt is good.", ["It contains vitamin C.", "It is good."]),
        ("A  line\twith\u00a0much\u3000white.", ["A line with much white."]),
        ("no end", ["no end"]),
        ("Ends with Dr.", ["Ends with Dr."]),
        ("Dr.", ["Dr."]),
        ("", []),
        (" \n\n ", []),
        ("...", ["..."]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    """Prevents summaries of half sentences, and of two that are one: abbreviations, decimals, quotes, Chinese."""
    assert sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The mosses are growing", ["moss", "grow"]),
        ("studies studied studying", ["studi"] * 3),
        ("What is the height of Mount Everest?", ["height", "mount", "everest"]),
        ("Newton's law, Newton’s apple", ["newton", "law", "newton", "appl"]),
        ("3.14 and 1,000; snake_case", ["3.14", "1", "000", "snake", "case"]),
        ("CAFÉ Straße", ["café", "straße"]),
        ("ＡＢＣ１２３", ["abc123"]),
        ("苔藓生长", ["苔藓", "藓生", "生长"]),
        ("珠穆朗玛峰有多高？", ["珠穆", "穆朗", "朗玛", "玛峰", "高"]),
        ("水", ["水"]),
        ("什么是水", ["水"]),
        ("moss是苔藓", ["moss", "苔藓"]),
        ("1895年", ["1895", "年"]),
        ("the of and", []),
        ("你的", []),
        ("!?…", []),
        ("", []),
    ],
)
def test_terms(text: str, expected: list[str]) -> None:
    """Prevents a page that is not found because its word has another ending, case, width or neighbour."""
    assert terms(text) == expected


def test_a_question_of_small_words_alone() -> None:
    """Prevents "who is who" and "to be or not to be" from asking for nothing."""
    assert terms("To be or not to be") == []
    assert terms("To be or not to be", stop=False) == ["to", "be", "or", "not", "to", "be"]
    assert terms("是什么", stop=False) == ["是什", "什么"]


def test_where_it_ends() -> None:
    """Prevents a page of a million characters that is read whole, or a word of as many that is kept for good."""
    assert len(sentences("Word one. " * 100_000)) == MAX_TEXT // 10
    assert len(sentences("a" * 10 * MAX_TEXT)[0]) == MAX_TEXT
    assert terms("a" * 1000) == terms("a" * MAX_WORD)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Moss, studied in a CAFÉ since 1895.", {"moss", "studi", "café", "1895"}),
        ("苔藓生长了", {"苔藓", "藓生"}),
        ("金。苔  藓", {"金"}),
        ("金属", set()),  # a single character is a term where it stands alone
        ("ＭＯＳＳ", {"moss"}),
        ("mossy, moss's die", {"moss", "die"}),
        ("He was dying", {"die"}),
        ("", set()),
    ],
)
def test_which_of_some_terms_a_text_holds(text: str, expected: set[str]) -> None:
    """Prevents a quick look that sees other words in a page than the index has of it."""
    asked = {"moss", "studi", "café", "1895", "苔藓", "藓生", "生藓", "金", "die", "the"}
    assert held(asked, text) == expected == asked.intersection(terms(text, stop=False))


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("Moss is green. " * 1000, "."),
        ("苔藓是绿的。" * 1000, "。"),
        ("moss " * 3000, "s"),
        ("Dr. Moss met Mr. Green\n" * 500, "n"),
        ("They met Mr. Green. " * 500, "Green."),
    ],
)
def test_passages_end_where_something_ends(text: str, ends: str) -> None:
    """Prevents a long page whose end nobody reads, and an answer that is cut in two."""
    found = list(passages(text))
    assert all(PASSAGE // 2 <= len(each) <= PASSAGE and each.endswith(ends) for each in found[:-1])
    assert "".join("".join(found).split()) == "".join(text.split())


def test_passages_of_odd_texts() -> None:
    """Prevents a page that is lost because it is empty, or without a blank; and an empty passage among others."""
    assert list(passages("")) == [""] and list(passages("short")) == ["short"]
    assert list(map(len, passages("a" * (2 * PASSAGE + 5)))) == [PASSAGE, PASSAGE, 5]
    assert list(passages("a" + " " * 3 * PASSAGE + "b")) == ["a", "b"]


@pytest.mark.parametrize(
    "piece",
    ["a", "中", "A. ", "Dr. ", ". ", "...", "。”", ".”", "'", "a'", "a.b.", "Aa ", "\n", " ", "İ", "\ufdfa", "1.", "“"],
)
def test_hostile_text_takes_time_in_line_with_its_length(piece: str) -> None:
    """Prevents a page whose sentences take minutes: every "A." was once a sentence that grew by the next."""
    text = piece * (1_000_000 // len(piece))
    begun = time.monotonic()
    sentences(text)
    list(passages(text[:MAX_TEXT]))
    terms(text[: MAX_TEXT // 10])
    assert time.monotonic() - begun < 3.0


def test_terms_from_many_threads() -> None:
    """Prevents searches side by side from failing: the stemmer behind them is one for all."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=8)) + "ing" for _ in range(20_000)]
    failed: list[BaseException] = []

    def work(mine: list[str]) -> None:
        try:
            assert all(len(terms(word)) == 1 for word in mine)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(words[start::8],)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
