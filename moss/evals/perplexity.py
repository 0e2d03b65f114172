"""`moss eval perplexity`: how well a model predicts text, in bits per byte, of each language and of code.

    moss eval perplexity --data en.txt zh.jsonl src/ --model runs/base --against runs/older

Bits per byte are the negative base-2 logarithm of a text's probability over its bytes in UTF-8; unlike perplexity, they
compare between models whose tokenizers differ. Each text is cut into pieces of about `PIECE` characters that end with a
line; a piece is predicted after what stands before it in its text, at most half of what the model reads at a time, the
first after the mark between documents. Pieces are the items of intervals and of differences between two models.

`--data`: .txt files, JSON lines with `text`, files of code, and folders of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moss.data.rows import documents
from moss.errors import UsageError
from moss.evals.base import Evaluation, Kept, Subject, Values, made_of, run
from moss.evals.likelihood import Continuation
from moss.extend import language
from moss.log import bar, note
from moss.tokenizer import refuse_surrogates

PIECE = 2000  # characters
AT_ONCE = 32  # pieces that are scored, and whose rows are kept, at a time
TEXT = (".txt", ".jsonl", ".md")
CODE = tuple(".py .js .ts .java .c .h .cc .cpp .hpp .cs .go .rs .rb .php .sh .sql".split())


@dataclass(frozen=True)
class Perplexity(Evaluation):
    """Measure how well a model predicts text: bits per byte of each language and of code."""

    data: list[Path] = field(default_factory=list)  # files of text or code, JSON lines with `text`, folders of these
    length: int = 0  # tokens that are read at a time; 0 = as many as the model reads


@dataclass(frozen=True)
class Piece:
    """A part of a text, whose parts all its pieces share."""

    id: str
    group: str
    parts: Sequence[str] = field(repr=False)
    at: int

    @property
    def text(self) -> str:
        return self.parts[self.at]

    @property
    def before(self) -> Iterator[str]:
        """The parts before it, the nearest first."""
        return map(self.parts.__getitem__, range(self.at - 1, -1, -1))


def main(config: Perplexity) -> int:
    """Run the command."""
    return run(config, task(config))


def task(config: Perplexity) -> Prediction:
    """The task over the texts that the settings name."""
    if not config.data:
        raise UsageError("--data is missing: give files of text or code, or folders of these")
    if config.length and config.length < 8:
        raise UsageError(f"--length is {config.length}; give 8 or more, or 0 for all that the model reads")
    return Prediction(config, list(pieces(files(config.data), config.limit)))


# ---------------------------------------------------------------- texts


def files(paths: Sequence[Path]) -> list[Path]:
    """The files of text and code that `paths` name, in order; ValueError where there is none."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"--data: there is no {path}")
        inside = [each for each in sorted(path.rglob("*")) if each.suffix in TEXT + CODE and each.is_file()]
        if path.is_dir() and not inside:
            raise ValueError(f"--data: the folder {path} holds no file of text or code ({', '.join(TEXT + CODE)})")
        found += inside if path.is_dir() else [path]
    return found


def pieces(paths: Sequence[Path], limit: int = 0) -> Iterator[Piece]:
    """All pieces of all files, the first `limit` of each group; those without a letter are left out."""
    counts: dict[str, int] = {}
    empty = 0
    for path in paths:
        for number, text in enumerate(texts(path)):
            parts = cut(text)
            for at, part in enumerate(parts):
                if not part.strip():
                    continue
                group = "code" if path.suffix in CODE else language(part)
                counts[group] = counts.get(group, 0) + 1
                if not limit or counts[group] <= limit:
                    yield Piece(f"{path}/{number}/{at}", group, parts, at)
            empty += not text.strip()
    if not counts:
        raise ValueError(f"{', '.join(map(str, paths))}: there is no text in them")
    if empty:
        note(f"{empty:,} empty texts are left out")


def texts(path: Path) -> Iterator[str]:
    """The texts of a file; ValueError where it is not UTF-8."""
    if path.suffix == ".jsonl":
        yield from documents([path])
        return
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None


def cut(text: str) -> list[str]:
    """The text in pieces of `PIECE` characters or less that end with a line where there is one."""
    found, size = [""], 0
    for line in text.splitlines(keepends=True):
        for begin in range(0, len(line), PIECE):
            part = line[begin : begin + PIECE]
            if size + len(part) > PIECE and found[-1]:
                found.append("")
                size = 0
            found[-1] += part
            size += len(part)
    return found


# ---------------------------------------------------------------- the task


@dataclass(frozen=True)
class Prediction:
    """The task of `moss eval perplexity`."""

    config: Perplexity
    asked: Sequence[Piece]
    name: str = "perplexity"

    def template(self, who: Subject) -> dict[str, Any]:
        """How much is read at a time."""
        return {"length": self._length(who), "piece": PIECE}

    def _length(self, who: Subject) -> int:
        longest = who.longest
        if self.config.length > longest:
            raise UsageError(f"--length {self.config.length} is more than the {longest} tokens that {who.name} reads")
        return self.config.length or longest

    def measure(self, who: Subject, kept: Kept) -> list[dict[str, Any]]:
        """A row a piece: the ids before it and its own, its bits and its bytes."""
        new: list[tuple[dict[str, Any], list[Continuation]]] = []
        for piece in self.asked:
            windows = self._windows(piece, who)
            ids = {"prompt": list(windows[0].prompt), "answer": [id for each in windows for id in each.answer]}
            if not kept.have(piece.id, key := made_of(ids)):
                size = len(piece.text.encode())
                new.append(({"id": piece.id, "made_of": key, "group": piece.group, "bytes": size} | ids, windows))
        done = len(self.asked) - len(new)
        with bar("pieces", done, len(self.asked)) as shown:
            for begin in range(0, len(new), AT_ONCE):
                part = new[begin : begin + AT_ONCE]
                found = iter(who.likelihoods([each for _, windows in part for each in windows]))
                for begun, windows in part:
                    kept.add(begun | {"bits": -sum(next(found) for _ in windows) / math.log(2)})
                shown.show(done + begin + len(part), part[-1][0]["group"])
        return [kept.rows[piece.id] for piece in self.asked]

    def _windows(self, piece: Piece, who: Subject) -> list[Continuation]:
        """The piece after what stands before it, in as many parts as the model reads."""
        refuse_surrogates(piece.text)
        half = self._length(who) // 2
        before: list[int] = []
        for text in piece.before:
            before = who.tokens.encode(text) + before
            if len(before) >= half:
                break
        else:
            before = [who.tokens.eos, *before]
        ids = who.tokens.encode(piece.text)
        whole = before + ids
        starts = range(len(before), len(whole), half)
        return [Continuation(whole[max(0, at - half) : at], whole[at : at + half]) for at in starts]

    def values(self, rows: Sequence[dict[str, Any]]) -> dict[str, Values]:
        """Bits per byte of all pieces, and of each group."""
        found: dict[str, Values] = {}
        groups = sorted({row["group"] for row in rows})
        for name in ["all", *groups] if len(groups) > 1 else groups:
            mine = [row for row in rows if name in ("all", row["group"])]
            found[f"bits per byte, {name}"] = ([row["bits"] for row in mine], [row["bytes"] for row in mine])
        return found

    def notes(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """How much was read."""
        tokens, size = sum(len(row["answer"]) for row in rows), sum(row["bytes"] for row in rows)
        return [f"{tokens:,} tokens of {size:,} bytes, {size / tokens:.2f} bytes a token"]
