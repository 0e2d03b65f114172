"""Whether `--plan` tells the truth: planned memory and time beside what processes really took.

Each case is a process of its own that first trains a model of a few weights with the same settings (so that libraries,
threads and the compiler are there), takes its memory as the baseline, forgets its peak, and trains the case itself
for some steps; what its peak (VmHWM) is above the baseline is compared with the plan. The time planned from five steps
is compared with that of as many steps after them; it means something on a quiet machine only.

    python -m benchmarks.plan [--cases nano,moss] [--no-compile]      # writes benchmarks/results/plan.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import ROOT, begin, publish
from moss.model import Decoder, ModelConfig, num_parameters
from moss.optim import make_optimizer
from moss.train import loop
from moss.train.launch import compile_hidden
from moss.train.loss import next_token
from moss.train.plan import Job, Net, plan, timed

# Name: (config, rows of a micro-batch, their length, micro-batches of a step). Small and large vocabularies, models
# whose weights weigh most and models whose activations do, rows that blockwise attention takes and rows it does not.
CASES: dict[str, tuple[ModelConfig, int, int, int]] = {
    "nano": (ModelConfig.from_depth(4, 2048), 16, 256, 1),
    "nano, 4 micro-batches": (ModelConfig.from_depth(4, 2048), 8, 512, 4),
    "depth 6": (ModelConfig.from_depth(6, 4096), 8, 512, 1),
    "41M llama": (ModelConfig(16000, 8, 512, 8, ffn=1408), 1, 1024, 1),
    "41M llama, 2 rows": (ModelConfig(16000, 8, 512, 8, ffn=1408), 2, 1024, 2),
    "moss": (ModelConfig(8000, 4, 512, 8, family="moss", rotary_dim=32), 4, 512, 1),
    "grouped queries": (ModelConfig(32000, 6, 512, 8, num_kv_heads=2, head_dim=64, ffn=1536, qk_norm=True), 4, 512, 1),
    "wide, few tokens": (ModelConfig(4000, 4, 1024, 16), 1, 256, 1),
    "long rows": (ModelConfig(4000, 4, 256, 4), 2, 2048, 1),
}
STEPS = 4  # of a case whose memory is measured
TIMED = 5  # steps that a plan times, and after which as many are measured


def batch(model: ModelConfig, rows: int, length: int) -> loop.Micro:
    """Full rows, all learnt but each first token."""
    ids = torch.randint(0, model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[:, 0] = 0
    positions = torch.arange(length).repeat(rows, 1)
    return {"ids": ids, "mask": mask, "positions": positions, "segments": torch.ones_like(mask)}


def job_of(case: dict[str, Any]) -> Job:
    """A case as `plan` takes it."""
    tokens = case["rows"] * case["length"]
    return Job(
        (Net(ModelConfig.from_json(case["model"])),),
        length=case["length"],
        batch_tokens=tokens * case["accumulate"],
        micro_tokens=tokens,
        dtype=getattr(torch, case["dtype"]),
        compiled=case["compile"],
    )


def train(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train a case with the real loop; seconds planned from the first steps and taken by those after, if so many."""
    config = ModelConfig.from_json(case["model"])
    model = Decoder(config)
    optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.0, muon=True)
    net = loop.computing_copy(model, getattr(torch, case["dtype"]))
    micro = [batch(config, case["rows"], case["length"]) for _ in range(case["accumulate"])]
    if case["compile"]:
        compile_hidden(net, micro[0], next_token, must=True)
    state = loop.State()

    def step() -> None:
        more = {"steps": state.step + 1, "state": state, "net": net}
        loop.run(model, lambda position: (micro, position + 1), next_token, optimizer, lambda step: 1.0, **more)

    if steps <= TIMED:
        for _ in range(steps):
            step()
        return {}
    planned = timed(step, TIMED)
    began = time.perf_counter()
    for _ in range(TIMED):
        step()
    return {"planned_s": planned.step * TIMED, "taken_s": time.perf_counter() - began}


def kilobytes(key: str) -> int:
    """A figure of this process from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def child(case: dict[str, Any]) -> dict[str, Any]:
    """What one process measures."""
    if case["timed"]:
        return train(case, 2 * TIMED)
    config = ModelConfig.from_json(case["model"])
    small = {"vocab_size": 64, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "hidden": 16}
    tiny = replace(config, **small, head_dim=16, ffn=16, rotary_dim=16)
    train(case | {"model": tiny.to_json(), "rows": 1, "length": 16, "accumulate": 1}, 2)
    torch._dynamo.reset()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    baseline = kilobytes("VmRSS")
    train(case, STEPS)
    return {"baseline_mb": baseline * 1.024e-3, "taken_mb": (kilobytes("VmHWM") - baseline) * 1.024e-3}


def measure(name: str, dtype: str, compiled: bool, with_time: bool) -> dict[str, Any]:
    """One row of the result."""
    config, rows, length, accumulate = CASES[name]
    case = {"model": config.to_json(), "rows": rows, "length": length, "accumulate": accumulate}
    case |= {"dtype": dtype, "compile": compiled, "timed": False}
    found = plan(job_of(case))
    row = {"case": name, "dtype": dtype, "compile": compiled, "parameters": num_parameters(config)}
    row |= {"rows": rows, "length": length, "accumulate": accumulate, "moment": found.moment}
    row |= {"planned_mb": found.total / 1e6, "live_mb": (found.total - found.bytes.get("heap", 0)) / 1e6}
    row["fixed_mb"] = sum(found.bytes.get(part, 0) for part in ("weights", "computing copy", "optimizer", "data")) / 1e6
    for timing in (False, True)[: 1 + with_time]:
        command = [sys.executable, "-m", "benchmarks.plan", "--child", json.dumps(case | {"timed": timing})]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise SystemExit(done.stderr)
        row |= json.loads(done.stdout.splitlines()[-1])
    row["memory_off"] = row["planned_mb"] / row["taken_mb"] - 1
    if with_time:
        row["time_off"] = row["planned_s"] / row["taken_s"] - 1
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="names separated by ;", default=";".join(CASES))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return 0
    result: dict[str, Any] = begin("plan") | {"rows": []}
    for name in args.cases.split(";"):
        for compiled in (False, True)[: 2 - args.no_compile]:
            for dtype in ("float32", "bfloat16"):
                row = measure(name, dtype, compiled, not args.no_time)
                result["rows"].append(row)
                told = f"{name:24} {dtype:8} compile {compiled:d}: planned {row['planned_mb']:6.0f} MB"
                told += f", taken {row['taken_mb']:6.0f} MB ({row['memory_off']:+.1%})"
                print(told + (f", time {row['time_off']:+.1%}" if "time_off" in row else ""), flush=True)
    result["memory_off"] = max(abs(row["memory_off"]) for row in result["rows"])
    print(f"-> {publish(result)}: the worst is {result['memory_off']:.1%} off")
    return 0


if __name__ == "__main__":
    sys.exit(main())
