"""What every writer of the scripted material shares: drafts of turns, and which of them are never trained on.

A *family* is one way people say a thing (a phrasing with slots); its values are drawn anew each time. Two
groups never reach training: whole families (`held_out`), and single questions of the other families
(`reserved`), so that evaluation can ask known families with new values. Both follow from hashes alone; a
family's name ends in its place in its list, so that new phrasings go to the end of a list.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from moss.chat import Dialog, Turn
from moss.data.casual import plain

HELD_OUT_SHARE = 0.10  # of the families
RESERVED_SHARE = 0.05  # of the questions in the families that are trained on


@dataclass(frozen=True)
class Draft:
    """One turn with what is known about it: `answer` lists strings of which the reply must hold every one."""

    turn: Turn
    kind: str
    family: str
    answer: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """A whole conversation of drafts; evaluation asks its last turn."""

    dialog: Dialog
    drafts: tuple[Draft, ...]
    lang: str


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def held_out(family: str) -> bool:
    """Whether this family is never trained on."""
    return _share("family:" + family) < HELD_OUT_SHARE


def reserved(question: str) -> bool:
    """Whether this question, however it is typed, is kept for evaluation although its family is trained on."""
    return _share("question:" + plain(question)) < RESERVED_SHARE
