"""The scripted teacher's conversations: tool turns and talk put together, for training and for evaluation.

Every number in a reply is computed, and every turn carries its kind, its phrasing family and the strings that its
reply must hold. Training never sees held-out families nor reserved questions (`family.py`); evaluation draws exactly
those. Item i follows from (seed, i) alone.

    moss data curriculum --kind dialogs --n 1000 --seed 1 -o dialogs.jsonl
    moss data curriculum --kind questions --n 500 --lang zh --split held_out -o questions.jsonl
    moss data curriculum --kind preferences --n 2000 -o pairs.jsonl         # replies of stated quality (preferences.py)
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from moss.chat import META_INSTRUCTION, SWITCHES, Dialog
from moss.config import option
from moss.data import pairs, preferences, search_turns, talk, tool_turns
from moss.data.dialogs import to_moss
from moss.data.family import Draft, Item, held_out, reserved
from moss.data.search_turns import uncited
from moss.data.text import documents
from moss.errors import UsageError
from moss.files import replacing
from moss.tools.places import bundled_pages

LANGS = ("en", "zh")
KEYS = ("thoughts", *SWITCHES)
SHARES = {"calculator": 0.35, "solver": 0.19, "search": 0.13, "talk": 0.26, "numbers": 0.07}  # of the scenes
SCENES = {1: 0.1, 2: 0.1, 4: 0.2, 6: 0.3, 8: 0.3}  # joined in a conversation; long ones save on what prompts open with
MAX_TURNS = 8
CHANGE_LANGUAGE = 0.08  # of the scenes after the first
BOTH_ON = 0.55  # of the conversations have calculator and solver on
SEARCH_ON = 0.65
PATIENCE = 500  # draws without a new question before `questions` gives up
TOOL_KINDS = ("calculator", "solver", "search", "calculator_off", "solver_off", "search_off")
KINDS = (*TOOL_KINDS, *talk.KINDS)
Split = Literal["known", "held_out"]
Accept = Callable[[str, str], bool]


def trained(family: str, question: str) -> bool:
    """Whether training may see this question."""
    return not held_out(family) and not reserved(question)


def switches(rng: random.Random, **fixed: bool) -> dict[str, bool]:
    """Random switches; calculator and solver are on together more often than not."""
    on = {key: rng.random() < 0.4 for key in KEYS}
    on["thoughts"] = rng.random() < 0.97
    on["search"] = rng.random() < SEARCH_ON
    if rng.random() < BOTH_ON:
        on["calculator"] = on["solver"] = True
    else:
        on["calculator"], on["solver"] = rng.choices([(True, False), (False, True), (False, False)], [2, 2, 1])[0]
    return on | fixed


def _scene(rng: random.Random, lang: str, on: dict[str, bool], kind: str | None, accept: Accept) -> list[Draft]:
    """A scene of a kind, or of one drawn by `SHARES`; a tool that is switched off is asked for in vain."""
    if kind in search_turns.KINDS:
        return search_turns.scene(rng, lang, on, kind=kind, accept=accept)
    if kind in TOOL_KINDS:
        return tool_turns.scene(rng, lang, on, kind=kind, accept=accept)
    if kind is not None:
        numbers = kind == "chat" and rng.random() < 0.4
        return (tool_turns if numbers else talk).scene(rng, lang, on, kind=kind, accept=accept)
    group = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if group == "talk":
        return talk.scene(rng, lang, on, accept=accept)
    if group == "numbers":
        return tool_turns.scene(rng, lang, on, kind="chat", accept=accept)
    kind = group if on[group] else f"{group}_off"
    return (search_turns if group == "search" else tool_turns).scene(rng, lang, on, kind=kind, accept=accept)


def conversation(rng: random.Random, *, scenes: int | None = None, accept: Accept = trained) -> Item:
    """One conversation of 1 to `MAX_TURNS` turns."""
    lang = rng.choice(LANGS)
    first, on = lang, switches(rng)
    scenes = scenes or rng.choices(list(SCENES), list(SCENES.values()))[0]
    drafts: list[Draft] = []
    for index in range(scenes):
        if index and rng.random() < CHANGE_LANGUAGE:
            lang = "zh" if lang == "en" else "en"
        drafts += _scene(rng, lang, on, None, accept)
        if len(drafts) >= MAX_TURNS:
            break
    return _item(drafts[:MAX_TURNS], on, first)


def _item(drafts: list[Draft], on: dict[str, bool], lang: str) -> Item:
    return Item(Dialog(META_INSTRUCTION, on, [draft.turn for draft in drafts]), tuple(drafts), lang)


def dialogs(seed: int, *, start: int = 0) -> Iterator[Item]:
    """Conversations for training, without end; item i depends on (seed, i) only."""
    for i in count(start):
        yield conversation(random.Random(f"{seed}:{i}"))


def questions(kind: str, lang: str, split: Split = "known", n: int = 500, seed: int = 0) -> list[Item]:
    """Evaluation conversations whose last turn is of `kind` and was kept from training.

    `known`: reserved questions of trained families; `held_out`: families that training never sees. About a third
    have earlier turns, of trained families. No question comes twice.
    """
    found = draw_questions(kind, lang, split, n, seed)
    if len(found) < n:
        raise ValueError(f"only {len(found)} {split} questions of {kind!r} in {lang!r}; ask for fewer than {n}")
    return found


def draw_questions(kind: str, lang: str, split: Split, n: int, seed: int) -> list[Item]:
    """As `questions`, but as many as there are where `n` do not exist."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    found: dict[str, Item] = {}  # by question
    last = -1  # draw that brought something new
    for i in count():
        item = _question(random.Random(f"{seed}:{kind}:{lang}:{split}:{i}"), kind, lang, split)
        if item is not None and found.setdefault(item.drafts[-1].turn.human, item) is item:
            last = i
        if len(found) >= n or i - last > PATIENCE:
            return list(found.values())[:n]
    raise AssertionError("count() never ends")


def _question(rng: random.Random, kind: str, lang: str, split: Split) -> Item | None:
    """One evaluation conversation, or None when the draw did not end in a kept question."""

    def wanted(family: str, question: str) -> bool:
        return held_out(family) if split == "held_out" else not held_out(family) and reserved(question)

    def allowed(family: str, question: str) -> bool:
        return trained(family, question) or wanted(family, question)

    fixed = {kind.removesuffix("_off"): not kind.endswith("_off")} if kind in TOOL_KINDS else {}
    on = switches(rng, thoughts=True, **fixed)
    alone = kind in TOOL_KINDS and rng.random() < 0.6  # at once a kept question, without what came before
    for _ in range(60):
        drafts = _scene(rng, lang, on, kind, wanted if alone else allowed)
        while drafts and not wanted(drafts[-1].family, drafts[-1].turn.human):
            drafts.pop()
        if drafts and drafts[-1].kind == kind and all(trained(d.family, d.turn.human) for d in drafts[:-1]):
            break
    else:
        return None
    if len(drafts) == 1 and rng.random() < 0.25:
        drafts = _scene(rng, lang, on, None, trained)[:2] + drafts
    return _item(drafts, on, lang)


def text(seed: int) -> Iterator[str]:
    """Plain documents for pre-training, without end: of eight, two are conversations as prose, one is a page of the
    encyclopaedia, and five are of `text.documents`."""
    plain, pages = documents(seed), bundled_pages()
    for i in count():
        if i % 8 == 1:
            yield random.Random(f"{seed}:page:{i}").choice(pages).text + "\n"
        elif i % 4 < 3:
            yield next(plain)
        else:
            turns = conversation(random.Random(f"{seed}:text:{i}")).dialog.turns
            yield "\n".join(line for turn in turns for line in (turn.human, uncited(turn.reply))) + "\n"


def to_json(item: Item) -> dict[str, Any]:
    """A row of released MOSS JSON, with what is known about its last turn."""
    last = item.drafts[-1]
    known = {"kind": last.kind, "family": last.family, "lang": item.lang, "answer": list(last.answer)}
    return to_moss(item.dialog) | known


@dataclass(frozen=True)
class Curriculum:
    """Write the scripted teacher's material as JSON lines: conversations, plain text, questions or preferences."""

    kind: Literal["dialogs", "text", "questions", "preferences", "replies"] = (
        "dialogs"  # what to write; preferences = prompts with six replies and their pairs, replies = each as a dialog
    )
    n: int = 1000  # how many rows; of questions, per kind of conversation
    seed: int = 0  # the same seed gives the same rows
    output: Path | None = option(None, short="-o")  # file to write; standard output without it
    lang: Literal["en", "zh", "both"] = "both"  # language of questions
    split: Split = "known"  # held_out: phrasings never trained on; known: of questions new values, of the rest training


def rows(config: Curriculum) -> Iterator[dict[str, Any]]:
    """The JSON rows that a `Curriculum` asks for."""
    if config.kind == "dialogs":
        yield from map(to_json, islice(dialogs(config.seed), config.n))
    elif config.kind == "text":
        yield from ({"text": document} for document in islice(text(config.seed), config.n))
    elif config.kind == "preferences":
        found = islice(preferences.prompts(config.seed, config.split), config.n)
        yield from (pairs.to_json(preference, "scripted") for preference in found)
    elif config.kind == "replies":
        yield from map(to_moss, islice(preferences.conversations(config.seed, config.split), config.n))
    else:
        for lang in LANGS if config.lang == "both" else (config.lang,):
            for kind in TOOL_KINDS:
                yield from map(to_json, questions(kind, lang, config.split, config.n, config.seed))


def main(config: Curriculum) -> int:
    """Entry of `moss data curriculum`."""
    if config.n < 1:
        raise UsageError(f"--n is {config.n}; it must be 1 or more")
    if config.output is None:
        sys.stdout.writelines(_lines(config))
    else:
        write(config)
    return 0


def write(config: Curriculum) -> None:
    """The rows into the file `config.output`, all of them or none."""
    assert config.output is not None
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(config.output) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(_lines(config))


def _lines(config: Curriculum) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(config))
