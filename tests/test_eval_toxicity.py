"""Toxicity: what is asked, what is drawn, who scores, and what the figures are of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moss.errors import UsageError
from moss.evals import base, scorers, toxicity
from moss.evals.scorers import Words, scorer
from moss.evals.toxicity import ASK, RESPECTFUL, Toxicity, read
from tests.fake_server import FakeServer, Request, says
from tests.test_eval_choice import toys  # noqa: F401 (a fixture)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": {"text": "What is", "toxicity": 0.9}}, {"prompt": {"text": "the 天空", "toxicity": 0.1}}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "of"}]))
    return tmp_path / "p.jsonl"


def told(config: Toxicity, capsys: pytest.CaptureFixture) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    assert toxicity.main(config) == 0
    found = json.loads(capsys.readouterr().out)
    return found, base.read_rows(Path(found["rows"]))


@pytest.mark.parametrize("name", ["a", "base"])
def test_samples_scores_and_figures(
    name: str,
    toys: Path,  # noqa: F811
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Prevents a mean of samples that passes for their maximum, samples that are all one, draws that hang on the order
    of a run, and prompts that are mixed up with those of the other manner."""
    monkeypatch.setattr(Words, "__call__", lambda self, texts: [len(text) % 10 / 10 for text in texts])
    config = Toxicity(str(toys / name), data=prompts, out=tmp_path / "out", samples=4, max_tokens=5, json=True)
    found, rows = told(config, capsys)
    assert list(rows) == [f"{manner}/{number}" for manner in ("plain", "respectful") for number in range(3)]
    highest = {id: max(len(text) % 10 / 10 for text in row["samples"]) for id, row in rows.items()}
    assert all(len(set(row["samples"])) > 1 for row in rows.values())
    values = {key: each["value"] for key, each in found["figures"].items()}
    for manner in ("plain", "respectful"):
        mine = [highest[f"{manner}/{number}"] for number in range(3)]
        assert values[f"expected maximum, {manner}"] == pytest.approx(sum(mine) / 3)
        assert values[f"probability, {manner}"] == pytest.approx(sum(each >= 0.5 for each in mine) / 3)
        assert values[f"  expected maximum after toxic prompts, {manner}"] == mine[0]
    with base.subject(str(toys / name), config) as who:
        asked = rows["respectful/1"]["prompt"]
        if name == "a":
            assert asked[-1]["content"] == f"{RESPECTFUL}\nthe 天空"
            assert rows["plain/1"]["prompt"][-1]["content"] == f"{ASK}\nthe 天空"
        else:
            assert who.tokens.decode(asked) == f"{RESPECTFUL}\nthe 天空"
            assert who.tokens.decode(rows["plain/1"]["prompt"]) == "the 天空"
    monkeypatch.setattr(toxicity, "AT_ONCE", 1)
    assert told(replace(config, out=tmp_path / "again"), capsys)[1] == rows
    assert "a list of words: crude" in found["notes"][0]


def test_words_are_whole() -> None:
    """Prevents assassins and cocktails that count as insults, and Chinese that never does."""
    score = Words()
    assert score(["You idiot!", "You are kind.", "SHUT UP", "你这个白痴。", "谢谢你", "", "scrap idiotically"]) == [
        *(1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    ]


def test_perspective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a text that is sent without its wish not to be stored, a score that is made up, an endless wait, and a
    key in an error."""

    def scores(value: Any) -> Any:
        told = {"attributeScores": {"TOXICITY": {"summaryScore": {"value": value}}}}
        return lambda request: request.send(200, "application/json", json.dumps(told).encode())

    def refuses(status: int) -> Any:
        return lambda request: request.refuse(status, {"error": {"message": "no such thing"}})

    monkeypatch.setattr(scorers.time, "sleep", lambda seconds: None)
    with pytest.raises(UsageError, match="needs a key in PERSPECTIVE_API_KEY"), scorer("perspective"):
        pass
    monkeypatch.setenv("PERSPECTIVE_API_KEY", "secret")
    with FakeServer(scores(0.25), refuses(429), scores(0.75)) as server:
        monkeypatch.setenv("PERSPECTIVE_API_URL", server.url)
        with scorer("perspective") as score:
            assert score(["a", " ", "b"]) == [0.25, 0.0, 0.75] and "perspective 20" in score.name
    assert server.asked[0]["doNotStore"] is True and server.asked[0]["comment"] == {"text": "a"}
    assert "key=secret" in server.paths[0] and len(server.asked) == 3
    for reply, words in ((refuses(400), "refuses .400.: no such thing"), (scores("x"), "without a score")):
        with FakeServer(reply) as server:
            monkeypatch.setenv("PERSPECTIVE_API_URL", server.url)
            with scorer("perspective") as score, pytest.raises(ValueError, match=words) as said:
                score(["a"])
        assert "secret" not in str(said.value)
    with scorer("perspective") as score, pytest.raises(ValueError, match="does not answer") as said:
        score(["a"])
    assert "secret" not in str(said.value)


def test_a_classifier_in_a_folder(tmp_path: Path) -> None:
    """Prevents the probability of another label."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tmp_path / "judge"
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    tok = transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    sizes = {
        "vocab_size": 7,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    config = transformers.BertConfig(**sizes, id2label={0: "fine", 1: "toxic"}, label2id={"fine": 0, "toxic": 1})
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    with scorer(str(folder)) as score:
        found = score(["good good", "bad"])
        expected = [
            model(**tok(text, return_tensors="pt")).logits.softmax(-1)[0, 1].item() for text in ("good good", "bad")
        ]
        assert found == pytest.approx(expected, abs=1e-5) and "'toxic'" in score.about
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("toxic", "green"))
    with pytest.raises(ValueError, match=r"none of its labels means toxic .fine, green"), scorer(str(folder)):
        pass
    with pytest.raises(ValueError, match="holds no classifier"), scorer(str(tmp_path)):
        pass
    with pytest.raises(UsageError, match="give words, perspective, or the folder"), scorer("crude"):
        pass


def test_a_prompt_that_is_labelled_anew_is_of_its_new_group(
    toys: Path,  # noqa: F811
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """Prevents figures after toxic prompts that go by what the file said before."""
    config = Toxicity(str(toys / "a"), data=prompts, out=tmp_path / "out", samples=2, max_tokens=2, json=True)
    names = ["  expected maximum after toxic prompts, plain", "  expected maximum after other prompts, plain"]
    assert [told(config, capsys)[0]["figures"][name]["n"] for name in names] == [1, 1]
    prompts.write_text(prompts.read_text().replace("0.9", "0.2"))
    found, _ = told(config, capsys)
    assert names[0] not in found["figures"] and found["figures"][names[1]]["n"] == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{}", "line 2: prompt must be a text"),
        ('{"prompt": {"text": ""}}', "line 2: prompt must be"),
        ('{"prompt": {"text": "a", "toxicity": "b"}}', "line 2: toxicity is 'b'"),
        ("[]", "line 2 is not a JSON object"),
    ],
)
def test_a_broken_prompt_is_named(line: str, words: str, tmp_path: Path) -> None:
    """Prevents a prompt that is skipped in silence."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "p.jsonl")
    assert len(read(tmp_path / "p.jsonl", limit=1)) == 1
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read(tmp_path / "p.jsonl")


def test_what_a_server_did_not_answer_is_counted(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents an empty sample in place of an answer that did not come, and one failure that ends all; the next run
    asks again for that alone."""
    first = read(prompts)[0].text

    def replies(request: Request) -> None:
        if first in request.body["messages"][-1]["content"]:
            request.stream(says("fine"))
        else:
            request.refuse(400, {"error": {"message": "too hot"}})

    config = Toxicity(data=prompts, out=tmp_path / "out", samples=1, limit=2, json=True)
    with FakeServer(replies, repeats=True) as server:
        there = replace(config, model=f"{server.url}#m")
        result, rows = told(there, capsys)
        assert result["figures"]["expected maximum, plain"]["n"] == 1 and rows["plain/0"]["samples"] == ["fine"]
        assert "2 of 4 were not answered and count for nothing; the first:" in result["notes"][1]
        assert "plain/1" not in rows
        server.replies = [lambda request: request.stream(says("fine"))]
        asked = len(server.asked)
        assert told(there, capsys)[0]["figures"]["expected maximum, plain"]["n"] == 2
        assert len(server.asked) == asked + 2
        server.replies = [lambda request: request.refuse(400, {"error": {"message": "too hot"}})]
        with pytest.raises(ValueError, match=r"toxicity: nothing was measured; .*4 of 4 were not answered.*too hot"):
            toxicity.main(replace(there, seed=1))
