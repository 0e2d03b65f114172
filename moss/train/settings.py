"""The settings that all stages share, and what of them cannot work.

A stage's config extends `Settings` (or `Run`, where it does not train on files) with what is its own; `check` refuses
what no run could do, before anything is read or written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from moss import checkpoint, dist, lora
from moss.config import option
from moss.errors import UsageError
from moss.log import note
from moss.model import num_parameters
from moss.peft import base_folder
from moss.resolve import SMALL, locate
from moss.train import report
from moss.weights import read_config

ADAPTER_LR = 2e-4  # of adapters on a model that is no nano


@dataclass(frozen=True)
class Run:
    """What every run has."""

    data: list[Path] = option(list)  # training files or folders of them; none = material of the scripted teacher
    out: Path = Path("runs/out")  # folder of the run: log.jsonl, step-N checkpoints, at the end the model
    steps: int = 0  # steps to train; 0 = one pass over the data (or --epochs of them)
    batch_tokens: int = 8192  # places for tokens in one step, padding included
    micro_tokens: int = 0  # places computed at a time, the gradients added up; 0 = as many as memory allows
    length: int = 512  # tokens of a packed row
    lr: float = 3e-3  # AdamW, for embeddings, head and norms (and for matrices without Muon)
    warmup: float = 20  # steps of linear warm-up; below 1 a share of all steps
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # of the rate: to 0 over the second half; to 1/10
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto = bfloat16 where the machine has it
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = where it works and the run is long
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto = cuda where there is one
    seed: int = 0  # of the first weights and of the order of the data
    save_every: int = 200  # steps between checkpoints, each with a validation; 0 = only at the end and when stopped
    resume: bool = False  # go on from the newest whole checkpoint in --out, if there is one
    lora: str = ""  # train adapters on frozen weights: r=16,alpha=32,targets=q+v,base=int4 (all but r may be left out)
    plan: bool = False  # print what the run will need, memory by part and time, and stop
    report: bool = False  # draw log.jsonl as report.png in --out at the end


@dataclass(frozen=True)
class Settings(Run):
    """What all stages share that train on files."""

    valid: list[Path] = option(list)  # files whose loss is reported along the way, never trained on
    epochs: float = 1.0  # passes over the data where --steps is 0
    matrix_lr: float = 0.02  # Muon, for the matrices of the blocks; 0 = AdamW at --lr for them too
    weight_decay: float = 0.0  # on matrices


R = TypeVar("R", bound=Run)


def with_rates(config: R, nano: dict[str, float], paper: float) -> R:
    """The settings with the rates that were not given: those of the run that --resume goes on with, else by the model
    that is trained: `nano` up to 64M parameters; above these AdamW alone at the `paper`'s, of adapters `ADAPTER_LR`."""
    missing = [name for name in nano if getattr(config, name) is None]
    start = checkpoint.newest(config.out, lambda skipped: None) if config.resume and missing else None
    values: dict[str, Any] = nano
    if start:
        values = checkpoint.read_info(start)["run"]
    elif missing and num_parameters(read_config(base_folder(locate(getattr(config, "model", None))))) > SMALL:
        values = dict.fromkeys(nano, 0.0) | {"lr": ADAPTER_LR if config.lora else paper}
        note("this is no nano: " + ", ".join(f"--{name.replace('_', '-')} is {values[name]:g}" for name in missing))
    return replace(config, **{name: values[name] for name in missing})


def check(config: Run) -> None:
    """Refuse settings that cannot work, before anything is read or written: UsageError."""
    positive = ("batch_tokens", "length", "epochs", "lr", "depth", "max_tokens")
    others = ("steps", "micro_tokens", "warmup", "save_every", "weight_decay", "matrix_lr", "seed", "beta", "center")
    for name in positive + others:
        value = getattr(config, name, 1)  # some belong to one stage alone
        if not 0 <= value < math.inf or (value == 0 and name in positive):
            least = "above 0" if name in positive else "0 or more"
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be {least}")
    if config.lora:
        lora.parse(config.lora)
    if config.report:
        report.check_can_draw()
    if config.seed >= 2**63:
        raise UsageError(f"--seed is {config.seed}; it must be below 2 to the power of 63")
    step, row = config.batch_tokens, config.length
    micro = config.micro_tokens or step
    if row < 2 or step % row:
        raise UsageError(f"--batch-tokens {step} must be a multiple of --length {row}, and that at least 2")
    if step % micro or micro % row:
        raise UsageError(
            f"--micro-tokens {micro} must divide --batch-tokens {step} and be a multiple of --length {row}"
        )


def shares(config: Run) -> tuple[int, int, int]:
    """Rows of a step, of these each rank's, and of these a micro-batch's."""
    rows, many = config.batch_tokens // config.length, dist.world()
    own = rows // many
    micro = min(config.micro_tokens // config.length or own, own)
    if rows % many or own % micro:
        raise UsageError(
            f"--batch-tokens {config.batch_tokens}: {rows} rows do not go evenly to {many} processes"
            + (f" in micro-batches of {micro}" if config.micro_tokens else "")
        )
    return rows, own, micro
