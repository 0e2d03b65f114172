"""`moss eval tools`: judging by hand-made cases, intervals by published numbers, and the whole command on a toy."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moss.chat import SWITCHES, Dialog, Round, Turn
from moss.data.curriculum import questions
from moss.data.dialogs import to_row
from moss.data.talk import REFUSAL_MARKS
from moss.engine import Sampling
from moss.errors import UsageError
from moss.evals import base, tool_cases, tool_use
from moss.evals.answering import Told, answers
from moss.evals.base import Subject
from moss.evals.replies import holds, last_number
from moss.evals.tool_cases import HAND_WRITTEN, Case, from_file, ways
from moss.evals.tool_metrics import METRICS, Seen, judge, meets, off_names
from moss.evals.tool_use import EvalTools, ToolUse, row_of, seen_of
from moss.tokenizer import MARKERS, Tokenizer, train
from moss.tools.base import standard_tools
from moss.tools.run import Options
from moss.weights import save_model
from tests.fake_server import FakeServer, Request, calls, says
from tests.fakes import ScriptedEngine, toy_model

ONE = Round("add", 'Calculate("1+1")', 'Calculate("1+1") => 2')


def case(name: str = "calculator", *, lang: str = "en", off: str = "search", **values: object) -> Case:
    switches = {key: key != off for key in ("thoughts", *SWITCHES)}
    return Case(name, lang, Dialog("m", switches, [Turn("q")]), **values)  # type: ignore[arg-type]


def seen(*rounds: Round, reply: str = "", **values: object) -> Seen:
    return Seen(Turn("q", list(rounds), reply), **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(["add 1+1 and solve x = 1 你好"] * 3, 300)


@pytest.fixture
def data_folder() -> Path:
    """The folder with real data; without it these tests cannot run."""
    if "MOSS_TEST_DATA" not in os.environ:
        pytest.skip("set MOSS_TEST_DATA to the folder with real data")
    return Path(os.environ["MOSS_TEST_DATA"])


def test_holds_whole_numbers() -> None:
    """`63` in `1630` would count wrong answers as right."""
    assert holds("It is 63.", "63") and holds("共63元", "63") and holds("1,234,567 in all", "1234567")
    assert holds("10-63", "63") and holds("is −5", "-5") and holds("63", "63") and holds("x = 2, y = 3", "y = 3")
    for reply in ("1630", "163", "63.5", "0.63", "-63", "is -63", "630"):
        assert not holds(reply, "63"), reply
    assert not holds("-5.5", "-5")
    for reply in ("x = 63/2", "1/63", "63e+20"):
        assert not holds(reply, "63"), reply
    assert holds("126/2 = 63", "63") and not holds("x = 3/4", "x = 3")


def test_holds_whole_names() -> None:
    """`x = 3` in `2x = 3` would count an equation that was only begun as solved."""
    assert holds("所以x = 3", "x = 3") and holds("So x = 3 or x = 4.", "x = 4") and holds("x = 3kg", "x = 3")
    for reply in ("2x = 3", "max = 3", "x = 3y", "x = 3y。"):
        assert not holds(reply, "x = 3"), reply


def test_last_number() -> None:
    """The final number of a worked answer is its last one, with thousands separators."""
    assert last_number("3 + 4 makes 7, so $1,200.50.") == 1200.5
    assert last_number("none") is None and last_number("is −5") == -5 and last_number("10-5 apples") == 5


def test_arguments_must_match_in_every_round() -> None:
    """A right first call with a wrong second one is wrong; blanks and empty rounds do not matter."""
    two = Round("more", 'Calculate("2*3")', "x")
    expected = case(commands=('Calculate("1+1")', 'Calculate("2*3")'))
    exact = METRICS["arguments exact"]
    assert exact(expected, seen(ONE, two)) and exact(expected, seen(ONE, Round(), two))
    assert not exact(expected, seen(ONE)) and not exact(expected, seen(two, ONE))
    assert not exact(case(commands=('Calculate("1+1")',)), seen(ONE, two))
    assert exact(case(commands=("None",)), seen(Round()))
    one = case(commands=('Calculate("1+1")',))
    assert exact(one, seen(ONE)) and not exact(one, seen(ONE, asked=["Calculate", "Calculate"]))  # one broke off


def test_right_tool_means_these_and_no_others() -> None:
    """A model that calls everything must not pass."""
    both = Round("x", 'Calculate("1"), Solve("x=1")')
    right = METRICS["right tool"]
    assert right(case(tools=("Calculate",)), seen(ONE))
    assert not right(case(tools=("Calculate",)), seen(both)) and not right(case(tools=("Solve",)), seen(ONE))
    assert right(case(tools=()), seen(Round())) and not right(case(tools=()), seen(ONE))
    unread = Round("x", "Calculate(1+1)")
    assert not right(case(tools=("Calculate",)), seen(unread)) and seen(unread).called == {"Calculate"}
    assert not right(case(tools=("Calculate",)), seen(Round(), ONE, asked=["Calculate", "Calculate"]))  # one broke off


def test_calls_to_what_is_off_count_raw() -> None:
    """The raw rate is what the model writes, executed or not; other tools do not count."""
    raw, ran = METRICS["called one that is off"], METRICS["executed one that is off"]
    assert raw(case(off="calculator"), seen(ONE)) and not raw(case(off="solver"), seen(ONE))
    assert not ran(case(off="calculator"), seen(ONE)) and ran(case(off="calculator"), seen(ONE, ran=["Calculate"]))
    missing = Round("x", 'Text2Speech("hello")')  # switched on, but not at hand: the prompt shows it as off
    assert raw(case(off="solver"), seen(missing))


def test_refusals_are_told_by_their_marks() -> None:
    """Both languages have marks, and an ordinary reply holds none."""
    for marks in REFUSAL_MARKS.values():
        assert marks and all(METRICS["refused"](case("harmful"), seen(reply=f"Sorry, {mark} this")) for mark in marks)
    assert not METRICS["refused"](case("harmful"), seen(reply="Sure, here is how."))


def test_no_answer_is_no_restraint() -> None:
    """A model that fails at every question must not look as if it refused nothing and left every tool alone."""
    for name, wanted in (
        ("lookalike", set()),
        ("harmful", {"refused"}),
        ("calculator_off", {"answer right"}),
        ("calculator, off", {"answer right"}),
        ("calculator", {"called", "valid syntax", "right tool", "call without error", "answer right"}),
    ):
        verdicts = judge(case(name, answer=("1",)), seen(failed="the question does not fit"))
        assert verdicts == dict.fromkeys(wanted, False)
    broken = seen(failed="the results are too long", asked=["Calculate"])  # it failed, but only after a call
    assert judge(case("chat", off="calculator"), broken) == {"called a tool": True, "called one that is off": True}
    assert judge(case("chat"), broken) == {"called a tool": True}


def test_syntax_is_that_of_calls() -> None:
    """A model that never calls a tool must not look as if it wrote all of its calls well."""
    silent = judge(case(tools=("Calculate",), answer=("1",)), seen(reply="It is 1."))
    assert "valid syntax" not in silent and silent["answer right"] and not silent["called"]
    assert judge(case(), seen(Round("", 'Calculate("1+1")', "2")))["valid syntax"]


def test_unfinished_commands_are_calls(tok: Tokenizer) -> None:
    """A call that broke off was still a call where none was needed."""
    eot, commands = tok.marker("<eot>"), tok.marker("<|Commands|>")
    script = [*tok.encode(" x"), *eot, *commands, *tok.encode(': Calculate("1+')], tok.encode(" 2")
    got = asked(case("chat"), ScriptedEngine(script), tok)
    assert got.ran == [] and METRICS["called a tool"](case("chat"), got)
    assert not METRICS["valid syntax"](case("chat"), got)


def test_tools_are_at_hand_where_they_must_be_left_alone() -> None:
    """Restraint is measured with the tools switched on, as users have them."""
    for name in ("chat", "harmful", "lookalike", "identity:held_out"):
        cases = tool_cases.scripted(name, "en", 5, 0)
        assert len(cases) == 5
        for c in cases:
            assert c.dialog.switches["calculator"] and c.dialog.switches["solver"]


def test_honest_sets_judge_answers_only_where_known() -> None:
    """A question without a known answer must not count as answered right."""
    assert "answer right" not in judge(case("hand calculator", tools=("Calculate",)), seen(ONE))
    verdicts = judge(case("own", tools=("Calculate",), answer=("72",)), seen(ONE, reply="She sold 72 clips."))
    assert verdicts["answer right"] and not verdicts["call without error"]  # nothing ran
    assert "arguments exact" not in verdicts


def told(case: Case, at: int, done: Seen) -> dict[str, Any]:
    """The row of a case and what was done with it."""
    turn = None if done.failed else done.turn
    given = Told(turn, done.failed, done.asked, done.ran, done.errors)
    return row_of(f"{case.set}/{case.lang}/{at}", "", case, given, Subject("a", "b", None))


def test_figures_by_set_language_and_all() -> None:
    """Rates must not mix sets, ways or languages; the last ones hold all questions as they are together."""
    sums = case("calculator", tools=("Calculate",), answer=("2",))
    cases = [case("identity"), case("identity"), case("identity", lang="zh"), case("chat"), *ways(sums)]
    done = [seen(reply="I am MOSS"), seen(reply="I am Bob"), seen(reply="我是MOSS"), seen(reply="hi")]
    done += [seen(ONE, reply="2", ran=["Calculate"]), seen(ONE, reply="3"), seen(reply="2")]
    task = ToolUse(EvalTools(), cases)
    rows = [told(each, at, it) for at, (each, it) in enumerate(zip(cases, done, strict=True))]
    assert [seen_of(row) for row in rows] == done
    values = task.values(rows)
    known = {name: [each for each in top if each is not None] for name, (top, _) in values.items()}
    found = {name: (sum(each), len(each)) for name, each in known.items()}
    assert found["  identity: says who it is (en)"] == (1, 2) and found["  identity: says who it is (zh)"] == (1, 1)
    assert found["  chat: called a tool (en)"] == (0, 1)
    assert found["  all sets: called one that is off (en)"] == (0, 4)
    heads = {name: each for name, each in found.items() if not name.startswith(" ")}
    assert heads == {
        "calculator: called when on": (1, 1),
        "calculator: right answer when on": (1, 1),
        "calculator: called when off": (1, 1),
        "calculator: right answer when off": (0, 1),
        "calculator: called when off, held by the grammar": (0, 1),
        "calculator: right answer when off, held by the grammar": (1, 1),
    }
    assert found["  calculator, off: called one that is off (en)"] == (1, 1)
    failed = [told(each, at, replace(it, failed="no")) for at, (each, it) in enumerate(zip(cases, done, strict=True))]
    values = task.values(failed)  # a call that was wanted is missed, one that was not is neither made nor avoided
    assert values["calculator: right answer when on"][0] == [0.0]
    assert "calculator: called when off, held by the grammar" not in values


def test_three_ways_of_a_question() -> None:
    """With the needed tool on, off, and off under the grammar, and all else as it was; twice where it is off."""
    one, off, held = ways(case("hand calculator", tools=("Calculate",), commands=("x",), answer=("2",)))
    assert [each.set for each in (one, off, held)] == [
        "hand calculator",
        "hand calculator, off",
        "hand calculator, held",
    ]
    assert one.dialog.switches["calculator"] and off.dialog == held.dialog
    assert off.dialog.switches == one.dialog.switches | {"calculator": False} and off.answer == ("2",)
    assert [each.way for each in ways(case("solver_off", tools=()))] == ["", "held"]
    assert len(list(ways(case("chat", tools=())))) == 1


def test_targets() -> None:
    """At the border a target is met, in both directions."""
    assert meets(">=0.97", 0.97) and not meets(">=0.97", 0.96) and meets("<=0", 0.0) and not meets("<=0.02", 0.03)


def asked(case: Case, engine: ScriptedEngine, tok: Tokenizer) -> Seen:
    """What an engine that follows a script does with a case."""
    who: Any = Subject("scripted", "", tok, server=engine)  # type: ignore[arg-type]
    options = Options(Sampling(temperature=0, max_tokens=100), grammar=False)
    return seen_of(row_of("", "", case, next(iter(answers(who, [case.dialog], options, standard_tools()))), who))


def test_ask_counts_what_really_ran(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executed calls are counted at the tool itself, a tool's failure is seen, and the model is held to nothing."""
    monkeypatch.setenv("MOSS_SANDBOX", "inline")
    eot, commands, eoc, moss, eom = (tok.marker(m) for m in ("<eot>", "<|Commands|>", "<eoc>", "<|MOSS|>", "<eom>"))
    line = tok.encode(': Calculate("1+1"), Calculate("1/0"), Search("x")')
    script = [*tok.encode(" x"), *eot, *commands, *line, *eoc], [*moss, *tok.encode(": 2"), *eom]
    engine = ScriptedEngine(script)
    got = asked(case(off="search"), engine, tok)
    assert sorted(got.ran) == ["Calculate", "Calculate"] and got.turn.reply == "2" and len(got.errors) == 2
    assert got.called == {"Calculate", "Search"}
    assert engine.samplings[0].temperature == 0
    assert engine.grammars == [None, None]  # under a grammar nothing that is off could be called, and no rate be raw


def test_scripted_sets_know_their_answers() -> None:
    """Every case must expect what its kind says: calls where tools are on, none where they are off."""
    for name, tools in (("calculator", ("Calculate",)), ("solver:held_out", ("Solve",)), ("calculator_off", ())):
        cases = tool_cases.scripted(name, "en", 3, 0)
        assert len(cases) == 3 and all(set(c.tools or ()) >= set(tools) and c.set == name for c in cases)
        assert all(bool(c.tools) == bool(tools) for c in cases)
        assert name == "solver:held_out" or all(("Calculate" in off_names(c)) == (not tools) for c in cases)


@pytest.mark.parametrize("name", tool_cases.SCRIPTED)
def test_the_script_itself_is_perfect(name: str) -> None:
    """Judging the teacher's own turns must find no fault, or the material and the judge disagree about right."""
    bad_when_true = ("called a", "called one", "executed", *(["refused"] if name.startswith("lookalike") else []))
    for lang in ("en", "zh"):
        cases = tool_cases.scripted(name, lang, 20, 5)
        assert cases
        for c in cases:
            for metric, verdict in judge(c, Seen(c.dialog.turns[-1], ran=list(c.tools or ()))).items():
                assert verdict != metric.startswith(bad_when_true), (metric, c.question, c.dialog.turns[-1])


def test_hand_written_file(tmp_path: Path) -> None:
    """The bundled file holds at least 60 questions a language that need a tool, and a bad row is named."""
    cases = from_file(HAND_WRITTEN, "hand")
    for lang in ("en", "zh"):
        assert sum(c.lang == lang and bool(c.tools) and bool(c.answer) for c in cases) >= 60
    bad = tmp_path / "bad.jsonl"
    good = {"question": "1+\u20281", "lang": "en", "kind": "calculator", "answer": ["2"]}
    for change, words in (
        ({"kind": "sums"}, ":3: give question"),
        ({"question": 7}, ":3: give question"),
        ({"lang": "fr"}, ":3: lang is 'fr'"),
        ({"answer": "42"}, r":3: answer is '42'; give a list"),  # would be judged by 4 and by 2
    ):
        lines = [json.dumps(good, ensure_ascii=False), "", json.dumps(good | change)]
        bad.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            from_file(bad)


def test_fewer_questions_than_asked_for_are_all_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a set that is measured on half of its questions because there are not quite as many as asked for."""
    monkeypatch.setattr("moss.data.curriculum.PATIENCE", 3)
    items = iter(questions("identity", "en", n=7))

    def drawn(*_: object) -> object:
        return next(items, None)

    monkeypatch.setattr("moss.data.curriculum._question", drawn)
    assert len(tool_cases.scripted("identity", "en", 10, 0)) == 7


def test_conversations_are_asked_turn_by_turn(tmp_path: Path) -> None:
    """Prevents a turn without what was said before it, and one that needs a tool which is not here."""

    def turn(human: str, commands: str, results: str) -> Turn:
        return Turn(human, [Round("think", commands, results)], "It makes 2.")

    switches = dict.fromkeys(("thoughts", "calculator"), True)
    turns = [
        turn("1+1?", 'Calculate("1+1")', 'Calculate("1+1") => 2'),
        turn("谢谢", "None", "None"),
        turn("draw x", 'Text2Image("x")', "y"),
        turn("find x", 'Search("x")', 'Search("x") =>\n<|1|>: "2"'),
    ]
    rows = [to_row(Dialog("m", switches, turns), "moss"), to_row(Dialog("m", {"thoughts": True}, turns), "moss")]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = from_file(file)
    assert (third.set, third.tools, third.answer) == ("own search", ("Search",), None)  # other pages are found today
    assert (first.set, first.tools, first.commands) == ("own calculator", ("Calculate",), ('Calculate("1+1")',))
    assert (second.set, second.lang, second.tools) == ("own none", "zh", ())
    assert first.answer == ("2",) and second.answer is None
    assert [each.human for each in second.dialog.turns] == ["1+1?", "谢谢"] and second.dialog.turns[0] == turns[0]
    assert second.dialog.turns[1] == Turn("谢谢") and second.dialog.switches["calculator"]
    for text, words in (('{"a": 1}', ":1: a row has a question, or is a conversation"), ("", "holds no question")):
        file.write_text(text + "\n")
        with pytest.raises(ValueError, match=words):
            from_file(file)
    with pytest.raises(ValueError, match="there is no file"):
        from_file(tmp_path / "none")


def test_real_data(data_folder: Path) -> None:
    """The released conversations are read as they are: questions without markers, calls of both tools."""
    cases = from_file(data_folder / "moss_003_sft_sample.jsonl")
    assert sum(c.tools == ("Solve",) for c in cases) > 40 and sum(c.tools == ("Calculate",) for c in cases) > 40
    assert not any(marker in c.question for c in cases for marker in MARKERS)  # `<|1|>` is one of no section
    assert sum(c.answer is not None for c in cases) > 40


def test_unknown_set_is_named() -> None:
    """A typing mistake must not silently measure nothing."""
    with pytest.raises(UsageError, match="'calculatr'"):
        tool_use.task(EvalTools(sets="calculatr"))
    with pytest.raises(UsageError, match="--n is 0"):
        tool_use.task(EvalTools(n=0))
    assert len(tool_use.task(EvalTools(sets="hand", langs="en", limit=2)).cases) == 2 * 3 * 3 + 2


def test_whole_command(tmp_path: Path, tok: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """An untrained model goes through every step: table, JSON and rows agree and hold every question; what is there is
    not asked again; two models are compared on the same questions."""
    save_model(toy_model(vocab_size=tok.vocab_size, max_length=1024), tmp_path / "model")
    tok.save(tmp_path / "model")
    model = str(tmp_path / "model")
    config = EvalTools(model, n=3, sets="calculator,chat", max_tokens=10, out=tmp_path / "out")
    assert tool_use.main(replace(config, json=True)) == 0
    result = json.loads(capsys.readouterr().out)
    rows = base.read_rows(Path(result["rows"]))
    assert len(rows) == 2 * (3 * 3 + 3) and len(rows["calculator/en/1"]["prompt"]) > 50
    for lang in ("en", "zh"):
        right = [rows[f"calculator/{lang}/{at}"]["verdicts"]["arguments exact"] for at in (1, 2, 3)]
        figure = result["figures"][f"  calculator: arguments exact ({lang})"]
        assert (figure["value"], figure["n"]) == (sum(right) / 3, 3)
    before = Path(result["rows"]).read_text()
    assert tool_use.main(config) == 0
    shown = capsys.readouterr().out
    assert Path(result["rows"]).read_text() == before and "arguments exact" in shown and "calculator, held" in shown
    assert tool_use.main(replace(config, against=model)) == 0
    assert "difference" in capsys.readouterr().out


def test_on_a_chat_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents tools that stay on offer when they are off, and a grammar that no server follows in the figures."""

    def replies(request: Request) -> None:
        offered = {each["function"]["name"] for each in request.body.get("tools", ())}
        if "Calculate" in offered and request.body["messages"][-1]["role"] == "user":
            request.stream(calls(("Calculate", json.dumps({"expression": "340*0.17"}))))
        else:
            request.stream(says("It is 57.8."))

    with FakeServer(replies, repeats=True) as server:
        config = EvalTools(f"{server.url}#m", sets="hand", langs="en", limit=1, out=tmp_path / "out", json=True)
        assert tool_use.main(config) == 0
    result = json.loads(capsys.readouterr().out)
    values = {name: figure["value"] for name, figure in result["figures"].items() if not name.startswith(" ")}
    assert values["calculator: called when on"] == values["calculator: right answer when off"] == 1
    assert values["calculator: called when off"] == 0 and not any("grammar" in name for name in values)
    assert result["notes"] == ["a server follows no grammar, so nothing was held by it"]
