"""What guesses from the prompt bring: the bundled model's answers with and without lookup.

The passes of some questions (those of `moss eval tools`) are noted once; then each prompt is given by turns to two
engines, of which one looks up. Timed is what comes after the first token. Both must say the same.

    python -m benchmarks.lookup [--questions 20] [--rounds 5]      # writes benchmarks/results/lookup.json
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.record import begin, publish
from moss import resolve
from moss.engine import Engine, Sampling, Stream
from moss.evals.tool_cases import LANGS, scripted
from moss.evals.tool_use import ask

SETS = ("calculator", "solver", "chat", "identity")
Pass = tuple[Sequence[int], Sampling]


class Noting(Engine):
    """An engine that keeps what it was asked."""

    passes: list[Pass]

    def submit(self, ids: Sequence[int], sampling: Sampling, **settings: Any) -> Stream:
        self.passes.append((ids, sampling))
        return super().submit(ids, sampling, **settings)


def timed(engine: Engine, passes: Sequence[Pass]) -> tuple[float, list[list[int]], int, int]:
    """Seconds after the first tokens, what was said, and how many ids were guessed and were right."""
    took, said, drafted, accepted = 0.0, [], 0, 0
    for ids, sampling in passes:
        stream = engine.submit(ids, sampling)
        first = next(stream)
        begun = time.perf_counter()
        said.append([first.id, *(token.id for token in stream)])
        took += time.perf_counter() - begun
        drafted, accepted = drafted + stream.drafted, accepted + stream.accepted
    return took, said, drafted, accepted


def measure(name: str, plain: Noting, guessing: Engine, tok: Any, args: argparse.Namespace) -> dict[str, Any]:
    plain.passes = []
    for lang in LANGS:
        for case in scripted(name, lang, args.questions, seed=0):
            ask(case, plain, tok, threading.Semaphore(1), 256)
    passes, ratios = plain.passes.copy(), []
    said: list[list[int]] = []
    drafted = accepted = 0
    for _ in range(args.rounds):
        slow, want, *_ = timed(plain, passes)
        fast, said, drafted, accepted = timed(guessing, passes)
        if said != want:
            raise SystemExit(f"{name}: lookup changed an answer")
        ratios.append(slow / fast)
    tokens = sum(map(len, said))
    figures = {
        "passes": len(passes),
        "tokens": tokens,
        "drafted": drafted,
        "accepted": accepted,
        "speed_with_lookup_to_without": round(median(ratios), 3),
    }
    print(f"{name}: {figures}", flush=True)
    return figures | {"rounds": [round(ratio, 3) for ratio in ratios]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20, help="of a set and language")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="folder of a model; the bundled one if left out")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    model, tok = resolve.load(args.model, dtype=args.dtype)
    result: dict[str, Any] = begin("lookup")
    with Noting(model, slots=1, lookup=False) as plain, Engine(model, slots=1) as guessing:
        result["sets"] = {name: measure(name, plain, guessing, tok, args) for name in SETS}
    print(f"-> {publish(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
