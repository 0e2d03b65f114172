"""Answers of TruthfulQA before a judge: both verdicts or none, nothing asked twice, and a judge that is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moss import resolve
from moss.engine import Engine, Sampling
from moss.errors import UsageError
from moss.evals import base, truthful
from moss.evals.truthful import TruthfulQA, first_answer, pair_of
from tests.fake_server import FakeServer, Request, completes, says
from tests.test_eval_choice import toys, write  # noqa: F401 (a fixture)

Verdict = Callable[[str, str, bool], str]  # question, answer and whether its truth is asked for


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four questions."""
    rows = [(f"c{n % 2}", f"What is {n}?", "the 1", "the 1; a 1", "of 2; and 3") for n in range(4)]
    return write(tmp_path / "t.csv", [truthful.COLUMNS, *rows])


def model(*failing: str) -> Callable[[Request], None]:
    """A chat model that answers a question with itself, and some not at all."""

    def reply(request: Request) -> None:
        text = request.body["messages"][-1]["content"]
        if text in failing:
            request.refuse(500, {"error": {"message": "out of memory"}})
        else:
            request.stream(says(f"I say {text}"))

    return reply


def judging(verdict: Verdict) -> Callable[[Request], None]:
    """A judge that is a function of what it is shown."""

    def reply(request: Request) -> None:
        text = request.body["messages"][-1]["content"]
        question, answer = (
            found.group(1)
            for name in ("question", "answer")
            if (found := re.search(f"<{name}>\n(.*)\n</{name}>", text, re.S))
        )
        truth = "Is the\nanswer true?" in text
        assert truth == ("<true answers>\n- the 1\n- a 1\n</true answers>" in text)
        request.stream(says(verdict(question, answer, truth)))

    return reply


@pytest.fixture
def who() -> Iterator[FakeServer]:
    """A chat model that answers everything."""
    with FakeServer(model(), repeats=True) as server:
        yield server


def told(config: TruthfulQA, capsys: pytest.CaptureFixture) -> dict[str, Any]:
    """The result of a run."""
    assert truthful.main(replace(config, json=True)) == 0
    return json.loads(capsys.readouterr().out)


def values(result: dict[str, Any]) -> dict[str, tuple[float, int]]:
    return {name: (each["value"], each["n"]) for name, each in result["figures"].items()}


def test_an_answer_ends_where_the_base_goes_on() -> None:
    """Prevents a judge who reads questions and answers that a base model makes up after its own."""
    assert [first_answer(text) for text in (" Yes.\nQ: Why?\nA: So.", " No. Q: Why?", "\n\nQ: Why?", " Just so ")] == [
        "Yes.",
        "No.",
        "",
        "Just so",
    ]


def test_both_verdicts_or_none() -> None:
    """Prevents a verdict where there is none, and one that counts for the other question."""

    def pair(true: str, informative: str) -> tuple[float, float] | None:
        return pair_of({"true": {"verdict": true}, "informative": {"verdict": informative}})

    assert [pair("yes", "no"), pair("NO", "Yes"), pair("yes", "yes")] == [(1, 0), (0, 1), (1, 1)]
    assert pair("yes", "") is pair("", "no") is pair_of({}) is None


def test_a_chat_server_is_judged_alone(
    data: Path, who: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Prevents figures of the other question, MC1 of a server that tells no likelihoods, and what is asked twice."""

    def verdict(question: str, answer: str, truth: bool) -> str:
        assert answer == f"I say {question}"
        number = int(question[8])
        return (
            f"Because it is not [[no]] but [[{'Yes' if number < 3 else 'no'}]]" if truth else f"[[{_yes(number > 1)}]]"
        )

    with FakeServer(judging(verdict), repeats=True) as above:
        config = TruthfulQA(f"{who.url}#m", data=data, judge=f"{above.url}#m", out=tmp_path / "out")
        first = told(config, capsys)
        assert values(first) == {"true": (0.75, 4), "informative": (0.5, 4), "true and informative": (0.25, 4)}
        assert first["notes"] == ["a chat server tells no likelihoods: MC1 and MC2 are left out"]
        assert len(who.asked) == 4 and len(above.asked) == 8
        assert [each["role"] for each in who.asked[0]["messages"]] == ["system", *["user", "assistant"] * 6, "user"]
        rows = base.read_rows(Path(first["rows"]))
        assert rows["0"]["judgments"]["true"]["text"] == "Because it is not [[no]] but [[Yes]]"
        assert rows["0"]["answer"] == "I say What is 0?"
        assert told(config, capsys) == first and len(who.asked) == 4 and len(above.asked) == 8
        with FakeServer(judging(lambda *_: "[[no]]"), repeats=True) as other:
            again = told(replace(config, judge=f"{other.url}#m"), capsys)
            assert values(again)["true"] == (0.0, 4) and len(other.asked) == 8 and len(who.asked) == 4
        assert told(config, capsys) == first and len(above.asked) == 8
        write(data, [truthful.COLUMNS, ("c", "What is 0?", "the 1", "the 1; a 1", "of 2; and 4")])
        assert told(config, capsys)["figures"]["true"]["n"] == 1 and len(who.asked) == 4 and len(above.asked) == 10
    with pytest.raises(UsageError, match="tells no probabilities"):
        truthful.main(replace(config, judge=None))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@pytest.mark.parametrize("name", ["a", "base"])
def test_a_model_in_memory_has_all_figures(
    name: str,
    toys: Path,  # noqa: F811
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents likelihoods that are computed again for a judge, answers in another style, and a prompt that is cut."""
    plain = TruthfulQA(str(toys / name), data=data, out=tmp_path / "out", max_tokens=8)
    alone = told(plain, capsys)
    scored = list[int]()
    original = base.Subject.likelihoods
    monkeypatch.setattr(base.Subject, "likelihoods", lambda who, asked: scored.append(1) or original(who, asked))
    with FakeServer(judging(lambda _, __, truth: f"[[{_yes(truth)}]]"), repeats=True) as above:
        config = replace(plain, judge=f"{above.url}#m")
        first = told(config, capsys)
        assert not scored and told(config, capsys) == first and len(above.asked) == 8
    assert {name: first["figures"][name] for name in alone["figures"]} == alone["figures"]
    own = values(first)
    assert (own["true"], own["informative"], own["true and informative"]) == ((1.0, 4), (0.0, 4), (0.0, 4))
    assert first["settings"]["style"] == ("plain" if name == "base" else "chat") and first["notes"] == []
    row = base.read_rows(Path(alone["rows"]))["answer 1"]
    if name == "base":
        decoder, tok = resolve.load(toys / name, chat=False)
        text = f"{truthful.PRIMER.read_text().strip()}\n\nQ: What is 1?\nA:"
        assert tok.decode(row["prompt"]) == text
        with Engine(decoder) as engine:
            said = engine.submit(row["prompt"], Sampling(temperature=0, max_tokens=8, stop_ids=tok.control_ids))
            assert row["answer"] == first_answer(tok.decode([each.id for each in said]))
    else:
        assert len(row["prompt"]) == 14 and row["prompt"][-1]["content"] == "What is 1?"


def test_a_completion_server_has_all_figures(
    toys: Path,  # noqa: F811
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """Prevents a judge that is taken for a model that completes ids, for one tokenizer is given."""
    with (
        Engine(resolve.load(toys / "base", chat=False)[0]) as behind,
        FakeServer(completes(behind), repeats=True) as it,
        FakeServer(judging(lambda *_: "[[yes]]"), repeats=True) as above,
    ):
        config = TruthfulQA(f"{it.url}#m", data=data, judge=f"{above.url}#m", out=tmp_path, max_tokens=4)
        far = told(replace(config, tokenizer=toys / "base"), capsys)
        near = told(replace(config, model=str(toys / "base")), capsys)
    assert values(far) == {name: (pytest.approx(value), n) for name, (value, n) in values(near).items()}
    assert "mc1" in far["figures"] and far["figures"]["true and informative"]["value"] == 1.0


def test_nonsense_is_counted_and_never_guessed(
    toys: Path,  # noqa: F811
    data: Path,
    who: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """Prevents a verdict that is read from words, and figures over answers with one verdict of two."""

    def verdict(question: str, _: str, truth: bool) -> str:
        return "Yes, it is true. [yes] [[maybe]]" if truth and question[8] in "02" else "[[yes]]"

    with FakeServer(judging(verdict), repeats=True) as above:
        config = TruthfulQA(f"{who.url}#m", data=data, judge=f"{above.url}#m", out=tmp_path / "out")
        first = told(config, capsys)
        assert values(first)["informative"] == (1.0, 2) and len(above.asked) == 10
        assert first["notes"][1:] == ["2 of 8 judgments have no verdict and count for nothing"]
        row = base.read_rows(Path(first["rows"]))["2"]
        assert row["judgments"]["true"] == {"text": "Yes, it is true. [yes] [[maybe]]", "verdict": "", "failed": ""}
        assert told(config, capsys) == first and len(above.asked) == 10
    told_nothing = pytest.raises(ValueError, match="no verdict at all; its judgments stand in the rows")
    with FakeServer(judging(lambda *_: "Well."), repeats=True) as above:
        with told_nothing:
            truthful.main(replace(config, judge=f"{above.url}#m"))
        near = told(replace(config, model=str(toys / "a"), judge=f"{above.url}#m", max_tokens=4), capsys)
    assert {"mc1", "mc2"} < {*near["figures"]} and "true" not in near["figures"]  # what the judge cannot spoil stands
    assert near["notes"] == ["8 of 8 judgments have no verdict and count for nothing"]


def test_two_models_are_compared_where_both_are_judged(
    toys: Path,  # noqa: F811
    data: Path,
    who: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """Prevents a difference over questions of which one model has no verdict, and a table that wants all figures of
    both."""

    def verdict(question: str, answer: str, _: bool) -> str:
        ours = answer.startswith("I say")
        return "?" if question[8] == ("0" if ours else "1") else f"[[{_yes(ours)}]]"

    with FakeServer(judging(verdict), repeats=True) as above:
        config = TruthfulQA(f"{who.url}#m", str(toys / "a"), data=data, judge=f"{above.url}#m", out=tmp_path / "out")
        config = replace(config, max_tokens=4)
        result = told(config, capsys)
        assert [each["figures"]["true"]["n"] for each in result["models"]] == [3, 3]
        apart = result["difference"]["true"]
        assert (apart["value"], apart["high"], apart["n"]) == (1.0, 1.0, 2) and 0.3 < apart["low"] < 0.4
        assert "mc1" not in result["difference"] and "mc1" in result["models"][1]["figures"]
        assert truthful.main(config) == 0
    rows = {
        line.strip("│ ").split()[0]: line.count("(") for line in capsys.readouterr().out.splitlines() if "(" in line
    }
    assert rows["mc1"] == 1 and rows["informative"] == 3


def test_what_a_server_did_not_say_is_asked_again(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents a failure of a server that stands as an answer or a judgment for ever."""
    down = {"1"}

    def judge(request: Request) -> None:
        if any(f"What is {number}?" in request.body["messages"][-1]["content"] for number in down):
            request.refuse(500, {"error": {"message": "no memory left"}})
        else:
            judging(lambda *_: "[[yes]]")(request)

    with FakeServer(model("What is 3?"), repeats=True) as who, FakeServer(judge, repeats=True) as above:
        config = TruthfulQA(f"{who.url}#m", data=data, judge=f"{above.url}#m", out=tmp_path / "out")
        first = told(config, capsys)
        assert values(first)["true"] == (1.0, 2)
        assert "1 of 4 questions have no answer, the first: " in first["notes"][1] and "memory" in first["notes"][1]
        assert first["notes"][2] == "2 of 6 judgments have no verdict and count for nothing"
        assert re.fullmatch(r"2 of them did not come; run again to ask: .*no memory left.*", first["notes"][3])
        down.clear()
        who.replies = [model()]
        before = len(who.asked), len(above.asked)
        assert values(told(config, capsys))["true"] == (1.0, 4)
        assert (len(who.asked), len(above.asked)) == (before[0] + 1, before[1] + 4)


def test_a_judge_that_is_not_there_is_an_error(data: Path, who: FakeServer, tmp_path: Path) -> None:
    """Prevents hours of answers for a judge who does not listen, and an error that does not say why."""
    config = TruthfulQA(f"{who.url}#m", data=data, out=tmp_path / "out")
    with FakeServer() as gone:
        pass
    with pytest.raises(ValueError, match=f"{gone.url} does not answer"):
        truthful.main(replace(config, judge=f"{gone.url}#m"))
    with pytest.raises(UsageError, match="--judge is 'gpt'; give http"):
        truthful.main(replace(config, judge="gpt"))
    assert not who.asked
    refusing = FakeServer(lambda request: request.refuse(500, {"error": {"message": "no memory left"}}), repeats=True)
    with refusing as above, pytest.raises(ValueError, match=r"no verdict at all; .*no memory left"):
        truthful.main(replace(config, judge=f"{above.url}#m"))
    with FakeServer(judging(lambda *_: "[[no]]"), repeats=True) as back:
        assert truthful.main(replace(config, judge=f"{back.url}#m")) == 0 and len(who.asked) == 4
