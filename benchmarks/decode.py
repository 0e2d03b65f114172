"""Decode on the CPU against the memory it reads: linear layers alone, whole steps through the engine, and peers.

A model of each family with about 0.37 billion random weights in float32, bfloat16, int8 and int4. The bound is the
bytes a token really reads (weights of the linear layers with their scales, keys and values; no embedding table) over
the better of two read probes, torch's sum over 512 MB and a plain stream loop, in the mean of those before and after:
what else uses the memory moves it from second to second. Every share is that of its own round; the median of the
rounds counts. Prompts are timed to the first token, a second turn after 1,500 tokens both remembered and read again.
Peers are asked in the same rounds where they are installed, on the same weights: transformers, and for the llama family
llama.cpp through llama-cpp-python and gguf.

    python -m benchmarks.decode [--rounds 7] [--tokens 24] [--peers]      # writes benchmarks/results/decode.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
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
GGUF = {"float32": None, "bfloat16": "F16", "int8": "Q8_0", "int4": "Q4_0"}  # what llama.cpp has beside our widths
STREAMS = (2, 4, 8)
FEW = 3  # rounds in which also several streams and prompts are timed
PREFILL, HISTORY = 512, 1500  # tokens of a prompt, and of a first turn

# The second probe; and all linear layers of a token one after the other, each thread with its rows, as in a step: a
# call from Python, or threads that start anew for each layer, cost as much as a small layer.
STUB = """
#include <cstdint>
#include <omp.h>
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
                      const float* x, float* y, int threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        const int64_t id = omp_get_thread_num(), groups = (l[i].cols + 127) / 128;
        const int64_t first = l[i].rows * id / threads, last = l[i].rows * (id + 1) / threads;
        const int64_t row[] = {l[i].cols * 4, l[i].cols * 2, groups * 128, groups * 64};  // bytes
        Linear part = l[i];
        part.rows = last - first;
        part.w = (const char*)part.w + first * row[part.kind];
        part.s = (const char*)part.s + first * (part.kind == 2 ? 4 : groups * 2);
        part.o = (const char*)part.o + first * groups * 2;
        f(&part, x, 1, y + first, 1);
#pragma omp barrier
    }
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


def share(amount: float, before: float, after: float) -> float:
    """GB/s against what could be read around it."""
    return amount / ((before + after) / 2)


def linears_alone(model: Decoder, fast: Step, probe: Probe, rounds: int) -> dict[str, Any]:
    """All linear layers of one token, one after the other."""
    linears = fast.linears()
    array = (Linear * len(linears))(*linears)
    x, y = torch.randn(model.config.ffn), torch.empty(model.config.vocab_size)
    call = probe.stub.sweep
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = (pointer, pointer, number, pointer, pointer, ctypes.c_int)
    function = ctypes.cast(fast.kernels._linear, ctypes.c_void_p)
    arguments = (function, array, len(linears), x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    total, rates, shares = weight_bytes(model), [], []
    for _ in range(rounds):
        before = probe()
        rates.append(total / statistics.median(seconds(lambda: call(*arguments)) for _ in range(5)) / 1e9)
        shares.append(share(rates[-1], before, probe()))
    return {"bytes": total, "gb_per_s": [round(r, 2) for r in rates], "shares": [round(s, 3) for s in shares]}


def whole_step(
    model: Decoder, probe: Probe, peers: Sequence[Peer], rounds: int, tokens: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Steps as users get them, through the engine, against the bound; and each peer in the same rounds.

    A peer has the process to itself when it runs: the engine of a round is closed, and its threads are gone.
    """
    total = weight_bytes(model) + cache_bytes(model, START + tokens / 2)
    rates, shares, prefills, turns = [], [], [], []
    together = {streams: list[float]() for streams in STREAMS}
    theirs = {peer.name: {"tokens_per_s": list[float](), "prefill_tokens_per_s": list[float]()} for peer in peers}
    for turn in range(rounds):
        with Engine(model, lookup=False) as engine:
            decode_rate(engine, 1, 4)
            before = probe()
            rates.append(decode_rate(engine, 1, tokens))
            shares.append(share(rates[-1] * total / 1e9, before, probe()))
            if turn < FEW:
                prefills.append(PREFILL / two_turns(engine, PREFILL, 1)[0])
                for streams in STREAMS:
                    together[streams].append(decode_rate(engine, streams, tokens))
            if turn == 0:
                turns = two_turns(engine, HISTORY, 32)[1:]
        for peer in peers:
            theirs[peer.name]["tokens_per_s"].append(peer.rate(tokens))
            if turn < FEW:
                theirs[peer.name]["prefill_tokens_per_s"].append(PREFILL / seconds(peer.read))
    warm, cold = turns  # measured once: they differ twentyfold
    ours = {
        "bytes": round(total),
        "tokens_per_s": rates,
        "shares": shares,
        "streams_tokens_per_s": {streams: statistics.median(found) for streams, found in together.items()},
        "prefill_tokens_per_s": prefills,
        "second_turn": {"remembered_s": warm, "read_again_s": cold},
    }
    return ours, theirs


# ---------------------------------------------------------------- peers


@dataclass
class Peer:
    """Somebody else on the same weights: tokens a second of one answer, and the reading of a prompt."""

    name: str
    rate: Callable[[int], float]
    read: Callable[[], object]


def transformers_peer(folder: Path, width: str) -> Peer:
    """`generate` of transformers, greedy."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, width)).eval()
    ids = torch.randint(SIZES["vocab_size"], (1, PREFILL))

    def answer(count: int, prompt: int) -> None:
        model.generate(ids[:, :prompt], min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0)

    def rate(tokens: int) -> float:
        return tokens / (seconds(lambda: answer(tokens + 1, START)) - seconds(lambda: answer(1, START)))

    answer(2, START)
    return Peer(f"transformers {width}", rate, lambda: answer(1, PREFILL))


def llama_cpp_peer(path: Path) -> Peer:
    """llama.cpp, one token at a time, without sampling."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    threads = torch.get_num_threads()
    llama = Llama(str(path), n_ctx=1024, n_batch=PREFILL, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = torch.randint(SIZES["vocab_size"], (PREFILL,)).tolist()

    def read(count: int) -> None:
        llama.reset()
        llama.eval(ids[:count])

    def steps(tokens: int) -> None:
        for id in ids[:tokens]:
            llama.eval([id])

    def rate(tokens: int) -> float:
        read(START)
        return tokens / seconds(lambda: steps(tokens))

    rate(4)
    return Peer(f"llama.cpp {path.stem}", rate, lambda: read(PREFILL))


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


def write_peers(family: str, place: Path) -> None:
    """The weights in the forms that installed peers read."""
    model = build(family, "float32")
    if importlib.util.find_spec("transformers"):
        save_model(model, place)
    if family == "llama" and importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        for kind in filter(None, GGUF.values()):
            write_gguf(model, place / f"{kind}.gguf", kind)


def peers_of(width: str, place: Path) -> list[Peer]:
    """Those that are compared with one of our widths: transformers at its own and, with integers, at its best."""
    found = []
    if (place / "config.json").exists() and width != "int4":
        found.append(transformers_peer(place, "bfloat16" if width == "int8" else width))
    if (path := place / f"{GGUF[width]}.gguf").exists():
        found.append(llama_cpp_peer(path))
    return found


def measure(family: str, width: str, place: Path, probe: Probe, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one family and width."""
    model = build(family, width)
    fast = runner(model)
    assert isinstance(fast, Step)
    alone = linears_alone(model, fast, probe, args.rounds)
    step, theirs = whole_step(model, probe, peers_of(width, place), args.rounds, args.tokens)
    rate, prefill = step["tokens_per_s"], step["prefill_tokens_per_s"]
    ratios = {"8 streams / 1": step["streams_tokens_per_s"][8] / statistics.median(rate[:FEW])}
    ratios["second turn, remembered / read again"] = (
        step["second_turn"]["remembered_s"] / step["second_turn"]["read_again_s"]
    )
    for name, row in theirs.items():
        for figure, mine in (("decode", rate), ("prefill", prefill)):
            other = row["tokens_per_s" if figure == "decode" else "prefill_tokens_per_s"]
            ratios[f"{figure} / {name}"] = statistics.median(a / b for a, b in zip(mine, other))
    result = rounded({"linears": alone, "step": step, "peers": theirs, "ratios": ratios})
    shares = [statistics.median(part["shares"]) for part in (alone, step)]
    print(f"{family} {width}: linears {shares[0]:.0%} of the bound, step {shares[1]:.0%}, {result}", flush=True)
    return result


def versions(*names: str) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def rounded(value: Any) -> Any:
    """Figures with as many digits as mean something."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=24, help="tokens of one measurement")
    parser.add_argument("--families", default=",".join(SHAPES))
    parser.add_argument("--widths", default=",".join(WIDTHS))
    parser.add_argument("--peers", action="store_true", help="also ask transformers and llama.cpp where installed")
    args = parser.parse_args()
    if library() is None:
        return 1
    probe = Probe()
    result: dict[str, Any] = begin("decode") | {"path": paths()[0], "threads": torch.get_num_threads()}
    for family in args.families.split(","):
        with tempfile.TemporaryDirectory() as place:
            if args.peers:
                write_peers(family, Path(place))
            result[family] = {}
            for width in args.widths.split(","):
                result[family][width] = measure(family, width, Path(place), probe, args)
                gc.collect()
    result["peers"] = versions("transformers", "llama-cpp-python") if args.peers else {}
    result["probe_gb_per_s"] = [round(rate, 1) for rate in probe.seen]
    print(f"-> {publish(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
