"""Questions with choices: files, prompts, scores and rows, of a toy that can be computed by hand."""

from __future__ import annotations

import csv
import gc
import json
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moss import resolve
from moss.engine import Engine
from moss.errors import UsageError
from moss.evals import base, choice, judge, perplexity, truthful
from moss.evals.choice import MMLU, continuations, plain, questions, read
from moss.evals.judge import Judge
from moss.evals.perplexity import Perplexity
from moss.evals.truthful import TruthfulQA, judged
from moss.model import Decoder, ModelConfig
from moss.tokenizer import Tokenizer, add_markers
from moss.weights import read_config, save_model
from tests.fake_server import FakeServer, completes, says
from tests.test_tokenizer import bare

EN = choice.Set({}, "en")
QUESTIONS = [("What is 1+1?", "1", "2", "3", "4", "B"), ("天空是什么颜色？", "蓝", "绿", "红", "黑", "A")]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chat models and a base of text alone, of few weights and 2,048 tokens."""
    folder = tmp_path_factory.mktemp("toys")
    tok = Tokenizer(bare("What is 1+1? Answer: A B C D 天空 蓝 Q: the of and"))
    for seed, (name, own) in enumerate({"a": add_markers(tok), "b": add_markers(tok), "base": tok}.items()):
        model = Decoder(ModelConfig(own.vocab_size, 2, 32, 4, max_length=2048))
        model.init_weights(seed)
        save_model(model, folder / name, eos=own.eos)
        own.save(folder / name)
    return folder


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    """Two subjects of seven questions, each with five examples."""
    for part, count in (("dev", 5), ("test", 7)):
        (tmp_path / "set" / part).mkdir(parents=True)
        for subject in ("anatomy", "philosophy"):
            rows = [
                (f"{subject} {part} {number}: {text}", *rest)
                for number in range(count)
                for text, *rest in QUESTIONS[:1]
            ]
            write(tmp_path / "set" / part / f"{subject}_{part}.csv", rows)
    return tmp_path / "set"


def write(file: Path, rows: list[Any]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows(rows)
    return file


# ---------------------------------------------------------------- files


LAYOUTS = {
    "mmlu": QUESTIONS,
    "named": [("question", "A", "B", "C", "D", "answer"), *QUESTIONS],
    "ceval": [("id", "question", "A", "B", "C", "D", "answer", "explanation"), *((0, *q, "x") for q in QUESTIONS)],
    "cmmlu": [("", "Question", "A", "B", "C", "D", "Answer"), *((0, *q) for q in QUESTIONS)],
    "numbered": [
        ("question", "choice0", "choice1", "choice2", "choice3", "answer"),
        *((*q[:5], "ABCD".index(q[5])) for q in QUESTIONS),
    ],
}


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
def test_published_layouts_are_read(rows: list[Any], tmp_path: Path) -> None:
    """Prevents a head that passes for a question, and columns that are taken for others."""
    found = questions(write(tmp_path / "x.csv", rows), "x")
    assert [(each.text, each.choices, each.answer) for each in found] == [
        ("What is 1+1?", ("1", "2", "3", "4"), 1),
        ("天空是什么颜色？", ("蓝", "绿", "红", "黑"), 0),
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("q", "1", "2", "3", "4", "E")], "line 1: the answer is 'E'"),
        ([*QUESTIONS, ("q", "1", "2", "3", "4", "")], "line 3: the answer is ''"),
        ([("q", "1", "2", "3", "4", "2")], "line 1: the answer is '2'"),
        ([("q", "1", "2")], "line 1: 3 columns"),
        ([("question", "A", "B", "C", "D", "answer")], "is empty"),
        ([], "is empty"),
    ],
)
def test_a_broken_question_is_named(rows: list[Any], words: str, tmp_path: Path) -> None:
    """Prevents a right answer that is guessed, and a column that slips."""
    with pytest.raises(ValueError, match=words):
        questions(write(tmp_path / "x.csv", rows), "x")


def test_what_is_missing_is_named_with_where_to_get_it(mmlu: Path, tmp_path: Path) -> None:
    """Prevents a riddle for who has no set yet."""
    with pytest.raises(UsageError, match=r"--data is missing.*hendrycks"):
        choice.main(MMLU())
    with pytest.raises(UsageError, match=r"--data is missing.*sylinrl"):
        truthful.main(TruthfulQA())
    for folder, words in ((tmp_path / "none", "there is no folder"), (tmp_path, "no folder test or val")):
        with pytest.raises(ValueError, match=words):
            read(folder, 5)
    with pytest.raises(UsageError, match=r"no law; it has anatomy, philosophy"):
        read(mmlu, 5, "law")
    (mmlu / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(ValueError, match=r"anatomy_dev.csv with the examples is missing.*--shots 0"):
        read(mmlu, 5)
    assert [len(asked) for _, asked in read(mmlu, 0, limit=3).subjects.values()] == [3, 3]


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "anatomy_test.csv is empty"), ([("q", "1", "2")], "anatomy_test.csv line 1: 3 columns")],
)
def test_a_broken_test_is_not_replaced_by_val(rows: list[Any], words: str, mmlu: Path) -> None:
    """Prevents other questions in the place of a broken file, which is taken for one of C-Eval without answers."""
    shutil.copytree(mmlu / "dev", mmlu / "val")
    write(mmlu / "test" / "anatomy_test.csv", rows)
    with pytest.raises(ValueError, match=words):
        read(mmlu, 5)


# ---------------------------------------------------------------- the Chinese sets


@pytest.fixture
def ceval(tmp_path: Path) -> Path:
    """Three subjects as C-Eval has them: examples with explanations, questions of val, and a test without answers."""
    heads = {"dev": ("answer", "explanation"), "val": ("answer",), "test": ()}
    for part, more in heads.items():
        (tmp_path / "ceval" / part).mkdir(parents=True)
        for subject in ("law", "marxism", "high_school_physics"):
            rows: list[Any] = [("id", "question", "A", "B", "C", "D", *more)]
            for number in range(5 if part == "dev" else 3):
                own = (number, f"{subject} {part} {number}：天空是什么颜色？", "蓝", "绿 ", "红, 或\n紫", "黑")
                rows.append((*own, *("C", "因为\n如此。")[: len(more)]))
            write(tmp_path / "ceval" / part / f"{subject}_{part}.csv", rows)
    return tmp_path / "ceval"


@pytest.fixture
def cmmlu(tmp_path: Path) -> Path:
    """Three subjects as CMMLU has them, and what a Mac leaves in a folder."""
    for part, count in (("dev", 5), ("test", 3)):
        (tmp_path / "cmmlu" / part).mkdir(parents=True)
        for subject in ("agronomy", "chinese_history", "high_school_physics"):
            rows = [(n, f"{subject} {part} {n}：天空是什么颜色？", "蓝", "绿", "红", "黑", "A") for n in range(count)]
            write(tmp_path / "cmmlu" / part / f"{subject}.csv", [("", "Question", "A", "B", "C", "D", "Answer"), *rows])
        (tmp_path / "cmmlu" / part / "._agronomy.csv").write_bytes(b"\0\xff")
    return tmp_path / "cmmlu"


def test_subjects_are_those_that_are_published() -> None:
    """Prevents a subject that no group counts, or that has no name: numbers of the papers."""
    sizes = {name: [len(group) for group in told["groups"].values()] for name, told in choice.KNOWN.items()}
    assert sizes == {"mmlu": [19, 13, 12, 13], "ceval": [20, 10, 11, 11], "cmmlu": [17, 13, 22, 15, 15]}
    for name in ("ceval", "cmmlu"):
        groups, names = choice.KNOWN[name]["groups"], choice.KNOWN[name]["names"]
        parted = [subject for group in groups if group != "China specific" for subject in groups[group]]
        assert sorted(parted) == sorted(names) and len({*names.values()}) == len(names)


def test_ceval_is_asked_from_val(toys: Path, ceval: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents a set that dies of the answers that its authors keep, and a prompt that is nearly that of others."""
    asked = read(ceval, 2)
    assert (asked.name, asked.lang) == ("ceval", "zh") and "holds no answers: the questions are those of" in asked.note
    assert asked.groups == {
        "STEM": ["high_school_physics"],
        "Social Science": ["marxism"],
        "Humanities": ["law"],
    }
    (first, _), (question, *_) = asked.subjects["marxism"]
    assert plain([first], question, asked) == (
        "以下是中国关于马克思主义基本原理的单项选择题，请选出其中的正确答案。\n\n"
        "marxism dev 0：天空是什么颜色？\nA. 蓝\nB. 绿 \nC. 红, 或\n紫\nD. 黑\n答案： C\n\n"
        "marxism val 0：天空是什么颜色？\nA. 蓝\nB. 绿 \nC. 红, 或\n紫\nD. 黑\n答案："
    )
    assert choice.main(MMLU(str(toys / "a"), data=ceval, out=tmp_path / "out", json=True)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["notes"] == [asked.note] and told["figures"]["accuracy"]["n"] == 9
    assert [*told["figures"]][1:4] == ["STEM", "Social Science", "Humanities"] and "  law" in told["figures"]
    for file in (ceval / "test").iterdir():  # as they come from the hub: with a column that is empty
        rows = [*csv.reader(file.read_text().splitlines())]
        write(file, [(*row, "answer" if not number else "") for number, row in enumerate(rows)])
    assert read(ceval, 2) == asked
    (ceval / "val").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="holds no answers, as that of C-Eval; copy its folder val"):
        read(ceval, 2)


def test_cmmlu_is_read_as_it_is_published(
    toys: Path, cmmlu: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Prevents files without a suffix that are not found, and a subject that stands in one group of its two."""
    asked = read(cmmlu, 5)
    assert (asked.name, asked.lang, asked.note) == ("cmmlu", "zh", "")
    (first, *_), (question, *_) = asked.subjects["chinese_history"]
    assert plain([first], question, asked).startswith(
        "以下是关于中国历史的单项选择题，请直接给出正确答案的选项。\n\nchinese_history dev 0：天空是什么颜色？\nA. 蓝\n"
    )
    assert choice.main(MMLU(str(toys / "a"), data=cmmlu, out=tmp_path / "out", json=True)) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert [*figures][1:5] == ["STEM", "Humanities", "Other", "China specific"]
    assert figures["China specific"] == figures["Humanities"] == figures["  chinese_history"]
    (cmmlu / "dev" / "agronomy.csv").unlink()
    with pytest.raises(ValueError, match=r"dev/agronomy.csv with the examples is missing"):
        read(cmmlu, 5)


def test_a_set_is_known_by_its_subjects() -> None:
    """Prevents groups and names of another set, for many subjects are in two or three."""
    for name, told in choice.KNOWN.items():
        every = sorted({subject for group in told["groups"].values() for subject in group})
        assert {choice.set_of(every, lang, ends) for lang in ("en", "zh") for ends in (True, False)} == {name}
    both = ["high_school_physics"]
    assert [choice.set_of(both, "zh", ends) for ends in (True, False)] == ["ceval", "cmmlu"]
    assert choice.set_of(["anatomy"], "en", True) == "mmlu" and choice.set_of(["anatomy", "x", "y"], "en", True) == ""


# ---------------------------------------------------------------- prompts


def test_a_prompt_by_hand() -> None:
    """Prevents a template that is nearly that of others: one blank more, and scores are not theirs."""
    first, second = questions_of(QUESTIONS)
    assert plain([first], first, EN) == (
        "The following are multiple choice questions (with answers) about high school x.\n\n"
        "What is 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "What is 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert plain([second], second, choice.Set({}, "zh", "cmmlu")) == (
        "以下是关于high school x的单项选择题，请直接给出正确答案的选项。\n\n"
        "天空是什么颜色？\nA. 蓝\nB. 绿\nC. 红\nD. 黑\n答案： A\n\n"
        "天空是什么颜色？\nA. 蓝\nB. 绿\nC. 红\nD. 黑\n答案："
    )


def questions_of(rows: list[Any]) -> list[choice.Question]:
    return [choice.Question("high_school_x", 0, q, tuple(rest[:4]), "ABCD".index(rest[4])) for q, *rest in rows]


def subject(folder: Path) -> base.Subject:
    with base.subject(str(folder), MMLU()) as who:
        return who


def test_each_example_is_a_turn(toys: Path) -> None:
    """Prevents examples inside a question, and a letter that is scored with the marker behind it."""
    first, second = questions_of(QUESTIONS)
    who = subject(toys / "a")
    shots, found = continuations([first, first], second, who, EN, True)
    said = [who.tokens.decode([*each.prompt, *each.answer], markers=True) for each in found]
    assert shots == 2 and said[0][:-1] == said[3][:-1] and [each[-1] for each in said] == list("ABCD")
    assert said[0].count("<|Human|>") == 3 and said[0].count("The following are") == 1
    assert said[0].count("<|MOSS|>: B<eom>") == 2 and said[0].endswith(
        "Answer:<eoh>\n" + said[0].split("Answer:<eoh>\n")[-1]
    )


def test_a_model_that_knows_tags_is_asked_for_the_best(toys: Path) -> None:
    """Prevents likelihoods of a model of `moss train pat` in a way in which nobody uses it."""
    (question, _), who = questions_of(QUESTIONS), replace(subject(toys / "a"), quality=100)
    _, found = continuations([question], question, who, EN, True)
    said = who.tokens.decode([*found[0].prompt, *found[0].answer], markers=True)
    assert said.endswith("<|MOSS|>: <quality: 100> A") and said.count("quality") == 1


def test_examples_that_do_not_fit_are_left_out(toys: Path) -> None:
    """Prevents a prompt that is cut in the middle of an example, or of the question."""
    first, second = questions_of(QUESTIONS)
    who = subject(toys / "base")
    long = replace(first, text="z9 " * 400)
    shots, found = continuations([long, long, first], second, who, EN, False)
    assert shots == 2 and len(found[0].prompt) + 1 <= 2048
    assert who.tokens.decode(found[0].prompt).startswith("The following")
    with pytest.raises(ValueError, match=r"high_school_x/0 alone takes more than the 2048 tokens"):
        continuations([], replace(first, text="z9 " * 999), who, EN, False)


# ---------------------------------------------------------------- scores


def by_hand(folder: Path, text: str, answers: list[str]) -> list[float]:
    """The log-probability of each answer after a text: a forward of the whole."""
    model, tok = resolve.load(folder, chat=False)
    found, prompt = [], len(tok.encode(text))
    for answer in answers:
        ids = tok.encode(text + answer)
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([ids]))[0].double(), dim=-1)
        found.append(sum(float(scores[at - 1, ids[at]]) for at in range(prompt, len(ids))))
    return found


def test_scores_choice_and_accuracy(toys: Path, mmlu: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents the letter of another choice, and an accuracy of another part."""
    config = MMLU(str(toys / "base"), data=mmlu, out=tmp_path / "out", shots=1, json=True)
    assert choice.main(config) == 0
    told = json.loads(capsys.readouterr().out)
    rows = list(base.read_rows(Path(told["rows"])).values())
    asked = read(mmlu, 1)
    for row in rows:
        subject, _, number = row["id"].partition("/")
        examples, found = asked.subjects[subject]
        expected = by_hand(toys / "base", plain(examples, found[int(number)], asked), [" A", " B", " C", " D"])
        assert row["scores"] == pytest.approx(expected, rel=1e-4)
        assert row["choice"] == "ABCD"[expected.index(max(expected))] and row["answer"] == "B"
    right = [row["choice"] == "B" for row in rows]
    assert told["figures"]["accuracy"]["value"] == pytest.approx(sum(right) / 14) and len(rows) == 14
    assert (
        told["figures"]["STEM"]["value"] == told["figures"]["  anatomy"]["value"] == pytest.approx(sum(right[:7]) / 7)
    )


def test_mc1_and_mc2_by_hand() -> None:
    """Prevents a best answer that wins against true ones, and shares of logarithms."""
    question = truthful.Question(0, "x", "q", "best", ("best", "good"), ("bad", "worse"))
    assert question.answers == ["best", "good", "bad", "worse"]
    told = judged(question, [-2.0, -1.0, -3.0, -4.0])
    true, false = 2.718281828**-2 + 2.718281828**-1, 2.718281828**-3 + 2.718281828**-4
    assert told["mc1"] == 1.0 and told["mc2"] == pytest.approx(true / (true + false))
    assert judged(question, [-3.5, -1.0, -3.0, -4.0])["mc1"] == 0.0
    assert judged(question, [-2000.0, -1999.0, -3000.0, -4000.0])["mc2"] == 1.0  # where probabilities are 0


def test_truthfulqa_of_both_styles(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents answers without the primer, and a chat model that is asked in plain text unless told."""
    rows = [("Type", *truthful.COLUMNS[:3], "Best Incorrect Answer", *truthful.COLUMNS[3:], "Source")]
    rows += [("x", "c", f"What is {n}?", "the 1", "y", "the 1; a 1", "of 2; and 3;", "url") for n in range(3)]
    file = write(tmp_path / "t.csv", rows)
    for name, style in (("a", "chat"), ("base", "plain")):
        assert truthful.main(TruthfulQA(str(toys / name), data=file, out=tmp_path / "out", json=True)) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["settings"]["style"] == style and told["figures"]["mc1"]["n"] == 3
    primer = truthful.PRIMER.read_text().strip()
    row = base.read_rows(Path(told["rows"]))["1"]
    answers = [" the 1", " a 1", " of 2", " and 3"]
    assert row["scores"] == pytest.approx(by_hand(toys / "base", f"{primer}\n\nQ: What is 1?\nA:", answers), rel=1e-4)
    write(file, [("Question", "Best Answer"), ("q", "b")])
    with pytest.raises(ValueError, match="no column 'Category'"):
        truthful.read(file)
    write(file, [*rows, ("x", "c", "q", "b", "y", "", "f", "url")])
    with pytest.raises(ValueError, match="line 5: a question needs"):
        truthful.read(file)


# ---------------------------------------------------------------- rows and runs


def test_two_models_are_paired(toys: Path, mmlu: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents the difference of two models over different questions."""
    settings: dict[str, Any] = {"data": mmlu, "out": tmp_path / "out", "json": True, "limit": 4}
    assert choice.main(MMLU(str(toys / "a"), str(toys / "b"), **settings)) == 0
    told = json.loads(capsys.readouterr().out)
    rows = [base.read_rows(Path(each["rows"])) for each in told["models"]]
    apart = [float(rows[0][id]["right"]) - float(rows[1][id]["right"]) for id in rows[0]]
    assert len(apart) == 8 and told["difference"]["accuracy"]["value"] == pytest.approx(sum(apart) / 8)
    assert told["models"][0]["rows"] != told["models"][1]["rows"]
    assert choice.main(MMLU(str(toys / "a"), str(toys / "b"), **settings | {"json": False})) == 0
    shown = capsys.readouterr().out
    assert "difference" in shown and "accuracy" in shown


def test_nothing_is_asked_twice(
    toys: Path, mmlu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Prevents hours that are lost by a crash, rows of another model, template or question, and a half line."""
    config = MMLU(str(toys / "a"), data=mmlu, out=tmp_path / "out", json=True)
    seen, crash = list[int](), ["a crash"]
    original = base.Subject.likelihoods
    monkeypatch.setattr(choice, "AT_ONCE", 4)

    def counting(who: base.Subject, asked: list[Any]) -> list[Any]:
        seen.append(len(asked) // 4)
        if crash and sum(seen) == 12:
            raise RuntimeError(crash.pop())
        return original(who, asked)

    monkeypatch.setattr(base.Subject, "likelihoods", counting)
    with pytest.raises(RuntimeError, match="a crash"):
        choice.main(config)
    path = next((tmp_path / "out").rglob("rows.jsonl"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # as a crash leaves it
    seen.clear()
    assert choice.main(config) == 0
    assert sum(seen) == 14 - 7
    first = capsys.readouterr().out
    seen.clear()
    assert choice.main(config) == 0 and not seen and capsys.readouterr().out == first
    for other in ({"style": "plain"}, {"shots": 1}, {"model": str(toys / "b")}):
        assert choice.main(replace(config, **other)) == 0
        assert sum(seen) == 14, other
        seen.clear()
    write(mmlu / "test/anatomy_test.csv", [QUESTIONS[0]] * 7)
    assert choice.main(config) == 0 and sum(seen) == 7


def test_the_same_weights_computed_otherwise_are_another_model(toys: Path, tmp_path: Path) -> None:
    """Prevents rows of before where the config of a model, or of an adapter, was changed beside the same weights."""
    shutil.copytree(toys / "a", tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    config = json.loads(file.read_text())

    def key() -> str:
        with base.subject(str(tmp_path / "a"), MMLU()) as who:
            return who.print

    before = key()
    file.write_text(json.dumps(config | {"rope_theta": 50.0}))
    assert key() != before
    file.write_text(json.dumps(config, indent=2) + "\n")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "a")}))
    assert [each.name for each in base.configs(tmp_path / "lora")] == ["config.json", "adapter_config.json"]


def test_the_first_model_is_gone_before_the_second_comes(
    toys: Path, mmlu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents two models at a time in a memory that holds one."""
    alive: list[int] = []
    loaded = list[weakref.ref[Decoder]]()
    original = base.load

    def load(*args: Any, **more: Any) -> Any:
        gc.collect()
        alive.append(sum(each() is not None for each in loaded))
        model, tok = original(*args, **more)
        loaded.append(weakref.ref(model))
        return model, tok

    monkeypatch.setattr(base, "load", load)
    assert choice.main(MMLU(str(toys / "a"), str(toys / "b"), data=mmlu, out=tmp_path, limit=1)) == 0
    assert judge.main(Judge(str(toys / "a"), str(toys / "b"), n=2, max_tokens=2, out=tmp_path)) == 0
    assert alive == [0, 0, 0, 0]


def test_what_gives_no_text_is_named(toys: Path, mmlu: Path, tmp_path: Path) -> None:
    """Prevents a traceback, or figures of nothing, for a preference model."""
    config, tok = read_config(toys / "a"), Tokenizer.load(toys / "a")
    save_model(Decoder(config, "scalar"), tmp_path / "judge", eos=tok.eos)
    tok.save(tmp_path / "judge")
    with pytest.raises(ValueError, match="holds a preference model"):
        choice.main(MMLU(str(tmp_path / "judge"), data=mmlu, out=tmp_path / "out"))


def test_a_base_is_not_asked_in_conversations(toys: Path, mmlu: Path, tmp_path: Path) -> None:
    """Prevents markers that a model has never seen."""
    with pytest.raises(UsageError, match="does not know the format of conversations; take --style plain"):
        choice.main(MMLU(str(toys / "base"), data=mmlu, out=tmp_path, style="chat"))


@pytest.mark.skipif("MOSS_TEST_DATA" not in os.environ, reason="set MOSS_TEST_DATA to the folder with real data")
def test_real_sets_are_read() -> None:
    """Prevents a reader for files that nobody has."""
    data = Path(os.environ["MOSS_TEST_DATA"])
    asked = read(data / "mmlu", 5)
    assert len(asked.subjects) == 6 and asked.name == "mmlu"
    assert all(len(examples) == 5 and len(found) > 90 for examples, found in asked.subjects.values())
    assert len(truthful.read(data / "TruthfulQA.csv")) > 100


# ---------------------------------------------------------------- servers


def test_a_completion_server_tells_the_same(
    toys: Path, mmlu: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Prevents scores of a server that are those of other places than scores in memory."""
    settings: dict[str, Any] = {"data": mmlu, "out": tmp_path / "out", "json": True, "limit": 1}
    with (
        Engine(resolve.load(toys / "base", chat=False)[0]) as behind,
        FakeServer(completes(behind), repeats=True) as it,
    ):
        there = MMLU(f"{it.url}#m", str(toys / "base"), tokenizer=toys / "base", **settings)
        assert choice.main(there) == 0
    far, near = json.loads(capsys.readouterr().out)["models"]
    with pytest.raises(UsageError, match="--tokenizer is for a model on a server"):
        choice.main(replace(there, model=None, against=None))
    for mine, theirs in zip(*(base.read_rows(Path(told["rows"])).values() for told in (near, far)), strict=True):
        assert mine["scores"] == pytest.approx(theirs["scores"], rel=1e-5) and mine["prompt"] == theirs["prompt"]


def test_a_chat_server_is_asked_in_words(mmlu: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents a letter that is guessed, likelihoods that a server does not tell, and a silence about it."""
    said = ["B", "The answer is B.", "I do not know."]
    (tmp_path / "a.txt").write_text("What is it?")
    settings: dict[str, Any] = {"data": mmlu, "out": tmp_path / "out", "json": True, "limit": 3, "subjects": "anatomy"}
    with FakeServer(*map(says, said)) as server:
        assert choice.main(MMLU(f"{server.url}#m", **settings)) == 0
        told = json.loads(capsys.readouterr().out)
        assert choice.main(MMLU(f"{server.url}#m", **settings)) == 0 and len(server.asked) == 3  # and not once more
        with pytest.raises(UsageError, match="--style plain: m is a chat server"):
            choice.main(MMLU(f"{server.url}#m", style="plain", **settings))
        with pytest.raises(UsageError, match="tells no probabilities"):
            perplexity.main(Perplexity(f"{server.url}#m", data=[tmp_path / "a.txt"], out=tmp_path))
    rows = base.read_rows(Path(told["rows"])).values()
    assert sorted(row["choice"] for row in rows) == ["", "B", "B"] and told["figures"]["accuracy"]["value"] == 2 / 3
    assert "1 replies name none" in told["notes"][0]
    assert [message["role"] for message in server.asked[0]["messages"]] == [
        "system",
        *["user", "assistant"] * 5,
        "user",
    ]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        *(("B", "B"), (" **C**\n", "C"), ("A. 1", "A"), ("B) because A is wrong", "B"), ("The answer is (D).", "D")),
        *(("答案是 C。", "C"), ("选 B", "B"), ("First I say A, but the answer: B", "B"), ("It must be D", "D")),
        *(
            ("A dog, so C", "C"),
            ("A dog is an animal", ""),
            ("B or C", ""),
            ("I cannot tell", ""),
            ("ABCD", ""),
            ("", ""),
            ("Option A is wrong and option B is wrong, so it must be C.", ""),
            ("选项B正确，选项A错误", ""),
            ("答案是B。选项D错误。", "B"),
            ("The correct option is: C", "C"),
            ("Which option? A dog.", ""),
            ("Neither A nor B", ""),
            ("A. red\nB. blue\nC. green\nD. black\nI do not know.", ""),
            ("A. red\nB. blue\nThe answer is B", "B"),
        ),
    ],
)
def test_the_letter_that_a_reply_names(reply: str, letter: str) -> None:
    """Prevents an article that passes for an answer, and a choice of two."""
    assert choice.letter_in(reply) == letter
