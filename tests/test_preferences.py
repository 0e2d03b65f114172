"""Preference material: levels that the judge confirms, and replies that only reading the question tells apart."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss.chat import Dialog, Turn
from moss.data import preferences
from moss.data.curriculum import Curriculum, main, rows
from moss.data.dialogs import from_row
from moss.data.pairs import Preference, answered, encode, from_json, to_json
from moss.data.preferences import KINDS, LEVELS, compare, conversations, draw, prompt, prompts, say, truth
from moss.resolve import locate
from moss.tokenizer import load

LANGS = ("en", "zh")


def asked(**answer: object) -> Dialog:
    return Dialog("", {}, [Turn("?")], {"answer": answer})


FRUITS = asked(one_of=["apples", "pears", "grapes", "peaches", "lemons", "oranges"])
CLOTHES = asked(one_of=["a shirt", "a coat", "a hat", "trousers", "a scarf"])
DRINKS = asked(one_of=["水", "茶", "咖啡", "牛奶", "可可", "柠檬水"])
CAPITALS = asked(keys=["France", "Italy", "Japan", "Peru", "Cuba"], values=["Paris", "Rome", "Tokyo", "Lima", "Havana"])
WORDS = asked(keys=["大", "上", "热", "左", "买"], values=["小", "下", "冷", "右", "卖"])
NUMBERS = asked(values=["3", "8", "12", "20", "31"])


# -- the judge -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "reply", "right"),
    [
        (FRUITS, "Apples, pears, grapes, peaches and lemons.", 5),
        (FRUITS, "Sure: apples, pears, grapes, tables, and lemons", 4),
        (FRUITS, "Here are five fruits:\n1. apples\n2. Pears\n3) grapes\n4. dogs\n5. lemons\n", 4),
        (FRUITS, "- apples\n- pears\n- “grapes”\n* peaches\n• lemons", 5),
        (FRUITS, "I would say apples; pears; grapes; peaches; lemons!", 5),
        (FRUITS, "apples, apples, apples, pears, pears", 2),  # repeated
        (FRUITS, "apples, pears", 2),  # missing
        (FRUITS, "apples, pears, grapes, peaches, lemons, oranges", 4),  # a sixth takes one off, right as it is
        (FRUITS, "apples, pears, grapes, peaches, lemons" + ", tables" * 9, 0),
        (FRUITS, "not apples at all, pears or so, grapes", 1),
        (FRUITS, "", 0),
        (FRUITS, "五种：，，、、。", 0),
        (CLOTHES, "A shirt, the coat, hat, trousers, an umbrella", 4),
        (DRINKS, "好的：柠檬水、水、茶、咖啡和牛奶。", 5),  # lemonade is not water said twice
        (DRINKS, "比如水,茶,咖啡,牛奶,可可", 5),
        (CAPITALS, "Paris, Rome, Tokyo, Lima, Havana.", 5),
        (CAPITALS, "Rome, Paris, Tokyo, Lima, Havana", 3),  # in the wrong places
        (CAPITALS, "France: Paris, Italy: Rome, Japan: Tokyo, Peru: Lima, Cuba: Havana", 5),
        (CAPITALS, "Here they are: Cuba - Havana, Peru - Lima, France is Paris, Italy = Rome, Japan – Tokyo.", 5),
        (CAPITALS, "France: Rome, Italy: Paris, Japan: Tokyo, Peru: Lima, Cuba: Havana", 3),
        (CAPITALS, "France: Paris, France: Paris, Japan: Tokyo, Peru: Lima, Cuba: Havana", 4),
        (CAPITALS, "France: Paris or Rome, Italy: Rome, Japan: Tokyo, Peru: Lima, Cuba: Havana", 4),  # no hedging
        (CAPITALS, "France, Italy, Japan, Peru, Cuba", 0),  # the question said again
        (WORDS, "大是小，上是下，热是冷，左是右，买是卖。", 5),
        (WORDS, "如下：小、下、冷、左和买", 3),
        (NUMBERS, "3, 8, 12, 20, 31", 5),
        (NUMBERS, "3 8 12 20 31", 5),
        (NUMBERS, "3 < 8 < 12 < 20 < 31", 5),
        (NUMBERS, "Sorted from 3 to 31: 3、8、12、20、31。", 5),
        (NUMBERS, "The numbers are 3, 8, 12, 31, 20", 3),
        (NUMBERS, "13, 8, 12, 20, 31", 4),  # 13 does not end in the number 3
        (NUMBERS, "1. 3\n2. 8\n3. 12\n4. 20\n5. 31", 5),
        (NUMBERS, "８，３，１２，２０，３１", 3),  # full-width digits are digits
        (NUMBERS, "8, 12, 20, 31", 0),  # one place off is wrong everywhere
        (NUMBERS, "the first five are small", 0),
    ],
)
def test_the_judge_by_hand(history: Dialog, reply: str, right: int) -> None:
    """Prevents a judge that reads only the material's own forms, or that can be pleased by saying more."""
    assert truth(history, reply) == right


@pytest.mark.parametrize("split", ["known", "held_out"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_is_as_good_as_its_level_says(kind: str, split: preferences.Split) -> None:
    """Prevents levels that the judge does not see: thousands of drawn replies of each kind, in each form."""
    rng = random.Random(f"{kind}{split}")
    for number in range(250):
        lang = LANGS[number % 2]
        task = draw(rng, lang, split, kind)
        history = Dialog("", {}, [Turn(task.question)], {"answer": task.answer})
        for level in range(6):
            text = say(rng, task, lang, level)
            assert truth(history, text) == level, (task, text)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([FRUITS, CAPITALS, WORDS, NUMBERS, DRINKS]), st.text(max_size=60))
def test_any_text_gets_a_verdict_and_more_never_helps(history: Dialog, text: str) -> None:
    """Prevents a judge that fails on what a model may write, and replies that gain by growing past five things."""
    assert 0 <= truth(history, text) <= 5
    answer = history.extra["answer"]
    full = ", ".join(answer.get("values") or answer["one_of"][:5])
    assert truth(history, full) == 5
    assert truth(history, f"{full}, {text}") <= 5
    assert truth(history, f"{full}, {full}") == 0


def test_compare_and_what_it_needs() -> None:
    """Prevents a comparison the wrong way round, and verdicts on conversations of which nothing is known."""
    assert compare(FRUITS, "apples, pears", "apples") == 1
    assert compare(FRUITS, "apples", "apples, pears") == -1
    assert compare(FRUITS, "apples", "pears") == 0
    for extra in ({}, {"answer": ["Paris"]}, {"answer": {"kind": "list"}}):
        with pytest.raises(ValueError, match="carries no `answer`"):
            truth(Dialog("", {}, [Turn("?")], extra), "apples")


# -- the material ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> list[Preference]:
    return list(islice(prompts(1), 1000))


def test_item_i_depends_on_seed_and_i_alone() -> None:
    """Prevents material that changes with order, workers or what was drawn before."""
    ten = list(islice(prompts(7), 10))
    assert list(islice(prompts(7), 10)) == ten
    assert list(islice(prompts(7, start=6), 4)) == ten[6:]
    assert list(islice(prompts(8), 10)) != ten != list(islice(prompts(7, "held_out"), 10))


def test_six_levels_fifteen_pairs_alike_in_length(sample: list[Preference]) -> None:
    """Prevents prompts without a level, pairs the wrong way round, replies that length tells apart, and an order of
    replies that gives the level away."""
    for preference in sample:
        levels = [reply.level for reply in preference.replies]
        assert sorted(levels, key=str) == sorted(LEVELS, key=str)
        assert len(preference.pairs) == 15 == len({frozenset(pair) for pair in preference.pairs})
        assert all(levels[winner] > levels[loser] for winner, loser in preference.pairs)  # type: ignore[operator]
        sizes = [len(reply.text) for reply in preference.replies]
        assert max(sizes) <= 1.1 * min(sizes)
    first = Counter(preference.replies[0].level for preference in sample)
    assert all(0.11 < first[level] / len(sample) < 0.23 for level in LEVELS)


def test_the_mix_is_as_said(sample: list[Preference]) -> None:
    """Prevents material that forgets a kind, a language, a phrasing or conversations of two turns."""
    extras = [preference.history.extra for preference in sample]
    kinds = Counter(extra["kind"] for extra in extras)
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 80
    assert 0.4 < sum(extra["lang"] == "en" for extra in extras) / len(extras) < 0.6
    two = [preference for preference in sample if len(preference.history.turns) == 2]
    assert 0.05 < len(two) / len(sample) < 0.2
    assert all(preference.history.turns[0].reply for preference in two)
    assert len({extra["family"] for extra in extras}) > 80


def test_training_never_sees_what_is_held_out() -> None:
    """Prevents held-out accuracy that is memory: neither phrasings nor sets of values are shared, and no list of the
    material is too small to have both."""

    def seen(split: preferences.Split) -> tuple[set[str], set[tuple[str, ...]]]:
        families, values = set(), set()
        for kind, lang in [(kind, lang) for kind in KINDS for lang in LANGS]:
            rng = random.Random(f"{kind}{lang}{split}")
            for _ in range(400):
                task = draw(rng, lang, split, kind)
                families.add(task.family)
                values.add((lang, task.category, *sorted(task.keys or task.right)))
        return families, values

    (known, values), (unseen, kept) = seen("known"), seen("held_out")
    assert not known & unseen and not values & kept
    assert all(".ask." in family for family in known) and all(".unseen." in family for family in unseen)
    groups = [{family.rsplit(".", 2)[0] for family in families} for families in (known, unseen)]
    assert groups[0] == groups[1] and len(groups[0]) == 2 * (1 + 3 + 4 + 2)
    history = next(prompts(1, "held_out")).history
    assert ".unseen." in history.extra["family"] and history.extra["split"] == "held_out"


def test_the_words_of_a_list_are_right_as_often_as_wrong(sample: list[Preference]) -> None:
    """Prevents words that give the level away: over all levels each is right about as often as wrong."""
    counts: Counter[tuple[bool, str]] = Counter()
    for preference in sample:
        if preference.history.extra["kind"] == "list" and preference.history.extra["lang"] == "en":
            answer = set(preference.history.extra["answer"]["one_of"])
            words = preferences.material("preferences.en")["list"]["words"]
            for reply in preference.replies:
                for members in words.values():
                    for word in members:
                        said = len(re.findall(rf"\b{word.casefold()}\b", reply.text.casefold()))
                        counts[word in answer, word] += said
    shares = [counts[True, word] / (counts[True, word] + counts[False, word]) for _, word in counts]
    assert abs(np.mean(shares) - 0.5) < 0.05


def test_truth_survives_a_file(sample: list[Preference]) -> None:
    """Prevents rows from which nobody can judge any more: level and judge agree after JSON, also for --kind replies."""
    for preference in sample[:100]:
        back = from_json(json.loads(json.dumps(to_json(preference, "scripted"), ensure_ascii=False)))
        assert [20 * truth(back.history, reply.text) for reply in back.replies] == [r.level for r in back.replies]
    for row in rows(Curriculum(kind="replies", n=60, seed=1)):
        dialog = from_row(json.loads(json.dumps(row)))
        assert 20 * truth(dialog, dialog.turns[-1].reply) == dialog.extra["level"]
        assert dialog.turns[-1].quality is None


def test_replies_are_those_of_the_preferences(sample: list[Preference]) -> None:
    """Prevents an experiment whose arms train on different material: row 6 i + j is reply j of prompt i."""
    flat = [answered(preference.history, reply.text) for preference in sample[:20] for reply in preference.replies]
    found = list(islice(conversations(1), 120))
    assert [dialog.turns for dialog in found] == [dialog.turns for dialog in flat]


def test_the_command_writes_both(tmp_path) -> None:
    """Prevents a kind that the command line does not know, or broken Chinese in its files."""
    for kind, n in (("preferences", 8), ("replies", 8)):
        out = tmp_path / f"{kind}.jsonl"
        assert main(Curriculum(kind=kind, n=n, seed=2, output=out)) == 0  # type: ignore[arg-type]
        lines = out.read_text(encoding="utf-8").splitlines()
        assert len(lines) == n and any("一" <= char <= "鿿" for char in "".join(lines))
        assert ("pairs" in json.loads(lines[0])) == (kind == "preferences")


# -- what must not tell replies apart --------------------------------------------------------------------------------


def features(found: list[Preference], cut: Callable[[str], list], known: dict, *, grow: bool) -> np.ndarray:
    """Counts of words of winners less those of losers, (P, W)."""
    lines = []
    for preference in found:
        counts = [Counter(cut(reply.text)) for reply in preference.replies]
        for each in counts if grow else ():
            for word in each:
                known.setdefault(word, len(known))
        for winner, loser in preference.pairs:
            line = np.zeros(len(known), dtype=np.float32)
            for sign, place in ((1, winner), (-1, loser)):
                for word, count in counts[place].items():
                    if word in known:
                        line[known[word]] += sign * count
            lines.append(line)
    return np.array([np.pad(line, (0, len(known) - len(line))) for line in lines])


def bradley_terry_weights(apart: np.ndarray) -> np.ndarray:
    """The weights (W,) of a linear scorer that make winners likeliest, by Newton's method with a little ridge."""
    weights = np.zeros(apart.shape[1], dtype=np.float32)
    for _ in range(4):
        sure = 1 / (1 + np.exp(-apart @ weights))
        slope = apart.T @ (sure - 1) + weights
        curve = (apart * (sure * (1 - sure))[:, None]).T @ apart + np.eye(len(weights), dtype=np.float32)
        weights -= np.linalg.solve(curve, slope)
    return weights


@pytest.fixture(scope="module")
def unseen() -> list[Preference]:
    return list(islice(prompts(2, "held_out"), 300))


@pytest.mark.parametrize("cut", ["words", "bpe"])
def test_a_bag_of_words_does_not_tell_replies_apart(cut: str, unseen: list[Preference]) -> None:
    """Prevents material that is solved without reading the question: a Bradley-Terry scorer on counts of words, or of
    tokens, trained on 2,000 prompts, stays far below 65 % on held-out ones."""
    tok = load(locate(None))
    split = {"words": lambda text: re.findall(r"[a-z]+|\d+|[^\sa-z\d]", text.lower()), "bpe": tok.encode}[cut]
    known: dict = {}
    trained = features(list(islice(prompts(1), 2000)), split, known, grow=True)
    weights = bradley_terry_weights(trained)
    right = features(unseen, split, known, grow=False) @ weights
    assert ((1 + np.sign(right)) / 2).mean() < 0.58


@pytest.mark.parametrize("measure", ["characters", "tokens"])
def test_length_does_not_tell_replies_apart(measure: str, unseen: list[Preference], sample: list[Preference]) -> None:
    """Prevents better replies that are longer, or shorter."""
    tok = load(locate(None))
    size = {"characters": len, "tokens": lambda text: len(tok.encode(text))}[measure]
    for found in (unseen, sample[:300]):
        apart = [
            size(each.replies[winner].text) - size(each.replies[loser].text)
            for each in found
            for winner, loser in each.pairs
        ]
        assert 0.44 < ((1 + np.sign(apart)) / 2).mean() < 0.56


def test_conversations_stay_short(sample: list[Preference]) -> None:
    """Prevents material that a nano has no time for: a conversation of one turn takes about 110 tokens at most."""
    tok = load(locate(None))
    one = [each for each in sample[:300] if len(each.history.turns) == 1]
    sizes = [len(encode(answered(each.history, reply.text), tok)[0]) for each in one for reply in each.replies]
    assert np.mean(sizes) < 112 and max(sizes) < 180


def test_every_value_is_told_apart() -> None:
    """Prevents a value that is right for two keys, a word in two categories, or one the judge would split in two."""
    for lang in LANGS:
        table = preferences.material(f"preferences.{lang}")
        words = [word for members in table["list"]["words"].values() for word in members]
        assert len(words) == len(set(words)) and all(len(members) >= 8 for members in table["list"]["words"].values())
        values = words + [
            text
            for relation in table["facts"].values()
            if isinstance(relation, dict)
            for row in relation["pairs"]
            for text in row
        ]
        assert all(preferences._slots(value, (), numbers=False) == [value.casefold()] for value in values)
        for relation in table["facts"].values():
            if isinstance(relation, dict):
                keys, right = zip(*relation["pairs"], strict=True)
                assert len(set(keys)) == len(keys) and len(set(right)) == len(right) >= 12
    rng = random.Random(1)
    for kind in KINDS:
        made = prompt(rng, kind=kind)
        assert made.history.extra["kind"] == kind
        texts = [reply.text for reply in made.replies]
        assert all(compare(made.history, texts[a], texts[b]) == 1 for a, b in made.pairs)
        assert set(made.pairs) | {(b, a) for a, b in made.pairs} >= set(combinations(range(6), 2))
