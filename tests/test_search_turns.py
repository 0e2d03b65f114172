"""Search turns of the material: facts stand where they say, results are what the tools give, replies are true."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from moss.chat import META_INSTRUCTION, Dialog, Turn
from moss.data import search_turns
from moss.data.curriculum import LANGS, dialogs
from moss.data.family import Draft
from moss.data.search_turns import KINDS, book, cite, families, found_for, scene, uncited
from moss.engine import Sampling
from moss.tokenizer import Tokenizer, train
from moss.tools.calls import parse_commands
from moss.tools.places import bundled_pages
from moss.tools.run import Done, Options, answer
from moss.tools.search import offline_tools
from moss.tools.textrank import is_chinese
from moss.tools.words import sentences
from tests.fakes import ScriptedEngine

ON = {"thoughts": True, "search": True, "calculator": True}


@pytest.fixture(scope="module")
def drafts() -> list[Draft]:
    """Search turns of both languages."""
    return [
        draft for number in range(300) for draft in scene(random.Random(number), LANGS[number % 2], ON, kind="search")
    ]


@pytest.mark.parametrize("lang", LANGS)
def test_every_fact_stands_in_one_sentence_of_its_page(lang: str) -> None:
    """Prevents an answer that is taught and is nowhere to be read."""
    every = [entry for entry in bundled_pages() if is_chinese(entry.text) == (lang == "zh")]
    pages = {entry.title.lower(): entry.text for entry in every}
    for relation in book(lang).entries["relation"].values():
        assert len(relation.ask) >= 16
        for fact in relation.rows:
            title = re.sub(r"^(the|a|an) ", "", fact.name.lower())
            text = pages.get(title) or pages[fact.name.lower()]
            assert any(fact.answer in sentence for sentence in sentences(text)), (relation.name, fact)


@pytest.mark.parametrize("lang", LANGS)
def test_phrasings_are_different(lang: str) -> None:
    """Prevents families that are one, of which a half would be held out and the other trained on."""
    asked = [ask for entries in book(lang).entries.values() for entry in entries.values() for ask in entry.ask]
    assert len(asked) == len(set(asked)) > 900
    names = families(lang)
    assert len(names) == len(set(names)) and all(name.startswith("search.") for name in names)


def test_replies_are_what_the_pages_say(drafts: list[Draft]) -> None:
    """Prevents a reply that says more than the source it cites, and a citation of another one."""
    kinds = {draft.family.split(".")[1] for draft in drafts}
    assert kinds == {"relation", "compare", "unknown", "next"}
    for draft in drafts:
        last = draft.turn.rounds[0].results
        for number in re.findall(r"<sup><\|(\d+)\|></sup>", draft.turn.reply):
            (line,) = re.findall(rf"<\|{number}\|>: (.*)", last)
            if draft.family.split(".")[1] in ("relation", "next"):
                said = uncited(draft.turn.reply)
                assert any(said.endswith(sentence) for sentence in sentences(line[1:-1])), (said, line)
        assert all(text in draft.turn.reply for text in draft.answer)
        assert (cite(1)[:5] in draft.turn.reply) == (draft.family.split(".")[1] != "unknown")


def test_queries_are_what_was_typed(drafts: list[Draft]) -> None:
    """Prevents a query that the question does not tell: the model cannot know what the person would have written."""
    entries = [each for lang in LANGS for each in book(lang).entries["relation"].values()]
    forms = [re.compile(re.escape(each.query).replace(r"\{k\}", "(.+)")) for each in entries if each.query]
    before = ""
    for draft in drafts:
        kind = draft.family.split(".")[1]
        queries = [call.args[0] for call in parse_commands(draft.turn.rounds[0].commands)]
        if kind == "compare":
            names = [found.group(1) for query in queries for form in forms if (found := form.fullmatch(query))]
            assert sum(name in draft.turn.human for name in names) >= len(queries) == 2
        else:
            assert queries == [f"{before} {draft.turn.human}" if kind == "next" else draft.turn.human]
        before = draft.turn.human


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    texts = [line for item in islice(dialogs(2), 60) for turn in item.dialog.turns for line in (turn.human, turn.reply)]
    return train(texts, 1200)


def test_the_loop_gives_the_same_turns(drafts: list[Draft], tok: Tokenizer) -> None:
    """Prevents material that differs from what a model meets: a model that writes the teacher's words gets from the
    real loop and the real tools the same results, cut to other lengths, with the same numbers."""
    for draft in [each for each in drafts if len(each.turn.rounds) == 2][:3] + drafts[:5]:
        passes = []
        for number, step in enumerate(draft.turn.rounds):
            begin = tok.marker("<|Inner Thoughts|>") + tok.encode(":") if number else []
            ids = [*begin, *tok.encode(" " + step.thoughts), *tok.marker("<eot>"), *tok.encode("\n")]
            ids += [*tok.marker("<|Commands|>"), *tok.encode(": " + step.commands), *tok.marker("<eoc>")]
            passes.append(ids)
        reply = [*tok.encode(": " + draft.turn.reply), *tok.marker("<eom>")]
        passes.append([*tok.marker("<|MOSS|>"), *reply])
        engine = ScriptedEngine(passes, max_length=4000)
        asked = Dialog(META_INSTRUCTION, ON, [Turn(draft.turn.human)])
        done = list(answer(asked, engine, tok, offline_tools(), Options(Sampling(temperature=0), grammar=False)))[-1]
        assert isinstance(done, Done)
        for got, taught in zip(done.turn.rounds, draft.turn.rounds, strict=True):
            assert got.commands == taught.commands
            heads = [line for line in taught.results.split("\n") if " =>" in line]
            assert [line for line in got.results.split("\n") if " =>" in line] == heads
        assert "<|1|>: " in done.turn.rounds[0].results


def test_less_room_means_fewer_or_shorter_sources() -> None:
    """Prevents training on results that no small model will ever read."""
    whole, little = found_for("height of Mount Fuji", 1200), found_for("height of Mount Fuji", 200)
    assert len(whole) == 3 and len(little) == 1
    assert len(little[0].text) <= 200 and "3,776" in little[0].text


def test_off_means_no_call() -> None:
    """Prevents teaching a search where search is off, and a scene that does not fit its switches."""
    for number in range(40):
        (draft,) = scene(random.Random(number), LANGS[number % 2], ON | {"search": False}, kind="search_off")
        assert draft.turn.rounds[0].commands == "None" and "/tools search on" in draft.turn.reply
    for kind in KINDS:
        with pytest.raises(ValueError, match="does not go with"):
            scene(random.Random(0), "en", ON | {"search": kind != "search"}, kind=kind)
    assert search_turns.KINDS == ("search", "search_off")
