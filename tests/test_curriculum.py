"""Tests of the curriculum: the same rows for the same seed, nothing kept for evaluation in training, an honest mix."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice

import pytest

from moss.chat import META_INSTRUCTION, SWITCHES
from moss.data import curriculum
from moss.data.curriculum import KINDS, TOOL_KINDS, Curriculum, conversation, dialogs, main, questions, text
from moss.data.family import held_out, reserved
from moss.tools.calls import parse_commands

KEYS = {"calculator": "Calculate", "solver": "Solve", "search": "Search"}


@pytest.fixture(scope="module")
def sample():
    """2,500 training conversations."""
    return list(islice(dialogs(1), 2500))


def test_item_i_depends_on_seed_and_i_alone():
    """Prevents material that changes with order, workers or what was drawn before."""
    ten = list(islice(dialogs(7), 10))
    assert list(islice(dialogs(7), 10)) == ten
    assert list(islice(dialogs(7, start=6), 4)) == ten[6:]
    assert conversation(random.Random("7:3")) == ten[3]
    assert list(islice(dialogs(8), 10)) != ten


def test_training_never_sees_what_evaluation_asks(sample):
    """Prevents held-out families and reserved questions from leaking into training, in any turn."""
    drafts = [draft for item in sample for draft in item.drafts]
    assert len(drafts) > 4000
    assert not [draft.family for draft in drafts if held_out(draft.family)]
    assert not [draft.turn.human for draft in drafts if reserved(draft.turn.human)]


def test_the_mix_is_as_said(sample):
    """Prevents a curriculum that forgets a kind, a language, a switch or longer conversations."""
    kinds = Counter(draft.kind for item in sample for draft in item.drafts)
    total = kinds.total()
    assert set(kinds) == set(KINDS)
    assert 0.40 < (kinds["calculator"] + kinds["solver"]) / total < 0.60
    assert 0.06 < kinds["search"] / total < 0.14 and 0.02 < kinds["search_off"] / total < 0.07
    assert 0.06 < (kinds["calculator_off"] + kinds["solver_off"]) / total < 0.16
    assert 0.45 < sum(item.lang == "zh" for item in sample) / len(sample) < 0.55
    assert {len(item.drafts) for item in sample} == set(range(1, curriculum.MAX_TURNS + 1))
    combinations = {(item.dialog.switches["calculator"], item.dialog.switches["solver"]) for item in sample}
    assert len(combinations) == 4
    assert all(len({item.dialog.switches[key] for item in sample}) == 2 for key in ("thoughts", *SWITCHES))
    assert sum(len(draft.turn.rounds) == 2 for item in sample for draft in item.drafts) > 40


def test_no_call_to_a_tool_that_is_off(sample):
    """Prevents teaching raw calls to switched-off tools, the error that must stay below half a percent."""
    for item in sample:
        for draft in item.drafts:
            names = {call.name for step in draft.turn.rounds for call in parse_commands(step.commands)}
            assert names <= {name for key, name in KEYS.items() if item.dialog.switches[key]}
            assert bool(names) == (draft.kind in KEYS)


def test_turns_are_those_of_the_drafts(sample):
    """Prevents a dialog that differs from what is known about it."""
    for item in sample:
        assert item.dialog.turns == [draft.turn for draft in item.drafts]
        assert item.dialog.meta == META_INSTRUCTION
        assert all(answer in draft.turn.reply for draft in item.drafts for answer in draft.answer)


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("kind", TOOL_KINDS)
@pytest.mark.parametrize("split", ["known", "held_out"])
def test_questions_are_kept_ones_and_follow_trained_turns(kind, lang, split):
    """Prevents an evaluation that asks what training has shown, or mixes the two splits."""
    items = questions(kind, lang, split, 60, 3)
    assert items == questions(kind, lang, split, 60, 3)
    assert len({item.drafts[-1].turn.human for item in items}) == 60
    for item in items:
        last = item.drafts[-1]
        assert last.kind == kind
        assert f".{lang}." in last.family
        assert held_out(last.family) == (split == "held_out")
        assert split == "held_out" or reserved(last.turn.human)
        assert all(curriculum.trained(draft.family, draft.turn.human) for draft in item.drafts[:-1])
    assert any(len(item.drafts) > 1 for item in items)
    assert len({item.drafts[-1].family for item in items}) > 10


def test_every_kind_has_known_questions():
    """Prevents a kind of conversation that no evaluation can ask."""
    for kind in KINDS:
        assert len(questions(kind, "en", "known", 3, 0)) == 3


def test_bad_requests_are_named(monkeypatch):
    """Prevents an endless search for questions that do not exist."""
    monkeypatch.setattr(curriculum, "PATIENCE", 1)
    with pytest.raises(ValueError, match="poem"):
        questions("poem", "en")
    with pytest.raises(ValueError, match="ask for fewer"):
        questions("identity", "en", "known", 10**9)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"--n is {n}"):
            main(Curriculum(n=n))


def test_documents_are_plain_and_repeatable():
    """Prevents markers in pre-training text and documents that change between runs."""
    found = list(islice(text(3), 80))
    assert found == list(islice(text(3), 80))
    assert all(document.strip() for document in found)
    assert not any("<|" in document or "<eo" in document for document in found)
    assert any("一" <= char <= "鿿" for document in found for char in document)


@pytest.mark.parametrize("kind", ["dialogs", "text", "questions"])
def test_rows_are_released_json_with_what_is_known(kind, tmp_path):
    """Prevents files that other tools cannot read, half-written files, and broken Chinese."""
    out = tmp_path / "deep" / "rows.jsonl"
    assert main(Curriculum(kind=kind, n=4, seed=2, output=out)) == 0
    lines = out.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == (4 * 2 * len(TOOL_KINDS) if kind == "questions" else 4)
    assert [path.name for path in out.parent.iterdir()] == ["rows.jsonl"]
    if kind == "text":
        assert all(set(row) == {"text"} for row in rows)
    else:
        for row in rows:
            assert {"meta_instruction", "num_turns", "chat", "kind", "family", "lang", "answer"} <= row.keys()
            assert row["chat"]["turn_1"]["Human"].startswith("<|Human|>: ")
    if kind == "questions":
        assert any("一" <= char <= "鿿" for char in "".join(lines))
