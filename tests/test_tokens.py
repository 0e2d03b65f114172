"""Token shards: what stands in them, that nothing is lost when writing is killed, and that damage is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss.data import tokens as module
from moss.data.dialogs import to_row
from moss.data.tokens import INDEX, Task, Tokens, prepare
from moss.tokenizer import Tokenizer, load, train
from tests.test_tokenizer import TEXTS, write_released
from tests.test_train_stages import dialog

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(TEXTS, 500)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def all_documents(tokens: Tokens) -> list[list[int]]:
    """The ids of each document, as they stand between the borders."""
    found = []
    for number in range(len(tokens.shards)):
        ids, starts = tokens.ids(number), tokens.starts(number)
        found += [ids[a:b].tolist() for a, b in pairwise(starts)]
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def test_what_stands_on_disk(tok: Tokenizer, tmp_path: Path) -> None:
    """Borders, counts or bytes that are off by one: here worked out by hand."""
    texts = ["Hi 你好", "  ", "two\nlines"]  # the blank one is no document
    tokens = prepare([write_lines(tmp_path / "a.jsonl", texts)], tok, tmp_path / "tokens")
    one, two = tok.encode(texts[0]), tok.encode(texts[2])
    ids = np.fromfile(tmp_path / "tokens/00000-00000.bin", dtype="<u2")
    assert ids.tolist() == [tok.eos, *one, tok.eos, *two, tok.eos]
    starts = np.fromfile(tmp_path / "tokens/00000-00000.starts", dtype="<i8")
    assert starts.tolist() == [1, 2 + len(one), 3 + len(one) + len(two)]
    assert (tokens.num_documents, tokens.num_tokens) == (2, len(one) + len(two) + 2)
    assert tokens.text_bytes == 3 + 6 + 9
    index = json.loads((tmp_path / "tokens" / INDEX).read_text())
    assert index["sources"][0]["bytes"] == (tmp_path / "a.jsonl").stat().st_size and index["eos"] == tok.eos
    assert all_documents(tokens) == [[*one, tok.eos], [*two, tok.eos]]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    """An id of 65,536 or more that is cut to its last 16 bits becomes another token."""
    write_released(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<eoh>": 70_000}))
    big = load(tmp_path)
    tokens = prepare([write_lines(tmp_path / "a.jsonl", ["a b"])], big, tmp_path / "tokens")
    assert tokens.dtype == "<u4" and all_documents(tokens) == [[*big.encode("a b"), big.eos]]


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.sampled_from(["", " ", "a", "b" * 30, "文字" * 9]), max_size=12),
    size=st.integers(1, 90),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_each_line_is_in_one_part(lines: list[str], size: int, end: str, last: bool, tmp_path_factory) -> None:
    """A line that two parts read, or none, where a border falls on it, before it or behind it."""
    path = tmp_path_factory.mktemp("parts") / "a.jsonl"
    rows = [json.dumps({"text": line, "n": number}, ensure_ascii=False) for number, line in enumerate(lines)]
    path.write_bytes((end.join(rows) + (end if last else "")).encode())
    total = path.stat().st_size
    tasks = [Task(path, "", False, at, min(at + size, total), path) for at in range(0, total, size)]
    read = [row["n"] for task in tasks for _, row in module._lines(task)]
    assert read == list(range(len(lines)))


def test_cutting_a_long_document_changes_no_token(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A book is encoded in pieces to spare memory; a piece must not end where a word does not."""
    monkeypatch.setattr(module, "PIECE", 40)
    monkeypatch.setattr(module, "CHUNK", 200)
    code = Path(json.__file__).read_text(encoding="utf-8")
    released = "\n\n".join(TEXTS) + "  \n \n\t\nend  \n"
    for text in (code, released, "no line end at all " * 30):
        pieces = [piece for chunk in module._chunks([("here", text)]) for piece in chunk]
        assert "".join(piece.text for piece in pieces) == text and [p.last for p in pieces].count(True) == 1
        assert [i for piece in pieces for i in tok.encode(piece.text)] == tok.encode(text)
    assert len(pieces) == 1


def test_all_kinds_of_files(tok: Tokenizer, tmp_path: Path) -> None:
    """A format that is read elsewhere but not here, or a byte order mark that becomes a token."""
    files = {
        "a.txt": b"\xef\xbb\xbfone file",
        "b.json": json.dumps([{"text": "in an array"}, {"text": "second"}]).encode(),
        "c.jsonl": b'\xef\xbb\xbf{"text": "a line"}\n',
        "d.jsonl": (json.dumps(to_row(dialog(1), "openai")) + "\n").encode(),
        "e.jsonl": (json.dumps(to_row(dialog(1), "sharegpt")) + "\n").encode(),
        "f.jsonl": (json.dumps(to_row(dialog(1), "moss")) + "\n").encode(),
    }
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    said = "What is 1+1?\nIt is 2.\n"
    want = ["one file", "in an array", "second", "a line", said, said, said]
    tokens = prepare([tmp_path / name for name in files], tok, tmp_path / "tokens")
    assert [tok.decode(ids) for ids in all_documents(tokens)] == want


# ---------------------------------------------------------------- killed, stopped, started again

SCRIPT = """
import sys
from pathlib import Path
from moss.data import tokens
from moss.tokenizer import load

if __name__ == "__main__":
    tokens.PART = (4000, 4000)
    tokens.prepare([Path(name) for name in sys.argv[3:]], load(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def work(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, two sources and the shards that an unbroken run, alone in its process, makes of them."""
    folder = tmp_path_factory.mktemp("work")
    tok.save(folder / "tok")
    (folder / "script.py").write_text(SCRIPT)
    write_lines(folder / "a.jsonl", [f"{text} {number}" for number in range(300) for text in TEXTS])
    (folder / "b.txt").write_text("\n".join(TEXTS) * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART", (4000, 4000))
        patch.setattr("os.cpu_count", lambda: 1)
        prepare([folder / "a.jsonl", folder / "b.txt"], tok, folder / "whole")
    return folder


def command(work: Path, into: Path) -> list[str]:
    return [
        sys.executable,
        str(work / "script.py"),
        str(work / "tok"),
        str(into),
        *map(str, (work / "a.jsonl", work / "b.txt")),
    ]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def children(process: int) -> list[int]:
    """The processes that a process has started (Linux)."""
    file = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in file.read_text().split()] if file.exists() else []


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def shards(folder: Path) -> int:
    return len(list(folder.glob("*.starts")))


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_bytes(work: Path, tmp_path: Path) -> None:
    """Work of hours lost to a power cut, half a shard taken for a whole one, or workers that live on as orphans and
    write beside the next run."""
    into = tmp_path / "tokens"
    for goal in (1, 20, 60, 61):
        with subprocess.Popen(command(work, into), env=environment(), stderr=subprocess.DEVNULL) as child:
            until = time.monotonic() + 60
            while time.monotonic() < until and child.poll() is None and shards(into) < goal:
                time.sleep(0.002)
            workers = children(child.pid)
            child.kill()
        assert shards(into) >= goal and not (into / INDEX).exists()
        until = time.monotonic() + 10
        while any(map(alive, workers)) and time.monotonic() < until:
            time.sleep(0.02)
        assert not any(map(alive, workers))
    made = {file.name: file.stat().st_mtime_ns for file in into.glob("*.bin")}
    assert (
        subprocess.run(command(work, into), env=environment(), stderr=subprocess.DEVNULL, timeout=120).returncode == 0
    )
    assert content(into) == content(work / "whole")
    kept = [name for name, when in made.items() if (into / name).stat().st_mtime_ns == when]
    assert len(kept) >= 60  # what was finished was not done again


def test_ctrl_c_stops_at_once(work: Path, tmp_path: Path) -> None:
    """A stop that waits until all is tokenised, or leaves processes behind."""
    into = tmp_path / "tokens"
    with subprocess.Popen(command(work, into), env=environment(), stderr=subprocess.PIPE, text=True) as child:
        until = time.monotonic() + 60
        while time.monotonic() < until and child.poll() is None and shards(into) < 1:
            time.sleep(0.002)
        workers = children(child.pid)
        child.send_signal(signal.SIGINT)
        child.wait(timeout=20)
    assert not (into / INDEX).exists() and not list(into.glob(".*.tmp"))
    until = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(alive, workers))


def test_two_at_once(tok: Tokenizer, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that start together: one writes, the others wait and then read, nobody does it twice."""
    monkeypatch.setattr(module, "PART", (4000, 4000))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    sources, into, found = [work / "a.jsonl", work / "b.txt"], tmp_path / "tokens", list[Tokens]()
    runs = [threading.Thread(target=lambda: found.append(prepare(sources, tok, into))) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(found) == 3 and content(into) == content(work / "whole")
    assert len({tokens.sha256() for tokens in found}) == 1


@pytest.mark.slow
def test_a_killed_worker_is_one_line(
    tok: Tokenizer, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that the system kills for memory must not end in a traceback or a wait without end."""
    monkeypatch.setattr(module, "PART", (4000, 4000))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(module, "_there", killed)
    with pytest.raises(ValueError, match="was killed, perhaps for want of memory"):
        prepare([work / "a.jsonl"], tok, tmp_path / "tokens")


def killed(task: Task) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- what does not fit, what is broken


def test_other_sources_and_tokenizers_are_refused(tok: Tokenizer, tmp_path: Path) -> None:
    """Tokens of yesterday's text, or of another vocabulary, that a run takes for its own."""
    source = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    tokens = prepare([source], tok, tmp_path / "tokens")
    moved = source.rename(tmp_path / "moved.jsonl")
    os.utime(moved, (1, 1))
    assert prepare([moved], tok, tmp_path / "tokens").sha256() == tokens.sha256()  # the same text, elsewhere
    with pytest.raises(ValueError, match="holds the tokens of another tokenizer"):
        prepare([moved], train(TEXTS[:1], 400), tmp_path / "tokens")
    second = write_lines(tmp_path / "b.jsonl", ["three"])
    with pytest.raises(ValueError, match="from 1 files, now there are 2"):
        prepare([moved, second], tok, tmp_path / "tokens")
    write_lines(moved, ["one", "too"])
    with pytest.raises(ValueError, match=r"moved\.jsonl: the data has changed since .* was made from a\.jsonl"):
        prepare([moved], tok, tmp_path / "tokens")


def test_an_unfinished_folder_keeps_what_still_fits(tok: Tokenizer, work: Path, tmp_path: Path, monkeypatch) -> None:
    """A broken line that is mended: only the parts of that file are done again, and none of the old ones stays."""
    monkeypatch.setattr(module, "PART", (4000, 4000))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    into, bad = tmp_path / "tokens", tmp_path / "c.jsonl"
    bad.write_text('{"text": "fine"}\n' * 1000 + '{"txt": "not"}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl line 1001 has no `text`; its keys are txt"):
        prepare([work / "a.jsonl", bad], tok, into)
    made = {file.name: file.stat().st_mtime_ns for file in into.glob("*.bin")}
    assert len(made) > 60 and not (into / INDEX).exists()
    bad.write_text('{"text": "fine"}\n')
    tokens = prepare([work / "a.jsonl", bad], tok, into)
    assert len(tokens.sources) == 2 and [name for name in tokens.names if name.startswith("00001")] == ["00001-00000"]
    assert all((into / name).stat().st_mtime_ns == when for name, when in made.items() if name.startswith("00000"))
    assert {file.stem for file in into.glob("*-*.*")} == set(tokens.names)


def test_damage_is_named_and_mended(tok: Tokenizer, tmp_path: Path) -> None:
    """A bit that a disk has lost, or a copy that broke off, trains a model on noise."""
    source = write_lines(tmp_path / "a.jsonl", ["one two three", "four"])
    into = tmp_path / "tokens"
    prepare([source], tok, into)
    whole = content(into)
    for name, raw, said in (
        ("00000-00000.bin", whole["00000-00000.bin"][:-2], r"00000-00000\.bin has \d+ bytes instead of \d+"),
        ("00000-00000.bin", None, r"00000-00000\.bin has 0 bytes instead of"),
        ("00000-00000.starts", whole["00000-00000.starts"][:-8], r"00000-00000\.starts has 16 bytes instead of 24"),
        ("00000-00000.bin", b"\xff" + whole["00000-00000.bin"][1:], r"00000-00000\.bin is damaged"),
        ("00000-00000.starts", b"\xff" + whole["00000-00000.starts"][1:], r"00000-00000\.starts is damaged"),
        (INDEX, b"{", "index.json is broken"),
        (INDEX, b"{}", "index.json is not of format 1"),
    ):
        (into / name).unlink() if raw is None else (into / name).write_bytes(raw)
        with pytest.raises(ValueError, match=said):
            all_documents(Tokens.open(into, tok))
        (into / INDEX).unlink()  # as the message says
        prepare([source], tok, into)
        assert content(into) == whole


BAD = [
    ("a.jsonl", b"\n \n", "there is no text in .*a.jsonl"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', "a.jsonl line 3 is not JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl line 2 is not JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', r"a.jsonl line 2: text holds the lone surrogate U\+D83D"),
    ("a.jsonl", b"[1]\n", "a.jsonl line 1 is not a JSON object"),
    ("a.jsonl", b'{"text": 3}\n', "a.jsonl line 1 has no `text`"),
    ("a.jsonl", b'{"messages": 3}\n', "a.jsonl line 1: "),
    ("a.json", b'[{"text": "a"}, {"words": 1}]', "a.json: row 2 has no `text`; its keys are words"),
    ("a.txt", b"caf\xe9", "a.txt is not UTF-8 text: byte 3 cannot be read"),
    ("a.txt", b" \n", "there is no text"),
]


@pytest.mark.parametrize(("name", "raw", "said"), BAD)
def test_broken_sources_are_named_and_leave_nothing(
    name: str, raw: bytes, said: str, tok: Tokenizer, tmp_path: Path
) -> None:
    """A line among millions that cannot be read: which one? And a folder that then looks as if it were done."""
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=said) as error:
        prepare([tmp_path / name], tok, tmp_path / "deep" / "tokens")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "deep").exists()


def test_a_folder_that_cannot_be_written(tok: Tokenizer, tmp_path: Path) -> None:
    """A traceback where a line would do."""
    source = write_lines(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write in"):
        prepare([source], tok, tmp_path / "file" / "tokens")
