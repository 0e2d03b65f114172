"""What PPO learns from: who writes the replies, on which weights, what tokens earn, and what a killed run keeps."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moss import lora, tokenizer
from moss.chat import Dialog, Round, Turn, render
from moss.data.pack import Rows
from moss.engine import Sampling
from moss.model import Decoder, ModelConfig
from moss.tokenizer import Tokenizer
from moss.train import rollouts
from moss.train.loop import computing_copy, refresh
from moss.train.ppo import ActorCritic, critic_from, learnt, ppo_loss, reply_log_probs
from moss.train.rl_math import kl_k1
from moss.train.rollouts import FIGURES, MISSING_END, TOKENS, Prompt, Rollouts, distinct, earned, fit, generate, slope

WORDS = "one two three four five six seven eight nine ten red green blue old new big small".split()
LENGTH, MAX_TOKENS = 64, 8


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer.train((" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))), vocab_size=300)


def lively(tok: Tokenizer, seed: int = 0, head: str = "lm", **values: Any) -> Decoder:
    """A model of one layer whose likeliest token depends on what it has read."""
    config = ModelConfig.from_depth(1, tok.vocab_size, 128, **{"tie_embeddings": False, **values})
    model = Decoder(config, head)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    return model


def questions(count: int = 6) -> list[Dialog]:
    return [Dialog("", {}, [Turn(f"{WORDS[i]} {WORDS[-i]}?")]) for i in range(count)]


def by_letters(asked: Sequence[Dialog]) -> np.ndarray:
    """A score that tells replies apart: the letters e in them."""
    return np.array([dialog.turns[-1].reply.count("e") for dialog in asked], dtype=np.float64)


def made(tok: Tokenizer, *, dtype: torch.dtype = torch.float32, **values: Any) -> Rollouts:
    policy = lively(tok)
    net = ActorCritic(policy, critic_from(policy)).to(dtype)
    with torch.no_grad():
        assert net.critic.head is not None
        net.critic.head.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
    first = lively(tok).to(dtype)
    values = {"length": LENGTH, "replies": 8, "max_tokens": MAX_TOKENS, "score": by_letters, "passes": 2, **values}
    prompts = fit(questions(), tok, LENGTH, MAX_TOKENS)
    return Rollouts(prompts, tok, net, lambda batch: reply_log_probs(first, batch), **values)


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in batch.items()}


# ---------------------------------------------------------------- prompts


def test_prompts_of_conversations_have_lost_their_last_reply(tok: Tokenizer, tmp_path: Path) -> None:
    """Prevents a policy that is shown the answer, or a tag of its quality."""
    row = {
        "meta_instruction": "",
        "num_turns": 2,
        "chat": {
            "turn_1": {"Human": "<|Human|>: one<eoh>\n", "MOSS": "<|MOSS|>: red<eom>\n"},
            "turn_2": {"Human": "<|Human|>: two<eoh>\n", "MOSS": "<|MOSS|>: <quality: 80> blue <eom>\n"},
        },
    }
    file = tmp_path / "dialogs.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (dialog,) = rollouts.read([file])
    assert [turn.reply for turn in dialog.turns] == ["red", ""]
    (prompt,) = fit([dialog], tok, 128, 8)
    text = tok.decode(prompt.ids, markers=True)
    assert text.endswith("<|MOSS|>:") and "blue" not in text and "quality" not in text and "red" in text


def test_prompts_of_preference_rows_are_their_histories(tmp_path: Path) -> None:
    """Prevents one prompt a reply: a row with six replies asks once."""
    pair = {"chosen": "\n\nHuman: one\n\nAssistant: red", "rejected": "\n\nHuman: one\n\nAssistant: blue"}
    file = tmp_path / "pairs.jsonl"
    file.write_text((json.dumps(pair) + "\n") * 2, encoding="utf-8")
    found = list(rollouts.read([file]))
    assert [(len(dialog.turns), dialog.turns[-1].human, dialog.turns[-1].reply) for dialog in found] == [
        (1, "one", "")
    ] * 2


def test_rounds_of_tools_stay_in_the_prompt(tok: Tokenizer) -> None:
    """Prevents a policy that answers without the result that it is to answer from."""
    turn = Turn("one?", [Round("think", "None", "None")])
    (prompt,) = fit([Dialog("", {}, [turn])], tok, 64, 8)
    text = tok.decode(prompt.ids, markers=True)
    assert "think" in text and text.endswith("<|MOSS|>:")


def test_a_prompt_that_is_too_long_loses_old_turns_or_is_dropped(tok: Tokenizer) -> None:
    """Prevents a crash in the engine, and a reply that does not fit its row."""
    old, new = Turn("one " * 20, reply="two"), Turn("red?")
    (prompt,) = fit([Dialog("", {}, [old, new])], tok, 64, 8)
    assert len(prompt.dialog.turns) == 1 and len(prompt.ids) <= 56
    kept = fit([Dialog("", {}, [Turn("one " * 80)]), Dialog("", {}, [new])], tok, 64, 8)
    assert len(kept) == 1
    with pytest.raises(ValueError, match="none of 1 prompts fits --length 64"):
        fit([Dialog("", {}, [Turn("one " * 80)])], tok, 64, 8)
    with pytest.raises(ValueError, match="no prompt"):
        fit([], tok, 64, 8)


# ---------------------------------------------------------------- who writes


def behind(model: Decoder, prompt: Sequence[int], reply: Sequence[int]) -> float:
    """How far, in logits, a token of the reply is behind the likeliest one at its place: by one whole forward."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *reply]]))[0, len(prompt) - 1 : -1].float()
    return float((logits.max(dim=1).values - logits.gather(1, torch.tensor(reply)[:, None])[:, 0]).max())


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("tied", [True, False])
def test_replies_are_of_the_weights_as_they_are_now(
    tok: Tokenizer, dtype: torch.dtype, near: float, tied: bool
) -> None:
    """Prevents replies of old weights: after an update nothing that the engine copied or remembered may be left.

    In bfloat16 the engine keeps norms as float32 copies and computes with more digits than the model's own forward,
    so that there a near tie may fall either way; and a computing copy follows the weights that train.
    """
    model = lively(tok, tie_embeddings=tied)
    net = computing_copy(model, dtype)
    prompts = [prompt.ids for prompt in fit(questions(), tok, LENGTH, MAX_TOKENS)]
    greedy = [Sampling(temperature=0, max_tokens=12)] * len(prompts)
    before = generate(net, prompts, greedy)
    assert max(behind(net, *each) for each in zip(prompts, before)) <= near
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(torch.tensor([prompts[0]])).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        model.norm.weight.mul_(torch.linspace(0.5, 2, len(model.norm.weight)))
    refresh(model, net)
    after = generate(net, prompts, greedy)
    assert max(behind(net, *each) for each in zip(prompts, after)) <= near
    assert max(behind(net, *each) for each in zip(prompts, before)) > 10 * near


def test_adapters_on_one_base_write_and_learn(tok: Tokenizer) -> None:
    """Prevents replies of the base where the policy is an adapter on it, and roles on one base that move each other:
    policy, critic and reference are views of one frozen model."""
    base = lively(tok)
    policy, critic = lora.view(base), lora.view(base, "scalar")
    spec = lora.parse("r=4")
    lora.inject(policy, spec)
    lora.inject(critic, spec)
    data = replace(made(tok), net=ActorCritic(policy, critic), reference=lambda batch: reply_log_probs(base, batch))
    batch = tensors(data.batch(0, 4))
    assert data.block is not None and data.block.figures["kl"] == 0  # a fresh adapter changes nothing
    before = data.reference(batch).detach()
    loss = ppo_loss(data.net, batch)  # type: ignore[arg-type]
    loss.total.backward()
    learning = [weight for weight in data.net.parameters() if weight.grad is not None]  # type: ignore[attr-defined]
    assert learning and all(weight.requires_grad for weight in learning)
    with torch.no_grad():
        for weight in learning:
            weight.add_(torch.empty_like(weight).normal_(0, 0.2, generator=torch.Generator().manual_seed(2)))
    prompts = [prompt.ids for prompt in data.prompts]
    told = generate(policy, prompts, [Sampling(temperature=0, max_tokens=12)] * len(prompts))
    assert max(behind(policy, *each) for each in zip(prompts, told)) <= 1e-3
    assert max(behind(base, *each) for each in zip(prompts, told)) > 0.1
    assert torch.equal(before, data.reference(batch).detach())
    assert lora.adapters(policy)  # writing has merged a view, not the policy itself


def test_a_reply_does_not_depend_on_its_company(tok: Tokenizer) -> None:
    """Prevents random numbers that are dealt out in the order of the queue, and sums that know their neighbours."""
    data = made(tok)
    prompts = [data._prompt(item).ids for item in range(40)]
    samplings = [data._sampling(item) for item in range(40)]
    together = generate(data.net.policy, prompts, samplings)
    backwards = generate(data.net.policy, prompts[::-1], samplings[::-1])[::-1]
    alone = [generate(data.net.policy, [ids], [sampling])[0] for ids, sampling in zip(prompts[:5], samplings)]
    assert together == backwards and together[:5] == alone
    assert len({tuple(reply) for reply in together}) > 30


def test_a_compiled_policy_writes_uncompiled(tok: Tokenizer) -> None:
    """Prevents a new compilation for every length of a prompt."""
    model = lively(tok)
    model.blocks[0].forward = None  # type: ignore[assignment]  # as `machine.compile_blocks` sets one on the instance
    (reply,) = generate(model, [[5, 6, 7] * 9], [Sampling(temperature=0, max_tokens=3)])
    assert len(reply) == 3


def test_sampling_is_that_of_the_policy_itself(tok: Tokenizer) -> None:
    """Prevents replies from another distribution than the one whose log-probabilities are learnt from: every id that
    the tokenizer gives no text for ends a reply."""
    data = made(tok)
    sampling = data._sampling(3)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (1.0, 0, 1.0, 1.0)
    assert sampling.stop_ids == tok.control_ids and sampling.max_tokens == MAX_TOKENS
    assert sampling.seed == data._sampling(3).seed != data._sampling(4).seed
    assert data._sampling(3).seed != replace(data, seed=1)._sampling(3).seed
    data.net.policy = Decoder(ModelConfig.from_depth(1, tok.vocab_size + 2, 128))
    assert data._sampling(3).stop_ids == tok.control_ids | {tok.vocab_size, tok.vocab_size + 1}


# ---------------------------------------------------------------- what a token earns


def test_equation_two_by_hand() -> None:
    """Prevents a score at the wrong token, a KL of the wrong sign, or one that is counted twice."""
    # Two replies, of 2 tokens and 1; beta 1/2, gamma 1, lambda 0.95; scores 3 and -1.
    # log policy - log reference: 1, -2 | 4. Rewards -1/2, 3 + 1 = 4 | -1 - 2 = -3. Values 1, 2 | 1.
    # delta: -1/2 + 2 - 1 = 1/2, 4 - 2 = 2 | -3 - 1 = -4; A: 1/2 + 0.95 * 2 = 2.4, 2 | -4; returns 3.4, 4 | -3.
    rows = Rows.of([([7, 8, 9, 9], [0, 0, 1, 1]), ([7, 9], [0, 1])])
    log_probs, ref = torch.tensor([-1.0, -3.0, -1.0]).double(), torch.tensor([-2.0, -1.0, -5.0]).double()
    values = torch.tensor([1.0, 2.0, 1.0]).double()
    found, kl = earned(rows, np.array([3.0, -1.0]), log_probs, ref, values, beta=0.5)
    assert kl.tolist() == [-1.0, 4.0]
    assert found["returns"].tolist() == pytest.approx([3.4, 4.0, -3.0])
    plain = torch.tensor([2.4, 2.0, -4.0]).double()
    white = (plain - plain.mean()) / (plain.var(unbiased=False) + 1e-8).sqrt()
    torch.testing.assert_close(found["advantages"], white)
    assert found["old_log_probs"].tolist() == log_probs.tolist() and found["old_values"].tolist() == values.tolist()


def test_a_block_is_what_its_parts_say(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents scores that meet the wrong replies: returns, figures and ids are worked out again one reply at a time.

    Among the replies: an empty one, one without end, one that ends in another marker.
    """
    data = made(tok, passes=1, replies=4, dtype=torch.float64)
    eom, human = tok.marker("<eom>")[0], tok.marker("<|Human|>")[0]
    told = [[eom], [*tok.encode(" three three"), eom], tok.encode(" seven"), [*tok.encode(" red"), human]]
    monkeypatch.setattr(rollouts, "generate", lambda *_: told)
    batch = tensors(data.batch(0, 4))
    asked = [data._prompt(item) for item in range(4)]
    scores = [0.0, 4.0, 2.0 - MISSING_END, 1.0 - MISSING_END]
    assert data.block is not None
    figures = data.block.figures
    assert figures["reward"] == pytest.approx(np.mean(scores)) and figures["ended"] == 0.5 and figures["kl"] == 0
    assert figures["length"] == np.mean([len(reply) for reply in told])
    assert batch["block"].tolist() == [figures[name] for name in FIGURES]
    seen = 0
    for line in range(len(batch["ids"])):
        for segment in range(1, int(batch["segments"][line].max()) + 1):
            here = batch["segments"][line] == segment
            ids = batch["ids"][line][here].tolist()
            number = next(i for i in range(4) if asked[i].ids + told[i] == ids)
            mask = batch["mask"][line][here] == 1
            assert mask.tolist() == [False] * len(asked[number].ids) + [True] * len(told[number])
            net = data.net
            with torch.no_grad():
                logp = net.policy(torch.tensor([ids]))[0].log_softmax(-1)
                want = logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0][mask[1:]]
                value = net.critic(torch.tensor([ids]))[0, :-1][mask[1:]]  # type: ignore[attr-defined]
            torch.testing.assert_close(batch["old_log_probs"][line][here][mask], want, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(batch["old_values"][line][here][mask], value, rtol=1e-9, atol=1e-9)
            last = batch["returns"][line][here][mask][-1]
            assert float(last) == pytest.approx(scores[number])  # the KL is 0, so the last token earns the score
            seen += 1
    assert seen == 4
    advantages = batch["advantages"][batch["mask"] == 1]
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-9)
    assert float(advantages.var(unbiased=False)) == pytest.approx(1, rel=1e-4)
    assert not any(batch[name][batch["mask"] == 0].any() for name in TOKENS)


def test_scores_that_are_not_finite_are_refused(tok: Tokenizer) -> None:
    """Prevents a policy that is destroyed by one bad score."""
    data = made(tok, score=lambda asked: np.full(len(asked), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        data.batch(0, 4)


def test_the_preference_model_reads_text(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents ids of one vocabulary in the other's model: what is scored is a conversation with the reply's text."""
    seen: list[Dialog] = []

    def score(asked: list[Dialog]) -> np.ndarray:
        seen.extend(asked)
        return np.zeros(len(asked))

    data = made(tok, replies=2, score=score)
    human = tok.marker("<|Human|>")[0]
    monkeypatch.setattr(rollouts, "generate", lambda *_: [[*tok.encode("  seven red "), human], [tok.eos]])
    data.batch(0, 2)
    assert [dialog.turns[-1].reply for dialog in seen] == ["seven red", ""]
    assert [dialog.turns[-1].human for dialog in seen] == [data._prompt(i).dialog.turns[-1].human for i in range(2)]
    assert all(turn.reply == "" for prompt in data.prompts for turn in prompt.dialog.turns)  # prompts stay as they are


def test_figures_by_hand() -> None:
    """Prevents a variety that a longer reply alone lowers, and a slope of lengths over scores."""
    # pairs: (start, 1), (1, 2) | (start, 1), (1, 3): 3 different ones of 4
    assert distinct([[1, 2], [1, 3]]) == 3 / 4
    assert distinct([[5]] * 10) == 1 / 10
    # lengths 1, 2, 3, scores 0, 2, 1: slope = (-1 * 0 + 0 * 2 + 1 * 1) / 2
    assert slope(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 1.0])) == 0.5
    assert slope(np.array([2.0, 2.0]), np.array([0.0, 5.0])) == 0


# ---------------------------------------------------------------- the order of things


def test_the_first_pass_meets_its_own_log_probabilities(tok: Tokenizer) -> None:
    """Prevents old log-probabilities from the engine or another layout: the first ratios are 1 and the first KL 0, to
    the last bit, for every minibatch of the first pass."""
    data = made(tok, replies=8)
    for at in (0, 4):
        batch = tensors(data.batch(at, 4))
        places = learnt(batch)
        assert torch.equal(data.net.log_probs(batch).detach(), batch["old_log_probs"].flatten()[places])
        assert torch.equal(data.net.values(batch).detach(), batch["old_values"].flatten()[places])
        assert not kl_k1(data.net.log_probs(batch).detach(), data.reference(batch).detach()).any()
    assert data.block is not None and data.block.figures["kl"] == 0


def test_each_pass_meets_each_reply_once_in_another_order(tok: Tokenizer) -> None:
    """Prevents minibatches that are the same in every pass, and replies that are left out."""
    data = made(tok, passes=3)

    def replies(position: int) -> list[tuple[int, ...]]:
        batch = data.batch(position, 4)
        return [
            tuple(batch["ids"][line][batch["segments"][line] == segment].tolist())
            for line in range(len(batch["ids"]))
            for segment in range(1, batch["segments"][line].max() + 1)
        ]

    passes = [[set(replies(at)), set(replies(at + 4))] for at in (0, 8, 16)]
    assert all(first | second == passes[0][0] | passes[0][1] for first, second in passes)
    assert len({frozenset(first) for first, _ in passes}) > 1
    assert len(data.history) == 1
    data.batch(24, 4)
    assert len(data.history) == 2 and data.block is not None and data.block.number == 1
    with pytest.raises(ValueError, match="cross the end of a pass"):
        data.batch(30, 4)


def test_every_prompt_is_asked_once_in_an_epoch(tok: Tokenizer) -> None:
    """Prevents prompts that are never asked, or an order that is the same in every epoch."""
    data = made(tok)
    first, second = ([data._prompt(6 * epoch + i).ids for i in range(6)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == sorted(prompt.ids for prompt in data.prompts)
    assert first != second
    assert len(data) == 6 * data.passes


def test_rows_are_packed_and_few_shapes_occur(tok: Tokenizer) -> None:
    """Prevents a row for every short reply, and a new shape to compile in every batch."""
    data = made(tok, replies=64, length=2 * LENGTH)
    shapes = {data.batch(at, 32)["ids"].shape for at in range(0, 128, 32)}
    assert all(rows < 32 and rows % (32 // rollouts.SHAPES) == 0 and places == 2 * LENGTH for rows, places in shapes)


def test_a_killed_run_goes_on_in_the_middle_of_a_block(tok: Tokenizer) -> None:
    """Prevents a resumed run that answers its prompts anew: with other weights than those of the block's beginning."""
    data = made(tok)
    data.batch(0, 4)
    file = io.BytesIO()
    torch.save(data.state_dict(), file)
    file.seek(0)
    again = made(tok, score=lambda asked: np.full(len(asked), np.nan))  # nothing may be scored again
    again.load_state_dict(torch.load(file, weights_only=True))
    for at in (0, 4, 8, 12):
        mine, other = data.batch(at, 4), again.batch(at, 4)
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)
    assert again.history == data.history
    empty = made(tok)
    empty.load_state_dict(made(tok).state_dict())
    assert empty.block is None and empty.history == []


def test_the_record_tells_runs_apart(tok: Tokenizer) -> None:
    """Prevents a run that goes on with other prompts, another preference model or other blocks."""
    data = made(tok, models={"reward": "a"})
    assert data.record() == made(tok, models={"reward": "a"}).record()
    others = [made(tok, models={"reward": "b"}), made(tok, replies=4, models={"reward": "a"})]
    others.append(replace(data, prompts=[Prompt([*data.prompts[0].ids, 5], data.prompts[0].dialog), *data.prompts[1:]]))
    assert all(other.record() != data.record() for other in others)
    assert render(data.prompts[0].dialog, tok, until="reply")[0] == data.prompts[0].ids
