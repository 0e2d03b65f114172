"""More than one process: the model sharded over the ranks that `torchrun` started, and what ranks must agree on.

What    `started` joins the ranks, `shard` cuts a model over them (FSDP2, the field's ZeRO-3: weights, gradients and
        optimizer state), `whole` puts it together again, `local`, `joined` and `spread` do so with
        tensors, `write_shards` and `read_shards` keep them on disk. `sums`, `highest`, `first` and `agreed` are how
        ranks come to one decision.
Why     A rank that skips a step, stops or fails alone leaves the others waiting for ever; so whatever decides is made
        the same on all of them here, and without `torchrun` every function is the plain thing that it says.
How     with started("cuda"):
            shard(model, torch.bfloat16)                  # before the optimizer is made
            loss, count = sums([loss, count])
        torchrun --nproc-per-node 8 -m moss train sft …   # see docs/cluster.md

Mixed precision is where `shard` puts it: weights, gradients and optimizer in float32 and sharded, a block's weights
gathered in the computing dtype while it computes, gradients added up over ranks in float32. Ranks talk NCCL on GPUs
and gloo on CPUs; numbers and decisions go through gloo on both, so that they wait for no kernel.

What of PyTorch is imported inside functions takes most of a second that `moss chat` should not pay.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as ranks
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moss.log import console
from moss.model import Block, Decoder, rotary_frequencies

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

PATIENCE = timedelta(minutes=30)  # that a rank waits for another: rank 0 may be hashing a large checkpoint

T = TypeVar("T")


# ---------------------------------------------------------------- ranks


@contextmanager
def started(device: str) -> Iterator[None]:
    """Join the ranks of `torchrun`, as its environment says; without it, or where they are joined already, nothing.

    What is said to people is said by rank 0 alone. After an error nobody is waited for: the process ends.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or ranks.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(local_rank())
    ranks.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    console.quiet = rank() > 0
    yield
    console.quiet = False
    ranks.destroy_process_group()


def rank() -> int:
    """This process's number; 0 is the one that writes and speaks."""
    return ranks.get_rank() if ranks.is_initialized() else 0


def world() -> int:
    """How many processes compute together."""
    return ranks.get_world_size() if ranks.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def sums(values: Sequence[float]) -> list[float]:
    """Each value summed over all ranks, in float64; the same bits on every rank."""
    if world() == 1:
        return list(values)
    told = torch.tensor(values, dtype=torch.float64)
    ranks.all_reduce(told)
    return told.tolist()


def highest(value: int) -> int:
    """The largest of the ranks' values."""
    told = torch.tensor(value)
    if world() > 1:
        ranks.all_reduce(told, ranks.ReduceOp.MAX)
    return int(told)


def gathered(value: T) -> list[T]:
    """Every rank's value, in their order."""
    told = [value] * world()
    if world() > 1:
        ranks.all_gather_object(told, value)
    return told


def first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, for all ranks. Where it fails there, the others end without a word of their own."""
    told: list[Any] = [None, False]
    try:
        if rank() == 0:
            told = [make(), True]
    finally:
        if world() > 1:
            ranks.broadcast_object_list(told)
    if not told[1]:
        raise SystemExit(1)
    return told[0]


@contextmanager
def agreed() -> Iterator[None]:
    """A block that ends in an error on all ranks where writing fails on one; on the others in an OSError."""
    failure: Exception | None = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors hide the system's own
        failure = error
    told = [number for number, failed in enumerate(gathered(failure is not None)) if failed]
    if failure:
        raise failure
    if told:
        raise OSError(errno.EIO, f"rank {told[0]} could not write")


# ---------------------------------------------------------------- sharding


@cache
def _mesh(size: int) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cuda" if "nccl" in ranks.get_backend_config() else "cpu", (size,))


def shard(model: Decoder, dtype: torch.dtype) -> None:
    """Cut a float32 model over all ranks, in place, to compute in `dtype`; `hidden` and `forward` gather what they use.

    Each block is gathered for itself, forward and backward. Embedding, head and last norm are one group that stays
    gathered from forward to backward, so that a loss may use their weights outside the model, tied or not. Blocks are
    moved to the device one at a time. Gradients are summed over ranks, not averaged: the loop divides by the count.
    Make the optimizer before the first forward: after one without a backward, `parameters()` has gathered weights too.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Inputs are not cast: the angles of the rotary embedding are float32 in every dtype.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=_mesh(world()), mp_policy=policy)
    fully_shard(model, mesh=_mesh(world()), mp_policy=policy, reshard_after_forward=False)
    for module in shards(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no division within a reduction
    register_fsdp_forward_method(model, "hidden")


def shards(model: nn.Module) -> list[FSDPModule]:
    """What of the model is gathered at a time; nothing where every rank holds it whole."""
    if world() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole(model: Decoder, *, everywhere: bool = False) -> Decoder:
    """The model itself where it is not sharded. Else a plain one of all its weights: on the CPU of rank 0, and without
    weights (on `meta`) elsewhere; with `everywhere` on every rank's device. All ranks must call this together.
    """
    if not shards(model):
        return model
    for module in shards(model):
        module.reshard()  # a forward without backward leaves the last group gathered, in the computing dtype
    with torch.device("meta"):
        plain = Decoder(model.config, model.head_kind)
    held = dict[str, Tensor]()
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
        if everywhere or rank() == 0:
            held[name] = value if everywhere else value.cpu()
    if held:
        plain.load_state_dict(held, assign=True)
        plain.rotary = rotary_frequencies(model.config)[0].to(plain.embed.weight.device)
    return plain


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only its part."""
    if world() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def add_up(model: nn.Module) -> None:
    """Give all ranks the sum of their gradients of a model that each holds whole: adapters over a frozen base. What is
    sharded was added up by its backward."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if world() == 1 or shards(model):
        return
    flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in trained])
    ranks.all_reduce(flat)
    for parameter, total in zip(trained, flat.split([parameter.numel() for parameter in trained]), strict=True):
        parameter.grad = total.view_as(parameter)


def norm(grads: Sequence[Tensor]) -> float:
    """The Euclidean norm of all gradients, sharded or not."""
    total = torch.nn.utils.get_total_norm(grads)
    return float(total.full_tensor() if is_sharded(total) else total)  # type: ignore[attr-defined]


def spread(value: Tensor) -> DTensor:
    """This rank's part of a tensor that every rank holds whole, cut as `shard` cuts parameters."""
    from torch.distributed.tensor import DTensor, Shard

    mesh, rows = _mesh(world()), -(-value.shape[0] // world())
    mine = value[rank() * rows : (rank() + 1) * rows].to(mesh.device_type, copy=True)
    return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride())


def local(value: Tensor) -> Tensor:
    """This rank's rows of a tensor; all of one that is not sharded."""
    return value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]


def joined(rows: Tensor, like: Tensor) -> Tensor:
    """The whole of what every rank holds its rows of, cut as `like` is."""
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    shape = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, **shape).full_tensor()


# ---------------------------------------------------------------- activations


def recompute(model: nn.Module) -> None:
    """Let every block of the decoders in `model` keep its input alone for the backward pass and compute the rest again
    there (activation checkpointing): same numbers, about a third more time, a fraction of the memory."""
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        # Nothing in a block draws a random number, so there is no state of that to keep.
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again  # type: ignore[method-assign]


# ---------------------------------------------------------------- on disk


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Each rank's parts of sharded tensors into one file of its own; OSError on all ranks where one fails.

    The files are safetensors, which `torch.distributed.checkpoint` can write instead of its own format: that one keeps
    a pickle (`.metadata`), which runs code of whoever wrote it when it is read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        number, (cause, _) = next(iter(error.failures.items()))
        raise OSError(errno.EIO, f"rank {number} could not write its shard: {cause}", str(folder)) from None


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The named tensors, given by shape and dtype (on `meta`), from the shards of however many ranks: whole on one
    process, else cut over the ranks of now. ValueError where the files do not hold them."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.tensor import Shard, empty

    cut: dict[str, Any] = {"device_mesh": _mesh(world()), "placements": [Shard(0)]} if world() > 1 else {}
    make = empty if cut else torch.empty
    found = {name: make(*value.shape, dtype=value.dtype, **cut) for name, value in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as `no_dist` asks for
            load(dict(found), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not cut)
    except (CheckpointException, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"the shards in {folder} cannot be read: {str(error).strip().splitlines()[-1]}") from None
    return found
