"""Which of several models answers better, judged by the scripted truth and never by a preference model.

What    `answers` lets a model answer held-out questions of `moss/data/preferences.py`, `levels` counts what is right in
        each reply (0 to 5), `summary` is one model's figures, `versus` the win rate of one over another, question by
        question, with an interval. `dial` is `summary` of a model of `moss train pat` at each quality tag.
Why     A preference model that set tags, gave rewards or chose pairs cannot judge what was learnt from them.
How     asked = questions(400)
        levels_of = {name: levels(asked, answers(folder, asked)) for name, folder in arms.items()}
        versus(levels_of["pat"], levels_of["sft"])      # {"win": …, "tie": …, "loss": …, "rate": …, "low": …, …}

A model is asked for its reply at once, as it was trained on this material, and with the tag that `moss chat` would
give it. Draws follow from (seed, question) alone, so that all arms meet the same luck. Intervals are bootstrap
percentiles over the questions (Efron 1979); they say nothing of other trainings, for which there are seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moss.chat import QUALITIES, parse, render
from moss.data import preferences
from moss.data.pairs import Preference
from moss.data.preferences import SLOTS, Split
from moss.engine import Engine, Sampling
from moss.evals.answering import seeds_of
from moss.evals.stats import mean
from moss.model import Decoder
from moss.resolve import load, quality
from moss.tokenizer import Tokenizer

BATCH = 64  # answers under way at a time
MAX_TOKENS = 96  # of an answer; those of the material have up to 60
GROUPS: dict[str, Callable[[Preference], str]] = {
    "kind": lambda asked: str(asked.history.extra["kind"]),
    "lang": lambda asked: str(asked.history.extra["lang"]),
}


def questions(n: int, seed: int = 0, split: Split = "held_out") -> list[Preference]:
    """The first `n` questions of a seed; held out are phrasings and values that training never sees."""
    return list(islice(preferences.prompts(seed, split), n))


def answers(
    model: str | Path | None,
    asked: Sequence[Preference],
    *,
    tag: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The reply to each question by the model in a folder (None: the bundled one), at `temperature`, 0 for greedy.

    `tag`: the quality that is asked for, where it is not the model's own (`resolve.quality`).
    """
    decoder, tok = load(model)
    return reply_all(decoder, tok, asked, tag=quality(model, tag), temperature=temperature, seed=seed)


def reply_all(
    model: Decoder,
    tok: Tokenizer,
    asked: Sequence[Preference],
    *,
    tag: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """As `answers`, of a model in memory. A reply that does not end counts as far as it goes."""
    prompts = []
    for preference in asked:
        turns = preference.history.turns
        dialog = replace(preference.history, turns=[*turns[:-1], replace(turns[-1], quality=tag)])
        prompts.append(render(dialog, tok, until="reply")[0])
    with Engine(model, slots=BATCH, queue=2 * len(prompts), lookup=False) as engine:
        streams = [
            engine.submit(
                ids, Sampling(temperature=temperature, max_tokens=MAX_TOKENS, stop_ids=tok.control_ids, seed=draw)
            )
            for ids, draw in zip(prompts, seeds_of(seed, len(prompts)), strict=True)
        ]
        told = [[token.id for token in stream] for stream in streams]
    known = [[id for id in ids if id < tok.vocab_size and id not in tok.control_ids] for ids in told]
    return [parse(ids, tok, section="reply").reply for ids in known]


def levels(asked: Sequence[Preference], replies: Sequence[str]) -> np.ndarray:
    """How many of the five things are right in each reply, (N,) int64."""
    return np.array([preferences.truth(each.history, text) for each, text in zip(asked, replies, strict=True)])


# ---------------------------------------------------------------- figures


def summary(asked: Sequence[Preference], found: np.ndarray) -> dict[str, Any]:
    """Of a model's levels (N,): `right` is the share of the five things that are right, with its interval, `whole` the
    share of replies with all five, `histogram` the replies of each level; and `right` by kind and language."""
    _, low, high, _ = mean(found / SLOTS)
    told: dict[str, Any] = {
        "n": len(found),
        "right": float(found.mean() / SLOTS),
        "low": low,
        "high": high,
        "whole": float((found == SLOTS).mean()),
        "histogram": np.bincount(found, minlength=SLOTS + 1).tolist(),
    }
    return told | {name: by(asked, found / SLOTS, group) for name, group in GROUPS.items()}


def versus(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """How often the first model's reply is the better one, by levels (N,) of the same questions.

    win + tie + loss = 1; `rate` = win + tie / 2, and `low`, `high` its 95 % interval. Levels (S, N) are of S trainings
    that all answered the same N questions: what they say to one question is drawn together, for it is not independent.
    """
    if a.shape != b.shape:
        raise ValueError(f"levels of {a.shape[-1]} and {b.shape[-1]} questions cannot be compared; ask both the same")
    won = (1 + np.sign(a - b)) / 2
    _, low, high, _ = mean(np.atleast_2d(won).mean(axis=0))
    return {
        "n": won.size,
        "win": float((won == 1).mean()),
        "tie": float((won == 0.5).mean()),
        "loss": float((won == 0).mean()),
        "rate": float(won.mean()),
        "low": low,
        "high": high,
    }


def by(asked: Sequence[Preference], values: np.ndarray, group: Callable[[Preference], str]) -> dict[str, float]:
    """The mean of values (N,) in each group of questions."""
    names = np.array([group(each) for each in asked])
    return {name: float(values[names == name].mean()) for name in sorted(set(names.tolist()))}


def dial(
    model: str | Path, asked: Sequence[Preference], *, temperature: float = 0.0, seed: int = 0
) -> dict[int, dict[str, Any]]:
    """`summary` of the model at each quality tag, from 0 to 100."""
    decoder, tok = load(model)
    return {
        tag: summary(asked, levels(asked, reply_all(decoder, tok, asked, tag=tag, temperature=temperature, seed=seed)))
        for tag in QUALITIES
    }


def compare(
    arms: Mapping[str, str | Path], asked: Sequence[Preference], *, temperature: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """All arms on the same questions: `levels` and `summary` of each, and `versus` of each two as "a over b"."""
    found = {
        name: levels(asked, answers(folder, asked, temperature=temperature, seed=seed)) for name, folder in arms.items()
    }
    names = list(arms)
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]]
    return {
        "summary": {name: summary(asked, each) for name, each in found.items()},
        "versus": {f"{a} over {b}": versus(found[a], found[b]) for a, b in pairs},
        "levels": {name: each.tolist() for name, each in found.items()},
    }
