"""Pages for the local index, from files: Markdown, plain text, HTML and JSON lines.

    for entry in read_source(Path("notes")): ...        # a folder, read in order, or one file

* `.md`: every heading of the first level begins a page; a line `@ …` under it holds keywords, which are searched and
  not shown. A file without such a heading is one page, as every `.txt` is, named after the file.
* `.html`: a page, its main text as of a page from the web.
* `.jsonl`: a page a line: `text`, and perhaps `title`, `url` and `keywords`.

Text is in UTF-8 or, in `.md` and `.txt`, in GB 18030. Of a folder, files and folders whose name begins with a dot are
left out.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moss.tools.base import ToolError
from moss.tools.extract import main_text
from moss.tools.index import Entry

SUFFIXES = (".md", ".txt", ".html", ".htm", ".jsonl")
MAX_FILE = 64 << 20  # bytes of a file that is read as one page, or several

WRAPPED = 40  # columns of a line that may go on in the next; shorter ones (verses, a list) stand for themselves

_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # settings at the head of a Markdown file
_HEADING = re.compile(r"# +(.+?) *#* *")
_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_OWN_LINE = re.compile(r"[-*+] |[|#>]|1[.)] ")  # a list, a table, a heading, a quotation
_ITEM = re.compile(r"\d{1,3}[.)] ")
_WIDE = re.compile("[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60]")


def read_source(path: Path, left_out: dict[str, str] | None = None) -> Iterator[Entry]:
    """The pages of a file or of all files below a folder. A file that cannot be read is put into `left_out` with the
    reason, which names it and the line, or where that is None raises it as ValueError or OSError."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise ValueError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
    elif path.suffix.lower() not in SUFFIXES and path.exists():
        raise ValueError(f"{path} ends in none of {', '.join(SUFFIXES)}")
    else:
        files = [path]
    for file in files:
        try:
            for entry in _rows(file) if file.suffix.lower() == ".jsonl" else _pages(file):
                yield replace(entry, file=file.as_posix())
        except (ValueError, OSError) as error:
            if left_out is None:
                raise
            left_out[file.as_posix()] = str(error)


def markdown_pages(text: str, url: str, title: str) -> Iterator[Entry]:
    """The pages of a Markdown text; `title` is for what stands before the first heading."""
    pages: list[tuple[str, list[str]]] = [("", [])]
    fence = ""
    for line in _FRONT.sub("", text).split("\n"):
        if mark := _FENCE.match(line):
            fence = "" if fence and line.strip().startswith(fence) else fence or mark.group(1)
        heading = None if fence else _HEADING.fullmatch(line)
        if heading:
            pages.append((heading.group(1), []))
        else:
            pages[-1][1].append(line)
    for heading, lines in pages:
        first = next((at for at, line in enumerate(lines) if line.strip()), 0)
        keywords = lines.pop(first)[1:].strip() if heading and lines and lines[first].startswith("@ ") else ""
        if body := paragraphs("\n".join(lines)):
            yield Entry(heading or title, body, f"{url}#{heading}" if heading else url, keywords)


def paragraphs(text: str) -> str:
    """A text with a paragraph on each line, however its lines were wrapped."""
    found: list[list[str]] = []
    goes_on = False
    for line in text.split("\n"):
        line = line.strip()
        own = _OWN_LINE.match(line) or (found and _ITEM.match(line) and _ITEM.match(found[-1][0]))
        if goes_on and line and not own:
            glue = "" if _WIDE.match(line[0]) and _WIDE.match(found[-1][-1][-1]) else " "
            found[-1] += [glue, line]
        elif line:
            found.append([line])
        goes_on = len(line) + len(_WIDE.findall(line)) >= WRAPPED and not line.startswith(("#", "|"))
    return "\n".join("".join(pieces) for pieces in found)


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
    text = _decoded(content, file).replace("\r\n", "\n").replace("\r", "\n")
    if suffix == ".md":
        yield from markdown_pages(text, url, file.stem)
    elif body := paragraphs(text):
        yield Entry(file.stem, body, url)


def _decoded(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode("gb18030")
        raise ValueError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from None


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
    text = row["text"].strip()
    title = values["title"] or " ".join(text[:60].split())
    return Entry(title, text, values["url"] or place, values["keywords"])
