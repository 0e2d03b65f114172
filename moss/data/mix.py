"""Rows to train on from token shards (`tokens.py`): of one source, or of several in fixed shares.

    rows = TokenRows(tokens, length=2048, seed=0)
    mixed = Mixture({"en": rows_en, "zh": rows_zh}, {"en": 85.3, "zh": 14.7})
    batch = mixed.batch(position, 32)              # {"ids", "mask", "positions", "segments"}: (32, 2048) int64

`TokenRows` cuts each document into rows with the token before it: the end-of-text id for its beginning, the last token
of the piece before for the rest. That one token is context and never a target, so every token of a document is learnt
exactly once, its first one too, and the summed loss over the bytes of the text is bits per byte. Rows are packed
best-fit decreasing (`pack.py`) within groups of shards, so that no list of all documents is ever made.

`Mixture` gives each place in the order of training to a source, so that after any number of rows each source has had
its share to within a row or so, and each goes through all its rows before one comes again. A packed row is of one
source. Both follow from (seed, position) alone: a resumed run sees exactly what an unbroken one sees.

On the command line a source is a name, its files and its share, `--data en=pile.jsonl:57.1 code=github/:28.2
zh=web.jsonl:14.8`; several entries of one name are one source, and without shares each source has the share of its
rows. The paper's mixture (table 2): The Pile 57.1, BigQuery 17.6, BigPython 10.6, Baidu Baike 0.7, Chinese web 14.1.

`moss train pretrain` tokenises by itself. To do it before, where there are many cores and no GPU waits:

    moss data tokens runs/full/tokenizer --data en=pile/ zh=web/ -o tokens        # may be killed and started again
    moss train pretrain --data en=tokens/en:57.1 zh=tokens/zh:14.1 …
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from moss.config import option
from moss.data.pack import Rows, best_fit, lay
from moss.data.rows import data_files
from moss.data.tokens import INDEX, Tokens, prepare
from moss.errors import UsageError
from moss.log import note
from moss.tokenizer import load

GROUP = 8  # shards whose rows are packed and shuffled together
PERIOD = 1 << 17  # rows after which the order of sources repeats, at most; shares are exact in each period
ENTRY = re.compile(r"([\w-]+)=(.+?)(?::([0-9.]+))?", re.DOTALL)  # NAME=PATH[:SHARE]
PLAIN = "text"  # the name of files that were given without one


@dataclass(frozen=True)
class Source:
    """Files of one language, or of any other kind that is to have its own share."""

    name: str
    files: list[Path]
    share: float | None = None  # of the rows, relative to the other sources'
    tokens: Path | None = None  # the folder of its shards, where it was tokenised before; then there are no files


def parse(entries: Sequence[Path], what: str) -> list[Source]:
    """Sources from `NAME=PATH:SHARE`, `NAME=PATH` or `PATH`; `what` is the flag, for errors. A path is a file, a folder
    of files, or a folder of shards."""
    found: dict[str, Source] = {}
    for entry in entries:
        name, path, share = _entry(entry, what)
        earlier = found.get(name, Source(name, []))
        shards = path if (path / INDEX).is_file() else None
        if earlier.tokens or (shards and earlier.files):
            folder = earlier.tokens or shards
            raise UsageError(f"{what}: {name} is tokenised in {folder}, nothing can be added; name {entry} otherwise")
        files = [] if shards else data_files([path], what)
        shares = [part for part in (earlier.share, share) if part is not None]
        found[name] = Source(name, earlier.files + files, sum(shares) if shares else None, shards)
    with_share = [source.name for source in found.values() if source.share is not None]
    for source in found.values():
        if with_share and not source.share:
            raise UsageError(f"{what}: {source.name} has no share above 0, {with_share[0]} has one; give each its own")
    return list(found.values())


def _entry(entry: Path, what: str) -> tuple[str, Path, float | None]:
    """(name, path, share) of one entry; a path that is there as it stands may hold any sign."""
    match = None if entry.exists() else ENTRY.fullmatch(str(entry))
    if not match:
        return PLAIN, entry, None
    name, path, share = match.groups()
    if share and Path(f"{path}:{share}").exists():
        return name, Path(f"{path}:{share}"), None
    try:
        return name, Path(path), float(share) if share else None
    except ValueError:
        raise UsageError(f"{what} {entry}: {share} is no share, such as 57.1") from None


def num_bins(lengths: np.ndarray, length: int) -> int:
    """How many bins `best_fit` needs for `lengths`, the longest first; which depends on them alone, not on their order.

    Equals are placed together: the bin that is filled best takes as many as it can, then the next.
    """
    rooms = [0] * (length + 1)  # room -> bins that have exactly so much left
    bins = 0
    many = np.bincount(lengths, minlength=length + 1).tolist()
    for size in range(length, 0, -1):
        left, room = many[size], size
        while left:
            while room < length and not rooms[room]:
                room += 1
            if not rooms[room]:  # new bins
                rooms[length] = -(-left // (length // size))
                bins += rooms[length]
            fit = room // size
            take = min(left, fit * rooms[room])
            full, rest = divmod(take, fit)
            rooms[room] -= full + bool(rest)
            rooms[room - fit * size] += full
            if rest:
                rooms[room - rest * size] += 1
            left -= take
    return bins


class TokenRows:
    """Packed rows of all documents in shards, epoch after epoch without end: `launch.Data`.

    An epoch goes through the groups in an order drawn from (seed, epoch), through the rows of each in one drawn from
    (seed, epoch, group). The position is all there is to say where the data stand.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int = 0) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        numbers = range(len(tokens.shards))
        self._groups = [numbers[begin : begin + GROUP] for begin in range(0, len(numbers), GROUP)]
        sizes = [self._pieces(group)[2] for group in self._groups]
        self._bins = np.array([num_bins(size, length) for size in sizes])
        self._places = sum(int(size.sum()) for size in sizes)
        self._ids: dict[int, np.ndarray] = {}
        self._plan: tuple[tuple[int, int], list[list[int]], tuple[np.ndarray, ...]] | None = None

    def __len__(self) -> int:
        """Packed rows in an epoch, the same in every epoch."""
        return int(self._bins.sum())

    @property
    def fill(self) -> float:
        """The share of places that hold a token rather than padding."""
        return self._places / (len(self) * self.length)

    def record(self) -> dict[str, Any]:
        """What `moss.json` says of these rows; a run goes on with the same ones only."""
        tokens = self.tokens
        return {
            "sha256": tokens.sha256(),
            "rows": tokens.num_documents,
            "tokens": tokens.num_tokens,
            "packed": len(self),
        }

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """`count` packed rows from `position` on, across the end of an epoch if need be: (count, length) int64."""
        pairs, bins = [], []
        for at in range(position, position + count):
            pieces = self._row(at)
            bins.append(list(range(len(pairs), len(pairs) + len(pieces))))
            pairs += [(ids, np.ones(len(ids), dtype=np.uint8)) for ids in pieces]
        return lay(Rows.of(pairs), bins, self.length, self.tokens.eos)

    def _row(self, position: int) -> list[np.ndarray]:
        """The pieces in the packed row at this position."""
        epoch, at = divmod(position, len(self))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._groups))
        ends = np.cumsum(self._bins[order])
        turn = int(np.searchsorted(ends, at, side="right"))
        group = int(order[turn])
        bins, (shards, begins, sizes) = self._planned(epoch, group)
        members = bins[at - int(ends[turn]) + len(bins)]
        return [self._shard(int(shards[i]))[begins[i] : begins[i] + sizes[i]] for i in members]

    def _planned(self, epoch: int, group: int) -> tuple[list[list[int]], tuple[np.ndarray, ...]]:
        """What lies in each row of a group in an epoch, as numbers of pieces; the last one asked for is kept."""
        if self._plan is None or self._plan[0] != (epoch, group):
            pieces = self._pieces(self._groups[group])
            lengths = pieces[2]
            rng = np.random.default_rng([self.seed, epoch, group])
            shuffled = rng.permutation(len(lengths))
            order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
            bins = best_fit(lengths, self.length, order.tolist())
            assert len(bins) == self._bins[group]
            self._plan = (epoch, group), [bins[i] for i in rng.permutation(len(bins))], pieces
        return self._plan[1:]

    def _pieces(self, group: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, place of its first token, tokens) of each piece of a group's documents, (N,) each.

        A document of n tokens gives ceil(n / (length - 1)) of them, each with one token of context before it.
        """
        found = []
        for shard in group:
            starts = self.tokens.starts(shard)
            begins, counts = starts[:-1] - 1, np.diff(starts)
            step = self.length - 1
            pieces = -(-counts // step)
            inside = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0, 1, … in each document
            first = np.repeat(begins, pieces) + inside * step
            sizes = np.minimum(self.length, np.repeat(starts[1:], pieces) - first)
            found.append((np.full(len(first), shard), first, sizes))
        return tuple(np.concatenate(part) for part in zip(*found))  # type: ignore[return-value]

    def _shard(self, number: int) -> np.ndarray:
        """A shard's ids, checked when they are first needed."""
        if number not in self._ids:
            self._ids[number] = self.tokens.ids(number)
        return self._ids[number]


class Mixture:
    """Rows of several sources in fixed shares: `launch.Data`. Without shares a source has that of its rows.

    Of n rows in a period the k-th of a source with m stands at the time (k + 1/2) / m; in the order of these times each
    source is spread as evenly as whole rows allow.
    """

    def __init__(self, sources: Mapping[str, TokenRows], shares: Mapping[str, float] | None = None) -> None:
        self.sources, self.length = dict(sources), next(iter(sources.values())).length
        rows = {name: Fraction(len(source)) for name, source in sources.items()}
        parts = {name: Fraction(str(shares[name])) for name in sources} if shares else rows
        self.counts = np.array(in_whole_rows(list(parts.values())))  # of each source in a period
        owners = np.repeat(np.arange(len(parts)), self.counts)
        inside = np.concatenate([np.arange(count) for count in self.counts])  # 0, 1, … of each source
        order = np.lexsort((owners, (inside + 0.5) / self.counts[owners]))
        self._owners, self._inside = owners[order], inside[order]

    def __len__(self) -> int:
        """As many rows as all sources have together: some may come more than once in them, and some not at all."""
        return sum(len(source) for source in self.sources.values())

    @property
    def fill(self) -> float:
        """The share of places that hold a token, in a mixture of these shares."""
        fills = [source.fill for source in self.sources.values()]
        return float(np.average(fills, weights=self.counts))

    def record(self) -> dict[str, Any]:
        """What `moss.json` says of the sources and their shares; a run goes on with the same ones only."""
        told = {name: source.record() for name, source in self.sources.items()}
        return {"sources": told, "shares": dict(zip(told, self.shares)), "packed": len(self)}

    def epochs(self, rows: int) -> dict[str, float]:
        """How often `rows` rows of training go through each source."""
        return {name: rows * part / len(source) for (name, source), part in zip(self.sources.items(), self.shares)}

    @property
    def shares(self) -> list[float]:
        """Of each source, of all rows."""
        return (self.counts / self.counts.sum()).tolist()

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """`count` packed rows from `position` on: (count, length) int64."""
        rounds, places = np.divmod(np.arange(position, position + count), len(self._owners))
        owners = self._owners[places]
        theirs = rounds * self.counts[owners] + self._inside[places]  # positions within each source
        batch: dict[str, np.ndarray] = {}
        for number, source in enumerate(self.sources.values()):
            at = np.flatnonzero(owners == number)
            if not len(at):
                continue
            part = source.batch(int(theirs[at[0]]), len(at))  # a source's rows follow one another
            for name, values in part.items():
                batch.setdefault(name, np.empty((count, self.length), dtype=values.dtype))[at] = values
        return batch


def in_whole_rows(parts: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in these proportions; where they add up to more than `PERIOD`, nearly so."""
    scale = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * scale) for part in parts]
    whole = [number // math.gcd(*whole) for number in whole]
    total = sum(whole)
    if total <= PERIOD:
        return whole
    floors = [max(1, number * PERIOD // total) for number in whole]
    by_rest = sorted(range(len(whole)), key=lambda i: -(whole[i] * PERIOD % total))
    for i in by_rest[: max(0, PERIOD - sum(floors))]:
        floors[i] += 1
    return floors


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class TokenShards:
    """Tokenise documents once, into shards that `moss train pretrain` reads."""

    tokenizer: Path  # folder of the tokenizer, or of the model that has it
    data: list[Path] = option(list)  # NAME=PATH of files or folders; each name becomes a folder of shards
    output: Path = option(Path("tokens"), short="-o")  # folder for the folders of shards


def main(config: TokenShards) -> int:
    """Run `moss data tokens`."""
    sources, tok = parse(config.data, "--data"), load(config.tokenizer)
    if not sources:
        raise UsageError("no --data; name at least one file")
    for source in sources:
        if source.tokens:
            raise UsageError(f"--data: {source.tokens} holds shards already")
        found = prepare(source.files, tok, config.output / source.name)
        size = found.text_bytes / found.num_tokens
        note(f"{source.name}: {found.num_documents:,} documents, {found.num_tokens:,} tokens of {size:.2f} bytes")
        print(config.output / source.name)
    return 0
