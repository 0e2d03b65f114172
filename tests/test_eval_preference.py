"""The comparison of arms: who is asked what, who wins, and how sure that is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moss import tokenizer
from moss.chat import parse_turns
from moss.data.pairs import Preference
from moss.engine import Engine
from moss.evals import preference
from moss.evals.preference import answers, compare, dial, levels, questions, reply_all, summary, versus
from moss.tokenizer import Tokenizer
from tests.fakes import toy_folder, toy_model


@pytest.fixture(scope="module")
def asked() -> list[Preference]:
    return questions(12)


@pytest.fixture(scope="module")
def tok(asked: list[Preference]) -> Tokenizer:
    return tokenizer.train((reply.text for each in asked for reply in each.replies), vocab_size=400)


def replies(asked: list[Preference], level: int) -> list[str]:
    """The material's own reply of a level to each question."""
    return [next(reply.text for reply in each.replies if reply.level == level) for each in asked]


def test_levels_are_the_truth_about_the_last_question(asked: list[Preference]) -> None:
    """Prevents a judge of another question's answer: the material's replies have the levels that they are made for."""
    for level in (0, 40, 100):
        assert levels(asked, replies(asked, level)).tolist() == [level // 20] * len(asked)
    assert levels(asked, replies(asked[1:] + asked[:1], 100)).mean() < 2


def test_versus_by_hand() -> None:
    """Prevents ties that count as wins, wins that count as losses, and intervals that do not hold the rate."""
    told = versus(np.array([5, 3, 2, 0]), np.array([1, 3, 2, 4]))
    assert (told["win"], told["tie"], told["loss"], told["rate"]) == (0.25, 0.5, 0.25, 0.5)
    assert told["low"] < 0.5 < told["high"] and told["n"] == 4
    back = versus(np.array([1, 3, 2, 4]), np.array([5, 3, 2, 0]))
    assert (back["win"], back["low"], back["high"]) == (told["loss"], 1 - told["high"], 1 - told["low"])
    better = versus(np.full(50, 4), np.r_[np.full(48, 2), 4, 5])
    assert better["rate"] == pytest.approx((48 + 0.5) / 50) and better["low"] > 0.9
    with pytest.raises(ValueError, match="levels of 3 and 4 questions"):
        versus(np.zeros(3), np.zeros(4))


def test_the_same_questions_are_not_more_because_several_trainings_answer_them() -> None:
    """Prevents an interval that shrinks by the root of the number of seeds, as though each had other questions."""
    a, b = np.random.default_rng(0).integers(0, 6, (2, 100))
    once, thrice = versus(a, b), versus(np.array([a, a, a]), np.array([b, b, b]))
    assert thrice["n"] == 300 and once["n"] == 100
    assert {**thrice, "n": 100} == pytest.approx(once)


def test_a_summary_by_hand(asked: list[Preference]) -> None:
    """Prevents shares of replies that pass for shares of right things, and kinds that are mixed up."""
    found = np.array([5, 0] * 6)
    told = summary(asked, found)
    assert told["right"] == 0.5 and told["whole"] == 0.5 and told["histogram"] == [6, 0, 0, 0, 0, 6]
    for kind, mean in told["kind"].items():
        mine = [value for each, value in zip(asked, found) if each.history.extra["kind"] == kind]
        assert mean == pytest.approx(sum(mine) / len(mine) / 5)
    assert set(told["lang"]) == {"en", "zh"}


def test_a_model_is_asked_with_its_tag(
    asked: list[Preference], tok: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents arms that are asked in a form that they were not trained in, or a dial that turns nothing."""
    model = toy_model(vocab_size=tok.vocab_size, max_length=1024)
    prompts: list[list[int]] = []
    submit = Engine.submit

    def watched(self: Engine, ids: list[int], *args: object, **more: object) -> object:
        prompts.append(list(ids))
        return submit(self, ids, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "submit", watched)
    monkeypatch.setattr(preference, "MAX_TOKENS", 4)
    for tag in (None, 20, 100):
        prompts.clear()
        told = reply_all(model, tok, asked, tag=tag)
        turns = [parse_turns(ids, tok) for ids in prompts]
        assert [each[-1].human for each in turns] == [each.history.turns[-1].human for each in asked]
        assert {each[-1].quality for each in turns} == {tag} and len(told) == len(asked)
        opening = [*tok.opening("<|MOSS|>"), *([] if tag is None else tok.encode_again(f" <quality: {tag}>"))]
        assert all(ids[-len(opening) :] == opening for ids in prompts)


def test_draws_depend_on_seed_and_question_alone(asked: list[Preference], tok: Tokenizer) -> None:
    """Prevents arms that meet different luck, and the same luck at every question or seed."""
    model = toy_model(vocab_size=tok.vocab_size, max_length=1024)
    first = reply_all(model, tok, asked[:4], temperature=1.0, seed=1)
    assert reply_all(model, tok, asked[:2], temperature=1.0, seed=1) == first[:2]
    assert reply_all(model, tok, asked[:4], temperature=1.0, seed=2) != first
    same = [dataclasses.replace(asked[0])] * 4
    assert len(set(reply_all(model, tok, same, temperature=1.0, seed=1))) == 4
    assert len(set(reply_all(model, tok, same, temperature=0.0, seed=1))) == 1


def test_arms_are_compared_on_the_same_questions(
    asked: list[Preference], tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a table whose lines are of different questions, or of one model under two names."""
    given = {"good": 80, "bad": 20}
    monkeypatch.setattr(preference, "answers", lambda name, asked, **_: replies(asked, given[str(name)]))
    told = compare({name: name for name in given}, asked)
    assert told["versus"]["good over bad"]["win"] == 1.0 and list(told["versus"]) == ["good over bad"]
    assert told["summary"]["good"]["right"] == 0.8 and told["summary"]["bad"]["right"] == 0.2
    assert told["levels"] == {"good": [4] * 12, "bad": [1] * 12}


def test_a_folder_answers(asked: list[Preference], tok: Tokenizer, tmp_path: Path) -> None:
    """Prevents a comparison that only works on models in memory."""
    folder = toy_folder(tok, tmp_path / "toy")
    assert len(answers(folder, asked[:2])) == 2
    assert list(dial(folder, asked[:2])) == [0, 20, 40, 60, 80, 100]
