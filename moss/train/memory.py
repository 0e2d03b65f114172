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
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch

from moss.attention import BLOCK
from moss.engine.cache import FIRST_LENGTH
from moss.lora import PIECE, Spec, base_bytes, num_trainable
from moss.model import Decoder, Head, ModelConfig
from moss.optim import has_bfloat16
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
    frozen: Bytes = field(default_factory=dict)  # of models that only compute, by name; what they share with nets aside
    slots: int = 0  # replies that PPO's engine writes at a time
    data: float = 0.0  # bytes of the training rows
    ranks: int = 1  # that share a step's rows (moss/dist.py)
    adaptable: bool = True  # adapters could train instead: there is a base

    @property
    def shards(self) -> int:
        """Ranks over which weights, gradients and optimizer are cut; with adapters each has all of them."""
        return 1 if any(net.lora for net in self.nets) else self.ranks


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

    Weights and optimizer are float32; AdamW keeps two numbers a weight, Muon one. Over several shards each has its part
    of them and no copy: what a block computes with is gathered.
    """
    c, found = job.dtype.itemsize, dict[str, float]()
    counted = [sizes(net, job.dtype) for net in job.nets]
    trained, matrices = sum(size.trained for size in counted), sum(size.matrices for size in counted)
    found["weights"] = 4 * trained / job.shards
    found["computing copy"] = c * trained if c != 4 and job.shards == 1 else 0.0
    found["optimizer"] = (8 * trained - (4 * matrices if job.muon else 0)) / job.shards
    found["frozen base"] = max(size.frozen for size in counted)  # one carries all adapters
    found |= job.frozen
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

    `document_attention` keeps keys and values of every head, and all probabilities up to the diagonal's blocks; counted
    as if each row were one document, about the most there can be. Fused attention keeps one float32 a query and head
    instead, but outside torch.compile each block a copy of the mask in the computing dtype.
    """
    model, c, length = net.config, job.dtype.itemsize, job.length
    heads, queries, keys = (
        model.num_heads,
        model.num_heads * model.head_dim,
        model.num_kv_heads * model.head_dim,
    )
    if job.device == "cpu":
        seen = sum(min(BLOCK, length - begin) * min(begin + BLOCK, length) for begin in range(0, length, BLOCK))
        seen *= min(rows, max(1, BLOCK // length))  # rows that share a block
        return (3 + ("o" in _readers(net))) * queries * c, heads * seen / length * c
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
    return norm, model.rotary_dim * 4 + 8 + (0 if job.device == "cpu" else job.length)


# ---------------------------------------------------------------- the moments of a step


def head_needs(net: Net, job: Job, tokens: float) -> tuple[float, float, float]:
    """Bytes of the head and the loss over `tokens` hidden states: what is kept from forward to backward, what is needed
    beside it when forward ends, and when backward begins.

    Cross-entropy makes its gradients while it goes through chunks of logits; log-probabilities make their chunks a
    second time in backward; scores are numbers made of float32.
    """
    model, c = net.config, job.dtype.itemsize
    wide, table = model.hidden * tokens * c, model.vocab_size * model.hidden
    count = job.learnt * tokens
    learnt, cast = model.hidden * count * c, c if c != 4 else 0
    if net.loss == "scores":
        return 4 * model.hidden * count, wide, wide + 4 * model.hidden * count
    first, second = min(CHUNK, count) * model.vocab_size, min(CHUNK, max(0.0, count - CHUNK)) * model.vocab_size
    if net.loss == "log-probs":
        # Of a chunk: logits in float32 with a copy for their logsumexp, or, from bfloat16, with those before the cast;
        # and of the chunk before what has not been overwritten yet. Then what is added up to the head's gradient.
        sums = (4 + cast) * (first + table)
        logits = max(8 * first, (4 * first + (4 + c) * second) if cast else 0)
        again = max(10 * first, 2 * first + 10 * second) if cast else max(8 * first, 4 * first + 8 * second)
        trains = net.lora is None or net.rows > 0
        slopes = max(again, (sums - 4 * first * (cast > 0)) * trains, wide + cast * table * trains)
        return learnt, wide + logits, learnt + 4 * table * trains + slopes
    # Of a chunk: logits and their softmax in float32, and of the one before its gradient. Then what is added to the
    # head's gradient, which float32 does in place. On a CPU the hidden states of learnt tokens are all there are.
    held = learnt if job.device == "cpu" else wide
    logits = max(8 * first, c * first + 8 * second)
    sums = c * first + (4 + cast) * table * (cast > 0)
    return learnt + 4 * table, held + max(logits, sums), learnt + held + (4 + cast) * table


def moments(job: Job, micro: int) -> dict[str, Bytes]:
    """Bytes by part at each moment of a step that may be the fullest, in micro-batches of `micro` places.

    Where two nets train on one loss, what the first keeps is there until backward has gone through the second.
    """
    counted = [sizes(net, job.dtype) for net in job.nets]
    trained = sum(size.trained for size in counted) / job.shards
    before = 4 * trained if math.ceil(job.batch_tokens / job.ranks / micro) > 1 else 0.0  # of micro-batches before
    heads = [head_needs(net, job, micro) for net in job.nets]
    kept = [all_kept(net, job, micro) | {"logits": head[0]} for net, head in zip(job.nets, heads)]
    stays, found, done = standing(job), dict[str, Bytes](), before
    for last, net in reversed(list(enumerate(job.nets))):
        where, made = f" of net {last + 1}" if last else "", going_back(net, job, micro, before > 0)
        others, mine = added(stays, *kept[:last]), kept[last]
        rest = {"outside blocks": kept_outside(net, job)[1] * micro, "logits": 0.0}
        within = {"gradients": done, "logits": heads[last][1]}
        found[f"the loss{where}"] = added(others, mine, within | {"gradients": before})
        found[f"the head's backward{where}"] = added(others, mine, within | {"logits": heads[last][2]})
        within = {"gradients": done + made["top"], "backward": made["working"]}
        found[f"backward of the last block{where}"] = added(others, mine | rest, within)
        within = {"gradients": done + made["blocks"], "backward": made["working"]}
        found[f"backward of the first block{where}"] = added(others, one_block(net, job, mine) | rest, within)
        within = {"gradients": done + made["whole"], "backward": made["ending"]}
        found[f"the embedding's gradient{where}"] = added(others, rest, within)
        done += made["whole"]
    largest = max(size.largest for size in counted)
    width = 2 if job.device != "cpu" or has_bfloat16(torch.device("cpu")) else 4
    orthogonal = 5 * width * largest if job.muon and all(net.lora is None for net in job.nets) else 0
    if job.shards > 1:
        gathered = job.dtype.itemsize * sum(size.tables + 2 * size.block for size in counted)
        found = {name: parts | {"gathered weights": gathered} for name, parts in found.items()}
    if job.dtype.itemsize != 4 and job.shards == 1:  # the copy's become float32 one by one, the embedding's first
        table = max(net.config.vocab_size * net.config.hidden * (net.lora is None) for net in job.nets)
        found["gradients collected"] = added(stays, {"gradients": done + 4 * table})
    if job.slots:
        found["writing replies"] = added(stays, {"engine": engine_needs(job)})
    return found | {"the update": added(stays, {"gradients": 4 * trained, "update": orthogonal})}


def engine_needs(job: Job) -> float:
    """Bytes of the engine that writes PPO's replies: keys and values of its rows, and the policy's weights where it
    needs them once more, gathered from the ranks or, on a CPU, with adapters merged into them."""
    policy, c = job.nets[0], job.dtype.itemsize if job.shards == 1 else 4
    model, columns = policy.config, FIRST_LENGTH
    while columns < job.length:
        columns *= 2
    columns = min(columns, model.max_length)
    rows = 2 * model.num_layers * model.num_kv_heads * model.head_dim * columns * job.slots * c
    whole = sizes(replace(policy, lora=None), job.dtype)
    merged = whole.matrices if policy.lora and job.device == "cpu" else 0
    return rows + c * (merged if job.shards == 1 else whole.trained)


def added(*parts: Bytes) -> Bytes:
    """Bytes by part of several together."""
    return {name: sum(each.get(name, 0.0) for each in parts) for name in {key: 0 for each in parts for key in each}}


def all_kept(net: Net, job: Job, micro: int) -> Bytes:
    """Bytes by part that a net keeps from forward to backward of `micro` places, its head's aside."""
    layers, found = net.config.num_layers, dict[str, float]()
    if job.checkpointing:  # the inputs of all blocks, and all of one block when backward comes to it
        found["block inputs"] = layers * net.config.hidden * job.dtype.itemsize * micro
        layers = 1
    found |= {part: layers * each * micro for part, each in kept_by_block(net, job, micro // job.length).items()}
    return found | {"outside blocks": sum(kept_outside(net, job)) * micro}


def one_block(net: Net, job: Job, kept: Bytes) -> Bytes:
    """What of that is left when backward comes to the first block."""
    return {
        part: each if job.checkpointing and part != "block inputs" else each / net.config.num_layers
        for part, each in kept.items()
    }


def going_back(net: Net, job: Job, micro: int, more: bool) -> dict[str, float]:
    """Bytes that backward of a net makes: gradients, when it is in its last block (`top`), through all `blocks` and
    through the `whole`; beside them what it works with in a block (`working`) and for the embedding (`ending`).

    `more`: gradients of micro-batches before are there. In float32 on one process a gradient is then added to the one
    before at once; a copy's wait to be collected, and those that ranks add up are copied into float32 for it, the
    tables' last of all.
    """
    model, c, size = net.config, job.dtype.itemsize, sizes(net, job.dtype)
    full, alone = net.lora is None, job.shards == 1
    waiting = not (more and c == 4 and alone)
    embedding = model.vocab_size * model.hidden * full
    head = embedding * (net.head == "lm")
    stream, wide = model.hidden * micro * c, model.ffn * micro * c * (1 if model.family == "moss" else 2)
    floats, apart = in_floats(net, size, c), embedding * (1 - model.tie_embeddings * (net.head == "lm"))
    if alone:
        top, blocks, whole = c * (head + size.block), c * (size.trained - apart), c * size.trained
    else:
        cut = 4 * size.trained / job.shards
        top, blocks, whole = c * head + (c + 4) * size.block, cut + c * head, cut + (c + 4) * size.tables
    return {
        "top": top * waiting + c * head * (not waiting),
        "blocks": blocks * waiting,
        "whole": whole * waiting,
        "working": stream + wide + floats,  # gradients of the stream and of the wide layer
        "ending": stream + c * embedding * ((head > 0 and model.tie_embeddings) or not waiting),
    }


def in_floats(net: Net, size: Sizes, c: int) -> float:
    """Bytes of one weight of an integer base as floats, and of what makes it so."""
    return c * size.largest + 16 * min(size.largest, PIECE) if net.lora and net.lora.base else 0.0
