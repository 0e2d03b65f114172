"""`moss train reward`: the preference model, which scores replies (section 7.1 of the paper).

    moss train reward --model runs/sft --data pairs.jsonl --out runs/reward
    moss train reward --model sft-16b --data pairs.jsonl --length 2048 --batch-tokens 8192 --warmup 0 --center 0

The language model loses its head for one that gives a number, and learns that of two replies the better one has the
higher number: equation 1. That says nothing of scores of different prompts, which PAT's buckets compare; so scores are
also drawn to 0 (`--center`). All pairs of a prompt are in one step, and each reply is computed once. The score is read
at `<eom>`, where the model has seen all of the reply, and is made of float32 whatever the model computes in. Ties are
left out. Data are preference rows in our form or `chosen` and `rejected` texts (`moss/data/pairs.py`).

What a run reports on held-out pairs (`--valid`, or held-out material): the share of pairs in the right order, how far
stated probabilities are from what happens (calibration), and whether length decides. That and the spread of scores
stand in `moss.json` under `scores`. Others ask for scores through `score_replies`, which takes conversations, so that
the tokenizer of the preference model need not be theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from moss import checkpoint, dist, peft
from moss.chat import Dialog, TooLong
from moss.data import pairs
from moss.data.pack import Rows, best_fit, lay
from moss.data.rows import data_files
from moss.files import json_object
from moss.log import console, note
from moss.model import Decoder
from moss.resolve import beside, holds_model
from moss.tokenizer import Tokenizer, require_markers
from moss.train import launch, machine
from moss.train.loop import Loss, Micro
from moss.train.rl_math import bradley_terry
from moss.train.settings import Run, Settings, check, shares, with_rates
from moss.weights import load_model

MATERIAL = 8000  # prompts of the scripted teacher where no --data is given
HELD_OUT = 300  # prompts of its held-out part where no --valid is given
BINS = 10  # of the calibration error
WRONG_HEAD = "--reward {} holds a language model; a preference model has a scalar head"
HINT = "`moss train reward` makes one"
BATCH = 16_384  # places for tokens that `score_replies` computes at a time
RATES = {"lr": 2e-3, "matrix_lr": 0.012}  # of a nano
PAPER = 6e-6  # of large models


@dataclass(frozen=True)
class Reward(Settings):
    """Train a preference model: a score for replies, from pairs of a better and a worse one."""

    out: Path = Path("runs/reward")  # folder of the run: log.jsonl, step-N checkpoints, at the end the model
    model: Path | None = None  # folder of the model to start from, with its tokenizer; none = the bundled model
    length: int = 1024  # tokens of a packed row; a prompt with all its replies must fit into one
    batch_tokens: int = 2048  # places for tokens in one step, padding included
    center: float = (
        0.01  # weight of a pair's squared sum of scores, which makes prompts comparable; 0 = equation 1 alone
    )
    lr: float | None = None  # AdamW, for embeddings, head and norms; none = 2e-3 for a nano, 6e-6 for a large model
    matrix_lr: float | None = None  # Muon, for the matrices of the blocks; 0 = AdamW; none = 0.012 for a nano, else 0


def main(config: Reward) -> int:
    """Read the pairs, train, say how well held-out pairs are told apart."""
    config = with_rates(config, RATES, PAPER)
    check(config)
    given, held_out = data_files(config.data, "--data"), data_files(config.valid, "--valid")
    with launch.opened(config, heads=("scalar",)) as (start, stop):
        tokenizer, model = launch.load(config, start, config.model, head="scalar")
        data = read(given or launch.material(config, "preferences", MATERIAL), tokenizer, config)
        if not held_out and not given:
            held_out = launch.material(config, "preferences", HELD_OUT, split="held_out")
        valid = read(held_out, tokenizer, config) if held_out else None
        if not valid:
            note("no --valid: accuracy, calibration and length bias will not be known")
        told = checkpoint.read_info(start).get("scores", {}) if start else {}  # by the step that `start` has done
        scores = np.zeros(len(valid.replies) if valid else 0)

        def validate(net: nn.Module) -> dict[str, float]:
            assert valid is not None
            scores[:] = score_groups(net, valid, config)
            told.update(figures(scores, valid.pairs, valid.reply_lengths))
            return told

        code = launch.train(
            "reward",
            config,
            model,
            tokenizer,
            data,
            partial(preference_loss, center=config.center),
            start=start,
            stop=stop,
            validate=validate if valid else None,
            extra={"scores": told},
        )
        if valid and scores.any():
            console.print(table(scores, valid))
        return code


def read(paths: Sequence[Path], tokenizer: Tokenizer, config: Run) -> pairs.Groups:
    """Preferences as packed rows."""
    note(f"reading {', '.join(map(str, paths))}")
    found = (preference for path in paths for preference in pairs.read(path))
    groups = pairs.Groups(found, tokenizer, config.length, config.seed)
    alone, long = groups.dropped["no pair"], groups.dropped["too long"]
    note(
        f"{len(groups.preferences):,} prompts, {len(groups.replies):,} replies, {len(groups.pairs):,} pairs; dropped: "
        f"{alone:,} prompts without a pair, {long:,} that take more than {config.length} tokens with their replies"
    )
    return groups


# ---------------------------------------------------------------- loss


def scores_at(net: Decoder, batch: Micro) -> Tensor:
    """The score of each document of a packed batch, at its last token: (B, S), float32 or better; any value where
    `last` is -1."""
    hidden = net.hidden(batch["ids"], positions=batch["positions"], segments=batch["segments"])  # (B, T, D)
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    picked = hidden[rows, batch["last"].clamp(min=0)]  # (B, S, D)
    assert net.head is not None
    exact = torch.promote_types(hidden.dtype, torch.float32)  # differences of scores rounded to bfloat16 would be steps
    return F.linear(picked.to(exact), net.head.weight.to(exact)).squeeze(-1)


def preference_loss(net: Decoder, batch: Micro, center: float = 0.0) -> Loss:
    """Equation 1 over all pairs of a batch of `pairs.Groups`, and the share of them in the right order.

    `center` times the squared sum of both scores is added (arXiv 2312.09244, equation 2): equation 1 alone leaves open
    what a score of one prompt is beside that of another.
    """
    row, winner, loser = batch["pairs"].unbind(1)
    scores = scores_at(net, batch)
    better, worse = scores[row, winner], scores[row, loser]
    right = (1 + (better - worse).detach().sign()) / 2
    pull = center * (better + worse).square().sum()
    return Loss(bradley_terry(better, worse) + pull, len(row), {"accuracy": right.sum()})


# ---------------------------------------------------------------- scores


@torch.no_grad()
def score_groups(net: nn.Module, data: pairs.Groups, config: Reward) -> np.ndarray:
    """The score of each reply of `data`, (R,) float64, by the net as it computes in training; the same on each rank."""
    device, rows = next(net.parameters()).device, shares(config)[2]
    scores = np.zeros(len(data.replies))
    begins = range(0, len(data), rows)
    with torch.compiler.set_stance("force_eager"):  # compiling anew, without gradients, would not pay
        for turn in range(0, len(begins), dist.world()):
            own = turn + dist.rank() < len(begins)  # else computed for company: weights are gathered by all
            begin = begins[turn + dist.rank()] if own else 0
            batch = data.batch(begin, min(rows, len(data) - begin))
            found = scores_at(net, machine.to_device(batch, device)).double().cpu().numpy()  # type: ignore[arg-type]
            there = batch["reply"] >= 0
            scores[batch["reply"][there]] = own * found[there]
    return np.sum(dist.gathered(scores), axis=0)


def load_judge(folder: Path, device: str | torch.device = "cpu") -> tuple[Tokenizer, Decoder]:
    """The preference model, in float32 but for integers below an adapter, with its own tokenizer."""
    check_judge(folder)
    adapted = peft.is_adapter(folder)
    model = (peft.load_adapted if adapted else load_model)(folder, dtype=torch.float32, device=device)
    if model.head_kind != "scalar":
        raise ValueError(WRONG_HEAD.format(folder))
    tokenizer = peft.tokenizer_of(folder)
    require_markers(tokenizer)
    return tokenizer, model


def check_judge(folder: Path) -> None:
    """ValueError where there is no preference model, as far as its config tells."""
    if not holds_model(folder):
        raise ValueError(f"--reward {folder} holds no preference model; {beside(folder) or HINT}")
    config = {} if peft.is_adapter(folder) else json_object(folder / "config.json")
    if any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ()):
        raise ValueError(WRONG_HEAD.format(folder))


@torch.inference_mode()
def score_replies(
    model: Decoder, tok: Tokenizer, dialogs: Sequence[Dialog], *, batch_tokens: int = BATCH, cut: bool = False
) -> np.ndarray:
    """The preference model's score of the last reply of each conversation, (N,) float32, in their order.

    `tok` is the preference model's own tokenizer. Several conversations are computed in one row, without seeing each
    other; the same call gives the same scores. Of a conversation longer than the model can read the oldest turns go;
    ValueError where not even the last turn fits, or with `cut` not even its question: then the end of the reply goes.
    """
    rows = Rows.of([(ids, [0] * len(ids)) for ids in (_fitting(dialog, tok, model, cut) for dialog in dialogs)])
    if not len(rows):
        return np.zeros(0, dtype=np.float32)
    longest = int(rows.lengths.max())
    length = min(model.config.max_length, max(longest, 1024))
    bins = best_fit(rows.lengths, length, np.argsort(-rows.lengths, kind="stable").tolist())
    scores = np.zeros(len(rows), dtype=np.float32)
    device = model.embed.weight.device
    count = max(1, batch_tokens // length)
    for begin in range(0, len(bins), count):
        members = bins[begin : begin + count]
        last = np.zeros((len(members), max(map(len, members))), dtype=np.int64)
        for line, held in enumerate(members):
            last[line, : len(held)] = np.cumsum(rows.lengths[held]) - 1
        batch = machine.to_device(lay(rows, members, length, tok.pad) | {"last": last}, device)
        found = scores_at(model, batch).float().cpu().numpy()
        for line, held in enumerate(members):
            scores[held] = found[line, : len(held)]
    return scores


def _fitting(dialog: Dialog, tok: Tokenizer, model: Decoder, cut: bool) -> list[int]:
    """The ids of a conversation, without as many of its oldest turns as it takes to fit the model."""
    room, ids, start = model.config.max_length, list[int](), 0
    for first in range(len(dialog.turns)):
        ids, start = pairs.encode(replace(dialog, turns=dialog.turns[first:]), tok)
        if len(ids) <= room:
            return ids
    if cut and start < room:
        return [*ids[: room - 1], ids[-1]]
    raise TooLong(f"the last turn does not fit the preference model, which reads {room} tokens; shorten the reply")


# ---------------------------------------------------------------- figures


def figures(scores: np.ndarray, decided: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """How scores (R,) agree with pairs (P, 2) of winner and loser; `lengths` (R,) are the replies' tokens.

    loss: the mean of equation 1. accuracy: pairs in the right order, those with equal scores count half.
    calibration: see `calibration_error`. length_bias: correlation of the difference in score with that in length, 0
    where one of them is constant. longer_wins: pairs whose winner is the longer one, equal lengths count half; what a
    scorer by length alone would reach, or 1 minus that. low, high: the 1st and 99th percentile of the scores.
    """
    apart = scores[decided[:, 0]] - scores[decided[:, 1]]
    longer = (lengths[decided[:, 0]] - lengths[decided[:, 1]]).astype(np.float64)
    spread = apart.std() * longer.std()
    low, high = np.percentile(scores, (1, 99))
    return {
        "loss": float(np.logaddexp(0, -apart).mean()),
        "accuracy": float(((1 + np.sign(apart)) / 2).mean()),
        "calibration": calibration_error(apart),
        "length_bias": float(((apart - apart.mean()) * (longer - longer.mean())).mean() / spread) if spread else 0.0,
        "longer_wins": float(((1 + np.sign(longer)) / 2).mean()),
        "low": float(low),
        "high": float(high),
    }


def calibration_error(apart: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of sigmoid(`apart`), (P,) differences of score between winner and loser.

    Of each pair the model says with probability p = sigmoid(|difference|), from 1/2 to 1, that the reply with the
    higher score is the better one. Pairs go into `bins` of equal width by p; the result is the mean over pairs of the
    distance between a bin's mean p and its share of pairs in the right order (arXiv 1706.04599, equation 3).
    """
    sure = 1 / (1 + np.exp(-np.abs(apart)))
    right = (1 + np.sign(apart)) / 2
    which = np.minimum(((sure - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    off = np.bincount(which, weights=sure - right, minlength=bins)
    return float(np.abs(off).sum() / len(apart))


def table(scores: np.ndarray, data: pairs.Groups) -> Table:
    """Accuracy by kind of question and by how far apart the stated levels are, as far as the rows state them."""
    apart = scores[data.pairs[:, 0]] - scores[data.pairs[:, 1]]
    right = (1 + np.sign(apart)) / 2
    kinds, gaps = [], []
    for winner, loser in data.pairs:
        (prompt, a), (_, b) = data.replies[winner], data.replies[loser]
        preference = data.preferences[prompt]
        levels = preference.replies[a].level, preference.replies[b].level
        kinds.append(str(preference.history.extra.get("kind", "pairs")))
        gaps.append("any" if None in levels else str(levels[0] - levels[1]))  # type: ignore[operator]
    shown = Table(title="accuracy on held-out pairs, by difference of level")
    columns = sorted(set(gaps), key=lambda gap: (len(gap), gap))
    for column in ("kind", "pairs", "all", *columns):
        shown.add_column(column, justify="left" if column == "kind" else "right")
    kind_of, gap_of = np.array(kinds), np.array(gaps)
    for kind in (*sorted(set(kinds)), "all"):
        mine = (kind_of == kind) | (kind == "all")
        parts = [mine, *(mine & (gap_of == gap) for gap in columns)]
        shares = [f"{right[part].mean():.1%}" if part.any() else "" for part in parts]
        shown.add_row(kind, f"{mine.sum():,}", *shares)
    return shown
