"""Decode on the CPU against the memory it reads: linear layers alone, whole steps through the engine, and peers.

A model of each family with about 0.37 billion random weights in float32, bfloat16, int8 and int4. The bound is the
bytes a token really reads (weights of the linear layers with their scales, keys and values; no embedding table) over
the better of two read probes that run between the rounds: torch's sum over 512 MB and a plain stream loop. Every share
is that of its own round; the median of the rounds counts. Prompts are timed to the first token, a second turn after
1,500 tokens both remembered and read again. Peers are asked where they are installed, on the same weights:
transformers, and for the llama family llama.cpp through llama-cpp-python and gguf.

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
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import begin, publish
from moss.engine import Engine
from moss.engine.kernels import FLAGS, Linear, library, paths
from moss.engine.quant import quantize_
from moss.engine.step import Step, runner
from moss.evals.bench import PROBE, START, cache_bytes, decode_rate, seconds, two_turns, weight_bytes
from moss.model import Decoder, ModelConfig
from moss.weights import save_model

SIZES: dict[str, Any] = {"vocab_size": 32_000, "num_layers": 24, "hidden": 1024, "num_heads": 16, "max_length": 2048}
SHAPES = {"llama": ModelConfig(**SIZES, ffn=2816), "moss": ModelConfig(**SIZES, family="moss", rotary_dim=32)}
WIDTHS = ("float32", "bfloat16", "int8", "int4")
STREAMS = (2, 4, 8)
PREFILL, HISTORY = 512, 1500  # tokens of a prompt, and of a first turn

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


def build(family: str, width: str) -> Decoder:
    """The model with the same random weights at any width."""
    model = Decoder(SHAPES[family])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02, generator=generator)
    if width in ("int8", "int4"):
        return quantize_(model, width)
    return model.to(getattr(torch, width)).eval()


def linears_alone(model: Decoder, fast: Step, probe: Probe, rounds: int) -> dict[str, Any]:
    """All linear layers of one token, one after the other."""
    linears = fast.linears()
    array = (Linear * len(linears))(*linears)
    x, y = torch.randn(model.config.ffn), torch.empty(model.config.vocab_size)
    call = probe.stub.sweep
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = (pointer, pointer, number, pointer, number, pointer, number)
    function = ctypes.cast(fast.kernels._linear, ctypes.c_void_p)
    arguments = (function, array, len(linears), x.data_ptr(), 1, y.data_ptr(), torch.get_num_threads())
    total = weight_bytes(model)
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


def whole_step(model: Decoder, probe: Probe, rounds: int, tokens: int) -> dict[str, Any]:
    """Steps as users get them: through the engine, sampling included; alone against the bound, then several at once."""
    total = weight_bytes(model) + cache_bytes(model, START + tokens / 2)
    rates, shares = [], []
    with Engine(model, lookup=False) as engine:
        decode_rate(engine, 1, 4)
        for _ in range(rounds):
            bound = probe()
            rates.append(decode_rate(engine, 1, tokens))
            shares.append(rates[-1] * total / 1e9 / max(bound, probe()))
        together = {1: round(statistics.median(rates), 1)}
        for streams in STREAMS:
            together[streams] = round(statistics.median(decode_rate(engine, streams, tokens) for _ in range(3)), 1)
        read = min(two_turns(engine, PREFILL, 1)[0] for _ in range(3))
        _, warm, cold = two_turns(engine, HISTORY, 32)
    return {
        "bytes": round(total),
        "tokens_per_s": [round(rate, 1) for rate in rates],
        "shares": [round(share, 3) for share in shares],
        "streams_tokens_per_s": together,
        "prefill_tokens_per_s": round(PREFILL / read, 1),
        "second_turn": {"remembered_s": round(warm, 4), "read_again_s": round(cold, 4)},
    }


# ---------------------------------------------------------------- peers


def transformers_rates(folder: Path, tokens: int) -> dict[str, Any]:
    """`generate` of transformers on the same weights."""
    from transformers import AutoModelForCausalLM

    rates: dict[str, Any] = {}
    ids = torch.randint(SIZES["vocab_size"], (1, PREFILL))
    for width in WIDTHS[:2]:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, width)).eval()
        settings = {"do_sample": False, "pad_token_id": 0}

        def answer(count: int, prompt: int = START, model: Any = model, settings: dict[str, Any] = settings) -> None:
            model.generate(ids[:, :prompt], min_new_tokens=count, max_new_tokens=count, **settings)

        answer(2)
        took = min(seconds(lambda: answer(tokens)) - seconds(lambda: answer(1)) for _ in range(3))
        read = min(seconds(lambda: answer(1, PREFILL)) for _ in range(3))
        rates[width] = {"tokens_per_s": round((tokens - 1) / took, 1), "prefill_tokens_per_s": round(PREFILL / read, 1)}
        del model
        gc.collect()
    return rates


def write_gguf(model: Decoder, path: Path, kind: str) -> None:
    """The same weights for llama.cpp: 'F16', 'Q8_0' or 'Q4_0', without a vocabulary."""
    import gguf  # pyright: ignore[reportMissingImports]

    writer, quantization = gguf.GGUFWriter(str(path), "llama"), getattr(gguf.GGMLQuantizationType, kind)
    shape = model.config
    writer.add_context_length(shape.max_length)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.rotary_dim)
    writer.add_vocab_size(shape.vocab_size)
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
    ids = torch.randint(SIZES["vocab_size"], (PREFILL,)).tolist()

    def read(count: int) -> None:
        llama.reset()
        llama.eval(ids[:count])

    def steps() -> None:
        for id in ids[:tokens]:
            llama.eval([id])

    prompt = min(seconds(lambda: read(PREFILL)) for _ in range(3))
    read(START)
    took = min(seconds(steps) for _ in range(3))
    path.unlink()
    return {"tokens_per_s": round(tokens / took, 1), "prefill_tokens_per_s": round(PREFILL / prompt, 1)}


def peers(family: str, tokens: int) -> dict[str, Any]:
    """Rates of whoever is installed and knows the family; who is not is named."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        model = build(family, "float32")
        found["transformers"] = found["llama.cpp"] = "not installed"
        if importlib.util.find_spec("transformers"):
            save_model(model, place)
            found["transformers"] = transformers_rates(Path(place), tokens)
        if family != "llama":
            del found["llama.cpp"]
        elif importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
            found["llama.cpp"] = llama_cpp_rates(model, Path(place), tokens)
    return found


def ours(family: str, width: str, probe: Probe, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one family and width."""
    model = build(family, width)
    fast = runner(model)
    assert isinstance(fast, Step)
    alone = linears_alone(model, fast, probe, args.rounds)
    step = whole_step(model, probe, args.rounds, args.tokens)
    shares = [statistics.median(part["shares"]) for part in (alone, step)]
    print(f"{family} {width}: linears {shares[0]:.0%} of the bound, step {shares[1]:.0%}, {step}", flush=True)
    return {"linears": alone, "step": step}


def compared(rows: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Ratios of our rates to those of the peers, of eight streams to one, and of a remembered second turn's time."""
    steps = {width: row["step"] for width, row in rows.items()}
    rate = {width: statistics.median(step["tokens_per_s"]) for width, step in steps.items()}
    prefill = max(step["prefill_tokens_per_s"] for step in steps.values())
    ratios = {
        f"8 streams / 1, {w}": s["streams_tokens_per_s"][8] / s["streams_tokens_per_s"][1] for w, s in steps.items()
    }
    for width, step in steps.items():
        turn = step["second_turn"]
        ratios[f"second turn remembered / read again, {width}"] = turn["remembered_s"] / turn["read_again_s"]
    pairs = {"transformers": [(width, width) for width in WIDTHS[:2]]}
    pairs["llama.cpp"] = [("bfloat16", "F16"), ("int8", "Q8_0"), ("int4", "Q4_0")]
    for peer, theirs in ((name, values) for name, values in found.items() if isinstance(values, dict)):
        for width, other in pairs[peer]:
            if width in rate:
                ratios[f"decode, {width} / {peer} {other}"] = rate[width] / theirs[other]["tokens_per_s"]
        best = {
            figure: max(row[figure] for row in theirs.values()) for figure in ("tokens_per_s", "prefill_tokens_per_s")
        }
        if peer == "transformers" and "int8" in rate:
            ratios["decode, int8 / best of transformers"] = rate["int8"] / best["tokens_per_s"]
        ratios[f"prefill, best / best of {peer}"] = prefill / best["prefill_tokens_per_s"]
    return {name: round(value, 3) for name, value in ratios.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of one measurement")
    parser.add_argument("--families", default=",".join(SHAPES))
    parser.add_argument("--widths", default=",".join(WIDTHS))
    parser.add_argument("--peers", action="store_true", help="also ask transformers and llama.cpp where installed")
    args = parser.parse_args()
    if library() is None:
        return 1
    probe = Probe()
    result: dict[str, Any] = begin("decode") | {"path": paths()[0], "threads": torch.get_num_threads()}
    for family in args.families.split(","):
        rows = {}
        for width in args.widths.split(","):
            rows[width] = ours(family, width, probe, args)
            gc.collect()
        found = peers(family, args.tokens) if args.peers else {}
        result[family] = {"rows": rows, "peers": found, "ratios": compared(rows, found)}
        for name, figures in (*found.items(), ("ratios", result[family]["ratios"])):
            print(f"{family} {name}: {figures}", flush=True)
    result["probe_gb_per_s"] = [round(rate, 1) for rate in probe.seen]
    print(f"-> {publish(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
