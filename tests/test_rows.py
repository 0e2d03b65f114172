"""Reading documents, and rendering conversations in processes of their own: what the stages' tests do not reach."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from moss.chat import Dialog, Round, Turn
from moss.data import rows
from moss.data.rows import documents, of_dialogs
from moss.tokenizer import Tokenizer, train


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(["one two three", "一二三"], 300)


def greeting() -> Dialog:
    return Dialog("Be MOSS.", {}, [Turn("Hello", [Round()], "Hi")])


def die(dialogs: list[Dialog]) -> None:
    """What the system does to a process that takes too much memory."""
    os._exit(1)


def test_reading_text_and_json_lines(tmp_path: Path) -> None:
    """Prevents lost or joined documents: a line separator of Unicode ends no line, a blank file is no document."""
    (tmp_path / "a.txt").write_text("One.\n二。\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    lines = [{"text": "first\u2028still first"}, {"text": "第二"}]
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8"
    )
    paths = [tmp_path / name for name in ("a.txt", "empty.txt", "b.jsonl")]
    assert list(documents(paths)) == ["One.\n二。\n", "first\u2028still first", "第二"]


def test_a_killed_process_is_one_line(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback when the system takes a process for want of memory."""
    monkeypatch.setattr(rows, "_render_there", die)
    with pytest.raises(ValueError, match="was killed"):
        rows._render_apart(iter([[greeting()]]), tok, "assistant", 256, 1)


def test_ctrl_c_does_not_wait_for_all_rows(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents minutes of rendering after Ctrl-C while the file is still being read."""
    monkeypatch.setattr(rows, "CHUNK", 1)
    monkeypatch.setattr(rows, "ALONE", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    asked: list[bool] = []
    shutdown = rows.ProcessPoolExecutor.shutdown

    def seen(pool: object, wait: bool = True, *, cancel_futures: bool = False) -> None:
        asked.append(cancel_futures)
        shutdown(pool, wait, cancel_futures=cancel_futures)  # type: ignore[arg-type]

    monkeypatch.setattr(rows.ProcessPoolExecutor, "shutdown", seen)

    def interrupted() -> Iterator[Dialog]:
        yield from (greeting() for _ in range(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of_dialogs(interrupted(), tok, "assistant", 256)
    assert asked[0]
