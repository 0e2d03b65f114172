"""`moss train tokenizer`: a byte-level BPE vocabulary from text and conversations.

    moss train tokenizer --data text.jsonl dialogs.jsonl --vocab-size 2048 --out runs/nano/tokenizer

Documents (`text` of each line, or whole .txt files) and the texts of conversations (released MOSS JSON) may stand in
one file; English, Chinese and code belong together in the mix that training will see. The result is a folder with a
`tokenizer.json` that stock transformers reads too. Same input, same vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from moss.config import option
from moss.data.rows import data_files, documents, json_lines
from moss.log import console, note
from moss.tokenizer import Tokenizer, train

TEXTS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")
SAMPLE = 2000  # texts that the report is measured on


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a tokenizer from text and conversations."""

    data: list[Path] = option(list)  # JSON-lines or .txt files
    vocab_size: int = 2048  # ids in all, the 256 bytes and the markers included
    out: Path = Path("runs/tokenizer")  # folder that gets tokenizer.json


def main(config: TrainTokenizer) -> int:
    """Train, save, and report characters per token."""
    data_files(config.data, "--data")
    seen: list[str] = []

    def sampled() -> Iterator[str]:
        for number, text in enumerate(texts(config.data)):
            if number % 7 == 0 and len(seen) < SAMPLE:
                seen.append(text)
            yield text

    tok = train(sampled(), config.vocab_size)
    if not seen:
        raise ValueError(f"--data: there is no text in {', '.join(map(str, config.data))}")
    if tok.vocab_size < config.vocab_size:
        note(f"the text has pieces for {tok.vocab_size} ids only, not for {config.vocab_size}")
    try:
        tok.save(config.out)
    except OSError as error:
        raise ValueError(f"cannot write in {config.out}: {error.strerror}; choose another --out") from None
    console.print(report(tok, seen))
    print(config.out)
    return 0


def texts(paths: Sequence[Path]) -> Iterator[str]:
    """Every text in documents and conversations."""
    for path in paths:
        if path.suffix == ".txt":
            yield from documents([path])
            continue
        for number, row in json_lines(path):
            found = list(_texts_of(row))
            if not found and not isinstance(row.get("text"), str):
                keys = ", ".join(row)[:200]
                raise ValueError(f"{path} line {number} has neither `text` nor `chat`; its keys are {keys}")
            yield from found


def _texts_of(row: dict[str, Any]) -> Iterator[str]:
    if isinstance(row.get("text"), str):
        yield row["text"]
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


def report(tok: Tokenizer, sample: Sequence[str]) -> Table:
    """Characters per token by script, measured on texts of the material."""
    table = Table(title=f"tokenizer of {tok.vocab_size} ids, sha256 {tok.sha256[:12]}")
    for column in ("script", "texts", "characters per token"):
        table.add_column(column, justify="left" if column == "script" else "right")
    for script, chinese in (("with Chinese", True), ("without", False)):
        group = [text for text in sample if any("\u4e00" <= char <= "\u9fff" for char in text) == chinese]
        if group:
            tokens = sum(len(ids) for ids in tok.encode_batch(group))
            table.add_row(script, str(len(group)), f"{sum(map(len, group)) / max(tokens, 1):.2f}")
    return table
