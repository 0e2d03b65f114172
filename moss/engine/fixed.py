"""Deterministic mode: the same logits to the last bit, whatever else the engine reads, decodes or remembers.

What makes them differ is that libraries pick another kernel, with another order of additions, for every shape: one
row or eight, a piece of a prompt or a step. Our own kernels (`step.py`) add up each token by itself in one order,
however many there are. So the mode needs them, and takes prompts WIDTH tokens at a time, as they do; steps cost
nothing more. That a token's bits depend on its own row's past alone is looked at before it is promised. They still
change with the machine and the path of the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moss.engine.cache import Cache
from moss.engine.kernels import MAX_TOKENS
from moss.engine.step import Step, runner
from moss.model import Decoder

WIDTH = MAX_TOKENS  # tokens of a pass


def fixed_runner(model: Decoder) -> Step:
    """A runner for which no token's bits depend on its company, in passes of at most WIDTH tokens.

    ValueError where the machine has none.
    """
    step = runner(model)
    if not isinstance(step, Step):
        raise ValueError("deterministic needs our CPU kernels: a C++ compiler (install g++), and the model on the CPU")
    ids = [id % model.config.vocab_size for id in range(WIDTH)]
    if not torch.equal(*(torch.cat(list(logits_in_passes(step, ids, size))) for size in (WIDTH, 1))):
        raise ValueError("deterministic: on this machine a token's scores depend on its company; leave it off")
    return step


@torch.inference_mode()
def logits_in_passes(step: Step, ids: Sequence[int], size: int = WIDTH) -> Iterator[Tensor]:
    """The scores (size, V) of what follows each of so many ids, pass after pass."""
    config = step.model.config
    shape = config.num_layers, config.num_kv_heads, config.head_dim
    cache = Cache(*shape, slots=1, max_length=len(ids), dtype=next(step.model.parameters()).dtype)
    for start in range(0, len(ids), size):
        piece = torch.tensor([ids[start : start + size]])
        window = cache.window(0, [start], piece.shape[1])
        yield step.logits(step.hidden(piece, positions=window.positions, cache=window)[0])
