"""`moss train dpo`: direct preference optimisation, the third way beside `pat` and `ppo` (arXiv 2305.18290).

    moss train dpo --model runs/sft --data pairs.jsonl --out runs/dpo
    moss train dpo --model sft-16b --data pairs.jsonl --length 2048

From the pairs that `moss train reward` reads, without a preference model and without generating: the model learns to
make the better reply likelier and the worse one less likely than the model that it began as makes them, by equation 7
of that paper (`rl_math.dpo`). What that first model, the reference, says of each reply is computed once, before
training, and kept in every checkpoint; so training holds one model, and a resumed run has the same reference.

All pairs of a prompt are in one step, and each reply is computed once (`moss/data/pairs.py`). A reply's log-probability
is the sum over its own tokens, `<eom>` included. Shown along the way, as means over pairs: the margin between the
rewards of winner and loser, the accuracy (margins above 0), both rewards and both log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moss import dist
from moss.data.pairs import Groups
from moss.data.rows import data_files
from moss.errors import UsageError
from moss.log import bar
from moss.model import Decoder
from moss.train import launch, machine
from moss.train.loop import Loss, Micro
from moss.train.ppo import reply_log_probs
from moss.train.reward import HELD_OUT, MATERIAL, read
from moss.train.rl_math import dpo
from moss.train.settings import Settings, check, shares, with_rates


@dataclass(frozen=True)
class DPO(Settings):
    """Train a model on pairs of a better and a worse reply, without a preference model."""

    out: Path = Path("runs/dpo")  # folder of the run: log.jsonl, step-N checkpoints, at the end the model
    model: Path | None = None  # folder of the model to start from and to compare with; none = the bundled model
    beta: float = 0.1  # what a unit of log-probability away from the first model counts; smaller moves further
    length: int = 1024  # tokens of a packed row; a prompt with all its replies must fit into one
    lr: float | None = (
        None  # AdamW; none = 1e-4 for a nano, which at 5e-4 soon writes empty replies, 5e-7 for a large one
    )
    matrix_lr: float = 0.0  # Muon, for the matrices of the blocks; 0 = AdamW at --lr for them too


def main(config: DPO) -> int:
    """Read the pairs, ask the reference, train."""
    config = with_rates(config, {"lr": 1e-4}, 5e-7)
    check(config)
    if not config.beta:
        raise UsageError("--beta is 0: then every margin is 0 and nothing is learnt; it must be above 0")
    given, held_out = data_files(config.data, "--data"), data_files(config.valid, "--valid")
    with launch.opened(config) as (start, stop):
        tokenizer, model = launch.load(config, start, config.model)
        if not held_out and not given:
            held_out = launch.material(config, "preferences", HELD_OUT, split="held_out")
        rows, known = shares(config)[2], start is not None or config.plan  # a plan's steps need no true margins
        valid = Referenced(read(held_out, tokenizer, config), rows, known) if held_out else None
        groups = read(given or launch.material(config, "preferences", MATERIAL), tokenizer, config)
        data = Referenced(groups, rows, known, valid)
        loss_fn = partial(dpo_loss, beta=config.beta)
        validate = launch.mean_loss(valid, loss_fn, config) if valid else None
        return launch.train("dpo", config, model, tokenizer, data, loss_fn, start=start, stop=stop, validate=validate)


# ---------------------------------------------------------------- data


@dataclass
class Referenced:
    """Preferences with what the frozen first model says of each reply: `batch` has it as "reference" (B, S)."""

    groups: Groups
    rows: int  # computed at a time
    known: bool = False  # nobody is asked: a checkpoint will bring the reference, or zeros do
    held_out: Referenced | None = None  # whose reference is made and kept along with this one's
    reference: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (R,) log-probability of each reply, float64
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = self.groups.length
        if not len(self.reference):
            self.reference = np.zeros(len(self.groups.replies))

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def fill(self) -> float:
        """The share of places that hold a token."""
        return self.groups.fill

    def record(self) -> dict[str, Any]:
        """What `moss.json` says of the preferences."""
        return self.groups.record()

    def use(self, net: Any) -> None:
        """`net` is what will compute: where a run begins, it is the first model."""
        if not self.known:
            self.reference = ask(net, self.groups, self.rows)
        if self.held_out:
            self.held_out.use(net)

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """As of `Groups`; the reference of a reply that is not there (-1) is any, as no pair names it."""
        batch = self.groups.batch(position, count)
        return batch | {"reference": self.reference[batch["reply"]]}

    def state_dict(self) -> dict[str, Any]:
        """The reference, which a resumed run cannot ask for again: its model is another by then."""
        told = {"reference": torch.from_numpy(self.reference), "sha256": self.record()["sha256"]}
        return told | ({"held_out": self.held_out.state_dict()} if self.held_out else {})

    def load_state_dict(self, held: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; ValueError where that is of other held-out rows."""
        self.reference = held["reference"].numpy()
        if self.held_out:
            if held.get("held_out", {}).get("sha256") != self.held_out.record()["sha256"]:
                raise ValueError(
                    "--valid must stay as it was: the first model was not asked for other rows; or leave it out"
                )
            self.held_out.load_state_dict(held["held_out"])


@torch.no_grad()
def ask(net: Any, groups: Groups, rows: int) -> np.ndarray:
    """The log-probability of each reply under `net`, (R,) float64, `rows` packed rows at a time.

    They are the rows of the first epoch as training computes them, so that the first margins are 0 and not noise.
    """
    device = next(net.parameters()).device
    reference, begins = np.zeros(len(groups.replies)), range(0, len(groups), rows)
    with bar("asking the first model", 0, len(begins)) as shown:
        for turn in range(0, len(begins), dist.world()):
            own = turn + dist.rank() < len(begins)  # else computed for company: weights are gathered by all
            begin = begins[turn + dist.rank()] if own else 0
            batch = groups.batch(begin, min(rows, len(groups) - begin))
            found = log_probs(net, machine.to_device(batch, device)).double().cpu().numpy()
            there = batch["reply"] >= 0
            if own:
                reference[batch["reply"][there]] = found[there]
            shown.show(min(turn + dist.world(), len(begins)), f"{len(groups.replies):,} replies in all")
    return np.sum(dist.gathered(reference), axis=0)


# ---------------------------------------------------------------- loss


def log_probs(net: Decoder, batch: Micro) -> Tensor:
    """The log-probability of each document's reply, (B, S) float32 or better: the sum over its learnt tokens."""
    count, most = batch["last"].shape
    row, at = batch["mask"].nonzero(as_tuple=True)  # in the order of `reply_log_probs`
    last = batch["last"].masked_fill(batch["last"] < 0, batch["mask"].shape[1])
    document = (at[:, None] > last[row]).sum(dim=1)  # as many as have ended before
    tokens = reply_log_probs(net, batch)
    return tokens.new_zeros(count * most).index_add(0, row * most + document, tokens).view(count, most)


def dpo_loss(net: Decoder, batch: Micro, beta: float) -> Loss:
    """Equation 7 over all pairs of a batch of `Referenced`; figures are sums over the pairs."""
    row, winner, loser = batch["pairs"].unbind(1)
    policy = log_probs(net, batch)
    reference = batch["reference"].to(policy.dtype)
    better, worse = policy[row, winner], policy[row, loser]
    total, figures = dpo(better, worse, reference[row, winner], reference[row, loser], beta)
    both = {"winner_logp": better.detach().sum(), "loser_logp": worse.detach().sum()}
    return Loss(total, len(row), figures | both)
