"""The decoder against transformers' models at toy size, its caches and packed rows, and its config.

Every oracle gets random weights of a size at which attention is sharp and norms are not 1, so that a wrong
rotation, scale or order moves the logits by far more than the bound.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moss.model import (
    Block,
    Decoder,
    Head,
    ModelConfig,
    flops_per_token,
    num_parameters,
    rotary_frequencies,
    rotate_halves,
    rotate_pairs,
)
from moss.weights import load_model

BOUND = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA_SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
}
MOSS_SIZES = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "rotary_dim": 8,
    "n_positions": 128,
    "n_ctx": 128,
    "layer_norm_epsilon": 1e-5,
}
ORACLES = {
    "codegen": ("CodeGen", MOSS_SIZES),
    "codegen-8-heads-n_inner": ("CodeGen", MOSS_SIZES | {"n_head": 8, "n_inner": 96, "rotary_dim": 4}),
    "gptj": ("GPTJ", MOSS_SIZES),
    "gptj-whole-head": ("GPTJ", MOSS_SIZES | {"rotary_dim": 16}),
    "llama": ("Llama", LLAMA_SIZES),
    "llama-one-kv-head": ("Llama", LLAMA_SIZES | {"num_key_value_heads": 1}),
    "llama3": ("Llama", LLAMA_SIZES | {"rope_scaling": LLAMA3}),
    "yarn": ("Llama", LLAMA_SIZES | {"rope_scaling": YARN}),
    "yarn-betas": ("Qwen3", LLAMA_SIZES | {"rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}}),
    "yarn-mscale": ("Llama", LLAMA_SIZES | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "yarn-factor": ("Llama", LLAMA_SIZES | {"rope_scaling": YARN | {"attention_factor": 1.3, "truncate": False}}),
    "qwen2": ("Qwen2", LLAMA_SIZES),
    "qwen2-tied": ("Qwen2", LLAMA_SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", LLAMA_SIZES),
    "qwen3-tied": ("Qwen3", LLAMA_SIZES | {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", params=ORACLES, ids=str)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from what it saved)."""
    transformers = pytest.importorskip("transformers")
    prefix, sizes = ORACLES[request.param]
    torch.manual_seed(0)
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, prefix + "Config")(**copy.deepcopy(sizes), **tokens)  # it writes into rope_scaling
    oracle = getattr(transformers, prefix + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.normal_(0, 0.3 if "emb" in name or "wte" in name else 1.5 * parameter.shape[1] ** -0.5)
    folder = tmp_path_factory.mktemp(request.param)
    oracle.save_pretrained(folder)
    return oracle, load_model(folder)


def random_ids(*shape: int, vocab_size: int = 97, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class SlowCache:
    """The plainest cache: rows that grow by concatenation, all at the same length."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.seen = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = (torch.cat(old_new, dim=2) for old_new in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = (k, v)
        return k, v

    def mask(self, length: int) -> Tensor:
        total = self.seen + length
        mask = torch.arange(total)[None, :] <= torch.arange(self.seen, total)[:, None]
        self.seen = total
        return mask[None, None]


def in_chunks(model: Decoder, ids: Tensor, sizes: list[int]) -> Tensor:
    cache, outputs, start = SlowCache(), [], 0
    for size in sizes:
        positions = torch.arange(start, start + size).expand(ids.shape[0], -1)
        outputs.append(model(ids[:, start : start + size], positions=positions, cache=cache))
        start += size
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def test_logits_equal_transformers(pair):
    """Prevents: any difference of formula: norm, rotation, scaling, order of q, v, k, activation, bias, tying."""
    oracle, ours = pair
    ids = random_ids(2, 100)
    expected = oracle(ids).logits
    assert expected.std() > 0.5  # the weights say something
    torch.testing.assert_close(ours(ids), expected, atol=BOUND, rtol=0)


@torch.no_grad()
def test_cache_equals_whole_rows(pair):
    """Prevents: positions, masks or layers mixed up when tokens come step by step or in chunks."""
    oracle, ours = pair
    ids = random_ids(2, 24, seed=2)
    expected = oracle(ids).logits
    torch.testing.assert_close(in_chunks(ours, ids, [1] * 24), expected, atol=BOUND, rtol=0)
    torch.testing.assert_close(in_chunks(ours, ids, [7, 1, 1, 10, 5]), expected, atol=BOUND, rtol=0)


@torch.no_grad()
def test_packed_documents_equal_each_alone(pair):
    """Prevents: attention that crosses documents in a packed row, or positions that go on from one to the next."""
    oracle, ours = pair
    lengths, padding = [9, 1, 14, 5], 3
    documents = [random_ids(1, n, seed=n) for n in lengths]
    ids = torch.cat([*documents, torch.zeros(1, padding, dtype=torch.long)], dim=1)
    numbers = [torch.full((1, n), i + 1) for i, n in enumerate(lengths)] + [torch.zeros(1, padding, dtype=torch.long)]
    positions = torch.cat([torch.arange(n)[None] for n in [*lengths, padding]], dim=1)
    packed = ours(ids, positions=positions, segments=torch.cat(numbers, dim=1))
    assert packed.isfinite().all()
    for document, got in zip(documents, packed.split([*lengths, padding], dim=1)[:-1], strict=True):
        torch.testing.assert_close(got, oracle(document).logits, atol=BOUND, rtol=0)


@torch.no_grad()
def test_half_precision_stays_close(pair):
    """Prevents: norms, angles or scores computed in half precision, which drifts with the position."""
    oracle, ours = pair
    ids = random_ids(2, 100)
    exact = oracle(ids).logits
    for dtype, share in ((torch.bfloat16, 0.08), (torch.float16, 0.01)):
        low = Decoder(ours.config)
        low.load_state_dict(ours.state_dict())
        low = low.to(dtype)
        assert low.rotary.dtype == torch.float32
        error = (low(ids).float() - exact).std() / exact.std()
        assert 0 < error < share, (dtype, error)


MOSS: dict[str, Any] = {"family": "moss", "vocab_size": 50, "num_layers": 2, "hidden": 32, "num_heads": 4}
LLAMA: dict[str, Any] = {"vocab_size": 50, "num_layers": 2, "hidden": 32, "num_heads": 4, "num_kv_heads": 2}


def moss_config(**values: Any) -> ModelConfig:
    return ModelConfig(**(MOSS | values))


def llama_config(**values: Any) -> ModelConfig:
    return ModelConfig(**(LLAMA | values))


def random_model(config: ModelConfig, head: Head = "lm") -> Decoder:
    """A model none of whose parts is silent, unlike a freshly initialised one."""
    model = Decoder(config, head)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return model


def blocks_of(model: Decoder) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def test_rotations_by_hand():
    """Prevents: the wrong partner or direction: a quarter turn moves (1, 0) to (0, 1)."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    quarter, none = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    # the first pair turns by 90 degrees (cos 0, sin 1), the second stays (cos 1, sin 0)
    assert rotate_pairs(x, quarter, none).flatten().tolist() == [-2.0, 1.0, 3.0, 4.0]
    assert rotate_halves(x, quarter, none).flatten().tolist() == [-3.0, 2.0, 1.0, 4.0]
    half = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert rotate_pairs(x, *half).flatten().tolist() == [-2.0, 1.0, 3.0, 4.0]  # the rest of the head passes


def test_rotary_frequencies_by_hand():
    """Prevents: a scaling applied to the wrong end: fast pairs keep their speed, slow ones lose `factor`."""
    plain, one = rotary_frequencies(llama_config(head_dim=8))
    torch.testing.assert_close(plain, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert one == 1.0
    scaled, _ = rotary_frequencies(llama_config(head_dim=8, rope_scaling=LLAMA3))
    # turns in 32 positions: 5.09 (kept), 0.509 and less (below low_freq_factor: divided by 8)
    torch.testing.assert_close(scaled, torch.tensor([1.0, 0.1 / 8, 0.01 / 8, 0.001 / 8]))
    _, warm = rotary_frequencies(llama_config(head_dim=8, rope_scaling=YARN))
    assert warm == pytest.approx(0.1 * 1.3862943611 + 1)  # 0.1 ln(4) + 1


@pytest.mark.parametrize("config", [moss_config(rotary_dim=4), llama_config(qk_norm=True, tie_embeddings=True)])
@pytest.mark.parametrize("compiling", [False, True])
def test_packed_rows_leak_no_gradient(config, compiling, monkeypatch):
    """Prevents: a loss on one document that trains on the text of another."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    model = random_model(config)
    x = model.embed(random_ids(1, 8, vocab_size=50)).detach().requires_grad_()
    monkeypatch.setattr(model.embed, "forward", lambda ids: x[:, : ids.shape[1]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]])
    model(torch.zeros(1, 8, dtype=torch.long), segments=segments)[0, 4].sum().backward()
    assert x.grad is not None
    touched = x.grad.abs().sum(-1)[0] > 0
    assert touched.tolist() == [False, False, False, True, True, False, False, False]


def test_scores_do_not_overflow_in_float16():
    """Prevents: attention scores beyond 65,504 that turn a row of half precision into NaN."""
    model = random_model(moss_config(hidden=64, num_heads=1))
    with torch.no_grad():
        for block in blocks_of(model):
            block.attn.q.weight.mul_(20)
            block.attn.k.weight.mul_(20)
    ids = random_ids(1, 16, vocab_size=50)
    assert model.to(torch.float16)(ids).isfinite().all()


@pytest.mark.parametrize("config", [moss_config(), llama_config(qk_norm=True)], ids=["moss", "llama"])
def test_autocast(config):
    """Prevents: dtypes that meet in attention or in a norm when float32 weights are used in bfloat16."""
    model = random_model(config)
    ids = random_ids(2, 16, vocab_size=50)
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids, segments=torch.ones_like(ids))
    assert low.dtype == torch.bfloat16
    assert 0 < (low.float() - exact).std() / exact.std() < 0.05
    low.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_built_on_meta_then_filled():
    """Prevents: a model that cannot be planned without its memory, or whose angles are garbage after to_empty."""
    config = llama_config()
    with torch.device("meta"):
        model = Decoder(config)
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    model.load_state_dict(Decoder(config).state_dict())
    torch.testing.assert_close(model.rotary, rotary_frequencies(config)[0])
    ids = random_ids(1, 5, vocab_size=50)
    torch.testing.assert_close(model(ids), Decoder(config)(ids))


def test_init_follows_the_seed_and_starts_as_identity():
    """Prevents: weights that depend on global state, and blocks that disturb the stream before they learnt anything."""
    config = llama_config(qk_norm=True)
    first, again, other = Decoder(config), Decoder(config), Decoder(config)
    first.init_weights(5)
    torch.manual_seed(99)
    again.init_weights(5)
    other.init_weights(6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embed.weight, other.embed.weight)
    ids = random_ids(1, 6, vocab_size=50)
    torch.testing.assert_close(first.hidden(ids), first.norm(first.embed(ids)))
    first(ids).square().mean().backward()
    gradients = [block.attn.o.weight.grad for block in blocks_of(first)]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)  # and they do learn


def test_scalar_head():
    """Prevents: a reward head of the wrong shape, or a first reward that is not neutral."""
    config = llama_config(tie_embeddings=True)
    ids = random_ids(2, 7, vocab_size=50)
    fresh = Decoder(config, "scalar")(ids)
    assert fresh.shape == (2, 7)
    assert fresh.abs().max() == 0
    model = random_model(config, "scalar")
    assert model.head is not None
    torch.testing.assert_close(model(ids), model.hidden(ids) @ model.head.weight[0])


def test_from_depth():
    """Prevents: nano sizes that move without notice: checkpoints and figures hang on them."""
    config = ModelConfig.from_depth(4, vocab_size=4096)
    assert (config.num_layers, config.hidden, config.num_heads, config.head_dim, config.ffn) == (4, 256, 4, 64, 704)
    assert config.qk_norm and config.tie_embeddings
    embedding, attention, mlp, norms = 4096 * 256, 4 * 256 * 256, 3 * 256 * 704, 2 * 256 + 2 * 64
    assert num_parameters(config) == embedding + 4 * (attention + mlp + norms) + 256
    assert ModelConfig.from_depth(4, vocab_size=4096, num_layers=6).num_layers == 6


def test_flops_by_hand():
    """Prevents: utilisation figures that count the embedding look-up or forget the head."""
    config = llama_config(hidden=32, head_dim=8, ffn=64, num_layers=2)
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 50 * 32
    attention = 2 * 2 * 32 * 5.5  # scores and values, 32 wide, 5.5 tokens seen on average in rows of 10
    assert flops_per_token(config, 10, training=False) == 2 * (matrices + attention)
    assert flops_per_token(config, 10) == 6 * (matrices + attention)


def test_config_json_round_trip():
    """Prevents: a checkpoint whose model cannot be built again, or a misspelt key that is silently dropped."""
    config = llama_config(rope_scaling=LLAMA3, norm_eps=1e-5)
    assert ModelConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="unknown keys \\['hiden'\\]"):
        ModelConfig.from_json(config.to_json() | {"hiden": 3})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"hidden": "32"}, "hidden is '32'"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": True}, "num_heads is True"),
        ({"num_kv_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "rotary_dim 7"),
        ({"family": "mamba"}, "'mamba'"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_base": 1.0}, "rope_base is 1.0"),
        ({"tie_embeddings": "false"}, "tie_embeddings is 'false'"),
        ({"rotary_dim": 4}, "whole heads"),
        ({"qk_norm": True, "qkv_bias": True}, "Qwen"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": YARN | {"factor": -1.0}}, "factor is -1.0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"family": "moss", "tie_embeddings": True, "num_kv_heads": 4}, "moss has no"),
        ({"family": "moss"}, "heads alike"),
    ],
)
def test_config_refuses(values, says):
    """Prevents: an absurd or contradictory config that fails late, in memory or in wrong numbers."""
    with pytest.raises(ValueError, match=says):
        llama_config(**values)


def test_forward_refuses():
    """Prevents: texts beyond the trained length, and cached tokens all at position 0."""
    model = Decoder(llama_config(max_length=8))
    with pytest.raises(ValueError, match="9 tokens are more than the model's max_length 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="positions"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=SlowCache())
    with pytest.raises(ValueError, match="'vector'"):
        Decoder(model.config, "vector")  # pyright: ignore[reportArgumentType]
