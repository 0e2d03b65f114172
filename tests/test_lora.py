"""Adapters: their maths by hand and against plain formulas, frozen integers below them, one base under many roles."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moss import lora
from moss.engine import Engine
from moss.engine.quant import QuantLinear
from moss.errors import UsageError
from moss.lora import LoRALinear, Spec, adapters, inject, merge, parse, view
from moss.model import Decoder, ModelConfig
from moss.optim import make_optimizer
from moss.train import loop
from moss.train.loss import next_token
from moss.weights import load_model, open_model, save_model
from tests.fakes import toy_model
from tests.test_engine import greedy, ids_of, naive
from tests.test_model import llama_config, moss_config, random_ids, random_model

TINY = llama_config(tie_embeddings=True, qk_norm=True)
ROWS = range(43, 50)
SPEC = Spec(4, 8.0)
FAMILIES = {"qwen3": TINY, "llama": llama_config(), "qwen2": llama_config(qkv_bias=True), "moss": moss_config()}


def filled(model: Decoder, spec: Spec = SPEC, *, seed: int = 0, **values: Any) -> Decoder:
    """The model with an adapter that says something: B is no longer zero."""
    inject(model, spec, seed=seed, **values)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for _, layer in adapters(model):
            if layer.B is not None:
                layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.1)
    return model


def floats(model: Decoder) -> Decoder:
    """The same adapted model over ordinary linear layers of the floats that its integers stand for."""
    twin = view(model)
    for name, layer in adapters(twin):
        base = layer.base
        assert isinstance(base, QuantLinear)
        plain = lora._linear(base.dequantize(), base.bias)
        twin.set_submodule(name, LoRALinear(plain, layer.A, layer.B, layer.scale) if layer.A is not None else plain)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name.endswith((".A", ".B")))
    return twin


def calm(model: Decoder) -> Decoder:
    """The model with weights that keep a vector's length, so that roundings do not grow from layer to layer."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=torch.Generator().manual_seed(len(weight)))
    return model


def row(length: int = 24, seed: int = 1) -> dict[str, Tensor]:
    """A packed batch of one document a row, learnt but for its first token."""
    ids = random_ids(2, length, vocab_size=50, seed=seed)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    return {
        "ids": ids,
        "mask": mask,
        "positions": torch.arange(length).expand(2, -1),
        "segments": torch.ones_like(ids),
    }


# ---------------------------------------------------------------- what is asked for


def test_parse():
    """Prevents: a part of --lora that is read as another, or whose default is not the one documented."""
    assert parse("16") == Spec(16, 32.0)
    assert parse("r=8") == Spec(8, 16.0)
    assert parse("targets=v+q") == Spec(16, 32.0, ("q", "v"))
    assert parse("base=int4, r=4, alpha=4.5") == Spec(4, 4.5, (), "int4")
    assert parse("r=16,alpha=32,targets=q+k+v+o+gate+up+down,base=int8").targets == lora.TARGETS


@pytest.mark.parametrize(
    ("text", "says"),
    {
        "r=0": "whole number from 1",
        "r=-2": "whole number from 1",
        "r=1.5": "whole number from 1",
        "": "whole number from 1",
        "alpha=0": "above 0",
        "alpha=nan": "above 0",
        "alpha=x": "above 0",
        "targets=q+w": "unknown target 'w'",
        "targets=": "unknown target ''",
        "base=int2": "int8 or int4",
        "rank=3": "not one of",
        "r=3,8": "each once",
    }.items(),
)
def test_nonsense_is_refused(text: str, says: str):
    """Prevents: a typing error that trains another adapter than was meant."""
    with pytest.raises(UsageError, match=says) as caught:
        parse(text)
    assert text in str(caught.value)


def test_targets_are_those_of_the_family():
    """Prevents: adapters silently missing where a target does not exist, or sitting where none was wanted."""
    model = random_model(moss_config())
    with pytest.raises(UsageError, match=r"no 'gate', only q\+k\+v\+o\+up\+down"):
        inject(model, parse("targets=q+gate"))
    inject(model, parse("targets=q+down"))
    assert [name for name, _ in adapters(model)] == [
        f"blocks.{i}.{x}" for i in range(2) for x in ("attn.q", "mlp.down")
    ]
    assert len(adapters(filled(random_model(TINY)))) == 2 * 7
    with pytest.raises(ValueError, match="has adapters already"):
        inject(model, Spec())


# ---------------------------------------------------------------- maths


def test_two_by_two_by_hand():
    """Prevents: a wrong scale, or A and B transposed, in the result or in a gradient.

    W x = [5, 11], A x = 3, 2 B A x = [6, 0]; of the sum of y: dA = 2 B^T 1 x^T, dB = 2 (A x), dx = W^T 1 + 2 A^T B^T 1.
    """
    base = lora._linear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None).requires_grad_(False)
    layer = LoRALinear(base, torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]]), scale=2.0)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).tolist() == [11, 11]
    assert layer.A is not None and layer.A.grad is not None and layer.A.grad.tolist() == [[2, 4]]
    assert layer.B is not None and layer.B.grad is not None and layer.B.grad.tolist() == [[6], [6]]
    assert x.grad is not None and x.grad.tolist() == [6, 8]
    assert layer.merged(torch.float32).weight.tolist() == [[3, 4], [3, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing(family: str, dtype: torch.dtype):
    """Prevents: a run that begins elsewhere than at its base; learnt rows begin as the table's."""
    model = random_model(FAMILIES[family]).to(dtype)
    ids = random_ids(2, 20, vocab_size=50)
    expected = model(ids)
    inject(model, Spec(4), rows=ROWS)
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_a_fresh_adapter_over_integers_computes_what_they_stand_for(width: str):
    """Prevents: the engine's kernels, which round activations too, in the place of the exact product."""
    model = random_model(FAMILIES["qwen2"])
    inject(model, parse(f"base={width},targets=q"))
    ids = random_ids(2, 20, vocab_size=50)
    assert torch.equal(model(ids), floats(model)(ids))
    assert all(isinstance(layer.base, QuantLinear) for _, layer in adapters(model))
    assert sum(layer.A is not None for _, layer in adapters(model)) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_learns(family: str):
    """Prevents: a base that moves, or an optimizer that keeps state for what is frozen."""
    model = filled(random_model(FAMILIES[family]), rows=ROWS)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.0, muon=False)
    next_token(model, row()).total.backward()
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    learnt = {name for name, value in model.named_parameters() if value.grad is not None}
    assert moved == learnt == {name for name in before if name.endswith((".A", ".B", ".rows"))}
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == len(learnt) == 2 * len(adapters(model)) + (1 if family == "qwen3" else 2)


def test_a_is_drawn_from_the_seed_as_peft_does():
    """Prevents: a run that cannot be repeated, and a start of another size than PEFT's."""
    one, same, other = (filled(random_model(TINY), seed=seed) for seed in (1, 1, 2))
    first, again, third = (next(layer for _, layer in adapters(model)) for model in (one, same, other))
    assert first.A is not None and again.A is not None and third.A is not None
    assert torch.equal(first.A, again.A) and not torch.equal(first.A, third.A)
    bound = 1 / math.sqrt(first.A.shape[1])  # kaiming_uniform_(a=sqrt(5))
    assert 0.9 * bound < first.A.abs().max() <= bound


def test_one_step_equals_the_plain_formula():
    """Prevents: any difference between adapters in the model and W + s B A in a plain one: loss, gradients, AdamW."""
    model = filled(random_model(TINY).double(), parse("r=3,alpha=6,targets=q+down"))
    plain = view(model)
    merge(plain)
    plain.requires_grad_(True)
    loss, reference = next_token(model, row()), next_token(plain, row())
    torch.testing.assert_close(loss.total, reference.total, rtol=1e-13, atol=0)
    loss.total.backward()
    reference.total.backward()
    expected = {}
    for name, layer in adapters(model):
        A, B, full = layer.A, layer.B, plain.get_submodule(name).weight.grad
        assert A is not None and B is not None and isinstance(full, Tensor) and A.dtype == torch.float64
        for part, grad in ((A, 2.0 * B.T @ full), (B, 2.0 * full @ A.T)):
            torch.testing.assert_close(part.grad, grad, rtol=1e-10, atol=1e-12)
            expected[part] = (
                part * (1 - 0.01 * 0.1) - 0.01 * grad / (grad.abs() + 1e-8)
            ).detach()  # AdamW's first step
    make_optimizer(model, lr=0.01, weight_decay=0.1, muon=False).step()
    for part, value in expected.items():
        torch.testing.assert_close(part.detach(), value, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- integers below


@pytest.mark.parametrize("width", ["int8", "int4"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0.0)])
@pytest.mark.parametrize("family", ["qwen3", "moss"])
def test_gradients_over_integers_equal_those_over_their_floats(
    family: str, dtype: torch.dtype, close: float, width: str
):
    """Prevents: a backward pass of another function than the forward one, by a nibble, a group or a padded column."""
    model = random_model(FAMILIES[family]).to(dtype)
    filled(model, Spec(4, 8.0, ("q", "v", "up"), width))  # type: ignore[arg-type]
    plain = floats(model).to(dtype)
    for each in (model, plain):
        next_token(each, row()).total.backward()
    wanted = dict(plain.named_parameters())
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert len(found) == 2 * 2 * 3
    for name, grad in found.items():
        expected = wanted[name].grad
        assert expected is not None and expected.abs().max() > 0
        tolerance = close * float(expected.abs().max()) if close else 0.03 * float(expected.float().abs().max())
        torch.testing.assert_close(grad.float(), expected.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
def test_floats_of_integers_are_not_kept(compiled: bool):
    """Prevents: all layers' weights as floats between forward and backward, which is what integers are to save."""
    model = random_model(llama_config(hidden=128, ffn=256))
    inject(model, parse("r=2,base=int4"))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hidden = torch.compile(model.hidden, backend="aot_eager") if compiled else model.hidden
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden(random_ids(1, 8, vocab_size=50))
    owned = {part.data_ptr() for part in [*model.parameters(), *model.buffers()]}
    new = [tensor for tensor in kept if tensor.data_ptr() not in owned]
    assert any(tensor.dtype == torch.uint8 for tensor in kept)
    assert max(tensor.numel() for tensor in new) < 128 * 48  # the smallest weight


@pytest.mark.parametrize("base", ["", "int8"])
def test_training_in_bfloat16_keeps_one_base(base: str):
    """Prevents: the base twice, in the model and in the copy that computes; an update of the one lost on the other."""
    model = filled(random_model(FAMILIES["qwen2"]), Spec(4, 8.0, (), base), rows=ROWS)  # type: ignore[arg-type]
    net = loop.computing_copy(model, torch.bfloat16)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.0, muon=False)
    state = loop.run(
        model,
        lambda at: ([row(seed=at)], at + 1),
        next_token,
        optimizer,
        lambda _: 1.0,
        steps=2,
        state=loop.State(),
        net=net,
    )
    assert state.updates == 2
    for (name, mine), computing in zip(model.named_parameters(), net.parameters(), strict=True):
        learns = name.endswith((".A", ".B", ".rows"))
        assert mine.requires_grad == learns != torch.equal(mine, before[name].to(mine.dtype)), name
        assert (mine.data_ptr() == computing.data_ptr()) != learns
        assert computing.dtype == torch.bfloat16 and torch.equal(computing, mine.bfloat16())
    for mine, computing in zip(model.buffers(), net.buffers(), strict=True):
        assert mine.data_ptr() == computing.data_ptr() or mine is model.rotary


def test_pieces_join(monkeypatch: pytest.MonkeyPatch):
    """Prevents: rows lost or doubled where a large weight becomes floats piece by piece."""
    base = QuantLinear(torch.randn(50, 200), None, "int4")
    x = torch.randn(3, 200)
    whole = lora.integer_product(x, *base.rows(0, 50), 200, False)
    monkeypatch.setattr(lora, "PIECE", 200 * 7)
    assert torch.equal(lora.integer_product(x, *base.rows(0, 50), 200, False), whole)
    torch.testing.assert_close(whole, F.linear(x, base.dequantize()))


@pytest.mark.parametrize(
    ("base", "backend"),
    [("int4", "aot_eager"), *(pytest.param(b, "inductor", marks=pytest.mark.slow) for b in ("", "int8"))],
)
def test_compiled_equals_eager(base: str, backend: str):
    """Prevents: an operation that the compiler cannot take in one graph, or whose shapes it is told wrongly."""
    model = filled(random_model(FAMILIES["moss"]), Spec(4, 8.0, (), base), rows=ROWS)  # type: ignore[arg-type]
    grads = []
    for compiled in (False, True):
        model.zero_grad()
        if compiled:
            model.hidden = torch.compile(model.hidden, backend=backend, fullgraph=True)  # type: ignore[method-assign]
        next_token(model, row()).total.backward()
        grads.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- one base, many roles


def test_roles_share_their_base():
    """Prevents: a copy of the base for every role of PPO, and roles that learn each other's adapters."""
    base = random_model(llama_config())
    spec = parse("r=2,base=int4")
    inject(base, spec)
    weights = {part.data_ptr() for part in [*base.parameters(), *base.buffers()]}
    policy, critic, reward = view(base), view(base, "scalar"), view(base, "scalar")
    for role in (policy, critic, reward):
        own = [part for part in [*role.parameters(), *role.buffers()] if part.data_ptr() not in weights]
        head = 32 if role is not policy else 0
        rotary = base.rotary.numel()
        assert sum(part.numel() for part in own) - rotary == lora.num_trainable(base.config, spec) + head
    ids = random_ids(1, 6, vocab_size=50)
    before = base(ids)
    assert critic(ids).shape == (1, 6) and not critic(ids).any()  # a fresh head is zero
    filled_layers = [layer for _, layer in adapters(policy)]
    with torch.no_grad():
        for layer in filled_layers:
            assert layer.B is not None
            layer.B.add_(1.0)
    assert not torch.equal(policy(ids), before)
    assert torch.equal(base(ids), before) and torch.equal(view(base)(ids), before)
    with pytest.raises(ValueError, match="no language-model head"):
        view(critic, "lm")


@pytest.mark.parametrize("base", ["", "int8"])
def test_the_engine_generates_with_the_adapter_as_it_is(base: str):
    """Prevents: rollouts of an earlier policy, of the base alone, or by kernels that know nothing of adapters."""
    policy = filled(toy_model(), Spec(4, 8.0, (), base), rows=ROWS)  # type: ignore[arg-type]
    prompt = [5, 17, 60, 3, 92]
    alive = view(policy, live=True)
    for seed in (0, 1):
        with torch.no_grad():
            for _, layer in adapters(policy):
                assert layer.B is not None
                layer.B.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
        with Engine(alive) as engine:
            got = ids_of(engine.submit(prompt, greedy(12)))
        assert len(got) == 12
        if not base:  # kernels of integers are near, not equal
            assert got == naive(policy, prompt, 12)
    assert all(layer.exact for _, layer in adapters(policy))


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_is_exact(family: str):
    """Prevents: a merged model that is not the one that was trained."""
    model = filled(calm(Decoder(FAMILIES[family])), rows=ROWS)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(".rows"):
                value.add_(0.1)
    ids = random_ids(2, 30, vocab_size=50)
    expected = model(ids).detach()
    layer = model.get_submodule("blocks.1.attn.q")
    assert isinstance(layer, LoRALinear) and layer.A is not None and layer.B is not None
    weight = layer.base.weight + 2.0 * (layer.B @ layer.A)
    other = view(model)
    merge(model)
    assert torch.equal(model.get_submodule("blocks.1.attn.q").weight, weight)
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in Decoder(FAMILIES[family]).named_parameters()
    }
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(other(ids), expected, rtol=0, atol=0)
    assert not model.norm.weight.requires_grad  # it is also the norm of the view


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_merging_over_integers(width: str, tmp_path: Path):
    """Prevents: integers left in a merged model, or a result that no longer saves and loads as a plain one."""
    model = filled(calm(Decoder(TINY)), Spec(4, 8.0, ("k", "gate"), width))  # type: ignore[arg-type]
    ids = random_ids(2, 30, vocab_size=50)
    expected = model(ids).detach()
    merge(model)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    save_model(model, tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(ids), model(ids))


def test_a_bfloat16_base_is_merged_with_one_rounding():
    """Prevents: B A rounded before it is added, which loses most of a small adapter."""
    model = filled(random_model(TINY).bfloat16())
    layer = model.get_submodule("blocks.0.mlp.up")
    assert isinstance(layer, LoRALinear) and layer.A is not None and layer.B is not None
    assert layer.A.dtype == torch.float32
    expected = (layer.base.weight.float() + 2.0 * (layer.B @ layer.A)).bfloat16()
    merge(model)
    assert torch.equal(model.get_submodule("blocks.0.mlp.up").weight, expected)


# ---------------------------------------------------------------- loading, counting


@pytest.mark.parametrize("width", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loading_straight_into_integers(family: str, width: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prevents: a base that depends on the way it was loaded, or a large one whose floats fill memory on the way."""
    save_model(random_model(FAMILIES[family]), tmp_path)
    spec, whole = parse(f"base={width}"), load_model(tmp_path)
    matrices: list[weakref.ref[Any]] = []

    def watched(*args: Any):
        model, read = open_model(*args)

        def watch(name: str) -> Tensor:
            assert not any(each() for each in matrices), f"an earlier matrix was still there when {name} was read"
            value = read(name)
            if value.ndim > 1:
                matrices.append(weakref.ref(value.untyped_storage()))
            return value

        return model, watch

    monkeypatch.setattr(lora, "open_model", watched)
    streamed = lora.load_base(tmp_path, spec, dtype=torch.float32, device="cpu")
    assert len(matrices) == sum(value.ndim > 1 for value in whole.parameters())
    with pytest.raises(ValueError, match=f"the base is {width}, the adapter is for floats"):
        inject(view(streamed), Spec())
    inject(streamed, spec)
    inject(whole, spec)
    ids = random_ids(2, 9, vocab_size=50)
    assert torch.equal(streamed(ids), whole(ids))


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_real_models(family: str, head: Any):
    """Prevents: a plan that promises what the run does not keep."""
    config = FAMILIES[family]
    for text in ("r=3", "r=2,targets=v+down", "r=2,base=int8", "r=2,base=int4"):
        spec, model = parse(text), random_model(config, head).bfloat16()
        inject(model, spec, rows=ROWS)
        learnt = sum(value.numel() for value in model.parameters() if value.requires_grad)
        assert lora.num_trainable(config, spec, head, rows=7) == learnt
        parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        frozen = [part for name, part in parts.items() if not part.requires_grad and name != "rotary"]
        scalar = config.hidden * 2 if head == "scalar" else 0  # counted with the base, trained in float32
        assert lora.base_bytes(config, spec.base, torch.bfloat16, head) == sum(p.nbytes for p in frozen) + scalar


def test_counts_of_16b():
    """Prevents: figures in the documents that no longer follow from the code."""
    config = ModelConfig(
        family="moss", vocab_size=107_008, num_layers=34, hidden=6144, num_heads=24, ffn=24_576, rotary_dim=64
    )
    assert lora.num_trainable(config, parse("16")) == 34 * 16 * (4 * 2 * 6144 + 2 * (6144 + 24_576))
    assert round(lora.base_bytes(config, "") / 1e9, 2) == 33.44
    assert round(lora.base_bytes(config, "int8") / 1e9, 2) == 18.04
    assert round(lora.base_bytes(config, "int4") / 1e9, 2) == 10.82


def test_rows_out_of_the_table():
    """Prevents: learnt rows that no token has."""
    for rows in (range(43, 51), range(5, 9, 2)):
        with pytest.raises(ValueError, match="does not lie within the 50 rows"):
            inject(random_model(TINY), Spec(2), rows=rows)


def test_a_bfloat16_base_learns_in_float32():
    """Prevents: adapters whose small steps are lost to rounding, or that such a base cannot be multiplied with."""
    model = filled(random_model(TINY).bfloat16(), rows=ROWS)
    next_token(model, row()).total.backward()
    learnt = [value for value in model.parameters() if value.requires_grad]
    assert all(value.grad is not None and value.grad.dtype == value.dtype == torch.float32 for value in learnt)
    assert model(random_ids(1, 4, vocab_size=50)).dtype == torch.bfloat16
