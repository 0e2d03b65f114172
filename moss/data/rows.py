"""Files of text and conversations, tokenised once, as `pack.Rows`.

    texts = documents([Path("a.jsonl"), Path("b.txt")])       # {"text": …} a line, or a whole .txt as one document
    rows, dropped = of_dialogs(dialogs, tok, loss="assistant", length=256)
    by_section(rows, tok)                                     # {"thoughts": (tokens, learnt), …}

Conversations are rendered in several processes when there are many. A conversation of which not even one turn fits
is dropped and counted; one that fits and has nothing to learn is an error (`chat.render` raises it), since training
on it would do nothing.
This file needs no torch, so that those processes start quickly.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from moss.chat import SECTIONS, Dialog, Loss, TooLong, render
from moss.data.pack import Rows
from moss.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".json", ".txt")  # of data files in a folder
CHUNK = 512  # rows handed to a process at a time
ALONE = 4096  # rows up to which starting processes costs more than it saves


class Unusable(ValueError):
    """A conversation that cannot be trained on: its number, counted from 1, and why."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"conversation {number}: {reason}")
        self.number, self.reason = number, reason


def data_files(paths: Sequence[Path], what: str) -> list[Path]:
    """The files that `paths` name, a folder standing for the .jsonl, .json and .txt files in it, in order of name.

    What is not there, or empty, is one clear line before anything long begins.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{what}: the folder {path} holds no {', '.join(SUFFIXES)} file")
        found += inside
    for path in found:
        if not path.is_file():
            raise ValueError(f"{what}: {path} is not a file")
        if not path.stat().st_size:
            raise ValueError(f"{what}: {path} is empty")
    return found


def documents(paths: Sequence[Path]) -> Iterator[str]:
    """Plain documents: the `text` of each line of a JSON-lines file, or all of a .txt file."""
    for path in paths:
        if path.suffix == ".txt":
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None
            if text.strip():
                yield text
            continue
        for number, row in json_lines(path):
            text = row.get("text")
            if not isinstance(text, str):
                raise ValueError(f"{path} line {number} has no `text`; its keys are {', '.join(row)[:200]}")
            if text.strip():
                yield text


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a JSON-lines file; a line that is none is named in a ValueError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is not a JSON object")
            yield number, row


def of_dialogs(dialogs: Iterable[Dialog], tok: Tokenizer, loss: Loss, length: int) -> tuple[Rows, int]:
    """(rows, dropped): each conversation cut at whole turns to `length`; `dropped` had no turn that fits."""
    stream = iter(dialogs)
    chunks = iter(lambda: list(itertools.islice(stream, CHUNK)), [])
    first = list(itertools.islice(chunks, ALONE // CHUNK))
    workers = min(os.cpu_count() or 1, 8)
    if workers == 1 or len(first) < ALONE // CHUNK:
        done = [_render(chunk, tok, loss, length) for chunk in itertools.chain(first, chunks)]
    else:
        done = _render_apart(itertools.chain(first, chunks), tok, loss, length, workers)
    for number, (_, _, wrong) in enumerate(done):
        if wrong:
            raise Unusable(number * CHUNK + wrong[0] + 1, wrong[1])
    return Rows.join([rows for rows, _, _ in done]) if done else Rows.of([]), sum(dropped for _, dropped, _ in done)


Rendered = tuple[Rows, int, tuple[int, str] | None]  # rows, dropped, and which conversation cannot be used and why


def _render(dialogs: list[Dialog], tok: Tokenizer, loss: Loss, length: int) -> Rendered:
    pairs, dropped = [], 0
    for index, dialog in enumerate(dialogs):
        try:
            pairs.append(render(dialog, tok, loss=loss, max_length=length))
        except TooLong:
            dropped += 1
        except ValueError as error:  # nothing to learn, or text that is no Unicode
            return Rows.of([]), 0, (index, str(error))
    return Rows.of(pairs), dropped, None


_worker: tuple[Tokenizer, Loss, int]


def _begin(tokenizer_json: str, eos: str, loss: Loss, length: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _worker = Tokenizer(Backend.from_str(tokenizer_json), eos=eos), loss, length


def _render_there(dialogs: list[Dialog]) -> Rendered:
    return _render(dialogs, *_worker)


def _render_apart(
    chunks: Iterable[list[Dialog]], tok: Tokenizer, loss: Loss, length: int, workers: int
) -> list[Rendered]:
    """`_render` of each chunk in processes of their own, in order."""
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that runs torch threads can hang
    with ProcessPoolExecutor(workers, spawn, _begin, (tok.to_json(), tok.eos_token, loss, length)) as pool:
        try:
            return list(pool.map(_render_there, chunks))
        except BrokenProcessPool:
            raise ValueError("a process that rendered conversations was killed, perhaps for want of memory") from None
        finally:  # Ctrl-C must not wait for what has been handed out already
            pool.shutdown(wait=False, cancel_futures=True)


def by_section(rows: Rows, tok: Tokenizer) -> dict[str, tuple[int, int]]:
    """section -> (tokens, learnt tokens). A token belongs to the section whose end marker comes next; the first human
    turn so includes what stands before it, the meta instruction, and what no marker ends counts as "text"."""
    names = [*SECTIONS, "text"]
    kind = np.full(len(rows.ids) + 1, len(SECTIONS), dtype=np.int8)
    ends = np.zeros(len(rows.ids) + 1, dtype=bool)
    for number, (_, end) in enumerate(SECTIONS.values()):
        places = np.flatnonzero(rows.ids == tok.marker(end)[0])
        kind[places], ends[places] = number, True
    ends[rows.starts[1:] - 1] = True  # the end of a row ends its section too, as text where no marker stands there
    ends[-1] = True
    at = np.flatnonzero(ends)
    following = kind[at[np.searchsorted(at, np.arange(len(rows.ids)))]]
    tokens = np.bincount(following, minlength=len(names))
    learnt = np.bincount(following, weights=rows.mask, minlength=len(names))
    return {name: (int(tokens[i]), int(learnt[i])) for i, name in enumerate(names) if tokens[i]}
