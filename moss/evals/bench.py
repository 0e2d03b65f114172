"""`moss bench`: how fast a model answers on this machine, and how fast its memory would let it.

Prompts are random ids, for speed does not depend on what they say. Measured through the engine, as users get it: the
reading of a prompt, a second turn whose history is remembered (warm) or read again (cold), and tokens a second of one
answer and of several at once, without guesses from the prompt.

    moss bench --model models/7B --dtype int8 --streams 1,4 --json

Bound: the bytes that a step has to read (weights of the linear layers with their scales; keys and values of each
answer) over the speed at which half a gigabyte is summed up. A model that fits the caches of a CPU may pass it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from moss.engine import Engine, Sampling
from moss.engine.quant import QuantLinear
from moss.errors import UsageError
from moss.log import bar
from moss.model import Decoder
from moss.resolve import Device, Dtype, dtype_of, load, locate

PROBE = 512 << 20  # bytes of the read probe: more than caches hold
START = 64  # tokens of the prompts whose answers are timed
QUESTION = 32  # new tokens of the second turn
ROUNDS = 3  # repeats, of which the median counts
PATIENCE = 10.0  # seconds after which nothing is repeated any more

T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """Measure how fast a model answers on this machine, beside what its memory allows."""

    model: str | None = None  # folder of a model; the bundled one if left out
    dtype: Dtype = "auto"  # format of the weights; auto takes what fits this machine and the model's size
    device: Device = "auto"  # where the model runs; auto takes the GPU where there is one and it gains
    prompt: int = 512  # tokens of the prompt that is read
    tokens: int = 32  # tokens of an answer
    streams: str = "1,4,8"  # how many answers are made at once, separated by commas
    json: bool = False  # print the figures as one JSON object


def main(config: Bench) -> int:
    """Entry of `moss bench`."""
    try:
        streams = [int(number) for number in config.streams.split(",")]
    except ValueError:
        raise UsageError(f"--streams is {config.streams!r}; give numbers such as 1,4,8") from None
    if min(*streams, config.prompt, config.tokens) < 1:
        raise UsageError("--prompt, --tokens and --streams must be at least 1")
    model, _ = load(config.model, dtype=config.dtype, device=config.device)
    longest = max(config.prompt + QUESTION, START + max(streams)) + config.tokens
    if longest >= model.config.max_length:
        raise UsageError(f"this takes {longest} tokens, the model has {model.config.max_length}: lower --prompt")
    name = "moss-nano" if config.model is None else locate(config.model).resolve().name
    figures = {"model": name} | measure(model, config.prompt, config.tokens, streams)
    if config.json:
        print(json.dumps(figures))
    else:
        show(figures, Console(highlight=False))
    return 0


def measure(model: Decoder, prompt: int, tokens: int, streams: list[int]) -> dict[str, Any]:
    """All figures: times in seconds, rates in tokens a second, medians of up to `ROUNDS` repeats."""
    device = model.embed.weight.device
    speeds, rates = [read_speed(device)], []
    with Engine(model, slots=max(streams) + 1, lookup=False) as engine, bar("bench", 0, len(streams) + 1) as shown:
        decode_rate(engine, 1, 4)  # the first call of everything is slow
        first, warm, cold = map(median, zip(*several(lambda: two_turns(engine, prompt, tokens))))
        for done, count in enumerate(streams, 1):
            shown.show(done, f"{count} at once")
            rates.append(median(several(lambda count=count: decode_rate(engine, count, tokens))))
        shown.show(len(streams) + 1, "done")
    speeds.append(read_speed(device))
    weights, cached = weight_bytes(model), cache_bytes(model, START + tokens / 2)
    bounds = [count * max(speeds) / (weights + count * cached) for count in streams]
    return {
        "dtype": dtype_of(model),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "prompt_tokens": prompt,
        "prefill_tokens_per_s": round(prompt / first, 1),
        "first_token_s": round(first, 4),
        "second_turn": {"tokens": prompt + tokens + QUESTION, "warm_s": round(warm, 4), "cold_s": round(cold, 4)},
        "bytes_per_token": round(weights + cached),
        "read_bytes_per_s": round(max(speeds)),
        "decode": [
            {"streams": count, "tokens_per_s": round(rate, 1), "bound": round(most, 1), "share": round(rate / most, 3)}
            for count, rate, most in zip(streams, rates, bounds)
        ],
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """The figures as a table for people."""
    turn = figures["second_turn"]
    table = Table("{model} as {dtype} on {device}, {threads} threads".format(**figures), "", "of the bound")
    table.add_row(f"prompt of {figures['prompt_tokens']} tokens", f"{figures['prefill_tokens_per_s']:,.0f} tokens/s")
    table.add_row("first token of its answer", f"{figures['first_token_s'] * 1e3:,.0f} ms")
    table.add_row(f"… of a second turn ({turn['tokens']} tokens), remembered", f"{turn['warm_s'] * 1e3:,.0f} ms")
    table.add_row("… and read again", f"{turn['cold_s'] * 1e3:,.0f} ms", end_section=True)
    for row in figures["decode"]:
        rate, share = f"{row['tokens_per_s']:,.0f} tokens/s", f"{row['share']:.0%} of {row['bound']:,.0f}"
        table.add_row(f"{row['streams']} at once" if row["streams"] > 1 else "an answer", rate, share)
    size, speed = figures["bytes_per_token"] / 1e6, figures["read_bytes_per_s"] / 1e9
    console.print(table, f"The bound of one answer: {size:,.1f} MB a token, read at {speed:.1f} GB/s.", sep="")


def several(work: Callable[[], T]) -> list[T]:
    """What it gives `ROUNDS` times, or less often where it takes long."""
    begun, results = time.perf_counter(), [work()]
    while len(results) < ROUNDS and time.perf_counter() - begun < PATIENCE:
        results.append(work())
    return results


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def read_speed(device: torch.device | str) -> float:
    """Bytes a second that can be read from the device's memory just now: the best of some sums."""
    block = torch.ones(PROBE // 4, device=device)
    return PROBE / min(seconds(lambda: block.sum().item()) for _ in range(5))


def weight_bytes(model: Decoder) -> int:
    """Bytes of weights that every step reads: the linear layers with their scales, a tied embedding as the head."""
    parts = [model.embed.weight] if model.head is None else []
    for module in model.modules():
        if isinstance(module, QuantLinear):
            parts += (part for part in module.rows(0, module.out_features) if part is not None)
        elif isinstance(module, nn.Linear):
            parts.append(module.weight)
    return sum(part.nbytes for part in parts)


def cache_bytes(model: Decoder, length: float) -> float:
    """Bytes of keys and values of `length` tokens."""
    config = model.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * length * model.embed.weight.element_size()


def random_ids(engine: Engine, length: int) -> list[int]:
    """A prompt, or a part of one, that the engine has not seen."""
    return torch.randint(engine.model.config.vocab_size, (length,)).tolist()


def two_turns(engine: Engine, prompt: int, tokens: int) -> tuple[float, float, float]:
    """Seconds to the first token of a first turn, of the second one, and of another prompt as long as the second."""

    def ask(ids: list[int], count: int) -> tuple[float, list[int]]:
        begun = time.perf_counter()
        stream = engine.submit(ids, Sampling(temperature=0, max_tokens=count), conversation="turns")
        first = next(stream)
        return time.perf_counter() - begun, [*ids, first.id, *(token.id for token in stream)]

    first, history = ask(random_ids(engine, prompt), tokens)
    warm, again = ask([*history, *random_ids(engine, QUESTION)], 1)
    return first, warm, ask(random_ids(engine, len(again) - 1), 1)[0]


def decode_rate(engine: Engine, streams: int, tokens: int) -> float:
    """Tokens a second of so many answers at once, from when all are under way until the first of them ends."""
    # The first goes on while the others' prompts are read.
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=40, max_tokens=tokens + streams, seed=1)
    running = [engine.submit(random_ids(engine, START), sampling) for _ in range(streams)]
    for stream in running:
        next(stream)

    def waiting() -> int:  # tokens that are made but not taken yet
        return sum(stream._tokens.qsize() - (stream.finish is not None) for stream in running)  # its end is no token

    before, begun = waiting(), time.perf_counter()
    made = sum(1 for _ in running[0])
    made, took = made + waiting() - before, time.perf_counter() - begun
    for stream in running:
        stream.cancel()
        list(stream)
    return made / took
