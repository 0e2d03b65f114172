"""PAT beside SFT, DPO and PPO: who answers held-out questions better, judged by the scripted truth (`moss/evals`).

Every seed goes the whole road from the bundled model, each stage a command that anybody can type:

    replies      the scripted teacher's replies of all six qualities, each as a conversation
    pairs        other questions, six replies each, with the better one of every two
    base         `moss train sft` on the replies: it learns the task, and to answer as badly as it is taught
    reward       `moss train reward` from `base` on the pairs
    sft          `moss train sft` from `base`, on the replies again
    pat          `moss train pat` from `base`, on the replies, scored by `reward`
    dpo          `moss train dpo` from `base` on the pairs
    ppo          `moss train ppo` from `base` on the questions of the replies, with `reward`

What is fair: `sft` and `pat` begin with the same model and have the same rows, seed, number of steps, tokens a step and
rates. All that differs is the tag, and that the tag comes from a preference model, whose pairs SFT never saw. `dpo` and
`ppo` learn from the same pairs and the same preference model by other means; the seconds of each stage stand in the
result, and no claim of equal cost is made. The questions have phrasings and values that no stage has seen, and the
judge is a program.

    python -m benchmarks.preference                      # writes benchmarks/results/preference.json
    python -m benchmarks.preference --scale 0.02 --out out/small --seeds 0     # to see the road; nothing is published

It can be stopped and started again: finished stages are skipped, one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import ROOT, begin, publish
from moss.checkpoint import read_info
from moss.data import pairs
from moss.evals.preference import compare, dial, questions, versus
from moss.evals.stats import mean
from moss.files import replacing

STEPS = {"base": 800, "reward": 1200, "sft": 800, "pat": 800, "dpo": 50, "ppo": 48}  # 800 are nearly two epochs
SAME = ["--batch-tokens", "4096"]  # of `base`, `sft` and `pat`
REPLIES = 15_000  # conversations to learn from
PAIRS = 9_000  # questions with six replies each
HELD_OUT = 200  # questions of the pairs that the preference model is tested on
QUESTIONS = 300  # that each arm answers
TEMPERATURES = (0.0, 0.7, 1.0)  # the likeliest, as the released model draws, as the model would
ARMS = ("sft", "pat", "dpo", "ppo")
WORD = re.compile(r"[一-鿿]|\w+|[^\w\s]")
RIDGE = 1.0  # of the bag of words


def run(words: Sequence[str | Path], what: str) -> None:
    """One command of `moss`; this program ends where it fails."""
    command = [sys.executable, "-m", "moss", *map(str, words)]
    print(f"== {what}: moss {' '.join(command[3:])}", file=sys.stderr, flush=True)
    code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if code:
        raise SystemExit(f"{what} ended with {code}; the same command goes on from there")


def material(kind: str, n: int, seed: int, path: Path, split: str = "known") -> Path:
    """A file of the scripted teacher, written once."""
    if not path.exists():
        words = ["data", "curriculum", "--kind", kind, "--n", str(n), "--seed", str(seed), "--split", split, "-o", path]
        run(words, path.stem)
    return path


def train(name: str, folder: Path, flags: Sequence[str | Path]) -> float:
    """A run into `folder`/NAME unless it is done; its seconds, those before an interruption included."""
    out, clock = folder / name, folder / f"{name}.seconds"
    spent = float(clock.read_text()) if clock.exists() else 0.0
    if not (out / "moss.json").exists():
        began = time.perf_counter()
        try:
            run(["train", "sft" if name == "base" else name, *flags, "--out", out], name)
        finally:
            spent += time.perf_counter() - began
            clock.write_text(f"{spent:.1f}")
        if not (out / "moss.json").exists():
            raise SystemExit(f"{name} was stopped; the same command goes on from there")
    return spent


def walk(seed: int, folder: Path, scale: float) -> dict[str, Any]:
    """All stages of one seed and what came out."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))

    def scaled(n: int, least: int) -> int:
        return max(least, round(n * scale))

    replies = material("replies", scaled(REPLIES, 120), 100 + seed, folder / "replies.jsonl")
    rows = material("preferences", scaled(PAIRS, 40), 200 + seed, folder / "pairs.jsonl")
    unseen = material("preferences", scaled(HELD_OUT, 10), 300 + seed, folder / "held-out.jsonl", "held_out")
    first, judge = ["--model", folder / "base"], folder / "reward"
    learn = {
        "base": ["--data", replies, *SAME],
        "reward": ["--data", rows, "--valid", unseen, *first],
        "sft": ["--data", replies, *SAME, *first],
        "pat": ["--data", replies, "--reward", judge, *SAME, *first],
        "dpo": ["--data", rows, "--valid", unseen, *first],
        "ppo": ["--data", replies, "--reward", judge, *first],
    }
    common = ["--seed", str(seed), "--save-every", "200", "--resume"]
    seconds = {
        name: train(name, folder, [*flags, *common, "--steps", str(scaled(STEPS[name], 2))])
        for name, flags in learn.items()
    }
    asked = questions(scaled(QUESTIONS, 12))
    told: dict[str, Any] = {"seed": seed, "seconds": seconds, "reward": read_info(judge)["scores"]}
    told["baselines"] = baselines([*pairs.read(rows)], [*pairs.read(unseen)])
    told["pat"] = read_info(folder / "pat")["pat"]
    told["ended"] = {name: read_info(folder / name)["loop"]["ended"] for name in ARMS}
    for temperature in TEMPERATURES:
        print(f"== answers at temperature {temperature:g}", file=sys.stderr, flush=True)
        found = compare({name: folder / name for name in ARMS}, asked, temperature=temperature, seed=seed)
        found["dial"] = dial(folder / "pat", asked, temperature=temperature, seed=seed)
        told[f"temperature {temperature:g}"] = found
    with replacing(done) as beside:
        beside.write_text(json.dumps(told), encoding="utf-8")
    return json.loads(done.read_text(encoding="utf-8"))  # with keys as a second start would find them


# ---------------------------------------------------------------- what a preference model has to beat


def baselines(seen: Sequence[pairs.Preference], unseen: Sequence[pairs.Preference]) -> dict[str, float]:
    """Accuracy on pairs by the length of replies alone, in the direction that fits `seen`, and by their words alone."""
    longer = lengths_agree(seen)
    told = lengths_agree(unseen)
    return {"length": told if longer >= 0.5 else 1 - told, "words": by_words(seen, unseen)}


def lengths_agree(found: Sequence[pairs.Preference]) -> float:
    """The share of pairs whose winner has more characters; equal lengths count half."""
    signs = [
        np.sign(len(each.replies[winner].text) - len(each.replies[loser].text))
        for each in found
        for winner, loser in each.pairs
    ]
    return float((1 + np.mean(signs)) / 2)


def by_words(seen: Sequence[pairs.Preference], unseen: Sequence[pairs.Preference]) -> float:
    """Accuracy of ridge regression from counts of words (Chinese: of characters) to a reply's level."""
    known = sorted({word for each in seen for reply in each.replies for word in WORD.findall(reply.text.casefold())})
    place = {word: number for number, word in enumerate(known)}

    def counts(found: Sequence[pairs.Preference]) -> tuple[np.ndarray, np.ndarray]:
        replies = [reply for each in found for reply in each.replies]
        table = np.zeros((len(replies), len(known)), dtype=np.float32)
        for line, reply in enumerate(replies):
            for word in WORD.findall(reply.text.casefold()):
                if word in place:
                    table[line, place[word]] += 1
        return table, np.array([reply.level for reply in replies], dtype=np.float32)

    table, level = counts(seen)
    weights = np.linalg.solve(table.T @ table + RIDGE * np.eye(len(known)), table.T @ (level - level.mean()))
    scores, begin, right = counts(unseen)[0] @ weights, 0, list[float]()
    for each in unseen:
        right += [(1 + np.sign(scores[begin + winner] - scores[begin + loser])) / 2 for winner, loser in each.pairs]
        begin += len(each.replies)
    return float(np.mean(right))


# ---------------------------------------------------------------- all seeds


def pooled(told: Sequence[dict[str, Any]], temperature: float) -> dict[str, Any]:
    """All seeds together: right answers and win rates of each arm over each, with intervals over the questions."""
    name = f"temperature {temperature:g}"
    found = {arm: np.array([each[name]["levels"][arm] for each in told]) for arm in ARMS}  # (seeds, questions)
    tags = told[0][name]["dial"]
    return {
        "right": {arm: mean(levels.mean(axis=0) / 5)[:3] for arm, levels in found.items()},
        "versus": {f"{a} over {b}": versus(found[a], found[b]) for a in ARMS for b in ARMS if a != b},
        "dial": {tag: float(np.mean([each[name]["dial"][tag]["right"] for each in told])) for tag in tags},
    }


def show(result: dict[str, Any]) -> None:
    """The figures that the project promises, as lines."""
    for each in result["seeds"]:
        scores, plain = each["reward"], each["baselines"]
        print(
            f"seed {each['seed']}: preference model {scores['accuracy']:.1%} of held-out pairs "
            f"(length alone {plain['length']:.1%}, words alone {plain['words']:.1%}); seconds "
            + ", ".join(f"{name} {spent:.0f}" for name, spent in each["seconds"].items())
        )
    for name, found in result["pooled"].items():
        print(name)
        print("  right: " + ", ".join(f"{arm} {mean:.1%}" for arm, (mean, *_) in found["right"].items()))
        print("  dial: " + ", ".join(f"{tag}: {mean:.1%}" for tag, mean in found["dial"].items()))
        for pair in ("pat over sft", "dpo over sft", "ppo over sft", "pat over dpo", "pat over ppo"):
            won = found["versus"][pair]
            print(f"  {pair}: {won['rate']:.1%} ({won['low']:.1%} to {won['high']:.1%}), {won['tie']:.1%} ties")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="of steps and material; below 1 nothing is published")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "preference", help="folder of all runs")
    given = parser.parse_args()
    result = begin("preference")
    told = [walk(seed, given.out.absolute() / f"seed-{seed}", given.scale) for seed in given.seeds]
    result["steps"], result["questions"] = STEPS, QUESTIONS
    result["pooled"] = {f"temperature {t:g}": pooled(told, t) for t in TEMPERATURES}
    for each in told:
        for temperature in TEMPERATURES:
            del each[f"temperature {temperature:g}"]["levels"]
    result["seeds"] = told
    show(result)
    if given.scale == 1:
        print(f"-> {publish(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
