"""Finding a model, refusing what cannot talk, and what `auto` means on machines that these tests only imagine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moss import resolve
from moss.checkpoint import export
from moss.files import sha256
from moss.model import ModelConfig, num_parameters
from moss.resolve import choose, dtype_of, load, locate, num_bytes
from moss.tokenizer import Tokenizer, train
from moss.weights import save_model
from tests.fakes import toy_folder, toy_model

ROOT = Path(__file__).parent.parent
GB = 10**9
NANO = ModelConfig.from_depth(4, vocab_size=2048)
LARGE = ModelConfig.from_depth(32, vocab_size=32_000)  # 1.7 billion parameters


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(["hello there, add 1+1 and solve x = 1 你好"] * 3, 300)


@pytest.fixture
def folder(tok: Tokenizer, tmp_path: Path) -> Path:
    """A toy model and its tokenizer."""
    return toy_folder(tok, tmp_path / "model")


# ---------------------------------------------------------------------------------------------------- finding a model


def test_load_gives_a_model_and_its_tokenizer(folder: Path, tok: Tokenizer):
    """The plain case, so that the refusals below are about what they say."""
    model, loaded = load(folder)
    assert loaded.sha256 == tok.sha256
    assert model.config.vocab_size == tok.vocab_size


def test_without_a_name_the_bundled_model_is_found():
    """`moss chat` has to work from any folder."""
    assert locate() == ROOT / "moss" / "models" / "nano"


def test_loading_does_not_wake_the_compiler(folder: Path):
    """One random initialisation on the meta device imports torch._dynamo: 1.4 s more until the first token."""
    code = (
        "import sys; from moss.resolve import load; load(sys.argv[1]);"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_models_that_cannot_talk_are_refused_with_what_to_do(folder: Path, tmp_path: Path):
    """Each of these once ended in a traceback, or worse in a chat of nonsense."""

    def refusal(place: Path | str) -> str:
        with pytest.raises(ValueError) as caught:
            load(place)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no model folder" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(folder / "config.json")
    assert "on a server" in refusal("http://127.0.0.1:9/v1#some")
    (tmp_path / "run" / "step-000020").mkdir(parents=True)
    assert "holds no config.json" in refusal(tmp_path / "run")
    (tmp_path / "run" / "step-000020" / "config.json").write_text("{}")
    assert "did you mean" in refusal(tmp_path / "run")

    larger = train(["hello there, this one has more words in it, many more, 你好吗"] * 3, 330)
    larger.save(folder)
    assert "another model's tokenizer" in refusal(folder)
    other = train(["quite other words, and no digits"] * 3, 290)
    other.save(folder)
    (folder / "moss.json").write_text(json.dumps({"tokenizer_sha256": larger.sha256}))
    assert "not the one this model was trained with" in refusal(folder)
    (folder / "moss.json").write_text("{")
    assert "moss.json is broken" in refusal(folder)
    (folder / "moss.json").unlink()
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert "model.safetensors" in refusal(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refusal(folder)


def test_a_damaged_model_of_ours_is_refused(tmp_path: Path, tok: Tokenizer):
    """4 MB of zeros amid the weights gave a chat of garbage, without a word; another format was read as if ours."""
    folder = tmp_path / "ours"
    info = {"stage": "sft", "tokenizer_sha256": tok.sha256}
    folder.mkdir()
    export(folder, model=toy_model(vocab_size=tok.vocab_size), tokenizer=tok, info=info)
    load(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4000] + bytes(4000))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load(folder)
    weights.write_bytes(whole)
    (folder / "moss.json").write_text(json.dumps({"format": 9}))
    for reader in (load, resolve.stage):
        with pytest.raises(ValueError, match="is not of format 1"):
            reader(folder)


def test_the_bundled_model_is_whole():
    """A model that is bundled anew without its `moss.json` would be refused by every command."""
    record = json.loads((locate() / "moss.json").read_text(encoding="utf-8"))
    assert record["weights_sha256"] == sha256(locate() / "model.safetensors")


def test_a_model_without_chat_markers_is_refused(folder: Path):
    """A base model would never end a section; its answer would run on as noise."""
    base = Backend(BPE())
    base.pre_tokenizer = ByteLevel(add_prefix_space=False)
    base.train_from_iterator(
        ["hello"], BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=ByteLevel.alphabet())
    )
    base.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="knows none of the chat markers"):
        load(folder)


# ------------------------------------------------------------------------------------------------------ dtype, device


def test_free_memory_is_that_of_the_machine() -> None:
    """Prevents a pick from kilobytes taken for bytes."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal")) * 1024
    assert 50e6 < resolve.free_memory("cpu") <= total


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """An imagined machine: GB free in the memory of CPU and GPU (None: there is none), and what its CPU can do."""

    def imagine(cpu: float = 64, gpu: float | None = None, level: str = "AVX512", gpu_bf16: bool = True) -> None:
        free = {"cpu": cpu * GB, "cuda": (gpu or 0) * GB}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_bf16)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
        monkeypatch.setattr(resolve, "free_memory", free.__getitem__)

    return imagine


@pytest.mark.parametrize(
    ("config", "hardware", "chosen"),
    [
        (NANO, {}, ("float32", "cpu")),
        (NANO, {"gpu": 80}, ("float32", "cpu")),  # each layer would be a wait of its own
        (NANO, {"level": "AVX2"}, ("float32", "cpu")),
        (LARGE, {}, ("bfloat16", "cpu")),
        (LARGE, {"level": "AVX2"}, ("float32", "cpu")),
        (LARGE, {"level": "AVX2", "cpu": 5}, ("bfloat16", "cpu")),  # float32 takes 6.7 GB
        (LARGE, {"gpu": 80}, ("bfloat16", "cuda")),
        (LARGE, {"gpu": 2.5}, ("int8", "cuda")),
        (LARGE, {"gpu": 1.5}, ("int4", "cuda")),
        (LARGE, {"gpu": 0.5}, ("bfloat16", "cpu")),
        (LARGE, {"cpu": 2.5}, ("int8", "cpu")),
        (LARGE, {"level": "AVX2", "cpu": 1.5}, ("int4", "cpu")),
        (LARGE, {"gpu": 16, "gpu_bf16": False}, ("float32", "cuda")),
    ],
)
def test_auto_takes_what_fits(machine, config: ModelConfig, hardware: dict, chosen: tuple[str, str]):
    """A laptop that crawls in float32, or a GPU that runs out of memory, where another dtype would have done."""
    machine(**hardware)
    assert choose(config) == chosen


def test_what_the_user_names_is_done(machine):
    """`--dtype float32` that silently becomes bfloat16 makes every comparison wrong."""
    machine(cpu=0.5, gpu=80)
    assert choose(LARGE, "int8") == ("int8", "cuda")
    assert choose(LARGE, "int8", "cpu") == ("int8", "cpu")
    assert choose(LARGE, "float32", "cpu") == ("float32", "cpu")  # too large for it, and still what was asked
    assert choose(NANO, "int4") == ("int4", "cpu")
    assert choose(NANO, device="cuda") == ("float32", "cuda")
    with pytest.raises(ValueError, match=r"take 1\.0 GB as int4, and 0\.5 GB of memory are free on the cpu"):
        choose(LARGE, device="cpu")


def test_a_device_or_dtype_that_is_not_there_is_refused(machine):
    """torch's own error at this point is a traceback of thirty lines."""
    machine()
    with pytest.raises(ValueError, match="finds no CUDA GPU here; choose the device cpu"):
        choose(NANO, device="cuda")
    with pytest.raises(ValueError, match="dtype is 'int2'; it must be one of auto, float32"):
        choose(NANO, "int2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device is 'tpu'; it must be one of auto, cpu, cuda"):
        choose(NANO, device="tpu")  # type: ignore[arg-type]


def test_the_memory_of_weights_is_foretold(folder: Path):
    """A wrong estimate sends a model to a device that it does not fit; the tied head is easily forgotten."""
    for tied in (False, True):
        model = toy_model(vocab_size=2048, tie_embeddings=tied, hidden=256, num_heads=4)
        save_model(model, folder)
        train(["hello there"] * 3, 300).save(folder)
        for dtype in ("float32", "bfloat16", "int8", "int4"):
            loaded, _ = load(folder, dtype=dtype, device="cpu")
            tensors = [*loaded.parameters(), *loaded.buffers()]
            assert sum(t.nbytes for t in tensors) == pytest.approx(num_bytes(model.config, dtype), rel=0.08), dtype
            assert dtype_of(loaded) == dtype
    assert num_bytes(LARGE, "bfloat16") == 2 * num_parameters(LARGE)


def test_quantized_weights_say_almost_the_same(folder: Path):
    """A flag that loads fine and then talks nonsense is worse than an error."""
    ids = torch.arange(40)[None] % 90
    exact, _ = load(folder)
    for dtype, most in (("bfloat16", 0.05), ("int8", 0.05), ("int4", 0.5)):
        loaded, _ = load(folder, dtype=dtype)
        with torch.inference_mode():
            off = (loaded(ids).float() - exact(ids)).std() / exact(ids).std()
        assert 0 < off < most, (dtype, off)
