"""`moss train pat`: preference-aware training (section 7.2 of the paper).

    moss train pat --model runs/sft --reward runs/reward --data dialogs.jsonl --out runs/pat
    moss train pat --model sft-16b --reward reward-16b --data dialogs.jsonl --length 2048

The preference model scores the last reply of each conversation. Six buckets of equal width between the 1st and the 99th
percentile of the scores become the tags 0, 20, … 100; the tag goes in front of that reply, and the model learns what it
learns in `moss train sft`, never the tag itself. So it sees how good and how bad replies begin, and at inference it is
asked for `<quality: 100>` (`resolve.quality`; `--quality 20` asks for worse).

Data are conversations in any form that `moss train sft` reads, or preference rows (`moss/data/pairs.py`), of which each
reply makes a conversation. The scores are kept in `--out`/scores.npz, so that a resumed run does not ask again. Edges
and counts of the buckets stand in `moss.json` under `pat`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from moss import dist
from moss.chat import Dialog, render
from moss.data import dialogs, pairs
from moss.data.pack import Packed
from moss.data.rows import data_files, of_dialogs
from moss.files import replacing
from moss.log import bar, console, note
from moss.model import Decoder
from moss.peft import weights_sha256
from moss.tokenizer import Tokenizer
from moss.train import launch, machine
from moss.train.loss import next_token
from moss.train.reward import check_judge, load_judge, score_replies
from moss.train.rl_math import LEVELS, bucket, bucket_edges
from moss.train.settings import check, with_rates
from moss.train.sft import RATES, SFT, sections

MATERIAL = 12_000  # replies of the scripted teacher, of every quality, where no --data is given
SCORED = 1024  # conversations that are scored, and whose scores are kept, at a time
BAR = 30  # characters of the longest bar of the histogram
PAPER = 6e-6  # of large models


@dataclass(frozen=True)
class PAT(SFT):
    """Fine-tune a language model on replies that carry their score, so that it can be asked for good ones."""

    out: Path = Path("runs/pat")  # folder of the run: log.jsonl, step-N checkpoints, at the end the model
    reward: Path = Path("runs/reward")  # folder of the preference model; its tokenizer may be another
    epochs: float = 2.0  # passes over the data where --steps is 0
    lr: float | None = None  # AdamW, for embeddings, head and norms; none = 3e-3 for a nano, 6e-6 for a large model


def main(config: PAT) -> int:
    """Score, tag, show the histogram, train."""
    config = with_rates(config, RATES, PAPER)
    check(config)
    given, held_out = data_files(config.data, "--data"), data_files(config.valid, "--valid")
    with launch.opened(config) as (start, stop):
        check_judge(config.reward)
        judge = weights_sha256(config.reward)
        found, scores = scored(read(given or launch.material(config, "replies", MATERIAL)), config, judge, "scores")
        asked, others = scored(read(held_out), config, judge, "scores-valid") if held_out else ([], scores[:0])
        edges = bucket_edges(scores)
        if not config.plan:
            console.print(histogram(scores, edges))
        tokenizer, model = launch.load(config, start, config.model)  # the preference model has gone to make room
        data = rows(tagged(found, scores, edges), tokenizer, config)
        console.print(sections(data.rows, tokenizer))
        held = rows(tagged(asked, others, edges), tokenizer, config) if asked else None
        told = {"edges": edges.tolist(), "histogram": counts(scores, edges).tolist(), "reward_sha256": judge}
        return launch.train(
            "pat",
            config,
            model,
            tokenizer,
            data,
            next_token,
            start=start,
            stop=stop,
            validate=launch.mean_loss(held, next_token, config) if held else None,
            extra={"pat": told},
        )


# ---------------------------------------------------------------- conversations


def read(paths: Sequence[Path]) -> list[Dialog]:
    """Conversations that end in a reply: those of conversation files, and of preference rows one for each reply.

    Tags that they carry already are taken off. Conversations without a last reply are left out and counted.
    """
    names = ", ".join(map(str, paths))
    note(f"reading {names}")
    found, dropped = [], 0
    for dialog in (dialog for path in paths for dialog in _conversations(path)):
        if dialog.turns[-1].reply.strip():
            found.append(replace(dialog, turns=[replace(turn, quality=None) for turn in dialog.turns]))
        else:
            dropped += 1
    if not found:
        raise ValueError(f"{names}: of {dropped} conversations not one ends in a reply that could be scored")
    if dropped:
        note(f"{dropped:,} conversations dropped, whose last reply is missing or empty")
    return found


def _conversations(path: Path) -> Iterator[Dialog]:
    _, first = next(dialogs.read_rows(path), ("", None))
    if isinstance(first, dict) and ("history" in first or "chosen" in first):
        for preference in pairs.read(path):
            yield from (pairs.answered(preference.history, reply.text) for reply in preference.replies)
    else:
        yield from dialogs.read(path)


def tagged(found: Iterable[Dialog], scores: np.ndarray, edges: np.ndarray) -> Iterator[Dialog]:
    """The conversations, each with the tag of its score on the last reply; `found` stay as they are."""
    for dialog, number in zip(found, bucket(scores, edges), strict=True):
        yield replace(dialog, turns=[*dialog.turns[:-1], replace(dialog.turns[-1], quality=LEVELS[number])])


def rows(found: Iterable[Dialog], tok: Tokenizer, config: PAT) -> Packed:
    """Conversations as packed rows; where one is longer than `--length` its oldest turns go, as the last is tagged."""
    made, dropped = of_dialogs(
        (fitted(dialog, tok, config.length) for dialog in found), tok, config.loss, config.length
    )
    if not len(made):
        raise ValueError(f"of {dropped} conversations not one has a last turn within --length {config.length}")
    note(f"{len(made):,} conversations; {dropped:,} dropped, since not even the last turn fits {config.length} tokens")
    return Packed(made, config.length, config.seed, tok.pad)


def fitted(dialog: Dialog, tok: Tokenizer, length: int) -> Dialog:
    """The conversation without as many of its oldest turns as it takes to fit `length`; the last one always stays."""
    while len(dialog.turns) > 1 and len(render(dialog, tok)[0]) > length:
        dialog = replace(dialog, turns=dialog.turns[1:])
    return dialog


# ---------------------------------------------------------------- scores


def scored(found: Sequence[Dialog], config: PAT, judge: str, name: str) -> tuple[list[Dialog], np.ndarray]:
    """(conversations, scores (N,) float32 of their last replies), without those that the preference model cannot read.

    What has been scored stands in `--out`/NAME.npz with a fingerprint of conversations and preference model, and is
    not scored again. A plan takes any scores, for its steps are as long with one tag as with another.
    """
    if config.plan:
        return list(found), np.linspace(0, 1, len(found), dtype=np.float32)
    path, print_of = config.out / f"{name}.npz", fingerprint(found, judge)
    scores = dist.first(lambda: known(path, print_of))
    if len(scores) == len(found):
        note(f"{len(found):,} scores are those in {path}")
    else:
        device = torch.device(machine.pick_device(config.device))
        tokenizer, model = load_judge(config.reward, device)
        model.to(device, machine.pick_dtype(config.dtype, device))
        with bar("scores", len(scores), len(found)) as shown:
            while len(scores) < len(found):
                part = found[len(scores) : len(scores) + SCORED]
                parts = dist.gathered(score(part[dist.rank() :: dist.world()], model, tokenizer))
                more = np.zeros(len(part), dtype=np.float32)
                for number, values in enumerate(parts):
                    more[number :: len(parts)] = values
                scores = np.append(scores, more)
                dist.first(partial(keep, path, print_of, scores))
                shown.show(len(scores), "replies")
    there = ~np.isnan(scores)
    if not there.all():
        note(f"{(~there).sum():,} conversations dropped, since the preference model cannot read their last turn whole")
    return [dialog for dialog, fine in zip(found, there, strict=True) if fine], scores[there]


def score(found: Sequence[Dialog], model: Decoder, tok: Tokenizer) -> np.ndarray:
    """The score of each last reply, (N,) float32; nan where the last turn is longer than the preference model reads."""
    room = model.config.max_length
    fits = [len(pairs.encode(replace(dialog, turns=dialog.turns[-1:]), tok)[0]) <= room for dialog in found]
    scores = np.full(len(found), np.nan, dtype=np.float32)
    scores[fits] = score_replies(model, tok, [dialog for dialog, fine in zip(found, fits, strict=True) if fine])
    if np.isnan(scores[fits]).any():
        raise ValueError("the preference model gives a score that is no number: train it anew, at a lower rate")
    return scores


def fingerprint(found: Iterable[Dialog], judge: str) -> str:
    """A name for these conversations under this preference model."""
    digest = hashlib.sha256(judge.encode())
    for dialog in found:
        digest.update(json.dumps(dialogs.to_moss(replace(dialog, extra={})), ensure_ascii=False).encode())
    return digest.hexdigest()


def keep(path: Path, name: str, scores: np.ndarray) -> None:
    """Write scores with their fingerprint, whole or not at all."""
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(file, fingerprint=np.array(name), scores=scores)


def known(path: Path, name: str) -> np.ndarray:
    """The scores in a file if they are of that fingerprint, else none."""
    none = np.zeros(0, dtype=np.float32)
    if not path.is_file():
        return none
    try:
        with np.load(path, allow_pickle=False) as held:
            return held["scores"] if str(held["fingerprint"]) == name else none
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
        note(f"{path} cannot be read: scoring anew")
        return none


def counts(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many scores (N,) lie in each bucket."""
    return np.bincount(bucket(scores, edges), minlength=len(LEVELS))


def histogram(scores: np.ndarray, edges: np.ndarray) -> Table:
    """How many replies got each tag, as figure 7 of the paper."""
    found = counts(scores, edges)
    table = Table(title=f"quality of {len(scores):,} replies, scored {scores.min():.2f} to {scores.max():.2f}")
    for column in ("tag", "scores from", "replies", "share"):
        table.add_column(column, justify="right")
    table.add_column("")
    for level, low, count in zip(LEVELS, ["", *(f"{edge:.2f}" for edge in edges)], found, strict=True):
        table.add_row(
            str(level), low, f"{count:,}", f"{count / len(scores):.1%}", "█" * round(BAR * count / found.max())
        )
    return table
