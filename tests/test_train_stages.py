"""The stages from end to end on a toy: tokenizer, pre-training, fine-tuning, stopping, going on, and bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moss import checkpoint, dist
from moss.chat import META_INSTRUCTION, SWITCHES, Dialog, Round, Turn, render
from moss.data import pairs
from moss.data.dialogs import to_row
from moss.data.pack import Packed, Rows
from moss.data.rows import by_section, of_dialogs
from moss.log import read as read_log
from moss.model import Decoder, ModelConfig
from moss.tokenizer import Tokenizer
from moss.train import dpo, launch, loop, memory, pat, ppo, pretrain, reward, rollouts, settings, sft
from moss.train import plan as planning
from moss.train import tokenizer as tokenizer_stage
from moss.train.loss import next_token
from moss.train.machine import to_device
from moss.weights import load_model, save_model

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def dialog(number: int, *, reply: bool = True) -> Dialog:
    """A small conversation; each number makes another one."""
    expression = f"{number}+{number % 7}"
    used = Round("add", f'Calculate("{expression}")', f'Calculate("{expression}") => {number + number % 7}')
    switches = {key: key == "calculator" for key in SWITCHES} | {"thoughts": True}
    turns = [Turn(f"What is {expression}?", [used], f"It is {number + number % 7}.")]
    if number % 3 == 0:
        turns.append(Turn("Thanks!", [], "好的。"))
    if not reply:
        turns = [Turn("Hello", [Round("", "", "")], "")]
    return Dialog("Be MOSS.", switches, turns)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, conversations, a tokenizer and a pre-trained toy."""
    folder = tmp_path_factory.mktemp("stages")
    text = [{"text": f"{a} plus {b} is {a + b}. {a}加{b}等于{a + b}。"} for a in range(12) for b in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in text))
    rows = [to_row(dialog(number), "moss") for number in range(40)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    both = [folder / "text.jsonl", folder / "chat.jsonl"]
    assert tokenizer_stage.main(tokenizer_stage.TrainTokenizer(data=both, vocab_size=500, out=folder / "tok")) == 0
    assert pretrain.main(base_config(folder, out=folder / "base", steps=6)) == 0
    asked = [Dialog("", {}, [Turn(f"{a} plus {a}?", [], "")]) for a in range(24)]
    replies = [pairs.Reply(text, level=level) for text, level in (("Fine.", 100), ("No, not at all.", 0), ("Hm.", 40))]
    rows = [pairs.to_json(pairs.Preference(each, replies, [(0, 1), (0, 2), (2, 1)])) for each in asked]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = load_model(folder / "base", head="scalar")
    torch.nn.init.normal_(judge.head.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    save_model(judge, folder / "judge")
    Tokenizer.load(folder / "base").save(folder / "judge")
    return folder


def base_config(folder: Path, **more: Any) -> pretrain.Pretrain:
    values: dict[str, Any] = {
        "data": [folder / "text.jsonl"],
        "model": folder / "tok",
        "depth": 1,
        "batch_tokens": 512,
        "length": 64,
        "compile": "off",
        "dtype": "float32",
        "warmup": 2,
    }
    return pretrain.Pretrain(**(values | more))


def sft_config(folder: Path, *, stage: Any = sft.SFT, **more: Any) -> Any:
    values: dict[str, Any] = {
        "data": [folder / ("chat.jsonl" if stage in (sft.SFT, pat.PAT) else "pairs.jsonl")],
        "model": folder / "base",
        "batch_tokens": 1024,
        "length": 256,
        "compile": "off",
        "dtype": "float32",
        "warmup": 2,
    }
    return stage(**(values | more))


def reward_config(folder: Path, **more: Any) -> reward.Reward:
    return sft_config(folder, stage=reward.Reward, **more)


def dpo_config(folder: Path, **more: Any) -> dpo.DPO:
    return sft_config(folder, stage=dpo.DPO, **more)


def pat_config(folder: Path, **more: Any) -> pat.PAT:
    return sft_config(folder, stage=pat.PAT, **({"reward": folder / "judge"} | more))


def ppo_config(folder: Path, **more: Any) -> ppo.PPO:
    values = {"reward": folder / "judge", "max_tokens": 8, "length": 64, "batch_tokens": 256}
    return sft_config(folder, stage=ppo.PPO, **(values | more))


# What each stage is here: how it is run, and its settings at a toy's size.
STAGES: dict[str, tuple[Any, Any]] = {
    "pretrain": (pretrain.main, base_config),
    "sft": (sft.main, sft_config),
    "reward": (reward.main, reward_config),
    "dpo": (dpo.main, dpo_config),
    "pat": (pat.main, pat_config),
    "ppo": (ppo.main, ppo_config),
}


def figures(folder: Path) -> list[tuple[Any, ...]]:
    """What the log says of each step, but how long it took."""
    names = ("step", "loss", "grad_norm", "lr", "tokens", "learnt", "position")
    return [tuple(line[name] for name in names) for line in read_log(folder / "log.jsonl") if "loss" in line]


def test_the_stages_leave_models_that_learnt(made: Path, tmp_path: Path) -> None:
    """Prevents a stage that runs and learns nothing, or whose result the next one cannot load."""
    assert sft.main(sft_config(made, out=tmp_path / "sft", steps=12, valid=[made / "chat.jsonl"])) == 0
    losses = [line[1] for line in figures(tmp_path / "sft")]
    assert losses[-1] < 0.7 * losses[0]
    valid = [line["valid"]["loss"] for line in read_log(tmp_path / "sft" / "log.jsonl") if "valid" in line]
    assert len(valid) == 1 and abs(valid[0] - losses[-1]) < 1.0
    model = load_model(tmp_path / "sft")
    tok = Tokenizer.load(tmp_path / "sft")
    info = checkpoint.read_info(tmp_path / "sft")
    assert info["stage"] == "sft" and info["tokenizer_sha256"] == tok.sha256 and info["loop"]["step"] == 12
    assert model.config.vocab_size == tok.vocab_size
    assert (tmp_path / "sft" / "step-000012").is_dir()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_is_unbroken(
    stage: str, dtype: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents any state left out of the checkpoint: 8 steps and 4 + 4 give equal weights, optimizers and logs, bit for
    bit, across the end of an epoch and with validation in between."""
    run, make = STAGES[stage]
    config = make(made, steps=8, dtype=dtype, out=tmp_path / "unbroken")
    valid = {} if stage == "ppo" else {"valid": config.data}
    assert run(config) == 0
    broken = dataclasses.replace(config, out=tmp_path / "broken", save_every=3, **valid)
    with monkeypatch.context() as patch:
        original = loop.judge

        def stop_after_four(state: loop.State, loss: float, norm: float) -> str:
            if state.step == 4:
                signal.raise_signal(signal.SIGTERM)
            return original(state, loss, norm)

        patch.setattr(loop, "judge", stop_after_four)
        assert run(broken) == 0
    assert [step for step, _ in checkpoint.steps(tmp_path / "broken")] == [4, 3]
    assert not (tmp_path / "broken" / "moss.json").exists()
    torch.manual_seed(99)
    assert run(dataclasses.replace(broken, resume=True)) == 0
    assert figures(tmp_path / "broken") == figures(tmp_path / "unbroken")
    ends = [checkpoint.newest(tmp_path / name, print) for name in ("unbroken", "broken")]
    assert ends[0] and ends[1] and ends[0].name == ends[1].name == "step-000008"
    for file in sorted(ends[0].rglob("model.safetensors")):  # PPO's critic has one of its own
        assert file.read_bytes() == (ends[1] / file.relative_to(ends[0])).read_bytes()
    assert (tmp_path / "broken/model.safetensors").read_bytes() == (
        tmp_path / "unbroken/model.safetensors"
    ).read_bytes()
    states = [checkpoint.load(end)[1] for end in ends if end]
    assert same(states[0]["optimizer"], states[1]["optimizer"])
    assert same(states[0]["data"], {name: states[1]["data"][name] for name in states[0]["data"]})  # less held-out rows
    assert checkpoint.load(ends[0])[0]["loop"] == checkpoint.load(ends[1])[0]["loop"]


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def test_resume_is_refused_when_the_run_is_another(made: Path, tmp_path: Path) -> None:
    """Prevents a run that goes on with other data or settings and calls itself the same."""
    out = tmp_path / "run"
    config = base_config(made, steps=2, out=out)
    assert pretrain.main(config) == 0
    with pytest.raises(ValueError, match="already holds a run; --resume"):
        pretrain.main(config)
    for change, word in (({"seed": 1}, "--seed 0"), ({"lr": 1.0}, "--lr 0.003"), ({"length": 32}, "--length 64")):
        with pytest.raises(ValueError, match=word):
            pretrain.main(dataclasses.replace(config, resume=True, steps=4, **change))
    (tmp_path / "other.jsonl").write_text('{"text": "something else"}\n')
    with pytest.raises(ValueError, match="data has changed"):
        pretrain.main(dataclasses.replace(config, resume=True, data=[tmp_path / "other.jsonl"]))
    assert pretrain.main(dataclasses.replace(config, resume=True)) == 0  # finished already: exported once more
    assert len(figures(out)) == 2


def test_a_run_that_is_past_its_end_is_not_its_end(made: Path, tmp_path: Path) -> None:
    """Prevents a model of more steps than were asked for that calls itself finished."""
    config = sft_config(made, steps=3, out=tmp_path / "run")
    assert sft.main(config) == 0
    (tmp_path / "run/moss.json").unlink()
    with pytest.raises(ValueError, match="step-000003 is past the end of 2 steps; give --steps 3 or more"):
        sft.main(dataclasses.replace(config, steps=2, resume=True))
    assert not (tmp_path / "run/moss.json").exists()


def test_other_data_are_a_new_run_from_these_weights(made: Path, tmp_path: Path) -> None:
    """Prevents --resume and "start from these weights on other data" from being one thing: --model takes the weights of
    a checkpoint or of a finished run, and neither its optimizer, nor its place in the data, nor its folder."""
    assert sft.main(sft_config(made, out=tmp_path / "first", steps=3)) == 0
    (tmp_path / "other.jsonl").write_text(json.dumps(to_row(dialog(99), "moss")) + "\n")
    other = sft_config(made, out=tmp_path / "first", steps=3, data=[tmp_path / "other.jsonl"])
    with pytest.raises(ValueError, match="the data has changed since; choose another --out"):
        sft.main(dataclasses.replace(other, resume=True))
    for source in (tmp_path / "first" / "step-000003", tmp_path / "first"):
        out = tmp_path / f"from-{source.name}"
        assert sft.main(dataclasses.replace(other, model=source, out=out, steps=1, lr=1e-9, matrix_lr=1e-9)) == 0
        step, *_, position = figures(out)[0]
        assert (step, position) == (1, 4) and checkpoint.load(out / "step-000001")[0]["loop"]["updates"] == 1
        before, after = load_model(source), load_model(out / "step-000001")
        for mine, theirs in zip(before.parameters(), after.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a small file system of its own")
def test_a_full_disk_while_training(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a run of days from dying of a disk that is full for a while: the stage goes on, the earlier checkpoint
    stands whole, and one that fits again is written. The end without room is an error that names the file."""
    out = tmp_path / "run"
    out.mkdir()
    one = sum(file.stat().st_size for file in (made / "base/step-000006").rglob("*") if file.is_file())
    size = 8 * one // 5  # room for a checkpoint and a half
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(out)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(OSError, match="no space for a checkpoint"):
            pretrain.main(base_config(made, out=out, steps=4, save_every=1))
        said = capsys.readouterr().err
        assert "step 3: not saved, " in said and "the last checkpoint is step" in said
        newest = checkpoint.newest(out, print)
        assert newest and load_model(newest) and not list(out.glob(".step*"))
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_resume_passes_over_a_damaged_checkpoint(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Prevents the end of a run whose newest checkpoint a dying disk has damaged."""
    config = base_config(made, steps=6, out=tmp_path / "run", save_every=2)
    assert pretrain.main(config) == 0
    (tmp_path / "run/step-000006/optimizer/state.pt").write_bytes(b"")
    assert pretrain.main(dataclasses.replace(config, resume=True)) == 0
    said = capsys.readouterr().err
    assert "skipped step-000006: optimizer/state.pt has 0 bytes" in said and "step-000004" in said
    assert [line[0] for line in figures(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_resume_in_an_empty_folder_starts(made: Path, tmp_path: Path) -> None:
    """Prevents scripts that need two commands, one to start and one to go on."""
    assert pretrain.main(base_config(made, steps=1, out=tmp_path / "new", resume=True)) == 0


def test_a_model_is_never_replaced(made: Path, tmp_path: Path) -> None:
    """Prevents the loss of a model that stands in --out: a foreign one, or a finished one without its checkpoints."""
    for name in ("model.safetensors", "config.json", "moss.json"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("precious")
        for resume in (False, True):
            with pytest.raises(ValueError, match=rf"holds a model \({name}\).*choose another --out"):
                pretrain.main(base_config(made, steps=1, out=out, resume=resume))
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "precious"


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `--plan` shows, and what it takes for standing when it begins to measure."""
    seen: list[Any] = []
    watch, shown = planning.Watch, planning.table
    monkeypatch.setattr(planning, "Watch", lambda device, held: [seen.append(held), watch(device, held)][1])
    monkeypatch.setattr(planning, "table", lambda found, **more: [seen.append(found), shown(found, **more)][1])
    return seen


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("spec", ["", "r=2", "r=2,base=int8"])
def test_a_plan_counts_what_stands_once(stage: str, spec: str, made: Path, tmp_path: Path, plans: list[Any]) -> None:
    """Prevents an optimizer that is counted before it is made and again when it is, a base for each of PPO's roles,
    and DPO and PPO planned with the loss of fine-tuning."""
    run, make = STAGES[stage]
    more = {"lora": spec, "model": made / "base"} | ({"unfreeze": []} if stage == "pretrain" and spec else {})
    assert run(make(made, steps=2, plan=True, out=tmp_path / "run", **(more if spec else {}))) == 0
    held, found = plans
    assert found.job.nets[0].loss == {"reward": "scores", "dpo": "log-probs", "ppo": "log-probs"}.get(
        stage, "cross-entropy"
    )
    size = memory.sizes(found.job.nets[0], found.job.dtype)
    trained = sum(memory.sizes(net, found.job.dtype).trained for net in found.job.nets)
    others = found.job.frozen
    stands = 4 * trained + size.frozen + memory.standing(found.job)["data"] + sum(others.values())
    assert held == pytest.approx(stands, rel=0.01)
    assert list(others) == (["reference", "preference model"] if stage == "ppo" else [])
    if stage == "ppo":
        judge = sum(weight.nbytes for weight in load_model(made / "judge").parameters())
        first = sum(weight.nbytes for weight in load_model(made / "base").parameters())
        assert others["preference model"] == pytest.approx(judge, rel=0.01)
        assert 0 < others["reference"] < 0.5 * first if spec else others["reference"] == pytest.approx(first, rel=0.01)
    assert found.measured > 0 and not checkpoint.steps(tmp_path / "run")


def test_a_plan_of_ppo_has_its_share_of_writing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents steps of one block timed over and over: nine steps of blocks of four write three blocks, and leave the
    policy as it was, so that replies stay as long as they are."""
    written: list[Any] = []
    generate = rollouts.generate

    def writing(policy: Decoder, *asked: Any) -> list[list[int]]:
        written.append(policy.embed.weight.clone())
        return generate(policy, *asked)

    monkeypatch.setattr(rollouts, "generate", writing)
    assert ppo.main(ppo_config(made, steps=100, plan=True, out=tmp_path / "run")) == 0
    assert len(written) == 3 and torch.equal(written[0], written[2])


def test_a_plan_steps_through_the_data(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a time that is that of one batch, whatever the others are."""
    seen: list[int] = []
    original = Packed.batch
    monkeypatch.setattr(Packed, "batch", lambda self, at, count: [seen.append(at), original(self, at, count)][1])
    assert sft.main(sft_config(made, steps=9, plan=True, out=tmp_path / "run")) == 0
    assert seen == [0, 4, 8, 12, 16, 20]


def test_a_plan_asks_no_other_model_first(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents hours with the preference model, or with DPO's reference, before a plan is shown."""

    def asked(*_: Any) -> None:
        raise AssertionError("a plan needs no scores")

    monkeypatch.setattr(pat, "load_judge", asked)
    monkeypatch.setattr(dpo, "ask", asked)
    for stage in ("pat", "dpo"):
        run, make = STAGES[stage]
        assert run(make(made, steps=2, plan=True, out=tmp_path / stage)) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_begins_where_a_plan_was_made(stage: str, made: Path, tmp_path: Path) -> None:
    """Prevents a plan that stands in the way of the run that it was made for."""
    run, make = STAGES[stage]
    config = make(made, steps=1, plan=True, out=tmp_path / "run")
    assert run(config) == 0
    assert not (tmp_path / "run/.lock").exists()
    assert run(dataclasses.replace(config, plan=False)) == 0
    assert figures(tmp_path / "run")


def test_a_run_on_other_data_begins_where_a_plan_was_made(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents tokens that only a plan has read from being all that this folder can be used for."""
    config = base_config(made, steps=1, plan=True, out=tmp_path / "run")
    assert pretrain.main(config) == 0
    (tmp_path / "other.jsonl").write_text('{"text": "something else"}\n' * 9)
    other = dataclasses.replace(config, plan=False, data=[tmp_path / "other.jsonl"])
    assert pretrain.main(other) == 0
    assert "it is made anew" in " ".join(capsys.readouterr().err.split())
    assert pretrain.main(dataclasses.replace(other, out=tmp_path / "fresh")) == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "fresh")


def test_no_memory_to_load_is_one_line(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback where not even the model fits, and --lora as advice where there is no base."""

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(launch, "free_memory", lambda device: 1e6)
    monkeypatch.setattr(launch, "load_model", full)
    monkeypatch.setattr(Decoder, "init_weights", full)
    for stage, words in {
        "sft": "out of memory outside the steps; .* MB are needed .*1 MB are free",
        "ppo": "out of memory outside the steps; .* MB are needed .*1 MB are free",
        "pretrain": "out of memory outside the steps; .* and a smaller micro-batch does not change that",
    }.items():
        run, make = STAGES[stage]
        with pytest.raises(ValueError, match=words):
            run(make(made, steps=1, out=tmp_path / stage))
    frozen = {"reference": made / "base", "preference model": made / "judge"}
    whole, adapted = (planning.foreseen(ppo_config(made, lora=spec), ("lm", "scalar"), frozen) for spec in ("", "r=2"))
    size = memory.sizes(whole.nets[0], torch.float32).trained
    assert list(whole.frozen.values()) == [4 * size, 4 * size] and not adapted.frozen
    assert [net.head for net in whole.nets] == ["lm", "scalar"] and whole.adaptable
    assert not planning.foreseen(sft_config(made, resume=True, matrix_lr=0.0), ("lm",), {}).adaptable


def test_what_does_not_fit_is_told_before_it_runs(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plans: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a plan that needs the memory it says is missing, a run that the system kills without a word, and a
    traceback for want of memory outside the steps. Blocks are computed again only where nothing else fits."""
    config = sft_config(made, steps=2, out=tmp_path / "run")
    unpressed = tmp_path / "unpressed"
    assert sft.main(dataclasses.replace(config, out=unpressed)) == 0
    again: list[Any] = []
    recompute = dist.recompute
    monkeypatch.setattr(dist, "recompute", lambda net: [again.append(net), recompute(net)])
    monkeypatch.setattr(launch, "free_memory", lambda device: 1e4)
    assert sft.main(dataclasses.replace(config, plan=True)) == 0
    assert len(plans) == 1 and not plans[0].fits and not again  # shown, and not one step was made
    assert sft.main(config) == 0 and len(again) == 1
    assert "this may not fit: " in capsys.readouterr().err
    assert [line[1] for line in figures(config.out)] == pytest.approx([line[1] for line in figures(unpressed)])

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(launch, "place", full)
    with pytest.raises(ValueError, match=r"out of memory with micro-batches of 256 tokens; .* are needed"):
        sft.main(dataclasses.replace(config, out=tmp_path / "other"))


def test_a_preference_model_on_another_base_is_told(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a second base in memory without a word, where one was meant to carry all roles."""
    other = load_model(made / "base")
    with torch.no_grad():
        other.embed.weight += 1
    save_model(other, tmp_path / "other")
    Tokenizer.load(made / "base").save(tmp_path / "other")
    for base, told in ((made / "base", False), (tmp_path / "other", True)):
        judge = tmp_path / f"judge-{base.name}"
        assert reward.main(reward_config(made, model=base, steps=1, lora="r=2", out=judge)) == 0
        run = tmp_path / f"run-{base.name}"
        assert ppo.main(ppo_config(made, steps=1, lora="r=2", reward=judge, out=run)) == 0
        assert ("the preference model is loaded whole" in " ".join(capsys.readouterr().err.split())) == told


def test_adapters_do_not_go_on_as_a_whole_model(made: Path, tmp_path: Path) -> None:
    """Prevents a riddle (`no adapter_config.json`) for --resume with --lora where there was none, and without."""
    for spec in ("", "r=2"):
        config = sft_config(made, steps=2, out=tmp_path / f"run{spec}", lora=spec)
        assert sft.main(config) == 0
        with pytest.raises(ValueError, match=f"was made with{'' if spec else 'out'} --lora"):
            sft.main(dataclasses.replace(config, lora="" if spec else "r=2", resume=True))


RESUMER = """
import sys
from pathlib import Path
from tests.test_train_stages import STAGES
stage, folder, out, steps = sys.argv[1:]
run, make = STAGES[stage]
sys.exit(run(make(Path(folder), out=Path(out), steps=int(steps), save_every=1, resume=True)))
"""


@pytest.mark.slow
@pytest.mark.repeated
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(stage: str, made: Path, tmp_path: Path, repeats: int) -> None:
    """Prevents work that a power cut takes back or changes: killed at random moments, saving included, then resumed,
    the run ends with the same weights as one that was left alone."""
    kills = repeats if stage == "sft" else repeats // 5  # what saves is the same in all stages
    steps = 20 * kills + 4
    run, make = STAGES[stage]
    assert run(make(made, out=tmp_path / "unbroken", steps=steps)) == 0
    out, rng = tmp_path / "killed", random.Random(kills)
    words = [sys.executable, "-c", RESUMER, stage, str(made), str(out), str(steps)]
    for _ in range(kills):
        before = published(out)
        with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL) as child:
            until = time.monotonic() + 120
            while child.poll() is None and time.monotonic() < until and published(out) <= before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            seen = published(out)
            child.kill()
        assert seen > before
        newest = checkpoint.newest(out, print)
        assert newest and int(newest.name.removeprefix("step-")) >= seen
    assert subprocess.run(words, cwd=ROOT, stderr=subprocess.DEVNULL, timeout=300).returncode == 0
    assert figures(out) == figures(tmp_path / "unbroken")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "unbroken/model.safetensors").read_bytes()


def published(folder: Path) -> int:
    """The step of the newest checkpoint in a folder; 0 where there is none."""
    return max((step for step, _ in checkpoint.steps(folder)), default=0)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_save_and_say_so(name: str, made: Path, tmp_path: Path) -> None:
    """Prevents lost work when a machine is taken away or Ctrl-C is pressed: the real program and a real signal."""
    out = tmp_path / "run"
    words = ["train", "pretrain", "--data", str(made / "text.jsonl"), "--model", str(made / "tok"), "--depth", "1"]
    words += ["--steps", "100000", "--batch-tokens", "512", "--length", "64", "--compile", "off", "--out", str(out)]
    child = subprocess.Popen(
        [sys.executable, "-m", "moss", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and not ((out / "log.jsonl").exists() and figures(out)):
        time.sleep(0.05)
    child.send_signal(signal.Signals[name])
    _, said = child.communicate(timeout=30)
    assert child.returncode == (0 if name == "SIGTERM" else 130)
    assert name in said and "--resume" in said and "Traceback" not in said
    newest = checkpoint.newest(out, print)
    assert newest and newest.name == f"step-{figures(out)[-1][0]:06d}"
    assert not (out / ".lock").exists()


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "missing data": ({"data": [Path("nowhere.jsonl")]}, "--data: nowhere.jsonl is not a file"),
    "missing validation": ({"valid": [Path("nowhere.jsonl")]}, "--valid: nowhere.jsonl is not a file"),
    "batch": ({"batch_tokens": 1000}, "--batch-tokens 1000 must be a multiple of --length"),
    "micro": ({"micro_tokens": 100}, "--micro-tokens 100 must divide"),
    "rate": ({"lr": 0.0}, "--lr is 0.0; it must be above 0"),
    "not a number": ({"lr": float("nan")}, "--lr is nan"),
    "negative": ({"steps": -1}, "--steps is -1; it must be 0 or more"),
    "seed": ({"seed": 2**63}, "--seed is 9223372036854775808; it must be below"),
    "device": ({"device": "abacus"}, "--device abacus cannot be used"),
    "length": ({"length": 2048, "batch_tokens": 2048}, "--length 2048 is more than the model's max_length 1024"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_bad_settings_are_one_line_and_leave_nothing(stage: str, case: str, made: Path, tmp_path: Path) -> None:
    """Prevents tracebacks and half-made folders when a command is wrong."""
    change, words = CASES[case]
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as error:
        if stage == "pretrain":
            pretrain.main(base_config(made, **({"out": out, "steps": 1, "model": made / "base"} | change)))
        else:
            sft.main(sft_config(made, **({"out": out, "steps": 1} | change)))
    assert "\n" not in str(error.value) and not out.exists()


def test_data_that_cannot_be_used_is_named(made: Path, tmp_path: Path) -> None:
    """Prevents training on nothing or on rubbish: file and line are named."""
    bad = tmp_path / "bad.jsonl"
    for content, words in (
        ("", "is empty"),
        ("\n\n", "there is no text"),
        ('{"text": "a b c"}\n{"text"\n', "line 2 is not JSON"),
        ('{"words": "a"}\n', "line 1 has no `text`; its keys are words"),
        ("[1]\n", "line 1 is not a JSON object"),
    ):
        bad.write_text(content)
        with pytest.raises(ValueError, match=words):
            pretrain.main(base_config(made, out=tmp_path / "run", steps=1, data=[bad]))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8 text: byte 3"):
        pretrain.main(base_config(made, out=tmp_path / "run", steps=1, data=[tmp_path / "latin.txt"]))
    bad.write_text("\n")
    with pytest.raises(ValueError, match="there is no conversation"):
        sft.main(sft_config(made, out=tmp_path / "run", steps=1, data=[bad]))
    with pytest.raises(ValueError, match="of 40 conversations not one has a first turn within --length 16"):
        sft.main(sft_config(made, out=tmp_path / "run", steps=1, length=16))


def test_a_tokenizer_that_does_not_fit_is_refused(made: Path, tmp_path: Path) -> None:
    """Prevents ids beyond the embedding, a model fed with another vocabulary of the same size, damaged weights."""
    text = tmp_path / "other.jsonl"
    text.write_text("".join(json.dumps({"text": word * 3}) + "\n" for word in ("other", "words", "entirely", "new")))
    stage = tokenizer_stage.TrainTokenizer(data=[text, made / "text.jsonl"], vocab_size=288, out=tmp_path / "tok")
    assert tokenizer_stage.main(stage) == 0
    tok = Tokenizer.load(tmp_path / "tok")
    base = tmp_path / "base"
    base.mkdir()
    for name in ("model.safetensors", "config.json", "moss.json"):
        (base / name).write_bytes((made / "base" / name).read_bytes())
    tok.save(base)
    with pytest.raises(ValueError, match="not the one that its model was trained with"):
        sft.main(sft_config(made, model=base, out=tmp_path / "run", steps=1))
    Tokenizer.load(made / "tok").save(base)
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1000] + bytes(1000))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        sft.main(sft_config(made, model=base, out=tmp_path / "run", steps=1))
    small = Decoder(ModelConfig.from_depth(1, 280, max_length=512))
    with pytest.raises(ValueError, match="the tokenizer has 288 ids, the model only 280"):
        launch.check_fit(tok, small, 64)
    assert not (tmp_path / "run").exists()


def test_rows_that_do_not_fit_are_dropped_and_counted(made: Path) -> None:
    """Prevents silent loss: whole turns are cut, a row without a turn that fits is counted, and order is kept."""
    tok = Tokenizer.load(made / "tok")
    dialogs = [dialog(number) for number in range(30)]
    whole = [len(render(each, tok)[0]) for each in dialogs]
    first = [len(render(Dialog(d.meta, d.switches, d.turns[:1]), tok)[0]) for d in dialogs]
    length = sorted(set(first))[-2]
    rows, dropped = of_dialogs(dialogs, tok, "assistant", length)
    want = [w if w <= length else f for w, f in zip(whole, first) if f <= length]
    assert rows.lengths.tolist() == want and dropped == sum(f > length for f in first) and 0 < dropped < 30


def test_many_conversations_are_rendered_apart_alike(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents processes that render differently, or in another order, than one does alone."""
    tok = Tokenizer.load(made / "tok")
    dialogs = [dialog(number) for number in range(50)]
    alone, dropped = of_dialogs(dialogs, tok, "paper", 180)
    monkeypatch.setattr("moss.data.rows.CHUNK", 8)
    monkeypatch.setattr("moss.data.rows.ALONE", 16)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    apart, dropped_apart = of_dialogs(dialogs, tok, "paper", 180)
    assert apart.sha256() == alone.sha256() and dropped_apart == dropped


def test_a_row_without_anything_to_learn_is_an_error(made: Path) -> None:
    """Prevents rows that cost time and teach nothing, which no loss curve would show."""
    tok = Tokenizer.load(made / "tok")
    with pytest.raises(ValueError, match="conversation 3: nothing in this row is learnt"):
        of_dialogs([dialog(1), dialog(2), dialog(3, reply=False), dialog(4)], tok, "assistant", 256)


def test_a_row_that_cannot_be_learnt_is_named_by_file_and_line(made: Path, tmp_path: Path) -> None:
    """A number among the conversations of all files, which nobody can count; questions that taught to say nothing."""
    good, asked = {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Is it?"}
    call = {"id": "a", "type": "function", "function": {"name": "Search", "arguments": "{}"}}
    called = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "a", "content": "1"}]
    (tmp_path / "good.jsonl").write_text("\n" + json.dumps({"messages": [asked, good]}) + "\n")
    for number, (messages, words) in enumerate(
        (
            ([asked], "nothing in this row is learnt"),
            ([asked, {"role": "assistant", "content": None}], "nothing in this row is learnt"),
            ([asked, *called * 5, good], "at most 4 rounds; this one has 5"),
        )
    ):
        bad = tmp_path / f"bad{number}.jsonl"
        bad.write_text("".join(json.dumps({"messages": each}) + "\n\n" for each in ([asked, good], messages)))
        data = [tmp_path / "good.jsonl", bad]
        with pytest.raises(ValueError, match=rf"bad{number}\.jsonl:3: .*{words}"):
            sft.main(sft_config(made, out=tmp_path / "run", steps=1, data=data))


def test_the_report_of_a_tokenizer_shows_every_language(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sample was of the first 14,000 texts, so that a language in a later file was not reported at all."""
    for name, text in (("en", "a number: "), ("zh", "一个数字是")):
        rows = (json.dumps({"text": text + str(number)}, ensure_ascii=False) for number in range(15_000))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    data = [tmp_path / "en.jsonl", tmp_path / "zh.jsonl"]
    stage = tokenizer_stage.TrainTokenizer(data=data, vocab_size=300, out=tmp_path / "tok")
    assert tokenizer_stage.main(stage) == 0
    said = capsys.readouterr().err
    assert "Chinese" in said and "Latin script" in said
    before = (tmp_path / "tok/tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="which must stay"):  # it would be gone, and extends.json name itself
        tokenizer_stage.main(dataclasses.replace(stage, vocab_size=320, extend=tmp_path / "tok"))
    assert (tmp_path / "tok/tokenizer.json").read_bytes() == before


def test_turns_that_are_cut_are_counted(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Turns that went silently, while the count said that no conversation was lost."""
    tok = Tokenizer.load(made / "tok")
    length = max(len(render(Dialog(d.meta, d.switches, d.turns[:1]), tok)[0]) for d in map(dialog, range(40)))
    sft.read([made / "chat.jsonl"], tok, sft_config(made, length=length))
    said = " ".join(capsys.readouterr().err.split())
    assert "40 conversations of 40 turns; 14 turns dropped" in said and "0 conversations whose first turn" in said


def test_validation_takes_no_more_rows_at_a_time_than_memory_allows(made: Path) -> None:
    """A step of 2.6M tokens is trained in parts, but was validated in one piece, which no card holds."""
    tok, sizes = Tokenizer.load(made / "tok"), []

    def seen(net: torch.nn.Module, batch: loop.Micro) -> loop.Loss:
        sizes.append(batch["ids"].numel())
        return loop.Loss(torch.zeros(()), 1)

    config = sft_config(made, length=256, batch_tokens=256 * 1024)
    data = sft.read([made / "chat.jsonl"] * 8, tok, config)
    assert len(data) * 256 > launch.AT_ONCE
    launch.mean_loss(data, seen, config)(torch.nn.Linear(1, 1))
    assert max(sizes) == launch.AT_ONCE and sum(sizes) == len(data) * 256


def test_validation_changes_nothing(made: Path, tmp_path: Path) -> None:
    """Prevents weights, an optimizer or a random state that tell whether and how often held-out data was looked at."""
    files = ("model.safetensors", "optimizer/state.pt")  # with the random state and where the data stands
    found = []
    for every, valid in ((0, []), (1, ["chat.jsonl"]), (2, ["chat.jsonl"]), (0, ["chat.jsonl"])):
        torch.manual_seed(7)
        out, held_out = tmp_path / f"{every}-{len(valid)}", [made / name for name in valid]
        assert sft.main(sft_config(made, out=out, steps=4, valid=held_out, save_every=every or 99)) == 0
        found.append([(out / "step-000004" / name).read_bytes() for name in files])
        steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert sum("valid" in each for each in steps) == (len(valid) and {0: 1, 1: 4, 2: 2}[every])
    assert found[0] == found[1] == found[2] == found[3]


def test_a_run_goes_on_from_a_model_of_its_own_size_only(made: Path, tmp_path: Path) -> None:
    """`--resume --model OTHER` went on with the old weights and wrote the other's name into moss.json."""
    assert sft.main(sft_config(made, out=tmp_path / "run", steps=1)) == 0
    other = Decoder(ModelConfig.from_depth(2, 500, max_length=512))
    save_model(other, tmp_path / "other")
    with pytest.raises(ValueError, match="is of another size than --model"):
        sft.main(sft_config(made, out=tmp_path / "run", steps=2, model=tmp_path / "other", resume=True))


def test_learnt_tokens_by_section(made: Path) -> None:
    """Prevents a table that counts wrongly: here from one row whose sections are encoded one by one."""
    tok = Tokenizer.load(made / "tok")
    rows, _ = of_dialogs([dialog(5)], tok, "assistant", 400)
    counts = by_section(rows, tok)
    turn = dialog(5).turns[0]
    # after an opening marker and ": ", the text; learnt with its end marker (and the opening, as `render` says)
    for section, text, end in (
        ("thoughts", turn.rounds[0].thoughts, "<eot>"),
        ("commands", turn.rounds[0].commands, "<eoc>"),
        ("reply", turn.reply, "<eom>"),
    ):
        learnt = len(tok.encode(" " + text)) + len(tok.marker(end))
        assert learnt <= counts[section][1] <= learnt + 4, section
    assert counts["human"][1] == counts["results"][1] == 0
    assert sum(tokens for tokens, _ in counts.values()) == len(rows.ids)
    assert sum(learnt for _, learnt in counts.values()) == rows.mask.sum()
    plain = Rows.of([([*tok.encode("one"), tok.eos], [1] * (len(tok.encode("one")) + 1)), ([20, tok.eos], [1, 1])])
    assert by_section(plain, tok) == {"text": (len(plain.ids), len(plain.ids))}


@pytest.mark.parametrize("loss", ["assistant", "paper"])
def test_a_step_is_the_plain_formula_in_float64(loss: Any, made: Path) -> None:
    """Prevents any slip between conversation and gradient: a wrong mask, a shifted target, documents that see each
    other. Loss and every gradient equal the formula on conversations that are computed one at a time."""
    tok, model = Tokenizer.load(made / "base"), lively_base(made).double()
    data = sft.read([made / "chat.jsonl"], tok, sft_config(made, loss=loss, length=1024))
    assert len(data) < 10
    found, count, grads = sft_gradients(model, [to_device(data.batch(0, len(data)), CPU)])
    model.zero_grad()
    losses = []
    for number in range(40):
        ids, mask = render(dialog(number), tok, loss=loss)
        told = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
        losses += [-told[at - 1, ids[at]] for at in range(1, len(ids)) if mask[at]]
    mean = torch.stack(losses).mean()
    mean.backward()
    assert count == len(losses)
    assert found == pytest.approx(float(mean.detach()), rel=1e-12)
    for mine, weight in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(mine, weight.grad, rtol=1e-10, atol=1e-12)


def test_packed_is_unpacked_and_one_by_eight_is_eight_by_one(made: Path) -> None:
    """Prevents leakage and a mean of means in gradients too: loss and gradient agree to 1e-6 in float32, with many
    conversations in a row, with one, and in micro-batches of one row."""
    tok, model = Tokenizer.load(made / "base"), lively_base(made)
    rows = sft.read([made / "chat.jsonl"], tok, sft_config(made)).rows
    packed, alone = Packed(rows, 1024), Packed(rows, int(rows.lengths.max()))
    assert len(packed) < 10 and len(alone) == len(rows)
    whole = sft_gradients(model, [to_device(packed.batch(0, len(packed)), CPU)])
    for data, micro in ((packed, 1), (alone, len(alone)), (alone, 1)):
        batches = [to_device(data.batch(at, micro), CPU) for at in range(0, len(data), micro)]
        loss, count, grads = sft_gradients(model, batches)
        assert count == whole[1] and loss == pytest.approx(whole[0], rel=1e-6)
        ours, theirs = (torch.cat([grad.flatten() for grad in each]) for each in (grads, whole[2]))
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def lively_base(made: Path) -> Decoder:
    """The toy with weights that are far from those of a beginning, where residual outputs are zero."""
    model = load_model(made / "base").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    return model


def sft_gradients(model: Decoder, batches: list[loop.Micro]) -> tuple[float, int, list[torch.Tensor]]:
    """(mean loss, learnt tokens, gradients) of one step of the loop."""
    model.zero_grad()
    loss, _, count, _ = loop.gradients(model, model, next_token, batches)
    return loss, count, [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def test_stages_share_one_set_of_flags() -> None:
    """Prevents a stage that outgrows 25 fields, or one that silently lacks what all stages have."""
    shared = {field.name for field in dataclasses.fields(settings.Settings)}
    for stage in (pretrain.Pretrain, sft.SFT):
        names = [field.name for field in dataclasses.fields(stage)]
        assert shared <= set(names) and len(names) <= 25


def test_the_meta_instruction_is_not_learnt_by_default(made: Path) -> None:
    """Prevents a loss that spends itself on text that is always the same."""
    tok = Tokenizer.load(made / "tok")
    rows, _ = of_dialogs([dataclasses.replace(dialog(1), meta=META_INSTRUCTION)], tok, "paper", 600)
    start = rows.ids.tolist().index(tok.marker("<|Human|>")[0])
    assert start > 20 and not rows.mask[:start].any()
