"""One step of TRL's trainers beside one of ours, from the same weights and examples: loss and gradient.

What    A llama of two layers with random weights, written by `moss.weights` and read by transformers, takes one step on
        a few of the scripted teacher's conversations and preferences: once as `moss train` computes it (packed rows,
        prompts shared by their replies, the head at learnt tokens only), once in TRL (its trainer, its collator,
        padding). The objectives are those that both have: SFT, preference model, DPO, PPO's clipped policy loss.
Why     A comparison of speed means something only where both compute the same, and a slip in a loss trains on.
How     The difference of the losses relative to TRL's, and the norm of the difference of the gradients over all weights
        relative to that of TRL's. The program exits with 1 where one is above `BOUND`.

TRL 1.16 has no PPO any more: neither a trainer nor functions for the value loss, GAE or whitening. Of PPO the clipped
policy loss alone is compared, with that of `GRPOTrainer` under `loss_type="bnpo"`, a mean over tokens that takes an
advantage for each. Replies, advantages and old log-probabilities are handed to it, and the critic of our step is exact
and adds 0. What TRL lacks, tests/test_rl_math.py works out by hand.

Both sides are float32, of which the bound is the rounding. TRL runs in float64 too, but there transformers' RMSNorm and
TRL's head still round to float32, so that nothing finer is seen; how far rounding alone moves a gradient is therefore
measured between our own steps in float32 and in float64.

    python -m benchmarks.parity                          # writes benchmarks/results/parity.json
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.record import begin, publish
from moss.data import curriculum, preferences
from moss.data.pack import Packed, Rows, lay
from moss.data.pairs import Groups, answered, encode
from moss.data.rows import of_dialogs
from moss.model import Decoder, Head, ModelConfig, num_parameters
from moss.resolve import locate
from moss.tokenizer import Tokenizer
from moss.train import loop
from moss.train.dpo import Referenced, dpo_loss
from moss.train.loss import next_token
from moss.train.machine import to_device
from moss.train.ppo import CLIP, ActorCritic, critic_from, ppo_loss, reply_log_probs
from moss.train.reward import preference_loss
from moss.train.rollouts import FIGURES
from moss.weights import file_name, load_model, pick_layout, save_model

BOUND = 1e-5
SIZES: dict[str, Any] = {"num_layers": 2, "hidden": 64, "num_heads": 4, "num_kv_heads": 2, "ffn": 192}
LENGTH = 1024  # of our packed rows
CONVERSATIONS, PROMPTS = 8, 3
BETA = 0.1
MOVED = 0.1  # share of random weights added to the reference to make the policy: margins are not 0, ratios are clipped
MODELS: dict[str, tuple[Head, float]] = {"reference": ("lm", 0.0), "policy": ("lm", MOVED), "scores": ("scalar", 0.0)}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    """Loss, gradients by transformers' names, and the figures of our losses."""

    loss: float
    grads: dict[str, Tensor]
    figures: dict[str, float]


Steps = tuple[Step, Step, Step]  # ours in float32 and in float64, TRL's


class Material:
    """What both sides read: models, tokenizer, conversations, preferences."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tok = folder, Tokenizer.load(locate())
        kept, end = str(locate() / "tokenizer.json"), self.tok.eos_token
        self.stock_tok = PreTrainedTokenizerFast(tokenizer_file=kept, eos_token=end, pad_token=end)
        for name, (head, moved) in MODELS.items():
            save_model(random_model(self.tok, head, moved), folder / name, eos=self.tok.eos)
        found = (item.dialog for item in curriculum.dialogs(0))
        self.rows, _ = of_dialogs(islice(found, CONVERSATIONS), self.tok, "assistant", LENGTH)
        self.groups = Groups(islice(preferences.prompts(0), PROMPTS), self.tok, LENGTH)
        self.replies = [self._encoded(prompt, number) for prompt, number in self.groups.replies]
        self.pairs = [(self.replies[won], self.replies[lost]) for won, lost in self.groups.pairs.tolist()]

    def _encoded(self, prompt: int, number: int) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of one of its replies."""
        preference = self.groups.preferences[prompt]
        ids, start = encode(answered(preference.history, preference.replies[number].text), self.tok)
        return ids[:start], ids[start:]

    def model(self, name: str) -> Decoder:
        """One of the models, as ours."""
        return load_model(self.folder / name)

    def stock(self, name: str) -> Any:
        """The same one in transformers."""
        kind = AutoModelForCausalLM if MODELS[name][0] == "lm" else AutoModelForSequenceClassification
        return kind.from_pretrained(self.folder / name, dtype=torch.float32)


@torch.no_grad()
def random_model(tok: Tokenizer, head: Head, moved: float) -> Decoder:
    """Weights far from zero, the same in every model but for what is `moved`."""
    model = Decoder(ModelConfig(vocab_size=tok.vocab_size, max_length=LENGTH, **SIZES), head)
    first, more = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    for weight in model.parameters():
        drawn = torch.randn(weight.shape, generator=first) + moved * torch.randn(weight.shape, generator=more)
        weight.copy_(drawn * weight.shape[-1] ** -0.5 + (weight.ndim == 1))
    return model


def our_steps(net: nn.Module, model: Decoder, loss_fn: loop.LossFn, batch: dict[str, np.ndarray]) -> tuple[Step, Step]:
    """The step of `loop.run` on a batch, in float32 and in float64; of `net` the gradients of its part `model`."""
    layout, steps = pick_layout(model.config, model.head_kind), []
    for dtype in (torch.float32, torch.float64):
        whole, part = copy.deepcopy((net, model))
        loss, _, _, figures = loop.gradients(whole.to(dtype), whole, loss_fn, [to_device(batch, CPU)])
        grads = {file_name(name, layout, model.head_kind): w.grad for name, w in part.named_parameters()}
        steps.append(Step(loss, {name: grad for name, grad in grads.items() if grad is not None}, figures))
    return steps[0], steps[1]


def their_step(
    material: Material, kind: Any, config: Any, rows: list[dict[str, Any]], settings: dict[str, Any], **more: Any
) -> Step:
    """The one step of a TRL trainer on all rows."""
    args = config(
        output_dir=str(material.folder / "trl"),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **settings,
    )
    trainer = kind(args=args, train_dataset=Dataset.from_list(rows), processing_class=material.stock_tok, **more)
    step, steps = trainer.training_step, []

    def watched(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = step(model, *args, **kwargs)
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        steps.append(Step(float(loss), grads, {}))
        return loss

    trainer.training_step = watched
    with redirect_stdout(sys.stderr):
        trainer.train()
    (only,) = steps
    return only


# ---------------------------------------------------------------- the objectives


def sft(material: Material, **settings: Any) -> Steps:
    """The mean over the learnt tokens of all conversations."""
    rows, model = material.rows, material.model("policy")
    packed = Packed(rows, LENGTH, 0, material.tok.pad)
    ours = our_steps(model, model, next_token, packed.batch(0, len(packed)))
    lines = [rows.row(number) for number in range(len(rows))]
    told = [{"input_ids": ids.tolist(), "labels": np.where(mask == 1, ids, -100).tolist()} for ids, mask in lines]
    settings |= {"max_length": LENGTH}
    return *ours, their_step(material, trl.SFTTrainer, trl.SFTConfig, told, settings, model=material.stock("policy"))


def reward(material: Material) -> Steps:
    """Bradley-Terry, the mean over pairs."""
    groups, model = material.groups, material.model("scores")
    ours = our_steps(model, model, preference_loss, groups.batch(0, len(groups)))
    told = [{"chosen_ids": [*won[0], *won[1]], "rejected_ids": [*lost[0], *lost[1]]} for won, lost in material.pairs]
    kinds = trl.RewardTrainer, trl.RewardConfig
    return *ours, their_step(material, *kinds, told, {"max_length": LENGTH}, model=material.stock("scores"))


def dpo(material: Material) -> Steps:
    """DPO's sigmoid loss, the mean over pairs."""
    data, model = Referenced(material.groups, len(material.groups)), material.model("policy")
    data.use(material.model("reference"))
    ours = our_steps(model, model, partial(dpo_loss, beta=BETA), data.batch(0, len(data)))
    told = [{"prompt_ids": won[0], "chosen_ids": won[1], "rejected_ids": lost[1]} for won, lost in material.pairs]

    class Given(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # ids, where it would read text

    settings, models = {"beta": BETA, "max_length": LENGTH}, [material.stock(name) for name in ("policy", "reference")]
    return *ours, their_step(material, Given, trl.DPOConfig, told, settings, model=models[0], ref_model=models[1])


def clipped(material: Material) -> Steps:
    """PPO's clipped policy loss, the mean over tokens, of a policy that has moved since it wrote."""
    rows = Rows.of([(prompt + reply, [0] * len(prompt) + [1] * len(reply)) for prompt, reply in material.replies])
    batch: dict[str, np.ndarray] = lay(rows, [[number] for number in range(len(rows))], int(rows.lengths.max()))
    shape = batch["mask"].shape
    batch |= {name: np.zeros(shape, dtype=np.float32) for name in ("old_log_probs", "old_values", "returns")}
    batch["advantages"] = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    batch["block"] = np.zeros(len(FIGURES))
    with torch.no_grad():
        written = reply_log_probs(material.model("reference"), to_device(batch, CPU))
    batch["old_log_probs"][batch["mask"] == 1] = written.numpy()
    policy = material.model("policy")
    ours = our_steps(ActorCritic(policy, critic_from(policy)), policy, ppo_loss, batch)
    # In GRPO's eyes all but a first token is the completion, in which the rest of the prompt is a tool's words.
    cut = slice(0, 1), slice(1, None)
    first, rest = ({name: torch.from_numpy(batch[name][:, part]) for name in batch if name != "block"} for part in cut)
    given = {"prompt_ids": first["ids"], "prompt_mask": first["segments"], "advantages": rest["advantages"]}
    given |= {"completion_ids": rest["ids"], "completion_mask": rest["segments"], "tool_mask": rest["mask"]}
    given |= {"old_per_token_logps": rest["old_log_probs"]}

    class Given(trl.GRPOTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
            return given  # where it would write replies and score them

    settings = {"loss_type": "bnpo", "epsilon": CLIP, "num_generations": len(rows)}
    told, more = [{"prompt": ""}] * len(rows), {"model": material.stock("policy"), "reward_funcs": lambda **_: []}
    return *ours, their_step(material, Given, trl.GRPOConfig, told, settings, **more)


OBJECTIVES: dict[str, tuple[str, Callable[[Material], Steps]]] = {
    "SFT": ("SFTTrainer, padded", sft),
    "SFT, packed": ("SFTTrainer, packed", partial(sft, packing=True)),
    "preference model": ("RewardTrainer", reward),
    "DPO": ("DPOTrainer", dpo),
    "PPO, policy": ("GRPOTrainer, bnpo", clipped),
}


def distance(grads: dict[str, Tensor], of: dict[str, Tensor]) -> float:
    """The norm of the difference of two gradients to the norm of the second."""
    assert grads.keys() == of.keys(), grads.keys() ^ of.keys()
    apart = torch.cat([(grads[name].double() - grad.double()).flatten() for name, grad in of.items()])
    return float(apart.norm() / torch.cat([grad.double().flatten() for grad in of.values()]).norm())


def compare(ours: Step, exact: Step, theirs: Step) -> dict[str, Any]:
    """How far our step is from TRL's, and from what it is without rounding."""
    return {
        "loss": ours.loss,
        "loss_trl": theirs.loss,
        "loss_apart": abs(ours.loss - theirs.loss) / abs(theirs.loss),
        "gradient_apart": distance(ours.grads, theirs.grads),
        "gradient_rounding": distance(ours.grads, exact.grads),
        "figures": {name: value for name, value in ours.figures.items() if value},
    }


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    result = begin("parity") | {"bound": BOUND, "objectives": {}}
    result["machine"]["versions"] |= {name: version(name) for name in ("transformers", "trl", "accelerate", "datasets")}
    with tempfile.TemporaryDirectory() as place:
        material = Material(Path(place))
        config = material.model("policy").config
        result |= {"model": config.to_json(), "parameters": num_parameters(config)}
        result |= {"conversations": len(material.rows), "learnt": int(material.rows.mask.sum())}
        result |= {"replies": len(material.replies), "pairs": len(material.pairs)}
        for name, (trainer, steps) in OBJECTIVES.items():
            result["objectives"][name] = found = {"trainer": trainer, **compare(*steps(material))}
            apart = f"{found['loss_apart']:.1e}, the gradients by {found['gradient_apart']:.1e}"
            print(f"{name}: loss {found['loss']:.6f}; the losses differ by {apart}")
    print(publish(result))
    told = [found[which] for found in result["objectives"].values() for which in ("loss_apart", "gradient_apart")]
    return 0 if all(value <= BOUND for value in told) else 1


if __name__ == "__main__":
    raise SystemExit(main())
