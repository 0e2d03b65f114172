"""How well a nano uses its tools: `moss eval tools` with 500 questions a set and language, kept as a result.

With MOSS_TEST_DATA set, the released conversations and grade-school problems are asked too.

    python -m benchmarks.nano [--n 500] [--model DIR]      # writes benchmarks/results/nano.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.record import begin, publish
from moss.evals.tool_use import EvalTools, main


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--model", help="folder of a model; nothing = the bundled one")
    args = parser.parse_args()
    folder = os.environ.get("MOSS_TEST_DATA")
    result = begin("nano")
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "tools.json"
        config = EvalTools(model=args.model, n=args.n, batch=64, data=Path(folder) if folder else None, output=output)
        main(config)
        measured = json.loads(output.read_text(encoding="utf-8"))
    print(f"-> {publish(result | {key: measured[key] for key in ('seconds', 'questions', 'unanswered', 'rows')})}")
    return 0


if __name__ == "__main__":
    sys.exit(run())
