"""The places where a search looks: the bundled pages, pages of the user's own, and the web through a provider.

    bundled("height of Mount Fuji")                     # [Source(title, url, text), …], the best page first

Each gives up to `PAGES` sources, summed up with the question in mind. `search.py` is the tool that asks them in
order.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Sequence
from functools import cache
from importlib import resources

from moss.tools import extract, fetch, providers
from moss.tools.base import Source, ToolError, progress
from moss.tools.calls import ITEM_LIMIT
from moss.tools.entries import markdown_pages
from moss.tools.glossary import Glossary
from moss.tools.index import Entry, Found, Index
from moss.tools.search import index_folder
from moss.tools.textrank import is_chinese, summarize
from moss.tools.weight import Question

PAGES = 3
FRACTION = 0.5  # of the weight of the best page that another must have
LEAST, LEAST_CHINESE = 110, 50  # characters of a page without which it is left out, so that the others say something

_lock = threading.Lock()


def look(place: str, query: str, room: int, until: float, later: Sequence[str] = ()) -> list[Source]:
    """What one place finds; `until` is when the answer must be there, by the clock that only runs on. `later` are the
    places that will be asked where it finds nothing."""
    if place == "encyclopedia":
        return bundled(query, room)
    if place == "index":
        return _own(query, room, later)
    return fetch.wait(_network(place, query, room, until))


def bundled(query: str, room: int = 0) -> list[Source]:
    """What the encyclopaedia has, in about `room` characters (0 = any number)."""
    return _summed_up(_pages(encyclopedia(), query, room), query, room)


def _pages(index: Index, query: str, room: int) -> list[Found]:
    """The best pages of an index, as many as there is room for."""
    return index.search(query, shares(room, query)[0], glossary().other_names(query))


def _summed_up(found: Sequence[Found], query: str, room: int) -> list[Source]:
    """Pages, each summed up."""
    limit = shares(room, query)[1]
    return [Source(page.title, page.url, summarize(page.text, limit=limit, query=query)) for page in found]


@cache
def glossary() -> Glossary:
    """What things are called in the other language."""
    return Glossary(bundled_pages())


def shares(room: int, query: str) -> tuple[int, int]:
    """How many pages, and how many characters of each, where the model reads `room` of all: fewer pages rather than
    pages that say nothing."""
    if not room:
        return PAGES, ITEM_LIMIT
    least = LEAST_CHINESE if re.search("[\u3400-\u9fff]", query) else LEAST
    pages = min(PAGES, max(1, room // least))
    return pages, min(ITEM_LIMIT, max(least // 2, room // pages - 10))


async def _network(place: str, query: str, room: int, until: float) -> list[Source]:
    """The pages that a provider names, read and summed up; its own words, and why, where none of them can be read."""
    pages, limit = shares(room, query)
    if (left := until - time.monotonic()) < 0.5:
        raise ToolError("the places before it took all the time")
    progress(f"asking {place}")
    hits = await providers.ask(place, query, "zh" if is_chinese(query) else "en", min(providers.SECONDS, left))
    hits = [hit for hit in hits if fetch.is_address(hit.url)][:pages]
    progress(f"reading {len(hits)} page{'s' * (len(hits) != 1)}")
    seconds = min(fetch.SECONDS, until - time.monotonic() - extract.SECONDS)
    failed: list[str] = []

    async def read(hit: providers.Hit) -> Source | None:
        try:
            page = await fetch.read_page(hit.url, seconds)
            title, text = await asyncio.to_thread(extract.text_of, page)
        except ToolError as error:  # it is left out
            failed.append(str(error))
            return None
        text = summarize(text, limit=limit, query=query)
        return Source(hit.title or title, page.url, text) if text else None

    found = [source for source in await asyncio.gather(*map(read, hits)) if source is not None]
    if failed and not found:
        progress(f"none of {len(hits)} pages could be read: {failed[0]}")
    said = [Source(hit.title, hit.url, summarize(hit.text, limit=limit, query=query)) for hit in hits]
    return found or [source for source in said if source.text]


def encyclopedia() -> Index:
    """The index of the bundled pages, made in memory at the first use."""
    with _lock:
        return _encyclopedia()


@cache
def _encyclopedia() -> Index:
    return Index.of(bundled_pages())


@cache
def bundled_pages() -> list[Entry]:
    """The pages of the encyclopaedia, in the order of its files."""
    folder = resources.files("moss.tools") / "encyclopedia"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".md")), key=lambda file: file.name)
    texts = ((file.name, file.read_text(encoding="utf-8")) for file in files)
    return [entry for name, text in texts for entry in markdown_pages(text, f"encyclopedia/{name}", name)]


def _own(query: str, room: int, later: Sequence[str]) -> list[Source]:
    """What the user's own index has, among pages of the encyclopaedia if that is asked later."""
    try:
        index = _own_index()
        own = [] if index is None else _pages(index, query, room)
        if index is not None and own and "encyclopedia" in later:
            own = _among_bundled(own, index, query, room)
    except (ValueError, OSError) as error:
        raise ToolError(str(error)) from None
    return _summed_up(own, query, room)


def _own_index() -> Index | None:
    """The user's own index as it is now; None where there is none and none is named."""
    named = bool(os.environ.get("MOSS_INDEX"))
    try:
        folder = index_folder()
        if not named and not folder.is_dir():
            return None
    except (ValueError, PermissionError):  # no home folder, or that of somebody else
        if named:
            raise
        return None
    return Index.open(folder)


def _among_bundled(own: Sequence[Found], index: Index, query: str, room: int) -> list[Found]:
    """The pages of the user's own and of the encyclopaedia that hold the weightiest words of the question, the user's
    own first where it is equal. Nothing where none of the user's own has half the weight of the best: they must not
    hide the encyclopaedia for one word in common."""
    question = Question(query, glossary().named(query), (index, encyclopedia()))
    weights = {page: question.weight(page) for page in (*own, *_pages(encyclopedia(), query, room))}
    enough = FRACTION * max(weights.values())
    best = [page for page in sorted(weights, key=weights.__getitem__, reverse=True) if weights[page] >= enough]
    best = best[: shares(room, query)[0]]
    return best if any(page in best for page in own) else []
