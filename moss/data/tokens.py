"""Documents as token shards on disk: written once by all cores, read by any number of ranks.

    tokens = prepare([Path("pile.jsonl"), Path("books/a.txt")], tok, Path("runs/mine/tokens/en"))
    rows = TokenRows(tokens, length=2048, seed=0)              # packed rows of all of it: see mix.py

A source is cut into parts of its lines, and each part becomes a shard: `00000-00000.bin`, the ids of its documents end
to end, each ended by the end-of-text id, with one such id before the first; `.starts`, where each document begins; and
`.json`, written last, what they hold. So a killed run goes on with the parts that are missing, and what comes out is
the same to the byte. `index.json` comes at the very end: with it the folder is whole, and is for this tokenizer and
these sources only. A .txt file is one document; a .json or .jsonl file has documents (`text`) or conversations, of
which what is said counts, one a line or in a JSON array.

Shards are memory-mapped, checked for their size when the folder is opened, and for their content when first read. This
file needs no torch, so that the processes that tokenise start quickly.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend

from moss.data.dialogs import from_row, read_rows
from moss.files import json_object, replacing, sha256
from moss.log import bar, note
from moss.tokenizer import Tokenizer

FORMAT = 1
INDEX = "index.json"
PART = (4 << 20, 256 << 20)  # bytes of a source in one shard, at least and at most; between them a 64th of the source
CHUNK, PIECE = 1 << 20, 1 << 18  # characters that are encoded at a time, and of one document together
CUT = re.compile(r"(?<=\S)\n(?=\S)")  # where a long document may be cut without changing a token: after a lone line end


# ---------------------------------------------------------------- what stands on disk


@dataclass(frozen=True)
class Source:
    """A file of documents, as it was when it was tokenised."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One part of a source, tokenised; beside the counts all that its content depends on."""

    source: str  # sha256
    tokenizer: str  # sha256
    begin: int  # bytes of the source: the lines that start from here
    end: int  # up to here
    documents: int
    tokens: int  # the end-of-text ids included, but for the one before the first document
    text_bytes: int  # UTF-8
    ids_sha256: str
    starts_sha256: str


@dataclass(frozen=True)
class Tokens:
    """A whole folder of shards. The order of the shards is that of the sources."""

    folder: Path
    dtype: str
    eos: int
    sources: tuple[Source, ...]
    names: tuple[str, ...]
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: Path, tok: Tokenizer) -> Tokens:
        """Read the index of a folder and see that its files are there in full; ValueError names what is wrong."""
        index = json_object(folder / INDEX)
        if index.get("format") != FORMAT:
            raise ValueError(f"{folder / INDEX} is not of format {FORMAT}; use the version of moss that wrote it")
        if index["tokenizer_sha256"] != tok.sha256:
            raise ValueError(
                f"{folder} holds the tokens of another tokenizer (sha256 {index['tokenizer_sha256'][:12]}, this one is "
                f"{tok.sha256[:12]}); delete it, or choose another --out"
            )
        sources = tuple(Source(**values) for values in index["sources"])
        shards = {name: Shard(**values) for name, values in index["shards"].items()}
        tokens = cls(folder, index["dtype"], index["eos"], sources, tuple(shards), tuple(shards.values()))
        for number, shard in enumerate(tokens.shards):
            want = (shard.tokens + 1) * np.dtype(tokens.dtype).itemsize, (shard.documents + 1) * 8
            for file, size in zip(tokens.files(number), want):
                has = file.stat().st_size if file.is_file() else 0
                if has != size:
                    raise ValueError(
                        f"{file} has {has} bytes instead of {size}; delete {folder / INDEX} to make it anew"
                    )
        return tokens

    def files(self, number: int) -> tuple[Path, Path]:
        """The file of ids and the file of starts of one shard."""
        stem = self.folder / self.names[number]
        return stem.with_suffix(".bin"), stem.with_suffix(".starts")

    def starts(self, number: int) -> np.ndarray:
        """(documents + 1,) int64: where in `ids` each document of a shard begins, and the end of the last."""
        return self._checked(self.files(number)[1], "<i8", self.shards[number].starts_sha256)

    def ids(self, number: int) -> np.ndarray:
        """(tokens + 1,) the ids of a shard, mapped from disk; the first is the end-of-text id."""
        return self._checked(self.files(number)[0], self.dtype, self.shards[number].ids_sha256)

    def _checked(self, file: Path, dtype: str, expected: str) -> np.ndarray:
        if sha256(file) != expected:
            raise ValueError(f"{file} is damaged (its sha256 differs); delete {self.folder / INDEX} to make it anew")
        return np.memmap(file, dtype=dtype, mode="r")

    def sha256(self) -> str:
        """A fingerprint of every id and every border, wherever the files are and were."""
        parts = [self.dtype, str(self.eos), *(f"{shard.ids_sha256} {shard.starts_sha256}" for shard in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def num_documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents; as many are learnt."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(shard.text_bytes for shard in self.shards)


# ---------------------------------------------------------------- writing


def prepare(paths: Sequence[Path], tok: Tokenizer, folder: Path, *, anew: bool = False) -> Tokens:
    """The tokens of these files in `folder`: tokenised, or taken as they are where that has been done.

    What another process began is finished; where one is at it, this one waits. ValueError where the folder is whole
    but of other sources or another tokenizer (with `anew` it is made anew), and where a source is broken (its line is
    named).
    """
    with _held(folder):
        sources = _sources(paths)
        if (folder / INDEX).is_file():
            try:
                return _whole(paths, sources, tok, folder)
            except ValueError:
                if not anew:
                    raise
                note(f"{folder} is not of these data and this tokenizer: it is made anew")
                (folder / INDEX).unlink()
        _write(paths, sources, tok, folder)
        return Tokens.open(folder, tok)


def _whole(paths: Sequence[Path], sources: Sequence[Source], tok: Tokenizer, folder: Path) -> Tokens:
    """The tokens that are there; ValueError where they are of something else."""
    tokens = Tokens.open(folder, tok)
    for path, was, now in zip(paths, tokens.sources, sources):
        if (was.bytes, was.sha256) != (now.bytes, now.sha256):
            raise ValueError(
                f"{path}: the data has changed since {folder} was made from {was.name} ({was.bytes:,} bytes, "
                f"sha256 {was.sha256[:12]}); delete that folder, or choose another --out"
            )
    if (had := len(tokens.sources)) != len(paths):
        raise ValueError(
            f"the data has changed since {folder} was made from {had} files, now there are {len(paths)}; "
            "delete that folder, or choose another --out"
        )
    return tokens


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make the folder and hold it; wait where another process holds it. An empty one is gone again afterwards."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"cannot write in {folder}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            note(f"waiting for the process that tokenises into {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if not any(file.name != ".lock" for file in folder.iterdir()):
                (folder / ".lock").unlink(missing_ok=True)
                for parent in made:
                    if not any(parent.iterdir()):
                        parent.rmdir()


def _sources(paths: Sequence[Path]) -> list[Source]:
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        digests = list(pool.map(sha256, paths))
    return [Source(path.name, path.stat().st_size, digest) for path, digest in zip(paths, digests)]


@dataclass(frozen=True)
class Task:
    """A part to be tokenised."""

    path: Path
    source: str  # sha256 of the whole file
    array: bool  # it is one JSON array
    begin: int
    end: int
    target: Path  # the shard's files, without their suffix


def _write(paths: Sequence[Path], sources: Sequence[Source], tok: Tokenizer, folder: Path) -> None:
    """Every shard that is not there yet, and then the index."""
    tasks = [
        task
        for number, (path, source) in enumerate(zip(paths, sources))
        for task in _parts(path, source, number, folder)
    ]
    for left_over in folder.glob(".*.tmp"):
        left_over.unlink(missing_ok=True)
    found = [_done(task, tok) for task in tasks]
    missing = [number for number, shard in enumerate(found) if shard is None]
    size = sum(source.bytes for source in sources)
    note(f"tokenising {size / 1e6:,.1f} MB into {folder}: {len(missing)} of {len(tasks)} parts to do")
    with bar("tokenising", len(tasks) - len(missing), len(tasks)) as shown:
        for done, (number, shard) in enumerate(_tokenised([tasks[i] for i in missing], tok), len(tasks) - len(missing)):
            found[missing[number]] = shard
            shown.show(done + 1, f"{tasks[missing[number]].path.name}")
    for path, source in zip(paths, sources):
        if path.stat().st_size != source.bytes:
            raise ValueError(f"{path} changed while it was read; let nothing write to it and start again")
    shards = {task.target.name: shard for task, shard in zip(tasks, found) if shard and shard.documents}
    if not shards:
        for file in folder.glob("*-*.*"):
            file.unlink()
        raise ValueError(f"there is no text in {', '.join(map(str, paths))}")
    for file in folder.glob("*-*.*"):
        if file.stem not in shards:  # of parts without a document, or of an earlier, larger source
            file.unlink()
    index = {
        "format": FORMAT,
        "tokenizer_sha256": tok.sha256,
        "eos": tok.eos,
        "dtype": _dtype(tok),
        "sources": [asdict(source) for source in sources],
        "shards": {name: asdict(shard) for name, shard in shards.items()},
    }
    _write_json(folder / INDEX, index)


def _parts(path: Path, source: Source, number: int, folder: Path) -> list[Task]:
    """The parts of one source, which depend on the source alone."""
    with path.open("rb") as file:
        array = path.suffix != ".jsonl" and file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    size = source.bytes if array or path.suffix == ".txt" else min(max(source.bytes // 64, PART[0]), PART[1])
    return [
        Task(path, source.sha256, array, begin, min(begin + size, source.bytes), folder / f"{number:05d}-{part:05d}")
        for part, begin in enumerate(range(0, source.bytes, size))
    ]


def _done(task: Task, tok: Tokenizer) -> Shard | None:
    """The shard of a task where it was finished before."""
    file = task.target.with_suffix(".json")
    if not file.is_file():
        return None
    shard = Shard(**json_object(file))
    if (shard.source, shard.tokenizer, shard.begin, shard.end) != (task.source, tok.sha256, task.begin, task.end):
        return None
    wanted = {".bin": shard.ids_sha256, ".starts": shard.starts_sha256}
    files = {task.target.with_suffix(suffix): digest for suffix, digest in wanted.items()}
    return shard if all(file.is_file() and sha256(file) == digest for file, digest in files.items()) else None


def _dtype(tok: Tokenizer) -> str:
    return "<u2" if tok.vocab_size <= 1 << 16 else "<u4"


def _write_json(file: Path, values: dict[str, Any]) -> None:
    with replacing(file) as beside:
        beside.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- tokenising, in processes


class Stopped(Exception):
    """The parent has given up; nobody waits for this part."""


_worker: Tokenizer
_stop: Any  # an Event of the parent's


def _tokenised(tasks: Sequence[Task], tok: Tokenizer) -> Iterator[tuple[int, Shard]]:
    """(number of the task, its shard) as they are finished, from as many processes as there are cores."""
    workers = min(os.cpu_count() or 1, len(tasks))
    if workers <= 1:
        for number, task in enumerate(tasks):
            yield number, _tokenise(task, tok, threading.Event())
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that runs torch threads can hang
    stop = spawn.Event()
    with ProcessPoolExecutor(workers, spawn, _begin, (tok.to_json(), tok.eos_token, stop)) as pool:
        try:
            numbers: dict[Future[Shard], int] = {pool.submit(_there, task): i for i, task in enumerate(tasks)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BrokenProcessPool:
            raise ValueError("a process that tokenised was killed, perhaps for want of memory; start again") from None
        finally:  # Ctrl-C, or a broken source: those at work stop at their next chunk
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(tokenizer_json: str, eos: str, stop: Any) -> None:
    global _worker, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads: there is a process a core already
    _worker, _stop = Tokenizer(Backend.from_str(tokenizer_json), eos=eos, text=tokenizer_json), stop
    threading.Thread(target=_outlive_no_parent, daemon=True).start()


def _outlive_no_parent() -> None:
    """End when the parent is killed: it would wait for work for ever, or write beside the run that comes next."""
    parent = multiprocessing.parent_process()
    assert parent
    wait([parent.sentinel])
    os._exit(1)


def _there(task: Task) -> Shard:
    return _tokenise(task, _worker, _stop)


def _tokenise(task: Task, tok: Tokenizer, stop: Any) -> Shard:
    """Write the two files and the record of one part."""
    dtype, digest = _dtype(tok), hashlib.sha256()
    starts, size, text_bytes = [1], 1, 0
    with replacing(task.target.with_suffix(".bin")) as beside, beside.open("wb") as file:

        def put(ids: list[int]) -> None:
            data = np.array(ids, dtype=dtype).tobytes()
            digest.update(data)
            file.write(data)

        put([tok.eos])
        for pieces in _chunks(_documents(task)):
            if stop.is_set():
                raise Stopped
            for piece, ids in zip(pieces, _encode(pieces, tok, task.path)):
                if piece.last:
                    ids.append(tok.eos)
                    starts.append(size + len(ids))
                size += len(ids)
                text_bytes += len(piece.text.encode())
                put(ids)
    places = np.array(starts, dtype="<i8").tobytes()
    with replacing(task.target.with_suffix(".starts")) as beside:
        beside.write_bytes(places)
    digests = digest.hexdigest(), hashlib.sha256(places).hexdigest()
    shard = Shard(task.source, tok.sha256, task.begin, task.end, len(starts) - 1, size - 1, text_bytes, *digests)
    _write_json(task.target.with_suffix(".json"), asdict(shard))
    return shard


Place = int | str  # of a document, for an error: the byte where its line begins, or words for it


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    last: bool  # the document ends here
    place: Place


def _encode(pieces: Sequence[Piece], tok: Tokenizer, path: Path) -> list[list[int]]:
    try:
        return tok.encode_batch([piece.text for piece in pieces])
    except ValueError:
        for piece in pieces:  # which one?
            try:
                tok.encode(piece.text)
            except ValueError as error:
                raise ValueError(f"{_where(path, piece.place)}: {error}") from None
        raise


def _where(path: Path, place: Place) -> str:
    """A place as people find it: the number of its line, counted only now."""
    if isinstance(place, str):
        return place
    with path.open("rb") as file:
        return f"{path} line {sum(chunk.count(10) for chunk in _bytes(file, place)) + 1}"


def _bytes(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size and (chunk := file.read(min(size, 1 << 20))):
        size -= len(chunk)
        yield chunk


def _chunks(documents: Iterable[tuple[Place, str]]) -> Iterator[list[Piece]]:
    """Pieces of documents, about `CHUNK` characters of them at a time."""
    chunk, size = [], 0
    for place, text in documents:
        begin = 0
        while begin < len(text):
            cut = CUT.search(text, begin + PIECE) if len(text) - begin > PIECE else None
            end = cut.end() if cut else len(text)
            chunk.append(Piece(text[begin:end], end == len(text), place))
            size += end - begin
            begin = end
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _documents(task: Task) -> Iterator[tuple[Place, str]]:
    """(place, text) of every document in a part that is not blank."""
    for place, row in _text(task) if task.path.suffix == ".txt" else _array(task) if task.array else _lines(task):
        if not isinstance(row, dict):
            raise ValueError(f"{_where(task.path, place)} is not a JSON object")
        text = row.get("text")
        if text is None and {"chat", "messages", "conversations"} & row.keys():
            text = _prose(row, task.path, place)
        if not isinstance(text, str):
            raise ValueError(f"{_where(task.path, place)} has no `text`; its keys are {', '.join(row)[:200]}")
        if text.strip():
            yield place, text


def _prose(row: Any, path: Path, place: Place) -> str:
    """What is said in a conversation, without markers and tools."""
    try:
        turns = from_row(row).turns
    except ValueError as error:
        raise ValueError(f"{_where(path, place)}: {error}") from None
    return "".join(f"{turn.human}\n{turn.reply}\n" for turn in turns)


def _text(task: Task) -> Iterator[tuple[Place, Any]]:
    try:
        yield str(task.path), {"text": task.path.read_text(encoding="utf-8-sig")}
    except UnicodeDecodeError as error:
        raise ValueError(f"{task.path} is not UTF-8 text: byte {error.start} cannot be read") from None


def _array(task: Task) -> Iterator[tuple[Place, Any]]:
    yield from read_rows(task.path)


def _lines(task: Task) -> Iterator[tuple[Place, Any]]:
    """Every line that begins within a part of a source."""
    with task.path.open("rb") as file:
        file.seek(max(task.begin - 1, 0))
        if task.begin:
            file.readline()  # the rest of a line that began before; of none where this part begins with a line
        at = file.tell()
        while at < task.end and (line := file.readline()):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{_where(task.path, at)} is not JSON: {error}") from None
                yield at, row
            at += len(line)
