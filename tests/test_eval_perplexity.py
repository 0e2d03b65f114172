"""Bits per byte: every token once, after what stands before it, over the bytes of the text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from moss import resolve
from moss.errors import UsageError
from moss.evals import base, perplexity
from moss.evals.perplexity import PIECE, Perplexity, cut, files, pieces
from tests.test_eval_choice import toys  # noqa: F401 (a fixture)


def told(config: Perplexity, capsys: pytest.CaptureFixture) -> dict:
    assert perplexity.main(config) == 0
    return json.loads(capsys.readouterr().out)


def test_bits_by_hand(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    """Prevents bits of another base, a first token that is forgotten, and characters that pass for bytes."""
    text = "What is the 天空?\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = told(Perplexity(str(toys / "base"), data=[tmp_path / "a.txt"], out=tmp_path / "out", json=True), capsys)
    model, tok = resolve.load(toys / "base", chat=False)
    ids = [tok.eos, *tok.encode(text)]
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0].double(), dim=-1)
    bits = -float(logs[range(len(ids) - 1), ids[1:]].sum()) / math.log(2)
    (figure,) = found["figures"].values()
    assert figure["value"] == pytest.approx(bits / len(text.encode()), rel=1e-5) and figure["n"] == 1


def test_long_texts_are_read_in_windows(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    """Prevents tokens that are counted twice or never where a text is longer than the model reads, pieces without
    what stands before them, and windows longer than asked for."""
    text = "".join(f"What is {number} of the {number * 7}?\n" for number in range(400))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    config = Perplexity(str(toys / "base"), data=[tmp_path / "a.txt"], out=tmp_path / "out", length=64, json=True)
    rows = list(base.read_rows(Path(told(config, capsys)["rows"])).values())
    model, tok = resolve.load(toys / "base", chat=False)
    assert len(rows) == len(cut(text)) > 3 and sum(row["bytes"] for row in rows) == len(text.encode())
    assert tok.decode([id for row in rows for id in row["answer"]]) == text
    assert rows[0]["prompt"] == [tok.eos] and rows[1]["prompt"] == rows[0]["answer"][-32:]
    ids, bits = rows[1]["prompt"] + rows[1]["answer"], 0.0
    for at in range(32, len(ids), 32):
        window = torch.tensor([ids[at - 32 : at + 32]])
        with torch.no_grad():
            logs = torch.log_softmax(model(window)[0].double(), dim=-1)
        bits -= sum(float(logs[i - 1, window[0, i]]) for i in range(32, window.shape[1])) / math.log(2)
    assert rows[1]["bits"] == pytest.approx(bits, rel=1e-5)


def test_languages_and_code_are_apart(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    """Prevents one figure for all, and a mean in which a short text counts as much as a long one."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/en.txt").write_text("What is the of and 1?\n" * 50)
    (tmp_path / "d/zh.jsonl").write_text(json.dumps({"text": "天空是蓝的，水也是蓝的。"}, ensure_ascii=False) + "\n")
    (tmp_path / "d/code.py").write_text("def f():\n    return 1\n")
    (tmp_path / "d/x.bin").write_bytes(b"\xff\xfe")
    found = told(Perplexity(str(toys / "a"), data=[tmp_path / "d"], out=tmp_path / "out", json=True), capsys)
    figures = {name.removeprefix("bits per byte, "): each["value"] for name, each in found["figures"].items()}
    assert set(figures) == {"all", "Chinese", "Latin script", "code"}
    rows = base.read_rows(Path(found["rows"])).values()
    assert figures["all"] == pytest.approx(sum(r["bits"] for r in rows) / sum(r["bytes"] for r in rows))


def test_texts_are_cut_at_lines() -> None:
    """Prevents characters that are lost, or pieces without an end."""
    text = "a" * 4500 + "\n" + "b\n" * 1200 + "天" * 2001
    assert "".join(cut(text)) == text and max(map(len, cut(text))) <= PIECE and cut("") == [""]
    assert cut("a\nb\n") == ["a\nb\n"]


def test_pieces_share_their_text(tmp_path: Path) -> None:
    """Prevents a memory that grows with the square of a text, and pieces before in another order."""
    (tmp_path / "a.txt").write_text("a" * 4500)
    found = list(pieces([tmp_path / "a.txt"]))
    assert [len(each.text) for each in found] == [2000, 2000, 500]
    assert [len([*each.before]) for each in found] == [0, 1, 2] and next(found[2].before) is found[1].text
    assert all(each.parts is found[0].parts for each in found)


def test_bad_input_is_one_line(toys: Path, tmp_path: Path) -> None:  # noqa: F811
    """Prevents tracebacks for what a user mistypes, and a figure of nothing."""
    with pytest.raises(UsageError, match="--data is missing"):
        perplexity.main(Perplexity())
    with pytest.raises(ValueError, match="there is no"):
        files([tmp_path / "none"])
    with pytest.raises(ValueError, match="holds no file of text"):
        files([tmp_path])
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        list(pieces([tmp_path / "a.txt"]))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="there is no text"):
        list(pieces([tmp_path / "a.txt"]))
    (tmp_path / "a.txt").write_text("What?")
    with pytest.raises(UsageError, match="--length 9999 is more than the 2048 tokens"):
        perplexity.main(Perplexity(str(toys / "a"), data=[tmp_path / "a.txt"], out=tmp_path / "out", length=9999))
