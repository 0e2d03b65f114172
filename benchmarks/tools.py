"""What a call of the calculator and the solver costs, isolated: median over calls such as people and models make.

Each call is a fresh process behind the whole wall (`MOSS_SANDBOX=strict`); the calculator's own arithmetic without it
stands beside. The processes behind the tools are started first; what that takes is reported apart. With
MOSS_TEST_DATA set, the calls of the released conversations are timed too, and counted by what became of them.

    python -m benchmarks.tools [--repeats 7]      # writes benchmarks/results/tools.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import begin, publish
from moss.tools import calculator, sandbox, solver
from moss.tools.base import ToolError

EXPRESSIONS = (
    "37*12",
    "x=1.5;y=x^2;x+y=?",
    "（3＋5）×2",
    "sqrt(12^2+5^2)",
    "1,250*(1+4%)^3",
    "(90+85+80+75)/4",
    "7!/(3!*4!)",
    "2^100",
    "round(199.99*0.85,2)",
    "pi*7.5^2*20",
)
EQUATIONS = (
    "x+2=5",
    "2x+4=336",
    "x+y=35;2x+4y=94",
    "x^2-5x+6=0",
    "x+x*0.1=880",
    "x^2-2x-7=0",
    "x+y=11;xy=24",
    "12*(x+y)=10;9*(y+z)=15;18*(x+z)=20",
    "4*pi*r^2=100",
    "x^3-6x^2+11x-6=0",
    "60=x+x/5",
    "a=6;b=8;c=sqrt(a^2+b^2);c",
)


def timed(function: Callable[[str], object], arguments: Sequence[str], repeats: int) -> dict[str, Any]:
    """Milliseconds of each call, round by round, after one round that warms up."""
    runs = [[_milliseconds(function, argument) for argument in arguments] for _ in range(repeats + 1)][1:]
    every = [value for run in runs for value in run]
    return {
        "median_ms": round(statistics.median(every), 4),
        "p95_ms": round(sorted(every)[int(len(every) * 0.95)], 4),
        "per_call_median_ms": {
            argument: round(statistics.median(run[index] for run in runs), 4)
            for index, argument in enumerate(arguments)
        },
        "repeats_ms": [[round(value, 4) for value in run] for run in runs],
    }


def _milliseconds(function: Callable[[str], object], argument: str) -> float:
    begun = time.perf_counter()
    function(argument)
    return (time.perf_counter() - begun) * 1e3


def start(box: sandbox.Sandbox) -> float:
    """Seconds until the process behind a tool takes calls."""
    begun = time.perf_counter()
    assert box.layers
    return round(time.perf_counter() - begun, 4)


def released_calls(folder: Path) -> dict[str, Any]:
    """The released conversations' calls: what became of them, and the median time of each tool."""
    counts: Counter[str] = Counter()
    seconds: dict[str, list[float]] = {"Calculate": [], "Solve": []}
    for line in (folder / "moss_tool_calls.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        begun = time.perf_counter()
        try:
            result = (calculator.calculate if row["tool"] == "Calculate" else solver.solve)(row["argument"])
        except ToolError:
            result = "refused"
        seconds[row["tool"]].append(time.perf_counter() - begun)
        counts[f"{row['tool']}: {result if result in ('refused', 'No result.') else 'answered'}"] += 1
    medians = {name: round(statistics.median(values) * 1e3, 4) for name, values in seconds.items()}
    return {"outcomes": dict(sorted(counts.items())), "median_ms": medians}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    result: dict[str, Any] = begin("tools") | {
        "start_s": {"calculator": start(calculator.BOX), "solver": start(solver.BOX)},
        "layers": solver.BOX.layers,
        "calculator": timed(calculator.calculate, EXPRESSIONS, args.repeats),
        "solver": timed(solver.solve, EQUATIONS, args.repeats),
        "calculator_inline": timed(calculator.calculate_inline, EXPRESSIONS, args.repeats),
        "goals": {"calculator median": "<= 3 ms", "solver median": "<= 20 ms"},
    }
    if folder := os.environ.get("MOSS_TEST_DATA"):
        result["released_calls"] = released_calls(Path(folder))
    path = publish(result)
    for name in ("calculator", "solver", "calculator_inline"):
        print(f"{name:18} median {result[name]['median_ms']:8.3f} ms, p95 {result[name]['p95_ms']:8.3f} ms")
    print(f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
