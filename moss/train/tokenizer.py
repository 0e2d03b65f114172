"""`moss train tokenizer`: a byte-level BPE vocabulary from text and conversations, new or on top of another.

    moss train tokenizer --data text.jsonl dialogs.jsonl --vocab-size 2048 --out runs/nano/tokenizer
    moss train tokenizer --extend models/codegen --data zh.txt --vocab-size 60000 --out runs/zh/tokenizer

Documents (`text` of each line, or whole .txt files) and the texts of conversations (MOSS JSON, OpenAI, ShareGPT) may
stand in one file; English, Chinese and code belong together in the mix that training will see. The result is a folder
with a `tokenizer.json` that stock transformers reads too. Same input, same vocabulary.

With `--extend` the base's ids and merges stay, and new ones are learnt for the writing of the data (`moss/extend.py`):
Chinese for a base that cuts each character into bytes, as the paper did. Text without it keeps its ids. `extends.json`
in the result names the base; `moss train pretrain --model RESULT` gives the base's weights a row for each new id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from rich.table import Table

from moss.config import option
from moss.data import curriculum
from moss.data.dialogs import from_row, read_rows, to_row
from moss.data.rows import data_files, documents
from moss.errors import UsageError
from moss.extend import LANGUAGES, extend, language
from moss.files import replacing
from moss.log import console, note
from moss.tokenizer import MIN_VOCAB, Tokenizer, load, train

TEXTS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")
SAMPLE, LENGTH = 2000, 20_000  # texts that the report is measured on, and characters of each
MATERIAL = 2000  # documents, and as many conversations, of the scripted teacher where no --data are given
VOCAB = 2048  # ids of a new vocabulary
NEW_SHARE = 0.3  # of an extended one's ids are new: the paper's share
EXTENDS = "extends.json"  # beside an extended tokenizer.json: what it extends
MODEL = ("config.json", "model.safetensors")  # of a model's folder, where another tokenizer would not fit


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a tokenizer from text and conversations, or extend one by a new language."""

    data: list[Path] = option(
        list
    )  # JSON-lines or .txt files or folders of them; none = the scripted teacher's material
    extend: Path | None = None  # folder of a base whose vocabulary gets new ids for the writing of the data
    vocab_size: int = 0  # ids in all, the base's included; 0 = 2048, or with --extend as many that 30 % are new
    out: Path = Path("runs/tokenizer")  # folder that gets tokenizer.json


def main(config: TrainTokenizer) -> int:
    """Train or extend, save, and report characters per token."""
    files = data_files(config.data, "--data")
    if held := [name for name in MODEL if (config.out / name).exists()]:
        raise ValueError(f"{config.out} holds a model ({held[0]}) with its own tokenizer; choose another --out")
    if config.extend and config.out.resolve() in (config.extend.resolve(), config.extend.resolve().parent):
        raise ValueError(f"--out {config.out} holds the tokenizer that --extend names, which must stay; choose another")
    base = load(config.extend) if config.extend else None
    size = config.vocab_size or (round(base.vocab_size / (1 - NEW_SHARE)) if base else VOCAB)
    least = base.vocab_size + 1 if base else MIN_VOCAB
    if size < least:
        of = f"as {config.extend} has {least - 1} ids already" if base else "for the bytes and the markers"
        raise UsageError(f"--vocab-size is {size}; it counts all ids and must be at least {least}, {of}")
    seen: list[str] = []
    chance = Random(0)

    def sampled() -> Iterator[str]:
        for number, text in enumerate(texts(files) if files else material()):
            if len(seen) < SAMPLE:
                seen.append(text[:LENGTH])
            elif (at := chance.randrange(number + 1)) < SAMPLE:  # each text as likely as any other: one language may
                seen[at] = text[:LENGTH]  # come after another
            yield text

    tok = extend(base, sampled(), size - base.vocab_size) if base else train(sampled(), size)
    if not seen:
        raise ValueError(f"--data: there is no text in {', '.join(map(str, config.data))}")
    if tok.vocab_size < size:
        note(f"the text has pieces for {tok.vocab_size} ids only, not for {size}")
    save(tok, base, config)
    console.print(report(tok, seen, base))
    print(config.out)
    return 0


def save(tok: Tokenizer, base: Tokenizer | None, config: TrainTokenizer) -> None:
    """Write the tokenizer and, of an extended one, what it extends."""
    try:
        tok.save(config.out)
        if base and config.extend:
            folder = config.extend if config.extend.is_dir() else config.extend.parent
            told = {"base": str(folder.resolve()), "sha256": base.sha256, "ids": base.vocab_size}
            with replacing(config.out / EXTENDS) as file:
                file.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            if (folder / "config.json").is_file():
                new = tok.vocab_size - base.vocab_size
                note(
                    f"{folder} holds weights: moss train pretrain --model {config.out} gives them {new:,} new rows, "
                    "each the mean of the rows of the pieces that the base makes of the new token"
                )
        else:
            (config.out / EXTENDS).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write in {config.out}: {error.strerror}; choose another --out") from None


def texts(paths: Sequence[Path]) -> Iterator[str]:
    """Every text in documents and conversations."""
    for path in paths:
        if path.suffix == ".txt":
            yield from documents([path])
            continue
        for place, row in read_rows(path):
            try:
                found = list(texts_of(row))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            yield from found


def material() -> Iterator[str]:
    """Texts of the scripted teacher: documents, and what is said in conversations."""
    note(f"no --data: {MATERIAL:,} documents and {MATERIAL:,} conversations of the scripted teacher")
    yield from islice(curriculum.text(0), MATERIAL)
    for item in islice(curriculum.dialogs(0), MATERIAL):
        yield from texts_of(to_row(item.dialog, "moss"))


def texts_of(row: Any) -> Iterator[str]:
    """The texts of one row, whatever format it has; ValueError where it has none that is known."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    known = isinstance(row.get("text"), str)
    if known:
        yield row["text"]
    if not known and not {"chat", "messages", "conversations"} & row.keys():
        keys = ", ".join(row)[:200]
        raise ValueError(f"neither `text` nor `chat`, `messages` or `conversations`; its keys are {keys}")
    if "messages" in row or "conversations" in row:
        row = to_row(from_row(row), "moss")
    if isinstance(row.get("meta_instruction"), str):
        yield row["meta_instruction"]
    chat = row.get("chat")
    for turn in chat.values() if isinstance(chat, dict) else ():
        for key, value in turn.items() if isinstance(turn, dict) else ():
            if key.startswith(TEXTS) and isinstance(value, str):
                yield _without_markers(value)


def _without_markers(section: str) -> str:
    """`<|Human|>: Hello<eoh>\\n` -> ` Hello`: markers are ids of their own and must not become merges."""
    head, colon, rest = section.partition(":")
    text = rest if colon and head.startswith("<|") else section
    body, end, _ = text.rpartition("<eo")
    return body if end else text


def report(tok: Tokenizer, sample: Sequence[str], base: Tokenizer | None = None) -> Table:
    """Characters per token by language, of an extended vocabulary before and after; on texts of the material, and on
    the scripted teacher's English and Python's own library where the material has no such text."""
    groups: dict[str, list[str]] = {}
    for text in sample:
        groups.setdefault(language(text), []).append(text)
    if (latin := LANGUAGES["Latin"]) not in groups:
        groups[latin] = [text for text in islice(curriculum.text(0), 400) if language(text) == latin]
    library = sorted(Path(os.__file__).parent.glob("*.py"))[::4]
    groups["code"] = [path.read_text(encoding="utf-8")[:LENGTH] for path in library]
    table = Table(title=f"tokenizer of {tok.vocab_size} ids, sha256 {tok.sha256[:12]}")
    columns = ["language", "texts", *(["before"] if base else []), "characters per token", *(["ids"] if base else [])]
    for column in columns:
        table.add_column(column, justify="left" if column == "language" else "right")
    for name, group in groups.items():
        size = sum(map(len, group))
        after = tok.encode_batch(group)
        cells = [f"{size / max(sum(map(len, after)), 1):.2f}"]
        if base:
            before = base.encode_batch(group)
            cells = [f"{size / max(sum(map(len, before)), 1):.2f}", *cells, "as before" if before == after else "new"]
        table.add_row(name, str(len(group)), *cells)
    return table
