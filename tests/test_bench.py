"""`moss bench`: what counts as read, what is measured, and what it refuses."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moss import __main__ as cli
from moss.engine import Engine, Stream
from moss.engine.quant import quantize_
from moss.evals import bench
from moss.evals.bench import cache_bytes, decode_rate, two_turns, weight_bytes
from moss.model import Decoder, ModelConfig
from moss.tokenizer import Tokenizer, train
from tests.fakes import toy_folder, toy_model


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(["hello there, add 1+1 and solve x = 1 你好"] * 3, 300)


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PROBE", 1 << 20)


def test_bytes_of_a_step_by_hand():
    """An embedding table that counts as read, or a tied head that does not, moves the bound by a third."""
    sizes = {"vocab_size": 200, "num_layers": 2, "hidden": 128, "num_heads": 2, "num_kv_heads": 1, "ffn": 256}
    layer = 128 * 128 * 2 + 64 * 128 * 2 + 3 * 256 * 128  # q and o; k and v; gate, up and down
    rows = 128 * 2 + 64 * 2 + 2 * 256 + 128
    for tied in (False, True):
        model = Decoder(ModelConfig(**sizes, tie_embeddings=tied))
        count = 2 * layer + 200 * 128
        assert weight_bytes(model) == 4 * count
        assert weight_bytes(model.bfloat16()) == 2 * count
        assert weight_bytes(quantize_(model, "int8")) == count + 4 * (2 * rows + 200)  # a float a row
        model = Decoder(ModelConfig(**sizes, tie_embeddings=tied))
        assert weight_bytes(quantize_(model, "int4")) == count / 2 + count / 128 * 4  # two bfloat16 a group of 128
        assert cache_bytes(model, 10.5) == 2 * 2 * 64 * 10.5 * 2  # keys and values, 2 layers, one head of 64


def test_a_second_turn_is_warm_and_its_twin_is_cold(monkeypatch: pytest.MonkeyPatch):
    """A cold turn that finds something in the cache would show the cache as useless."""
    streams: list[Stream] = []
    with Engine(toy_model(vocab_size=1000), slots=1) as engine:
        ask = engine.submit
        monkeypatch.setattr(engine, "submit", lambda *args, **more: streams.append(ask(*args, **more)) or streams[-1])
        assert all(seconds > 0 for seconds in two_turns(engine, 100, 8))
    first, warm, cold = streams
    assert (first.prompt_tokens, warm.prompt_tokens, cold.prompt_tokens) == (100, 140, 140)
    assert warm.reused == 107  # all but the last token of the answer, which was never read
    assert first.reused < 5 > cold.reused


@pytest.mark.parametrize("streams", [1, 12])
def test_all_streams_run_while_they_are_timed(streams: int, monkeypatch: pytest.MonkeyPatch):
    """A rate of twelve answers of which some have ended already, or not begun, is a rate of fewer."""
    model = toy_model()
    model.norm.register_forward_hook(lambda *_: time.sleep(0.002))  # so that nothing ends before it is looked at
    ticks = itertools.count()
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))  # a rate is then a count
    with Engine(model, slots=streams, lookup=False) as engine:
        engine.runner = model
        assert 8 * streams <= decode_rate(engine, streams, 16) <= (16 if streams == 1 else 28 * streams)


def test_the_whole_command(tok: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What programs read, and that the table shows the same."""
    words = ["bench", "--model", str(toy_folder(tok, tmp_path / "toy")), "--prompt", "40", "--tokens", "4"]
    assert cli.main([*words, "--streams", "1,3", "--dtype", "int8", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["model"], figures["dtype"], figures["device"]) == ("toy", "int8", "cpu")
    assert figures["prefill_tokens_per_s"] == pytest.approx(40 / figures["first_token_s"], rel=0.1)
    assert figures["second_turn"].keys() == {"tokens", "warm_s", "cold_s"}
    assert figures["second_turn"]["tokens"] == 40 + 4 + 32
    assert [row["streams"] for row in figures["decode"]] == [1, 3]
    for row in figures["decode"]:
        assert row["share"] == pytest.approx(row["tokens_per_s"] / row["bound"], rel=0.01, abs=0.001)
    assert figures["decode"][0]["bound"] == pytest.approx(
        figures["read_bytes_per_s"] / figures["bytes_per_token"], rel=0.01
    )
    assert cli.main([*words, "--streams", "2"]) == 0
    shown = capsys.readouterr().out
    for word in ("toy as float32 on cpu", "prompt of 40 tokens", "a second turn (76 tokens)", "2 at once", "GB/s"):
        assert word in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--streams", "1,x"], "--streams is '1,x'; give numbers such as 1,4,8"),
        (["--streams", "0"], "must be at least 1"),
        (["--tokens", "0"], "must be at least 1"),
        (["--prompt", "550"], "this takes 614 tokens, the model has 600: lower --prompt"),
    ],
)
def test_what_cannot_be_measured_is_bad_usage(flags: list[str], words: str, tok: Tokenizer, tmp_path: Path, capsys):
    """An engine that refuses in the middle of a measurement has wasted minutes."""
    folder = toy_folder(tok, tmp_path / "toy")
    assert cli.main(["bench", "--model", str(folder), *flags]) == 2
    assert words in capsys.readouterr().err
