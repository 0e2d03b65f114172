"""Tokenised rows laid into fixed-length training rows, without waste and without leakage.

A *row* is one document or conversation as (ids, mask); `Rows` holds them all end to end in numpy arrays. A *packed
row* is several rows side by side, padded to `length`. `segments` numbers the documents from 1 (0 is padding) so that
attention never crosses from one into another, `positions` starts again at 0 in each, and the first token of each is
never a target, since nothing of its own document stands before it.

    rows = Rows.of(pairs)                              # pairs of (ids, mask)
    packed = Packed(rows, length=256, seed=0)
    batch = packed.batch(position, 32)                 # {"ids", "mask", "positions", "segments"}: (32, 256) int64

`position` counts packed rows from the start of training and is all there is to say where the data stands: epoch
`position // len(packed)` is shuffled by (seed, epoch) alone, so a resumed run sees exactly what an unbroken one sees.

Packing is best-fit decreasing: the longest row goes first, each into the fullest packed row that still has room.
Rows of equal length are shuffled in every epoch, so neighbours change while the number of packed rows stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Ints = Sequence[int] | np.ndarray
FIELDS = ("ids", "mask", "positions", "segments")


@dataclass(frozen=True)
class Rows:
    """All rows end to end: row i is `ids[starts[i]:starts[i + 1]]`, learnt where `mask` is 1."""

    ids: np.ndarray  # (N,) int32
    mask: np.ndarray  # (N,) uint8
    starts: np.ndarray  # (R + 1,) int64

    @classmethod
    def of(cls, pairs: Iterable[tuple[Ints, Ints]]) -> Rows:
        """From (ids, mask) pairs; empty rows are left out."""
        ids, masks = [], []
        for row, mask in pairs:
            if len(row) != len(mask):
                raise ValueError(f"a row has {len(row)} ids and {len(mask)} mask values; they must be as many")
            if len(row):
                ids.append(np.asarray(row, dtype=np.int32))
                masks.append(np.asarray(mask, dtype=np.uint8))
        starts = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in ids], out=starts[1:])
        none = np.zeros(0)
        return cls(
            np.concatenate(ids or [none.astype(np.int32)]), np.concatenate(masks or [none.astype(np.uint8)]), starts
        )

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Several sets of rows as one, in order."""
        offsets = np.cumsum([0, *(len(part.ids) for part in parts)])
        starts = [part.starts[1:] + offset for part, offset in zip(parts, offsets, strict=False)]
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.mask for part in parts]),
            np.concatenate([np.zeros(1, dtype=np.int64), *starts]),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(R,) tokens in each row."""
        return np.diff(self.starts)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of one row."""
        begin, end = self.starts[index], self.starts[index + 1]
        return self.ids[begin:end], self.mask[begin:end]

    def sha256(self) -> str:
        """A fingerprint of every id, mask value and border."""
        digest = hashlib.sha256()
        for array in (self.ids, self.mask, self.starts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def best_fit(lengths: Ints, length: int, order: Iterable[int]) -> list[list[int]]:
    """Bins of row numbers, none longer than `length`: rows taken in `order`, each into the fullest bin with room."""
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # room -> bins that have exactly so much left
    rooms = 0  # bit r is set while with_room[r] is not empty
    for row in order:
        size = int(lengths[row])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1  # the lowest set bit: the least room that is enough
            index = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, index = length, len(bins)
            bins.append([])
        bins[index].append(row)
        if room > size:
            with_room[room - size].append(index)
            rooms |= 1 << (room - size)
    return bins


def lay(rows: Rows, bins: Sequence[Sequence[int]], length: int, pad: int = 0) -> dict[str, np.ndarray]:
    """The named bins as padded arrays (B, length) int64 under the names of `FIELDS`."""
    out = {name: np.zeros((len(bins), length), dtype=np.int64) for name in FIELDS}
    out["ids"][:] = pad
    for line, members in enumerate(bins):
        at = 0
        for number, member in enumerate(members, start=1):
            ids, mask = rows.row(member)
            end = at + len(ids)
            out["ids"][line, at:end] = ids
            out["mask"][line, at + 1 : end] = mask[1:]
            out["positions"][line, at:end] = np.arange(len(ids))
            out["segments"][line, at:end] = number
            at = end
    return out


def pack(pairs: Iterable[tuple[Ints, Ints]], length: int) -> Iterator[dict[str, np.ndarray]]:
    """Packed rows of `length`, one after the other, each a dict of (length,) arrays; the plain form for a few rows."""
    packed = Packed(Rows.of(pairs), length)
    for members in packed.plan(0):
        yield {name: value[0] for name, value in lay(packed.rows, [members], length, packed.pad).items()}


@dataclass
class Packed:
    """Rows in packed form, epoch after epoch without end."""

    rows: Rows
    length: int
    seed: int = 0
    pad: int = 0  # the id that fills what is left over; never learnt, never attended to
    _epoch: int = field(default=-1, repr=False)
    _bins: list[list[int]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise ValueError("there is no row to train on; give a data file with at least one row that fits")
        longest = int(self.rows.lengths.max())
        if longest > self.length:
            raise ValueError(f"a row has {longest} tokens but the length is {self.length}; cut it or raise --length")
        self._bins, self._epoch = self.plan(0), 0

    def __len__(self) -> int:
        """Packed rows in an epoch; the same in every epoch, because row lengths alone decide it."""
        return len(self._bins)

    @property
    def fill(self) -> float:
        """The share of places that hold a token rather than padding."""
        return len(self.rows.ids) / (len(self) * self.length)

    def record(self) -> dict[str, Any]:
        """What `moss.json` says of these rows; a run goes on with the same ones only."""
        rows = self.rows
        return {"sha256": rows.sha256(), "rows": len(rows), "tokens": len(rows.ids), "packed": len(self)}

    def plan(self, epoch: int) -> list[list[int]]:
        """Row numbers of each packed row of one epoch; depends on (rows, length, seed, epoch) only."""
        rng = np.random.default_rng([self.seed, epoch])
        lengths = self.rows.lengths
        shuffled = rng.permutation(len(lengths))
        order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
        bins = best_fit(lengths, self.length, order.tolist())
        return [bins[index] for index in rng.permutation(len(bins))]

    def members(self, position: int) -> list[int]:
        """Row numbers of the packed row at this position."""
        epoch, index = divmod(position, len(self))
        if epoch != self._epoch:
            self._bins, self._epoch = self.plan(epoch), epoch
        return self._bins[index]

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """`count` packed rows from `position` on, across the end of an epoch if need be: (count, length) int64."""
        return lay(self.rows, [self.members(position + index) for index in range(count)], self.length, self.pad)
