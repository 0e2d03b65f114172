"""Two models before a judge: both orders, verdicts that are read and never guessed, and what is made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moss.errors import UsageError
from moss.evals import base, judge
from moss.evals.judge import Judge, figures, notes, score_of
from moss.evals.verdicts import verdict_in
from tests.fake_server import FakeServer, Request, says
from tests.test_eval_choice import toys  # noqa: F401 (a fixture)


def test_a_score_of_two_orders() -> None:
    """Prevents the winner of the other order, and a verdict where there is none."""

    def score(*verdicts: str) -> float | None:
        return score_of([{"order": order, "verdict": each} for order, each in zip(("ab", "ba"), verdicts, strict=True)])

    assert [score(*each) for each in ("AB", "BA", "AA", "BB", "AC", "CB", "CC")] == [1, 0, 0.5, 0.5, 0.75, 0.75, 0.5]
    assert [score("A", ""), score("", "A"), score("", "")] == [None, None, None]  # or the order would decide


def row(score: float | None, verdicts: str, lengths: tuple[int, int] = (5, 5)) -> dict[str, Any]:
    said = [{"order": order, "verdict": each.strip(), "text": ""} for order, each in zip(("ab", "ba"), verdicts)]
    return {"score": score, "judgments": said, "replies": ["x" * length for length in lengths]}


def test_figures_by_hand() -> None:
    """Prevents ties that count as wins, and biases of prompts without a verdict."""
    rows = [row(1.0, "AB"), row(0.5, "AA"), row(0.5, "CC"), row(0.0, "BA"), row(None, "  "), row(None, "A ")]
    found = {name.strip(): figure.value for name, figure in figures(rows).items()}
    assert found["win rate"] == 0.5 and (found["won"], found["tied"], found["lost"]) == (0.25, 0.5, 0.25)
    assert found["judged for the answer that stands first"] == pytest.approx(4 / 6)
    assert found["contradicted in the other order"] == 0.25
    assert found["win rate at equal length"] == pytest.approx(0.5, abs=0.01)
    assert notes(rows) == ["3 of 12 judgments have no verdict and count for nothing"] and notes(rows[:2]) == []
    assert "judged for the answer that stands first" not in figures([row(0.5, "CC")])  # of ties nobody knows
    with pytest.raises(ValueError, match="no verdict at all"):
        figures([row(None, "  ")])


def server(verdict: Callable[[str, str, str], str]) -> Callable[[Request], None]:
    """A judge that is a function of prompt and answers."""

    def reply(request: Request) -> None:
        text = request.body["messages"][-1]["content"]
        parts = [
            re.search(f"<{name}>\n(.*)\n</{name}>", text, re.S) for name in ("conversation", "answer A", "answer B")
        ]
        request.stream(says(verdict(*(part.group(1) for part in parts if part))))

    return reply


def model(name: str, length: int) -> FakeServer:
    """A chat model that answers with its name, so many times."""
    return FakeServer(says(name * length), repeats=True)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    talk = [("user", "Hi"), ("assistant", "Yo"), ("user", "Who?")]
    rows: list[Any] = [{"prompt": "一加一？"}, {"user_prompt": "Why?", "category": "x"}]
    rows.append({"messages": [{"role": role, "content": text} for role, text in talk]})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path / "p.jsonl"


Told = tuple[dict[str, float], dict[str, Any], list[dict[str, Any]]]


def run(verdict: Callable[[str, str, str], str], prompts: Path, out: Path, capsys: pytest.CaptureFixture) -> Told:
    """The figures of `good` over `bad` before such a judge, the whole result, and what the judge was asked."""
    with model("good", 1) as ours, model("bad", 3) as theirs, FakeServer(server(verdict), repeats=True) as above:
        config = Judge(f"{ours.url}#m", f"{theirs.url}#m", data=prompts, judge=f"{above.url}#m", out=out, json=True)
        assert judge.main(config) == 0
        asked = list(above.asked)
        first = capsys.readouterr().out
        assert judge.main(config) == 0 and len(above.asked) == len(asked) and len(ours.asked) == 3
        assert capsys.readouterr().out == first
    told = json.loads(first)
    return {name.strip(): each["value"] for name, each in told["figures"].items()}, told, asked


def test_judges_of_known_taste(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents answers that change places: a fair judge, one of the order, one of length, one that calls all equal."""
    found, told, asked = run(
        lambda _, a, b: f"Because.\n[[{'A' if a == 'good' else 'B'}]]", prompts, tmp_path / "1", capsys
    )
    assert found["win rate"] == found["won"] == 1.0 and found["contradicted in the other order"] == 0.0
    assert found["judged for the answer that stands first"] == 0.5
    said = [json.dumps(each["messages"], ensure_ascii=False) for each in asked]
    assert len(said) == 6 and sum("User: Hi\\n\\nAssistant: Yo\\n\\nUser: Who?" in each for each in said) == 2
    rows = list(base.read_rows(Path(told["rows"])).values())
    assert rows[0]["replies"] == ["good", "badbadbad"] and rows[0]["judgments"][1]["text"] == "Because.\n[[B]]"
    found, _, _ = run(lambda *_: "[[A]]", prompts, tmp_path / "2", capsys)
    assert found["win rate"] == 0.5 and found["tied"] == 1.0
    assert found["contradicted in the other order"] == found["judged for the answer that stands first"] == 1.0
    found, _, _ = run(lambda _, a, b: "[[A]]" if len(a) > len(b) else "[[B]]", prompts, tmp_path / "3", capsys)
    assert found["win rate"] == 0.0 and found["contradicted in the other order"] == 0.0
    found, _, _ = run(lambda *_: "[[C]]", prompts, tmp_path / "4", capsys)
    assert found["tied"] == 1.0 and found["contradicted in the other order"] == 0.0


def test_a_verdict_is_one() -> None:
    """Prevents a tie for a judge that says the question again, and a choice among several."""
    wanted = judge.VERDICT
    for text, verdict in (
        ("[[A]] or [[B]]? Both are right.\n\n[[C]]", "C"),
        ("**[[B]]**, for it is right. [[B]]", "B"),
        ("I end with exactly one of\n[[A]], [[B]] or [[C]], where C", ""),
        ("I waver between [[A]] and [[B]].", ""),
        ("It is not [[A]] but [[B]].", "B"),
        ("[[A]]或者[[B]]", ""),
        ("[[D]]", ""),
        ("", ""),
    ):
        assert verdict_in(text, wanted) == verdict, text


def test_nonsense_is_counted_and_shown(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents a verdict that is guessed from words, and one prompt without a verdict that ends all."""
    found, told, asked = run(
        lambda prompt, a, _: "A is better, I think." if "Why" in prompt else f"[[{'A' if a == 'good' else 'B'}]]",
        prompts,
        tmp_path / "out",
        capsys,
    )
    assert found["win rate"] == 1.0 and told["figures"]["win rate"]["n"] == 2 and len(asked) == 8
    assert told["notes"] == ["2 of 6 judgments have no verdict and count for nothing"]
    rows = base.read_rows(Path(told["rows"]))
    assert rows["1"]["score"] is None and rows["1"]["judgments"][0]["text"] == "A is better, I think."
    with pytest.raises(ValueError, match="no verdict at all"):
        run(lambda *_: "Good.", prompts, tmp_path / "none", capsys)


def test_a_judgment_that_did_not_come_is_asked_for_again(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Prevents a failure of the judge's server that stands as its judgment for ever, and a dead one found last."""
    down = ["Why?"]
    fair = server(lambda _, a, b: f"[[{'A' if a == 'good' else 'B'}]]")

    def judge_(request: Request) -> None:
        failing = any(text in request.body["messages"][-1]["content"] for text in down)
        request.refuse(500, {"error": {"message": "no memory left"}}) if failing else fair(request)

    with model("good", 1) as ours, model("bad", 3) as theirs, FakeServer(judge_, repeats=True) as above:
        config = Judge(
            f"{ours.url}#m", f"{theirs.url}#m", data=prompts, judge=f"{above.url}#m", out=tmp_path, json=True
        )
        assert judge.main(config) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["figures"]["win rate"]["n"] == 2 and len(above.asked) == 8
        assert [note.split(":")[0] for note in told["notes"]] == [
            "2 of 6 judgments have no verdict and count for nothing",
            "2 of them did not come; run again to ask",
        ]
        down.clear()
        assert judge.main(config) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["figures"]["win rate"]["n"] == 3 and len(above.asked) == 10 and told["notes"] == []
    with FakeServer() as gone:
        pass
    with model("good", 1) as ours, pytest.raises(ValueError, match=f"{gone.url} does not answer"):
        judge.main(replace(config, model=f"{ours.url}#m", judge=f"{gone.url}#m"))
    assert not ours.asked


def test_a_prompt_that_was_not_answered_is_no_loss(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Prevents a failure of a model's server that counts as a worse answer, and a silence about it in the result."""
    down = ["Why?"]

    def ours_(request: Request) -> None:
        failing = request.body["messages"][-1]["content"] in down
        request.refuse(500, {"error": {"message": "no memory left"}}) if failing else request.stream(says("good"))

    fair = server(lambda _, a, b: f"[[{'A' if a == 'good' else 'B'}]]")
    with FakeServer(ours_, repeats=True) as ours, model("bad", 3) as theirs, FakeServer(fair, repeats=True) as above:
        config = Judge(
            f"{ours.url}#m", f"{theirs.url}#m", data=prompts, judge=f"{above.url}#m", out=tmp_path, json=True
        )
        assert judge.main(config) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["figures"]["win rate"]["value"] == 1.0 and told["figures"]["win rate"]["n"] == 2
        assert len(above.asked) == 4 and "1 of 3 prompts were not answered by both" in told["notes"][0]
        down.clear()
        assert judge.main(config) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["figures"]["win rate"]["n"] == 3 and len(above.asked) == 6 and told["notes"] == []
        down += ["一加一？", "Why?", "Who?"]
        with pytest.raises(ValueError, match=r"no prompt was answered by both models: .*no memory left"):
            judge.main(replace(config, out=tmp_path / "all"))


def test_the_scripted_truth(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    """Prevents a truth that knows its prompts no more after they went through a model: what says nothing ties."""
    told = []
    right: list[str] = []
    original = judge.preferences.truth

    def truth(history: Any, reply: str) -> int:
        assert history.extra["answer"]
        right.append(reply)
        return original(history, reply)

    config = Judge(str(toys / "a"), str(toys / "b"), n=6, max_tokens=8, out=tmp_path / "out", json=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge.preferences, "truth", truth)
        assert judge.main(config) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(right) == 12 and told["figures"]["win rate"]["n"] == 6
    assert "judged for the answer that stands first" not in told["figures"]
    assert judge.main(replace(config, json=False)) == 0 and "win rate at equal length" in capsys.readouterr().out


def test_bad_input_is_one_line(prompts: Path, tmp_path: Path) -> None:
    """Prevents a run of hours that ends in a missing flag."""
    for settings, words in (
        ({}, "--against is missing"),
        ({"against": "x", "n": 0}, "--n is 0"),
        ({"against": "x", "limit": -1}, "--limit is -1"),
        ({"against": "x", "data": prompts}, "knows only its own prompts"),
        ({"against": "x", "judge": "gpt"}, "--judge is 'gpt'"),
        ({"against": "x", "judge": "http://x"}, "--data is missing"),
    ):
        with pytest.raises(UsageError, match=words):
            judge.main(Judge(**settings))
    for line, words in (('{"prompt": " "}', r"p.jsonl:2: a row needs prompt"), ("[1]", "p.jsonl:2")):
        prompts.write_text('{"prompt": "a"}\n' + line + "\n")
        with pytest.raises(ValueError, match=words):
            judge.read(prompts)
    prompts.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        judge.read(prompts)
    with pytest.raises(ValueError, match="there is no file"):
        judge.read(tmp_path / "none")
