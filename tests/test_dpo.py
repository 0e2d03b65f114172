"""Direct preference optimisation: the loss against plain formulas, its packing, the frozen reference, and the stage."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moss import checkpoint, tokenizer
from moss.chat import Dialog, Turn
from moss.data.pairs import Groups, Preference, Reply, answered, encode, to_json
from moss.errors import UsageError
from moss.log import read as read_log
from moss.model import Decoder, ModelConfig
from moss.tokenizer import Tokenizer
from moss.train import dpo, loop, machine
from moss.weights import load_model, save_model

LENGTH = 1024
BETA = 0.3
WORDS = "red green blue old new big small one two three four five".split()


def preference(number: int) -> Preference:
    """A question with six replies, of which the longer is the better one; each number makes another question."""
    turns = [Turn(f"Say {WORDS[number]} and {WORDS[-number]}.")]
    if number % 4 == 0:
        turns.insert(0, Turn("Hello", reply="Hi"))
    replies = [Reply(" ".join(WORDS[(number + at) % 12] for at in range(size))) for size in (3, 1, 6, 4, 2, 5)]
    order = sorted(range(6), key=lambda at: -len(replies[at].text.split()))
    return Preference(Dialog("Be MOSS.", {}, turns), replies, list(combinations(order, 2)))


PROMPTS = [preference(number) for number in range(12)]


def lively(tok: Tokenizer, seed: int = 0, **values: Any) -> Decoder:
    """A model of one layer whose weights are far from zero, so that replies differ in likelihood."""
    model = Decoder(ModelConfig.from_depth(1, tok.vocab_size, 2 * LENGTH, **values))
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
    """A folder with preference rows and a toy to start from."""
    folder = tmp_path_factory.mktemp("dpo")
    lines = [json.dumps(to_json(each), ensure_ascii=False) + "\n" for each in PROMPTS]
    (folder / "pairs.jsonl").write_text("".join(lines[:8]))
    (folder / "valid.jsonl").write_text("".join(lines[8:]))
    save_model(lively(tok), folder / "base")
    tok.save(folder / "base")
    return folder


def config(folder: Path, **more: Any) -> dpo.DPO:
    values: dict[str, Any] = {
        "data": [folder / "pairs.jsonl"],
        "model": folder / "base",
        "length": 256,
        "batch_tokens": 512,
        "lr": 1e-3,
        "matrix_lr": 0.0,
        "compile": "off",
        "dtype": "float32",
        "warmup": 0,
    }
    return dpo.DPO(**(values | more))


def micro(data: dpo.Referenced, position: int, count: int) -> loop.Micro:
    return machine.to_device(data.batch(position, count), torch.device("cpu"))


def gradients(model: Decoder, batches: list[loop.Micro]) -> tuple[float, int, dict[str, Tensor], dict[str, float]]:
    """(loss, pairs, gradient by name, figures) of one step."""
    model.zero_grad()
    loss, _, count, figures = loop.gradients(model, model, partial(dpo.dpo_loss, beta=BETA), batches)
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return loss, count, grads, figures


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The distance of two gradients, as a share of their length."""
    difference = math.sqrt(sum(float(((a[name] - b[name]) ** 2).sum()) for name in a))
    return difference / math.sqrt(sum(float((b[name] ** 2).sum()) for name in b))


def plain_log_prob(model: Decoder, tok: Tokenizer, preference: Preference, number: int) -> Tensor:
    """log p(reply | history), written as one would without packing: the sum over the reply's ids and its `<eom>`."""
    ids, start = encode(answered(preference.history, preference.replies[number].text), tok)
    told = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    return sum((told[at - 1, ids[at]] for at in range(start, len(ids))), torch.zeros((), dtype=told.dtype))


MOSS = {"family": "moss", "tie_embeddings": False, "qk_norm": False}


@pytest.mark.parametrize("family", [MOSS, {}])
def test_a_step_is_the_plain_formula_in_float64(family: dict[str, Any], tok: Tokenizer) -> None:
    """Prevents any slip between paper and gradient: a wrong sign, the prompt's tokens in the sum, a mean for a sum,
    pairs of the wrong documents. Loss and every gradient equal the formula on single replies, in float64."""
    model, first = lively(tok, **family).double(), lively(tok, seed=5, **family).double()
    prompts = PROMPTS[:3]
    data = dpo.Referenced(Groups(prompts, tok, LENGTH), 1)
    with torch.no_grad():
        data.reference = np.array(
            [float(plain_log_prob(first, tok, prompts[p], number)) for p, number in data.groups.replies]
        )
    loss, count, grads, figures = gradients(model, [micro(data, 0, len(data))])
    model.zero_grad()
    losses, margins, chosen = [], [], []
    for preference in prompts:
        policy = [plain_log_prob(model, tok, preference, number) for number in range(6)]
        with torch.no_grad():
            frozen = [plain_log_prob(first, tok, preference, number) for number in range(6)]
        for winner, loser in preference.pairs:
            margin = BETA * ((policy[winner] - frozen[winner]) - (policy[loser] - frozen[loser]))
            losses.append(-torch.log(1 / (1 + torch.exp(-margin))))
            margins.append(float(margin.detach()))
            chosen.append(float(policy[winner].detach()))
    mean = torch.stack(losses).mean()
    mean.backward()
    assert count == len(losses) == 45
    assert loss == pytest.approx(float(mean.detach()), rel=1e-12)
    assert apart(grads, {name: w.grad for name, w in model.named_parameters() if w.grad is not None}) < 1e-12
    assert figures["margin"] == pytest.approx(sum(margins) / 45, rel=1e-9)
    assert figures["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 45)
    assert figures["winner_logp"] == pytest.approx(sum(chosen) / 45, rel=1e-9)
    assert figures["winner_reward"] - figures["loser_reward"] == pytest.approx(figures["margin"], rel=1e-9)


def test_packed_is_unpacked_and_one_by_eight_is_eight_by_one(tok: Tokenizer) -> None:
    """Prevents replies that see their neighbours, and a step that depends on how it is split: loss and gradients
    agree to 1e-6 in float32, with four prompts in a row, with one, and in micro-batches of one."""
    model = lively(tok)
    reference = np.random.default_rng(0).normal(-150, 5, 48)  # of the six replies of eight prompts
    packed = dpo.Referenced(Groups(PROMPTS[:8], tok, 512), 1, reference=reference)
    alone = dpo.Referenced(Groups(PROMPTS[:8], tok, 128), 1, reference=reference)
    singles = [
        dpo.Referenced(Groups([each], tok, 128), 1, reference=part)
        for each, part in zip(PROMPTS[:8], reference.reshape(8, 6), strict=True)
    ]
    assert len(packed) == 2 and len(alone) == len(singles) == 8
    whole = gradients(model, [micro(packed, 0, len(packed))])
    others = [
        gradients(model, [micro(alone, 0, len(alone))]),
        gradients(model, [micro(alone, at, 1) for at in range(len(alone))]),
        gradients(model, [micro(alone, 0, 2), micro(alone, 2, len(alone) - 2)]),
        gradients(model, [micro(each, 0, 1) for each in singles]),
    ]
    for loss, count, grads, figures in others:
        assert count == whole[1] == 120
        assert loss == pytest.approx(whole[0], rel=1e-6)
        assert apart(grads, whole[2]) < 1e-6
        assert figures == pytest.approx(whole[3], rel=1e-5, abs=1e-5)


def test_the_reference_is_the_model_as_it_began(made: Path, tok: Tokenizer) -> None:
    """Prevents a reference that drifts, is of another row, or counts the prompt: it is the plain log-probability of
    each reply, and with it the first loss is log 2."""
    model = load_model(made / "base")
    for length, rows in ((LENGTH, 8), (256, 1), (256, 3)):
        data = dpo.Referenced(Groups(PROMPTS[:4], tok, length), rows)
        data.use(model)
        with torch.no_grad():
            plain = [float(plain_log_prob(model, tok, PROMPTS[p], number)) for p, number in data.groups.replies]
        np.testing.assert_allclose(data.reference, plain, rtol=1e-5)
    loss, _, _, figures = gradients(model, [micro(data, 0, len(data))])
    assert loss == pytest.approx(math.log(2), abs=1e-6) and abs(figures["margin"]) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_step_has_no_margin(dtype: str, made: Path, tmp_path: Path) -> None:
    """Prevents noise for margins: the reference is computed in the dtype and in the rows of training."""
    assert dpo.main(config(made, out=tmp_path / "run", steps=1, dtype=dtype)) == 0
    (line,) = [line for line in read_log(tmp_path / "run/log.jsonl") if "loss" in line]
    assert line["margin"] == 0.0 and line["accuracy"] == 0.5
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_stage_learns(made: Path, tmp_path: Path) -> None:
    """Prevents a stage that runs and learns nothing, or learns the pairs the wrong way round."""
    valid = [made / "pairs.jsonl"]
    assert dpo.main(config(made, out=tmp_path / "run", steps=20, valid=valid, save_every=10)) == 0
    lines = read_log(tmp_path / "run/log.jsonl")
    told = [line["valid"] for line in lines if "valid" in line]
    assert len(told) == 2 and told[1]["margin"] > told[0]["margin"] > 0
    assert told[1]["accuracy"] > 0.9 and told[1]["loss"] < told[0]["loss"] < math.log(2)
    info = checkpoint.read_info(tmp_path / "run")
    assert info["stage"] == "dpo" and info["run"]["beta"] == 0.1 and info["data"]["pairs"] == 120
    assert load_model(tmp_path / "run").head_kind == "lm"


def test_resumed_is_unbroken_without_the_first_model(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a resumed run that takes its own weights for the reference: 6 steps and 3 + 3 are equal bit for bit,
    although the folder of the first model has gone in between."""
    shutil.copytree(made / "base", tmp_path / "base")
    whole = config(made, out=tmp_path / "whole", steps=6, model=tmp_path / "base")
    assert dpo.main(whole) == 0
    broken = dataclasses.replace(whole, out=tmp_path / "broken")
    with monkeypatch.context() as patch:
        original = loop.judge

        def stop_after_three(state: loop.State, loss: float, norm: float) -> str:
            if state.step == 3:
                signal.raise_signal(signal.SIGTERM)
            return original(state, loss, norm)

        patch.setattr(loop, "judge", stop_after_three)
        assert dpo.main(broken) == 0
    assert not (tmp_path / "broken/moss.json").exists()
    shutil.rmtree(tmp_path / "base")
    assert dpo.main(dataclasses.replace(broken, resume=True)) == 0
    one, other = (tmp_path / name / "step-000006" for name in ("whole", "broken"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    states = [checkpoint.load(end)[1]["data"]["reference"] for end in (one, other)]
    assert torch.equal(*states)
    figures = [
        [(line["step"], line["loss"], line["margin"]) for line in read_log(tmp_path / name / "log.jsonl")]
        for name in ("whole", "broken")
    ]
    assert figures[0] == figures[1]


def test_validation_after_a_resumption_asks_the_first_model(made: Path, tmp_path: Path) -> None:
    """Prevents held-out margins that begin at 0 again when a run goes on."""
    first = config(made, out=tmp_path / "run", steps=8, valid=[made / "valid.jsonl"])
    assert dpo.main(first) == 0
    assert dpo.main(dataclasses.replace(first, resume=True, steps=9)) == 0
    told = [line["valid"]["margin"] for line in read_log(tmp_path / "run/log.jsonl") if "valid" in line]
    assert len(told) == 2 and told[1] == pytest.approx(told[0], rel=0.5) and told[0] != 0
    with pytest.raises(ValueError, match="--valid must stay as it was"):
        dpo.main(dataclasses.replace(first, resume=True, steps=10, valid=[made / "pairs.jsonl"]))
    assert dpo.main(dataclasses.replace(first, resume=True, steps=10, valid=[])) == 0


def test_data_without_a_pair_is_refused(made: Path, tmp_path: Path) -> None:
    """Prevents training on nothing, and a folder that is left behind."""
    row = to_json(PROMPTS[0]) | {"pairs": [[0, 1, "nobody", 0, True]]}
    (tmp_path / "ties.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="no preference to learn from: 1 rows have no pair"):
        dpo.main(config(made, out=tmp_path / "run", data=[tmp_path / "ties.jsonl"]))
    assert not (tmp_path / "run").exists()


def test_a_beta_of_zero_is_refused(made: Path, tmp_path: Path) -> None:
    """Prevents a run to its end whose every gradient is 0."""
    with pytest.raises(UsageError, match="--beta is 0: then every margin is 0"):
        dpo.main(config(made, out=tmp_path / "run", beta=0.0))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif("MOSS_TEST_DATA" not in os.environ, reason="MOSS_TEST_DATA names the folder of real data")
def test_chosen_and_rejected_texts_are_learnt(made: Path, tmp_path: Path) -> None:
    """Prevents a stage that only knows our own rows: the released pairs of helpful and harmless replies."""
    lines = (Path(os.environ["MOSS_TEST_DATA"]) / "hh_harmless_pairs.jsonl").read_text().splitlines()[:40]
    (tmp_path / "hh.jsonl").write_text("\n".join(lines) + "\n")
    assert (
        dpo.main(
            config(
                made, out=tmp_path / "run", data=[tmp_path / "hh.jsonl"], steps=2, length=LENGTH, batch_tokens=LENGTH
            )
        )
        == 0
    )
    assert checkpoint.read_info(tmp_path / "run")["data"]["pairs"] > 10
