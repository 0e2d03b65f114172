"""Deterministic mode: the same logits to the last bit, whatever else the engine reads, decodes or remembers.

What makes them differ is that libraries pick another kernel, with another order of additions, for every shape: one
row or eight, a piece of a prompt or a step. Two remedies, both of them passes of at most WIDTH tokens:

- Our own kernels (`step.py`) add up each token by itself in one order, however many there are. Steps cost nothing
  more; prompts are read WIDTH tokens at a time.
- Without them the model only ever sees one shape: WIDTH single tokens, each a row of its own, be they a piece of one
  prompt or the next tokens of many requests; what is missing is padding. Keys come in whole blocks, as many as the
  longest row needs: the attention kernel of torch works block by block, and one that is masked altogether changes
  nothing. Here a step of one request costs what a step of WIDTH does, and there are at least WIDTH cache rows.

Then the bits of a token depend on its own row's past alone: cold or from the cache, alone or in company, read or
decoded, guessed by lookup or not. They still change with the version of torch and the machine. That neither remedy
is let down by a library is looked at before it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moss.engine.cache import Cache, Window
from moss.engine.step import Runner, runner
from moss.model import Decoder

WIDTH = 16  # tokens of a pass: what our kernels take at once
BLOCK = 512  # columns the attention kernel of torch works on at once


class _Tokens:
    """The cache as one pass sees it: the new tokens of a window, all of one row or one each of neighbouring rows."""

    def __init__(self, window: Window) -> None:
        self.keys, self.values = window.keys, window.values
        first, num_rows = window.rows.start, self.keys[0].shape[0]
        one_row, positions = len(window.starts) == 1, window.positions.flatten()
        start = first if one_row else min(first, num_rows - WIDTH)  # a pass over rows looks at WIDTH of them
        before, count = first - start, len(positions)
        self.seen = slice(start, start + (1 if one_row else WIDTH))
        self.real = slice(before, before + count)  # which of the WIDTH tokens are not padding
        self.padding = (before, WIDTH - before - count)
        self.rows = first + torch.arange(count, device=positions.device) * (not one_row)
        self.at = positions
        self.positions = pad(positions, self.padding)[:, None]  # (WIDTH, 1); padding reads column 0
        columns = self.keys[0].shape[2]
        self.length = min(columns, -(-window.length // BLOCK) * BLOCK) if positions.device.type == "cpu" else columns
        self._mask: Tensor | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (WIDTH, G, 1, E) but for the padding; returns all keys and values (WIDTH, G, S, E) as views."""
        views = []
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            store[self.rows, :, self.at] = new[self.real, :, 0]
            views.append(store[self.seen, :, : self.length].expand(WIDTH, -1, -1, -1))
        return views[0], views[1]

    def mask(self, length: int) -> Tensor:
        """(WIDTH, 1, 1, S), True up to the token itself."""
        assert length == 1, length
        if self._mask is None:
            self._mask = (torch.arange(self.length, device=self.positions.device) <= self.positions)[:, None, None]
        return self._mask


class Padded:
    """Runs a model in passes of one shape. The cache must offer columns in whole `block`s and `width` rows."""

    block, width = BLOCK, WIDTH

    def __init__(self, model: Decoder) -> None:
        self.model = model
        _check_places(model)

    def hidden(self, ids: Tensor, *, positions: Tensor, cache: Window) -> Tensor:
        """ids (B, T) of B neighbouring rows, B or T being 1, together at most WIDTH -> hidden states (B, T, D)."""
        assert 1 in ids.shape, ids.shape
        tokens = _Tokens(cache)
        padded = pad(ids.flatten(), tokens.padding)[:, None]
        states = self.model.hidden(padded, positions=tokens.positions, cache=tokens)[tokens.real, 0]
        return states.view(*ids.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, D) -> logits (B, V)."""
        return self.model.logits(pad(hidden, (0, 0, 0, WIDTH - len(hidden))))[: len(hidden)]


def fixed_runner(model: Decoder) -> Runner:
    """A runner for which no token's bits depend on its company, in passes of at most WIDTH tokens.

    ValueError where the machine allows none.
    """
    fast = runner(model)
    return fast if fast is not model and _adds_up_alone(fast, model) else Padded(model)


@torch.inference_mode()
def _adds_up_alone(step: Runner, model: Decoder) -> bool:
    """Whether WIDTH tokens in one pass have the bits of WIDTH passes."""
    config, weight = model.config, model.embed.weight
    ids = torch.arange(WIDTH, device=weight.device)[None] % config.vocab_size

    def run(size: int) -> Tensor:
        shape = config.num_layers, config.num_kv_heads, config.head_dim
        cache = Cache(*shape, slots=1, max_length=WIDTH, dtype=next(model.parameters()).dtype, device=weight.device)
        states = []
        for start in range(0, WIDTH, size):
            window = cache.window(0, [start], size)
            piece = ids[:, start : start + size]
            states.append(step.logits(step.hidden(piece, positions=window.positions, cache=window)[0]))
        return torch.cat(states)

    return torch.equal(run(WIDTH), run(1))


@torch.inference_mode()
def _check_places(model: Decoder) -> None:
    """Refuse a machine on which a row's place in the pass changes its bits."""
    weight = model.embed.weight
    ids = torch.arange(WIDTH, device=weight.device)[:, None] % model.config.vocab_size
    if not torch.equal(model(ids).roll(5, 0), model(ids.roll(5, 0))):
        raise ValueError(
            f"deterministic: on {weight.device} in {weight.dtype} the same row has other bits in another place of a "
            "batch; use another dtype or device, or leave it off"
        )
