"""Replies of known quality: questions that ask for five things, and a judge that counts how many are right.

What    `prompts(seed)` draws conversations, each with six replies: k of five things right gives the level 20 k, from 0
        to 100, and all 15 pairs of them. `truth(history, reply)` counts the right ones in any text, a model's included.
Why     Preference models, PAT, DPO and PPO are to be judged by a measure that they have not learnt: here a program.
        Quality cannot be read off the length (a prompt's replies are within a tenth of one another in characters) nor
        off single words (each is right as often as wrong): a reply must be read together with its question.
How     moss data curriculum --kind preferences --n 3000 --seed 1 -o pairs.jsonl
        moss data curriculum --kind replies --n 3000 -o replies.jsonl     # the same replies as plain conversations

Four kinds, in English and Chinese, the words and phrasings in `material/preferences.*.toml`:
- `list`: five things of a kind; the wrong ones are of other kinds;
- `facts`: what belongs to each of five keys, said with the key; the wrong ones belong to other keys;
- `numbers`: five even ones, or odd, small, large ones; the wrong ones are the opposite;
- `order`: five digits by size; the wrong ones have changed places, or are others.
The held-out split has phrasings (`unseen`) and values (`family.reserved`) that training never sees. Item i follows from
(seed, i) alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from random import Random
from typing import Any, Literal

from moss.chat import META_INSTRUCTION, QUALITIES, Dialog, Turn
from moss.data.family import reserved
from moss.data.pairs import Preference, Reply, answered
from moss.data.talk import LANGS, material, sentence

SLOTS = 5  # things that a question asks for
KINDS = {"list": 3, "facts": 3, "numbers": 2, "order": 1}  # and how often each is asked
LEVELS = QUALITIES
LONGER = 1.1  # the longest reply of a prompt has at most so many times the characters of the shortest
SECOND_TURN = 0.15  # of the conversations have an earlier question, answered right; not before facts, which are long
SWAPPED = 0.5  # of the wrong facts and numbers are right ones of another place
REPEATED = 0.1  # of the wrong words and numbers, where any order is right, are ones said again
DIGITS = range(1, 10)  # to put in order
NUMBERS = range(1, 100)  # of which some are asked for
SORTS: dict[str, Callable[[int], bool]] = {  # each number is of as many sorts as not, but for 50
    "even": lambda n: n % 2 == 0,
    "odd": lambda n: n % 2 == 1,
    "small": lambda n: n < 50,
    "large": lambda n: n > 50,
}
TRIES = 200  # draws of a reply of fitting length before the prompt is drawn anew

Split = Literal["known", "held_out"]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


@dataclass(frozen=True)
class Task:
    """A question with its right values, and what may stand wrongly in each place."""

    kind: str
    family: str
    question: str
    right: tuple[str, ...]
    wrong: tuple[tuple[str, ...], ...]
    answer: dict[str, Any]  # what `truth` needs to know
    keys: tuple[str, ...] = ()
    category: str = ""


def prompts(seed: int, split: Split = "known", *, start: int = 0) -> Iterator[Preference]:
    """Prompts with six replies each, without end; item i depends on (seed, split, i) only."""
    for i in count(start):
        yield prompt(Random(f"preferences:{seed}:{split}:{i}"), split)


def prompt(rng: Random, split: Split = "known", kind: str | None = None) -> Preference:
    """One conversation with a reply of each level, in random order, and every pair of them."""
    while True:
        lang = rng.choice(LANGS)
        now = draw(rng, lang, split, kind)
        turns = [Turn(now.question)]
        if now.kind != "facts" and rng.random() < SECOND_TURN:
            before = draw(rng, lang, "known", "list")
            turns.insert(0, Turn(before.question, reply=say(rng, before, lang, SLOTS)))
        replies = _replies(rng, now, lang)
        if replies:
            break
    extra = {"kind": now.kind, "family": now.family, "lang": lang, "split": split, "answer": now.answer}
    order = sorted(range(len(replies)), key=lambda at: -(replies[at].level or 0))
    return Preference(Dialog(META_INSTRUCTION, {}, turns, extra), replies, list(combinations(order, 2)))


def conversations(seed: int, split: Split = "known") -> Iterator[Dialog]:
    """The replies of `prompts` as whole conversations, six of each prompt, without end; the level stands in `extra`."""
    for preference in prompts(seed, split):
        for reply in preference.replies:
            dialog = answered(preference.history, reply.text)
            dialog.extra = dialog.extra | {"level": reply.level}
            yield dialog


def draw(rng: Random, lang: str, split: Split = "known", kind: str | None = None) -> Task:
    """One question of a kind, or of one drawn by `KINDS`; values that are kept from training go to `held_out` alone."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    while True:
        task = {"list": _list, "facts": _facts, "numbers": _numbers, "order": _order}[kind](rng, lang, split)
        if reserved(f"{lang} {task.category} {' '.join(sorted(task.keys or task.right))}") == (split == "held_out"):
            return task


def _asked(rng: Random, lang: str, split: Split, *where: str) -> tuple[str, str]:
    """(family, phrasing) of a table of the material."""
    table = material(f"preferences.{lang}")
    for name in where:
        table = table[name]
    group = "ask" if split == "known" else "unseen"
    number = rng.randrange(len(table[group]))
    return ".".join(("preferences", lang, *where, group, str(number + 1))), table[group][number]


def _joined(keys: Sequence[str], lang: str) -> str:
    comma, last = (", ", " and ") if lang == "en" else ("、", "和")
    return comma.join(keys[:-1]) + last + keys[-1]


def _list(rng: Random, lang: str, split: Split) -> Task:
    words = material(f"preferences.{lang}")["list"]["words"]
    category = rng.choice(list(words))
    family, ask = _asked(rng, lang, split, "list")
    others = tuple(word for name, members in words.items() if name != category for word in members)
    right = tuple(rng.sample(words[category], SLOTS))
    answer = {"one_of": list(words[category])}
    return Task("list", family, ask.format(cat=category), right, (others,) * SLOTS, answer, category=category)


def _facts(rng: Random, lang: str, split: Split) -> Task:
    tables = material(f"preferences.{lang}")["facts"]
    relation = rng.choice([name for name, table in tables.items() if isinstance(table, dict)])
    family, ask = _asked(rng, lang, split, "facts", relation)
    pairs = tables[relation]["pairs"]
    keys, right = zip(*rng.sample(pairs, SLOTS), strict=True)
    wrong = tuple(tuple(value for _, value in pairs if value != own) for own in right)
    answer = {"keys": list(keys), "values": list(right)}
    return Task("facts", family, ask.format(keys=_joined(keys, lang)), right, wrong, answer, keys, relation)


def _order(rng: Random, lang: str, split: Split) -> Task:
    way = rng.choice(("up", "down"))
    family, ask = _asked(rng, lang, split, "order", way)
    given = rng.sample(DIGITS, SLOTS)
    right = tuple(map(str, sorted(given, reverse=way == "down")))
    wrong = tuple(tuple(str(number) for number in DIGITS if str(number) != own) for own in right)
    keys = tuple(map(str, given))
    return Task("order", family, ask.format(keys=_joined(keys, lang)), right, wrong, {"values": list(right)}, keys, way)


def _numbers(rng: Random, lang: str, split: Split) -> Task:
    sort = rng.choice(list(SORTS))
    family, ask = _asked(rng, lang, split, "numbers", sort)
    fine, others = (tuple(str(n) for n in NUMBERS if SORTS[sort](n) == wanted) for wanted in (True, False))
    right = tuple(rng.sample(fine, SLOTS))
    return Task("numbers", family, ask, right, (others,) * SLOTS, {"one_of": list(fine)}, category=sort)


def _replies(rng: Random, task: Task, lang: str) -> list[Reply]:
    """A reply of each level, alike in length, in random order; none where the first to be drawn are too unlike."""
    levels = list(range(SLOTS + 1))
    rng.shuffle(levels)  # the one drawn first sets the length, so it must be of any level
    texts: list[str] = []
    for level in levels:
        least, most = (max(map(len, texts)) / LONGER, min(map(len, texts)) * LONGER) if texts else (0, 10**9)
        drawn = (say(rng, task, lang, level) for _ in range(TRIES))
        text = next((text for text in drawn if least <= len(text) <= most and text not in texts), None)
        if text is None:
            return []
        texts.append(text)
    replies = [Reply(text, "scripted", LEVELS[level]) for text, level in zip(texts, levels, strict=True)]
    rng.shuffle(replies)
    return replies


def say(rng: Random, task: Task, lang: str, level: int) -> str:
    """A reply with `level` of the five things right, in a form that has nothing to do with the level."""
    values = _values(rng, task, level)
    table = material(f"preferences.{lang}")
    lead = rng.choice(table[task.kind]["lead"]).format(cat=task.category)
    comma, last = rng.choice(table["joins"])
    if task.kind == "facts":
        tie = rng.choice(table["facts"]["ties"])
        values = [tie.format(k=key, v=value) for key, value in zip(task.keys, values, strict=True)]
    body = comma.join(values[:-1]) + last + values[-1]
    lead = lead.rstrip() + "\n" if lead and "\n" in comma else lead
    return sentence(lead + body, lang) + ("" if "\n" in comma else rng.choice(table["ends"]))


def _values(rng: Random, task: Task, level: int) -> list[str]:
    """Five values, `level` of them right, none twice but for things said again where any order is right."""
    right = list(task.right)
    if not task.keys:
        rng.shuffle(right)
    fine = set(rng.sample(range(SLOTS), level))
    while True:
        values = [right[place] if place in fine else "" for place in range(SLOTS)]
        for place in rng.sample(range(SLOTS), SLOTS):
            if not values[place]:
                values[place] = _wrong(rng, task, values, place)
        if all(values):
            return values


def _wrong(rng: Random, task: Task, values: Sequence[str], place: int) -> str:
    """A wrong value for this place, or "" where none is left."""
    said = [value for value in values if value]
    if not task.keys:
        again = said and rng.random() < REPEATED
        return rng.choice(said if again else [value for value in task.wrong[place] if value not in said])
    swapped = [value for value in task.right if value not in said and value != task.right[place]]
    others = [value for value in task.wrong[place] if value not in said]
    if swapped and rng.random() < SWAPPED:
        return rng.choice(swapped)
    return rng.choice(others) if others else ""


# ---------------------------------------------------------------------------------------------------------------------
# Judging

_BETWEEN = re.compile(r"[,、;\n。.!?<>→]|->|\band\b|和|以及")
_NUMBERED = re.compile(r"\s*(\d+)[.)、]\s*(\S.*)")
_ARTICLE = re.compile(r"(?:a|an|the) ")
_TIE = r"\s*(?:[:=\-–—]|是|is\b)\s*"  # between a key and its value
_EDGES = " \t\r\"'“”‘’()[]*-•·:="


def truth(history: Dialog, reply: str) -> int:
    """How many of the five things that the last question asks for are right in this reply, 0 to 5.

    A thing counts once and in its place; what is repeated, missing or of no use counts as wrong, and each thing beyond
    the fifth takes one off, so that saying more never helps. An introduction that ends in a colon is no thing.
    ValueError where the conversation does not carry the `answer` that the material writes into it.
    """
    answer = history.extra.get("answer")
    if not isinstance(answer, dict) or not ({"one_of", "values"} & answer.keys()):
        raise ValueError("this conversation carries no `answer` to judge by; only those of --kind preferences do")
    keys = [_plain(key) for key in answer.get("keys", ())]
    said = _slots(reply, keys, numbers="one_of" not in answer and not keys)
    first = said[:SLOTS]
    if "one_of" in answer:
        right = len({member for at, text in enumerate(first) if (member := _member(answer["one_of"], text, at == 0))})
    else:
        right = len(_in_place(first, keys, [_plain(value) for value in answer["values"]]))
    return max(0, right - max(0, len(said) - SLOTS))


def compare(history: Dialog, a: str, b: str) -> int:
    """1 where reply `a` is the better one, -1 where `b` is, 0 for a tie."""
    one, other = truth(history, a), truth(history, b)
    return (one > other) - (one < other)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def _slots(reply: str, keys: Sequence[str], numbers: bool) -> list[str]:
    """The things that a reply names, without its introduction, numbering and quotation marks."""
    lines = _plain(reply).split("\n")
    found = [_NUMBERED.fullmatch(line) for line in lines]
    order = [int(match[1]) for match in found if match]
    if len(order) > 1 and order == list(range(1, len(order) + 1)) and all(found[1:]):
        lines = [match[2] if match else line for match, line in zip(found, lines, strict=True)]
    parts = _BETWEEN.split("\n".join(lines))
    head, colon, rest = parts[0].partition(":")
    if colon and not any(head.strip(_EDGES) == key for key in keys):
        parts[0] = rest
    if numbers and len(parts) == 1:
        parts = parts[0].split()
    return [part for part in (part.strip(_EDGES) for part in parts) if part]


def _is(text: str, value: str, first: bool) -> bool:
    """Whether this is the value; words may stand before the first one of a reply ("I would say apples")."""
    text, value = _ARTICLE.sub("", text), _ARTICLE.sub("", value)
    if text == value:
        return True
    before = text.removesuffix(value)
    return first and before != text and (before.endswith(" ") or not value.isascii())


def _member(members: Sequence[str], text: str, first: bool) -> str | None:
    """The member that this is; of two the longer one, since the Chinese for lemonade ends in the one for water."""
    return max((member for member in members if _is(text, _plain(member), first)), key=len, default=None)


def _in_place(said: Sequence[str], keys: Sequence[str], values: Sequence[str]) -> set[int]:
    """The places that are right: a thing belongs to the key that it names, or else to the place where it stands."""
    right, taken = set(), set()
    for at, text in enumerate(said):
        named = ((key, match[1]) for key in keys if (match := re.fullmatch(rf"{re.escape(key)}{_TIE}(.+)", text)))
        key, value = next(named, ("", text))
        place = keys.index(key) if key else at
        if place not in taken and _is(value, values[place], at == 0):
            right.add(place)
        taken.add(place)
    return right
