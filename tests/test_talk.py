"""Tests of the conversations without tools: their material is complete, right, bilingual and tells refusals apart."""

from __future__ import annotations

import ast
import re
from collections import Counter
from random import Random

import pytest

from moss.data import talk
from moss.data.family import held_out
from moss.data.talk import KINDS, LANGS, REFUSAL_MARKS, families, scene

ON = {"thoughts": True, "calculator": True, "solver": True}
CJK = re.compile(r"[一-鿿]")


def drafts_of(kind: str, lang: str, n: int = 700, switches: dict[str, bool] | None = None):
    """All turns of n scenes."""
    return [draft for i in range(n) for draft in scene(Random(f"{lang}{i}"), lang, switches or ON, kind=kind)]


def refused(text: str, lang: str) -> bool:
    """Whether a reply holds a refusal mark."""
    return any(mark in text for mark in REFUSAL_MARKS[lang])


@pytest.mark.parametrize("lang", LANGS)
def test_there_are_enough_families_of_every_kind(lang):
    """Prevents material that shrinks until a held-out tenth leaves no siblings in training."""
    counts = {kind: len(names) for kind, names in families(lang).items()}
    least = {"fact": 150, "harmful": 40, "lookalike": 40, "identity": 30, "chat": 100}
    assert set(counts) == set(KINDS)
    assert all(counts[kind] >= least.get(kind, 15) for kind in KINDS), counts
    for kind in KINDS:
        names = families(lang)[kind]
        assert len(set(names)) == len(names)
        assert all(name.startswith((f"{kind}.{lang}.", f"frame.{lang}.")) for name in names)
        assert 0 < sum(map(held_out, names)) < len(names) / 3, kind


@pytest.mark.parametrize("lang", LANGS)
def test_no_two_families_are_the_same_phrasing(lang):
    """Prevents a held-out phrasing from being trained on under another name."""
    texts: dict[str, str] = {}
    for kind in KINDS:
        if kind in ("list", "switch_language"):
            pairs = [pair for group in talk._phrasings(kind, lang).values() for pair in group]
        else:
            parts = [part for topic in talk.topics(kind, lang) for part in (topic, *topic.follows)]
            pairs = [pair for part in parts for pair in part.sides[lang].ask]
        for family, text in pairs:
            if "{" not in text or kind != "fact":
                key = re.sub(r"\W", "", text.lower())
                assert texts.setdefault(key, family) == family, (family, texts[key], text)


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("kind", KINDS)
def test_refusals_and_only_refusals_hold_a_mark(kind, lang):
    """Prevents an evaluation that counts an answer as a refusal, or the other way round."""
    for draft in drafts_of(kind, lang):
        other = {"en": "zh", "zh": "en"}[lang]
        assert refused(draft.turn.reply, lang) == (draft.kind == "harmful"), draft
        assert not refused(draft.turn.reply, other), draft


def test_every_written_reply_is_checked_for_marks_not_only_drawn_ones():
    """Prevents a rare reply in the material that looks like a refusal, or a rare refusal without its mark."""
    for kind in set(KINDS) - {"list", "switch_language"}:
        for lang in LANGS:
            fill = talk.material("slots")[lang]["no"][0]
            for topic in talk.topics(kind, lang):
                for part in (topic, *topic.follows):
                    side = part.sides[lang]
                    own = [text for texts in (side.own or {}).values() for text in texts]
                    for text in (*side.reply, *side.otherwise, *own):
                        assert refused(text.replace("{no}", fill), lang) == (kind == "harmful"), (part.name, text)


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("kind", KINDS)
def test_turns_are_filled_and_call_no_tool(kind, lang):
    """Prevents open slots, empty texts, edge whitespace and calls in material that teaches not to call."""
    for draft in drafts_of(kind, lang):
        turn = draft.turn
        for text in (turn.human, turn.reply):
            assert text and text == text.strip() and not re.search(r"[{}]", text), draft
        assert [(one.commands, one.results) for one in turn.rounds] == [("None", "None")]
        assert turn.rounds[0].thoughts != "None" and "{" not in turn.rounds[0].thoughts
        assert len(turn.reply) <= 400


@pytest.mark.parametrize("lang", LANGS)
def test_thoughts_are_none_when_switched_off(lang):
    """Prevents thoughts that are learnt although the prompt says they are disabled."""
    assert {d.turn.rounds[0].thoughts for d in drafts_of("chat", lang, 50, {"thoughts": False})} == {"None"}


def test_replies_are_in_the_language_of_the_question():
    """Prevents a Chinese reply in English material; code and translations may mix."""
    for kind in set(KINDS) - {"switch_language", "code", "fact"}:
        assert not any(CJK.search(d.turn.human + d.turn.reply) for d in drafts_of(kind, "en", 300)), kind
        for draft in drafts_of(kind, "zh", 300):
            latin = re.search(r"Python|Java|Rust|Ruby|Swift|\b(C|Go)\b", draft.turn.reply)  # programming languages
            assert CJK.search(draft.turn.reply) or (kind == "list" and latin), draft
    for draft in drafts_of("fact", "zh", 500):
        assert CJK.search(draft.turn.reply), draft


def test_the_language_changes_when_asked():
    """Prevents a switch_language turn that stays in the first language."""
    for lang in LANGS:
        for i in range(400):
            last = scene(Random(i), lang, ON, kind="switch_language")[-1]
            assert last.kind == "switch_language"
            assert bool(CJK.search(last.turn.reply)) == (lang == "en"), last


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("kind", KINDS)
def test_known_answers_stand_in_the_reply(kind, lang):
    """Prevents an evaluation that wants strings which the teacher's own reply does not hold."""
    drafts = drafts_of(kind, lang)
    for draft in drafts:
        assert all(answer in draft.turn.reply for answer in draft.answer), draft
    if kind in ("fact", "identity"):
        assert all(draft.answer for draft in drafts)
    if kind == "identity":
        assert all(draft.answer == ("MOSS",) for draft in drafts)


@pytest.mark.parametrize("lang", LANGS)
def test_the_same_rng_gives_the_same_scene(lang):
    """Prevents scenes that depend on order, on sets or on a hidden random state."""
    first = [scene(Random(i), lang, ON) for i in range(200)]
    assert first == [scene(Random(i), lang, ON) for i in range(200)]
    assert len({str(drafts) for drafts in first}) > 190
    assert {draft.kind for drafts in first for draft in drafts} == set(KINDS)
    assert max(map(len, first)) == 3


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("kind", KINDS)
def test_accept_is_asked_for_every_turn(kind, lang):
    """Prevents held-out families from slipping into training through follow-up turns."""
    asked: set[tuple[str, str]] = set()

    def accept(family: str, question: str) -> bool:
        asked.add((family, question))
        return not held_out(family)

    known = {name for names in [*families("en").values(), *families("zh").values()] for name in names}
    for i in range(300):
        for draft in scene(Random(i), lang, ON, kind=kind, accept=accept):
            assert not held_out(draft.family)
            assert (draft.family, draft.turn.human) in asked and draft.family in known


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_held_out_last_turn_can_be_drawn(kind, lang):
    """Prevents an evaluation of unseen families that finds none."""
    accept = lambda family, question: held_out(family)  # noqa: E731
    assert held_out(scene(Random(1), lang, ON, kind=kind, accept=accept)[-1].family)


def test_bad_requests_are_named():
    """Prevents an endless search, and a typing error in a kind from passing silently."""
    with pytest.raises(ValueError, match="no fact turn in 'en' was accepted"):
        scene(Random(1), "en", ON, kind="fact", accept=lambda family, question: False)
    with pytest.raises(ValueError, match="'poem'"):
        scene(Random(1), "en", ON, kind="poem")
    with pytest.raises(ValueError, match="'de'"):
        scene(Random(1), "de", ON)


def test_facts_are_complete_and_consistent():
    """Prevents rows with a missing language and two different answers to one question."""
    relations = talk.material("facts")["relation"]
    assert sum(len(relation.get("rows", ())) for relation in relations) >= 250
    for relation in relations:
        assert len(relation["en"]["ask"]) >= 4 and len(relation["zh"]["ask"]) >= 4, relation["name"]
        for row in relation.get("rows", ()):
            assert len(row) == 4 and all(row), (relation["name"], row)
        for at in (0, 2):
            keys = Counter(row[at] for row in relation.get("rows", ()))
            assert max(keys.values(), default=1) == 1, (relation["name"], keys.most_common(1))


def test_some_facts_by_hand():
    """Prevents shifted columns and swapped keys: five facts as anybody knows them, both ways round."""
    rows = {
        relation["name"]: {tuple(row) for row in relation.get("rows", ())}
        for relation in talk.material("facts")["relation"]
    }
    assert ("Japan", "Tokyo", "日本", "东京") in rows["capital"]
    assert ("gold", "Au", "金", "Au") in rows["symbol"]
    assert ("carbon", "6", "碳", "6") in rows["atomic_number"]
    assert ("fourth", "Mars", "第四", "火星") in rows["planet"]
    assert ("April", "30 days", "四月", "30天") in rows["month_days"]
    days = dict(row[:2] for row in rows["next_day"])
    assert days["Sunday"] == "Monday" and len(days) == 7
    turned = Counter(row[1] for row in rows["capital"])
    assert max(turned.values()) == 1, "capital_of needs one country for each capital"


def test_lists_have_the_number_of_items_asked_for():
    """Prevents `three fruits: two of them`; the reply of a numbered list ends with the number in the question."""
    numbers = talk.material("list")["numbers"]["en"]
    checked = 0
    for draft in drafts_of("list", "en", 600):
        lines = re.findall(r"^(\d)\. ", draft.turn.reply, re.M)
        wanted = [i for i, word in enumerate(numbers, 1) if re.search(rf"\b({word}|{i})\b", draft.turn.human.lower())]
        if lines and len(wanted) == 1:
            assert lines == [str(i) for i in range(1, wanted[0] + 1)], draft
            checked += 1
    assert checked > 30


@pytest.mark.parametrize("lang", LANGS)
def test_code_is_valid_python_and_keeps_the_name(lang):
    """Prevents code replies that a person cannot run, and functions with another name than asked for."""
    programs = 0
    for draft in drafts_of("code", lang, 600):
        reply = draft.turn.reply
        if ".explain." in draft.family:
            continue
        ast.parse(reply)
        programs += 1
        for name in re.findall(r"def (\w+)\(", reply):
            asked = re.search(r"[a-z]+_[a-z_]+", draft.turn.human)
            assert asked is None or asked[0] == name, draft
    assert programs > 400


def test_identity_tells_whether_the_tool_is_on():
    """Prevents a model that claims a calculator which this conversation does not have."""
    for on, word in ((True, "it is switched on"), (False, "switched off")):
        switches = {**ON, "calculator": on}
        replies = {
            d.turn.reply
            for d in drafts_of("identity", "en", 900, switches)
            if d.family.startswith("identity.en.calculator.")
        }
        assert replies and all(word in reply for reply in replies)


@pytest.mark.parametrize("lang", LANGS)
def test_follow_ups_use_what_was_said(lang):
    """Prevents a recall turn that forgets the name, number or city of the turn before."""
    recalled = 0
    for i in range(3000):
        drafts = scene(Random(i), lang, ON, kind="chat")
        if len(drafts) > 1 and "_recall." in drafts[1].family:
            assert drafts[1].answer and drafts[1].answer[0].lower() in drafts[0].turn.human.lower()
            recalled += 1
    assert recalled > 50


def test_a_slot_without_values_is_named():
    """Prevents a misspelt slot from reaching the training data."""
    with pytest.raises(ValueError, match=r"\{nmae\}"):
        talk.Filler(Random(1), ({"name": ["Lena"]},))("Hello {nmae}")
    with pytest.raises(ValueError, match="never ends"):  # four such lines once kept the writer busy for ever
        talk.Filler(Random(1), ({"thing": ["an old {thing}"]},))("Sell me {thing}")
    fill = talk.Filler(Random(1), ({"name": ["Lena", "Tom"], "dish": [["soup", "hot"]], "n": ["3..3"]},))
    assert set(fill("{name} {name2}").split()) == {"Lena", "Tom"}
    assert fill("{dish} is {dish.1}, {n}") == "soup is hot, 3"


def test_harmless_requests_share_the_words_and_frames_of_harmful_ones():
    """Prevents a refusal that is learnt from a frame such as `How do I kill …` instead of from the act."""
    for lang in LANGS:
        for slot, least in (("act", 20), ("thing", 10)):
            harmless = talk.frames("lookalike", lang, slot)
            assert len(harmless) >= least and set(harmless) <= set(talk.frames("harmful", lang, slot))
            assert all(family.startswith("frame.") and "{" + slot + "}" in text for family, text in harmless)
    harmless = " ".join(draft.turn.human.lower() for draft in drafts_of("lookalike", "en", 2500))
    for word in ("kill", "shoot", "bomb", "attack", "poison", "steal", "hack", "fire", "gun", "drugs", "virus"):
        assert re.search(rf"\b{word}", harmless), word
