"""What a run will need, memory by part and time, before it runs; and the largest micro-batch that fits.

What    `plan(job, free)` adds up what training holds: weights, the copy that computes, gradients, optimizer, and what
        forward keeps for backward, at the moment of a step when they are most together. `timed` measures steps.
Why     A run that ends for want of memory has cost an hour; one that could have taken twice the micro-batch, a day.
How     job = Job((Net(model.config),), length=512, batch_tokens=8192, dtype=torch.bfloat16)
        found = plan(job, free=free_memory("cpu")); found.micro_tokens, found.total, found.bytes["weights"]
        moss train sft --plan                        # the table, and the time from five real steps

Everything here but `free_memory` and `timed` is a pure function of sizes. The lists of what is kept are those of
`moss/model.py` as PyTorch 2.13 differentiates it on a CPU; tests compare them with the tensors that autograd really
saves, and benchmarks/plan.py compares totals with the memory that processes really took.

Letters as in `moss/model.py`, and M = tokens of a micro-batch. `c` is the bytes of a number in the computing dtype.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from rich.table import Table

from moss.log import span
from moss.model import BLOCK, BLOCKS_PAY, SCORES_FIT, Decoder, Head, ModelConfig
from moss.train.lora import PIECE, Spec, base_bytes, num_trainable
from moss.train.loss import CHUNK

MARGIN = 0.9  # of the free memory that a pick may fill: a plan is right to within a tenth
BATCH = 4 * 8  # bytes a place of a packed batch takes: four arrays of int64
# Memory that a CPU process holds for what it computes with, as a multiple of what lives at the peak: the allocator
# cannot give every hole to the next tensor. By dtype and compiling, from benchmarks/plan.py; a GPU's rounds far less.
HEAP = {("float32", False): 1.35, ("bfloat16", False): 1.45, ("float32", True): 1.12, ("bfloat16", True): 1.15}

Bytes = dict[str, float]
LossKind = Literal["cross-entropy", "log-probs", "scores"]


@dataclass(frozen=True)
class Net:
    """A decoder that trains."""

    config: ModelConfig
    head: Head = "lm"
    loss: LossKind = "cross-entropy"  # what its hidden states go into: pretrain, sft, pat | dpo, ppo | reward, critic
    lora: Spec | None = None  # adapters train on a frozen base
    rows: int = 0  # new rows of the table that are learnt beside adapters


@dataclass(frozen=True)
class Job:
    """All that decides a run's memory."""

    nets: tuple[Net, ...]  # that train: one, or policy and critic
    length: int  # places of a row
    batch_tokens: int  # places of a step
    micro_tokens: int = 0  # places computed at a time; 0 = as many as fit
    dtype: torch.dtype = torch.float32  # to compute in
    muon: bool = True  # for the matrices of the blocks, else AdamW
    compiled: bool = False
    checkpointing: bool = False  # blocks keep their input alone, and are computed again in backward
    device: str = "cpu"
    learnt: float = 1.0  # share of places with a target
    frozen: float = 0.0  # bytes of models that only compute: reference, preference model
    data: float = 0.0  # bytes of the training rows
    ranks: int = 1  # over which weights, gradients and optimizer are cut (moss/dist.py)


@dataclass(frozen=True)
class Plan:
    """What a job needs at its fullest moment."""

    job: Job
    micro_tokens: int
    accumulate: int  # micro-batches of a step, on each rank
    bytes: Bytes  # by part
    free: float  # bytes that the device has for it
    moment: str = ""  # when it needs them

    @property
    def total(self) -> float:
        """Bytes at the fullest moment."""
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.total <= self.free


# ---------------------------------------------------------------- what stays


@dataclass(frozen=True)
class Sizes:
    """Parameters of a net."""

    trained: int
    matrices: int  # of these, of the blocks' matrices, which Muon takes
    tables: int  # of these, embedding and head
    block: int  # trained ones of one block
    largest: int  # the largest matrix of a block, trained or not
    frozen: float = 0.0  # bytes of a frozen base


@cache
def sizes(net: Net, dtype: torch.dtype) -> Sizes:
    """Counted on the meta device, without allocating anything."""
    with torch.device("meta"):
        model = Decoder(net.config, net.head)
    named = [(name, parameter.numel(), parameter.ndim) for name, parameter in model.named_parameters()]
    layers = net.config.num_layers
    blocks = sum(count for name, count, _ in named if name.startswith("blocks."))
    largest = max(count for name, count, ndim in named if name.startswith("blocks.") and ndim > 1)
    if net.lora is None:
        whole = sum(count for _, count, _ in named)
        matrices = sum(count for name, count, ndim in named if name.startswith("blocks.") and ndim > 1)
        tables = sum(count for name, count, ndim in named if not name.startswith("blocks.") and ndim > 1)
        return Sizes(whole, matrices, tables, blocks // layers, largest)
    adapters = num_trainable(net.config, net.lora)
    whole = num_trainable(net.config, net.lora, net.head, net.rows)
    frozen = base_bytes(net.config, net.lora.base, dtype, net.head)
    return Sizes(whole, adapters, whole - adapters, adapters // layers, largest, frozen)


def standing(job: Job) -> Bytes:
    """What is there all the time: weights, the copy that computes, optimizer, frozen models, rows and a step's batch.

    Weights and optimizer are float32; AdamW keeps two numbers a weight, Muon one. Over several ranks each has its part
    of them and no copy: what a block computes with is gathered.
    """
    c, found = job.dtype.itemsize, dict[str, float]()
    counted = [sizes(net, job.dtype) for net in job.nets]
    trained, matrices = sum(size.trained for size in counted), sum(size.matrices for size in counted)
    found["weights"] = 4 * trained / job.ranks
    found["computing copy"] = c * trained if c != 4 and job.ranks == 1 else 0.0
    found["optimizer"] = (8 * trained - (4 * matrices if job.muon else 0)) / job.ranks
    found["frozen"] = job.frozen + sum(size.frozen for size in counted)
    found["data"] = job.data + BATCH * job.batch_tokens / job.ranks
    return found


# ---------------------------------------------------------------- what forward keeps for backward


def kept_by_block(net: Net, job: Job, rows: int) -> Bytes:
    """Bytes a token that one block keeps, by part, in micro-batches of `rows` rows.

    Each line is a tensor that autograd saves. RMSNorm computes in float32 whatever the dtype: its input and (where its
    weight is trained) its result before the weight; a compiled block computes that again from the residual stream.
    """
    model, c = net.config, job.dtype.itemsize
    hidden, ffn, heads, groups = model.hidden, model.ffn, model.num_heads, model.num_kv_heads
    queries, keys = heads * model.head_dim, groups * model.head_dim
    reads = _readers(net)
    moss, kept = model.family == "moss", dict[str, float]()
    if moss:
        kept["norms"] = hidden * c + 2 * c
        kept["projections"] = hidden * c * ("q" in reads or "up" in reads)
        kept["mlp"] = ffn * c + ffn * c * ("down" in reads)
    else:
        in_float32 = 4 * (2 if net.lora is None else 1)
        per_norm = hidden * (c if job.compiled else in_float32) + 4
        kept["norms"] = 2 * per_norm
        if model.qk_norm:
            kept["norms"] += (queries + keys) * (c if job.compiled else in_float32) + 4 * (heads + groups)
        kept["projections"] = hidden * c * (("q" in reads) + ("up" in reads))
        kept["mlp"] = (2 if job.compiled else 3) * ffn * c + ffn * c * ("down" in reads)
    kept["attention"], kept["scores"] = attention_keeps(net, job, rows)
    if net.lora:
        kept["adapters"] = net.lora.r * c * sum(reads.values())
    return kept


def attention_keeps(net: Net, job: Job, rows: int) -> tuple[float, float]:
    """Bytes a token of one block: of queries, keys, values and result; of scores or masks.

    Fused attention keeps one float32 a query and head instead of scores, but outside torch.compile each block a copy of
    the mask in the computing dtype. `blockwise_attention` keeps all scores up to the diagonal's blocks, in float32
    and in bfloat16 also rounded.
    """
    model, c, length = net.config, job.dtype.itemsize, job.length
    heads, queries, keys = (
        model.num_heads,
        model.num_heads * model.head_dim,
        model.num_kv_heads * model.head_dim,
    )
    fits = length <= BLOCKS_PAY and rows * heads * length * length <= SCORES_FIT
    if job.compiled and job.device == "cpu" and fits:
        seen = sum(min(BLOCK, length - begin) * min(begin + BLOCK, length) for begin in range(0, length, BLOCK))
        return 4 * queries * c, heads * seen / length * (4 if c == 4 else 4 + c)
    return (2 * queries + 2 * keys) * c + 4 * heads, 0.0 if job.compiled else length * c


def _readers(net: Net) -> dict[str, int]:
    """Which layers' inputs are kept, as {target: adapters that read it}: those with weights to learn."""
    shared = {"q": ("q", "k", "v"), "o": ("o",), "up": ("gate", "up"), "down": ("down",)}
    targets = net.lora.targets if net.lora else ()
    there = [name for names in shared.values() for name in names if name != "gate" or net.config.family == "llama"]
    learning = [name for name in there if not targets or name in targets]
    found = {key: sum(name in learning for name in names) for key, names in shared.items()}
    return {key: many for key, many in found.items() if many}


def kept_outside(net: Net, job: Job) -> tuple[float, float]:
    """Bytes a token that is kept beside the blocks: of the last norm; of angles, ids and the forward's mask."""
    model, c = net.config, job.dtype.itemsize
    if model.family == "moss":
        norm = model.hidden * c + 2 * c
    elif job.compiled:
        norm = model.hidden * c + 4
    else:
        norm = 4 * model.hidden * (1 if net.lora else 2) + 4
    return norm, model.rotary_dim * 4 + 8 + job.length


# ---------------------------------------------------------------- the moments of a step


def head_needs(net: Net, job: Job, tokens: float) -> tuple[float, float]:
    """Bytes of the head and the loss over `tokens` hidden states: (when forward ends, when backward begins).

    Cross-entropy makes its gradients while it goes through chunks of logits; log-probabilities make their chunks a
    second time in backward; scores are one number a reply.
    """
    model, c = net.config, job.dtype.itemsize
    wide, table = model.hidden * tokens * c, model.vocab_size * model.hidden
    learnt = job.learnt * wide
    if net.loss == "scores":
        return wide, 2 * wide
    chunk = min(CHUNK, job.learnt * tokens) * model.vocab_size
    # Logits in float32 with a copy for their logsumexp, and those of the chunk before, which are still there.
    logits = (8 if job.learnt * tokens <= CHUNK else 12) * chunk
    if net.loss == "log-probs":
        trains = 4 * table * (net.lora is None or net.rows > 0)
        return wide + learnt + logits, 3 * learnt + trains + 12 * chunk + c * table
    sums = 4 * chunk + 4 * table if c == 4 else (4 + c) * chunk + (4 + c) * table  # slopes, and what is added up
    return wide + learnt + 4 * table + max(logits, sums), 2 * learnt + wide + 8 * table + (c * table if c != 4 else 0)


def moments(job: Job, micro: int) -> dict[str, Bytes]:
    """Bytes by part at each moment of a step that may be the fullest, in micro-batches of `micro` places."""
    rows, c = micro // job.length, job.dtype.itemsize
    counted = [sizes(net, job.dtype) for net in job.nets]
    trained = sum(size.trained for size in counted)
    accumulate = math.ceil(job.batch_tokens / job.ranks / micro)
    before = 4 * trained / job.ranks if accumulate > 1 else 0.0  # of the micro-batches before
    kept: Bytes = {}
    for net in job.nets:
        layers = net.config.num_layers
        if job.checkpointing:  # the inputs of all blocks, and all of one block when backward comes to it
            kept["block inputs"] = kept.get("block inputs", 0.0) + layers * net.config.hidden * c * micro
            layers = 1
        for part, each in kept_by_block(net, job, rows).items():
            kept[part] = kept.get(part, 0.0) + layers * each * micro
    norms, rest = (sum(each) * micro for each in zip(*(kept_outside(net, job) for net in job.nets)))
    kept["outside blocks"] = norms + rest
    stays, found = standing(job), dict[str, Bytes]()
    heads = [head_needs(net, job, micro) for net in job.nets]
    found["the loss"] = {**stays, "gradients": before, **kept, "logits": max(forward for forward, _ in heads)}
    found["the head's backward"] = {**stays, "gradients": before, **kept, "logits": max(back for _, back in heads)}
    last, size = job.nets[-1], counted[-1]
    tables = sum(each.tables for each in counted) * c
    # In float32 on one process a gradient is added to the one before at once; a copy's wait to be collected.
    waiting = not (before and c == 4 and job.ranks == 1)
    top = tables + size.block * c * waiting
    found["backward of the last block"] = {
        **stays,
        "gradients": before + top,
        **kept,
        "outside blocks": rest,
        "backward": working(last, job) * micro + in_floats(last, size, c),
    }
    lowest = {part: each / (1 if job.checkpointing else last.config.num_layers) for part, each in kept.items()}
    lowest["outside blocks"] = rest
    whole = (c * trained if job.ranks == 1 else top) * waiting
    found["backward of the first block"] = {
        **stays,
        "gradients": before + whole,
        **lowest,
        "backward": 2 * last.config.hidden * c * micro + tables + in_floats(last, size, c),
    }
    orthogonal = 10 * size.largest if job.muon and last.lora is None else 0
    found["the update"] = {**stays, "gradients": 4 * trained / job.ranks, "update": orthogonal}
    if job.ranks > 1:
        gathered = c * sum(each.tables + 2 * each.block for each in counted)
        for name in found.keys() - {"the update"}:
            found[name]["gathered weights"] = gathered
    return found


def working(net: Net, job: Job) -> float:
    """Bytes a token that backward of one block works with, at most: gradients of the stream and of the wide layer."""
    wide = net.config.ffn * (1 if net.config.family == "moss" else 2)
    return (net.config.hidden + wide) * job.dtype.itemsize


def in_floats(net: Net, size: Sizes, c: int) -> float:
    """Bytes of one weight of an integer base as floats, and of what makes it so."""
    return c * size.largest + 16 * min(size.largest, PIECE) if net.lora and net.lora.base else 0.0


# ---------------------------------------------------------------- plan


def peak(job: Job, micro: int) -> tuple[str, Bytes]:
    """The fullest moment of a step and what it holds by part, with what the allocator cannot use ("heap")."""

    def with_heap(parts: Bytes) -> Bytes:
        if job.device != "cpu":
            return parts
        moving = sum(value for part, value in parts.items() if part not in FIXED)
        factor = HEAP[str(job.dtype).removeprefix("torch."), job.compiled]
        return parts | {"heap": (factor - 1) * moving}

    every = {name: with_heap(parts) for name, parts in moments(job, micro).items()}
    name = max(every, key=lambda name: sum(every[name].values()))
    return name, {part: value for part, value in every[name].items() if value}


FIXED = ("weights", "computing copy", "optimizer", "frozen", "data", "gradients", "gathered weights")


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


def divisors(number: int) -> list[int]:
    """All of them, the largest first."""
    return [each for each in range(number, 0, -1) if number % each == 0]


def free_memory(device: str) -> float:
    """Bytes that a process could take now: of the device, or of the machine and of the control group it runs in."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024.0 for line in told if line.startswith("MemAvailable"))
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdecimal():
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    return free


def refused(found: Plan) -> str:
    """What to say where a job does not fit: what it needs, and the setting that would do."""
    need, job = gigabytes(found.total), found.job
    words = f"{need} are needed ({found.moment}), {gigabytes(found.free)} are free"
    smaller = plan(replace(job, micro_tokens=0), found.free)
    if smaller.fits and smaller.micro_tokens < found.micro_tokens:
        return f"{words}; --micro-tokens {smaller.micro_tokens} needs {gigabytes(smaller.total)}"
    for base in ("", "int8", "int4"):
        nets = tuple(replace(net, lora=net.lora or Spec(base=base)) for net in job.nets)
        adapted = plan(replace(job, nets=nets, micro_tokens=0, muon=False), found.free)
        if not any(net.lora for net in job.nets) and adapted.fits:
            flag = f"--lora r={Spec().r}" + (f",base={base}" if base else "")
            return f"{words}; {flag} --micro-tokens {adapted.micro_tokens} needs {gigabytes(adapted.total)}"
    return f"{words}, and a smaller micro-batch does not change that; take a smaller model, --length or more processes"


@contextmanager
def explained(job: Job, free: float) -> Iterator[None]:
    """Running out of memory within this block becomes one line that names the setting that fits: ValueError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        now = plan(job, free)
        rows = now.micro_tokens // job.length
        less = next((each for each in divisors(rows) if each < rows), 0) * job.length
        advice = f"--micro-tokens {less}" if now.fits and less else refused(now)
        raise ValueError(f"out of memory with micro-batches of {now.micro_tokens} tokens; {advice}") from None


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Timing:
    """Seconds of steps."""

    first: float  # the first step, with all that is done once
    each: list[float] = field(default_factory=list)  # of the steps after it

    @property
    def step(self) -> float:
        """Of a step: the median."""
        return median(self.each)

    def whole(self, steps: int) -> float:
        """Of a run of so many steps, without validation and saving."""
        return self.first + (steps - 1) * self.step


def timed(step: Callable[[], object], count: int = 5) -> Timing:
    """Run `step`, a whole step of the real loop, once to warm up and then `count` times."""
    seconds = []
    for _ in range(count + 1):
        began = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return Timing(seconds[0], seconds[1:])


# ---------------------------------------------------------------- shown


def gigabytes(value: float) -> str:
    """As people read it: `1.53 GB`, `640 MB`."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def table(found: Plan, *, steps: int = 0, timing: Timing | None = None) -> Table:
    """A plan for people: memory by part, the micro-batch, and how long it takes where that was measured."""
    shown = Table(title=f"memory at its fullest: {found.moment}")
    shown.add_column("part")
    shown.add_column("bytes", justify="right")
    shown.add_column("share", justify="right")
    for part, value in sorted(found.bytes.items(), key=lambda pair: -pair[1]):
        shown.add_row(part, gigabytes(value), f"{value / found.total:.0%}")
    shown.add_section()
    free = "" if math.isinf(found.free) else f"of {gigabytes(found.free)} free"
    shown.add_row("in all", gigabytes(found.total), free)
    job = found.job
    shown.caption = f"{found.accumulate} micro-batches of {found.micro_tokens} tokens a step"
    if timing:
        rate = job.batch_tokens / timing.step
        shown.caption += f"; a step takes {timing.step:.2f} s ({rate:,.0f} places/s)"
        shown.caption += f", {steps} steps {span(timing.whole(steps))}" if steps else ""
    if not found.fits:
        shown.caption += f"\nIt does not fit: {refused(found)}."
    return shown
