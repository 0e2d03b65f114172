"""Pre-training: bits per byte, gradual unfreezing, going on from a base in another language, mixtures, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from moss import checkpoint
from moss.data import curriculum, mix
from moss.data.tokens import prepare
from moss.log import read as read_log
from moss.model import Decoder, ModelConfig
from moss.tokenizer import EOS, Tokenizer
from moss.train import loop, pretrain
from moss.train import tokenizer as tokenizer_stage
from moss.train.pretrain import Pretrain, Trainable, completed, freezer, per_byte, trainable
from moss.weights import load_model, save_model
from tests.test_extend import byte_level
from tests.test_tokenizer import TEXTS

LAYERS = 6  # of the base: one outer layer at either end is more than a quarter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English and Chinese text, a small English base in GPT-2's way, its tokenizer extended by Chinese."""
    folder = tmp_path_factory.mktemp("cross")
    texts = list(islice(curriculum.text(0), 400))
    for name, chinese in (("en", False), ("zh", True)):
        own = [text for text in texts if any("\u4e00" <= sign <= "\u9fff" for sign in text) == chinese]
        for part, rows in (("", own[20:]), ("_valid", own[:20])):
            lines = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}{part}.jsonl").write_text(lines)
    backend = byte_level([*TEXTS[:1], *texts[:40]], 400)
    backend.add_special_tokens([EOS])
    tok = Tokenizer(backend)
    config = ModelConfig(tok.vocab_size + 3, num_layers=LAYERS, hidden=16, num_heads=2, family="moss", max_length=128)
    model = Decoder(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))
    save_model(model, folder / "base", eos=tok.eos)
    tok.save(folder / "base")
    config = tokenizer_stage.TrainTokenizer(
        data=[folder / "zh.jsonl"], extend=folder / "base", vocab_size=tok.vocab_size + 60, out=folder / "zhtok"
    )
    assert tokenizer_stage.main(config) == 0
    return folder


def cross(folder: Path, **more: Any) -> Pretrain:
    values: dict[str, Any] = {
        "data": [Path(f"en={folder}/en.jsonl:1"), Path(f"zh={folder}/zh.jsonl:3")],
        "model": folder / "zhtok",
        "batch_tokens": 512,
        "length": 64,
        "compile": "off",
        "dtype": "float32",
        "lr": 1e-2,
        "steps": 10,
        "unfreeze": [0.4, 0.7],
    }
    return Pretrain(**(values | more))


# ---------------------------------------------------------------- bits per byte


def test_bits_per_byte_by_hand(made: Path, tmp_path: Path) -> None:
    """A factor of ln 2, tokens instead of bytes, or a first token that is left out: a model that knows nothing spends
    log2 V bits on each token and on each end of a document."""
    assert per_byte(3 * math.log(2), 6) == 0.5
    tok = Tokenizer.load(made / "base")
    texts = ["abc", "a longer one, of several rows " * 12, "中文"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = prepare([tmp_path / "a.jsonl"], tok, tmp_path / "tokens")
    rows = mix.TokenRows(tokens, 64)
    blank = Decoder(ModelConfig(tok.vocab_size, num_layers=1, hidden=8, num_heads=1))
    with torch.no_grad():
        blank.embed.weight.zero_()
        blank.head.weight.zero_()  # type: ignore[union-attr]
    config = completed(cross(made), pretrain.NEW)
    found = pretrain.Watch({"text": rows}, {}, config)(blank)
    count = sum(len(tok.encode(text)) + 1 for text in texts)
    assert found == {
        "bits_per_byte_text": pytest.approx(count * math.log2(tok.vocab_size) / sum(map(len, map(str.encode, texts))))
    }
    lost = pretrain.Watch({"text": rows}, {"text": 1.5, "gone": 1.0}, config)(blank)  # resumed with fewer --valid
    assert lost["forgetting_text"] == pytest.approx(found["bits_per_byte_text"] - 1.5)


def test_bits_per_byte_do_not_depend_on_the_length(made: Path, tmp_path: Path) -> None:
    """Rows whose cut leaves tokens out: a model without memory has the same loss in rows of any length."""
    tok = Tokenizer.load(made / "base")
    model = load_model(made / "base")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.weight.zero_()  # type: ignore[union-attr]
    tokens = prepare([made / "en_valid.jsonl"], tok, tmp_path / "tokens")
    found = []
    for length in (16, 64):
        config = completed(cross(made, length=length), pretrain.NEW)
        found.append(pretrain.Watch({"en": mix.TokenRows(tokens, length)}, {}, config)(model)["bits_per_byte_en"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# ---------------------------------------------------------------- gradual unfreezing


def test_what_learns_when_by_hand() -> None:
    """A phase that is a step too long, or a middle layer that learns too early."""
    everything = Trainable(True, frozenset(range(8)))
    outer = Trainable(False, frozenset({0, 1, 6, 7}))
    phases = [trainable(step, 20, 8, (0.1, 0.3)) for step in range(20)]
    assert phases == [Trainable(False, frozenset())] * 2 + [outer] * 4 + [everything] * 14
    assert trainable(0, 20, 8, (0.0, 0.0)) == everything
    assert trainable(3, 4, 8, (1.0, 1.0)) == Trainable(False, frozenset())
    assert trainable(0, 4, 5, (0.0, 0.5)).blocks == {0, 1, 3, 4} and trainable(0, 4, 1, (0.0, 0.5)).blocks == {0}


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder).named_parameters())


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], old: int) -> set[str]:
    """Which parts differ: `old rows`, `new rows`, the number of a block, `norm`."""
    found = set()
    for name, value in after.items():
        part = name.split(".")
        if part[0] in ("embed", "head"):
            found |= {"old rows"} if not torch.equal(before[name][:old], value[:old]) else set()
            found |= {"new rows"} if not torch.equal(before[name][old:], value[old:]) else set()
        elif not torch.equal(before[name], value):
            found.add(part[1] if part[0] == "blocks" else part[0])
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("matrix_lr", [0.0, 0.02])
def test_phase_by_phase(dtype: str, matrix_lr: float, made: Path, tmp_path: Path) -> None:
    """Old rows that drift by a bit while they are said to be frozen (weight decay, momentum, rounding), or layers that
    never learn. Ten steps: four of new rows, three with the outer layers, three of everything."""
    old = Tokenizer.load(made / "base").vocab_size
    config = cross(made, dtype=dtype, matrix_lr=matrix_lr, weight_decay=0.1, resume=True)
    ends: dict[int, dict[str, torch.Tensor]] = {}
    start = parameters(made / "base")
    for step in (1, 4, 5, 7, 8, 10):
        ends[step] = parameters(stopped(config, tmp_path / "run", step))
    rows = Tokenizer.load(made / "zhtok").vocab_size
    grown = {name: value for name, value in ends[1].items() if name.split(".")[0] in ("embed", "head")}
    assert all(len(value) == rows for value in grown.values()) and len(grown) == 3
    assert all(torch.equal(value[:old], start[name][:old]) for name, value in grown.items())
    assert changed(ends[1], ends[4], old) == {"new rows"}
    for name, value in start.items():
        assert name in grown or torch.equal(ends[4][name], value)
    assert changed(ends[4], ends[5], old) == changed(ends[4], ends[7], old) == {"new rows", "0", "1", "4", "5"}
    everything = {"old rows", "new rows", "norm", *map(str, range(LAYERS))}
    assert changed(ends[7], ends[8], old) == everything == changed(ends[8], ends[10], old)


def stopped(config: Pretrain, out: Path, step: int) -> Path:
    """The checkpoint of a run that was asked to stop after so many steps."""
    original = loop.judge

    def stop_there(state: loop.State, loss: float, norm: float) -> str:
        if state.step == step and step < config.steps:
            signal.raise_signal(signal.SIGTERM)
        return original(state, loss, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "judge", stop_there)
        assert pretrain.main(dataclasses.replace(config, out=out)) == 0
    found = checkpoint.newest(out, print)
    assert found and found.name == f"step-{step:06d}"
    return found


@pytest.mark.parametrize("step", [2, 4, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_in_any_phase_is_unbroken(dtype: str, step: int, made: Path, tmp_path: Path) -> None:
    """A phase, a position in the mixture or what is known of the base that a checkpoint does not hold."""
    valid = [Path(f"en={made}/en_valid.jsonl"), Path(f"zh={made}/zh_valid.jsonl")]
    config = cross(made, dtype=dtype, valid=valid, save_every=5, lr=None)
    assert pretrain.main(dataclasses.replace(config, out=tmp_path / "whole")) == 0
    stopped(config, tmp_path / "broken", step)
    again = dataclasses.replace(config, out=tmp_path / "broken", resume=True, model=None)  # the checkpoint knows it all
    assert pretrain.main(again) == 0
    for name in ("model.safetensors", "step-000010/model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("broken", "whole")]
    lines = [[{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in log] for log in logs]
    assert lines[0] == lines[1]
    told = [json.loads((tmp_path / name / "moss.json").read_text()) for name in ("broken", "whole")]
    assert told[0]["base"] == told[1]["base"] and told[0]["run"]["lr"] == 3e-5


def test_rows_are_frozen_from_the_gradient_on() -> None:
    """Gradients of frozen parts that still count in the norm by which all gradients are clipped."""
    model = Decoder(ModelConfig(10, num_layers=4, hidden=8, num_heads=1, family="moss"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    freeze = freezer(model, 7, [0.5, 0.75])
    assert freeze
    freeze(0, 4)
    left = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(left) == {"embed.weight", "head.weight", "head.bias"}
    assert all(grad[:7].eq(0).all() and grad[7:].eq(1).all() for grad in left.values())
    assert freezer(model, 0, []) is None and freezer(model, 7, [0.0, 0.0]) is None and freezer(model, 7, [])


# ---------------------------------------------------------------- from a base, in several languages


def test_another_language_is_learnt_and_the_first_is_watched(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Forgetting that is measured against a model that was changed already, or a language that is not learnt."""
    valid = [Path(f"en={made}/en_valid.jsonl"), Path(f"zh={made}/zh_valid.jsonl")]
    assert pretrain.main(cross(made, out=tmp_path / "run", valid=valid, steps=30, save_every=15)) == 0
    told = json.loads((tmp_path / "run/moss.json").read_text())
    base = told["base"]
    assert base["folder"] == str((made / "base").resolve()) and base["ids"] == Tokenizer.load(made / "base").vocab_size
    found = [line["valid"] for line in read_log(tmp_path / "run/log.jsonl") if "valid" in line]
    assert len(found) == 2 and found[1]["bits_per_byte_zh"] < found[0]["bits_per_byte_zh"]
    for name in ("en", "zh"):
        lost = found[1][f"bits_per_byte_{name}"] - base["bits_per_byte"][name]
        assert found[1][f"forgetting_{name}"] == pytest.approx(lost)
    # the base, measured by itself
    old, model = Tokenizer.load(made / "base"), load_model(made / "base")
    tokens = prepare([made / "en_valid.jsonl"], old, tmp_path / "tokens")
    config = completed(cross(made), pretrain.PAPER)
    alone = pretrain.Watch({"en": mix.TokenRows(tokens, 64)}, {}, config)(model)
    assert base["bits_per_byte"]["en"] == pytest.approx(alone["bits_per_byte_en"], rel=1e-6)
    said = capsys.readouterr().err
    assert "forgetting" in said and "new; each begins as the mean" in said
    assert set(told["data"]["sources"]) == {"en", "zh"} and told["data"]["shares"] == {"en": 0.25, "zh": 0.75}
    tok = Tokenizer.load(tmp_path / "run")
    assert (
        tok.sha256 == Tokenizer.load(made / "zhtok").sha256
        and load_model(tmp_path / "run").config.vocab_size == tok.vocab_size
    )


def test_forgetting_is_told_of_tokens_too(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With --valid as a folder of shards `no --valid` was said, and what was forgotten was not."""
    for name in ("base", "zhtok"):
        prepare([made / "en_valid.jsonl"], Tokenizer.load(made / name), tmp_path / name)
    config = cross(made, model=made / "base", valid=[Path(f"en={tmp_path}/base")], steps=1, unfreeze=[])
    assert pretrain.main(dataclasses.replace(config, out=tmp_path / "one")) == 0
    assert "forgetting_en" in capsys.readouterr().err
    other = dataclasses.replace(config, model=made / "zhtok", valid=[Path(f"en={tmp_path}/zhtok")])
    assert pretrain.main(dataclasses.replace(other, out=tmp_path / "two")) == 0
    said = capsys.readouterr().err
    assert "--valid en: tokens that the base does not read" in said and "no --valid" not in said


def test_what_is_not_given_comes_from_the_paper(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A base that is trained at the rate of a new model, a hundred times too high; or a flag that is not obeyed."""
    given = cross(made, lr=None, schedule="constant")
    assert dataclasses.asdict(completed(given, pretrain.PAPER)).items() >= {
        "lr": 3e-5, "matrix_lr": 0.0, "weight_decay": 0.1, "warmup": 0.02, "schedule": "constant",
    }.items()  # fmt: skip
    config = cross(made, out=tmp_path / "run", lr=None, steps=2, model=made / "base", unfreeze=[])
    assert pretrain.main(config) == 0
    assert "lr 3e-05, matrix_lr 0.0, weight_decay 0.1, warmup 0.02, schedule cosine" in capsys.readouterr().err
    run = json.loads((tmp_path / "run/moss.json").read_text())["run"]
    assert (run["lr"], run["schedule"]) == (3e-5, "cosine")
    new = cross(made, out=tmp_path / "new", lr=None, steps=1, model=None, depth=1, unfreeze=[])
    assert pretrain.main(new) == 0
    run = json.loads((tmp_path / "new/moss.json").read_text())["run"]
    assert (run["lr"], run["matrix_lr"], run["weight_decay"], run["schedule"]) == (3e-3, 0.02, 0.0, "linear")


def test_adapters_learn_another_language_too(made: Path, tmp_path: Path) -> None:
    """New rows that adapters leave as they began, or an adapter for the tokenizer's folder instead of the base's."""
    config = cross(made, out=tmp_path / "run", lora="r=2", unfreeze=[], steps=4, save_every=2)
    stopped(config, tmp_path / "run", 2)
    assert pretrain.main(dataclasses.replace(config, resume=True, model=None)) == 0
    assert pretrain.main(dataclasses.replace(config, out=tmp_path / "whole")) == 0
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    old, new = (Tokenizer.load(made / name).vocab_size for name in ("base", "zhtok"))
    told = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str((made / "base").resolve())
    assert all(rows == list(range(old, new)) for rows in told["trainable_token_indices"].values())
    before, after = parameters(made / "base"), parameters(tmp_path / "run")
    assert (
        len(after["embed.weight"]) == new
        and torch.equal(  # exported as bfloat16
            after["embed.weight"][:old], before["embed.weight"][:old].bfloat16().float()
        )
    )


def test_shards_of_another_run_are_read(made: Path, tmp_path: Path) -> None:
    """Tokenising a corpus again for each run."""
    first = cross(made, out=tmp_path / "one", steps=1)
    assert pretrain.main(first) == 0
    folders = [Path(f"{name}={tmp_path}/one/tokens/{name}:{share}") for name, share in (("en", 1), ("zh", 3))]
    assert pretrain.main(cross(made, out=tmp_path / "two", steps=1, data=folders)) == 0
    told = [json.loads((tmp_path / name / "moss.json").read_text())["data"] for name in ("one", "two")]
    assert told[0] == told[1] and not (tmp_path / "two/tokens").exists()


def test_it_works_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who only wants to see it run."""
    monkeypatch.setattr(pretrain, "MATERIAL", 40)
    assert pretrain.main(Pretrain(out=tmp_path / "run", steps=1, depth=1, batch_tokens=512, compile="off")) == 0
    assert json.loads((tmp_path / "run/moss.json").read_text())["data"]["rows"] == 40


# ---------------------------------------------------------------- bad input


def test_bad_bases_are_one_line(made: Path, tmp_path: Path) -> None:
    """A base that has moved, has no weights, or whose tokenizer is another one by now."""
    tok = tmp_path / "tok"
    Tokenizer.load(made / "zhtok").save(tok)
    told = json.loads((made / "zhtok/extends.json").read_text())
    out = tmp_path / "run"
    for base, words in ((tmp_path / "gone", "names the base .*gone, which is not there"), (made / "base2", None)):
        (tok / "extends.json").write_text(json.dumps(told | {"base": str(base)}))
        if words is None:
            base.mkdir()
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                (base / name).write_bytes((made / "base" / name).read_bytes())
            words = "has no model.safetensors"
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            pretrain.main(cross(made, out=out, model=tok))
    other = made / "base3"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((made / "base" / name).read_bytes())
    backend = byte_level(TEXTS[1:2], 390)
    backend.add_special_tokens([EOS])
    Tokenizer(backend).save(other)
    (tok / "extends.json").write_text(json.dumps(told | {"base": str(other)}))
    with pytest.raises(ValueError, match="does not extend"):
        pretrain.main(cross(made, out=out, model=tok))
    with pytest.raises(ValueError, match="no tokenizer at"):
        pretrain.main(cross(made, out=out, model=tmp_path / "nowhere"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unfreeze": [0.5]}, "--unfreeze 0.5: give two shares"),
        ({"unfreeze": [0.5, 0.2]}, "--unfreeze 0.5 0.2: give two shares"),
        ({"unfreeze": [0.5, 2.0]}, "--unfreeze 0.5 2.0"),
        ({"lora": "r=2"}, "--unfreeze with --lora"),
        ({"lora": "r=2", "unfreeze": [], "model": None}, "--lora trains adapters on a model that is there"),
        ({"lr": 0.0}, "--lr is 0.0; it must be above 0"),
        ({"data": [Path("zh=nowhere.jsonl:1")]}, "--data: nowhere.jsonl is not a file"),
        ({"length": 256, "batch_tokens": 256}, "--length 256 is more than the model's max_length 128"),
    ],
)
def test_bad_settings_are_one_line(change: dict[str, Any], words: str, made: Path, tmp_path: Path) -> None:
    """Tracebacks and half-made folders."""
    with pytest.raises(ValueError, match=words):
        pretrain.main(cross(made, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()
