"""`moss data index` as a user meets it: what it prints, how it exits, and that `Search` then finds the pages."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moss import __main__ as cli
from moss.data import index as command
from moss.tools import search
from moss.tools.index import Entry, Index

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of whoever runs the tests stays as it is."""
    monkeypatch.delenv("MOSS_INDEX", raising=False)
    monkeypatch.delenv("MOSS_SEARCH", raising=False)
    monkeypatch.setattr(search, "INDEX", str(tmp_path / "own index"))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "garden.md").write_text(
        "# Zorbling\nThe zorbling of moss takes three weeks.\n\n# 种苔\n苔藓要种在阴凉处。\n"
    )
    (folder / "more.jsonl").write_text('{"text": "The frobnicator stands in the cellar."}\n')
    return folder


def run(*words: Any, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What the command prints: on standard output, or where it fails on standard error, which is one line."""
    assert cli.main(["data", "index", *map(str, words)]) == code
    shown = capsys.readouterr()
    if code:
        assert shown.err.count("\n") == 1
        return shown.err
    return shown.out


def counts(*words: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, int, int, int]:
    told = json.loads(run(*words, "--json", capsys=capsys))
    assert told.keys() == {"index", "pages", "added", "kept", "removed", "left_out", "seconds"}
    return told["pages"], told["added"], told["kept"], told["removed"]


def test_pages_are_found_after_it(
    notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents an index that is made in one place and looked for in another."""
    shown = run(notes, capsys=capsys)
    assert f"{search.INDEX}: 3 pages; 3 added, 0 as they were, 0 removed, in " in shown
    assert search.search("how long does zorbling take?")[0].title == "Zorbling"
    (source,) = search.search("frobnicator")
    assert (source.text, source.url) == ("The frobnicator stands in the cellar.", f"{notes}/more.jsonl#1")
    assert search.search("苔藓种在哪里")[0].title == "种苔"


def test_a_second_run_takes_up_what_changed(notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Prevents pages that are doubled, or known by another name, when the same folder is named from elsewhere."""
    assert counts(notes, capsys=capsys) == (3, 3, 0, 0)
    monkeypatch.chdir(notes)
    assert counts(".", capsys=capsys) == (3, 0, 3, 0)
    monkeypatch.chdir(notes.parent)
    assert counts("./notes/", capsys=capsys) == (3, 0, 3, 0)
    (notes / "garden.md").write_text("# Zorbling\nIt takes four weeks.\n")
    (notes / "new.txt").write_text("A blorp is round.")
    assert counts("notes", capsys=capsys) == (3, 2, 1, 2)
    assert counts(notes / "more.jsonl", capsys=capsys) == (4, 1, 0, 0)  # a source of its own
    assert counts(notes / "more.jsonl", "--remove", capsys=capsys) == (3, 0, 0, 1)
    assert search.search("frobnicator")[0].title.startswith("The frobnicator")
    assert counts(notes, "--remove", capsys=capsys) == (0, 0, 0, 3)
    assert counts(notes, "--remove", capsys=capsys) == (0, 0, 0, 0)


def test_pages_of_a_folder_that_is_gone_can_be_removed(notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents pages that nobody can take out any more."""
    run(notes, capsys=capsys)
    for file in notes.iterdir():
        file.unlink()
    notes.rmdir()
    assert counts(notes, "--remove", capsys=capsys) == (0, 0, 0, 3)


def test_another_folder(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Prevents a user who has an index and does not know how to have it searched."""
    shown = run(notes, "--to", tmp_path / "big", capsys=capsys)
    assert shown.endswith(f"to search it: MOSS_INDEX={tmp_path / 'big'}\n")
    assert not Path(search.INDEX).exists()
    monkeypatch.setenv("MOSS_INDEX", str(tmp_path / "big"))
    assert search.search("frobnicator")
    assert "to search it" not in run(notes, "--to", tmp_path / "big", capsys=capsys)
    monkeypatch.setenv("MOSS_INDEX", "~/big")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert counts(notes, capsys=capsys) == (3, 0, 3, 0)


def test_what_cannot_be_read_is_one_line(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a trace, and an index that loses its pages over a typing error."""
    run(notes, capsys=capsys)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    assert "does not exist; name a folder or a file of pages" in run(tmp_path / "nowhere", capsys=capsys, code=2)
    assert "holds no file that ends in .md" in run(tmp_path / "empty", capsys=capsys, code=1)
    assert "a.pdf ends in none of .md" in run(tmp_path / "a.pdf", capsys=capsys, code=1)
    assert "is not empty and holds no index" in run(notes, "--to", notes, capsys=capsys, code=1)
    assert "holds no index; make one with" in run(notes, "--to", tmp_path / "none", "--remove", capsys=capsys, code=1)
    assert not (tmp_path / "none").exists()
    assert search.search("frobnicator")


def test_a_file_that_cannot_be_read_is_left_out(
    notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents one bad file of a folder from keeping all others out, and its pages of the last time from being lost;
    whoever runs the command is told which file and why, by the exit code too."""
    (notes / "page.html").write_text("<html><body><p>The wabe is wet and green.</p></body></html>")
    assert counts(notes, capsys=capsys) == (4, 4, 0, 0)
    (notes / "more.jsonl").write_text('{"text": "A blorp is round."}\n{"text": 5}\n{"text": "never read"}')
    (notes / "page.html").write_bytes(b"<p>The wabe.</p>" * (1 << 19))
    (notes / "new.txt").write_text("A snark is no boojum.")
    (notes / "garden.md").write_text("# Zorbling\nIt takes four weeks.\n")
    told = run(notes, capsys=capsys, code=1)
    assert told.startswith(f"2 files left out: {notes}/more.jsonl, line 2: a page is an object with a text; {notes}/pa")
    monkeypatch.setenv("MOSS_SEARCH", "index")
    for question in ("frobnicator", "blorp", "wabe", "snark", "weeks"):
        assert len(search.search(question)) == 1, question
    assert cli.main(["data", "index", str(notes), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert (shown["pages"], shown["added"], shown["kept"], shown["removed"]) == (5, 0, 5, 0)
    assert sorted(shown["left_out"]) == [f"{notes}/more.jsonl", f"{notes}/page.html"]
    for file in ("more.jsonl", "page.html"):
        (notes / file).unlink()
    assert counts(notes, capsys=capsys) == (2, 0, 2, 3)
    for number in range(9):
        (notes / f"{number}.md").write_bytes(b"\xff")
    assert run(notes, capsys=capsys, code=1).endswith("; and 4 more\n")


def test_nothing_is_left_of_a_run_that_read_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents pages from nowhere, and a search that fails, after a run in which no file could be read."""
    (tmp_path / "a.jsonl").write_text("{")
    assert run(tmp_path / "a.jsonl", capsys=capsys, code=1).startswith(f"1 file left out: {tmp_path}/a.jsonl, line 1: ")
    assert not list(Path(search.INDEX).glob("*.store"))
    assert search.search("Mount Everest")


def test_while_another_runs(notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents two runs at once from losing pages, or one from hanging."""
    run(notes, capsys=capsys)
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        begun.set()
        go_on.wait(30)
        yield Entry("a", "b", "c")

    other = threading.Thread(target=Index.open(Path(search.INDEX)).update, args=("slow", slow()))
    other.start()
    assert begun.wait(30)
    assert f"another process writes to {search.INDEX}; wait for its end" in run(notes, capsys=capsys, code=1)
    go_on.set()
    other.join()
    assert counts(notes, capsys=capsys) == (4, 0, 3, 0)


def test_without_its_packages(notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an ImportError where a line would tell what to install."""
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    shown = run(notes, capsys=capsys, code=1)
    assert "tantivy and trafilatura not installed: pip install -e '.[search]'" in shown


def test_many_pages_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents minutes without a word."""
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    assert list(command.counted(range(20))) == list(range(20))
    assert "pages read" in capsys.readouterr().err


def test_stopped_and_begun_again(tmp_path: Path) -> None:
    """Prevents an index that Ctrl-C leaves locked or broken: it exits as every command, the next run goes on."""
    with (tmp_path / "many.jsonl").open("w") as file:
        for number in range(60_000):
            file.write(json.dumps({"text": f"page {number} of the story " * 5}) + "\n")
    words = [sys.executable, "-m", "moss", "data", "index", str(tmp_path / "many.jsonl"), "--to", str(tmp_path / "to")]
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "to").glob("*.store")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(2)
    _, shown = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in shown
    with (tmp_path / "many.jsonl").open("r+") as file:
        file.truncate(sum(len(file.readline()) for _ in range(5000)))
    done = subprocess.run([*words, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)
    assert told["pages"] == told["added"] + told["kept"] == 5000
