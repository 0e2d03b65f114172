"""Web search: `Search("why is the sky blue")` gives up to three sources, each a summary with the question in mind.

`MOSS_SEARCH` names where to look, in order; the first that finds something answers. Nothing goes over the network
unless a provider stands there:

* `index`: your own pages, made with `moss data index PATH`; passed over while there are none. Where the encyclopaedia
  is named later, its pages and yours stand in one order, by the words of the question that they hold;
* `encyclopedia`: the small one that comes with the project, in English and Chinese;
* `searxng`, `serper`, `brave`, `tavily`: `providers.py`. The pages they name are read by the one safe client
  (`fetch.py`), their main text taken out in the sandbox (`extract.py`), and summarised (`textrank.py`).

The default is `index,encyclopedia`. The paper's method: the first three pages, one TextRank summary each (section 6).
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import time
import unicodedata
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moss.tools.base import Source, Tool, ToolError, progress, standard_tools, tool
from moss.tools.calls import room

ORDER = "index,encyclopedia"
PLACES = ("index", "encyclopedia", "searxng", "serper", "brave", "tavily")
INDEX = "~/.local/share/moss/index"  # where `moss data index` writes, unless MOSS_INDEX says otherwise
MAX_QUERY = 400
SECONDS = 10.0

_ADDRESS = re.compile(
    r"(?:[a-z][a-z0-9+.-]*:)?[/\\]{2}\S"
    r"|(?:https?|wss?|s?ftp|file|data|jar|javascript|vbscript|blob|about|view-source|gopher|dict|ldaps?|mailto|tel):\S",
    re.IGNORECASE,
)


def missing() -> str:
    """What search lacks here, in one line; "" when nothing."""
    lacking = [package for package in ("tantivy", "trafilatura") if find_spec(package) is None]
    return f"{' and '.join(lacking)} not installed: pip install -e '.[search]'" if lacking else ""


def prepare() -> None:
    """Begin to read the encyclopaedia, and to start what reads pages where the network is asked."""
    if missing():
        return
    threading.Thread(target=lambda: _places().encyclopedia(), daemon=True, name="encyclopedia").start()
    if any(place not in ("index", "encyclopedia") for place in order()):
        _places().extract.BOX.start()


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
    places = order()
    for number, place in enumerate(places, 1):
        try:
            found = _places().look(place, query, room(), until, places[number:])
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
    return _places().bundled(query, room())


def _places() -> Any:
    """`places.py`, which takes a while to import."""
    return importlib.import_module("moss.tools.places")


def order() -> list[str]:
    """Where to look, from `MOSS_SEARCH`; `ToolError` for a place that there is not."""
    places = [place.strip() for place in (os.environ.get("MOSS_SEARCH") or ORDER).split(",") if place.strip()]
    for place in places:
        if place not in PLACES:
            raise ToolError(f"MOSS_SEARCH names {place!r}; there are {', '.join(PLACES)}")
    return places


def index_folder() -> Path:
    """Where the user's own index is; ValueError where that is below a home folder and the user has none."""
    folder = os.environ.get("MOSS_INDEX") or INDEX
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no home folder for {folder}; name another in MOSS_INDEX") from None
