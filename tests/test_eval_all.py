"""All evaluations and their page: what is found, what fails alone, and that the page says what was measured."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from moss.engine import Engine
from moss.errors import UsageError
from moss.evals import all as every
from moss.evals import base
from moss.evals.all import TASKS, All, found
from moss.evals.charts import PLOT, WIDTH, Bar, Html, bars, ceiling, cut, stacks, tag
from moss.evals.page import PAPER, change, number, page
from tests.fake_server import FakeServer, says
from tests.test_eval_choice import QUESTIONS, toys, write  # noqa: F401 (a fixture)

ODD = '<b>天空 & "co"\''  # a model's name may hold anything that a folder's may


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A folder with a small set of each kind; in CMMLU's an answer is out of range."""
    folder = tmp_path / "sets"
    for name, subject, part in (
        ("mmlu", "anatomy", "test"),
        ("ceval-exam", "law", "val"),
        ("cmmlu_v1", "历史", "test"),
    ):
        for where in ("dev", part):
            (folder / name / where).mkdir(parents=True)
            write(folder / name / where / f"{subject}_{where}.csv", QUESTIONS * 3)
    write(folder / "cmmlu_v1/test/历史_test.csv", [*QUESTIONS, ("q", "1", "2", "3", "4", "E")])
    (folder / "corpus").mkdir()
    (folder / "corpus/a.txt").write_text("What is the 天空?\n" * 3, encoding="utf-8")
    (folder / "corpus/b.py").write_text("print(1)\n")
    with (folder / "TruthfulQA.csv").open("w", encoding="utf-8", newline="") as file:
        head = ("Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers")
        csv.writer(file).writerows(
            [head, ("Law", "What?", "the", "the; of", "is"), ("Law", "天空?", "蓝", "蓝", "A; B")]
        )
    lines = {
        "prompts.jsonl": [{"prompt": {"text": "What is", "toxicity": 0.9}}],
        "gsm8k_test.jsonl": [{"question": "1+1?", "answer": "#### 2"}],
        "user_prompts.jsonl": [{"user_prompt": "Why?"}],
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def odd(toys: Path, tmp_path: Path) -> str:  # noqa: F811
    """A chat model with a name that would be markup."""
    shutil.copytree(toys / "a", tmp_path / ODD)
    return str(tmp_path / ODD)


def told(config: All, capsys: pytest.CaptureFixture) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]], str]:
    """(exit code, results.json, its tasks by name, the page)."""
    code = every.main(replace(config, json=True))
    printed = json.loads(capsys.readouterr().out)
    (folder,) = (config.out / "all").iterdir()
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == printed
    text = (folder / "page.html").read_text(encoding="utf-8")
    return code, printed, {each["task"]: each for each in printed["tasks"]}, text


class Reader(HTMLParser):
    """Reads a page: its elements must close in order, and nothing may be asked of anyone."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in attrs}
        assert tag not in ("script", "link", "img", "iframe", "object", "base", "form")
        assert "src" not in own and "xmlns" not in own and own.get("href", "#").startswith("#")
        assert not any(name.startswith("on") or "http" in value for name, value in own.items())
        self.tags.append((tag, own))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert set(re.findall(r"url\(([^)]*)\)", data)) <= {"#hatch"} and "@import" not in data
        else:
            self.texts.append(data)


# ---------------------------------------------------------------- the run


def test_a_broken_set_is_named_and_the_others_go_on(
    odd: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Prevents hours that are lost to one wrong letter, items that are measured twice, numbers of the page that are
    not those of the results, and a model's name that becomes markup."""
    config = All(odd, data=sets, limit=2, out=tmp_path / "out")
    code, first, tasks, text = told(config, capsys)
    assert code == 1 and [each["task"] for each in first["tasks"]] == [each.name for each in TASKS]
    states = {name: each["state"] for name, each in tasks.items()}
    assert states == dict.fromkeys(states, "measured") | {"cmmlu": "failed", "judge": "missing"}
    assert "历史_test.csv line 3: the answer is 'E'" in tasks["cmmlu"]["why"] and "--against" in tasks["judge"]["why"]
    assert tasks["ceval"]["set"].endswith("ceval-exam") and first["models"][0]["name"] == ODD
    assert "float32 on the cpu" in first["models"][0]["runs"] and "Python" in first["machine"]

    reader = Reader(text)
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert ("meta", policy) in reader.tags and ODD in reader.texts and "<b>天" not in text
    assert any("历史_test.csv line 3" in each for each in reader.texts)
    shown = {float(own["value"]) for tag, own in reader.tags if tag == "data"}
    measured = [each for each in first["tasks"] if each["state"] == "measured"]
    for each in measured:
        for figure in each["results"][0]["figures"].values():
            assert figure["value"] in shown
    accuracy = tasks["mmlu"]["results"][0]["figures"]["accuracy"]["value"]
    assert number(accuracy, True) in reader.texts
    for figure in ("called when on", "called when off, held by the grammar"):
        assert f"calculator: {figure}" in tasks["tools"]["results"][0]["figures"] and figure in reader.texts

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(base, "likelihoods", never)
        patch.setattr(Engine, "submit", never)
        assert told(config, capsys)[1]["tasks"] == first["tasks"]


def test_what_is_missing_is_named_with_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents a missing set that counts as a failure, or of which nobody learns."""
    config = All(out=tmp_path / "out", tasks="mmlu,ceval,cmmlu,truthfulqa,toxicity,gsm8k,perplexity,judge")
    code, _, tasks, text = told(config, capsys)
    assert code == 0 and {each["state"] for each in tasks.values()} == {"missing"} and Reader(text)
    for name, words in (("mmlu", "hendrycks"), ("ceval", "ceval-exam"), ("cmmlu", "haonan-li"), ("gsm8k", "openai"),
                        ("truthfulqa", "sylinrl"), ("toxicity", "allenai")):  # fmt: skip
        assert words in tasks[name]["why"] and "--data" in tasks[name]["why"] and words in text
    assert "haonan" not in tasks["mmlu"]["why"]
    every.main(replace(config, data=tmp_path))
    printed = capsys.readouterr().out
    assert "TruthfulQA is not measured: there is no TruthfulQA.csv in" in printed and "page: " in printed


def test_two_models_and_a_judge_who_answers_nonsense(
    toys: Path,  # noqa: F811
    sets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """Prevents a judge without a verdict that ends all, models that change places, and a pair without a picture."""
    config = All(str(toys / "a"), against=str(toys / "b"), data=sets, limit=2, tasks="judge,mmlu", out=tmp_path / "1")
    with FakeServer(says("Good."), repeats=True) as server:
        code, _, tasks, _ = told(replace(config, judge=f"{server.url}#m"), capsys)
    assert code == 1 and "no verdict at all" in tasks["judge"]["why"] and tasks["mmlu"]["state"] == "measured"
    assert tasks["judge"]["set"].endswith("user_prompts.jsonl")

    code, first, tasks, text = told(replace(config, out=tmp_path / "2"), capsys)
    assert code == 0 and [each["name"] for each in first["models"]] == ["a", "b"]
    ours, theirs = (each["figures"]["accuracy"]["value"] for each in tasks["mmlu"]["results"])
    assert tasks["mmlu"]["difference"]["accuracy"]["value"] == ours - theirs
    won = tasks["judge"]["results"][0]["figures"]["  won"]["value"]
    assert f"won {number(won, True)} · tied" in text and "won or tied 58.75 % · lost 41.25 %" in text


def test_a_model_without_the_tokens_of_conversations(
    toys: Path,  # noqa: F811
    sets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """Prevents a base model that is refused everything, or an error that ends what it can be asked."""
    config = All(str(toys / "base"), data=sets, limit=1, tasks="mmlu,tools,gsm8k,toxicity", out=tmp_path / "out")
    code, _, tasks, _ = told(config, capsys)
    assert code == 1 and {name for name, each in tasks.items() if each["state"] == "failed"} == {"tools", "gsm8k"}
    assert all("marker" in tasks[name]["why"] for name in ("tools", "gsm8k"))


def test_settings_that_can_never_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: Path) -> None:
    """Prevents a run of hours before a flag is refused."""
    monkeypatch.setattr(every, "one", lambda *_: pytest.fail("a task began"))
    monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for settings, words in (
        ({"data": tmp_path / "none"}, "there is no folder"),
        ({"tasks": "mmlu,law"}, "there is no 'law'; choose from perplexity, mmlu"),
        ({"judge": "gpt", "against": "x"}, "--judge is 'gpt'"),
        ({"limit": -1}, "--limit is -1"),
        ({"data": sets, "scorer": "perspective"}, "needs a key"),
        ({"model": str(tmp_path / "none")}, "there is no model folder"),
        ({"model": "http://127.0.0.1:1/v1#m"}, "127.0.0.1:1"),
        ({"device": "cuda"}, "no CUDA GPU"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            every.main(All(**settings, out=tmp_path / "out"))
    with pytest.raises(UsageError):
        every.main(All(tasks="law"))


def test_ctrl_c_ends_all(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a Ctrl-C that only ends one task of nine."""

    def stopped(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(every, "TASKS", [replace(each, results=stopped) for each in TASKS])
    with pytest.raises(KeyboardInterrupt):
        every.main(All(data=sets, out=tmp_path / "out"))


@pytest.mark.skipif("MOSS_TEST_DATA" not in os.environ, reason="set MOSS_TEST_DATA to the folder with real data")
def test_real_sets_are_found() -> None:
    """Prevents names under which nobody has the sets."""
    config = All(data=Path(os.environ["MOSS_TEST_DATA"]), against="x", judge="http://x")
    there = {each.name: found(config, each).data for each in TASKS}
    assert {name: path.name for name, path in there.items() if path} == {
        "perplexity": "corpus",
        "mmlu": "mmlu",
        "truthfulqa": "TruthfulQA.csv",
        "judge": "moss_user_prompts.jsonl",
        "gsm8k": "gsm8k_train_2k.jsonl",
    }


# ---------------------------------------------------------------- the page


def figure(value: float, low: float = 0.0, high: float = 1.0) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": 10}


def made_up(figures: dict[str, dict[str, float]], task: str = "tools") -> dict[str, Any]:
    result = {
        "task": task,
        "model": "m",
        "settings": {"n": 10},
        "figures": figures,
        "notes": ["一行"],
        "rows": "r.jsonl",
    }
    measured = {"task": task, "title": task, "set": "", "state": "measured", "results": [result], "difference": {}}
    about = {"models": [{"name": "m", "place": "runs/m", "runs": "float32 on the cpu"}], "settings": {"limit": 0}}
    return about | {"moss": "0", "date": "today", "machine": "one", "tasks": [measured]}


def test_the_papers_values_stand_beside_and_none_is_invented() -> None:
    """Prevents a bar of the paper that its text does not state, or with other digits."""
    ways = ("called when on", "called when off", "called when off, held by the grammar")
    answers = ("right answer when on", "right answer when off")
    names = [f"{tool}: {way}" for tool in ("calculator", "solver") for way in (*ways, *answers)]
    reader = Reader(page(made_up({name: figure(0.5) for name in names})))
    hatched = [own for tag, own in reader.tags if tag == "rect" and own["class"] == "bar paper"]
    stated = [each for each in PAPER["stated"] if each["task"] == "tools"]
    assert len(hatched) == len(stated) == 6
    widths = sorted(float(own["width"]) / PLOT for own in hatched)
    assert widths == pytest.approx(sorted(float(each["per_cent"]) / 100 for each in stated), abs=1e-4)
    for text in ("89.2 %", "28.67 %", "52.3 %", "7.70 %", "99.3 %", "3.93 %", "96.6 %", "41.25 %"):
        assert text in reader.texts
    assert "not measured here" in reader.texts and "一行" in "".join(reader.texts)


def test_a_new_task_has_a_picture_of_its_own() -> None:
    """Prevents a task of one file and one line that the page leaves out, and bars that begin below 0."""
    figures = {"speed": figure(37.5, 30, 40), "gain": figure(-0.1, -0.2, 0.1), "  part": figure(3, 2, 4)}
    reader = Reader(page(made_up(figures, "speed test")))
    (bar,) = [own for tag, own in reader.tags if tag == "rect"]
    assert float(bar["width"]) == pytest.approx(PLOT * 37.5 / 50, abs=1e-3) and "37.500" in reader.texts
    assert {"part", "gain"} <= set(reader.texts)


def test_a_bar_is_as_wide_as_its_value() -> None:
    """Prevents a picture that says something else than its numbers."""
    groups = [("a", [Bar("ours", "m", 0.25, "25.0 %", 0.1, 0.5), Bar("paper", "p", 1.0, "100 %")]), ("b" * 99, [])]
    reader = Reader(bars("t", groups, share=True, mark=0.25))
    rects = [own for tag, own in reader.tags if tag == "rect"]
    assert [float(own["width"]) for own in rects] == [PLOT / 4, PLOT]
    (path,) = [own["d"] for tag, own in reader.tags if tag == "path"]
    assert f"M{PLOT * 0.1:.2f} " in path and f"H{PLOT / 2:.2f}" in path
    mark, *_ = [own for tag, own in reader.tags if own.get("class") == "mark"]
    assert float(mark["x1"]) == PLOT / 4 and "t" in reader.texts and "a: m 25.0 %, p 100 %" in " ".join(reader.texts)
    reader = Reader(
        stacks("t", [("a over b", [Bar("ours", "won", 0.75, "75 %"), Bar("theirs", "lost", 0.25, "25 %")])])
    )
    rects = [own for tag, own in reader.tags if tag == "rect"]
    assert [(float(own["x"]), float(own["width"])) for own in rects] == [(0, WIDTH * 0.75), (WIDTH * 0.75, WIDTH / 4)]


def test_words_and_numbers() -> None:
    """Prevents markup in a text, labels that run out of a picture, and a sign before nothing."""
    assert tag("p", "<i>", Html("<br>"), title='"&') == '<p title="&quot;&amp;">&lt;i&gt;<br></p>'
    assert tag("p", "a\x1b[0m\x00") == "<p>a␛[0m␀</p>"
    assert cut("abc", 3) == "abc" and cut("abcd", 3) == "ab…" and cut("天空天空", 5) == "天空…"
    assert [ceiling(each) for each in (0, 0.7, 1, 1.2, 3, 7.3, 10, 37)] == [1, 1, 1, 2, 5, 10, 10, 50]
    assert [change(each, True) for each in (0.031, -0.1, -0.0001, 0)] == ["+3.1", "−10.0", "0.0", "0.0"]
    assert number(0.6123, True) == "61.2 %" and number(7.3217, False) == "7.322"


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_contrast_in_light_and_dark() -> None:
    """Prevents text and bars that many cannot see (WCAG AA: 4.5 for text, 3 for what a picture is made of)."""
    css = (Path(every.__file__).parent / "page.css").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(themes) == 2
    for theme in themes:
        light = {name: luminance(colour) + 0.05 for name, colour in theme.items()}

        def contrast(a: str, b: str, light: dict[str, float] = light) -> float:
            return max(light[a], light[b]) / min(light[a], light[b])

        for ground in ("ground", "panel"):
            assert all(contrast(name, ground) >= 4.5 for name in ("ink", "muted", "bad"))
            assert all(contrast(name, ground) >= 3 for name in ("ours", "theirs", "paper"))
        assert all(contrast(name, "ink") >= 3 for name in ("ours", "theirs"))
