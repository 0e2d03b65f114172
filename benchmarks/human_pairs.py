"""What a nano learns from human preferences: `hh_harmless_pairs.jsonl`, conversations of which people chose a reply.

Every pair is held out once: the rows are divided into folds, and for each of them `moss train reward` learns from the
others, starting from the bundled model, which has 3M parameters and knows none of what these conversations are about.
Beside it stand what length alone and words alone reach on the same pairs (`benchmarks/preference.py`).

    MOSS_TEST_DATA=DIR python -m benchmarks.human_pairs      # writes benchmarks/results/human_pairs.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.preference import baselines, train
from benchmarks.record import ROOT, begin, publish
from moss.checkpoint import read_info
from moss.data import pairs
from moss.files import replacing
from moss.resolve import locate
from moss.tokenizer import load as load_tokenizer

FOLDS = 3
LENGTH = 1024  # tokens, which the bundled model reads; 57 of the 1,525 pairs are longer and left out
SETTINGS = ["--epochs", "2", "--length", str(LENGTH), "--save-every", "200", "--resume"]


def write(found: list[pairs.Preference], path: Path) -> Path:
    """A file of preference rows, written once."""
    if not path.exists():
        with replacing(path) as beside:
            beside.write_text(
                "".join(json.dumps(pairs.to_json(each), ensure_ascii=False) + "\n" for each in found), encoding="utf-8"
            )
    return path


def leveled(found: list[pairs.Preference]) -> list[pairs.Preference]:
    """The same pairs, the better reply at level 100, which is what a bag of words is fitted to."""
    return [
        replace(each, replies=[replace(reply, level=100 - 100 * place) for place, reply in enumerate(each.replies)])
        for each in found
    ]


def fold(number: int, found: list[pairs.Preference], folder: Path) -> dict[str, Any]:
    """A preference model of all folds but one, and how well it orders that one."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = found[number::FOLDS]
    seen = [each for place, each in enumerate(found) if place % FOLDS != number]
    data = ["--data", write(seen, folder / "seen.jsonl"), "--valid", write(held_out, folder / "held-out.jsonl")]
    seconds = train("reward", folder, [*data, "--seed", str(number), *SETTINGS])
    scores = read_info(folder / "reward")["scores"]
    fitting = list(pairs.Groups(held_out, load_tokenizer(locate(None)), LENGTH, seed=0).preferences)
    return {"pairs": len(fitting), "seconds": seconds, "reward": scores, "baselines": baselines(seen, fitting)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "human_pairs", help="folder of all runs")
    given = parser.parse_args()
    source = Path(os.environ["MOSS_TEST_DATA"]) / "hh_harmless_pairs.jsonl"
    found = leveled([each for each in pairs.read(source) if each.pairs])
    random.Random(0).shuffle(found)
    result = begin("human_pairs")
    result["folds"] = [fold(number, found, given.out.absolute() / f"fold-{number}") for number in range(FOLDS)]
    ways = {
        "preference model": [each["reward"]["accuracy"] for each in result["folds"]],
        "length": [each["baselines"]["length"] for each in result["folds"]],
        "words": [each["baselines"]["words"] for each in result["folds"]],
    }
    sizes = [each["pairs"] for each in result["folds"]]
    result["pooled"] = {}
    for way, shares in ways.items():
        share = sum(size * part for size, part in zip(sizes, shares, strict=True)) / sum(sizes)
        wide = 1.96 * math.sqrt(share * (1 - share) / sum(sizes))
        result["pooled"][way] = [share, share - wide, share + wide]
        print(f"{way}: {share:.1%} of {sum(sizes):,} held-out pairs ({share - wide:.1%} to {share + wide:.1%})")
    print(f"-> {publish(result)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
