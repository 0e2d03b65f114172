"""Preference-aware training: scores into tags, tags into rows, and how a model that learnt them is asked."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moss
from moss import checkpoint, peft, resolve, tokenizer
from moss.chat import Dialog, Turn, parse_turns, render
from moss.data import preferences
from moss.data.dialogs import to_moss
from moss.data.pairs import to_json
from moss.evals.base import Evaluation, subject
from moss.log import read as read_log
from moss.model import Decoder, ModelConfig
from moss.tokenizer import Tokenizer
from moss.train import loop, pat, sft
from moss.weights import save_model
from tests.fakes import ScriptedEngine

WORDS = "zero one two three four five six seven eight nine".split()


def lively(tok: Tokenizer, seed: int = 0, head: Any = "lm", max_length: int = 256) -> Decoder:
    """A model of one layer whose scores depend on what it has read."""
    model = Decoder(ModelConfig.from_depth(1, tok.vocab_size, max_length), head)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    return model


def dialog(number: int) -> Dialog:
    """A conversation of one or two turns whose last reply says its number."""
    turns = [Turn(f"Say {number}.", reply=" ".join(WORDS[int(digit)] for digit in str(number)))]
    if number % 3 == 0:
        turns.insert(0, Turn("Hello", reply="Hi"))
    return Dialog("Be MOSS.", {}, turns)


def value(dialog: Dialog) -> float:
    """The number that the last reply says."""
    return float("".join(str(WORDS.index(word)) for word in dialog.turns[-1].reply.split()))


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer.train((f"Say {n}. Hello Hi Be MOSS. {dialog(n).turns[-1].reply}" for n in range(60)), 400)


@pytest.fixture(scope="module")
def made(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with conversations, a toy to start from, and a preference model with another tokenizer."""
    folder = tmp_path_factory.mktemp("pat")
    write(folder / "chat.jsonl", [dialog(number) for number in range(101)])
    save_model(lively(tok), folder / "base")
    tok.save(folder / "base")
    other = tokenizer.train(["another tokenizer: hello hi moss say one two three"], 350)
    save_model(lively(other, 3, "scalar", max_length=128), folder / "reward")
    other.save(folder / "reward")
    return folder


def write(path: Path, found: Sequence[Dialog]) -> Path:
    path.write_text("".join(json.dumps(to_moss(each), ensure_ascii=False) + "\n" for each in found), encoding="utf-8")
    return path


def config(folder: Path, **more: Any) -> pat.PAT:
    values: dict[str, Any] = {
        "data": [folder / "chat.jsonl"],
        "model": folder / "base",
        "reward": folder / "reward",
        "batch_tokens": 1024,
        "length": 256,
        "steps": 2,
        "compile": "off",
        "dtype": "float32",
        "warmup": 0,
    }
    return pat.PAT(**(values | more))


@pytest.fixture
def by_value(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The preference model scores a reply by the number that it says; returns how many were asked at a time."""
    asked: list[int] = []

    def score_replies(model: Decoder, tok: Tokenizer, found: Sequence[Dialog]) -> np.ndarray:
        asked.append(len(found))
        return np.array([value(each) for each in found], dtype=np.float32)

    monkeypatch.setattr(pat, "score_replies", score_replies)
    return asked


def test_scores_become_tags_by_hand(made: Path, tmp_path: Path, by_value: list[int]) -> None:
    """Prevents tags of other replies, buckets of equal count, and edges that nobody can look up afterwards.

    Scores 0, 1 … 100: the 1st percentile is 1, the 99th 99, so the edges are 1 + k 98/6, as in the maths' own test.
    """
    assert pat.main(config(made, out=tmp_path / "run")) == 0
    told = checkpoint.read_info(tmp_path / "run")
    assert told["stage"] == "pat"
    assert told["pat"]["edges"] == pytest.approx([1 + k * 98 / 6 for k in range(1, 6)])
    assert told["pat"]["histogram"] == [18, 16, 16, 17, 16, 18]
    assert told["pat"]["reward_sha256"] == peft.weights_sha256(made / "reward")
    found = pat.read([made / "chat.jsonl"])
    tags = [
        each.turns[-1].quality
        for each in pat.tagged(found, np.array([value(d) for d in found]), np.array(told["pat"]["edges"]))
    ]
    assert [tags[number] for number in (0, 17, 18, 33, 34, 49, 50, 66, 67, 82, 83, 100)] == [
        0, 0, 20, 20, 40, 40, 60, 60, 80, 80, 100, 100,
    ]  # fmt: skip


def test_a_row_is_the_tagged_reply_and_the_tag_is_not_learnt(made: Path, tok: Tokenizer) -> None:
    """Prevents a model that learns to write tags, tags on earlier replies, and rows that differ from sft's in more."""
    found = pat.read([made / "chat.jsonl"])[:4]
    data = pat.rows(pat.tagged(found, np.arange(4.0), np.array([0.5, 1.5, 2.5, 10, 11])), tok, config(made))
    plain = sft.read([write(made / "four.jsonl", found)], tok, config(made))
    for number, quality in enumerate((0, 20, 40, 60)):
        ids, mask = data.rows.row(number)
        turns = parse_turns(ids.tolist(), tok)
        assert [turn.quality for turn in turns] == [None] * (len(turns) - 1) + [quality]
        assert [turn.reply for turn in turns] == [turn.reply for turn in found[number].turns]
        tag = list(tok.encode_again(f" <quality: {quality}>"))
        others, learnt = plain.rows.row(number)
        assert len(ids) == len(others) + len(tag)
        start = next(at for at in range(len(ids)) if ids[at : at + len(tag)].tolist() == tag)
        assert not mask[start : start + len(tag)].any()
        keep = np.r_[0:start, start + len(tag) : len(ids)]
        assert (ids[keep] == others).all() and (mask[keep] == learnt).all()


def test_what_was_scored_is_not_scored_again(
    made: Path, tmp_path: Path, by_value: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents hours of scoring after each interruption, and old scores for other replies or another judge."""
    monkeypatch.setattr(pat, "SCORED", 40)
    first = config(made, out=tmp_path / "run", save_every=1)
    assert pat.main(first) == 0
    assert by_value == [40, 40, 21]
    assert pat.main(dataclasses.replace(first, resume=True, steps=3)) == 0
    assert len(by_value) == 3
    held = np.load(tmp_path / "run/scores.npz")
    (tmp_path / "half").mkdir()
    np.savez(tmp_path / "half/scores.npz", fingerprint=held["fingerprint"], scores=held["scores"][:40])
    assert pat.main(dataclasses.replace(first, out=tmp_path / "half")) == 0  # killed while scoring
    assert by_value[3:] == [40, 21]
    for case in ("reply", "judge", "broken"):
        folder = tmp_path / case
        folder.mkdir()
        other = dataclasses.replace(first, out=folder)
        (folder / "scores.npz").write_bytes((tmp_path / "run/scores.npz").read_bytes())
        if case == "reply":
            changed = [*(dialog(n) for n in range(100)), dialog(99)]
            other = dataclasses.replace(other, data=[write(tmp_path / "changed.jsonl", changed)])
        elif case == "judge":
            small = Tokenizer.load(made / "reward")
            save_model(lively(small, 4, "scalar"), tmp_path / "other")
            small.save(tmp_path / "other")
            other = dataclasses.replace(other, reward=tmp_path / "other")
        else:
            (folder / "scores.npz").write_bytes(b"PK nothing")
        by_value.clear()
        assert pat.main(other) == 0 and sum(by_value) == 101, case


def test_resumed_is_unbroken(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents tags, rows or weights that differ after a stop: 6 steps and 3 + 3 are equal bit for bit, with a real
    preference model whose tokenizer is another, and validation in between."""
    valid = [write(tmp_path / "valid.jsonl", [dialog(number) for number in range(200, 212)])]
    whole = config(made, out=tmp_path / "whole", steps=6)
    assert pat.main(whole) == 0
    broken = dataclasses.replace(whole, out=tmp_path / "broken", valid=valid, save_every=2)
    with monkeypatch.context() as patch:
        original = loop.judge

        def stop_after_three(state: loop.State, loss: float, norm: float) -> str:
            if state.step == 3:
                signal.raise_signal(signal.SIGTERM)
            return original(state, loss, norm)

        patch.setattr(loop, "judge", stop_after_three)
        assert pat.main(broken) == 0
    assert not (tmp_path / "broken/moss.json").exists()
    assert pat.main(dataclasses.replace(broken, resume=True)) == 0
    for name in ("step-000006/model.safetensors", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    infos = [checkpoint.read_info(tmp_path / name)["pat"] for name in ("whole", "broken")]
    assert infos[0] == infos[1]
    assert sum("valid" in line for line in read_log(tmp_path / "broken/log.jsonl")) == 3


def test_another_judge_is_another_run(made: Path, tmp_path: Path, by_value: list[int]) -> None:
    """Prevents a run that goes on with tags of another preference model and calls itself the same."""
    first = config(made, out=tmp_path / "run")
    assert pat.main(first) == 0
    small = Tokenizer.load(made / "reward")
    save_model(lively(small, 9, "scalar"), tmp_path / "other")
    small.save(tmp_path / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pat, "score_replies", lambda model, tok, found: -np.array([value(d) for d in found]))
        with pytest.raises(ValueError, match="does not fit this run: the data has changed"):
            pat.main(dataclasses.replace(first, resume=True, steps=4, reward=tmp_path / "other"))


def test_long_conversations_lose_their_oldest_turns(tok: Tokenizer, made: Path) -> None:
    """Prevents a conversation that loses the very turn that is tagged, as cutting at the end would do."""
    long = Dialog("Be MOSS.", {}, [Turn(f"Say {n}.", reply=dialog(n).turns[-1].reply) for n in range(40)])
    short = dataclasses.replace(long, turns=long.turns[-1:])
    data = pat.rows(pat.tagged([long, short], np.array([9.0, 0.0]), np.arange(1.0, 6.0)), tok, config(made, length=128))
    ids, _ = data.rows.row(0)
    turns = parse_turns(ids.tolist(), tok)
    assert 1 < len(turns) < 40 and turns[-1].human == "Say 39." and turns[-1].quality == 100 and len(ids) <= 128
    more = dataclasses.replace(long, turns=long.turns[-len(turns) - 1 :])
    assert len(render(more, tok)[0]) + len(tok.encode_again(" <quality: 100>")) > 128


def test_each_reply_of_a_preference_row_is_a_conversation(tmp_path: Path) -> None:
    """Prevents preference rows that are refused, or of which only the winners are learnt."""
    asked = list(islice(preferences.prompts(0), 3))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(to_json(each)) + "\n" for each in asked))
    found = pat.read([path])
    assert [each.turns[-1].reply for each in found] == [reply.text for each in asked for reply in each.replies]
    assert {each.turns[-1].human for each in found} == {each.history.turns[-1].human for each in asked}


def test_what_cannot_be_scored_is_left_out_and_counted(
    made: Path, tmp_path: Path, by_value: list[int], capsys: pytest.CaptureFixture
) -> None:
    """Prevents questions without a reply that are learnt as silence, old tags that are kept, and one long reply that
    ends the whole run."""
    silent = Dialog("Be MOSS.", {}, [Turn("Hello")])
    old = dataclasses.replace(dialog(7), turns=[dataclasses.replace(dialog(7).turns[-1], quality=20)])
    long = Dialog("Be MOSS.", {}, [Turn("Say it all.", reply=" ".join(WORDS * 12))])
    path = write(tmp_path / "mixed.jsonl", [silent, old, long, *(dialog(number) for number in range(30))])
    assert [turn.quality for each in pat.read([path]) for turn in each.turns] == [None] * 42
    assert pat.main(config(made, out=tmp_path / "run", data=[path])) == 0
    said = capsys.readouterr().err
    assert "1 conversations dropped, whose last reply is missing" in said
    assert "1 conversations dropped, since the preference model cannot read" in said
    assert sum(checkpoint.read_info(tmp_path / "run")["pat"]["histogram"]) == 31
    with pytest.raises(ValueError, match=r"silent.jsonl: of 1 conversations not one ends in a reply"):
        pat.main(config(made, out=tmp_path / "none", data=[write(tmp_path / "silent.jsonl", [silent])]))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("scores", "words"), [(1.0, "too close together for 6 buckets"), (np.nan, "a score that is no number")]
)
def test_scores_that_tell_nothing_apart_are_refused(
    scores: float, words: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents one tag for everything, or tags made of nothing, which train on in silence."""
    monkeypatch.setattr(pat, "score_replies", lambda model, tok, found: np.full(len(found), scores, np.float32))
    with pytest.raises(ValueError, match=words):
        pat.main(config(made, out=tmp_path / "run"))
    assert not (tmp_path / "run/log.jsonl").exists()


def test_what_is_no_preference_model_is_named(made: Path, tmp_path: Path) -> None:
    """Prevents a language model's logits that pass for scores, and a half-made folder where nothing was given."""
    with pytest.raises(ValueError, match="nowhere holds no preference model; `moss train reward` makes one"):
        pat.main(config(made, out=tmp_path / "run", reward=tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="holds a language model; a preference model has a scalar head"):
        pat.main(config(made, out=tmp_path / "run", reward=made / "base"))


def test_a_tagged_model_is_asked_for_the_best(
    made: Path, tmp_path: Path, by_value: list[int], tok: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a model that learnt tags and is asked without one, and a tag for models that never saw any."""
    assert pat.main(config(made, out=tmp_path / "run", steps=1)) == 0
    assert resolve.quality(tmp_path / "run") == 100 and resolve.quality(tmp_path / "run", 20) == 20
    assert resolve.quality(tmp_path / "run", 0) == 0
    assert resolve.quality(made / "base") is None and resolve.quality(None) is None
    assert resolve.quality("http://localhost:1/v1#name") is None
    with moss.load(tmp_path / "run", tools="none") as chat:
        assert chat.quality == 100
        engine = ScriptedEngine([[*tok.encode("one"), *tok.marker("<eom>")]] * 9)
        chat.engine, chat.dialog.switches = engine, {"thoughts": False}
        chat.ask("Say 1.")
        tag = list(tok.encode_again(" <quality: 100>"))
        assert engine.prompts[-1][-len(tag) :] == tag
    with moss.load(tmp_path / "run", tools="none", quality=20) as chat:
        assert chat.quality == 20
    with moss.load(made / "base", tools="none") as chat:
        assert chat.quality is None
    seen: list[int | None] = []
    for folder in (tmp_path / "run", made / "base"):
        with subject(str(folder), Evaluation()) as who:
            seen.append(who.quality)
    assert seen == [100, None]
