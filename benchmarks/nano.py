"""How well a nano uses its tools: `moss eval tools` with 500 questions a set and language, kept as a result.

One process a language, side by side. With MOSS_TEST_DATA set, the released conversations and grade-school problems are
asked too.

    python -m benchmarks.nano [--n 500] [--model DIR]      # writes benchmarks/results/nano.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, begin, publish
from moss.evals.tool_cases import LANGS
from moss.resolve import locate

EVAL = [sys.executable, "-m", "moss", "eval", "tools", "--batch", "64", "--dtype", "float32"]


def ask(lang: str, flags: list[str], output: Path) -> subprocess.Popen[bytes]:
    """Start the evaluation in one language, on one core."""
    command = [*EVAL, "--langs", lang, "--output", str(output), *flags]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--model", help="folder of a model; nothing = the bundled one")
    args = parser.parse_args()
    flags = ["--n", str(args.n)]
    flags += ["--model", args.model] if args.model else []
    flags += ["--data", folder] if (folder := os.environ.get("MOSS_TEST_DATA")) else []
    result: dict[str, Any] = begin("nano")
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place) / f"{lang}.json" for lang in LANGS]
        running = [ask(lang, flags, output) for lang, output in zip(LANGS, outputs)]
        if max([abs(process.wait()) for process in running]):
            return 1
        parts = [json.loads(output.read_text(encoding="utf-8")) for output in outputs]
    result |= {
        "model_sha256": hashlib.sha256((locate(args.model) / "model.safetensors").read_bytes()).hexdigest(),
        "seconds": max(part["seconds"] for part in parts),
        "questions": sum(part["questions"] for part in parts),
        "unanswered": sum(part["unanswered"] for part in parts),
        "rows": [row for part in parts for row in part["rows"]],
    }
    print(f"-> {publish(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
