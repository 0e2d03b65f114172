"""The formulae of memory against what PyTorch really keeps: saved tensors, and tensors alive at the fullest moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from moss import dist, lora
from moss.attention import keep_compiler_out
from moss.engine.cache import Cache
from moss.model import Decoder, ModelConfig
from moss.optim import make_optimizer
from moss.train import loop
from moss.train.loss import next_token
from moss.train.memory import Job, Net, engine_needs, head_needs, kept_by_block, kept_outside, moments, sizes, standing
from moss.train.ppo import ActorCritic, reply_log_probs
from moss.train.reward import scores_at

LLAMA = ModelConfig(100, 2, 48, 4, head_dim=12, ffn=80)
CONFIGS = {
    "llama": LLAMA,
    "qwen3": replace(LLAMA, num_kv_heads=2, qk_norm=True, tie_embeddings=True),
    "qwen2": replace(LLAMA, num_kv_heads=1, qkv_bias=True),
    "moss": ModelConfig(100, 2, 48, 4, family="moss", rotary_dim=4),
}
LORA = {"all": lora.parse("r=5"), "some": lora.parse("r=5,targets=q+v"), "int8": lora.parse("r=5,base=int8")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def batch(config: ModelConfig, rows: int, length: int) -> loop.Micro:
    """Rows of one document each, all learnt but the first token."""
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[:, 0] = 0
    return {"ids": ids, "mask": mask, "positions": torch.arange(length).repeat(rows, 1), "segments": ids * 0 + 1}


def job_of(net: Net, rows: int, length: int, dtype: str, **more: Any) -> Job:
    places = {"batch_tokens": rows * length, "micro_tokens": rows * length} | more
    return Job((net,), length=length, dtype=DTYPES[dtype], **places)


def saved(model: Decoder, given: loop.Micro) -> int:
    """Bytes of all that autograd keeps of one forward, the model's own tensors and what is shared counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(given["ids"], positions=given["positions"], segments=given["segments"])
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def adapted(config: ModelConfig, dtype: str, spec: lora.Spec | None) -> Decoder:
    model = Decoder(config).to(DTYPES[dtype])
    if spec:
        lora.inject(model, spec)
        for _, layer in lora.adapters(model):
            for part in (layer.A, layer.B):
                if part is not None:
                    part.data = part.data.to(DTYPES[dtype])  # as the computing copy has them
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spec", [None, *LORA])
def test_a_block_keeps_what_the_formula_says(name: str, dtype: str, spec: str | None) -> None:
    """Prevents a plan that forgets a tensor or counts one twice, when either the model or PyTorch changes: the bytes of
    one block more, within a hundredth (weights of norms in float32, which are no part of any token, make the rest)."""
    config, chosen = CONFIGS[name], LORA[spec] if spec else None
    rows, length = 4, 96
    given = batch(config, rows, length)
    two, three = (saved(adapted(replace(config, num_layers=n), dtype, chosen), given) for n in (2, 3))
    net = Net(config, lora=chosen)
    told = sum(kept_by_block(net, job_of(net, rows, length, dtype), rows).values()) * rows * length
    assert told == pytest.approx(three - two, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_forward_keeps_what_the_formula_says(name: str, dtype: str) -> None:
    """Prevents plans that are right for deep models alone: blocks, last norm, angles and ids together."""
    config, rows, length = CONFIGS[name], 4, 96
    net = Net(config)
    job = job_of(net, rows, length, dtype)
    norm, rest = kept_outside(net, job)
    told = config.num_layers * sum(kept_by_block(net, job, rows).values()) + norm + rest
    assert told * rows * length == pytest.approx(
        saved(Decoder(config).to(DTYPES[dtype]), batch(config, rows, length)), rel=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "moss"])
@pytest.mark.parametrize("length", [256, 1056])
def test_a_compiled_block_keeps_what_the_formula_says(name: str, dtype: str, length: int) -> None:
    """Prevents plans for the uncompiled model alone, with few and with many blocks of scores."""
    config, rows = replace(CONFIGS[name], max_length=2048), 2
    given, found = batch(config, rows, length), []
    for layers in (3, 4):
        torch._dynamo.reset()
        model = Decoder(replace(config, num_layers=layers)).to(DTYPES[dtype])
        keep_compiler_out()
        for block in model.blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
        found.append(saved(model, given))
    net = Net(config)
    job = job_of(net, rows, length, dtype, compiled=True)
    told = sum(kept_by_block(net, job, rows).values()) * rows * length
    assert told == pytest.approx(found[1] - found[0], rel=0.02)


def test_checkpointing_keeps_inputs_alone() -> None:
    """Prevents a plan with `checkpointing` that is not what `dist.recompute` does."""
    config, rows, length = CONFIGS["llama"], 4, 96
    models = [Decoder(replace(config, num_layers=n)) for n in (2, 3)]
    for model in models:
        dist.recompute(model)
    two, three = (saved(model, batch(config, rows, length)) for model in models)
    assert three - two == rows * length * config.hidden * 4
    job = job_of(Net(config), rows, length, "float32", checkpointing=True)
    assert moments(job, rows * length)["the loss"]["block inputs"] == 2 * rows * length * config.hidden * 4


# ---------------------------------------------------------------- the fullest moment

SHAPES: dict[str, tuple[ModelConfig, int, int]] = {  # the model, rows, length
    "activations": (ModelConfig.from_depth(2, 512), 4, 128),
    "vocabulary": (ModelConfig(6000, 1, 128, 2, ffn=256), 2, 192),
    "weights": (ModelConfig(500, 4, 256, 4), 1, 32),
    "moss": (ModelConfig(2000, 2, 128, 2, family="moss", rotary_dim=32), 6, 128),
}


def alive(make: Callable[[], nn.Module], given: list[loop.Micro], dtype: str, loss_fn: loop.LossFn) -> int:
    """Bytes of all tensors at the fullest moment of two steps of the real loop, by PyTorch's own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model = make()
        optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.0, muon=True)
        net = loop.computing_copy(model, DTYPES[dtype])
        run: dict[str, Any] = {"steps": 2, "state": loop.State(), "net": net}
        loop.run(model, lambda position: (given, position + 1), loss_fn, optimizer, lambda step: 1.0, **run)
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_fullest_moment_of_a_real_step(name: str, dtype: str, accumulate: int) -> None:
    """Prevents a sum of parts that are never there together, and a moment that was not thought of: within 3 %."""
    config, rows, length = SHAPES[name]
    job = job_of(Net(config), rows, length, dtype, batch_tokens=rows * length * accumulate)
    told = max(sum(parts.values()) for parts in moments(job, rows * length).values())
    given = [batch(config, rows, length) for _ in range(accumulate)]
    assert told == pytest.approx(alive(lambda: Decoder(config), given, dtype, next_token), rel=0.03)


def of_log_probs(net: Decoder, micro: loop.Micro) -> loop.Loss:
    """What DPO and PPO's policy make their losses of."""
    found = reply_log_probs(net, micro)
    return loop.Loss(-found.sum(), len(found))


def of_actor_and_critic(net: ActorCritic, micro: loop.Micro) -> loop.Loss:
    """Both graphs of PPO, until the one backward."""
    found = net.log_probs(micro) - net.values(micro)
    return loop.Loss(-found.sum(), len(found))


def of_scores(net: Decoder, micro: loop.Micro) -> loop.Loss:
    """As the preference model: a number at a token of each row."""
    found = scores_at(net, micro | {"last": micro["ids"][:, :1] * 0 + 5})
    return loop.Loss(found.sum(), len(found))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["log-probs", "scores", "ppo"])
@pytest.mark.parametrize("name", ["activations", "vocabulary"])
def test_the_fullest_moment_of_other_losses(name: str, kind: str, dtype: str) -> None:
    """Prevents plans for DPO, PPO and the preference model that take their loss for cross-entropy: within 4 %."""
    config, rows, length = SHAPES[name]
    policy, critic = Net(config, loss="log-probs"), Net(config, "scalar", "scores")
    nets = {"log-probs": (policy,), "scores": (critic,), "ppo": (policy, critic)}[kind]
    makes: dict[str, tuple[Callable[[], nn.Module], Any]] = {
        "log-probs": (lambda: Decoder(config), of_log_probs),
        "scores": (lambda: Decoder(config, "scalar"), of_scores),
        "ppo": (lambda: ActorCritic(Decoder(config), Decoder(config, "scalar")), of_actor_and_critic),
    }
    job = Job(nets, length=length, batch_tokens=rows * length, dtype=DTYPES[dtype])
    told = max(sum(parts.values()) for parts in moments(job, rows * length).values())
    assert told == pytest.approx(alive(makes[kind][0], [batch(config, rows, length)], dtype, makes[kind][1]), rel=0.04)


def test_adamw_for_all_needs_twice_the_state_of_muon() -> None:
    """Prevents a plan that takes Muon's one number a weight for everything, or for adapters."""
    config = CONFIGS["llama"]
    model = Decoder(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if "blocks." in name and p.ndim > 1)
    every = sum(p.numel() for p in model.parameters())
    with_muon, without = (standing(job_of(Net(config), 1, 96, "float32", muon=muon)) for muon in (True, False))
    assert without["optimizer"] == 8 * every
    assert with_muon["optimizer"] == 8 * every - 4 * matrices
    for muon, told in ((True, with_muon), (False, without)):
        optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.0, muon=muon)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        held = [part.state for part in optimizer.parts]
        states = [value for state in held for each in state.values() for value in each.values() if value.ndim]
        assert told["optimizer"] == sum(value.nbytes for value in states)


@pytest.mark.parametrize("spec", LORA)
@pytest.mark.parametrize("name", ["qwen3", "moss"])
def test_an_adapted_model_is_counted_as_it_is(name: str, spec: str) -> None:
    """Prevents a plan for LoRA that counts the frozen base as trained, or its integers as floats."""
    config = CONFIGS[name]
    model = adapted(config, "float32", LORA[spec])
    size = sizes(Net(config, lora=LORA[spec]), torch.float32)
    assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept: list[Tensor] = [p for p in model.parameters() if not p.requires_grad]
    kept += [buffer for buffer in model.buffers() if buffer is not model.rotary]
    assert size.frozen == pytest.approx(sum(tensor.nbytes for tensor in kept), rel=0.02)


def test_policy_and_critic_stand_together() -> None:
    """Prevents a plan for PPO that forgets that both graphs live until the one backward."""
    policy, critic = Net(LLAMA, loss="log-probs"), Net(LLAMA, "scalar", "scores")
    job = Job((policy, critic), length=96, batch_tokens=384)
    alone, both = (moments(replace(job, nets=nets), 384) for nets in ((policy,), (policy, critic)))
    alone, both = alone["the loss"], both["the loss of net 2"]
    assert both["mlp"] == 2 * alone["mlp"]
    assert both["weights"] == alone["weights"] + 4 * sizes(critic, torch.float32).trained
    assert both["logits"] == head_needs(policy, job, 384)[0] + sum(head_needs(critic, job, 384)[:2])


@pytest.mark.parametrize("length", [96, 300])
def test_the_engine_of_ppo_is_counted(length: int) -> None:
    """Prevents a plan for PPO without the rows that its engine writes in, or the weights that it merges for it."""
    config = replace(CONFIGS["qwen3"], max_length=1024)
    policy, critic = Net(config, loss="log-probs"), Net(config, "scalar", "scores")
    job = Job((policy, critic), length=length, batch_tokens=4 * length, dtype=torch.bfloat16, slots=5)
    shape = config.num_layers, config.num_kv_heads, config.head_dim
    cache = Cache(*shape, slots=5, max_length=config.max_length, dtype=torch.bfloat16)
    for number in range(5):
        slot = cache.acquire(number)
        assert slot
        cache.join(slot)
        cache.window(slot.row, [0], length)
    rows = sum(store.nbytes for store in cache.stores)
    assert engine_needs(job) == rows
    assert moments(job, length)["writing replies"] == standing(job) | {"engine": rows}
    assert "writing replies" not in moments(replace(job, slots=0), length)
    adapted = replace(job, nets=(replace(policy, lora=LORA["int8"]), critic))
    merged = sum(p.nbytes for block in Decoder(config).bfloat16().blocks for p in block.parameters() if p.ndim > 1)
    assert engine_needs(adapted) == rows + merged
    assert engine_needs(replace(adapted, device="cuda")) == rows
