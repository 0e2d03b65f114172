"""What training holds in memory, byte by byte: the formulae behind `--plan` and docs/scaling.md.

What    `standing` is there all the time (weights, optimizer …), `kept_by_block` is what forward keeps for backward, and
        `moments` adds both up at each moment of a step that may be the fullest.
Why     Formulae can be read, and hold for models that are not at hand.
How     job = Job((Net(model.config),), length=512, batch_tokens=8192, dtype=torch.bfloat16)
        {name: sum(parts.values()) for name, parts in moments(job, micro=4096).items()}

Pure functions of sizes. What is kept is what `moss/model.py` makes autograd keep in PyTorch 2.13 on a CPU: tests
compare it with the tensors that are really saved, and the moments with those that are really alive. Letters as in
`moss/model.py`; `c` is the bytes of a number in the computing dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from moss.model import BLOCK, BLOCKS_PAY, SCORES_FIT, Decoder, Head, ModelConfig
from moss.train.lora import PIECE, Spec, base_bytes, num_trainable
from moss.train.loss import CHUNK

BATCH = 4 * 8  # bytes a place of a packed batch takes: four arrays of int64

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
    # In float32 on one process a gradient is added to the one before at once; a copy's wait to be collected, and those
    # that ranks add up are copied into float32 for it, the tables' last of all.
    waiting = not (before and c == 4 and job.ranks == 1)
    tables, alone = sum(each.tables for each in counted), job.ranks == 1
    top = c * tables + (c + 4 * (not alone)) * size.block * waiting
    found["backward of the last block"] = {
        **stays,
        "gradients": before + top,
        **kept,
        "outside blocks": rest,
        "backward": working(last, job) * micro + in_floats(last, size, c),
    }
    lowest = {part: each / last.config.num_layers for part, each in kept.items()}
    if job.checkpointing:  # of the one block that is computed again there is all
        lowest |= {part: each for part, each in kept.items() if part != "block inputs"}
    lowest["outside blocks"] = rest
    whole = before + c * trained * waiting if alone else 4 * trained / job.ranks + (c + 4) * tables
    found["backward of the first block"] = {
        **stays,
        "gradients": whole,
        **lowest,
        "backward": 2 * last.config.hidden * c * micro + c * tables + in_floats(last, size, c),
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
