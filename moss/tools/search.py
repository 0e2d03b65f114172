"""Web search: `Search("why is the sky blue")` gives up to three sources, each a summary with the question in mind.

`MOSS_SEARCH` names where to look, in order; the first that finds something answers. Nothing goes over the network
unless a provider stands there:

* `index`: your own pages, made with `moss data index PATH`; passed over while there are none;
* `encyclopedia`: the small one that comes with the project, in English and Chinese;
* `searxng`, `serper`, `brave`, `tavily`: `providers.py`. The pages they name are read by the one safe client
  (`fetch.py`), their main text taken out in the sandbox (`extract.py`), and summarised (`textrank.py`).

The default is `index,encyclopedia`. The paper's method: the first three pages, one TextRank summary each (section 6).
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
import unicodedata
from dataclasses import replace
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moss.tools.base import Source, Tool, ToolError, progress, standard_tools, tool
from moss.tools.calls import ITEM_LIMIT, room

if TYPE_CHECKING:
    from moss.tools.index import Entry, Index

ORDER = "index,encyclopedia"
PLACES = ("index", "encyclopedia", "searxng", "serper", "brave", "tavily")
INDEX = "~/.local/share/moss/index"  # where `moss data index` writes, unless MOSS_INDEX says otherwise
PAGES = 3
LEAST, LEAST_CHINESE = 110, 50  # characters of a page without which it is left out, so that the others say something
MAX_QUERY = 400
SECONDS = 10.0

_ADDRESS = re.compile(
    r"(?:[a-z][a-z0-9+.-]*:)?[/\\]{2}\S"
    r"|(?:https?|wss?|s?ftp|file|data|jar|javascript|vbscript|blob|about|view-source|gopher|dict|ldaps?|mailto|tel):\S",
    re.IGNORECASE,
)
_lock = threading.Lock()


def missing() -> str:
    """What search lacks here, in one line; "" when nothing."""
    lacking = [package for package in ("tantivy", "trafilatura") if find_spec(package) is None]
    return f"{' and '.join(lacking)} not installed: pip install -e '.[search]'" if lacking else ""


def prepare() -> None:
    """Begin to read the encyclopaedia, and to start what reads pages where the network is asked."""
    if missing():
        return
    threading.Thread(target=encyclopedia, daemon=True, name="encyclopedia").start()
    if any(place not in ("index", "encyclopedia") for place in order()):
        from moss.tools import extract

        extract.BOX.start()


@tool(key="search", switch="Web search", api="Search", seconds=SECONDS, prepare=prepare, missing=missing)
def search(query: str) -> list[Source]:
    """Search for pages that answer a question, and sum them up.

    Args:
        query: what is looked for, as typed into a search engine, for example height of Mount Everest
    """
    query = " ".join(query.split())
    if not query:
        raise ToolError("there is nothing to search for")
    if len(query) > MAX_QUERY:
        raise ToolError(f"{len(query)} characters are too many for a search; ask for {MAX_QUERY} at most")
    if _ADDRESS.match("".join(filter(str.isprintable, unicodedata.normalize("NFKC", query))).lstrip(" <([\"'")):
        raise ToolError("Search takes words, not the address of a page")
    if reason := missing():
        raise ToolError(reason)
    until, failed = time.monotonic() + SECONDS - 0.5, []
    for place in order():
        try:
            found = _look(place, query, until)
        except ToolError as error:
            failed.append(f"{place}: {error}")
            progress(failed[-1])
            continue
        if found:
            return found
    raise ToolError("; ".join(failed) or "nothing found")


def offline_tools() -> dict[str, Tool]:
    """The standard tools with a search of the bundled pages alone, whatever the settings are: for measurements."""
    tools = standard_tools()
    return tools | {"search": replace(tools["search"], function=_offline)}


def _offline(query: str) -> list[Source]:
    """Search for pages that answer a question, and sum them up."""
    return bundled(query, room())


def order() -> list[str]:
    """Where to look, from `MOSS_SEARCH`; `ToolError` for a place that there is not."""
    places = [place.strip() for place in (os.environ.get("MOSS_SEARCH") or ORDER).split(",") if place.strip()]
    for place in places:
        if place not in PLACES:
            raise ToolError(f"MOSS_SEARCH names {place!r}; there are {', '.join(PLACES)}")
    return places


def _look(place: str, query: str, until: float) -> list[Source]:
    """What one place finds; `until` is when the answer must be there, by the clock that only runs on."""
    if place == "encyclopedia":
        return bundled(query, room())
    if place == "index":
        return _own(query, room())
    from moss.tools import fetch

    return fetch.wait(_network(place, query, room(), until))


def bundled(query: str, room: int = 0) -> list[Source]:
    """What the encyclopaedia has, in about `room` characters (0 = any number)."""
    return _summed_up(encyclopedia(), query, room)


def _summed_up(index: Index, query: str, room: int) -> list[Source]:
    """The best pages of an index, each summed up."""
    from moss.tools.textrank import summarize

    pages, limit = shares(room, query)
    found = index.search(query, pages)
    return [Source(page.title, page.url, summarize(page.text, limit=limit, query=query)) for page in found]


def shares(room: int, query: str) -> tuple[int, int]:
    """How many pages, and how many characters of each, where the model reads `room` of all: fewer pages rather than
    pages that say nothing."""
    if not room:
        return PAGES, ITEM_LIMIT
    least = LEAST_CHINESE if re.search("[\u3400-\u9fff]", query) else LEAST
    pages = min(PAGES, max(1, room // least))
    return pages, min(ITEM_LIMIT, max(least // 2, room // pages - 10))


async def _network(place: str, query: str, room: int, until: float) -> list[Source]:
    """The pages that a provider names, read and summed up; its own words where none of them can be read."""
    from moss.tools import extract, fetch, providers
    from moss.tools.textrank import is_chinese, summarize

    pages, limit = shares(room, query)
    if (left := until - time.monotonic()) < 0.5:
        raise ToolError("the places before it took all the time")
    progress(f"asking {place}")
    hits = await providers.ask(place, query, "zh" if is_chinese(query) else "en", min(providers.SECONDS, left))
    hits = [hit for hit in hits if fetch.is_address(hit.url)][:pages]
    progress(f"reading {len(hits)} page{'s' * (len(hits) != 1)}")
    seconds = min(fetch.SECONDS, until - time.monotonic() - extract.SECONDS)

    async def read(hit: providers.Hit) -> Source | None:
        try:
            page = await fetch.read_page(hit.url, seconds)
            title, text = await asyncio.to_thread(extract.text_of, page)
        except ToolError:  # it is left out
            return None
        text = summarize(text, limit=limit, query=query)
        return Source(hit.title or title, page.url, text) if text else None

    found = [source for source in await asyncio.gather(*map(read, hits)) if source is not None]
    said = [Source(hit.title, hit.url, summarize(hit.text, limit=limit, query=query)) for hit in hits]
    return found or [source for source in said if source.text]


def encyclopedia() -> Index:
    """The index of the bundled pages, made in memory at the first use."""
    with _lock:
        return _encyclopedia()


@cache
def _encyclopedia() -> Index:
    from moss.tools.index import Index

    return Index.of(bundled_pages())


def bundled_pages() -> list[Entry]:
    """The pages of the encyclopaedia, in the order of its files."""
    from moss.tools.entries import markdown_pages

    folder = resources.files("moss.tools") / "encyclopedia"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".md")), key=lambda file: file.name)
    texts = ((file.name, file.read_text(encoding="utf-8")) for file in files)
    return [entry for name, text in texts for entry in markdown_pages(text, f"encyclopedia/{name}", name)]


def index_folder() -> Path:
    """Where the user's own index is."""
    return Path(os.environ.get("MOSS_INDEX") or INDEX).expanduser()


def _own(query: str, room: int) -> list[Source]:
    """What the user's own index has, as it is now; nothing where there is none."""
    from moss.tools.index import Index

    folder = index_folder()
    if not folder.is_dir() and not os.environ.get("MOSS_INDEX"):
        return []
    try:
        return _summed_up(Index.open(folder), query, room)
    except ValueError as error:
        raise ToolError(str(error)) from None
