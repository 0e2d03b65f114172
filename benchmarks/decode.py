"""Decode on the CPU against the memory it reads: linear layers alone, whole steps through the engine, and peers.

A llama-family model of 0.37 billion random weights in float32, bfloat16, int8 and int4. The bound is the bytes a token
really reads (weights of the linear layers with their scales, keys and values; no embedding table) over the better of
two read probes that run between the rounds: torch's sum over 512 MB and a plain stream loop. Every share is that of its
own round; the median of the rounds counts. Peers are asked where they are installed, at the same shape:
transformers, and llama.cpp through llama-cpp-python and gguf.

    python -m benchmarks.decode [--rounds 5] [--tokens 48] [--peers]      # writes benchmarks/results/decode.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import begin, publish
from moss.engine import Engine, Sampling
from moss.engine.kernels import FLAGS, GROUP, INT4, INT8, Linear, library, paths
from moss.engine.quant import quantize_
from moss.engine.step import Step, runner
from moss.model import Decoder, ModelConfig
from moss.weights import save_model

SHAPE = ModelConfig(vocab_size=32_000, num_layers=24, hidden=1024, num_heads=16, ffn=2816, max_length=2048)
WIDTHS = ("float32", "bfloat16", "int8", "int4")
STREAMS = (1, 2, 4, 8, 16)
PROMPT = 64  # tokens read before the ones that are timed
PREFILL = 512
PROBE = 512 << 20  # bytes

# The second probe, and all linear layers of a token in one call: a call from Python costs as much as a small layer.
STUB = """
#include <cstdint>
struct Linear { const void *w, *s, *o; const float* b; int64_t rows, cols, kind; };
extern "C" float stream(const float* p, int64_t n, int threads) {
    float all = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : all) schedule(static)
    for (int64_t i = 0; i < n; i += 4096) {
        float part[64] = {};
        for (int64_t j = 0; j < 4096; j += 64)
            for (int k = 0; k < 64; k++) part[k] += p[i + j + k];
        for (float x : part) all += x;
    }
    return all;
}
extern "C" void sweep(void (*f)(const Linear*, const float*, int64_t, float*, int64_t), const Linear* l, int64_t count,
                      const float* x, int64_t n, float* y, int64_t threads) {
    for (int64_t i = 0; i < count; i++) f(l + i, x, n, y, threads);
}
"""


def stub() -> ctypes.CDLL:
    """The compiled helper, with this CPU's vector registers."""
    with tempfile.TemporaryDirectory() as place:
        source, part, target = (Path(place) / name for name in ("stub.cpp", "stub.o", "stub.so"))
        source.write_text(STUB, encoding="utf-8")
        subprocess.run(["c++", *FLAGS, "-O3", "-march=native", "-c", str(source), "-o", str(part)], check=True)
        subprocess.run(["c++", "-shared", str(part), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))


class Probe:
    """How fast memory can be read just now."""

    def __init__(self) -> None:
        self.stub = stub()
        self.block = torch.ones(PROBE // 4)
        self.seen: list[float] = []

    def __call__(self) -> float:
        """GB/s, the better of two ways."""
        count, threads = self.block.numel(), torch.get_num_threads()
        ways = (
            self.block.sum,
            lambda: self.stub.stream(ctypes.c_void_p(self.block.data_ptr()), ctypes.c_int64(count), threads),
        )
        self.seen.append(PROBE / min(seconds(way) for way in ways) / 1e9)
        return self.seen[-1]


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def build(width: str) -> Decoder:
    """The model with the same random weights at any width."""
    model = Decoder(SHAPE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02, generator=generator)
    if width in ("int8", "int4"):
        return quantize_(model, width)
    return model.to(getattr(torch, width)).eval()


def read_bytes(linears: list[Linear]) -> int:
    """Bytes of weights and scales that one token reads."""
    size = {0: 4.0, 1: 2.0, INT8: 1.0, INT4: 0.5 + 4 / GROUP}
    return round(sum(layer.rows * (layer.cols * size[layer.kind] + 4 * (layer.kind == INT8)) for layer in linears))


def linears_alone(fast: Step, probe: Probe, rounds: int) -> dict[str, Any]:
    """All linear layers of one token, one after the other."""
    linears = fast.linears()
    array = (Linear * len(linears))(*linears)
    x, y = torch.randn(SHAPE.ffn), torch.empty(SHAPE.vocab_size)
    call = probe.stub.sweep
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = (pointer, pointer, number, pointer, number, pointer, number)
    function = ctypes.cast(fast.kernels._linear, ctypes.c_void_p)
    arguments = (function, array, len(linears), x.data_ptr(), 1, y.data_ptr(), torch.get_num_threads())
    total = read_bytes(linears)
    rates = []
    for _ in range(rounds):
        bound = probe()
        took = min(seconds(lambda: call(*arguments)) for _ in range(4))
        rates.append((total / took / 1e9, total / took / 1e9 / max(bound, probe())))
    return {
        "bytes": total,
        "gb_per_s": [round(rate, 2) for rate, _ in rates],
        "shares": [round(s, 3) for _, s in rates],
    }


def engine_rate(engine: Engine, streams: int, tokens: int) -> float:
    """Tokens a second of so many requests at once, after their first token."""
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=40, max_tokens=tokens, seed=1)
    prompts = torch.randint(SHAPE.vocab_size, (streams, PROMPT), generator=torch.Generator().manual_seed(streams))
    running = [engine.submit(ids, sampling) for ids in prompts.tolist()]
    for stream in running:
        next(stream)

    def waiting() -> int:  # tokens that are made but not taken yet
        return sum(stream._tokens.qsize() for stream in running)

    before, begun = waiting(), time.perf_counter()
    made = sum(1 for _ in running[0])  # the first to begin is the first to end: until then all of them run
    made, took = made + waiting() - before, time.perf_counter() - begun
    for stream in running:
        stream.cancel()
        list(stream)
    return made / took


def whole_step(model: Decoder, fast: Step, probe: Probe, rounds: int, tokens: int) -> dict[str, Any]:
    """Steps as users get them: through the engine, sampling included; alone against the bound, then several at once."""
    length = PROMPT + tokens / 2
    cached = 2 * SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim * length * model.embed.weight.element_size()
    total = read_bytes(fast.linears()) + cached
    rates, shares, together = [], [], {}
    with Engine(model, lookup=False) as engine:
        engine_rate(engine, 1, 4)
        for _ in range(rounds):
            bound = probe()
            rates.append(engine_rate(engine, 1, tokens))
            shares.append(rates[-1] * total / 1e9 / max(bound, probe()))
        for streams in STREAMS:
            together[streams] = round(statistics.median(engine_rate(engine, streams, tokens) for _ in range(3)), 1)
    return {
        "bytes": round(total),
        "tokens_per_s": [round(rate, 1) for rate in rates],
        "shares": [round(share, 3) for share in shares],
        "streams_tokens_per_s": together,
        "prefill_tokens_per_s": round(prefill(model), 1),
    }


@torch.inference_mode()
def prefill(model: Any) -> float:
    """Tokens a second of a long prompt, best of three."""
    ids = torch.randint(SHAPE.vocab_size, (1, PREFILL))
    return PREFILL / min(seconds(lambda: model(ids)) for _ in range(3))


# ---------------------------------------------------------------- peers


def transformers_rates(folder: Path, tokens: int) -> dict[str, Any]:
    """`generate` of transformers on the same weights."""
    from transformers import AutoModelForCausalLM

    rates: dict[str, Any] = {}
    ids = torch.randint(SHAPE.vocab_size, (1, PROMPT))
    for width in WIDTHS[:2]:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, width)).eval()
        settings = {"do_sample": False, "pad_token_id": 0}

        def answer(count: int, model: Any = model, settings: dict[str, Any] = settings) -> None:
            model.generate(ids, min_new_tokens=count, max_new_tokens=count, **settings)

        answer(2)
        took = min(seconds(lambda: answer(tokens)) - seconds(lambda: answer(1)) for _ in range(3))
        rates[width] = {"tokens_per_s": round((tokens - 1) / took, 1), "prefill_tokens_per_s": round(prefill(model), 1)}
        del model
        gc.collect()
    return rates


def write_gguf(model: Decoder, path: Path, kind: str) -> None:
    """The same weights for llama.cpp: 'F16', 'Q8_0' or 'Q4_0', without a vocabulary."""
    import gguf  # pyright: ignore[reportMissingImports]

    writer, quantization = gguf.GGUFWriter(str(path), "llama"), getattr(gguf.GGMLQuantizationType, kind)
    writer.add_context_length(SHAPE.max_length)
    writer.add_embedding_length(SHAPE.hidden)
    writer.add_block_count(SHAPE.num_layers)
    writer.add_feed_forward_length(SHAPE.ffn)
    writer.add_head_count(SHAPE.num_heads)
    writer.add_head_count_kv(SHAPE.num_kv_heads)
    writer.add_layer_norm_rms_eps(SHAPE.norm_eps)
    writer.add_rope_dimension_count(SHAPE.rotary_dim)
    writer.add_vocab_size(SHAPE.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {"embed": "token_embd", "norm": "output_norm", "head": "output", "attn_norm": "attn_norm"}
    names |= {"mlp_norm": "ffn_norm", "attn.o": "attn_output"} | {f"attn.{x}": f"attn_{x}" for x in "qkv"}
    names |= {f"mlp.{x}": f"ffn_{x}" for x in ("gate", "up", "down")}
    for name, weight in model.named_parameters():
        part = name.removesuffix(".weight")
        if part.startswith("blocks."):
            _, layer, part = part.split(".", 2)
            target = f"blk.{layer}.{names[part]}.weight"
        else:
            target = f"{names[part]}.weight"
        values = weight.detach().float().numpy()
        if values.ndim == 1:
            writer.add_tensor(target, values)
        else:
            writer.add_tensor(target, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_rates(model: Decoder, place: Path, tokens: int) -> dict[str, Any]:
    """llama.cpp on the same weights, one token at a time."""
    return {kind: _llama_cpp_rate(model, place / f"{kind}.gguf", kind, tokens) for kind in ("F16", "Q8_0", "Q4_0")}


def _llama_cpp_rate(model: Decoder, path: Path, kind: str, tokens: int) -> dict[str, float]:
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    write_gguf(model, path, kind)
    threads = torch.get_num_threads()
    llama = Llama(str(path), n_ctx=1024, n_batch=PREFILL, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = torch.randint(SHAPE.vocab_size, (PREFILL,)).tolist()

    def read(count: int) -> None:
        llama.reset()
        llama.eval(ids[:count])

    def steps() -> None:
        for id in ids[:tokens]:
            llama.eval([id])

    prompt = min(seconds(lambda: read(PREFILL)) for _ in range(3))
    read(PROMPT)
    took = min(seconds(steps) for _ in range(3))
    path.unlink()
    return {"tokens_per_s": round(tokens / took, 1), "prefill_tokens_per_s": round(PREFILL / prompt, 1)}


def peers(tokens: int) -> dict[str, Any]:
    """Whoever is installed; who is not is named."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        model = build("float32")
        found["transformers"] = found["llama.cpp"] = "not installed"
        if importlib.util.find_spec("transformers"):
            save_model(model, place)
            found["transformers"] = transformers_rates(Path(place), tokens)
        if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
            found["llama.cpp"] = llama_cpp_rates(model, Path(place), tokens)
    for name, rates in found.items():
        print(f"{name}: {rates}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of one measurement")
    parser.add_argument("--widths", default=",".join(WIDTHS))
    parser.add_argument("--peers", action="store_true", help="also ask transformers and llama.cpp where installed")
    args = parser.parse_args()
    if library() is None:
        return 1
    probe = Probe()
    result: dict[str, Any] = begin("decode") | {"path": paths()[0], "threads": torch.get_num_threads(), "rows": {}}
    for width in args.widths.split(","):
        model = build(width)
        fast = runner(model)
        assert isinstance(fast, Step)
        alone = linears_alone(fast, probe, args.rounds)
        step = whole_step(model, fast, probe, args.rounds, args.tokens)
        result["rows"][width] = {"linears": alone, "step": step}
        shares = [statistics.median(part["shares"]) for part in (alone, step)]
        print(f"{width}: linears {shares[0]:.0%} of the bound, step {shares[1]:.0%}, {step}", flush=True)
        del model, fast
        gc.collect()
    result["probe_gb_per_s"] = [round(rate, 1) for rate in probe.seen]
    if args.peers:
        result["peers"] = peers(args.tokens)
    print(f"-> {publish(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
