"""The preference model: its loss against plain formulas, its packing, its figures by hand, and the stage."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moss import checkpoint, tokenizer
from moss.chat import Dialog, TooLong, Turn
from moss.data import pairs, preferences
from moss.data.pairs import Groups, Preference, Reply, answered, encode, to_json
from moss.log import read as read_log
from moss.model import Decoder, ModelConfig
from moss.tokenizer import Tokenizer
from moss.train import loop, machine, reward
from moss.weights import load_model, save_model

LENGTH = 1024
PROMPTS = [
    dataclasses.replace(preference, history=dataclasses.replace(preference.history, meta="Be MOSS."))
    for preference in islice(preferences.prompts(0), 20)
]
MOSS = {"family": "moss", "tie_embeddings": False, "qk_norm": False}


def lively(tok: Tokenizer, seed: int = 0, **values: Any) -> Decoder:
    """A preference model of one layer whose weights are far from zero, the head's too, so that scores differ."""
    model = Decoder(ModelConfig.from_depth(1, tok.vocab_size, 2 * LENGTH, **values), "scalar")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    told = (f"{each.history.turns[-1].human} {reply.text}" for each in PROMPTS for reply in each.replies)
    return tokenizer.train(told, vocab_size=500)


@pytest.fixture(scope="module")
def made(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with preference rows and a language model to start from."""
    folder = tmp_path_factory.mktemp("reward")
    lines = [json.dumps(to_json(each), ensure_ascii=False) + "\n" for each in PROMPTS]
    (folder / "pairs.jsonl").write_text("".join(lines[:16]))
    (folder / "valid.jsonl").write_text("".join(lines[16:]))
    save_model(Decoder(ModelConfig.from_depth(1, tok.vocab_size, LENGTH)), folder / "base")
    tok.save(folder / "base")
    return folder


def config(folder: Path, **more: Any) -> reward.Reward:
    values: dict[str, Any] = {
        "data": [folder / "pairs.jsonl"],
        "valid": [folder / "valid.jsonl"],
        "model": folder / "base",
        "batch_tokens": 4 * LENGTH,
        "lr": 1e-3,
        "matrix_lr": 0.005,
        "compile": "off",
        "dtype": "float32",
        "warmup": 0,
    }
    return reward.Reward(**(values | more))


def micro(data: Groups, position: int, count: int) -> loop.Micro:
    return machine.to_device(data.batch(position, count), torch.device("cpu"))


def gradients(model: Decoder, batches: Sequence[loop.Micro]) -> tuple[float, int, dict[str, Tensor]]:
    """(mean loss, pairs, gradients) of one step of the loop."""
    model.zero_grad(set_to_none=True)
    loss, _, count, _ = loop.gradients(model, model, reward.preference_loss, batches)
    return loss, count, {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def apart(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest distance of two gradients of a parameter, relative to the second's length; those below a thousandth
    of the whole (that of the last norm's bias is zero: it moves all scores alike) relative to that."""
    assert some.keys() == others.keys()
    least = 1e-3 * float(torch.stack([grad.norm() for grad in others.values()]).norm())
    return max(float((some[name] - others[name]).norm()) / max(float(others[name].norm()), least) for name in some)


def plain_score(model: Decoder, tok: Tokenizer, preference: Preference, number: int) -> Tensor:
    """The score of one reply, computed alone: the model's own forward, read at `<eom>`."""
    ids, _ = encode(answered(preference.history, preference.replies[number].text), tok)
    return model(torch.tensor([ids]))[0, -1]


# -- the loss --------------------------------------------------------------------------------------------------------


class Told:
    """A stand-in for a model whose score at a place is what is told for it."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.head = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.head.weight)

    def hidden(self, ids: Tensor, *, positions: Tensor, segments: Tensor) -> Tensor:
        return self.scores[..., None]


def test_the_loss_by_hand() -> None:
    """Prevents a wrong sign, scores read at the wrong place, pairs of the wrong row, and a mean for a sum."""
    scores = torch.tensor([[9.0, 1.0, 9.0, 3.0], [0.5, 9.0, 9.0, -0.5]])
    batch = {name: torch.zeros(2, 4, dtype=torch.int64) for name in ("ids", "positions", "segments")}
    batch |= {"last": torch.tensor([[1, 3], [0, 3]]), "pairs": torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 1]])}
    loss = reward.preference_loss(Told(scores), batch)  # type: ignore[arg-type]
    # differences 3 - 1 = 2, 1 - 3 = -2 and 0.5 + 0.5 = 1: -log sigmoid is log(1 + e^-x)
    by_hand = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2)) + math.log(1 + math.exp(-1))
    assert float(loss.total.detach()) == pytest.approx(by_hand) == pytest.approx(2.5671, abs=1e-4)
    assert loss.count == 3 and float(loss.figures["accuracy"]) == 2
    drawn = reward.preference_loss(Told(scores), batch, center=0.01)  # type: ignore[arg-type]
    assert float(drawn.total.detach()) == pytest.approx(by_hand + 0.01 * (4**2 + 4**2 + 0**2))


def test_scores_of_different_prompts_compare() -> None:
    """Prevents a score whose height says of which prompt a reply is: equation 1 alone does not move such an offset."""
    offset = torch.tensor([[5.0], [-5.0]], requires_grad=True)
    batch = {name: torch.zeros(2, 2, dtype=torch.int64) for name in ("ids", "positions", "segments")}
    batch |= {"last": torch.tensor([[0, 1], [0, 1]]), "pairs": torch.tensor([[0, 0, 1], [1, 0, 1]])}
    for center, moves in ((0.0, False), (0.01, True)):
        scores = offset + torch.tensor([[1.0, -1.0], [1.0, -1.0]])
        loss = reward.preference_loss(Told(scores), batch, center).total  # type: ignore[arg-type]
        grad = torch.autograd.grad(loss, offset)[0].flatten()
        assert torch.equal(grad.sign(), torch.tensor([1.0, -1.0]) * moves)


@pytest.mark.parametrize("family", [MOSS, {}])
def test_a_step_is_the_plain_formula_in_float64(family: dict[str, Any], tok: Tokenizer) -> None:
    """Prevents any slip between equation 1 and the gradient: loss and every gradient equal the formula on replies that
    are computed one at a time, in float64."""
    model = lively(tok, **family).double()
    data = Groups(PROMPTS[:3], tok, LENGTH)
    loss, count, grads = gradients(model, [micro(data, 0, len(data))])
    model.zero_grad()
    losses = []
    for preference in PROMPTS[:3]:
        scores = [plain_score(model, tok, preference, number) for number in range(6)]
        losses += [-torch.log(1 / (1 + torch.exp(scores[b] - scores[a]))) for a, b in preference.pairs]
    mean = torch.stack(losses).mean()
    mean.backward()
    assert count == len(losses) == 45
    assert loss == pytest.approx(float(mean.detach()), rel=1e-12)
    assert apart(grads, {name: w.grad for name, w in model.named_parameters() if w.grad is not None}) < 1e-12


def test_packed_is_unpacked_and_one_by_eight_is_eight_by_one(tok: Tokenizer) -> None:
    """Prevents replies that see one another, and a step that depends on how it is split: loss and gradients agree to
    1e-6 in float32, with prompts alone in a row, several in a row, and in micro-batches of one."""
    model = lively(tok)

    def whole_of(grads: dict[str, Tensor]) -> Tensor:
        return torch.cat([grad.flatten() for grad in grads.values()])

    packed = Groups(PROMPTS[:8], tok, 2 * LENGTH)
    alone = Groups(PROMPTS[:8], tok, max(len(Groups([each], tok, LENGTH)._prompts[0]) for each in PROMPTS[:8]))
    assert len(packed) < len(alone) <= 8
    whole = gradients(model, [micro(packed, 0, len(packed))])
    singles = [Groups([each], tok, LENGTH) for each in PROMPTS[:8]]
    for batches in (
        [micro(alone, 0, len(alone))],
        [micro(alone, at, 1) for at in range(len(alone))],
        [micro(alone, 0, 2), micro(alone, 2, len(alone) - 2)],
        [micro(each, 0, 1) for each in singles],
    ):
        loss, count, grads = gradients(model, batches)
        assert count == whole[1] == 120
        assert loss == pytest.approx(whole[0], rel=1e-6)
        ours, theirs = whole_of(grads), whole_of(whole[2])
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_scores_are_exact_in_a_bfloat16_model(tok: Tokenizer) -> None:
    """Prevents scores rounded to eight bits, of which nearly equal replies would have the same."""
    data = Groups(PROMPTS[:4], tok, LENGTH)
    scores = reward.scores_at(lively(tok).bfloat16(), micro(data, 0, len(data)))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


# -- scores of conversations -----------------------------------------------------------------------------------------


def test_scores_of_conversations_are_those_of_each_alone(tok: Tokenizer) -> None:
    """Prevents scores in the wrong order, of a neighbour, or that depend on what is asked beside: to 1e-6."""
    model = lively(tok)
    asked = [(each, number) for each in PROMPTS for number in range(6)]
    with torch.no_grad():
        plain = np.array([float(plain_score(model, tok, each, number)) for each, number in asked])
    dialogs = [answered(each.history, each.replies[number].text) for each, number in asked]
    found = reward.score_replies(model, tok, dialogs)
    assert found.dtype == np.float32 and found.shape == (len(asked),)
    np.testing.assert_allclose(found, plain, atol=1e-6 * np.abs(plain).max())
    assert np.array_equal(found, reward.score_replies(model, tok, dialogs))
    few = reward.score_replies(model, tok, dialogs[::-1], batch_tokens=1)
    np.testing.assert_allclose(few[::-1], plain, atol=1e-6 * np.abs(plain).max())
    assert reward.score_replies(model, tok, []).shape == (0,)
    in_training = reward.score_groups(model, Groups(PROMPTS, tok, LENGTH), reward.Reward(length=LENGTH))
    np.testing.assert_allclose(in_training, plain, atol=1e-6 * np.abs(plain).max())


def test_too_long_conversations_lose_their_oldest_turns(tok: Tokenizer) -> None:
    """Prevents a rollout that fails, or is scored without its question, because a conversation has grown long."""
    model = lively(tok)
    last = Turn("Name five fruits.", reply="Apples.")
    old = [Turn("Hello " * 300, reply="Yes"), Turn("Hello " * 300, reply="No")]
    asked = [Dialog("Be MOSS.", {}, turns) for turns in ([*old, *old, *old, last], [last])]
    assert len(encode(asked[0], tok)[0]) > model.config.max_length
    kept = next(at for at in range(7) if len(encode(Dialog("Be MOSS.", {}, asked[0].turns[at:]), tok)[0]) <= 2 * LENGTH)
    assert 0 < kept < 6
    scores = reward.score_replies(model, tok, [*asked, Dialog("Be MOSS.", {}, asked[0].turns[kept:])])
    assert abs(scores[0] - scores[2]) < 1e-4 * abs(scores[0] - scores[1])
    long = Dialog("", {}, [Turn("a", reply="word " * 3000)])
    with pytest.raises(TooLong, match=f"reads {2 * LENGTH} tokens; shorten the reply"):
        reward.score_replies(model, tok, [long])
    ids, _ = encode(long, tok)
    kept = [*ids[: 2 * LENGTH - 1], *tok.marker("<eom>")]
    with torch.no_grad():
        want = float(model(torch.tensor([kept]))[0, -1])
    assert reward.score_replies(model, tok, [long], cut=True)[0] == pytest.approx(want, rel=1e-4)
    with pytest.raises(TooLong):
        reward.score_replies(model, tok, [Dialog("", {}, [Turn("word " * 3000, reply="a")])], cut=True)


def test_another_tokenizer_is_no_hindrance(tok: Tokenizer) -> None:
    """Prevents a preference model that reads ids of the policy's tokenizer as its own: text is encoded anew."""
    other = tokenizer.train(["Name five fruits. apples pears 苹果"], vocab_size=300)
    assert other.sha256 != tok.sha256
    dialogs = [answered(PROMPTS[0].history, reply.text) for reply in PROMPTS[0].replies]
    model = lively(other, seed=4)
    with torch.no_grad():
        plain = [float(model(torch.tensor([encode(dialog, other)[0]]))[0, -1]) for dialog in dialogs]
    np.testing.assert_allclose(reward.score_replies(model, other, dialogs), plain, rtol=1e-5)


# -- figures ---------------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    """Prevents figures that flatter: accuracy with ties, the correlation with length, and percentiles."""
    scores = np.array([2.0, 0.0, 1.0, 1.0])
    decided = np.array([[0, 1], [1, 2], [2, 3], [0, 2]])  # differences 2, -1, 0, 1
    lengths = np.array([5, 3, 4, 4])  # 2, -1, 0, 1: exactly the differences of the scores
    found = reward.figures(scores, decided, lengths)
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["longer_wins"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["length_bias"] == pytest.approx(1.0)
    assert found["loss"] == pytest.approx(sum(math.log(1 + math.exp(-x)) for x in (2, -1, 0, 1)) / 4)
    assert found["low"] == pytest.approx(0.03) and found["high"] == pytest.approx(1.97)
    assert reward.figures(scores, decided, -lengths)["length_bias"] == pytest.approx(-1.0)
    assert reward.figures(scores, decided, np.full(4, 7))["length_bias"] == 0.0


def test_calibration_by_hand() -> None:
    """Prevents a calibration error that every overconfident model passes."""
    # sure are 0.881 (right), 0.881 (wrong) in one bin and 0.525 (right) in another
    apart = np.array([2.0, -2.0, 0.1])
    by_hand = (abs(2 * 0.880797 - 1) + abs(0.524979 - 1)) / 3
    assert reward.calibration_error(apart) == pytest.approx(by_hand, abs=1e-5)
    assert reward.calibration_error(np.full(5, 50.0)) == pytest.approx(0.0)
    assert reward.calibration_error(np.full(5, -50.0)) == pytest.approx(1.0)
    assert reward.calibration_error(np.zeros(5)) == 0.0
    drawn = np.random.default_rng(0).normal(0, 2, 40_000)
    fair = np.where(np.random.default_rng(1).random(40_000) < 1 / (1 + np.exp(-drawn)), drawn, -drawn)
    assert reward.calibration_error(fair) < 0.01 < 0.1 < reward.calibration_error(3 * fair)


# -- the stage -------------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[tuple[Any, ...]]:
    """What the log says of each step, but how long it took."""
    names = ("step", "loss", "grad_norm", "lr", "tokens", "learnt", "position", "accuracy")
    return [tuple(line[name] for name in names) for line in read_log(folder / "log.jsonl") if "loss" in line]


def test_the_stage_learns_and_says_what_it_learnt(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents a stage that runs and learns nothing, or whose model loads with another head or without its scores."""
    out = tmp_path / "out"
    assert reward.main(config(made, out=out, steps=40, valid=[made / "pairs.jsonl"])) == 0
    losses = [line[1] for line in lines(out)]
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < 0.6
    model, info = load_model(out), checkpoint.read_info(out)
    assert model.head_kind == "scalar" and info["stage"] == "reward"
    assert info["data"] | {"sha256": ""} == Groups(PROMPTS[:16], Tokenizer.load(out), LENGTH).record() | {"sha256": ""}
    told = info["scores"]
    assert told == next(line["valid"] for line in read_log(out / "log.jsonl") if "valid" in line)
    assert set(told) == {"loss", "accuracy", "calibration", "length_bias", "longer_wins", "low", "high"}
    assert told["accuracy"] > 0.65 and told["low"] < told["high"]
    dialogs = [answered(each.history, reply.text) for each in PROMPTS[:16] for reply in each.replies]
    scores = reward.score_replies(model, Tokenizer.load(out), dialogs)  # of weights that are rounded to bfloat16
    assert np.percentile(scores, 99) == pytest.approx(told["high"], abs=0.1 * (told["high"] - told["low"]))
    printed = capsys.readouterr().err
    assert "accuracy on held-out pairs" in printed and "16 prompts, 96 replies, 240 pairs" in printed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_is_unbroken(dtype: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents any state left out of the checkpoint: 6 steps and 3 + 3 give equal weights, logs and scores, bit for
    bit, across the end of an epoch and with validation in between."""
    whole = config(made, steps=6, dtype=dtype, out=tmp_path / "unbroken")
    assert reward.main(whole) == 0
    broken = dataclasses.replace(whole, out=tmp_path / "broken", save_every=2)
    with monkeypatch.context() as patch:
        original = loop.judge

        def stop_after_three(state: loop.State, loss: float, norm: float) -> str:
            if state.step == 3:
                signal.raise_signal(signal.SIGTERM)
            return original(state, loss, norm)

        patch.setattr(loop, "judge", stop_after_three)
        assert reward.main(broken) == 0
    assert not (tmp_path / "broken" / "moss.json").exists()
    torch.manual_seed(99)
    assert reward.main(dataclasses.replace(broken, resume=True)) == 0
    assert lines(tmp_path / "broken") == lines(tmp_path / "unbroken")
    ends = [tmp_path / name / "model.safetensors" for name in ("unbroken", "broken")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    told = [checkpoint.read_info(tmp_path / name)["scores"] for name in ("unbroken", "broken")]
    assert told[0] == told[1] and told[0]
    # killed between the last checkpoint and the finished model: the scores of that step are known still
    (tmp_path / "broken" / "moss.json").unlink()
    assert reward.main(dataclasses.replace(broken, resume=True)) == 0
    assert checkpoint.read_info(tmp_path / "broken")["scores"] == told[0]


def test_pairs_without_levels_and_bad_input(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents a stage for its own material alone, a traceback for bad input, and a folder left behind by it."""
    texts = [
        {"chosen": f"\n\nHuman: {n}?\n\nAssistant: Yes {n}", "rejected": f"\n\nHuman: {n}?\n\nAssistant: No"}
        for n in range(8)
    ]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    assert reward.main(config(made, data=[file], valid=[file], out=tmp_path / "a", steps=2)) == 0
    assert "8 prompts, 16 replies, 8 pairs" in capsys.readouterr().err
    file.write_text(json.dumps(texts[0]) + '\n{"chosen": "x"}\n')
    with pytest.raises(ValueError, match=r"texts\.jsonl:2: a preference row"):
        reward.main(config(made, data=[file], out=tmp_path / "b"))
    file.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        reward.main(config(made, data=[file], out=tmp_path / "b"))
    file.write_text(json.dumps({"chosen": texts[0]["chosen"], "rejected": texts[0]["chosen"]}))
    with pytest.raises(ValueError, match="1 rows have no pair"):
        reward.main(config(made, data=[file], out=tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_without_data_the_material_is_drawn(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a stage that needs files before it can be tried, or that is judged on what it was trained on."""
    monkeypatch.setattr(reward, "MATERIAL", 6)
    monkeypatch.setattr(reward, "HELD_OUT", 3)
    assert reward.main(config(made, data=[], valid=[], out=tmp_path / "out", steps=1, batch_tokens=LENGTH)) == 0
    known, held_out = sorted((tmp_path / "out" / "material").iterdir(), key=lambda file: file.stat().st_size)[::-1]
    assert [row.history.extra["split"] for row in pairs.read(known)] == ["known"] * 6
    assert [row.history.extra["split"] for row in pairs.read(held_out)] == ["held_out"] * 3


def test_real_pairs_make_rows(tok: Tokenizer) -> None:
    """Prevents a loss that the real file breaks: its rows pack, most of them fit, and a step is finite."""
    if "MOSS_TEST_DATA" not in os.environ:
        pytest.skip("set MOSS_TEST_DATA to the folder with real data")
    file = Path(os.environ["MOSS_TEST_DATA"]) / "hh_harmless_pairs.jsonl"
    groups = Groups(islice(pairs.read(file), 100), tok, 2 * LENGTH)
    assert len(groups.preferences) > 80 and groups.dropped["no pair"] == 0
    loss, count, _ = gradients(lively(tok), [micro(groups, 0, 2)])
    assert math.isfinite(loss) and count >= 2


def test_table_says_kinds_and_levels(tok: Tokenizer) -> None:
    """Prevents a table that hides a kind that is not learnt, and rows without levels left out."""
    untold = Preference(Dialog("", {}, [Turn("a")]), [Reply("b"), Reply("c")], [(0, 1)])
    data = Groups([*PROMPTS[:4], untold], tok, LENGTH)
    perfect = np.zeros(len(data.replies))
    for index, (prompt, number) in enumerate(data.replies):
        perfect[index] = data.preferences[prompt].replies[number].level or 0
    shown = reward.table(perfect, data)
    cells = {column.header: list(column.cells) for column in shown.columns}
    assert cells["kind"][-1] == "all" and cells["pairs"][-1] == "61"
    assert set(cells) == {"kind", "pairs", "all", "20", "40", "60", "80", "100", "any"}
    assert cells["all"][cells["kind"].index("pairs")] == "50.0%" and cells["20"][-1] == "100.0%"
