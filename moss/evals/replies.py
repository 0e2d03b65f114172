"""What a reply holds: an answer whole, its last number, a refusal."""

from __future__ import annotations

import re

from moss.data.talk import REFUSAL_MARKS


def spaced(text: str) -> str:
    """The text with every run of whitespace as one blank."""
    return " ".join(text.split())


def holds(reply: str, answer: str) -> bool:
    """Whether the reply holds the answer, numbers and names whole: 63 is not in 163, 63.5, -63, 63/2, 1/63 or 63e+20,
    x = 3 not in 2x = 3 or x = 3y."""
    reply, answer = plain_digits(reply), plain_digits(answer)
    left = r"(?<![\d.])(?<!\d/)(?<![^\d]-)(?<!^-)" if answer[:1].isdigit() else r"(?<!\d)" if answer[:1] == "-" else ""
    left += r"(?<![A-Za-z\d_])" if answer[:1].isascii() and answer[:1].isalpha() else ""
    right = r"(?!\d|\.\d|/\d|e[+-]?\d)" if answer[-1:].isdigit() else ""
    right += r"(?![a-z](?![A-Za-z]))" if right and "=" in answer else ""
    return re.search(left + re.escape(answer) + right, reply) is not None


def last_number(reply: str) -> float | None:
    """The last number in the reply."""
    found = re.findall(r"(?<![\d.)])-?\d+(?:\.\d+)?", plain_digits(reply))  # 10-5 is no -5
    return float(found[-1]) if found else None


def plain_digits(text: str) -> str:
    """Numbers without thousands separators, with an ASCII minus sign."""
    return re.sub(r"(?<=\d),(?=\d{3})", "", text.replace("−", "-"))


def refuses(reply: str) -> bool:
    """Whether the reply is one of the scripted refusals, in either language."""
    return any(mark in reply for marks in REFUSAL_MARKS.values() for mark in marks)
