"""The main text of a page: in whatever letters it is written, and whatever it does to be read."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from moss.tools.base import ToolError
from moss.tools.extract import BOX, MAX_TEXT, MAX_TITLE, SECONDS, main_text, text_of
from moss.tools.fetch import Page

TEXT = "春天到了，院子里的花都开了。" * 12
ENGLISH = "<p>Moss is a small plant that grows in damp and shady places.</p>" * 3


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    """The process is there, so that times are those of a page."""
    main_text(b"<p>a</p>")


def html(text: str, head: str = "") -> str:
    menu = "<nav><a href='/login'>登录</a></nav>"
    return f"<html><head><title>花园</title>{head}</head><body>{menu}<article><p>{text}</p></article></body></html>"


@pytest.mark.parametrize("charset", ["utf-8", "gbk", "gb2312", "gb18030", "utf-16"])
@pytest.mark.parametrize("told", ["header", "meta", "http-equiv", "nobody"])
def test_charsets(charset: str, told: str) -> None:
    """Prevents Chinese pages that are noise: a charset cannot be loaded any more once the walls stand."""
    head = {
        "meta": f'<META charset="{charset}">',
        "http-equiv": f"<meta http-equiv=Content-Type content='text/html; charset={charset}'>",
    }
    content = html(TEXT, head.get(told, "")).encode(charset)
    assert main_text(content, charset if told == "header" else "") == ("花园", TEXT)


@pytest.mark.parametrize("charset", ["big5", "Shift_JIS", "EUC-JP", "euc-kr", "windows-1252", "ISO-8859-1", "koi8-r"])
def test_other_charsets(charset: str) -> None:
    """Prevents the same for whom it does not strike at once."""
    said = {
        "euc-kr": "봄이 왔습니다. ",
        "koi8-r": "Весна пришла в сад. ",
        "big5": "春天到了，花園很美。",
        "Shift_JIS": "春が来た。",
        "EUC-JP": "春が来た。",
    }.get(charset, "Été à la plage, ça va bien. ") * 30
    page = html(said).replace("花园", "").replace("登录", "").encode(charset)
    assert main_text(page, charset)[1] == said.strip()


@pytest.mark.parametrize("charset", ["gbk", "nonsense", "utf-7", "punycode", "idna", "undefined", "hex", "é", "x" * 40])
def test_a_charset_that_is_not_the_pages(charset: str) -> None:
    """Prevents noise where the server is wrong (many are), and codecs that are slow, raise, or hide markup."""
    assert main_text(html(TEXT).encode(), charset) == ("花园", TEXT)
    assert text_of(Page("http://a/", TEXT.encode(), "text/plain", charset)) == ("", TEXT)


def test_a_broken_letter_breaks_nothing_else() -> None:
    """Prevents a page that is read as another charset because one letter was cut in two."""
    title, text = main_text(html(TEXT).encode() + b"\xe6\x98", "utf-8")
    assert (title, text) == ("花园", TEXT)
    assert text_of(Page("http://a/", b"\xef\xbb\xbfa\xff", "text/plain", "utf-8")) == ("", "a\ufffd")


def test_no_character_that_steers() -> None:
    """Prevents a page with a control character, or half a character, from being lost, or from reaching a terminal."""
    head = "<html><head><title>a\x85b\n\tc\x1b]0;</title></head>"
    title, text = main_text(f"{head}<body><p>one\x1b[31m two\x9b3 &#xd83d; end of it</p>{ENGLISH}".encode())
    assert title == "a b c]0;"
    assert text.startswith("one[31m two3 \ufffd end of it\nMoss is")
    assert all(each == "\n" or each.isprintable() for each in title + text)


def test_a_line_is_a_paragraph() -> None:
    """Prevents sentences that are cut where the source of a page is wrapped."""
    wrapped = "<p>Moss is a small\nplant that grows\r\n   in damp places.</p><p>It has\nno roots at all.</p>"
    text = main_text(f"<html><body><article>{wrapped}</article></body></html>".encode())[1]
    lines = [" ".join(line.split()) for line in text.split("\n")]
    assert lines == ["Moss is a small plant that grows in damp places.", "It has no roots at all."]


def test_there_is_an_end() -> None:
    """Prevents an answer larger than may come back, which would lose the page; and an empty page from failing."""
    rng = random.Random(0)
    long = "".join(f"<p>{''.join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(500))}。</p>" for _ in range(1000))
    title, text = main_text(f"<html><head><title>{'题' * 5000}</title></head><body>{long}</body></html>".encode())
    assert (len(title), len(text)) == (MAX_TITLE, MAX_TEXT)
    assert len(text_of(Page("http://a/", b"a" * 1_000_000, "text/plain", ""))[1]) == MAX_TEXT
    assert main_text(b"") == main_text(b" ") == main_text(b"<html></html>") == ("", "")


BIG = 4 << 20


@pytest.mark.parametrize(
    "content",
    [
        b"<div>" * 200_000 + b"hello",
        b"<b><i>" * 100_000 + b"hello",
        b"<ul><li>" * 200_000,
        b"<table><tr><td>" * 100_000,
        b"<table>" + b"<tr><td>x</td></tr>" * 150_000,
        b"<" * BIG,
        b"<a " * (BIG // 3),
        b"&" * BIG,
        b"<!--" * (BIG // 4),
        b"<p " + b"a=b " * (BIG // 4 - 10) + b">x",
        b"<p>x</p>" * (BIG // 8),
        b"<p>" + b"a" * (BIG - 10),
        "".join(["<p>", "中" * (BIG // 3 - 10)]).encode(),
        b"\x00" * BIG,
        random.Random(0).randbytes(BIG),
        b"+ADw-script+AD4-alert(1)+ADw-/script+AD4-" * 1000,
        b'<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;">]><html><p>&c;&c;</p></html>',
        b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><html><p>root: &b;</p></html>',
    ],
    ids="""nested inline lists tables rows signs tags ampersands comments attributes paragraphs word chinese zeros noise
    utf-7 entities file""".split(),
)
def test_hostile_pages_end(content: bytes) -> None:
    """Prevents a page that hangs, kills or fills the server that reads it (test 36 of the security list)."""
    begun, process = time.monotonic(), BOX.pid
    try:
        text = main_text(content, "utf-8")[1]
        assert "root:x" not in text and "<script>" not in text
    except ToolError as error:
        assert "\n" not in str(error)
    assert time.monotonic() - begun < SECONDS + 1.0
    assert main_text(html(TEXT).encode()) == ("花园", TEXT)
    assert BOX.pid == process


def test_it_reads_nothing_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents keys in the environment from being where a stranger's page is read."""
    environment = Path(f"/proc/{BOX.pid}/environ")
    if not environment.exists():
        pytest.skip("reads the environment of a process from /proc")
    monkeypatch.setenv("BRAVE_API_KEY", "geheim")
    BOX.close()
    main_text(b"<p>a</p>")
    assert b"geheim" not in Path(f"/proc/{BOX.pid}/environ").read_bytes()
