"""The main text of a page of HTML, without menus, banners and footers (trafilatura), in a process that can do no harm.

    title, text = main_text(b"<html>…")                 # "" and "" where a page has no text

A page is written by strangers, and reading it takes C libraries: so it is read like a command of the model, behind the
walls of `sandbox.py`, within `SECONDS` and `MEMORY`.
"""

from __future__ import annotations

import codecs
import json
from typing import Any

from moss.tools.fetch import Page
from moss.tools.sandbox import Sandbox

SECONDS = 2.0
MEMORY = 256 << 20  # bytes on top of what the libraries take
MAX_TEXT = 200_000  # characters
CHARSETS = "gb18030 gbk gb2312 big5 shift_jis euc-jp euc-kr iso-8859-1 iso-8859-15 cp1251 cp1252 koi8-r utf-16".split()

BOX = Sandbox("moss.tools.extract:read", packages=("trafilatura",), wall=SECONDS, memory=MEMORY, answer=1 << 20)


def main_text(content: bytes, charset: str = "") -> tuple[str, str]:
    """Title and text of a page; `charset` is what the server called it. `ToolError` where it takes too much."""
    title, text = json.loads(BOX.call(charset, payload=content))
    return title, text


def warm_up() -> None:
    """Import what the libraries import late: nothing can be imported once the walls stand."""
    for charset in CHARSETS:
        codecs.lookup(charset)
    read("", "<html><head><title>石头</title></head><body><p>Eine Seite. 一页。</p></body></html>".encode())


def read(charset: str, content: bytes) -> str:
    """Title and text as JSON; runs in the sandbox."""
    import trafilatura

    page: Any = trafilatura.bare_extraction(_decoded(content, charset), with_metadata=True, include_comments=False)
    title, text = (page.title or "", page.text or "") if page is not None else ("", "")
    return json.dumps([title[:300], text[:MAX_TEXT]])


def _decoded(content: bytes, charset: str) -> str | bytes:
    """The page as text where its charset is known or plain to see; else its bytes, which trafilatura guesses at."""
    for name in (charset, "utf-8", "gb18030"):
        try:
            text = content.decode(name) if name else ""
        except (LookupError, UnicodeDecodeError):
            continue
        if (name in (charset, "utf-8") and text) or sum("\u4e00" <= each <= "\u9fff" for each in text[:20_000]) > 10:
            return text
    return content


def text_of(page: Page) -> tuple[str, str]:
    """Title and main text of a fetched page."""
    if page.type == "text/plain":
        return "", page.content.decode(_known(page.charset) or "utf-8", "replace")[:MAX_TEXT]
    return main_text(page.content, _known(page.charset))


def _known(charset: str) -> str:
    """The name of a charset that Python reads as text, else ""."""
    try:
        info = codecs.lookup(charset)
    except LookupError:
        return ""
    return info.name if info._is_text_encoding and info.name != "utf-7" else ""  # UTF-7 hides markup
