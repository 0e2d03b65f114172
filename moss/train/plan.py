"""What a run will need, memory by part and time, before it runs; and the largest micro-batch that fits.

What    `job_of` says what a run is, `plan(job, free)` takes the fullest moment of its step (`moss/train/memory.py`) and
        picks the micro-batch; `timed` and `Watch` measure the seconds and the memory of a few real steps.
Why     A run that ends for want of memory has cost an hour; one that could have taken twice the micro-batch, a day.
How     found = plan(job, free=free_memory("cpu")); found.micro_tokens, found.total, found.bytes["weights"]
        moss train sft --plan                        # the table, with time and memory of real steps

Tensors are known to the byte; how many holes the allocator of a CPU leaves between them is not. `HEAP` estimates it for
what is picked beforehand, and a plan that has run a few steps says what they took (benchmarks/plan.py).
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median

import torch
from rich.console import Group
from rich.table import Table
from torch import nn

from moss import dist
from moss.data.pack import Rows
from moss.log import span
from moss.lora import Spec, parse
from moss.model import Decoder, Head, ModelConfig, num_parameters
from moss.resolve import locate
from moss.tokenizer import Tokenizer
from moss.train.machine import pick_device, pick_dtype
from moss.train.memory import Bytes, Job, LossKind, Net, moments
from moss.train.settings import Run
from moss.weights import read_config

MARGIN = 0.9  # of the free memory that a pick may fill
# Memory that a CPU process holds for what changes within a step, as a multiple of what lives at its fullest moment. By
# dtype and compiling, from benchmarks/plan.py. A GPU's allocator rounds far less.
HEAP = {("float32", False): 1.5, ("bfloat16", False): 1.5, ("float32", True): 1.2, ("bfloat16", True): 1.2}
PROC = Path("/proc/self")
# Parts without holes, as are those of `Job.frozen`.
FIXED = ("weights", "computing copy", "optimizer", "frozen base", "data", "gradients", "gathered weights", "engine")


@dataclass(frozen=True)
class Plan:
    """What a job needs at its fullest moment."""

    job: Job
    micro_tokens: int
    accumulate: int  # micro-batches of a step, on each rank
    bytes: Bytes  # by part
    free: float  # bytes that the device has for it
    moment: str  # when it needs them
    measured: float = 0.0  # bytes that real steps took

    @property
    def total(self) -> float:
        """Bytes at the fullest moment: measured where steps were run."""
        return self.measured or sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.total <= self.free


# ---------------------------------------------------------------- what a run is


def job_of(stage: str, config: Run, parts: Collection[Decoder], data: object, dtype: torch.dtype) -> Job:
    """What decides the memory of a run that trains these decoders on `launch.Data`."""
    rows = getattr(data, "rows", None)
    held = sum(array.nbytes for array in (rows.ids, rows.mask, rows.starts)) if isinstance(rows, Rows) else 0
    job = _job(
        config,
        [(part.config, part.head_kind, len(getattr(part.embed, "rows", ()))) for part in parts],
        dtype,
        "log-probs" if stage in ("dpo", "ppo") else "cross-entropy",
    )
    return replace(job, data=held, frozen=beside(parts, getattr(data, "frozen", {})), slots=getattr(data, "slots", 0))


def foreseen(config: Run, heads: Iterable[Head], frozen: Mapping[str, Path | None]) -> Job:
    """The job of a run whose models are not there yet, from what their folders say.

    `heads` are those of the models that train, `frozen` the folders of those that do not; adapters have one base for
    all.
    """
    folder, depth = getattr(config, "model", None), getattr(config, "depth", 0)
    new = depth and not (folder and (folder / "config.json").is_file())
    if new:
        sizes = ModelConfig.from_depth(depth, Tokenizer.load(folder or locate(None)).vocab_size)
    else:
        sizes = read_config(locate(folder))
    dtype = pick_dtype(config.dtype, torch.device(pick_device(config.device)))
    job = _job(config, [(sizes, head, 0) for head in heads], dtype, "cross-entropy")
    others = {name: 4.0 * num_parameters(read_config(locate(where))) for name, where in frozen.items()}
    return replace(job, frozen={} if config.lora else others, adaptable=not new and not config.resume)


def _job(config: Run, shapes: Iterable[tuple[ModelConfig, Head, int]], dtype: torch.dtype, of_text: LossKind) -> Job:
    """That of models of these configs, heads and rows that are learnt beside adapters."""
    spec = parse(config.lora) if config.lora else None
    return Job(
        tuple(Net(sizes, head, "scores" if head == "scalar" else of_text, spec, rows) for sizes, head, rows in shapes),
        config.length,
        config.batch_tokens,
        config.micro_tokens,
        dtype,
        muon=getattr(config, "matrix_lr", 0.0) > 0 and spec is None,
        device=torch.device(pick_device(config.device)).type,
        ranks=dist.world(),
    )


def beside(parts: Iterable[nn.Module], frozen: Mapping[str, nn.Module]) -> Bytes:
    """Bytes of models that only compute, by name; what they share with `parts` or with each other counts once."""
    known = {id(each) for part in parts for each in tensors(part)}
    found = dict[str, float]()
    for name, model in frozen.items():
        own = {id(each): each.nbytes for each in tensors(model) if id(each) not in known}
        found[name] = sum(own.values())
        known |= own.keys()
    return found


def held_by(model: nn.Module, device: torch.device) -> int:
    """Bytes of a device's memory that the model has already."""
    return sum(each.nbytes for each in tensors(model) if each.device.type == device.type)


def tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


# ---------------------------------------------------------------- plan


def peak(job: Job, micro: int) -> tuple[str, Bytes]:
    """The fullest moment of a step and what it holds by part, with what the allocator cannot use ("heap")."""

    def with_heap(parts: Bytes) -> Bytes:
        if job.device != "cpu":
            return parts
        moving = sum(value for part, value in parts.items() if part not in FIXED and part not in job.frozen)
        factor = HEAP[str(job.dtype).removeprefix("torch."), job.compiled]
        return parts | {"heap": (factor - 1) * moving}

    every = {name: with_heap(parts) for name, parts in moments(job, micro).items()}
    name = max(every, key=lambda name: sum(every[name].values()))
    return name, {part: value for part, value in every[name].items() if value}


def plan(job: Job, free: float = math.inf) -> Plan:
    """The plan of a job on a device with `free` bytes for it, what already stands there counted as free.

    Where `job.micro_tokens` is 0, the largest part of a step's rows that divides them evenly and fits is picked, or, if
    not even one row fits, one row; `Plan.fits` says which.
    """
    own = job.batch_tokens // job.ranks // job.length
    for rows in divisors(own):
        if job.micro_tokens and rows > job.micro_tokens // job.length:
            continue
        name, parts = peak(job, rows * job.length)
        if job.micro_tokens or rows == 1 or sum(parts.values()) <= MARGIN * free:
            return Plan(job, rows * job.length, own // rows, parts, free, name)
    raise ValueError(f"--micro-tokens {job.micro_tokens} is less than a row of --length {job.length}")


def chosen(job: Job, free: float) -> Plan:
    """As `plan`, but where nothing fits blocks are computed again in backward: slower, and the same numbers."""
    found = plan(job, free)
    return found if found.fits else plan(replace(job, checkpointing=True), free)


def divisors(number: int) -> list[int]:
    """All of them, the largest first."""
    return [each for each in range(number, 0, -1) if number % each == 0]


def refused(found: Plan) -> str:
    """What to say where a job does not fit: what it needs, and the setting that would do."""
    need, job = gigabytes(found.total), found.job
    words = f"{need} are needed ({found.moment}), {gigabytes(found.free)} are free"
    otherwise = "a smaller micro-batch does not change that; take a smaller model, --length or more processes"
    smaller = plan(replace(job, micro_tokens=0), found.free)
    if smaller.fits and smaller.micro_tokens < found.micro_tokens:
        return f"{words}; --micro-tokens {smaller.micro_tokens} needs {gigabytes(smaller.total)}"
    if not job.adaptable or any(net.lora for net in job.nets):
        return f"{words}, and {otherwise}"
    others = {name: value for name, value in job.frozen.items() if name != "reference"}  # which is the base then
    for base in ("", "int8", "int4"):
        nets = tuple(replace(net, lora=net.lora or Spec(base=base)) for net in job.nets)
        adapted = plan(replace(job, nets=nets, micro_tokens=0, muon=False, frozen=others), found.free)
        if adapted.fits:
            flag = f"--lora r={Spec().r}" + (f",base={base}" if base else "")
            return f"{words}; {flag} --micro-tokens {adapted.micro_tokens} needs {gigabytes(adapted.total)}"
    return f"{words}, and {otherwise}"


def explained(job: Job, free: float) -> AbstractContextManager[None]:
    """Running out of memory within a block of steps becomes one line that names the setting that fits: ValueError."""

    def words() -> str:
        now = plan(job, free)
        rows = now.micro_tokens // job.length
        less = next((each for each in divisors(rows) if each < rows), 0) * job.length
        advice = f"--micro-tokens {less}" if now.fits and less else refused(now)
        return f"out of memory with micro-batches of {now.micro_tokens} tokens; {advice}"

    return _saying(words)


def explained_outside(job: Callable[[], Job], free: float) -> AbstractContextManager[None]:
    """The same for what comes before steps and after them: models that are loaded or made, data that are read."""

    def words() -> str:
        of_a_row = replace(needed := job(), micro_tokens=needed.length, checkpointing=True)
        return f"out of memory outside the steps; {refused(plan(of_a_row, free))}"

    return _saying(words)


@contextmanager
def _saying(words: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(words()) from None


# ---------------------------------------------------------------- measured


@dataclass(frozen=True)
class Timing:
    """Seconds of steps."""

    first: float  # the first step, with all that is done once
    each: list[float] = field(default_factory=list)  # of a step in each of the periods after it, on average

    @property
    def step(self) -> float:
        """Of a step: the median over periods."""
        return median(self.each)

    def whole(self, steps: int) -> float:
        """Of a run of so many steps, without validation and saving."""
        return self.first + (steps - 1) * self.step


def timed(step: Callable[[], object], count: int = 5, period: int = 1) -> Timing:
    """Run `step`, a whole step of the real loop, once to warm up and then `count` times, or as many more as whole
    periods take: so many steps, of which one does work for all of them."""
    seconds = []
    for _ in range(1 + -(-count // period) * period):
        began = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return Timing(seconds[0], [mean(seconds[at : at + period]) for at in range(1, len(seconds), period)])


class Watch:
    """The most memory that is taken from when this is made, what the job holds by then (`held` bytes) included.

    Of a CPU process it is what is resident, from Linux's /proc; where that is missing, `taken` is 0.
    """

    def __init__(self, device: str, held: float = 0.0) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() - held
        elif PROC.exists():
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before is no part of this
            (PROC / "clear_refs").write_text("5")  # the peak is forgotten
            self.before = resident("VmRSS") - held

    def taken(self) -> float:
        """Bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        return resident("VmHWM") - self.before if PROC.exists() else 0.0


def resident(key: str) -> float:
    """Bytes of this process: VmRSS, what is resident now; VmHWM, the most that ever was."""
    lines = (PROC / "status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024.0


# ---------------------------------------------------------------- shown


def gigabytes(value: float) -> str:
    """As people read it: `1.53 GB`, `640 MB`."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def table(found: Plan, *, steps: int = 0, timing: Timing | None = None) -> Group:
    """A plan for people: memory by part, the micro-batch, and how long it takes where that was measured."""
    job, parts = found.job, dict(found.bytes)
    shown = Table("part", title="memory")
    for column in ("bytes", "share"):
        shown.add_column(column, justify="right")
    if found.measured:  # tensors are known: what real steps took beyond them is the allocator's
        parts["heap"] = max(0.0, found.measured - sum(parts.values()) + parts.get("heap", 0.0))
    for part, value in sorted(parts.items(), key=lambda pair: -pair[1]):
        shown.add_row(part, gigabytes(value), f"{value / found.total:.0%}")
    shown.add_section()
    shown.add_row("in all" + (", measured" if found.measured else ""), gigabytes(found.total))
    free = "" if math.isinf(found.free) else f", of {gigabytes(found.free)} that are free"
    lines = [f"at its fullest ({found.moment}){free}"]
    where = f", on each of {job.ranks} processes" if job.ranks > 1 else ""
    lines += [f"a step: {found.accumulate} micro-batches of {found.micro_tokens:,} tokens{where}"]
    if timing:
        rate = f"{job.batch_tokens / timing.step:,.0f} places a second"
        whole = f"; {steps:,} steps take {span(timing.whole(steps))}" if steps else ""
        lines.append(f"{timing.step:.2f} s a step, {rate}{whole}")
    if not found.fits:
        lines.append(f"It does not fit: {refused(found)}.")
    return Group(shown, *lines)
