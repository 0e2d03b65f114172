"""An adapter's folder as a model: several stages over one base of integers, talked to and judged by at the end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from moss import checkpoint, peft, resolve, session
from moss.chat import Dialog, Turn
from moss.data import pairs
from moss.data.dialogs import to_row
from moss.engine import Engine
from moss.engine.quant import QuantLinear
from moss.errors import UsageError
from moss.log import read as read_log
from moss.lora import adapters, parse
from moss.model import Decoder
from moss.tokenizer import Tokenizer
from moss.train import dpo, launch, pat, ppo, pretrain, reward, sft
from moss.train.loss import next_token
from moss.weights import load_model, save_model
from tests.test_engine import greedy, ids_of
from tests.test_model import llama_config
from tests.test_train_stages import dialog

SPEC = "r=4,base=int4"
FILES = ["adapter_config.json", "adapter_model.safetensors", "moss.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a Qwen3 of another project, whose tokenizer knows no chat."""
    folder = tmp_path_factory.mktemp("road")
    (folder / "base").mkdir()
    rows = [json.dumps(to_row(dialog(number), "moss"), ensure_ascii=False) for number in range(24)]
    (folder / "chat.jsonl").write_text("\n".join(rows))
    asked = [Dialog("", {}, [Turn(f"{a} plus {a}?", [], "")]) for a in range(12)]
    replies = [pairs.Reply("Fine.", level=100), pairs.Reply("No, not at all.", level=0)]
    (folder / "pairs.jsonl").write_text(
        "\n".join(json.dumps(pairs.to_json(pairs.Preference(each, replies, [(0, 1)]))) for each in asked)
    )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(rows, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "base" / "tokenizer.json"))
    config = llama_config(vocab_size=backend.get_vocab_size(), max_length=512, tie_embeddings=False, qk_norm=True)
    model, generator = Decoder(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    save_model(model, folder / "base")
    return folder


def config(folder: Path, stage: Any = sft.SFT, **more: Any) -> Any:
    values: dict[str, Any] = {
        "data": [folder / ("chat.jsonl" if stage in (sft.SFT, pat.PAT) else "pairs.jsonl")],
        "model": folder / "base",
        "batch_tokens": 1024,
        "length": 512,
        "lr": 1e-2,
        "steps": 3,
        "compile": "off",
        "dtype": "float32",
        "warmup": 0,
        "lora": SPEC,
    }
    return stage(**(values | more))


@pytest.fixture(scope="module")
def tuned(made: Path) -> Path:
    """The adapter of a first stage."""
    assert sft.main(config(made, out=made / "sft", valid=[made / "chat.jsonl"])) == 0
    return made / "sft" / "adapter"


@pytest.fixture(scope="module")
def judge(made: Path, tuned: Path) -> Path:
    """The preference model that goes on from it."""
    assert reward.main(config(made, reward.Reward, model=tuned, out=made / "reward")) == 0
    return made / "reward" / "adapter"


def ids(tok: Tokenizer) -> Tensor:
    """A question with the markers, which the adapter alone has learnt."""
    return torch.tensor([[tok.eos, *tok.marker("<|Human|>"), *tok.encode(": What is 3+4?"), *tok.marker("<|MOSS|>")]])


def ended(settings: Any, base: Path, **more: Any) -> Decoder:
    """A run's model as it was when the run ended: its last checkpoint on its first base."""
    return launch.load(settings, checkpoint.newest(settings.out, print), base, **more)[1]


def base_named(adapter: Path) -> str:
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_stage_over_integers_leaves_its_adapter_alone(tuned: Path, made: Path):
    """Prevents: 33 GB of floats after every stage of a 16B, which the next stage could not use."""
    assert sorted(file.name for file in tuned.iterdir()) == FILES
    assert not [name for name in ("model.safetensors", "config.json", "moss.json") if (tuned.parent / name).exists()]
    told = checkpoint.read_info(tuned)
    assert told["stage"] == resolve.stage(tuned) == "sft" and told["run"]["lora"] == SPEC
    assert base_named(tuned) == str(made / "base")
    damaged = shutil.copytree(tuned, made / "damaged", dirs_exist_ok=True)
    (damaged / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged"):
        resolve.load(damaged)


def test_the_next_stage_begins_where_the_last_one_ended(tuned: Path, made: Path):
    """Prevents: a second stage over integers into which the first one was rounded, and so without it."""
    first = config(made, out=made / "sft")
    tok, model = launch.load(config(made, model=tuned, out=made / "x"), None, tuned)
    assert torch.equal(model(ids(tok)), ended(first, made / "base")(ids(tok)))
    data = sft.read([made / "chat.jsonl"], tok, first)
    loss = launch.mean_loss(data, next_token, first)(model)["loss"]
    assert loss == [line["valid"]["loss"] for line in read_log(made / "sft" / "log.jsonl") if "valid" in line][-1]

    assert sft.main(config(made, model=tuned, out=made / "second", steps=1)) == 0
    again = made / "second" / "adapter"
    assert base_named(again) == str(made / "base") and peft.spec_of(again) == peft.spec_of(tuned)
    one, two = (load_file(each / "adapter_model.safetensors") for each in (tuned, again))
    assert one.keys() == two.keys() and not any(torch.equal(one[name], two[name]) for name in one if "delta" in name)


def test_a_preference_model_begins_as_the_language_model(tuned: Path, judge: Path, made: Path):
    """Prevents: a preference model from the bare base, or with rows of a head that it does not have."""
    settings = config(made, reward.Reward, out=made / "reward", model=tuned)
    tok, fresh = launch.load(settings, None, tuned, head="scalar")
    _, language = launch.load(config(made), None, tuned)
    assert torch.equal(fresh.hidden(ids(tok)), language.hidden(ids(tok))) and not fresh(ids(tok)).any()
    assert not [name for name in peft.tensors_of(fresh) if "lm_head" in name]
    own, model = reward.load_judge(judge)
    expected = ended(settings, tuned, head="scalar")(ids(tok))
    assert expected.any() and torch.equal(model(ids(tok)), expected) and own.sha256 == tok.sha256
    assert any(isinstance(layer.base, QuantLinear) and layer.exact for _, layer in adapters(model))
    with pytest.raises(ValueError, match="holds a language model"):
        reward.load_judge(tuned)
    with pytest.raises(ValueError, match=r"holds no preference model; did you mean .*reward/adapter\?"):
        pat.main(config(made, pat.PAT, model=tuned, reward=made / "reward", out=made / "no"))


def test_the_road_ends_in_a_chat(tuned: Path, judge: Path, made: Path):
    """Prevents: an adapter that the engine does not take or talks without, or whose quality nobody asks for."""
    settings = config(made, pat.PAT, model=tuned, reward=judge, out=made / "pat")
    assert pat.main(settings) == 0
    adapter = made / "pat" / "adapter"
    before = peft.weights_sha256(judge)
    assert checkpoint.read_info(adapter)["pat"]["reward_sha256"] == before != peft.weights_sha256(tuned)
    assert (resolve.stage(adapter), resolve.quality(adapter)) == ("pat", 100)

    model, tok = resolve.load(adapter)
    exact = ended(settings, tuned)(ids(tok))
    assert resolve.dtype_of(model) == "int4" and tok.has_markers
    merged, _ = resolve.load(adapter, dtype="float32")
    plain, _ = resolve.load(tuned, dtype="float32")
    torch.testing.assert_close(merged(ids(tok)), exact, atol=1e-4, rtol=0)
    assert not adapters(merged) and not torch.allclose(plain(ids(tok)), exact, atol=0.1)
    assert (model(ids(tok)).float() - exact).norm() < 0.1 * exact.norm()  # the kernels round activations
    with Engine(model) as engine:
        assert len(ids_of(engine.submit(ids(tok)[0].tolist(), greedy(5)))) == 5
    with session.load(adapter, max_tokens=4) as chat:
        assert "int4" in chat.about and chat.ask("What is 3+4?") is not None
    with pytest.raises(ValueError, match="was trained over int4, as int8 it would be another model"):
        resolve.load(adapter, dtype="int8")


def test_ppo_has_all_roles_on_the_base_of_the_adapters(tuned: Path, judge: Path, made: Path):
    """Prevents: a policy that begins at the bare base, and a base for each adapter."""
    settings = config(
        made, ppo.PPO, model=tuned, reward=judge, out=made / "ppo", steps=4, length=256, max_tokens=8, lr=1e-3
    )
    tok, net, first, _, scorer = ppo.adapted_roles(settings, None)
    _, language = launch.load(config(made), None, tuned)
    assert torch.equal(net.policy(ids(tok)), language(ids(tok))) and torch.equal(first(ids(tok)), language(ids(tok)))
    assert torch.equal(net.critic(ids(tok)), scorer(ids(tok))) and scorer(ids(tok)).any()
    tables = {role.get_parameter("embed.base.weight").data_ptr() for role in (net.policy, net.critic, first, scorer)}
    assert len(tables) == 1
    assert ppo.main(dataclasses.replace(settings, batch_tokens=512)) == 0
    assert base_named(made / "ppo" / "adapter") == str(made / "base")
    assert ppo.main(dataclasses.replace(settings, batch_tokens=512, steps=5, resume=True)) == 0


def test_dpo_goes_on_from_an_adapter(tuned: Path, made: Path):
    """Prevents: a stage that looks for a whole model where an adapter stands."""
    assert dpo.main(config(made, dpo.DPO, model=tuned, out=made / "dpo", steps=1)) == 0
    assert resolve.stage(made / "dpo" / "adapter") == "dpo"


@pytest.mark.parametrize(
    "spec", ["r=8,base=int4", "r=4,alpha=4,base=int4", "r=4,targets=q,base=int4", "r=4,base=int8", "r=4"]
)
def test_another_spec_is_refused(spec: str, tuned: Path, made: Path):
    """Prevents: an adapter that silently stays as it was, or is read over another base than it learnt on."""
    has = r"r=4,alpha=8,targets=q\+k\+v\+o\+gate\+up\+down,base=int4"
    with pytest.raises(UsageError, match=f"--lora {spec}: .*sft/adapter is an adapter of {has}"):
        sft.main(config(made, model=tuned, out=made / "no", lora=spec))


def test_what_is_no_model_says_where_one_is(tuned: Path, made: Path):
    """Prevents: a riddle for who leaves --lora out, gives the run's folder, or has moved the base."""
    for stage in (sft, pretrain):
        made_for = pretrain.Pretrain if stage is pretrain else sft.SFT
        with pytest.raises(UsageError, match=r"is an adapter; give --lora r=4,alpha=8,.*base=int4 to go on with it$"):
            more = {"data": [], "matrix_lr": 0.0, "weight_decay": 0.0, "unfreeze": []} if stage is pretrain else {}
            stage.main(config(made, made_for, model=tuned, out=made / "no", lora="", **more))
    for taken in (resolve.load, lambda folder: sft.main(config(made, model=folder, out=made / "no"))):
        with pytest.raises(ValueError, match=r"sft holds no config.json; did you mean .*sft/adapter\?"):
            taken(tuned.parent)
    moved = shutil.copytree(tuned, made / "moved", dirs_exist_ok=True)
    file = moved / "adapter_config.json"
    file.write_text(file.read_text().replace(str(made / "base"), "/nowhere"))
    with pytest.raises(ValueError, match="names the base /nowhere, which is not there"):
        resolve.load(moved)


def test_a_finished_run_goes_on_and_is_not_replaced(tuned: Path, made: Path, capsys: pytest.CaptureFixture[str]):
    """Prevents: an adapter that is lost to a run in the same folder, or a finished run that cannot train longer."""
    settings = config(made, out=made / "longer", steps=1)
    assert sft.main(settings) == 0
    assert sft.main(dataclasses.replace(settings, steps=2, resume=True)) == 0
    assert capsys.readouterr().out.split() == [str(made / "longer" / "adapter")] * 2
    assert checkpoint.read_info(made / "longer" / "adapter")["loop"]["step"] == 2
    assert resolve.stage(made / "longer" / "step-000002") == "sft"  # a checkpoint is such a folder too
    for step in (made / "longer").glob("step-*"):
        shutil.rmtree(step)
    with pytest.raises(ValueError, match=r"holds a model \(adapter/moss.json\)"):
        sft.main(settings)


def test_over_floats_both_are_there(made: Path):
    """Prevents: an adapter over floats that cannot be taken for the merged model, in any dtype."""
    assert sft.main(config(made, out=made / "floats", lora="r=4,targets=q+v")) == 0
    adapter = made / "floats" / "adapter"
    (model, tok), (merged, _) = (resolve.load(folder, dtype="float32") for folder in (adapter, made / "floats"))
    assert not adapters(model)
    torch.testing.assert_close(model(ids(tok)), merged(ids(tok)), atol=0.2, rtol=0)  # the file is bfloat16
    assert resolve.dtype_of(resolve.load(adapter, dtype="int8")[0]) == "int8"
    with pytest.raises(UsageError, match=r"give --lora r=4,alpha=8,targets=q\+v to go on with it, or --model .*floats"):
        sft.main(config(made, model=adapter, out=made / "no", lora=""))
    assert load_model(made / "floats").config.vocab_size == tok.vocab_size
    more = config(made, model=adapter, out=made / "more", lora="r=4,targets=q+v", steps=1)
    assert sft.main(more) == 0 and base_named(made / "more" / "adapter") == str(made / "base")
    assert peft.spec_of(adapter) == parse("r=4,targets=q+v")


def test_markers_join_the_rows_of_an_adapter_without_them(made: Path):
    """Prevents: an adapter from elsewhere, or of documents alone, that cannot learn to chat."""
    text = made / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{a} plus {a} is {a + a}."}) + "\n" for a in range(300)))
    settings = pretrain.Pretrain(
        data=[text], model=made / "base", out=made / "documents", lora=SPEC, steps=1, unfreeze=[], length=64,
        batch_tokens=256, compile="off", dtype="float32",
    )  # fmt: skip
    assert pretrain.main(settings) == 0
    adapter = made / "documents" / "adapter"
    assert not Tokenizer.load(adapter).has_markers
    tok, model = launch.load(config(made), None, adapter)
    assert tok.has_markers and len(model.embed.rows) == 10  # type: ignore[arg-type]
