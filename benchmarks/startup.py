"""How long a user waits: `moss --help` until it ends, and `moss chat -p "…"` until the first byte of the answer.

Each is a fresh process; one run beforehand warms the disk and is kept apart. With `--imports` also what the chat's
imports cost, from `python -X importtime`.

    python -m benchmarks.startup [--repeats 7] [--imports]      # writes benchmarks/results/startup.json
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.record import ROOT, begin, publish

QUESTION = "What is 37*12?"


def first_byte(command: list[str]) -> tuple[float, float]:
    """Seconds from the start of the command to its first byte of output, and to its end."""
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise ValueError(f"{' '.join(command)} printed nothing and exited with {process.wait()}")
        first = time.perf_counter() - begun
        process.stdout.read()
    if process.returncode:
        raise ValueError(f"{' '.join(command)} exited with {process.returncode}")
    return first, time.perf_counter() - begun


def measure(command: list[str], repeats: int) -> dict[str, Any]:
    """One warm-up and `repeats` runs of a command."""
    warm_up = first_byte(command)
    runs = [first_byte(command) for _ in range(repeats)]
    return {
        "command": " ".join(["moss", *command[3:]]),
        "first_byte_s": [round(first, 4) for first, _ in runs],
        "end_s": [round(end, 4) for _, end in runs],
        "first_byte_median_s": round(statistics.median(first for first, _ in runs), 4),
        "end_median_s": round(statistics.median(end for _, end in runs), 4),
        "warm_up_s": [round(seconds, 4) for seconds in warm_up],
    }


def imports(top: int = 20) -> list[dict[str, Any]]:
    """The costliest imports of the chat, by time of their own plus everything they pull in."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import moss.terminal"], capture_output=True, text=True, cwd=ROOT
    )
    rows = []
    for line in run.stderr.splitlines():
        parts = [part.strip() for part in line.removeprefix("import time:").split("|")]
        if len(parts) == 3 and parts[0].isdigit():
            rows.append({"module": parts[2], "self_ms": int(parts[0]) / 1e3, "total_ms": int(parts[1]) / 1e3})
    return sorted(rows, key=lambda row: -row["total_ms"])[:top]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--imports", action="store_true", help="print what the chat's imports cost")
    parser.add_argument("--model", help="folder of a model; nothing = the bundled one")
    args = parser.parse_args()
    moss = [sys.executable, "-m", "moss"]
    chat = [*moss, "chat", "-p", QUESTION] + (["--model", args.model] if args.model else [])
    result: dict[str, Any] = begin("startup") | {
        "help": measure([*moss, "--help"], args.repeats),
        "chat": measure(chat, args.repeats),
        "goals": {"help end": "< 0.5 s", "chat first byte": "< 3 s"},
    }
    if args.imports:
        result["imports"] = imports()
        for row in result["imports"]:
            print(f"{row['total_ms']:9.1f} ms  {row['module']}")
    path = publish(result)
    print(f"moss --help: {result['help']['end_median_s']} s; first output of the answer: ", end="")
    print(f"{result['chat']['first_byte_median_s']} s (medians of {args.repeats}) -> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
