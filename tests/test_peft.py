"""Adapters in files: PEFT reads ours, we read PEFT's, and what does not fit is one clear error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moss import peft
from moss.lora import LearntRows, Spec, inject, load_base, merge, parse
from moss.model import Decoder, Head, ModelConfig
from moss.optim import make_optimizer
from moss.train.loss import next_token
from moss.weights import load_model, save_model
from tests.test_lora import ROWS, filled, row
from tests.test_model import BOUND, llama_config, moss_config, random_ids, random_model

TINY = llama_config(tie_embeddings=True, qk_norm=True)
SPEC = parse("r=4,alpha=6")


def saved(folder: Path, config: ModelConfig, head: Head = "lm", **values: Any) -> tuple[Path, Path, Decoder]:
    """(folder of a base, folder of an adapter of it, the adapted model)."""
    model = random_model(config, head)
    base = folder / "base"
    save_model(model, base, layout="gptj" if config.family == "moss" else None)
    filled(model, SPEC, **values)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05)
    peft.save(model, folder / "adapter", SPEC, base)
    return base, folder / "adapter", model


def stock(folder: Path, kind: str = "AutoModelForCausalLM", **values: Any) -> Any:
    """The model of a folder in transformers; skips where it or PEFT is missing."""
    pytest.importorskip("peft", reason="peft is not installed: pip install -c constraints.txt -e .[dev]")
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, local_files_only=True, **values)


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (TINY, ROWS),
        (llama_config(), ROWS),
        (llama_config(qkv_bias=True), range(0)),
        (moss_config(), range(0)),
        (moss_config(), ROWS),
    ],
    ids=["qwen3, tied, new rows", "llama, new rows", "qwen2", "gptj", "gptj, new rows"],
)
@torch.no_grad()
def test_peft_reads_ours(config: ModelConfig, rows: range, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    """Prevents: names, scale or rows that PEFT takes for something else, or passes over with a warning."""
    base, adapter, model = saved(tmp_path, config, rows=rows)
    oracle = stock(base)
    from peft import PeftModel

    ids = random_ids(2, 20, vocab_size=50)
    assert not torch.allclose(oracle(ids).logits, model(ids), atol=0.1)  # the adapter says something
    adapted = PeftModel.from_pretrained(oracle, adapter).eval()
    assert not [str(each.message) for each in recwarn if "adapter" in str(each.message).lower()]
    if config.family == "llama" or not rows:  # with learnt rows PEFT forgets the head's bias until it merges
        torch.testing.assert_close(adapted(ids).logits, model(ids), atol=BOUND, rtol=0)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, model(ids), atol=BOUND, rtol=0)


@torch.no_grad()
def test_peft_reads_our_scalar_head(tmp_path: Path):
    """Prevents: a preference model whose head is left at its random start when others load it."""
    base, adapter, model = saved(tmp_path, TINY, "scalar")
    oracle = stock(base, "AutoModelForSequenceClassification", num_labels=1)
    from peft import PeftModel

    ids = random_ids(1, 20, vocab_size=49) + 1
    oracle.config.pad_token_id = 0
    adapted = PeftModel.from_pretrained(oracle, adapter).eval()
    torch.testing.assert_close(adapted(ids).logits[:, 0], model(ids)[:, -1], atol=BOUND, rtol=0)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (TINY, {"target_modules": ["q_proj", "down_proj"], "trainable_token_indices": list(ROWS)}),
        (TINY, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
        (
            llama_config(),
            {
                "target_modules": ".*proj",
                "trainable_token_indices": {key: [*ROWS] for key in ("embed_tokens", "lm_head")},
            },
        ),
        (moss_config(), {"target_modules": ["q_proj", "fc_in", "out_proj"]}),
    ],
    ids=["tied rows", "all-linear", "pattern and rows", "gptj"],
)
@torch.no_grad()
def test_we_read_pefts(config: ModelConfig, values: dict[str, Any], tmp_path: Path):
    """Prevents: an adapter from outside that loads and then computes something else."""
    save_model(random_model(config), tmp_path / "base", layout="gptj" if config.family == "moss" else None)
    oracle = stock(tmp_path / "base")
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(oracle, LoraConfig(r=3, lora_alpha=5, **values)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    made.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    spec = peft.load(model, tmp_path / "adapter", tmp_path / "base")
    assert (spec.r, spec.alpha, spec.base) == (3, 5.0, "")
    ids = random_ids(2, 20, vocab_size=50)
    expected = made(ids).logits
    torch.testing.assert_close(model(ids), expected, atol=BOUND, rtol=0)
    merge(model)
    torch.testing.assert_close(model(ids), expected, atol=BOUND, rtol=0)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("config", [TINY, llama_config(), moss_config()], ids=["tied", "untied", "moss"])
def test_round_trip(config: ModelConfig, head: Head, tmp_path: Path):
    """Prevents: a part of an adapter that is not saved, or a spec that comes back as another."""
    base, adapter, model = saved(tmp_path, config, head, rows=ROWS)
    again = load_model(base)
    if head == "scalar":
        torch.nn.init.zeros_(again.head.weight)  # type: ignore[union-attr]  # the adapter brings its own
    targets = tuple(target for target in ("q", "k", "v", "o", "gate", "up", "down"))
    targets = targets if config.family == "llama" else tuple(each for each in targets if each != "gate")
    assert peft.load(again, adapter, base) == Spec(4, 6.0, targets)
    ids = random_ids(2, 20, vocab_size=50)
    assert torch.equal(again(ids), model(ids))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert sum(each.numel() for each in tensors.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_rows_join_those_of_an_adapter(tmp_path: Path):
    """Prevents: rows of new tokens that come back as others, or as the base has them, when more are learnt."""
    base, adapter, model = saved(tmp_path, TINY, rows=range(43, 47))
    again = load_model(base)
    peft.load(again, adapter, base, rows=range(47, 50))
    assert isinstance(again.embed, LearntRows) and len(again.embed.rows) == 7
    assert torch.equal(again.embed.weight, model.embed.weight)
    with pytest.raises(ValueError, match="must be neighbours"):
        peft.load(load_model(base), adapter, base, rows=range(48, 50))


def test_integers_come_back(tmp_path: Path):
    """Prevents: an adapter that was trained over integers and then, unasked, computes over floats."""
    model = random_model(TINY)
    save_model(model, tmp_path / "base")
    spec = parse("r=2,targets=v,base=int4")
    filled(model, spec)
    peft.save(model, tmp_path, spec)
    again, over_floats = load_model(tmp_path / "base"), load_model(tmp_path / "base")
    assert peft.load(again, tmp_path) == spec
    assert peft.load(over_floats, tmp_path, width="") == parse("r=2,targets=v")
    ids = random_ids(1, 9, vocab_size=50)
    assert torch.equal(again(ids), model(ids))
    assert not torch.equal(over_floats(ids), model(ids))


@pytest.mark.parametrize("base", ["", "int4"])
def test_resumed_equals_unbroken(base: str, tmp_path: Path):
    """Prevents: a part of the adapter, or its precision, that is lost between saving and going on."""
    folder, spec = tmp_path / "base", parse("r=4,targets=q+v" + (f",base={base}" if base else ""))
    save_model(random_model(TINY), folder)

    def begin() -> Decoder:
        return load_base(folder, spec, dtype=torch.float32, device="cpu")

    def train(model: Decoder, steps: range, state: dict[str, Any] | None = None) -> dict[str, Any]:
        optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.0, muon=False)
        if state:
            optimizer.load_state_dict(copy.deepcopy(state))
        for step in steps:
            next_token(model, row(seed=step)).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.state_dict()

    unbroken = begin()
    inject(unbroken, spec, rows=ROWS)
    state = train(unbroken, range(2))
    peft.save(unbroken, tmp_path / "run", spec, folder)
    resumed = begin()
    assert peft.load(resumed, tmp_path / "run", folder) == spec
    train(unbroken, range(2, 4), state)
    train(resumed, range(2, 4), state)
    for name, value in unbroken.named_parameters():
        assert torch.equal(value, resumed.get_parameter(name)), name


# ---------------------------------------------------------------- what does not fit


def edit(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change(adapter: Path, edit_tensors: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    edit_tensors(tensors)
    save_file(tensors, file)


def refused(base: Path, adapter: Path, says: str, *named: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        peft.load(load_model(base), adapter, *named)
    assert "adapter" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', supported is 'LORA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 8}, r"A has \[4\] rows where adapter_config.json has r 8"),
        ({"r": "4"}, "r '4'"),
        ({"lora_alpha": 0}, "lora_alpha 0"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"trainable_token_indices": [1, 3]}, "neighbours"),
        ({"trainable_token_indices": {"a": [1, 2], "b": [2, 3]}}, "neighbours"),
        ({"trainable_token_indices": "all"}, "neighbours"),
    ],
)
def test_what_we_do_not_compute_is_refused(values: dict[str, Any], says: str, tmp_path: Path):
    """Prevents: a kind of adapter that loads without a word and computes something else."""
    base, adapter, _ = saved(tmp_path, TINY)
    edit(adapter, **values)
    refused(base, adapter, says)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path):
    """Prevents: tensors that are left out, cut or stretched where model and adapter differ."""
    _, adapter, _ = saved(tmp_path, TINY)
    wider = random_model(llama_config(tie_embeddings=True, qk_norm=True, ffn=96))
    save_model(wider, tmp_path / "wider")
    refused(tmp_path / "wider", adapter, r"down_proj.lora_A.weight \[4, 64\] instead of \[4, 96\]")
    save_model(random_model(llama_config(tie_embeddings=True, qk_norm=True, num_layers=3)), tmp_path / "deeper")
    refused(tmp_path / "deeper", adapter, "no base_model.model.model.layers.2")
    save_model(random_model(llama_config(tie_embeddings=True, qk_norm=True, num_layers=1)), tmp_path / "flat")
    refused(tmp_path / "flat", adapter, "unknown base_model.model.model.layers.1")
    save_model(random_model(moss_config()), tmp_path / "moss")
    refused(tmp_path / "moss", adapter, "adapts .*gate_proj.*this model has .*fc_in")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path):
    """Prevents: an adapter on a base of the same shape and other weights, which talks nonsense."""
    base, adapter, model = saved(tmp_path, TINY)
    merge(model)
    save_model(model, tmp_path / "merged")
    refused(tmp_path / "merged", adapter, f"is an adapter of {base}, whose weights", tmp_path / "merged")
    peft.load(load_model(base), adapter, base)
    peft.load(load_model(base), adapter, "somebody/a-hub-id")  # nothing is known of that one
    assert peft.fingerprint(tmp_path / "nowhere") == ""


def test_fused_projections_are_refused(tmp_path: Path):
    """Prevents: a CodeGen adapter of PEFT's, of one fused layer, read as if it were for one of the three."""
    base, adapter, _ = saved(tmp_path, moss_config())

    def fuse(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".q_proj." in name]:
            tensors[name.replace("q_proj", "qkv_proj")] = tensors.pop(name)

    change(adapter, fuse)
    refused(base, adapter, "adapts .*qkv_proj")


def test_broken_files(tmp_path: Path):
    """Prevents: a traceback, half an adapter or a pickle that is run."""
    base, adapter, _ = saved(tmp_path, TINY)
    change(adapter, lambda tensors: tensors.update({name: value[0, 0] for name, value in tensors.items()}))
    refused(base, adapter, r"A has \[0\] rows")
    change(adapter, lambda tensors: tensors.clear())
    refused(base, adapter, r"adapts \[\]")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:4])
    refused(base, adapter, "not a whole safetensors file")
    file.unlink()
    refused(base, adapter, "never from a pickle")
    (adapter / "adapter_config.json").unlink()
    refused(base, adapter, "has no adapter_config.json")


def test_a_full_disk_keeps_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prevents: a checkpoint that is gone because the next one did not fit."""
    base, adapter, model = saved(tmp_path, TINY)

    def full(*_: object, **__: object) -> None:
        raise peft.SafetensorError("No space left on device")

    monkeypatch.setattr(peft, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*adapter_model.safetensors: No space"):
        peft.save(model, adapter, SPEC, base)
    peft.load(load_model(base), adapter, base)


def test_saving_is_repeatable(tmp_path: Path):
    """Prevents: checkpoints whose checksums differ although nothing does."""
    base, adapter, model = saved(tmp_path, TINY, rows=ROWS)
    before = [file.read_bytes() for file in sorted(adapter.iterdir())]
    peft.save(model, adapter, SPEC, base)
    assert [file.read_bytes() for file in sorted(adapter.iterdir())] == before
