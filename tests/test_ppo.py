"""PPO: its step against the plain formula, its reasons to end, and the stage from end to end on a toy."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moss import checkpoint, tokenizer
from moss.chat import Dialog, Turn
from moss.data.dialogs import to_row
from moss.errors import UsageError
from moss.log import read as read_log
from moss.model import Decoder, ModelConfig
from moss.optim import make_optimizer
from moss.tokenizer import Tokenizer
from moss.train import loop, ppo, rollouts
from moss.train.machine import to_device
from moss.train.ppo import PPO, ActorCritic, critic_from, fingerprint, ppo_loss, reply_log_probs, why_stop
from moss.train.reward import load_judge
from moss.train.rollouts import FIGURES, Rollouts, fit
from moss.weights import load_model, save_model
from tests.ranks import on_ranks

CPU = torch.device("cpu")
WORDS = "one two three four five six seven eight nine ten red green blue old new big small".split()


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer.train((" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))), vocab_size=300)


def lively(tok: Tokenizer, seed: int = 0, head: str = "lm", scale: float = 1.0) -> Decoder:
    """A model of one layer with random weights everywhere."""
    model = Decoder(ModelConfig.from_depth(1, tok.vocab_size, 128, tie_embeddings=False), head)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, scale * weight.shape[1] ** -0.5, generator=generator)
    return model


def questions(count: int = 6) -> list[Dialog]:
    return [Dialog("", {}, [Turn(f"{WORDS[i]} {WORDS[-i]}?")]) for i in range(count)]


def by_letters(asked: Sequence[Dialog]) -> np.ndarray:
    return np.array([dialog.turns[-1].reply.count("e") for dialog in asked], dtype=np.float64)


def made(tok: Tokenizer, *, dtype: torch.dtype = torch.float32, scale: float = 1.0, **values: Any) -> Rollouts:
    """Rollouts of a toy policy, a critic that has an opinion, and the reference that the policy began as."""
    policy, first = lively(tok, scale=scale), lively(tok, scale=scale).to(dtype)
    net = ActorCritic(policy, lively(tok, 7, "scalar")).to(dtype)
    values = {"length": 64, "replies": 8, "max_tokens": 8, "score": by_letters, "passes": 2, **values}
    prompts = fit(questions(), tok, values["length"], values["max_tokens"])
    return Rollouts(prompts, tok, net, lambda batch: reply_log_probs(first, batch), **values)


def moved(net: nn.Module, by: float) -> None:
    """Other weights, as after some updates."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.empty_like(weight).normal_(0, by, generator=generator))


# ---------------------------------------------------------------- the loss


def plain_loss(net: ActorCritic, batch: dict[str, np.ndarray]) -> Tensor:
    """PPO's loss written down once more: reply by reply, token by token, on whole forwards of single rows."""
    total = torch.zeros((), dtype=torch.float64)
    for line in range(len(batch["ids"])):
        for segment in range(1, batch["segments"][line].max() + 1):
            here = batch["segments"][line] == segment
            row = {name: value[line][here] for name, value in batch.items() if name != "block"}
            ids = torch.from_numpy(row["ids"])[None]
            log_probs = net.policy(ids)[0].log_softmax(dim=-1)
            values = net.critic(ids)[0]
            for at in np.flatnonzero(row["mask"]):
                ratio = (log_probs[at - 1, row["ids"][at]] - row["old_log_probs"][at]).exp()
                advantage = row["advantages"][at]
                held = ratio.clamp(0.8, 1.2)
                total = total - min(ratio * advantage, held * advantage)
                value, old = values[at - 1], row["old_values"][at]
                near = old + (value - old).clamp(-0.2, 0.2)
                worse = max((value - row["returns"][at]) ** 2, (near - row["returns"][at]) ** 2)
                total = total + 0.1 * 0.5 * worse
    return total


def test_a_step_is_the_plain_formula(tok: Tokenizer) -> None:
    """Prevents any slip between the formula and the packed, chunked, clipped computation: loss and all gradients in
    float64, on weights that have moved so far that ratios and values are clipped."""
    data = made(tok, dtype=torch.float64)
    data.batch(0, 8)
    moved(data.net, 0.05)  # type: ignore[arg-type]
    arrays = data.batch(8, 8)
    loss = ppo_loss(data.net, to_device(arrays, CPU))  # type: ignore[arg-type]
    count = int(arrays["mask"].sum())
    assert loss.count == count
    assert 0.05 < float(loss.figures["clipped"]) / count < 0.95 and float(loss.figures["value_clipped"]) > 0
    weights = list(data.net.parameters())  # type: ignore[attr-defined]
    mine = torch.autograd.grad(loss.total, weights)
    plain = plain_loss(data.net, arrays)  # type: ignore[arg-type]
    theirs = torch.autograd.grad(plain, weights)
    assert float(loss.total.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()))


def test_at_the_first_minibatch_every_ratio_is_one(tok: Tokenizer) -> None:
    """Prevents a first step that is off-policy: nothing is clipped, the loss of the policy is minus the sum of the
    advantages, and the figures of the block are those of the log."""
    for dtype in (torch.float32, torch.bfloat16):
        data = made(tok)
        data.use(loop.computing_copy(data.net, dtype))  # type: ignore[arg-type]
        data.reference = lambda batch, data=data: reply_log_probs(data.net.policy, batch)
        batch = to_device(data.batch(0, 4), CPU)
        loss = ppo_loss(data.net, batch)  # type: ignore[arg-type]
        assert float(loss.figures["ratio"]) == loss.count
        assert float(loss.figures["clipped"]) == 0 == float(loss.figures["drift"])
        assert data.block is not None and data.block.figures["kl"] == 0
        for name in FIGURES:
            assert float(loss.figures[name]) / loss.count == pytest.approx(data.block.figures[name])


def test_one_by_eight_is_eight_by_one(tok: Tokenizer) -> None:
    """Prevents a loss that depends on packing or on micro-batches: whole, in two and one reply at a time."""
    data = made(tok)
    data.batch(0, 8)
    moved(data.net, 0.02)  # type: ignore[arg-type]
    losses, grads = [], []
    for micro in (8, 4, 1):
        data.net.zero_grad(set_to_none=True)  # type: ignore[attr-defined]
        parts = [to_device(data.batch(at, micro), CPU) for at in range(0, 8, micro)]
        loss, _, count, _ = loop.gradients(data.net, data.net, ppo_loss, parts)  # type: ignore[arg-type]
        losses.append(loss)
        grads.append(torch.cat([weight.grad.flatten() for weight in data.net.parameters()]))  # type: ignore[attr-defined]
        assert count == sum(int(part["mask"].sum()) for part in parts)
    for loss, grad in zip(losses[1:], grads[1:]):
        assert loss == pytest.approx(losses[0], rel=1e-6)
        assert float((grad - grads[0]).norm() / grads[0].norm()) < 1e-6


def test_the_critic_starts_as_the_preference_model(tok: Tokenizer) -> None:
    """Prevents a critic on weights that are shared with what it was made from, or whose head is lost."""
    judge = lively(tok, 3, "scalar")
    critic = critic_from(judge)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(critic(ids), judge(ids)) and critic.embed.weight.data_ptr() != judge.embed.weight.data_ptr()
    policy = lively(tok, 3)
    critic = critic_from(policy)
    assert critic.head_kind == "scalar" and not critic(ids).any()
    assert torch.equal(critic.hidden(ids), policy.hidden(ids))
    assert fingerprint(judge) != fingerprint(lively(tok, 4, "scalar")) and fingerprint(judge) == fingerprint(judge)


# ---------------------------------------------------------------- it learns


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_toy_reward_rises(tok: Tokenizer, dtype: torch.dtype) -> None:
    """Prevents a sign that is wrong anywhere between the score and the weights: more letters e, within seconds."""
    data = made(tok, replies=32, scale=0.3)
    model = data.net
    net = loop.computing_copy(model, dtype)  # type: ignore[arg-type]
    data.use(net)

    def batches(position: int) -> tuple[list[loop.Micro], int]:
        return [to_device(data.batch(position, 16), CPU)], position + 16

    optimizer = make_optimizer(model, lr=5e-3, weight_decay=0.0, muon=False)  # type: ignore[arg-type]
    loop.run(model, batches, ppo_loss, optimizer, lambda _: 1.0, steps=40, state=loop.State(), net=net)  # type: ignore[arg-type]
    rewards = [block["reward"] for block in data.history]
    assert len(rewards) == 10
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 1
    assert data.history[-1]["kl"] > 0.1


# ---------------------------------------------------------------- when to end


def history(blocks: int = 30, **changed: Any) -> list[dict[str, float]]:
    """A healthy run: the reward rises, the rest moves a little. `changed` gives a figure as a function of the block."""
    figures: dict[str, Any] = {
        "reward": lambda k: 1 + 0.1 * k,
        "objective": lambda k: 1 + 0.1 * k - 0.002 * k,
        "kl": lambda k: 0.1 * k,
        "length": lambda k: 20 + 0.1 * k,
        "ended": lambda _: 0.95,
        "distinct": lambda k: max(0.5, 0.7 - 0.005 * k),
        "slope": lambda _: 0.01,
    } | changed
    return [{name: float(figure(k)) for name, figure in figures.items()} for k in range(blocks)]


def ends(blocks: list[dict[str, float]]) -> tuple[int, str]:
    """(block after which training ends, cause); the number of blocks where it does not."""
    for seen in range(len(blocks) + 1):
        if cause := why_stop(blocks[:seen]):
            return seen, cause
    return len(blocks), ""


def test_a_healthy_run_is_left_alone() -> None:
    """Prevents training that ends for no reason: rising rewards, longer answers that are better for other reasons than
    their length, noise in the KL of the first blocks, a beginning that does not move yet."""
    assert set(history()[0]) == set(FIGURES)
    assert ends(history(100)) == (100, "")
    assert ends(history(60, length=lambda k: 20 + k)) == (60, "")  # 0.01 a token: 0.6 of the 6 that it gained
    assert ends(history(60, kl=lambda k: 0.02 * (-1) ** k)) == (60, "")
    flat = {name: (lambda k: 1.0) for name in ("reward", "objective")}
    assert ends(history(100, **flat)) == (100, "")  # nothing gained, so nothing saturated


def test_negative_kl_ends_training() -> None:
    """Prevents a run that trains on log-probabilities of another model than the one that writes."""
    end, cause = ends(history(kl=lambda k: 0.1 if k < 8 else -0.3))
    assert end == 11 and cause.startswith("negative KL: -0.300 nats")
    assert ends(history(kl=lambda k: -0.3 if k % 3 else 0.1))[1] == ""  # not block after block


def test_collapse_ends_training() -> None:
    """Prevents a model that says one thing to everybody."""
    end, cause = ends(history(distinct=lambda k: 0.7 if k < 10 else 0.1))
    assert 11 <= end <= 13 and cause.startswith("collapse: the share of distinct pairs of tokens fell from 0.700")


def test_length_gaming_ends_training() -> None:
    """Prevents a model that is paid by the token: 20 to 40 tokens at 0.1 each explain the 2 that the reward gained."""
    longer = {"length": lambda k: 20 + 2 * k, "slope": lambda _: 0.1, "reward": lambda k: 1 + 0.2 * k}
    end, cause = ends(history(**longer))
    assert cause.startswith("length gaming: replies grew from 22 to ") and 7 <= end <= 11
    # The same growth while the reward falls: what a token brings is chased all the same.
    assert "length gaming" in ends(history(**(longer | {"reward": lambda k: 1 - 0.1 * k})))[1]
    # Within a block longer replies are worth less: then it is not the length that pays.
    assert "length gaming" not in ends(history(**(longer | {"slope": lambda _: -0.1})))[1]


def test_reward_saturation_ends_training() -> None:
    """Prevents hours of blocks that bring nothing: risen, then flat."""
    end, cause = ends(history(60, objective=lambda k: min(k, 15) / 10))
    assert cause.startswith("reward saturation: 1.500 over the last 8 blocks, 1.500 over those before") and end == 31


# ---------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def folder(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, a policy, and two preference models: one with the policy's tokenizer, one with another."""
    made_in = tmp_path_factory.mktemp("ppo")
    rows = [to_row(Dialog("", {}, [Turn(f"{WORDS[i]}?", reply="red")]), "moss") for i in range(16)]
    (made_in / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    other = tokenizer.train(["old new big small " * 20], vocab_size=290)
    for name, model, its in (
        ("policy", lively(tok), tok),
        ("judge", lively(tok, 7, "scalar"), tok),
        ("other", Decoder(ModelConfig.from_depth(1, other.vocab_size, 128), "scalar"), other),
    ):
        with torch.no_grad():
            assert model.head is not None
            model.head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        save_model(model, made_in / name)
        its.save(made_in / name)
    return made_in


def config(folder: Path, **more: Any) -> PPO:
    values: dict[str, Any] = {
        "data": [folder / "chat.jsonl"],
        "model": folder / "policy",
        "reward": folder / "judge",
        "batch_tokens": 4 * 64,
        "length": 64,
        "max_tokens": 8,
        "lr": 1e-3,
        "compile": "off",
        "dtype": "float32",
        "steps": 12,
    }
    return PPO(**(values | more))


def told(folder: Path) -> list[dict[str, Any]]:
    """What the log says of each step, but how long it took."""
    lines = [line for line in read_log(folder / "log.jsonl") if "loss" in line]
    return [
        {name: value for name, value in line.items() if "second" not in name and "_per_" not in name} for line in lines
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_is_unbroken(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Prevents anything left out of the checkpoint: 12 steps, and 6 + 6 with the break in the middle of a block of 4,
    give equal policies, critics and logs, bit for bit."""
    assert ppo.main(config(folder, out=tmp_path / "unbroken", dtype=dtype)) == 0
    broken = config(folder, out=tmp_path / "broken", dtype=dtype)
    with monkeypatch.context() as patch:
        judge = loop.judge

        def stop_after_six(state: loop.State, loss: float, norm: float) -> str:
            if state.step == 6:
                signal.raise_signal(signal.SIGTERM)
            return judge(state, loss, norm)

        patch.setattr(loop, "judge", stop_after_six)
        assert ppo.main(broken) == 0
    assert [step for step, _ in checkpoint.steps(tmp_path / "broken")] == [6]
    torch.manual_seed(99)
    assert ppo.main(dataclasses.replace(broken, resume=True)) == 0
    assert told(tmp_path / "broken") == told(tmp_path / "unbroken")
    for name in ("model.safetensors", "critic/model.safetensors"):
        mine, theirs = (tmp_path / run / "step-000012" / name for run in ("broken", "unbroken"))
        assert mine.read_bytes() == theirs.read_bytes(), name


def on_a_rank(config: PPO) -> tuple[int, list[float]]:
    """The stage on one of several ranks: what it returned, and the losses where there is a log."""
    code = ppo.main(config)
    return code, [step["loss"] for step in told(config.out)]


@pytest.mark.slow
def test_two_ranks_are_one(folder: Path, tmp_path: Path) -> None:
    """Prevents ranks that write different blocks, wait for each other, or train on what the other wrote only: two
    blocks on two processes give the losses of one."""
    assert ppo.main(config(folder, out=tmp_path / "one", steps=6)) == 0
    results = on_ranks(2, on_a_rank, config(folder, out=tmp_path / "two", steps=6))
    assert [code for code, _ in results] == [0, 0]
    one = [step["loss"] for step in told(tmp_path / "one")]
    assert one == pytest.approx(results[0][1], rel=1e-4, abs=1e-5)
    two = [step["reward"] for step in told(tmp_path / "two")]
    assert two == pytest.approx([step["reward"] for step in told(tmp_path / "one")])


def test_the_stage_leaves_a_model_and_its_figures(folder: Path, tmp_path: Path) -> None:
    """Prevents a run whose model cannot be loaded, whose first ratios are not 1, or whose log says nothing."""
    assert ppo.main(config(folder, out=tmp_path / "run", steps=5, dtype="bfloat16")) == 0
    steps = told(tmp_path / "run")
    assert steps[0]["ratio"] == 1 and steps[0]["kl"] == 0 and steps[0]["clipped"] == 0
    assert steps[4]["kl"] != 0 and steps[4]["reward"] != steps[0]["reward"]  # the second block
    assert {*FIGURES, "clipped", "value_error", "learnt"} <= set(steps[0])
    model = load_model(tmp_path / "run")
    info = checkpoint.read_info(tmp_path / "run")
    assert model.head_kind == "lm" and info["stage"] == "ppo" and info["data"]["rows"] == 16
    before = load_model(folder / "policy")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


def test_a_preference_model_with_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Prevents a refusal, and ids of one vocabulary in the other's model: replies go to it as text."""
    assert ppo.main(config(folder, out=tmp_path / "run", reward=folder / "other", steps=2)) == 0
    critic = load_model(tmp_path / "run" / "step-000002" / "critic")
    assert critic.config.vocab_size == load_model(folder / "policy").config.vocab_size


def test_a_preference_model_that_reads_little(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents a run that dies in its third block, and again after each --resume, because a reply that was drawn takes
    more of the preference model's tokens than it can read."""
    tok = Tokenizer.load(folder / "other")
    tok.save(tmp_path / "small")
    save_model(Decoder(ModelConfig.from_depth(1, tok.vocab_size, 60), "scalar"), tmp_path / "small")
    assert ppo.main(config(folder, out=tmp_path / "run", reward=tmp_path / "small")) == 0
    save_model(Decoder(ModelConfig.from_depth(1, tok.vocab_size, 46), "scalar"), tmp_path / "small")
    assert ppo.main(config(folder, out=tmp_path / "less", reward=tmp_path / "small", steps=1)) == 0
    assert "8 prompts dropped, since the preference model reads only 46 tokens" in capsys.readouterr().err
    save_model(Decoder(ModelConfig.from_depth(1, tok.vocab_size, 16), "scalar"), tmp_path / "small")
    with pytest.raises(ValueError, match="reads 16 tokens, too few for any prompt"):
        ppo.main(config(folder, out=tmp_path / "none", reward=tmp_path / "small"))


def test_training_ends_for_a_cause_that_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an early end that loses the model, or says nothing."""
    monkeypatch.setattr(ppo, "why_stop", lambda blocks: "collapse: for the test" if len(blocks) > 1 else "")
    assert ppo.main(config(folder, out=tmp_path / "run", steps=100)) == 0
    info = checkpoint.read_info(tmp_path / "run")
    assert info["loop"]["step"] == 5 and info["loop"]["ended"] == "collapse: for the test"
    assert load_model(tmp_path / "run").head_kind == "lm"


def test_bad_input_is_one_line(folder: Path, tmp_path: Path) -> None:
    """Prevents a run on a language model as the judge, without room for a prompt, or on another run's blocks."""
    with pytest.raises(ValueError, match="no preference model; `moss train reward`"):
        load_judge(tmp_path)
    with pytest.raises(ValueError, match="language model; a preference model has a scalar head"):
        ppo.main(config(folder, out=tmp_path / "a", reward=folder / "policy"))
    with pytest.raises(UsageError, match="--max-tokens 64 leaves no room"):
        ppo.main(config(folder, out=tmp_path / "b", max_tokens=64))
    with pytest.raises(ValueError, match="none of 16 prompts fits"):
        ppo.main(config(folder, out=tmp_path / "c", max_tokens=60))
    assert ppo.main(config(folder, out=tmp_path / "d", steps=1)) == 0
    again = config(folder, out=tmp_path / "d", steps=2, resume=True, reward=folder / "other")
    with pytest.raises(ValueError, match="does not fit this run"):
        ppo.main(again)


def test_defaults_are_the_papers() -> None:
    """Prevents a drift of what section 7.2 states: clip 0.2, beta 0.02, 32 replies a step, a tenth of warm-up."""
    assert (ppo.CLIP, PPO().beta, PPO().batch_tokens // PPO().length, PPO().warmup) == (0.2, 0.02, 32, 0.1)
    assert len(dataclasses.fields(PPO)) <= 25 and math.isclose(rollouts.GAMMA, 1)
