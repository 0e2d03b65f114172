"""The key/value cache: rows that requests borrow, and that keep what they read for the next prompt.

One tensor a layer holds every row, (rows, kv heads, length, head size); it grows by doubling up to the
limits, so that one short chat does not pay for thirty-two long ones. Rows that decode together always lie
side by side: a step then attends over a *view* of the cache, never over a gathered copy. Joining or leaving
may swap two rows to keep it so; a single chat never moves anything.

A row that is given back keeps its content. The next prompt of the same conversation, or any prompt that
begins alike, reads only what differs; the least recently used row goes first when room is needed. Beginnings that
many prompts share (the meta instruction with its switches) are kept apart from the rows as well, at their own length.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FIRST_LENGTH = 256  # tokens a row can hold before the cache first grows
WORTH_COPYING = 16  # a prefix shorter than this is read again: cheaper than copying it from another row
PREFIXES = 8  # shared beginnings kept at once


@dataclass
class Slot:
    """One row: which ids its keys and values were computed from, and whose it is."""

    row: int
    ids: list[int] = field(default_factory=list)
    conversation: Hashable | None = None
    user: Any = None  # the request that reads or decodes in it; None when idle
    used: int = 0  # tick of the last use


@dataclass
class Prefix:
    """A beginning that prompts share: its ids, and their part of each of the cache's `stores` (G, length, E)."""

    ids: list[int]
    stores: list[Tensor]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids `a` and `b` share."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


class Window:
    """The cache as one forward pass sees it: `count` neighbouring rows, each of which gets T new tokens.

    `starts[i]` is how many tokens row `first + i` already holds; the new ones are written behind them.
    """

    def __init__(self, cache: Cache, first: int, starts: Sequence[int], num_new: int) -> None:
        self.keys, self.values = cache.keys, cache.values
        self.starts = list(starts)
        self.rows = slice(first, first + len(starts))
        self.num_new = num_new
        self.length = max(starts) + num_new  # S: no row holds more, so nothing beyond it is read
        self.start = starts[0] if min(starts) == max(starts) else None
        device = cache.keys[0].device
        start = torch.tensor(starts, device=device)[:, None]  # (B, 1)
        self.positions = start + torch.arange(num_new, device=device)  # (B, T)
        if self.start is None:
            self._row_index = torch.arange(first, first + len(starts), device=device)[:, None]
        self._mask: Tensor | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, Hkv, T, Dh) of the new tokens; returns all keys and values (B, Hkv, S, Dh) as views."""
        keys, values = self.keys[layer], self.values[layer]
        if self.start is not None:
            keys[self.rows, :, self.start : self.length] = k
            values[self.rows, :, self.start : self.length] = v
        else:
            keys[self._row_index, :, self.positions] = k.transpose(1, 2)
            values[self._row_index, :, self.positions] = v.transpose(1, 2)
        return keys[self.rows, :, : self.length], values[self.rows, :, : self.length]

    def mask(self, length: int) -> Tensor | None:
        """(B, 1, T, S), True where the new token may attend: its own row up to itself. None: the new ones are all."""
        assert length == self.num_new, (length, self.num_new)
        if self.start == 0:
            return None
        if self._mask is None:
            columns = torch.arange(self.length, device=self.positions.device)
            self._mask = (columns <= self.positions[:, :, None])[:, None]
        return self._mask


class Cache:
    """All rows, which of them decode now, and what each one holds.

    The rows that decode are `live`, a list of slots in row order without gaps: `live[i].row == live[0].row + i`.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        slots: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}; a cache needs at least one")
        self.max_slots, self.max_length = slots, max_length
        self.prefixes: list[Prefix] = []  # least recently used first
        self.slots: list[Slot] = []
        self.live: list[Slot] = []
        self._tick = 0
        shape = (1, num_kv_heads, min(FIRST_LENGTH, max_length), head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def stores(self) -> list[Tensor]:
        """The keys of all layers, then the values."""
        return [*self.keys, *self.values]

    @property
    def room(self) -> bool:
        """Whether `acquire` would find a row."""
        return len(self.slots) < self.max_slots or any(slot.user is None for slot in self.slots)

    def acquire(self, user: Any, conversation: Hashable | None = None) -> Slot | None:
        """A row for one request, the conversation's own where it has one; None when all are busy."""
        slot = self._place(conversation)
        if slot is None:
            return None
        slot.conversation, slot.user = conversation, user
        self._touch(slot)
        return slot

    def reuse(self, slot: Slot, prompt: Sequence[int]) -> int:
        """Let the row hold as much of the prompt's beginning as any row or kept prefix does; returns how much that is.

        `slot.ids` is then what needs no reading; at least the last id of the prompt always remains to be read. A row
        that holds a part of the prompt already never loses any of it, so this may be asked again while it is read.
        """
        usable = list(prompt[:-1])
        held = common_prefix(slot.ids, usable)
        longest, source = held, None
        enough = held + WORTH_COPYING
        for other in (*self.slots, *self.prefixes):
            if other.ids[:enough] == usable[:enough] and len(usable) >= enough:
                longest, source = common_prefix(other.ids, usable), other
                enough = longest + 1
        if source is not None:
            self._copy(source, slot, held, longest)
        slot.ids = usable[:longest]
        return longest

    def keep(self, slot: Slot, length: int) -> None:
        """Keep the first `length` ids of a row for other prompts; of the kept ones the least recently used goes."""
        ids = slot.ids[:length]
        if length < WORTH_COPYING:
            return
        known = next((prefix for prefix in self.prefixes if prefix.ids == ids), None)
        if known is None:
            known = Prefix(ids, [store[slot.row, :, :length].clone() for store in self.stores])
        else:
            self.prefixes.remove(known)
        self.prefixes = [*self.prefixes, known][-PREFIXES:]

    def release(self, slot: Slot) -> None:
        """Give a row back. Its content stays until the row is needed; without a conversation it goes first."""
        slot.user = None
        self._touch(slot)

    def forget(self, conversation: Hashable) -> None:
        """The conversation is over: its row may be taken by the next request."""
        for slot in self.slots:
            if slot.conversation == conversation:
                slot.conversation = None

    def join(self, slot: Slot) -> None:
        """Let the row decode with the others."""
        if self.live:
            before, after = self.live[0].row - 1, self.live[-1].row + 1
            if slot.row == before or after == len(self.slots):
                self._swap(slot, self.slots[before])
                self.live.insert(0, slot)
                return
            self._swap(slot, self.slots[after])
        self.live.append(slot)

    def leave(self, slot: Slot) -> None:
        """The row decodes no longer; the rows that do stay neighbours."""
        if slot is not self.live[0]:
            last = self.live[-1]
            index = self.live.index(slot)
            self._swap(slot, last)
            self.live[index] = last
            self.live.pop()
        else:
            self.live.pop(0)

    def window(self, first: int, starts: Sequence[int], num_new: int) -> Window:
        """A view for one forward pass over rows first, first+1, … with `num_new` tokens each."""
        self._reserve(max(starts) + num_new)
        return Window(self, first, starts, num_new)

    def _place(self, conversation: Hashable | None) -> Slot | None:
        """The conversation's own row, else one nobody owns, else a new one, else the longest unused."""
        idle = [slot for slot in self.slots if slot.user is None]
        if conversation is not None:
            own = next((slot for slot in idle if slot.conversation == conversation), None)
            if own is not None:
                return own
        unowned = [slot for slot in idle if slot.conversation is None]
        if not unowned and len(self.slots) < self.max_slots:
            self.slots.append(Slot(row=len(self.slots)))
            self._reserve(1)
            return self.slots[-1]
        return min(unowned or idle, key=lambda slot: slot.used, default=None)

    def _copy(self, source: Slot | Prefix, slot: Slot, start: int, end: int) -> None:
        """Write the keys and values of `source` for its ids [start, end) into a row."""
        for place, store in enumerate(self.stores):
            kept = source.stores[place] if isinstance(source, Prefix) else store[source.row]
            store[slot.row, :, start:end] = kept[:, start:end]

    def _touch(self, slot: Slot) -> None:
        self._tick += 1
        slot.used = self._tick

    def _swap(self, a: Slot, b: Slot) -> None:
        """Exchange the places of two rows."""
        if a is b:
            return
        length = max(len(a.ids), len(b.ids))
        for store in self.stores:
            kept = store[a.row, :, :length].clone()
            store[a.row, :, :length] = store[b.row, :, :length]
            store[b.row, :, :length] = kept
        a.row, b.row = b.row, a.row
        self.slots[a.row], self.slots[b.row] = a, b

    def _reserve(self, length: int) -> None:
        """Grow the tensors until they have `length` columns and a row for every slot."""
        assert length <= self.max_length, (length, self.max_length)
        rows, heads, columns, size = self.keys[0].shape
        if length <= columns and len(self.slots) <= rows:
            return
        while columns < length:
            columns *= 2
        while rows < len(self.slots):
            rows *= 2
        shape = (min(rows, self.max_slots), heads, min(columns, self.max_length), size)
        for stores in (self.keys, self.values):
            for layer, old in enumerate(stores):
                # Zeros, not garbage: a masked column has weight 0, and 0 * NaN would still be NaN.
                stores[layer] = old.new_zeros(shape)
                stores[layer][: old.shape[0], :, : old.shape[2]] = old
