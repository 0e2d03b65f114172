"""How well a nano uses its tools: `moss eval tools` with 500 questions a set and language, kept as a result.

One process a language, side by side. With MOSS_TEST_DATA set, the released conversations are asked too, turn by turn,
and 200 grade-school problems (`moss eval gsm8k`).

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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, begin, publish
from moss.evals.tool_cases import LANGS
from moss.evals.tool_metrics import targets
from moss.resolve import locate

EVAL = [sys.executable, "-m", "moss", "eval"]
PROBLEMS = 200


def ask(task: str, flags: list[str]) -> subprocess.Popen[str]:
    """Start an evaluation on one core; its result comes on standard output."""
    command = [*EVAL, task, "--dtype", "float32", "--json", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def told(running: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What evaluations side by side print in the end."""
    with ThreadPoolExecutor() as pool:
        printed = list(pool.map(lambda process: process.communicate()[0], running))
    if any(process.returncode for process in running):
        raise SystemExit(1)
    return [json.loads(text) for text in printed]


def rows(figures: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The parts among figures, `  set: metric (lang)`, as rows."""
    found = []
    for name, figure in figures.items():
        if name.startswith("  "):
            part, _, rest = name.strip().partition(": ")
            metric, lang = rest[: -len(" (en)")], rest[-len("en)") : -1]
            found.append({"set": part, "metric": metric, "target": targets(part)[metric], "lang": lang, **figure})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--model", help="folder of a model; nothing = the bundled one")
    args = parser.parse_args()
    data = Path(os.environ["MOSS_TEST_DATA"]) if "MOSS_TEST_DATA" in os.environ else None
    result: dict[str, Any] = begin("nano")
    with tempfile.TemporaryDirectory() as place:
        model = ["--model", args.model] if args.model else []
        flags = [*model, "--n", str(args.n), *(["--data", str(data / "moss_003_sft_sample.jsonl")] if data else [])]
        started = time.perf_counter()
        parts = told([ask("tools", [*flags, "--langs", lang, "--out", f"{place}/{lang}"]) for lang in LANGS])
        result["seconds"] = round(time.perf_counter() - started)
        result["questions"] = sum(len(Path(part["rows"]).read_text(encoding="utf-8").splitlines()) for part in parts)
        if data:
            problems = ["--out", place, "--data", str(data / "gsm8k_train_2k.jsonl"), "--limit", str(PROBLEMS)]
            result["gsm8k"] = told([ask("gsm8k", [*model, *problems])])[0]["figures"]
    result["model_sha256"] = hashlib.sha256((locate(args.model) / "model.safetensors").read_bytes()).hexdigest()
    result["notes"] = [note for part in parts for note in part["notes"]]
    result["switches"] = {
        lang: {name: figure for name, figure in part["figures"].items() if not name.startswith(" ")}
        for lang, part in zip(LANGS, parts, strict=True)
    }
    result["rows"] = [row for part in parts for row in rows(part["figures"])]
    print(f"-> {publish(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
