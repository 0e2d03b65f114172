"""`moss data index`: have your own pages found by `Search`.

moss data index notes/                               # a folder of .md, .txt, .html and .jsonl, or one file
moss chat --tools search                             # asks them first, then the encyclopaedia
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moss.config import option
from moss.errors import UsageError
from moss.log import PLAIN_LINE_EVERY, note
from moss.tools import search

SHOWN = 5  # files that were left out and are named

T = TypeVar("T")


@dataclass(frozen=True)
class MakeIndex:
    """Put pages into the local search index; a second run takes up what has changed since. Files that cannot be read
    are left out."""

    source: Path = option(positional=True)  # folder of .md, .txt, .html and .jsonl files, or one such file
    to: Path | None = None  # the index's folder; without it MOSS_INDEX, or ~/.local/share/moss/index
    remove: bool = False  # take the pages of this source out of the index
    json: bool = False  # print what was done as JSON: index, pages, added, kept, removed, left_out, seconds


def main(config: MakeIndex) -> int:
    """Entry of `moss data index`."""
    if reason := search.missing():
        raise ValueError(reason)
    index, entries = importlib.import_module("moss.tools.index"), importlib.import_module("moss.tools.entries")
    if not config.remove and not config.source.exists():
        raise UsageError(f"{config.source} does not exist; name a folder or a file of pages")
    folder = search.index_folder() if config.to is None else config.to.expanduser()
    source = config.source.resolve()  # pages are known by where they are, from wherever that is named
    started = time.perf_counter()
    into = index.Index.open(folder, make=not config.remove)
    left_out: dict[str, str] = {}  # files with the reason
    pages = [] if config.remove else counted(entries.read_source(source, left_out))
    done = into.update(str(source), pages, left_out)
    seconds = round(time.perf_counter() - started, 3)
    if config.json:
        told = {"index": str(folder), "pages": into.num_pages, **done._asdict(), "left_out": left_out}
        print(json.dumps(told | {"seconds": seconds}))
    else:
        told = f"{done.added} added, {done.kept} as they were, {done.removed} removed, in {seconds:.1f} s"
        print(f"{folder}: {into.num_pages} pages; {told}")
        if config.to is not None and folder != search.index_folder():
            print(f"to search it: MOSS_INDEX={folder}")
    if left_out:
        reasons = "; ".join(list(left_out.values())[:SHOWN])
        more = f"; and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        note(f"{len(left_out)} file{'s' * (len(left_out) != 1)} left out: {reasons}{more}")
    return 1 if left_out else 0


def counted(pages: Iterable[T]) -> Iterator[T]:
    """The pages, with a line now and then where there are many."""
    said = time.monotonic()
    for number, page in enumerate(pages):
        if time.monotonic() - said > PLAIN_LINE_EVERY:
            said = time.monotonic()
            note(f"{number} pages read")
        yield page
