"""What every stage does around its loop: settings, folder, resume, device, compiling, saving, the finished model.

A stage's config extends `Settings` with what is its own, its `main` makes tokenizer, data, model and loss, and
`train` does the rest:

    with opened(config) as (start, stop):          # the run's folder is ours; `start` is the checkpoint to go on from
        ...
        return train("sft", config, model, tokenizer, data, next_token, start=start, stop=stop)

The folder `--out` then holds `log.jsonl`, the newest checkpoints `step-N/`, and at the end the finished model itself.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from moss import checkpoint
from moss.config import option, to_json
from moss.data.pack import Packed
from moss.errors import UsageError
from moss.log import RunLog, note, span
from moss.model import Decoder, num_parameters
from moss.optim import Optimizers, make_optimizer, warmup_stable_decay
from moss.tokenizer import Tokenizer
from moss.train import loop

# Settings that may differ between a run and its resumption, because they do not change what is computed (compile and
# device: but for rounding), or (steps, epochs) because training longer is a reason to resume. Data may move: its
# content is compared instead.
FREE = {"data", "valid", "out", "model", "tokenizer", "resume", "compile", "save_every", "valid_every"}
FREE |= {"steps", "epochs", "device"}
MODEL_FILES = ("moss.json", "model.safetensors", "config.json")  # any of these: somebody's model is there
# Floating-point operations of a run above which the half minute that compiling takes is won back.
COMPILE_PAYS = {"cpu": 4e13, "cuda": 4e15}


@dataclass(frozen=True)
class Settings:
    """What all stages share."""

    data: list[Path] = option(list)  # training files
    valid: list[Path] = option(list)  # files whose loss is reported along the way, never trained on
    out: Path = Path("runs/out")  # folder of the run: log.jsonl, step-N checkpoints, at the end the model
    steps: int = 0  # steps to train; 0 = as many as --epochs takes
    epochs: float = 1.0  # passes over the data where --steps is 0
    batch_tokens: int = 8192  # places for tokens in one step, padding included
    micro_tokens: int = 0  # places computed at a time, the gradients added up; 0 = all
    length: int = 256  # tokens of a packed row
    lr: float = 3e-3  # AdamW, for embeddings, head and norms (and for matrices without Muon)
    matrix_lr: float = 0.02  # Muon, for the matrices of the blocks
    weight_decay: float = 0.0  # on matrices
    warmup: int = 20  # steps of linear warm-up
    decay: float = 0.5  # share of the steps, at the end, over which the rate falls to zero
    clip: float = 1.0  # longest gradient; 0 = any
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto = bfloat16 where the machine has it
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = where it works and the run is long
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto = cuda where there is one
    seed: int = 0  # of the first weights and of the order of the data
    save_every: int = 200  # steps between checkpoints; 0 = only at the end and when stopped
    valid_every: int = 200  # steps between validations; 0 = only at the end
    resume: bool = False  # go on from the newest whole checkpoint in --out, if there is one


def check(config: Settings) -> None:
    """Refuse settings that cannot work, before anything is read or written: UsageError."""
    positive = ("batch_tokens", "length", "epochs", "lr", "matrix_lr", "depth", "max_length")
    others = ("steps", "micro_tokens", "warmup", "save_every", "valid_every", "weight_decay", "clip", "seed")
    for name in positive + others:
        value = getattr(config, name, 1)  # the size of a new model is for one stage alone to choose
        if not 0 <= value < math.inf or (value == 0 and name in positive):
            least = "above 0" if name in positive else "0 or more"
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be {least}")
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
    if config.decay > 1 or config.decay < 0:
        raise UsageError(f"--decay is {config.decay}; it is a share of the steps, from 0 to 1")


@contextmanager
def opened(config: Settings) -> Iterator[tuple[Path | None, loop.Stop]]:
    """Hold the run's folder; give the checkpoint to go on from (None: start anew) and the ear for signals."""
    with loop.Stop() as stop, checkpoint.lock(config.out):
        start = checkpoint.newest(config.out, note) if config.resume else None
        if not config.resume and checkpoint.steps(config.out):
            raise ValueError(f"{config.out} already holds a run; --resume goes on with it, or choose another --out")
        if not start and (held := [name for name in MODEL_FILES if (config.out / name).exists()]):
            raise ValueError(
                f"{config.out} holds a model ({held[0]}) that training would replace; choose another --out"
            )
        if config.resume:
            note(f"going on from {start}" if start else f"{config.out} holds no checkpoint yet: starting anew")
        yield start, stop


def check_fit(tokenizer: Tokenizer, model: Decoder, length: int, folder: Path | None = None) -> None:
    """Refuse a tokenizer or a length that this model cannot take, and damaged weights in `folder`, where it is from."""
    known = model.config.vocab_size
    if tokenizer.vocab_size > known:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {known}; use the model's own")
    if length > model.config.max_length:
        raise ValueError(f"--length {length} is more than the model's max_length {model.config.max_length}")
    if folder and (folder / "moss.json").is_file():
        told = checkpoint.read_info(folder)
        if told["tokenizer_sha256"] != tokenizer.sha256:
            raise ValueError(f"the tokenizer in {folder} is not the one that its model was trained with")
        checkpoint.check_weights(folder, told)


def train(
    stage: str,
    config: Settings,
    model: Decoder,
    tokenizer: Tokenizer,
    data: Packed,
    loss_fn: loop.LossFn,
    *,
    muon: bool = True,
    start: Path | None,
    stop: loop.Stop,
    valid: Packed | None = None,
) -> int:
    """Run the stage from `start` to its end, and leave the finished model in `config.out`."""
    device = torch.device(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device)
    model.to(device, torch.float32)
    matrix_lr = config.matrix_lr if muon else None
    optimizer = make_optimizer(model, lr=config.lr, matrix_lr=matrix_lr, weight_decay=config.weight_decay, muon=muon)
    rows = config.batch_tokens // config.length
    micro = (config.micro_tokens or config.batch_tokens) // config.length
    steps = config.steps or math.ceil(config.epochs * len(data) / rows)
    info = describe(stage, config, dtype, model, tokenizer, data)
    state = restore(start, info, optimizer) if start else loop.State()
    size = num_parameters(model.config)
    note(
        f"{stage}: {size / 1e6:.1f}M parameters in {info['run']['dtype']} on {device}, {steps} steps of {rows} rows; "
        f"an epoch has {len(data)} rows, {data.fill:.0%} full"
    )
    net = loop.computing_copy(model, dtype)

    def batches(position: int) -> tuple[list[loop.Micro], int]:
        return [to_device(data.batch(position + at, micro), device) for at in range(0, rows, micro)], position + rows

    def save(now: loop.State) -> None:
        held = {"optimizer": optimizer.state_dict(), "rng": {"cpu": torch.get_rng_state()}}
        told = info | {"loop": now.to_json()}
        checkpoint.save(config.out, now.step, model=model, tokenizer=tokenizer, state=held, info=told)

    pays = 6.0 * size * config.batch_tokens * steps > COMPILE_PAYS.get(device.type, math.inf)
    if state.step < steps and (config.compile == "on" or (config.compile == "auto" and pays)):
        compile_hidden(net, batches(0)[0][0], loss_fn, must=config.compile == "on")
    log = RunLog(config.out / "log.jsonl", state.step)
    hooks = loop.Hooks(
        save=save,
        save_every=config.save_every,
        validate=partial(validate, data=valid, loss_fn=loss_fn, rows=micro, device=device) if valid else None,
        valid_every=config.valid_every,
        log=log,
        stop=stop,
        title=stage,
    )
    schedule = partial(warmup_stable_decay, total=steps, warmup=min(config.warmup, steps), decay_share=config.decay)
    stop.training()
    with log:
        settings = {"steps": steps, "state": state, "net": net, "clip": config.clip, "hooks": hooks}
        state = loop.run(model, batches, loss_fn, optimizer, schedule, **settings)
    if state.step < steps:
        note(f"{stop.asked}: step {state.step} of {steps} is saved in {config.out}; --resume goes on from there")
        return 128 + signal.Signals[stop.asked]
    checkpoint.export(config.out, model=model, tokenizer=tokenizer, info=info | {"loop": state.to_json()})
    print(config.out)
    return 0


def describe(
    stage: str, config: Settings, dtype: torch.dtype, model: Decoder, tokenizer: Tokenizer, data: Packed
) -> dict[str, Any]:
    """What `moss.json` says of this run, all but where its loop stands."""
    rows = data.rows
    return {
        "stage": stage,
        "model": model.config.to_json(),
        "tokenizer_sha256": tokenizer.sha256,
        "run": to_json(config) | {"dtype": str(dtype).removeprefix("torch.")},
        "data": {"sha256": rows.sha256(), "rows": len(rows), "tokens": len(rows.ids), "packed": len(data)},
    }


def restore(start: Path, info: dict[str, Any], optimizer: Optimizers) -> loop.State:
    """Optimizer and random state from a checkpoint, and where it stood; refused when it is of another run."""
    then, saved = checkpoint.load(start)
    for name in ("stage", "model", "tokenizer_sha256", "data"):
        if then[name] != info[name]:
            hint = "the data has changed since" if name == "data" else f"it was {then[name]}, now it is {info[name]}"
            raise ValueError(f"{start} does not fit this run: {hint}; choose another --out to start anew")
    for name, value in info["run"].items():
        if name not in FREE and then["run"].get(name) != value:
            flag, was = name.replace("_", "-"), then["run"].get(name)
            raise ValueError(f"{start} was made with --{flag} {was}, now it is {value}; use the same, or another --out")
    state = loop.State.from_json(then["loop"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"]["cpu"])
    return state


def validate(
    net: nn.Module, *, data: Packed, loss_fn: loop.LossFn, rows: int, device: torch.device
) -> dict[str, float]:
    """Mean loss over all of `data`, each row once."""
    total, count = 0.0, 0
    with torch.compiler.set_stance("force_eager"):  # compiling once more, without gradients, would not pay
        for position in range(0, len(data), rows):
            batch = data.batch(position, min(rows, len(data) - position))
            loss, counted = loss_fn(net, to_device(batch, device))
            total, count = total + float(loss), count + counted
    return {"loss": total / max(count, 1)}


def to_device(batch: dict[str, Any], device: torch.device) -> loop.Micro:
    """Arrays as tensors where the model is."""
    return {name: torch.from_numpy(value).to(device) for name, value in batch.items()}


def pick_device(wanted: str) -> str:
    """The device, checked to be there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {wanted} cannot be used: {str(error).splitlines()[0]}") from None
    return wanted


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """bfloat16 where `auto` finds hardware for it: elsewhere it is slower than float32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else False
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        has = bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
    return torch.bfloat16 if has else torch.float32


def compile_hidden(net: nn.Module, batch: loop.Micro, loss_fn: loop.LossFn, *, must: bool) -> None:
    """Compile `net.hidden`, proved on one batch; without a working compiler say so and go on uncompiled.

    The head stays out: how many tokens are learnt differs from step to step, and each new shape would compile anew.
    """
    began = time.perf_counter()
    plain = net.hidden
    net.hidden = torch.compile(plain, dynamic=False)  # type: ignore[assignment]
    try:
        loss_fn(net, batch)[0].backward()
        note(f"compiled in {span(time.perf_counter() - began)}")
    except (TorchDynamoException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        if must:
            raise ValueError(f"--compile on: torch.compile does not work here ({reason}); use --compile off") from None
        note(f"torch.compile does not work here ({reason}): going on without it, slower")
        net.hidden = plain  # type: ignore[assignment]
    net.zero_grad(set_to_none=True)
