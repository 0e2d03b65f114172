"""What every stage does around its loop: folder, resume, device, compiling, saving, the finished model.

A stage's `main` makes tokenizer, data, model and loss, and `train` does the rest:

    with opened(config) as (start, stop):          # the run's folder is ours; `start` is the checkpoint to go on from
        ...
        return train("sft", config, model, tokenizer, data, next_token, start=start, stop=stop)

The folder `--out` then holds `log.jsonl`, the newest checkpoints `step-N/`, and at the end the finished model itself.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from moss import checkpoint, dist, lora, peft
from moss.config import to_json
from moss.data.curriculum import Curriculum, write
from moss.errors import UsageError
from moss.grow import grow
from moss.log import RunLog, console, note
from moss.model import Decoder, Head
from moss.optim import Optimizers, make_optimizer, rate
from moss.resolve import free_memory, locate
from moss.tokenizer import Tokenizer, add_markers
from moss.train import loop, memory, plan, report
from moss.train.machine import COMPILE_PAYS, compile_blocks, pick_device, pick_dtype, to_device
from moss.train.settings import Run, shares
from moss.weights import load_model, read_config

# Settings that may differ between a run and its resumption, because they do not change what is computed (compile and
# device: but for rounding), or (steps, epochs) because training longer is a reason to resume. Data may move: its
# content is compared instead.
FREE = {"data", "valid", "out", "model", "reward", "resume", "compile", "save_every", "plan", "report"}
FREE |= {"steps", "epochs", "device"}
AT_ONCE = 8192  # places of validation rows that are computed at a time: a step's may be more than memory holds
MODEL_FILES = ("moss.json", "model.safetensors", "config.json", "adapter/moss.json")  # of somebody's model


class Data(Protocol):
    """What a stage trains on: rows of fixed length, counted by one position from the start of training.

    One that makes its rows while training (PPO's rollouts) also has `state_dict` and `load_state_dict`, kept in every
    checkpoint, and may end the stage with `stop_reason() -> str`; for `--plan` it has `period`, the positions after
    which its work repeats, `slots`, the replies that an engine writes at a time, and `frozen`, models by name.
    """

    length: int  # places in a row

    def __len__(self) -> int:
        """Rows in an epoch."""
        ...

    @property
    def fill(self) -> float:
        """The share of places that hold a token."""
        ...

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """`count` rows from `position` on, whatever epoch that is; "segments" (count, length) is 0 in padding."""
        ...

    def record(self) -> dict[str, Any]:
        """What `moss.json` says of it; a run goes on with the same data only."""
        ...


@contextmanager
def opened(
    config: Run, *, heads: Sequence[Head] = ("lm",), frozen: Mapping[str, Path | None] = {}
) -> Iterator[tuple[Path | None, loop.Stop]]:
    """Hold the run's folder; give the checkpoint to go on from (None: start anew) and the ear for signals.

    `heads` of the models that will train, and the folders of those that will not, tell what a run needs whose memory
    ends before they are loaded.
    """
    device = pick_device(config.device)
    with loop.Stop() as stop, dist.started(device), ExitStack() as held:
        dist.first(lambda: held.enter_context(checkpoint.lock(config.out)))
        start = dist.first(partial(beginning, config))
        free = min(free_memory(device), free_memory("cpu"))
        with plan.explained_outside(partial(plan.foreseen, config, heads, frozen), free):
            yield start, stop


def beginning(config: Run) -> Path | None:
    """The checkpoint to go on from, None to start anew; refused where that would replace something."""
    start = checkpoint.newest(config.out, note) if config.resume else None
    if not config.resume and checkpoint.steps(config.out):
        raise ValueError(f"{config.out} already holds a run; --resume goes on with it, or choose another --out")
    if not start and (held := [name for name in MODEL_FILES if (config.out / name).exists()]):
        raise ValueError(f"{config.out} holds a model ({held[0]}) that training would replace; choose another --out")
    if start and bool(was := checkpoint.read_info(start)["run"].get("lora", "")) != bool(config.lora):
        words = f"with --lora {was}" if was else "without --lora"
        raise ValueError(f"{start} was made {words}; use the same, or another --out")
    if config.resume:
        note(f"going on from {start}" if start else f"{config.out} holds no checkpoint yet: starting anew")
    return start


def material(config: Run, kind: str, n: int, **draw: Any) -> list[Path]:
    """Where no --data are given: a file in `--out`/material with `n` rows of the scripted teacher.

    It is written once: a resumed run reads the file that it began with.
    """
    path = config.out / "material" / f"{'-'.join([kind, *map(str, draw.values())])}-{n}-{config.seed}.jsonl"

    def make() -> None:
        if not path.exists():
            note(f"no --data: {n:,} rows of the scripted teacher's material ({kind}) go into {path}")
            write(Curriculum(kind=kind, n=n, seed=config.seed, output=path, **draw))  # type: ignore[arg-type]

    dist.first(make)
    return [path]


def load(
    config: Run,
    start: Path | None,
    model: Path | None,
    *,
    head: Head | None = None,
    chat: bool = True,
    extended: Tokenizer | None = None,
) -> tuple[Tokenizer, Decoder]:
    """Tokenizer and model that a stage goes on with: of the checkpoint `start`, else of `model` (None: the bundled).

    `chat`: a base that lacks the format's markers gets them as new ids, each row the mean of its text's pieces; in the
    same way a base grows into a tokenizer that was `extended` from its own. With `--lora` the model may be an adapter,
    which then learns on.
    """
    source = start if start and not config.lora else locate(model)  # under LoRA a checkpoint is the adapter alone
    if peft.is_adapter(source) and not config.lora:
        merged = f", or --model {source.parent}, merged" if (source.parent / "config.json").is_file() else ""
        raise UsageError(f"--model {source} is an adapter; give --lora {peft.spec_of(source)} to go on with it{merged}")
    tokenizer = old = peft.tokenizer_of(source)
    decoder = load_frozen(config, source, head) if config.lora else load_model(source, head=head)
    check_fit(tokenizer, decoder, config.length, source)
    if start and source == start and model and (model / "config.json").is_file():
        check_size(start, model)
    if extended and extended.sha256 != old.sha256:
        tokenizer = extended
        decoder = grow(decoder, old, tokenizer)
        note(f"ids {old.vocab_size:,} to {tokenizer.vocab_size - 1:,} are new; each begins as the mean of its pieces")
    if chat and not tokenizer.has_markers:
        tokenizer = add_markers(old)
        decoder = grow(decoder, old, tokenizer)
        note(f"{source} knows no chat: the ten markers became ids {old.vocab_size} to {tokenizer.vocab_size - 1}")
    if config.lora:
        adapt(config, decoder, start, source, range(old.vocab_size, tokenizer.vocab_size))
    return tokenizer, decoder


def load_frozen(config: Run, source: Path, head: Head | None = None) -> Decoder:
    """The base of `--lora`, in the dtype that computes or as integers, where it computes; refused where `source` is an
    adapter of another kind than the setting's."""
    device = torch.device(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device)
    spec = lora.parse(config.lora)
    if peft.is_adapter(source) and not peft.is_of(source, spec):
        raise UsageError(f"--lora {config.lora}: {source} is an adapter of {peft.spec_of(source)}; give these to go on")
    return peft.load_base_of(source, spec, dtype=dtype, device=device, head=head)


def adapt(config: Run, decoder: Decoder, adapter: Path | None, source: Path, rows: range = range(0)) -> None:
    """Put adapters into a frozen base: those in the folder `adapter`, else those in `source`, the model that the run
    goes on from, else fresh ones; `rows` are learnt with them."""
    spec = lora.parse(config.lora)
    if adapter or peft.is_adapter(source):
        peft.load(decoder, adapter or source, peft.base_folder(source), width=spec.base, rows=rows)
    else:
        lora.inject(decoder, spec, seed=config.seed, rows=rows)


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


def check_size(start: Path, model: Path) -> None:
    """Refuse to go on from a checkpoint that was not begun from a model of the size of `model`; ids may be new."""
    was, given = (replace(read_config(folder), vocab_size=1) for folder in (start, model))
    if was != given:
        raise ValueError(
            f"{start} is of another size than --model {model} ({was.num_layers} layers of {was.hidden}, there "
            f"{given.num_layers} of {given.hidden}); go on without --model, or choose another --out"
        )


def train(
    stage: str,
    config: Run,
    model: nn.Module,
    tokenizer: Tokenizer,
    data: Data,
    loss_fn: loop.LossFn,
    *,
    start: Path | None,
    stop: loop.Stop,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    freeze: Callable[[int, int], None] | None = None,
    extra: dict[str, Any] | None = None,
    checkpointing: bool = False,
) -> int:
    """Run the stage from `start` to its end, and leave the finished model in `config.out`.

    model: a `Decoder`, or a module of several with `parts() -> {"": main, "critic": …}`. `validate(net)` gives named
    figures of the model, `freeze(step, steps)` takes the gradients of what is not to learn yet, `extra` goes into
    `moss.json`.
    Over several ranks all of these are called on all of them together; `validate` gives the same figures on each.
    `checkpointing` keeps no activations within blocks (`dist.recompute`), as a run that would not fit otherwise does.
    """
    device = torch.device(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device)
    rows, own, _ = shares(config)
    job = plan.job_of(stage, config, parts_of(model).values(), data, dtype)
    adaptable = start is None and (stage != "pretrain" or "base" in (extra or {}))
    job = replace(job, adaptable=adaptable, checkpointing=checkpointing)
    found, free = fitting(config, job, plan.held_by(model, device), device, start)
    micro, job = found.micro_tokens // config.length, replace(found.job, micro_tokens=found.micro_tokens)
    if not found.fits and config.plan:
        console.print(plan.table(found))
        return 0
    if not found.fits:
        note(f"this may not fit: {plan.refused(found)}")
    with plan.explained(job, free):
        net = place(model, device, dtype)
        optimizer = optimizer_of(config, model)  # before anything computes: then some weights may stand gathered
        if hasattr(data, "use"):
            data.use(net)  # type: ignore[attr-defined]
    steps = config.steps or math.ceil(getattr(config, "epochs", 1.0) * len(data) / rows)
    info: dict[str, Any] = (
        describe(stage, config, dtype, model, tokenizer, data) | {"micro_rows": micro} | (extra or {})
    )
    state = restore(start, info, optimizer, data) if start else loop.State()
    if state.step > steps:
        raise ValueError(
            f"{start} is past the end of {steps} steps; give --steps {state.step} or more, or another --out"
        )
    size = sum(parameter.numel() for parameter in model.parameters())
    where = str(device) if dist.world() == 1 else f"{dist.world()} processes ({device.type})"
    note(
        f"{stage}: {size / 1e6:.1f}M parameters in {info['run']['dtype']} on {where}, {steps} steps of {rows} rows; "
        f"an epoch has {len(data)} rows, {data.fill:.0%} full"
    )

    def batches(position: int) -> tuple[list[loop.Micro], int]:
        begin = position + dist.rank() * own
        return [to_device(data.batch(begin + at, micro), device) for at in range(0, own, micro)], position + rows

    def save(now: loop.State) -> None:
        rng = {"cpu": torch.stack(dist.gathered(torch.get_rng_state()))}  # (ranks, its size)
        held = {"optimizer": optimizer.state_dict(), "rng": rng, "data": state_of(data)}
        told = info | {"loop": now.to_json()}
        keep = partial(keep_adapter, config) if lora.adapters(model) else None
        parts = parts_of(model)
        checkpoint.save(config.out, now.step, parts=parts, tokenizer=tokenizer, state=held, info=told, adapter=keep)

    pays = 6.0 * size * config.batch_tokens * steps > COMPILE_PAYS.get(device.type, math.inf)
    if state.step < steps and (config.compile == "on" or (config.compile == "auto" and pays)):
        with plan.explained(job, free):
            first = batches(state.position)[0][0]
            job = replace(job, compiled=compile_blocks(net, first, loss_fn, must=config.compile == "on"))
    if job.checkpointing:
        dist.recompute(net)
    if config.plan:

        def step() -> None:
            micro, state.position = batches(state.position)
            one_step(model, net, loss_fn, micro, optimizer)

        for group in optimizer.param_groups:
            group["lr"] = 0.0  # so that replies stay as long as this model writes them
        period = -(-getattr(data, "period", rows) // rows)
        return rehearse(step, job, free, device, period=period, steps=steps, resumed=start is not None)
    log = RunLog(config.out / "log.jsonl", state.step) if dist.rank() == 0 else None
    hooks = loop.Hooks(
        save=save,
        save_every=config.save_every,
        validate=validate,
        log=log,
        stop=stop,
        enough=getattr(data, "stop_reason", None),
        freeze=freeze,
        title=stage,
    )
    warmup = min(round(config.warmup if config.warmup >= 1 else config.warmup * steps), steps)
    stop.training()
    with log or nullcontext():
        schedule = partial(rate, config.schedule, total=steps, warmup=warmup)
        with plan.explained(job, free):
            state = loop.run(
                model, batches, loss_fn, optimizer, schedule, steps=steps, state=state, net=net, hooks=hooks
            )
    if state.step < steps and not state.ended:
        note(f"{stop.asked}: step {state.step} of {steps} is saved in {config.out}; --resume goes on from there")
        return 0 if stop.asked == "SIGTERM" else 128 + signal.Signals[stop.asked]
    if state.ended:
        note(f"ended at step {state.step} of {steps}: {state.ended}")
    result = finish(config, parts_of(model)[""], tokenizer, info | {"loop": state.to_json()})
    if dist.rank() == 0:
        if config.report:
            note(f"drawn: {report.draw(config.out, stage)}")
        print(result)
    return 0


def fitting(
    config: Run, job: plan.Job, held: float, device: torch.device, start: Path | None
) -> tuple[plan.Plan, float]:
    """The micro-batch that fits, and the bytes that are free for the run, `held` bytes of its model among them. A
    resumed run keeps the one that it had, unless another is asked for: the same sums on any machine."""
    free = min(
        dist.gathered(free_memory(str(device)) + held + sum(job.frozen.values()))
    )  # so that all ranks pick alike
    then = checkpoint.read_info(start).get("micro_rows") if start else None
    if then and not config.micro_tokens:
        job = replace(job, micro_tokens=math.gcd(then, shares(config)[1]) * config.length)
    return plan.chosen(job, free), free


def rehearse(
    step: Callable[[], None],
    job: memory.Job,
    free: float,
    device: torch.device,
    *,
    period: int,
    steps: int,
    resumed: bool,
) -> int:
    """Time a few steps, and show what the run will take."""
    stays = memory.standing(job)
    watch = plan.Watch(str(device), sum(stays.values()) - (0 if resumed else stays["optimizer"]))  # made by a step
    with plan.explained(job, free):
        timing = plan.timed(step, period=period)
    console.print(plan.table(replace(plan.plan(job, free), measured=watch.taken()), steps=steps, timing=timing))
    return 0


def one_step(
    model: nn.Module, net: nn.Module, loss_fn: loop.LossFn, micro: list[loop.Micro], optimizer: Optimizers
) -> None:
    """A step as the loop makes it, for `--plan`: the weights that it changes are never kept."""
    _, norm, _, _ = loop.gradients(model, net, loss_fn, micro)
    loop.update(model, net, optimizer, norm, clip=1.0)
    optimizer.zero_grad(set_to_none=True)


def place(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model in float32 where it trains; what computes with it. Over several ranks it is sharded, but with adapters:
    then each has the frozen base and all adapters."""
    if lora.adapters(model):  # the base stays as it is, adapters are float32
        return loop.computing_copy(model.to(device), dtype)
    model.to(device if dist.world() == 1 else None, torch.float32)
    if dist.world() == 1:
        return loop.computing_copy(model, dtype)
    for decoder in parts_of(model).values():
        dist.shard(decoder, dtype)
    return model


def parts_of(model: nn.Module) -> dict[str, Decoder]:
    """The decoders of what trains: the main one under "", others under the name of their subfolder."""
    return {"": model} if isinstance(model, Decoder) else model.parts()  # type: ignore[operator]


def keep_adapter(config: Run, model: Decoder, folder: Path) -> None:
    """The adapter of `model` into a folder, with where its base is."""
    base = peft.base_folder(locate(getattr(config, "model", None))).absolute()
    peft.save(model, folder, lora.parse(config.lora), base)


def finish(config: Run, model: Decoder, tokenizer: Tokenizer, info: dict[str, Any]) -> Path:
    """The finished model into the run's folder, and which folder that is: with adapters these alone into `adapter`,
    and what they and a base of floats make together into the run's own. Integers are not made into floats: the result
    would be two to four times the base, and made into integers again it would lose what was learnt."""
    if lora.adapters(model):
        adapter, keep = config.out / "adapter", partial(keep_adapter, config)
        checkpoint.export(adapter, model=model, tokenizer=tokenizer, info=info, adapter=keep)
        if lora.parse(config.lora).base:
            return adapter
        if dist.rank() == 0:
            lora.merge(model.cpu())
    checkpoint.export(config.out, model=model, tokenizer=tokenizer, info=info)
    return config.out


def optimizer_of(config: Run, model: nn.Module) -> Optimizers:
    """Muon and AdamW, or AdamW alone, at the rates of the settings; adapters are no matrices for Muon."""
    matrix_lr = 0.0 if lora.adapters(model) else getattr(config, "matrix_lr", 0.0)
    decay = getattr(config, "weight_decay", 0.0)
    return make_optimizer(model, lr=config.lr, matrix_lr=matrix_lr or None, weight_decay=decay, muon=matrix_lr > 0)


def state_of(data: Data) -> dict[str, Any]:
    """What data that are made while training need to go on."""
    return data.state_dict() if hasattr(data, "state_dict") else {}  # type: ignore[attr-defined]


def describe(
    stage: str, config: Run, dtype: torch.dtype, model: nn.Module, tokenizer: Tokenizer, data: Data
) -> dict[str, Any]:
    """What `moss.json` says of this run, all but where its loop stands."""
    return {
        "stage": stage,
        "model": parts_of(model)[""].config.to_json(),
        "tokenizer_sha256": tokenizer.sha256,
        "run": to_json(config) | {"dtype": str(dtype).removeprefix("torch.")},
        "data": data.record(),
    }


def restore(start: Path, info: dict[str, Any], optimizer: Optimizers, data: Data) -> loop.State:
    """Optimizer and random state from a checkpoint, and where it stood; refused when it is of another run."""
    then, saved = checkpoint.load(start, sharded=dist.is_sharded(optimizer.param_groups[0]["params"][0]))
    alike = then["stage"] == info["stage"]
    for name, value in info["run"].items():  # before the data, which some of them change
        if alike and name not in FREE and then["run"].get(name) != value:
            flag, was = name.replace("_", "-"), then["run"].get(name)
            raise ValueError(f"{start} was made with --{flag} {was}, now it is {value}; use the same, or another --out")
    for name in ("stage", "model", "tokenizer_sha256", "data"):
        if then[name] != info[name]:
            hint = "the data has changed since" if name == "data" else f"it was {then[name]}, now it is {info[name]}"
            raise ValueError(f"{start} does not fit this run: {hint}; choose another --out to start anew")
    state = loop.State.from_json(then["loop"])
    optimizer.load_state_dict(saved["optimizer"])
    states = saved["rng"]["cpu"].reshape(-1, len(torch.get_rng_state()))  # one for each rank that there was
    torch.set_rng_state(states[dist.rank() % len(states)].clone())  # nothing in training draws from it: any will do
    if hasattr(data, "load_state_dict"):
        data.load_state_dict(saved["data"])  # type: ignore[attr-defined]
    return state


def mean_loss(
    data: Data, loss_fn: loop.LossFn, config: Run, name: str = "loss"
) -> Callable[[nn.Module], dict[str, float]]:
    """A validation: the mean loss, and the mean of each of its figures, over all of `data`, each row once."""

    def validate(net: nn.Module) -> dict[str, float]:
        device, rows = next(net.parameters()).device, min(shares(config)[2], max(1, AT_ONCE // config.length))
        sums, count = dict[str, float](), 0
        begins = range(0, len(data), rows)
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):  # compiling anew would not pay
            for turn in range(0, len(begins), dist.world()):
                own = turn + dist.rank() < len(begins)  # else computed for company: weights are gathered by all
                begin = begins[turn + dist.rank()] if own else 0
                loss = loss_fn(net, to_device(data.batch(begin, min(rows, len(data) - begin)), device))
                count += own * loss.count
                for key, value in {name: loss.total, **loss.figures}.items():
                    sums[key] = sums.get(key, 0.0) + own * float(value)
        total, *values = dist.sums([count, *sums.values()])
        return {key: value / max(total, 1) for key, value in zip(sums, values, strict=True)}

    return validate
