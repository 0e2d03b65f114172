"""Whether `--plan` tells the truth: planned memory and time beside what runs really took.

Each case is three plans and one run. The formulae say what tensors need; an estimate of the allocator's holes makes
that a plan before anything runs; `--plan` itself runs six steps of the real loop in a process of its own and says what
these took. The run is another process with twice as many steps. A process first trains a model of a few weights with
the same settings, so that libraries, threads and the compiler are there; memory is the peak of what is resident
(VmHWM) above that. Time means something on a quiet machine only.

    python -m benchmarks.plan [--cases "nano;moss"] [--no-compile]      # writes benchmarks/results/plan.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.record import ROOT, begin, publish
from moss.model import Decoder, ModelConfig, num_parameters
from moss.optim import make_optimizer
from moss.train import loop
from moss.train.loss import next_token
from moss.train.machine import compile_blocks
from moss.train.memory import Job, Net
from moss.train.plan import FIXED, Watch, plan, timed

# Name: (config, rows of a micro-batch, their length, micro-batches of a step). Small and large vocabularies, models
# whose weights weigh most and models whose activations do, short and long rows.
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
STEPS = 12  # of a run; a plan has 6


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


def prepared(case: dict[str, Any]) -> Callable[[], None]:
    """A step of the real loop on a new model."""
    config = ModelConfig.from_json(case["model"])
    model = Decoder(config)
    optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.0, muon=True)
    net = loop.computing_copy(model, getattr(torch, case["dtype"]))
    micro = [batch(config, case["rows"], case["length"]) for _ in range(case["accumulate"])]
    if case["compile"]:
        compile_blocks(net, micro[0], next_token, must=True)
    state = loop.State()

    def step() -> None:
        more = {"steps": state.step + 1, "state": state, "net": net}
        loop.run(model, lambda position: (micro, position + 1), next_token, optimizer, lambda step: 1.0, **more)

    return step


def child(case: dict[str, Any]) -> dict[str, Any]:
    """What one process measures: of a plan, or of a run."""
    small = {"vocab_size": 64, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "hidden": 16}
    tiny = replace(ModelConfig.from_json(case["model"]), **small, head_dim=16, ffn=16, rotary_dim=16)
    timed(prepared(case | {"model": tiny.to_json(), "rows": 1, "length": 16, "accumulate": 1}), 1)
    torch._dynamo.reset()
    gc.collect()
    watch = Watch("cpu")
    timing = timed(prepared(case), STEPS - 1 if case["run"] else 5)
    return {"mb": watch.taken() / 1e6, "step_s": timing.step, "mean_s": sum(timing.each) / len(timing.each)}


def measure(name: str, dtype: str, compiled: bool) -> dict[str, Any]:
    """One row of the result."""
    config, rows, length, accumulate = CASES[name]
    case = {"model": config.to_json(), "rows": rows, "length": length, "accumulate": accumulate}
    case |= {"dtype": dtype, "compile": compiled}
    found = plan(job_of(case))
    told = []
    fresh = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # else the second has not to compile any more
    for run in (False, True):
        command = [sys.executable, "-m", "benchmarks.plan", "--child", json.dumps(case | {"run": run})]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=fresh)
        if done.returncode:
            raise SystemExit(done.stderr)
        told.append(json.loads(done.stdout.splitlines()[-1]))
    planned, taken = told
    return {
        "case": name,
        "dtype": dtype,
        "compile": compiled,
        "parameters": num_parameters(config),
        "rows": rows,
        "length": length,
        "accumulate": accumulate,
        "moment": found.moment,
        "tensors_mb": (found.total - found.bytes.get("heap", 0.0)) / 1e6,
        "fixed_mb": sum(found.bytes.get(part, 0.0) for part in FIXED) / 1e6,
        "estimated_mb": found.total / 1e6,
        "planned_mb": planned["mb"],
        "taken_mb": taken["mb"],
        "planned_s": planned["step_s"],
        "taken_s": taken["mean_s"],
        "estimate_off": found.total / 1e6 / taken["mb"] - 1,
        "memory_off": planned["mb"] / taken["mb"] - 1,
        "time_off": planned["step_s"] / taken["mean_s"] - 1,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="names separated by ;", default=";".join(CASES))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return 0
    result: dict[str, Any] = begin("plan") | {"rows": []}
    for name in args.cases.split(";"):
        for compiled in (False, True)[: 2 - args.no_compile]:
            for dtype in ("float32", "bfloat16"):
                row = measure(name, dtype, compiled)
                result["rows"].append(row)
                told = f"{name:24} {dtype:8} compile {compiled:d}: tensors {row['tensors_mb']:5.0f} MB"
                told += f", taken {row['taken_mb']:5.0f}, planned {row['memory_off']:+.1%}"
                print(told + f", estimated {row['estimate_off']:+.1%}, time {row['time_off']:+.1%}", flush=True)
    for kind in ("memory_off", "estimate_off", "time_off"):
        result[kind] = max(abs(row[kind]) for row in result["rows"])
    print(f"-> {publish(result)}: at worst memory {result['memory_off']:.1%}, time {result['time_off']:.1%} off")
    return 0


if __name__ == "__main__":
    sys.exit(main())
