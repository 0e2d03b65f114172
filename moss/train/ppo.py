"""`moss train ppo`: reinforcement learning from the preference model (equation 2 of the paper, section 7.2).

    moss train ppo --model runs/sft --reward runs/reward --out runs/ppo
    moss train ppo --model sft-16b --reward reward-16b --length 2048 --max-tokens 512 --batch-tokens 65536

Four models: the policy, which writes and trains; the critic, which expects the reward after each token and trains
beside it; the first policy, frozen, from which the policy must not move far; the preference model, frozen, which reads
text and so may have another tokenizer. Training goes in blocks: the policy answers some prompts, the answers are
scored (both in `rollouts.py`), and what the policy and the critic learn from them is this file's loss, PPO's clipped
one, in minibatches. A run is `loop.run`, as every stage's.

Training ends early when the figures of the blocks show one of the causes that `why_stop` knows; the model is saved, and
the cause is printed and stands in `moss.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moss import lora, peft
from moss.data.rows import data_files
from moss.errors import UsageError
from moss.log import note
from moss.model import Decoder
from moss.resolve import locate
from moss.tokenizer import Tokenizer, require_markers
from moss.train import launch, machine
from moss.train.loop import Loss, Micro
from moss.train.loss import log_probs_at
from moss.train.reward import load_judge, score_replies
from moss.train.rl_math import clipped_policy_loss, clipped_value_loss
from moss.train.rollouts import FIGURES, Rollouts, fit, read, readable
from moss.train.settings import Run, check, with_rates
from moss.weights import load_model

MATERIAL = 2000  # prompts of the scripted teacher where no --data is given
MINIBATCHES = 4  # steps of one pass over a block
CLIP = 0.2  # of the ratio, as in the paper, and of a value's move
VALUE_WEIGHT = 0.1  # of the critic's loss; it has weights of its own, so this only shares out the length of a gradient

EARLY = LATE = 3  # blocks at the start and at the end whose means are compared
LONGER = 1.5  # times the first length at which gains are asked how much of them is length alone
BY_LENGTH = 0.75  # share of the gain that length explains from which on it is gaming
ALIKE = 0.5  # share of the first variety below which replies have collapsed
NEGATIVE = -0.1  # nats a reply: an estimate of KL so far below 0, block after block, is no chance
PLATEAU = 8  # blocks without a gain over the `PLATEAU` before


@dataclass(frozen=True)
class PPO(Run):
    """Train a model to please a preference model, without moving far from where it began."""

    out: Path = Path("runs/ppo")  # folder of the run: log.jsonl, step-N checkpoints, at the end the model
    model: Path | None = None  # folder of the model to start from and to stay near; none = the bundled model
    reward: Path = Path("runs/reward")  # folder of the preference model; its tokenizer may be another
    beta: float = 0.02  # what a unit of log-probability away from the first model costs
    max_tokens: int = 128  # of a reply
    batch_tokens: int = 16384  # places for tokens in one step: --length of them for each reply with its prompt
    lr: float | None = None  # AdamW, of policy and critic; none = 1e-4 for a nano, 1e-6 for a large model
    warmup: float = 0.1  # steps of linear warm-up; below 1 a share of all steps
    epochs: float = 1.0  # times that each prompt is answered, where --steps is 0


def main(config: PPO) -> int:
    """Load the models and the prompts, train."""
    config = with_rates(config, {"lr": 1e-4}, 1e-6)
    check(config)
    if config.max_tokens >= config.length:
        raise UsageError(f"--max-tokens {config.max_tokens} leaves no room for a prompt in --length {config.length}")
    given = data_files(config.data, "--data")
    device = torch.device(machine.pick_device(config.device))
    dtype = machine.pick_dtype(config.dtype, device)
    others = {"reference": config.model, "preference model": config.reward}
    with launch.opened(config, heads=("lm", "scalar"), frozen=others) as (start, stop):
        tokenizer, model, first, judge_tokenizer, judge = (adapted_roles if config.lora else roles)(config, start)
        models = {"reference": fingerprint(first), "reward": fingerprint(judge)}
        first.to(device, dtype)
        judge.to(device)
        asked = read(given or launch.material(config, "preferences", MATERIAL))
        prompts = fit(asked, tokenizer, config.length, config.max_tokens)
        rollouts = Rollouts(
            readable(prompts, judge_tokenizer, judge.config.max_length, config.max_tokens),
            tokenizer,
            model,
            reference=partial(reply_log_probs, first),
            score=partial(score_replies, judge, judge_tokenizer, cut=True),
            length=config.length,
            replies=config.batch_tokens // config.length * MINIBATCHES,
            max_tokens=config.max_tokens,
            beta=config.beta,
            seed=config.seed,
            models=models,
            frozen={"reference": first, "preference model": judge},
            ending=why_stop,
        )
        return launch.train("ppo", config, model, tokenizer, rollouts, ppo_loss, start=start, stop=stop)


# ---------------------------------------------------------------- models


class Roles(NamedTuple):
    """Who takes part."""

    tokenizer: Tokenizer  # of policy, critic and first policy
    model: ActorCritic  # what trains
    first: Decoder  # the policy as it began, frozen
    judge_tokenizer: Tokenizer
    judge: Decoder  # the preference model, frozen


def roles(config: PPO, start: Path | None) -> Roles:
    """Each with weights of its own."""
    judge_tokenizer, judge = load_judge(config.reward)
    tokenizer, policy = launch.load(config, start, config.model)
    _, first = launch.load(config, None, config.model)
    alike = judge_tokenizer.sha256 == tokenizer.sha256 and judge.config == policy.config and not lora.adapters(judge)
    critic = load_model(start / "critic") if start else critic_from(judge if alike else policy)
    return Roles(tokenizer, ActorCritic(policy, critic), first, judge_tokenizer, judge)


def adapted_roles(config: PPO, start: Path | None) -> Roles:
    """All on one frozen base: the first policy is it, or an adapter on it; policy and critic are adapters that train.

    The preference model is one too where it was trained with the same `--lora` on this very base (`--reward`, or its
    folder `adapter`), and the critic begins as it is; else it is loaded whole, and the critic begins as the policy.
    """
    source, known = locate(config.model), config.reward if peft.is_adapter(config.reward) else config.reward / "adapter"
    tokenizer, base = peft.tokenizer_of(source), launch.load_frozen(config, source)
    launch.check_fit(tokenizer, base, config.length, source)
    require_markers(tokenizer)
    shared = (
        peft.is_adapter(known)
        and peft.base_of(known) == peft.fingerprint(peft.base_folder(source))
        and peft.is_of(known, lora.parse(config.lora))
        and peft.tokenizer_of(known).sha256 == tokenizer.sha256
    )
    if shared:
        judge_tokenizer, judge = tokenizer, lora.view(base, "scalar")
        launch.adapt(config, judge, known, source)
    else:
        judge_tokenizer, judge = load_judge(config.reward, machine.pick_device(config.device))
        if peft.is_adapter(known):
            note(f"{known} is another adapter than --lora makes of {source}: the preference model is loaded whole")
    policy, critic, reference = lora.view(base), lora.view(base, "scalar"), lora.view(base)
    launch.adapt(config, policy, start, source)
    launch.adapt(config, reference, None, source)  # multiplies integers as training does
    launch.adapt(config, critic, start / "critic" if start else known if shared else None, source)
    frozen = reference.requires_grad_(False), judge_tokenizer, judge.requires_grad_(False)
    return Roles(tokenizer, ActorCritic(policy, critic), *frozen)


class ActorCritic(nn.Module):
    """What trains: the policy, a language model, and the critic, with a scalar head."""

    def __init__(self, policy: Decoder, critic: Decoder) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def parts(self) -> dict[str, Decoder]:
        """The decoders, under the names of their folders in a checkpoint."""
        return {"": self.policy, "critic": self.critic}

    def log_probs(self, batch: Micro) -> Tensor:
        """The policy's log-probability of each learnt token (N,), in the order of the flattened batch."""
        return reply_log_probs(self.policy, batch)

    def values(self, batch: Micro) -> Tensor:
        """The critic's value of what stands before each learnt token (N,), float32 or better."""
        hidden = self.critic.hidden(batch["ids"], positions=batch["positions"], segments=batch["segments"])
        head = self.critic.head
        assert head is not None
        exact = torch.promote_types(hidden.dtype, torch.float32)
        return torch.mv(hidden.flatten(0, 1)[learnt(batch) - 1].to(exact), head.weight[0].to(exact))


def learnt(batch: Micro) -> Tensor:
    """Where the learnt tokens stand in the flattened batch (N,)."""
    return batch["mask"].flatten().nonzero().squeeze(1)


def reply_log_probs(model: Decoder, batch: Micro) -> Tensor:
    """A language model's log-probability of each learnt token of a packed batch (N,), float32 or better."""
    hidden = model.hidden(batch["ids"], positions=batch["positions"], segments=batch["segments"])
    places, head = learnt(batch), model.embed if model.head is None else model.head
    targets = batch["ids"].flatten()[places]
    return log_probs_at(hidden.flatten(0, 1), places - 1, head.weight, getattr(head, "bias", None), targets)


@torch.no_grad()
def critic_from(model: Decoder) -> Decoder:
    """A copy with a scalar head: the preference model's own, or zeros in the place of a language model's."""
    critic = Decoder(model.config, "scalar")
    kept = [name for name, _ in critic.named_parameters() if model.head_kind == "scalar" or name != "head.weight"]
    for name in kept:
        critic.get_parameter(name).copy_(model.get_parameter(name))
    return critic


def fingerprint(model: Decoder) -> str:
    """A name for these weights, from the beginning of each tensor: enough to tell one model from another."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- loss


def ppo_loss(net: ActorCritic, batch: Micro) -> Loss:
    """PPO's clipped losses of policy and critic, summed over the learnt tokens of a batch of `Rollouts`.

    Figures: those of the two losses per token, and those of the block (`rollouts.FIGURES`) as they are.
    """
    places = learnt(batch)
    told = {name: value.flatten()[places] for name, value in batch.items() if value.shape == batch["mask"].shape}
    of_policy, figures = clipped_policy_loss(net.log_probs(batch), told["old_log_probs"], told["advantages"], CLIP)
    of_critic, more = clipped_value_loss(net.values(batch), told["old_values"], told["returns"], CLIP)
    block = {name: value * len(places) for name, value in zip(FIGURES, batch["block"], strict=True)}
    return Loss(of_policy + VALUE_WEIGHT * of_critic, len(places), figures | more | block)


# ---------------------------------------------------------------- when to end


def why_stop(history: Sequence[Mapping[str, float]]) -> str:
    """The cause for which training should end, or nothing, from the figures of all blocks so far (`FIGURES`).

    negative KL: the estimate of KL(policy, first policy), which samples of the policy cannot keep below 0, is; then the
        log-probabilities are not those of what wrote the replies: a fault, not a matter of settings.
    collapse: the replies have lost half of their variety.
    length gaming: the replies have grown, and what a token more brings within a block, times the growth, explains what
        the reward has gained between blocks: the preference model is paid in length.
    reward saturation: the objective had risen, and over the last blocks it does not rise any more.
    """
    if len(history) < EARLY + LATE:
        return ""

    def mean(name: str, blocks: Sequence[Mapping[str, float]]) -> float:
        return sum(block[name] for block in blocks) / len(blocks)

    early, late = history[:EARLY], history[-LATE:]
    if max(block["kl"] for block in late) < NEGATIVE:
        return f"negative KL: {mean('kl', late):.3f} nats a reply over the last {LATE} blocks"
    variety, was = mean("distinct", late), mean("distinct", early)
    if variety < ALIKE * was:
        return f"collapse: the share of distinct pairs of tokens fell from {was:.3f} to {variety:.3f}"
    length, first = mean("length", late), mean("length", early)
    gain, by_length = mean("reward", late) - mean("reward", early), mean("slope", late) * (length - first)
    if length > LONGER * first and by_length > max(0.0, BY_LENGTH * gain):
        return (
            f"length gaming: replies grew from {first:.0f} to {length:.0f} tokens, "
            f"which alone explains {by_length:.3f} of {gain:.3f} that the reward gained"
        )
    if len(history) >= 3 * PLATEAU:
        begin, before, now = (
            mean("objective", part)
            for part in (history[:PLATEAU], history[-2 * PLATEAU : -PLATEAU], history[-PLATEAU:])
        )
        if before > begin and now <= before:
            return f"reward saturation: {now:.3f} over the last {PLATEAU} blocks, {before:.3f} over those before"
    return ""
