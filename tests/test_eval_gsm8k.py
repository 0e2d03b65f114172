"""Grade-school problems: asked with tools and without, and judged by the last number."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from moss.errors import UsageError
from moss.evals import base, gsm8k
from moss.evals.gsm8k import GSM8K, read
from tests.fake_server import FakeServer, Request, calls, says


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    rows = [
        {"question": "40+32?", "answer": "40+32=<<40+32=72>>72\n#### 72"},
        {"question": "1?", "answer": "#### 1,000"},
    ]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "g.jsonl"


def replies(request: Request) -> None:
    """Right with the calculator, which it calls; without, a guess and a silence about the number."""
    messages = request.body["messages"]
    first = messages[1]["content"].startswith("40")
    if "tools" not in request.body:
        request.stream(says("About 70." if first else "Many."))
    elif messages[-1]["role"] == "user":
        request.stream(calls(("Calculate", json.dumps({"expression": "40+32" if first else "999+1"}))))
    else:
        request.stream(says(f"It is {messages[-1]['content']}."))


def test_with_and_without(problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents a calculator that stays on, a first number that passes for the last, and answers that are mixed up."""
    with FakeServer(replies, repeats=True) as server:
        config = GSM8K(f"{server.url}#m", data=problems, out=tmp_path / "out", json=True)
        assert gsm8k.main(config) == 0
        told, asked = json.loads(capsys.readouterr().out), len(server.asked)
        assert gsm8k.main(config) == 0 and len(server.asked) == asked == 6
    values = {name: figure["value"] for name, figure in told["figures"].items()}
    assert values == {
        "right with the calculator": 1,
        "right without": 0,
        "what it brings": 1,
        "problems with a call": 1,
    }
    assert told["notes"] == ["1 of 4 replies hold no number and count as wrong"]
    nothing = [{"way": way, "right": False, "commands": [], "failed": ""} for way in gsm8k.WAYS for _ in range(4)]
    brought, weights = gsm8k.Arithmetic(config, []).values(nothing)["what it brings"]
    value, low, high, _ = base.figure((brought, weights))
    assert value == 0 and low == -high < 0  # a calculator may also harm
    rows = base.read_rows(Path(told["rows"]))
    assert rows["with the calculator/0"]["commands"] == ['Calculate("40+32")']
    assert rows["without/0"]["number"] == 70 and rows["without/0"]["commands"] == ["None"]


def test_sets_do_not_displace_one_another(problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents questions asked again because another file was measured in between, and figures of the other file."""
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question": "5+5?", "answer": "#### 10"}) + "\n")
    with FakeServer(replies, repeats=True) as server:
        config = GSM8K(f"{server.url}#m", data=problems, out=tmp_path / "out", json=True)
        counts, figures = [], []
        for data in (problems, other, problems, other):
            assert gsm8k.main(replace(config, data=data)) == 0
            counts.append(len(server.asked))
            figures.append(json.loads(capsys.readouterr().out)["figures"])
    assert counts[1] == counts[2] == counts[3] and figures[0] == figures[2] and figures[1] == figures[3] != figures[0]


def test_an_answer_that_did_not_come_is_asked_for_again(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Prevents a server's bad hour that stays in the figures for ever."""

    def fails(request: Request) -> None:
        request.refuse(400, {"error": {"message": "too hot"}})

    config = GSM8K(data=problems, out=tmp_path / "out", json=True)
    with FakeServer(fails, repeats=True) as server:
        there = replace(config, model=f"{server.url}#m")
        with pytest.raises(ValueError, match=r"gsm8k: nothing was measured; 4 of 4 were not answered .*too hot"):
            gsm8k.main(there)
        server.replies = [replies]
        assert gsm8k.main(there) == 0
        assert json.loads(capsys.readouterr().out)["figures"]["right with the calculator"]["value"] == 1


def test_the_bundled_model(problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents an evaluation that runs with servers alone."""
    assert gsm8k.main(GSM8K(data=problems, out=tmp_path / "out", limit=1, json=True)) == 0
    told = json.loads(capsys.readouterr().out)
    row = base.read_rows(Path(told["rows"]))["with the calculator/0"]
    assert row["commands"][0].startswith("Calculate(") and row["right"] and len(row["prompt"]) > 20


def test_a_broken_problem_is_named(tmp_path: Path) -> None:
    """Prevents a problem whose answer is guessed."""
    file = tmp_path / "g.jsonl"
    for line, words in (
        ('{"question": "a", "answer": "five"}', "line 1: answer must end with ####"),
        ('{"question": "", "answer": "#### 1"}', "line 1: a problem needs"),
        ("", "is empty"),
    ):
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match=words):
            read(file)
    with pytest.raises(UsageError, match="--data is missing"):
        gsm8k.main(GSM8K())


@pytest.mark.skipif("MOSS_TEST_DATA" not in os.environ, reason="set MOSS_TEST_DATA to the folder with real data")
def test_real_problems_are_read() -> None:
    """Prevents a reader for files that nobody has."""
    found = read(Path(os.environ["MOSS_TEST_DATA"]) / "gsm8k_train_2k.jsonl")
    assert len(found) == 2000 and found[0].answer == 72
