"""Pages for the local index, from files: Markdown, plain text, HTML and JSON lines.

    for entry in read_source(Path("notes")): ...        # a folder, read in order, or one file

* `.md`: every heading of the first level begins a page; a line `@ …` under it holds keywords, which are searched and
  not shown. A file without such a heading is one page, as every `.txt` is, named after the file.
* `.html`: a page, its main text as of a page from the web.
* `.jsonl`: a page a line: `text`, and perhaps `title`, `url` and `keywords`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moss.tools.base import ToolError
from moss.tools.extract import main_text
from moss.tools.index import Entry

SUFFIXES = (".md", ".txt", ".html", ".htm", ".jsonl")
MAX_FILE = 64 << 20  # bytes of a file that is read as one page, or several

_HEADING = re.compile(r"^# +(.+?) *#* *$", re.MULTILINE)


def read_source(path: Path) -> Iterator[Entry]:
    """The pages of a file or of all files below a folder; ValueError names the file, and the line, that is no page."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
    elif path.suffix.lower() not in SUFFIXES and path.exists():
        raise ValueError(f"{path} ends in none of {', '.join(SUFFIXES)}")
    else:
        files = [path]
    for file in files:
        yield from _rows(file) if file.suffix.lower() == ".jsonl" else _pages(file)


def markdown_pages(text: str, url: str, title: str) -> Iterator[Entry]:
    """The pages of a Markdown text; `title` is for one that has no heading."""
    pieces = _HEADING.split(text)
    if pieces[0].strip():
        yield Entry(title, pieces[0].strip(), url)
    for heading, rest in zip(pieces[1::2], pieces[2::2]):
        first, _, body = rest.strip().partition("\n")
        keywords, body = (first[1:].strip(), body) if first.startswith("@ ") else ("", rest)
        if body.strip():
            yield Entry(
                heading,
                " ".join(body.split("\n")).strip() if not body.count("\n\n") > 1 else body.strip(),
                f"{url}#{heading}",
                keywords,
            )


def _pages(file: Path) -> Iterator[Entry]:
    if file.stat().st_size > MAX_FILE:
        raise ValueError(f"{file} is larger than {MAX_FILE >> 20} MB; cut it into pages, or write JSON lines")
    content = file.read_bytes()
    suffix, url = file.suffix.lower(), file.as_posix()
    if suffix in (".html", ".htm"):
        try:
            title, text = main_text(content)
        except ToolError as error:
            raise ValueError(f"{file}: {error}") from None
        if text:
            yield Entry(title or file.stem, text, url)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    if suffix == ".md":
        yield from markdown_pages(text, url, file.stem)
    elif text.strip():
        yield Entry(file.stem, text.strip(), url)


def _rows(file: Path) -> Iterator[Entry]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _entry(json.loads(line), f"{file.as_posix()}#{number}")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: {error}") from None


def _entry(row: Any, place: str) -> Entry:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError("a page is an object with a text")
    values = {name: row.get(name) or "" for name in ("title", "url", "keywords")}
    for name, value in values.items():
        if isinstance(value, list) and name == "keywords":
            values[name] = value = " ".join(map(str, value))
        if not isinstance(value, str):
            raise ValueError(f"{name} is no text")
    return Entry(
        values["title"] or row["text"].strip()[:60], row["text"].strip(), values["url"] or place, values["keywords"]
    )
