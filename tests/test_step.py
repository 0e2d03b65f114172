"""The fused step against the decoder it stands for: both families, every switch, ragged rows, many tokens a row."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moss.engine.cache import Cache, Slot
from moss.engine.kernels import GROUP, paths
from moss.engine.quant import QuantLinear, quantize_
from moss.engine.step import Runner, Step, runner
from moss.model import Decoder, ModelConfig

CONFIGS = {
    "llama": {"hidden": 96, "num_heads": 6, "ffn": 200},
    "grouped": {"hidden": 64, "num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "tie_embeddings": True},
    "qwen2": {"hidden": 64, "num_heads": 4, "num_kv_heads": 1, "qkv_bias": True, "rope_base": 1e6},
    "qwen3": {"hidden": 64, "num_heads": 4, "head_dim": 20, "qk_norm": True, "tie_embeddings": True},
    "yarn": {
        "hidden": 64,
        "num_heads": 4,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "moss": {"family": "moss", "hidden": 96, "num_heads": 4},
    "partial": {"family": "moss", "hidden": 128, "num_heads": 4, "rotary_dim": 10, "norm_eps": 1e-5},
}


def make(name: str, dtype: torch.dtype = torch.float32, **values: object) -> Decoder:
    """A decoder with random numbers in every parameter, norms and biases too, so that none can be left out unseen."""
    model = Decoder(ModelConfig(**({"vocab_size": 61, "num_layers": 2, "max_length": 300} | CONFIGS[name] | values)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
            else:
                weight.add_(torch.empty_like(weight).normal_(0, 0.3, generator=generator))
    return model.to(dtype).eval()


def cache_of(model: Decoder, starts: list[int], first: int, dtype: torch.dtype = torch.float32) -> Cache:
    """A cache whose rows from `first` on already hold `starts[i]` random tokens, with strangers around them."""
    config = model.config
    cache = Cache(config.num_layers, config.num_kv_heads, config.head_dim, slots=8, max_length=300, dtype=dtype)
    cache.slots = [Slot(row) for row in range(first + len(starts))]
    cache._reserve(max(starts) + 16)
    generator = torch.Generator().manual_seed(3)
    for store in (*cache.keys, *cache.values):
        store.normal_(generator=generator)
    return cache


@torch.inference_mode()
def both(model: Decoder, fast: Runner, starts: list[int], num_new: int, dtype: torch.dtype = torch.float32):
    """Hidden states, logits and caches of decoder and step over the same tokens."""
    ids = torch.randint(model.config.vocab_size, (len(starts), num_new), generator=torch.Generator().manual_seed(5))
    assert isinstance(fast, Step)
    first, results = 1, []
    for way in (model, fast):
        cache = cache_of(model, starts, first, dtype)
        window = cache.window(first, starts, num_new)
        hidden = way.hidden(ids, positions=window.positions, cache=window)
        results.append((hidden.float(), way.logits(hidden[:, -1]).float(), cache))
    return results


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as the integer kernels see them: 255 levels a group of 128."""
    groups = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((groups / step).round() * step).flatten(-2)[..., : x.shape[-1]]


def as_floats(model: Decoder) -> Decoder:
    """The float32 decoder that a quantized one stands for, activations rounded in front of its linear layers."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuantLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                linear.weight.data = child.dequantize()
                if child.bias is not None:
                    linear.bias.data = child.bias
                linear.register_forward_pre_hook(lambda _, args: rounded(args[0]))
                setattr(module, name, linear)
    return model.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("starts", "num_new"), [([0], 1), ([5, 70, 0], 1), ([130], 3), ([9, 64], 8)])
def test_step_equals_decoder(name: str, path: str, starts: list[int], num_new: int):
    """A bias, a norm, a rotation or a row's length that only one of the two knows would change what users read."""
    model = make(name)
    (hidden, logits, cache), (fast_hidden, fast_logits, fast_cache) = both(model, runner(model, path), starts, num_new)
    assert distance(fast_hidden, hidden) < 2e-6
    assert distance(fast_logits, logits) < 2e-6
    for kept, fast_kept in zip((*cache.keys, *cache.values), (*fast_cache.keys, *fast_cache.values)):
        # The new tokens are where the decoder puts them, and nothing else is touched, neighbours' rows included.
        torch.testing.assert_close(fast_kept, kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("name", ["llama", "moss"])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_wait_for_each_other(threads: int, name: str, path: str):
    """Who reads what another thread has not written yet gives wrong numbers, and not every time."""
    model = make(name, num_layers=4, hidden=192, ffn=768)  # work enough that it is shared
    fast, before = runner(model, path), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(5):
            (hidden, logits, _), (fast_hidden, fast_logits, _) = both(model, fast, [9, 64, 0, 3], 4)
            assert distance(fast_hidden, hidden) < 3e-6
            assert distance(fast_logits, logits) < 3e-6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("name", ["grouped", "partial"])
def test_step_in_bfloat16(name: str, path: str):
    """Weights and cache in bfloat16: within its rounding of the decoder, which also rounds between operations."""
    model = make(name, torch.bfloat16)
    (hidden, logits, cache), (fast_hidden, fast_logits, fast_cache) = both(
        model, runner(model, path), [3, 40], 1, torch.bfloat16
    )
    assert distance(fast_hidden, hidden) < 0.02
    assert distance(fast_logits, logits) < 0.02
    for kept, fast_kept in zip((*cache.keys, *cache.values), (*fast_cache.keys, *fast_cache.values)):
        torch.testing.assert_close(fast_kept, kept, rtol=0.1, atol=0.1)
    (hidden, _, _), (fast_hidden, _, _) = both(as_floats(model), runner(model, path), [3, 40], 1)
    assert distance(fast_hidden, hidden) < 2e-6  # with a float32 cache the step itself rounds nothing


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("width", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "moss"])
def test_step_quantized(name: str, width: str, path: str):
    """The step on integer weights against the decoder on the same weights as floats.

    A value that lies between two levels may round either way, hence the tolerance.
    """
    model = quantize_(make(name), width)
    fast = runner(model, path)
    (hidden, logits, _), (fast_hidden, fast_logits, _) = both(as_floats(model), fast, [3, 40, 12], 1)
    assert distance(fast_hidden, hidden) < 2e-3
    assert distance(fast_logits, logits) < 2e-3


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("width", [None, "int8", "int4"])
@torch.inference_mode()
def test_a_token_does_not_depend_on_its_neighbours(width: str | None, path: str):
    """Bit for bit the same alone, in a batch of 8 and as the last of 8 new tokens: the ground of determinism."""
    model = make("grouped") if width is None else quantize_(make("grouped"), width)
    fast = runner(model, path)
    ids = torch.randint(61, (8, 8), generator=torch.Generator().manual_seed(1))

    def run(rows: slice, num_new: int, cache: Cache, starts: list[int], column: int) -> torch.Tensor:
        window = cache.window(rows.start, starts, num_new)
        piece = ids[rows, column : column + num_new]
        return fast.hidden(piece, positions=window.positions, cache=window)

    dtype = model.embed.weight.dtype
    together, alone, at_once = (cache_of(model, [0] * 8, 0, dtype) for _ in range(3))
    for column in range(8):
        batch = run(slice(0, 8), 1, together, [column] * 8, column)
        single = run(slice(3, 4), 1, alone, [column], column)
    whole = run(slice(3, 4), 8, at_once, [0], 0)
    assert torch.equal(batch[3], single[0])
    assert torch.equal(whole[0, -1], single[0, 0])
    assert torch.equal(fast.logits(batch[:, 0])[3], fast.logits(single[:, 0])[0])


@torch.inference_mode()
def test_what_has_no_kernel_goes_to_the_decoder():
    """Long pieces, other dtypes and scores of a reward model must still be right."""
    model = make("llama")
    fast = runner(model)
    ids = torch.randint(61, (2, 20))
    results = []
    for way in (model, fast):
        cache = cache_of(model, [4, 9], 0)
        window = cache.window(0, [4, 9], 20)
        results.append(way.hidden(ids, positions=window.positions, cache=window))
    assert torch.equal(*results)
    states = torch.randn(40, 96)
    assert torch.equal(fast.logits(states), model.logits(states))
    half = make("llama", torch.float16)
    assert runner(half) is half
    scalar = Decoder(model.config, head="scalar")
    assert runner(scalar) is scalar


@torch.inference_mode()
def test_an_id_beyond_the_vocabulary_is_refused():
    """C++ would read whatever memory lies there."""
    model = make("llama")
    window = cache_of(model, [0], 0).window(0, [0], 1)
    with pytest.raises(IndexError, match="vocabulary of 61"):
        runner(model).hidden(torch.tensor([[61]]), positions=window.positions, cache=window)


@torch.inference_mode()
def test_damaged_weights_show():
    """Not-a-number must reach the logits, where the engine looks for it, also through quantized activations."""
    model = make("llama")
    model.blocks[0].mlp.down.weight.data[0, 0] = float("nan")
    window = cache_of(model, [0], 0).window(0, [0], 1)
    hidden = runner(model).hidden(torch.tensor([[5]]), positions=window.positions, cache=window)
    assert hidden.isnan().all()
    quantized = runner(quantize_(make("llama"), "int8"))
    for bad in (float("nan"), float("inf")):
        states = torch.randn(1, 96)
        states[0, 7] = bad
        assert not quantized.logits(states).isfinite().any()
