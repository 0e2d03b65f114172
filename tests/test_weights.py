"""Checkpoints in and out: the same logits in stock transformers, and a clear error for everything that does not fit."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moss import shards, weights
from moss.model import Decoder, ModelConfig
from moss.weights import join_qkv, load_model, read_config, save_model, split_qkv
from tests.test_model import BOUND, LLAMA3, YARN, llama_config, moss_config, random_ids, random_model

SAVED = {
    "llama": (llama_config(), "LlamaForCausalLM"),
    "llama3": (llama_config(rope_scaling=LLAMA3, rope_base=5e5, norm_eps=1e-5), "LlamaForCausalLM"),
    "yarn": (llama_config(rope_scaling=YARN, head_dim=16), "LlamaForCausalLM"),
    "qwen2": (llama_config(qkv_bias=True), "Qwen2ForCausalLM"),
    "qwen3": (llama_config(qk_norm=True, tie_embeddings=True), "Qwen3ForCausalLM"),
    "nano": (ModelConfig.from_depth(1, vocab_size=50), "Qwen3ForCausalLM"),
    "moss": (moss_config(rotary_dim=4), "CodeGenForCausalLM"),
    "moss-8-heads": (moss_config(num_heads=8, rotary_dim=2, ffn=48), "CodeGenForCausalLM"),
    "moss-2-heads": (moss_config(num_heads=2, rotary_dim=4), "GPTJForCausalLM"),
}


def stock(folder: Path, kind: str = "AutoModelForCausalLM"):
    """The folder's model in transformers, float32."""
    transformers = pytest.importorskip("transformers")
    model, report = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(report.values()), report  # nothing missing, unexpected or misshapen
    return model.eval()


def edit_json(file: Path, **values) -> None:
    data = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not KeyError}))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small Llama as we save it."""
    save_model(random_model(llama_config()), tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, *says: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    text = str(caught.value)
    assert "\n" not in text.strip(), text
    for words in says:
        assert words in text, text


# ---------------------------------------------------------------- both ways


@torch.no_grad()
@pytest.mark.parametrize("name", SAVED)
def test_transformers_reads_what_we_save(name, tmp_path):
    """Prevents: a checkpoint that only this project can read, or that others read with other numbers."""
    config, architecture = SAVED[name]
    model = random_model(config)
    save_model(model, tmp_path, eos=3)
    other = stock(tmp_path)
    assert type(other).__name__ == architecture
    assert other.config.eos_token_id == 3
    ids = random_ids(2, 40, vocab_size=50)
    torch.testing.assert_close(other(ids).logits, model(ids), atol=BOUND, rtol=0)
    again = load_model(tmp_path)
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [llama_config(tie_embeddings=True), llama_config(qk_norm=True), moss_config()], ids=str
)
def test_scalar_head_both_ways(config, tmp_path):
    """Prevents: a reward model that loses its head on saving, or scores differently in transformers."""
    model = random_model(config, "scalar")
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.head_kind == "scalar"
    ids = random_ids(1, 9, vocab_size=50)
    torch.testing.assert_close(again(ids), model(ids))
    other = stock(tmp_path, "AutoModelForSequenceClassification")
    torch.testing.assert_close(other(ids).logits[0, 0], model(ids)[0, -1], atol=BOUND, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("config", [llama_config(tie_embeddings=True), llama_config(), moss_config()], ids=str)
def test_fresh_scalar_head_on_a_language_model(config, tmp_path):
    """Prevents: a reward model that starts from random scores or from another body than its SFT model."""
    model = random_model(config)
    save_model(model, tmp_path)
    reward = load_model(tmp_path, head="scalar")
    ids = random_ids(1, 9, vocab_size=50)
    assert reward(ids).abs().max() == 0
    torch.testing.assert_close(reward.hidden(ids), model.hidden(ids))


@torch.no_grad()
def test_shards_of_both_kinds(tmp_path):
    """Prevents: shards read in part, or `pytorch_model.bin` and safetensors that differ."""
    for config in (llama_config(tie_embeddings=True), moss_config()):
        model = random_model(config)
        home = tmp_path / config.family
        save_model(model, home)
        ids = random_ids(1, 20, vocab_size=50)
        stock(home).save_pretrained(home / "shards", max_shard_size="10KB")
        assert len(list((home / "shards").glob("model-*.safetensors"))) > 2
        torch.testing.assert_close(load_model(home / "shards")(ids), model(ids))
        tensors = load_file(home / "model.safetensors")
        names = sorted(tensors)
        (home / "bin").mkdir()
        shutil.copy(home / "config.json", home / "bin")
        torch.save(tensors, home / "bin" / "pytorch_model.bin")
        torch.testing.assert_close(load_model(home / "bin")(ids), model(ids))
        (home / "bin" / "pytorch_model.bin").unlink()
        for part in (0, 1):
            torch.save({n: tensors[n] for n in names[part::2]}, home / "bin" / f"pytorch_model-{part}.bin")
        places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        (home / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
        torch.testing.assert_close(load_model(home / "bin")(ids), model(ids))


@torch.no_grad()
def test_released_moss_layout(tmp_path):
    """Prevents: the released checkpoints refused for their model_type, remote code or saved mask buffers."""
    model = random_model(moss_config(rotary_dim=4))
    save_model(model, tmp_path, dtype=torch.float16)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.causal_mask"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    auto_map = {"AutoModelForCausalLM": "modeling_moss.MossForCausalLM"}
    released = {
        "architectures": ["MossForCausalLM"],
        "model_type": "moss",
        "wbits": 32,
        "groupsize": 128,
        "n_inner": None,
    }
    edit_json(tmp_path / "config.json", auto_map=auto_map, **released)
    (tmp_path / "modeling_moss.py").write_text("raise SystemExit('remote code was run')")
    again = load_model(tmp_path)
    ids = random_ids(1, 20, vocab_size=50)
    torch.testing.assert_close(again(ids), model(ids), atol=0.05, rtol=0)
    edit_json(tmp_path / "config.json", wbits=4)
    refused(tmp_path, "quantized")


def test_qkv_order_by_hand():
    """Prevents: queries, values and keys exchanged: blocks of a quarter of the heads, each q, v, k."""
    fused = torch.arange(24.0)[:, None].expand(24, 8)  # the row's number in every column
    q, v, k = (split_qkv(fused, part)[:, 0].tolist() for part in range(3))
    assert q == [0, 1, 6, 7, 12, 13, 18, 19]
    assert v == [2, 3, 8, 9, 14, 15, 20, 21]
    assert k == [4, 5, 10, 11, 16, 17, 22, 23]
    assert torch.equal(join_qkv([split_qkv(fused, part) for part in range(3)]), fused)


@torch.no_grad()
def test_gptj_layout_of_moss(tmp_path):
    """Prevents: no way to servers that know GPT-J but not CodeGen."""
    model = random_model(moss_config(rotary_dim=4))
    save_model(model, tmp_path, layout="gptj")
    ids = random_ids(1, 20, vocab_size=50)
    other = stock(tmp_path)
    assert type(other).__name__ == "GPTJForCausalLM"
    torch.testing.assert_close(other(ids).logits, model(ids), atol=BOUND, rtol=0)
    with pytest.raises(ValueError, match="'gptj' does not fit"):
        save_model(random_model(llama_config()), tmp_path, layout="gptj")


def test_dtypes(tmp_path):
    """Prevents: a nano twice its size on disk, and weights in another dtype than asked for."""
    model = random_model(llama_config())
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.embed.weight, model.embed.weight.bfloat16().float(), rtol=0, atol=0)
    assert {p.dtype for p in load_model(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in loaded.parameters())


def test_config_keys_before_transformers_5(folder):
    """Prevents: older checkpoints read with default sizes: rope_scaling 'type', null key/value heads, no head_dim."""
    scaling = {"type": "yarn", "factor": 4.0}
    file = folder / "config.json"
    edit_json(
        file, rope_scaling=scaling, num_key_value_heads=None, head_dim=KeyError, rope_theta=1e6, auto_map={"a": "b"}
    )
    config = read_config(folder)
    assert (config.num_kv_heads, config.head_dim, config.rope_base) == (4, 8, 1e6)
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def test_compiled_model_is_saved_under_its_own_names(tmp_path):
    """Prevents: names with `_orig_mod` that nothing can read."""
    compiled = torch.compile(random_model(llama_config()))
    assert isinstance(compiled, torch.nn.Module)
    save_model(compiled, tmp_path)
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "model.safetensors"))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"hidden_size": KeyError}, "lacks ['hidden_size']"),
        ({"num_hidden_layers": 10**12}, "num_layers is 1000000000000"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"hidden_size": 32.5}, "hidden is 32.5"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"vocab_size": 51}, "model.embed_tokens.weight [50, 32] instead of [51, 32]"),
        ({"num_hidden_layers": 3}, "lack tensors: model.layers.2."),
        ({"num_hidden_layers": 1}, "unknown tensors: model.layers.1."),
        ({"model_type": "qwen3"}, "q_norm"),
        ({"vocab_size": 4_000_000, "hidden_size": 65_536, "head_dim": 4096}, "instead of"),
    ],
)
def test_config_that_does_not_fit(folder, values, says):
    """Prevents: a wrong or hostile config that ends in a crash, a full memory, or wrong numbers."""
    edit_json(folder / "config.json", **values)
    refused(folder, says)


JUNK = [None, True, -1, 0, 1.5, float("nan"), 10**400, "x", [], [[1]], {}, {"rope_type": []}, {"a": {}}]


@pytest.mark.parametrize("config", [llama_config(rope_scaling=YARN), moss_config()], ids=["llama", "moss"])
def test_junk_under_any_key(config, tmp_path):
    """Prevents: a value of the wrong type, under any key of config.json, that ends in another error than ValueError."""
    save_model(random_model(config), tmp_path)
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    changed = [good | {key: junk} for key in good for junk in JUNK]
    for key in good.get("rope_scaling") or {}:
        changed += [good | {"rope_scaling": {**YARN, key: junk}} for junk in [*JUNK, 1, 1e-300]]
    refusals = 0
    for values in changed:
        file.write_text(json.dumps(values))
        try:
            load_model(tmp_path)
        except ValueError:
            refusals += 1
    assert len(changed) / 3 < refusals < len(changed)


def test_absurd_sizes_cost_no_memory(folder):
    """Prevents: gigabytes taken for a config before anyone looked whether the file holds that much."""
    edit_json(
        folder / "config.json", vocab_size=4_000_000, hidden_size=65_536, head_dim=4096, intermediate_size=500_000
    )
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, "instead of")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB; the embedding alone is 10^9 KB


def test_missing_folder_and_files(tmp_path, folder):
    """Prevents: a traceback instead of the name of what is missing."""
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        load_model(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_model(folder)


def test_broken_json(folder, monkeypatch):
    """Prevents: parser errors without a file name, deep nesting that overflows the stack, endless files."""
    for text, says in (("{", "it is not JSON"), ("[1]", "must hold a JSON object"), ("[" * 100_000, "it is not JSON")):
        (folder / "config.json").write_text(text)
        refused(folder, "config.json", says)
    monkeypatch.setattr(shards, "JSON_LIMIT", 1000)
    refused(folder, "100000 bytes")


def test_truncated_and_garbled_files(folder):
    """Prevents: half-copied weights that load as zeros or crash the reader."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", struct.pack("<Q", 2**62) + whole[8:], b"<html>" + whole):
        file.write_bytes(damaged)
        refused(folder, "model.safetensors")
    file.write_bytes(whole)
    load_model(folder)


def overlapping(whole: bytes) -> bytes:
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + size :]


def test_overlapping_tensors(folder):
    """Prevents: a small file that claims to be a large model by naming the same bytes twice."""
    file = folder / "model.safetensors"
    file.write_bytes(overlapping(file.read_bytes()))
    refused(folder, "model.safetensors")


def test_wrong_tensors(folder):
    """Prevents: extra, integer or misshapen tensors taken for weights."""
    file = folder / "model.safetensors"
    good = load_file(file)
    name = "model.norm.weight"
    for change, says in (
        ({"model.extra": torch.ones(2)}, "unknown tensors: model.extra"),
        ({name: torch.ones(32, dtype=torch.int64)}, "dtype torch.int64"),
        ({name: torch.ones(31)}, "model.norm.weight [31] instead of [32]"),
        ({f"junk.{i}": torch.ones(1) for i in range(9)}, "and 5 more"),
    ):
        save_file(good | change, file, metadata={"format": "pt"})
        refused(folder, says)


def index_of(folder: Path) -> Path:
    """Turn the folder's weights into one shard with an index."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    load_model(folder)
    return file


def test_index_that_does_not_fit(folder):
    """Prevents: a missing shard or a tensor in another shard found only when the layer is used."""
    index = index_of(folder)
    places = json.loads(index.read_text())["weight_map"]
    for wrong, says in (
        ({**places, "model.norm.weight": "model-2.safetensors"}, "model-2.safetensors, which is not there"),
        ({**places, "model.more": "model-1.safetensors"}, "model.more is not in model-1.safetensors"),
        ({"model.norm.weight": 3}, "must map"),
        ([], "must map"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        refused(folder, "index.json", says)


def test_index_that_leaves_the_folder(folder, tmp_path):
    """Prevents: a downloaded checkpoint that makes us open other files of this machine."""
    index = index_of(folder)
    names = json.loads(index.read_text())["weight_map"]
    shutil.copy(folder / "model-1.safetensors", tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(folder / "model-1.safetensors", folder / "sub")
    for name in (
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "link.safetensors",
        "sub/model-1.safetensors",
        "..",
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
        refused(folder, "outside the folder")


def test_links_of_a_hub_cache_are_followed(folder, tmp_path):
    """Prevents: models from the hub's cache refused, whose files are all links into its `blobs`."""
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, cache / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    assert load_model(snapshot).config == read_config(folder)


class Evil:
    """Would create a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickles_run_nothing(folder, tmp_path):
    """Prevents: code execution from `pytorch_model.bin`, and pickles that lie about what they hold."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file, mark = folder / "pytorch_model.bin", tmp_path / "ran"
    torch.save(tensors | {"evil": Evil(mark)}, file)
    refused(folder, "nothing in it was run")
    file.write_bytes(pickle.dumps(Evil(mark)))
    refused(folder, "nothing in it was run")
    assert not mark.exists()
    torch.save(tensors, file)
    load_model(folder)
    file.write_bytes(file.read_bytes()[:-500])
    refused(folder, "pytorch_model.bin")
    file.write_bytes(b"")
    refused(folder, "pytorch_model.bin")
    torch.save([1], file)
    refused(folder, "holds a list")
    name = "model.norm.weight"
    for value, says in (
        (torch.ones(1).expand(32), "larger than its data"),
        (torch.ones(32).to_sparse(), "not a dense tensor"),
        (3, "not a dense tensor"),
    ):
        torch.save(tensors | {name: value}, file)
        refused(folder, says)


# ---------------------------------------------------------------- writing


def test_failed_save_leaves_the_old_model(folder, monkeypatch):
    """Prevents: a full disk that destroys the checkpoint it was to replace, or leaves rubbish beside it."""
    old = load_model(folder)

    def full(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise weights.SafetensorError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    names = sorted(p.name for p in folder.iterdir())
    with pytest.raises(OSError, match="No space left"):
        save_model(random_model(llama_config(vocab_size=60)), folder)
    assert sorted(p.name for p in folder.iterdir()) == names
    assert torch.equal(load_model(folder).embed.weight, old.embed.weight)


def test_saved_files_follow_the_umask(tmp_path):
    """Prevents: weights that only the one who trained them can read, while the config beside them is for all."""
    before = os.umask(0o027)
    try:
        save_model(random_model(llama_config()), tmp_path)
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {
        "config.json": 0o640,
        "model.safetensors": 0o640,
    }


def test_save_into_a_file_is_refused(tmp_path):
    """Prevents: a traceback from deep inside when the output path is taken."""
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OSError, match="taken"):
        save_model(random_model(llama_config()), tmp_path / "taken")


def test_saving_does_not_touch_the_model(tmp_path):
    """Prevents: training that goes on in bfloat16, or on detached weights, after a checkpoint."""
    model = random_model(moss_config())
    before = copy.deepcopy(model.state_dict())
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert isinstance(model, Decoder) and all(p.requires_grad for p in model.parameters())
