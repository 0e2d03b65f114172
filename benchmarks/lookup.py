"""What guesses from the prompt bring: the bundled model's answers with and without lookup.

The passes of some questions (those of `moss eval tools`) are noted once and then made again, by turns with and without.
Timed is what comes after the first token. Both must say the same. `widened` is the bundled model with feed-forward
layers of which most columns are zero: the same answers from a quarter of a gigabyte, read for each step as in a large
model.

    python -m benchmarks.lookup [--questions 20] [--rounds 8]      # writes benchmarks/results/lookup.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.record import begin, publish
from moss import resolve
from moss.engine import Engine, Sampling, Stream
from moss.evals.tool_cases import LANGS, scripted
from moss.model import Decoder
from moss.tokenizer import Tokenizer
from moss.tools.base import standard_tools
from moss.tools.run import Options, answer

GREEDY = Options(Sampling(temperature=0, max_tokens=256), grammar=False)
SETS = ("calculator", "solver", "chat", "identity")
FFN = 20_480  # of the widened model
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


def widened(model: Decoder) -> Decoder:
    """The same scores from FFN columns a layer: those that are added are zero."""
    large = Decoder(replace(model.config, ffn=FFN))
    state = large.state_dict()
    for name, weight in model.state_dict().items():
        state[name].zero_()[tuple(slice(size) for size in weight.shape)] = weight
    return large.eval()


def passes_of(name: str, model: Decoder, tok: Tokenizer, questions: int) -> list[Pass]:
    """What the engine is asked when the questions of a set are answered."""
    with Noting(model, slots=1) as engine:
        engine.passes = []
        for lang in LANGS:
            for case in scripted(name, lang, questions, seed=0):
                list(answer(case.dialog, engine, tok, standard_tools(), GREEDY))
        return engine.passes


def measure(name: str, model: Decoder, tok: Tokenizer, args: argparse.Namespace) -> dict[str, Any]:
    """Speed with lookup to speed without, in rounds; which goes first alternates, and each has the process alone."""
    passes, ratios = passes_of(name, model, tok, args.questions), []
    found: dict[bool, tuple[float, list[list[int]], int, int]] = {}
    for turn in range(args.rounds):
        for lookup in (False, True) if turn % 2 else (True, False):
            with Engine(model, slots=1, lookup=lookup) as engine:
                timed(engine, passes[:8])
                found[lookup] = timed(engine, passes)
        if found[True][1] != found[False][1]:
            raise SystemExit(f"{name}: lookup changed an answer")
        ratios.append(found[False][0] / found[True][0])
    _, said, drafted, accepted = found[True]
    figures = {
        "passes": len(passes),
        "tokens": sum(map(len, said)),
        "drafted": drafted,
        "accepted": accepted,
        "speed_with_lookup_to_without": round(median(ratios), 3),
        "rounds": [round(ratio, 3) for ratio in ratios],
    }
    print(f"{name}: {figures}", flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20, help="of a set and language")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model", help="folder of a model; the bundled one if left out")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    model, tok = resolve.load(args.model, dtype=args.dtype)
    result: dict[str, Any] = begin("lookup")
    for label, each in (("bundled", model), ("widened", widened(model))):
        result[label] = {name: measure(name, each, tok, args) for name in SETS}
    print(f"-> {publish(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
