"""Pages of files for the index: where one ends and the next begins, and which file is at fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moss.tools.entries import MAX_FILE, markdown_pages, paragraphs, read_source
from moss.tools.index import Entry

LONG = "This line is long enough to be one that somebody wrapped, and"


def pages(text: str) -> list[tuple[str, str, str]]:
    return [(entry.title, entry.text, entry.keywords) for entry in markdown_pages(text, "notes.md", "notes")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# One\nText.\n# Two #\n@ keys; more\n\nOther.", [("One", "Text.", ""), ("Two", "Other.", "keys; more")]),
        ("Before.\n\n# One\nText.", [("notes", "Before.", ""), ("One", "Text.", "")]),
        ("No heading at all.", [("notes", "No heading at all.", "")]),
        ("# One\n\n## Part\nText.\n\n## Other\nMore.", [("One", "## Part\nText.\n## Other\nMore.", "")]),
        (
            "# Code\n```sh\n# a comment\nls\n```\n# Next\nText.",
            [("Code", "```sh\n# a comment\nls\n```", ""), ("Next", "Text.", "")],
        ),
        (
            "# Code\n~~~\n```\n# a comment\n~~~\n# Next\nText.",
            [("Code", "~~~\n```\n# a comment\n~~~", ""), ("Next", "Text.", "")],
        ),
        ("---\ntitle: x\n---\n# One\nText.", [("One", "Text.", "")]),
        ("# Empty\n\n# One\nText.\n#hash is no heading", [("One", "Text.\n#hash is no heading", "")]),
        ("@ no keywords without a heading", [("notes", "@ no keywords without a heading", "")]),
        ("# 苔藓\n@ Moss; plant\n苔藓很小。", [("苔藓", "苔藓很小。", "Moss; plant")]),
        ("", []),
        ("# Only a heading", []),
        ("# Only keywords\n@ a b", []),
    ],
)
def test_markdown(text: str, expected: list[tuple[str, str, str]]) -> None:
    """Prevents pages that begin at a comment in code, hold their own keywords, or are lost before the first heading."""
    assert pages(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{LONG}\ngoes on here.\n\nNext.", f"{LONG} goes on here.\nNext."),
        (f"{LONG}\n1971. Then it ends.", f"{LONG} 1971. Then it ends."),
        (
            "苔藓是一种矮小的植物，它长在潮湿阴凉的地方，\n没有真正的根。",
            "苔藓是一种矮小的植物，它长在潮湿阴凉的地方，没有真正的根。",
        ),
        ("苔藓是一种矮小的植物，它长在潮湿阴凉的地方，\nmoss", "苔藓是一种矮小的植物，它长在潮湿阴凉的地方， moss"),
        ("床前明月光，\n疑是地上霜。", "床前明月光，\n疑是地上霜。"),
        ("Shall I compare thee\nto a summer's day?", "Shall I compare thee\nto a summer's day?"),
        (f"- {LONG}\n  goes on\n- second", f"- {LONG} goes on\n- second"),
        (f"1. {LONG}\n2. {LONG}\n3. third", f"1. {LONG}\n2. {LONG}\n3. third"),
        (f"| {LONG} | b |\n| c | d |", f"| {LONG} | b |\n| c | d |"),
        (f"## {LONG}\nText.", f"## {LONG}\nText."),
        ("\n\n \n", ""),
    ],
)
def test_paragraphs(text: str, expected: str) -> None:
    """Prevents sentences that are cut where an editor wrapped them, blanks in Chinese, and lists and verses in one."""
    assert paragraphs(text) == expected


def test_a_long_paragraph_is_read_at_once() -> None:
    """Prevents time that grows with the square of a file."""
    assert len(paragraphs((LONG + "\n") * 100_000)) == (len(LONG) + 1) * 100_000 - 1


def test_files_of_a_folder(tmp_path: Path) -> None:
    """Prevents files that are left out, read twice, or in another order each time."""
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "one.MD").write_text("# One\r\nText of\r\none.\r\n", encoding="utf-8", newline="")
    (tmp_path / "a.txt").write_bytes("\ufeff苔藓很小。".encode())
    (tmp_path / "c.jsonl").write_text(
        '\ufeff{"text": "row"}\n\n{"text": "b", "title": "T", "url": "u", "keywords": ["x", 1]}\n'
    )
    (tmp_path / "d.html").write_text(
        "<html><head><title>Page</title></head><body><p>Moss is a small plant.</p></body></html>"
    )
    (tmp_path / "e.html").write_text("")
    (tmp_path / "f.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    for hidden in (".git/x.md", ".venv/lib/y.txt", ".hidden.md"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_text("# no")
    root = tmp_path.as_posix()
    assert list(read_source(tmp_path)) == [
        Entry("a", "苔藓很小。", f"{root}/a.txt"),
        Entry("One", "Text of\none.", f"{root}/b/deep/one.MD#One"),
        Entry("row", "row", f"{root}/c.jsonl#1"),
        Entry("T", "b", "u", "x 1"),
        Entry("Page", "Moss is a small plant.", f"{root}/d.html"),
    ]
    (tmp_path / ".venv" / "own.md").write_text("# Asked for\nText.")
    assert [entry.title for entry in read_source(tmp_path / ".venv" / "own.md")] == ["Asked for"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2: "),
        ("a.jsonl", b'{"text": "a"}\n\n[1]', "a.jsonl, line 3: a page is an object with a text"),
        ("a.jsonl", b'{"title": "a"}', "a.jsonl, line 1: a page is an object with a text"),
        ("a.jsonl", b'{"text": " "}', "a.jsonl, line 1: a page is an object with a text"),
        ("a.jsonl", b'{"text": "a", "url": 5}', "a.jsonl, line 1: url is no text"),
        ("a.jsonl", b'{"text": "a", "title": ["x"]}', "a.jsonl, line 1: title is no text"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: "),
        ("a.jsonl", b"\xff\xff\xff", "a.jsonl, line 1: "),
        ("a.md", b"caf\xe9 au lait", "a.md is not text in UTF-8: invalid continuation byte at byte 3"),
        ("a.pdf", b"%PDF", "a.pdf ends in none of .md, .txt, .html, .htm, .jsonl"),
    ],
)
def test_what_is_no_page_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    """Prevents a page that is skipped in silence, and an hour's search for the line at fault."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(read_source(tmp_path / name))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_chinese_of_older_programs(tmp_path: Path) -> None:
    """Prevents notes that an editor of Windows wrote from being no text."""
    (tmp_path / "a.txt").write_bytes("苔藓很小。".encode("gbk"))
    (tmp_path / "b.md").write_bytes("# 苔藓\n它长在阴凉处，叫作𬞟。".encode("gb18030"))
    assert [entry.text for entry in read_source(tmp_path)] == ["苔藓很小。", "它长在阴凉处，叫作𬞟。"]


def test_bad_files_are_left_out(tmp_path: Path) -> None:
    """Prevents one file from ending it all where the caller wants the others; each page says where it is from."""
    for name, content in {"a.md": b"\xff", "b.txt": b"moss", "c.jsonl": b'{"text": "a"}\n{', "d.html": b""}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "e.md").write_text("# One\nText.\n# Two\nText.")
    left_out: dict[str, str] = {}
    root = tmp_path.as_posix()
    assert [(entry.title, entry.file) for entry in read_source(tmp_path, left_out)] == [
        ("b", f"{root}/b.txt"),
        ("a", f"{root}/c.jsonl"),
        ("One", f"{root}/e.md"),
        ("Two", f"{root}/e.md"),
    ]
    assert [*left_out] == [f"{root}/a.md", f"{root}/c.jsonl"]
    assert left_out[f"{root}/c.jsonl"].startswith(f"{root}/c.jsonl, line 2: ")


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    """Prevents an index that is emptied because the wrong folder was named."""
    with pytest.raises(ValueError, match=r"holds no file that ends in \.md, \.txt"):
        list(read_source(tmp_path))
    with pytest.raises(FileNotFoundError):
        list(read_source(tmp_path / "none.md"))
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(ValueError, match=r"big\.txt is larger than 64 MB"):
        list(read_source(tmp_path / "big.txt"))


def test_rows_are_read_as_they_come(tmp_path: Path) -> None:
    """Prevents a file of a million pages from being held whole."""
    rows = [{"text": f"row {n}\nline", "title": "", "url": None} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{")
    entries = read_source(tmp_path / "a.jsonl")
    assert next(entries) == Entry("row 0 line", "row 0\nline", f"{tmp_path.as_posix()}/a.jsonl#1")
    assert [next(entries).title, next(entries).title] == ["row 1 line", "row 2 line"]
