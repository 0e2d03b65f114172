"""What every benchmark writes beside its figures: command, date, commit, machine, versions and load.

result = begin("tools") | {"calculator": ...}
publish(result)                       # benchmarks/results/tools.json
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moss.files import replacing

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("torch", "tokenizers", "llguidance", "safetensors", "rich", "jsonargparse", "sympy", "httpx2"),
    *("tantivy", "trafilatura"),
)


def begin(name: str) -> dict[str, Any]:
    """The head of a result, to be filled with figures."""
    return {
        "benchmark": name,
        "run": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "load_before": os.getloadavg(),
    }


def publish(result: dict[str, Any]) -> Path:
    """Write a result with the load at its end; returns the file, from the project's root."""
    path = RESULTS / f"{result['benchmark']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result | {"load_after": os.getloadavg()}, indent=1, ensure_ascii=False) + "\n"
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path.relative_to(ROOT)


def machine() -> dict[str, Any]:
    """What a figure means nothing without."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def commit() -> str:
    """The commit measured, with a plus sign when the tree differs from it."""
    if shutil.which("git") is None:
        return "unknown"
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    return (head.stdout.strip() or "none") + ("+" if dirty.stdout.strip() else "")
