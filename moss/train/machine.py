"""Where a stage computes: the device, the type of its numbers, and whether a compiler works there."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from moss import dist
from moss.attention import keep_compiler_out
from moss.log import note, span
from moss.model import Decoder
from moss.optim import has_bfloat16
from moss.train import loop

# Floating-point operations of a run above which the half minute that compiling takes is won back.
COMPILE_PAYS = {"cpu": 4e13, "cuda": 4e15}


def to_device(batch: dict[str, Any], device: torch.device) -> loop.Micro:
    """Arrays as tensors where the model is."""
    return {name: torch.from_numpy(value).to(device) for name, value in batch.items()}


def pick_device(wanted: str) -> str:
    """The device, checked to be there; over several ranks each has the GPU of its own number."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and dist.world() > 1:
        wanted = f"cuda:{dist.local_rank()}"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {wanted} cannot be used: {str(error).splitlines()[0]}") from None
    return wanted


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """bfloat16 where `auto` finds hardware for it: elsewhere it is slower than float32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def compile_blocks(net: nn.Module, batch: loop.Micro, loss_fn: loop.LossFn, *, must: bool) -> bool:
    """Compile every block of the decoders in `net`, proved on one batch; without a working compiler go on uncompiled:
    False.

    Over several ranks a compiler that does not work is an error, since it may work on the others. The head stays out:
    how many tokens are learnt differs from step to step.
    """
    began = time.perf_counter()
    # Each block, not the whole: all share what is compiled once, between them weights may be gathered, and on a CPU the
    # number of tokens differs from batch to batch.
    keep_compiler_out()
    torch._dynamo.config.recompile_limit = 64  # one code serves all blocks, trained or frozen, of policy, critic, …
    blocks = [block for module in net.modules() if isinstance(module, Decoder) for block in module.blocks]
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=batch["ids"].device.type == "cpu")
    try:
        loss_fn(net, batch).total.backward()
        note(f"compiled in {span(time.perf_counter() - began)}")
        works = True
    except (TorchDynamoException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        if must or dist.world() > 1:
            raise ValueError(f"--compile on: torch.compile does not work here ({reason}); use --compile off") from None
        note(f"torch.compile does not work here ({reason}): going on without it, slower")
        for block in blocks:
            del block.forward  # the instance's; the class's own stands again
        works = False
    net.zero_grad(set_to_none=True)
    return works
