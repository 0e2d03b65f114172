"""Parameter groups, saved state, and schedules worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import AdamW

from moss import optim
from moss.model import Decoder, ModelConfig
from moss.optim import Muon, make_optimizer, rate, split_parameters


def tiny(family: str = "llama") -> Decoder:
    return Decoder(ModelConfig(family=family, vocab_size=32, num_layers=2, hidden=16, num_heads=2, ffn=32))


def train(model: Decoder, optimizer, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(seed + step))
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["llama", "moss"])
@pytest.mark.parametrize("muon", [True, False])
def test_every_parameter_is_in_one_group(family, muon):
    """Prevents: a parameter that is never updated, or twice a step."""
    model = tiny(family)
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.1, muon=muon)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_what_goes_where():
    """Prevents: Muon on embeddings, decay on norms, biases or embeddings, and the wrong rate for a group."""
    model = tiny("moss")
    matrices, tables, vectors = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in matrices} == {"q", "k", "v", "o", "up", "down"}
    assert [names[id(p)] for p in tables] == ["embed.weight", "head.weight"]
    assert all(p.ndim == 1 for p in vectors)
    optimizer = make_optimizer(model, lr=0.3, matrix_lr=0.2, weight_decay=0.1, muon=True)
    assert [type(part) for part in optimizer.parts] == [Muon, AdamW]
    for group in optimizer.param_groups:
        matrix = group["params"][0] is matrices[0]
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (
            (0.2, 0.2, 0.1) if matrix else (0.3, 0.3, 0)
        )
    plain = make_optimizer(model, lr=0.3, weight_decay=0.1, muon=False)
    assert [type(part) for part in plain.parts] == [AdamW]
    assert [group["weight_decay"] for group in plain.param_groups] == [0.1, 0, 0]


def test_frozen_parameters_are_left_out():
    """Prevents: momentum and decay on frozen weights under LoRA, and a silent run that trains nothing."""
    model = tiny()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(model, lr=0.1, weight_decay=0.1, muon=True)
    model.embed.requires_grad_(True)
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.1, muon=True)
    assert [p is model.embed.weight for group in optimizer.param_groups for p in group["params"]] == [True]


def test_first_steps_by_hand():
    """Prevents: decay or rates applied twice: AdamW's first step is lr x sign, Muon's has a known size."""
    model = tiny()
    optimizer = make_optimizer(model, lr=0.01, matrix_lr=0.02, weight_decay=0.5, muon=True)
    now = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in now.items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    torch.testing.assert_close(model.embed.weight, before["embed.weight"] - 0.01)
    torch.testing.assert_close(model.norm.weight, before["norm.weight"] - 0.01)
    # A gradient of one value has one singular direction, u v^T with every entry 1/16: Muon steps along it by its rate
    # times what five Newton-Schulz steps leave of a singular value (0.5 to 1.5), after decay by rate x weight_decay.
    step = before["blocks.0.attn.q.weight"] * (1 - 0.02 * 0.5) - now["blocks.0.attn.q.weight"]
    assert 0.5 < (step * 16 / 0.02).min() <= (step * 16 / 0.02).max() < 1.5


def test_muon_is_pytorchs(monkeypatch):
    """Prevents: another optimizer than the published one; where bfloat16 is slow the same in float32, and not worse."""
    made = {}
    for name in ("pytorch", "bfloat16", "float32"):
        monkeypatch.setattr(optim, "has_bfloat16", lambda _, name=name: name == "bfloat16")
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 16), (16, 40), (16, 16))]
        kind = torch.optim.Muon if name == "pytorch" else Muon
        muon = kind([{"params": weights, "lr": 0.02, "weight_decay": 0.1}])
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            muon.step()
        made[name] = weights
    for exact, same, near in zip(*made.values(), strict=True):
        assert torch.equal(exact, same)
        torch.testing.assert_close(near, exact, rtol=0, atol=0.02 * 0.05)
    found = torch.linalg.svdvals(optim.orthogonal(torch.randn(16, 40), (3.4445, -4.7750, 2.0315), 5, 1e-7))
    assert found.min() > 0.5 and found.max() < 1.3


def test_resumed_equals_unbroken():
    """Prevents: a resume that loses momentum, second moments or the step count of either optimizer."""
    unbroken = tiny()
    optimizer = make_optimizer(unbroken, lr=0.01, weight_decay=0.1, muon=True)
    train(unbroken, optimizer, 3)
    resumed = tiny()
    resumed.load_state_dict(unbroken.state_dict())
    other = make_optimizer(resumed, lr=0.01, weight_decay=0.1, muon=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the tensors
    train(unbroken, optimizer, 2, seed=7)
    train(resumed, other, 2, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="another choice of muon"):
        make_optimizer(resumed, lr=0.01, weight_decay=0.1, muon=False).load_state_dict(optimizer.state_dict())


def test_both_learn():
    """Prevents: a sign or rate with which the loss does not fall at all."""
    for muon in (True, False):
        model = tiny()
        ids = torch.arange(32).view(4, 8)
        optimizer = make_optimizer(model, lr=0.01, weight_decay=0.0, muon=muon)
        for _ in range(40):
            loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.5, muon  # from ln(32) = 3.47


def test_rates_by_hand():
    """Prevents: a fall that starts too early, never reaches its end, or forgets the warm-up."""
    assert [rate("linear", step, total=8, warmup=2) for step in range(9)] == [
        0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0
    ]  # fmt: skip
    assert [rate("constant", step, total=4, warmup=2) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    wave = [rate("cosine", step, total=10, warmup=2) for step in (0, 2, 6, 10)]
    assert wave == pytest.approx([0.5, 1.0, 0.55, 0.1])  # 0.1 + 0.9 x (1 + cos(pi x share done)) / 2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rate("linear", 0, total=0), "total=0"),
        (lambda: rate("linear", -1, total=4), "step=-1"),
        (lambda: rate("linear", 0, total=4, warmup=5), "warmup=5"),
        (lambda: rate("square", 0, total=4), "schedule is 'square'"),
        (lambda: make_optimizer(tiny(), lr=-1.0, weight_decay=0.0, muon=True), "lr is -1.0"),
        (
            lambda: make_optimizer(tiny(), lr=1.0, matrix_lr=float("nan"), weight_decay=0.0, muon=True),
            "matrix_lr is nan",
        ),
    ],
)
def test_refuses(call, says):
    """Prevents: a run that starts with a rate or a schedule that means nothing."""
    with pytest.raises(ValueError, match=says):
        call()
