"""Integer weights: what they stand for, how far they are from the floats, and what of a model is turned."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moss import resolve
from moss.chat import META_INSTRUCTION, Dialog, Turn, render
from moss.engine import quant
from moss.engine.kernels import SLACK, library
from moss.engine.quant import QuantLinear, load_quantized, pack, product, quantize_, unpack
from moss.engine.step import runner
from moss.model import Decoder, ModelConfig
from moss.weights import load_model, open_model, save_model
from tests.fakes import toy_model
from tests.test_kernels import EACH_PATH


def weight_of(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * 0.05


def test_int8_by_hand():
    """The largest value of a row is code 127, whatever its sign; an empty row stays empty."""
    codes, scale, offset = pack(torch.tensor([[0.0, -2.54, 1.0], [0.0, 0.0, 0.0]]), "int8")
    assert codes.shape == (2, 128)
    assert codes[0, :3].tolist() == [0, -127, 50]
    assert codes[1].count_nonzero() == 0
    assert scale[0].item() == pytest.approx(0.02)
    assert offset is None


def test_int4_by_hand():
    """Sixteen levels from the lowest to the highest of a group; byte j holds columns j and j + 64."""
    weight = torch.zeros(1, 128)  # in levels 0.25 apart from -2: code 8
    weight[0, 0], weight[0, 64] = -2.0, 1.75
    codes, scale, offset = pack(weight, "int4")
    assert codes.shape == (1, 64)
    assert (scale[0, 0].item(), offset[0, 0].item()) == (0.25, -2.0)
    assert codes[0, 0].item() == 0 | 15 << 4
    assert codes[0, 1].item() == 8 | 8 << 4
    assert scale.numel() - scale.shape[1] >= SLACK  # room behind the last row for vector loads


@pytest.mark.parametrize("path", EACH_PATH)
@pytest.mark.parametrize("width", ["int8", "int4"])
@pytest.mark.parametrize("cols", [128, 300, 704])
def test_weights_are_within_half_a_step(width: str, cols: int, path: str, monkeypatch: pytest.MonkeyPatch):
    """A wrong nibble, group or padded column shows as an error of many steps; kernels and torch unpack alike."""
    weight = weight_of(21, cols)
    layer = QuantLinear(weight, None, width)
    monkeypatch.setattr(quant, "library", lambda: None)
    plain = layer.dequantize()
    step = layer.scale[:21, None] if width == "int8" else layer.scale[:21].float().repeat_interleave(128, 1)[:, :cols]
    off = ((plain - weight).abs() / step).flatten()
    assert off.quantile(0.98) <= 0.51  # half a step, and a little for int4's offset in bfloat16
    assert off.max() <= (0.5001 if width == "int8" else 4.0)  # the rarest values may be clipped to a smaller range
    monkeypatch.setattr(quant, "library", lambda: library(path))
    assert torch.equal(layer.dequantize(), plain) or (layer.dequantize() - plain).abs().max() < 1e-7
    assert torch.equal(layer.dequantize(5, 7, torch.bfloat16), layer.dequantize(5, 7).bfloat16())


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_few_tokens_many_tokens_and_no_kernels_agree(width: str, monkeypatch: pytest.MonkeyPatch):
    """The prompt is read by one way and answered by the other; a bias forgotten in one of them would not crash."""
    layer = QuantLinear(weight_of(70, 300), torch.randn(70), width)
    x = torch.randn(2, 70, 300, generator=torch.Generator().manual_seed(0))
    exact = x @ layer.dequantize().T + layer.bias
    many = layer(x)
    few = torch.stack([layer(x[:, column]) for column in range(70)], 1)
    assert many.shape == exact.shape
    assert (many - exact).norm() / exact.norm() < 0.005  # bfloat16 product
    assert (few - exact).norm() / exact.norm() < 0.01  # activations of 8 bits
    monkeypatch.setattr(quant, "library", lambda: None)
    alone = layer(x[:, 0])
    assert (alone - exact[:, 0]).norm() / exact.norm() < 0.005
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 70, 70)


@pytest.mark.parametrize("path", EACH_PATH)
@pytest.mark.parametrize("width", ["int8", "int4"])
def test_pieces_are_joined_in_order(width: str, path: str, monkeypatch: pytest.MonkeyPatch):
    """What one call of the kernels cannot take goes in pieces, the last of them not whole; none may be lost or move."""
    monkeypatch.setattr(quant, "library", lambda: library(path))
    monkeypatch.setitem(quant.MANY, path, 40)
    layer = QuantLinear(weight_of(70, 300), torch.randn(70), width)
    x = torch.randn(2, 20, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), torch.stack([layer(x[:, column]) for column in range(20)], 1))


@pytest.mark.parametrize(("width", "bits", "error"), [("int8", 8.0, 0.008), ("int4", 4.25, 0.1)])
def test_quantize_turns_every_linear_layer(width: str, bits: float, error: float):
    """One layer left in floats costs more time than all others together; the head is a third of a small model."""
    model = Decoder(ModelConfig(vocab_size=256, num_layers=2, hidden=256, num_heads=4, tie_embeddings=True))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[1] ** -0.5)
    table = model.embed.weight.detach().clone()
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert quantize_(model, width) is model
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == linears + 1  # a tied embedding gets a head
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert torch.equal(model.embed.weight, table.bfloat16())
    head = layers[-1]
    assert head is model.head
    assert (head.dequantize() - table).norm() / table.norm() < error
    stored = sum(buffer.numel() * buffer.element_size() for buffer in head.buffers())
    assert stored * 8 / table.numel() == pytest.approx(bits, rel=0.05)


TIED: dict[str, Any] = {"tie_embeddings": True, "qk_norm": True}
FUSED: dict[str, Any] = {"family": "moss", "rotary_dim": 16}  # one matrix of queries, keys and values in the file


@pytest.mark.parametrize("width", ["int8", "int4"])
@pytest.mark.parametrize("values", [TIED, FUSED], ids=["tied", "fused"])
def test_loading_turns_each_layer_as_it_is_read(
    width: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Held in floats first, 16 billion parameters take 31 GB on their way to 9; and the result must be the same."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=300, num_layers=2, hidden=128, num_heads=4, **values)
    model = Decoder(config)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    save_model(model, tmp_path)
    wanted = quantize_(load_model(tmp_path), width)
    matrices: list[weakref.ref[Any]] = []

    def watched(path: Path):
        model, read = open_model(path)

        def watch(name: str) -> torch.Tensor:
            assert not any(each() for each in matrices), f"an earlier matrix was still there when {name} was read"
            value = read(name)
            if value.ndim > 1:
                matrices.append(weakref.ref(value.untyped_storage()))
            return value

        return model, watch

    monkeypatch.setattr(quant, "open_model", watched)
    loaded = load_quantized(tmp_path, width)
    assert len(matrices) == 1 + 2 * 7 - 2 * (config.family == "moss") + 1
    pairs = [(dict(m.named_parameters()) | dict(m.named_buffers())) for m in (wanted, loaded)]
    assert pairs[0].keys() == pairs[1].keys()
    for name, tensor in pairs[0].items():
        assert tensor.dtype == pairs[1][name].dtype, name
        assert torch.equal(tensor, pairs[1][name]), name
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids), wanted(ids))


@pytest.mark.parametrize("backend", [None, "eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", ["int8", "int4"])
def test_the_way_of_gpus_agrees(width: str, backend: str | None, monkeypatch: pytest.MonkeyPatch):
    """What a GPU compiles, here on the CPU: plain, traced as one graph, as kernels. No size may make new ones."""
    made: dict[Any, Any] = {}
    torch.compiler.reset()

    def compiled(function: Any) -> Any:
        options: dict[str, Any] = {"dynamic": True, "fullgraph": True, "backend": backend}
        return function if backend is None else made.setdefault(function, torch.compile(function, **options))

    monkeypatch.setattr(quant, "compiled", compiled)
    monkeypatch.setattr(quant, "GPU_BLOCK", 1 << 13)
    for rows, cols in ((70, 300), (64, 256), (96, 512), (130, 704)):
        layer = QuantLinear(weight_of(rows, cols), None, width)
        for n in (1, 2, quant.FEW, quant.FEW + 1, 40):
            x = torch.randn(n, cols, generator=torch.Generator().manual_seed(n))
            torch.testing.assert_close(layer._on_gpu(x), x @ layer.dequantize().T)
    assert backend is None or set(made) == {product, unpack}


def test_a_change_of_dtype_leaves_the_scales():
    """`model.bfloat16()` or `.half()` after quantizing would round what the integers are multiplied with."""
    layer = QuantLinear(weight_of(8, 128), torch.randn(8), "int8")
    before = [buffer.clone() for buffer in layer.buffers()]
    nn.Sequential(layer).bfloat16().half()
    for old, new in zip(before, layer.buffers()):
        assert new.dtype == old.dtype
        assert torch.equal(new, old)


def test_what_cannot_be_quantized_says_so():
    """Turned twice, weights would be noise; a reward model's scores would move without a word."""
    model = quantize_(toy_model(), "int4")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_(model, "int8")
    with pytest.raises(ValueError, match="'int3'"):
        quantize_(toy_model(), "int3")
    with pytest.raises(ValueError, match="scalar"):
        quantize_(Decoder(model.config, head="scalar"), "int8")


@pytest.mark.parametrize(("width", "lost"), [("int8", 0.02), ("int4", 0.15)])
@torch.inference_mode()
def test_the_bundled_model_keeps_its_mind(width: str, lost: float):
    """Asked as it was trained, the model gives its own likeliest thoughts hardly less probability than before."""
    model, tok = resolve.load()
    end = tok.marker("<eot>")[0]
    said = []
    for question in ("What is 12*30?", "What is 512/16?", "37乘以12等于多少？", "Hello!", "你好"):
        switches = {"thoughts": True, "calculator": True}
        prompt, _ = render(Dialog(META_INSTRUCTION, switches, [Turn(question)]), tok, until="thoughts")
        ids = torch.tensor([prompt])
        while ids[0, -1] != end and ids.shape[1] < len(prompt) + 24:
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
        said.append((ids, len(prompt)))

    def surprise() -> float:
        parts = [nn.functional.cross_entropy(model(ids)[0, at - 1 : -1].float(), ids[0, at:]) for ids, at in said]
        return float(torch.stack(parts).mean())

    before = surprise()
    quantize_(model, width)
    assert surprise() - before < lost


def test_without_kernels_the_decoder_runs(monkeypatch: pytest.MonkeyPatch):
    """No compiler: the model itself is the runner, and its integer layers are multiplied by torch."""
    model = quantize_(toy_model(), "int4")
    monkeypatch.setattr("moss.engine.step.library", lambda path: None)
    monkeypatch.setattr(quant, "library", lambda: None)
    assert runner(model) is model
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
