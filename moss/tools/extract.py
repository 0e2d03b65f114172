"""The main text of a page of HTML, without menus, banners and footers (trafilatura), in a process that can do no harm.

    title, text = main_text(b"<html>…")                 # "" and "" where a page has no text

A page is written by strangers, and reading it takes C libraries: so it is read like a command of the model, behind the
walls of `sandbox.py`, within `SECONDS` and `MEMORY`.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from typing import TYPE_CHECKING, Any

from moss.tools.sandbox import Sandbox

if TYPE_CHECKING:
    from moss.tools.fetch import Page

SECONDS = 2.0
MEMORY = 256 << 20  # bytes on top of what the libraries take
MAX_TITLE, MAX_TEXT = 300, 200_000  # characters

BOX = Sandbox("moss.tools.extract:read", packages=("trafilatura",), wall=SECONDS, memory=MEMORY, answer=1 << 20)

# what pages are written in; Python knows more, some of it slow to read or good for hiding markup
CHARSETS = frozenset(
    """utf-8 utf-16 utf-16-le utf-16-be ascii gb2312 gbk gb18030 big5 big5hkscs euc_jp shift_jis cp932 euc_kr cp949
    cp874 iso8859-1 iso8859-2 iso8859-5 iso8859-6 iso8859-7 iso8859-8 iso8859-9 iso8859-15 koi8-r koi8-u cp866 cp1250
    cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 cp1257 cp1258""".split()
)
_META = re.compile(rb"<meta\b[^>]{0,200}?\bcharset\s*=\s*[\"']?([\w.:-]{1,40})", re.IGNORECASE)


def main_text(content: bytes, charset: str = "") -> tuple[str, str]:
    """Title and text of a page; `charset` is what the server called it. `ToolError` where it takes too much."""
    if not content:
        return "", ""
    if not _known(charset) and (named := _META.search(content[:2048])):
        charset = named.group(1).decode("ascii", "replace")
    title, _, text = BOX.call(_known(charset), payload=content).partition("\n")
    return title, text


def text_of(page: Page) -> tuple[str, str]:
    """Title and main text of a fetched page."""
    if page.type == "text/plain":
        given = _decoded(page.content, _known(page.charset))
        text = given if isinstance(given, str) else given.decode("utf-8", "replace")
        return "", text.removeprefix("\ufeff")[:MAX_TEXT]
    return main_text(page.content, page.charset)


def _known(charset: str) -> str:
    """Python's name of a charset of pages, else ""."""
    try:
        name = codecs.lookup(charset).name
    except (LookupError, ValueError):
        return ""
    return name if name in CHARSETS else ""


# --------------------------------------------------------------------------------------------- behind the walls


def warm_up() -> None:
    """Import what the libraries import late: nothing can be imported once the walls stand."""
    page = "<html><head><title>石头</title></head><body><p>Eine Seite. 一页。</p></body></html>"
    for charset in CHARSETS:
        page.encode(charset, "ignore").decode(charset)
    read("", page.encode())
    read("", page.encode("gbk"))  # has the charset guessed


def read(charset: str, content: bytes) -> str:
    """The title in the first line, the text in the others."""
    import trafilatura

    given = _decoded(content, charset)
    if isinstance(given, str):
        given = " ".join(given.splitlines())  # where the source is wrapped; the lines of the result are paragraphs
    page: Any = trafilatura.bare_extraction(given, with_metadata=True, include_comments=False)
    title, text = (page.title or "", page.text or "") if page is not None else ("", "")
    return f"{' '.join(title.split())[:MAX_TITLE]}\n{text[:MAX_TEXT]}"


def _decoded(content: bytes, charset: str) -> str | bytes:
    """The page as text, or its bytes, of which trafilatura guesses the charset. Many name another than they have."""
    if not charset.startswith("utf-16"):
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode()
    return content.decode(charset, "replace") if charset else content
