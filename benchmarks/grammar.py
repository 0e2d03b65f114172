"""What the grammar costs beside a decode step of the bundled model.

A step is one token of one stream through the engine, sampling included, without a grammar; beside it, round by round
in turn, stand the mask, its use on the logits and the state's advance for every token of a tool turn. The first round
fills the grammar's memory and is not counted; what it took is reported as `first_ms`. A vocabulary as large as the
released one, made of random merges, is timed too.

    python -m benchmarks.grammar [--repeats 9] [--model DIR]      # writes benchmarks/results/grammar.json
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from benchmarks.record import begin, publish
from moss import resolve
from moss.chat import META_INSTRUCTION, Dialog, Round, Turn, Until, render
from moss.engine import Engine, Sampling
from moss.engine.grammar import commands_grammar
from moss.tokenizer import EOS, MARKERS, Tokenizer
from moss.tools.base import MAX_CALLS, standard_tools

STEPS = 48  # decode steps of a round
WIDE = 100_000  # ids, about as many as the released vocabulary has
GOAL = 5.0  # percent of a step
TURN = Turn(
    "What is 37*12, and which x solves x+2=5?",
    [Round("multiply, then solve the equation", 'Calculate("37*12"), Solve("x+2=5", "x")', "None")],
    "37*12 is 444, and x is 3. 37 乘 12 等于 444，方程的解是 x = 3。",
)
DIALOG = Dialog(META_INSTRUCTION, {"thoughts": True, "calculator": True, "solver": True}, [TURN])


def passes(tok: Tokenizer) -> list[tuple[Until, list[tuple[str, int]]]]:
    """What a model writes in the two passes of the turn: (section, id)."""
    whole = render(DIALOG, tok)[0]
    cuts = [len(render(DIALOG, tok, until=until)[0]) for until in ("thoughts", "reply")]
    thoughts, reply = (
        whole[cut : whole.index(tok.marker(end)[0], cut) + 1] for cut, end in zip(cuts, ("<eoc>", "<eom>"))
    )
    opening = thoughts.index(tok.marker("<eot>")[0]) + 1
    commands = opening + len(tok.encode("\n")) + len(tok.opening("<|Commands|>"))
    sections = ["thoughts"] * opening + ["opening"] * (commands - opening)
    sections += ["commands"] * (len(thoughts) - commands)
    return [("thoughts", list(zip(sections, thoughts))), ("reply", [("reply", id) for id in reply])]


def seconds_of_steps(engine: Engine, prompt: Sequence[int], seed: int) -> list[float]:
    """Seconds of each decode step of one stream."""
    stream = engine.submit(prompt, Sampling(temperature=0.7, top_p=0.8, max_tokens=STEPS, seed=seed))
    times = [time.perf_counter() for _ in stream]
    return [after - before for before, after in pairwise(times)]


def seconds_of_grammar(tok: Tokenizer, vocab_size: int) -> dict[str, list[float]]:
    """Seconds for each token of the turn, by what the grammar stood in."""
    logits = torch.zeros(1, vocab_size)
    seconds: dict[str, list[float]] = {}
    for until, ids in passes(tok):
        state = commands_grammar(tok, standard_tools(), until, max_calls=MAX_CALLS).start()
        for section, id in ids:
            begun = time.perf_counter()
            mask = state.mask()
            logits.masked_fill(~mask, -torch.inf)  # as the engine does
            state.advance(id)
            seconds.setdefault(section, []).append(time.perf_counter() - begun)
            assert mask[id], (section, tok.decode([id], markers=True))
    return seconds


def wide_vocabulary(size: int) -> Tokenizer:
    """A vocabulary of `size` tokens from random merges, as quick to make as it is meaningless."""
    rng = random.Random(0)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, merges = set(tokens), []
    while len(tokens) < size:
        left, right = rng.choice(tokens), rng.choice(tokens)
        if len(left + right) <= 16 and left + right not in known:
            merges.append((left, right))
            tokens.append(left + right)
            known.add(left + right)
    backend = Backend(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (EOS, *MARKERS)])
    return Tokenizer(backend)


def compiled(tok: Tokenizer) -> dict[str, float]:
    """Milliseconds to make the grammar of a vocabulary, then that of another tool set, then of the first turn."""
    times = []
    calculator = {"calculator": standard_tools()["calculator"]}
    for make in (
        lambda: commands_grammar(tok, calculator),
        lambda: commands_grammar(tok, standard_tools(), max_calls=MAX_CALLS),
        lambda: seconds_of_grammar(tok, tok.vocab_size),
    ):
        begun = time.perf_counter()
        make()
        times.append(round((time.perf_counter() - begun) * 1e3, 3))
    return dict(zip(("vocabulary_ms", "tool_set_ms", "first_turn_ms"), times))


def microseconds(values: Iterable[float]) -> float:
    return round(median(values) * 1e6, 2)


def figures(tok: Tokenizer, model_vocab: int, engine: Engine | None, repeats: int) -> dict[str, Any]:
    """What the grammar of one vocabulary costs, beside the steps of `engine`."""
    result: dict[str, Any] = {"vocab_size": tok.vocab_size, "compile": compiled(tok)}
    prompt = render(DIALOG, tok, until="thoughts")[0]
    rounds: list[dict[str, list[float]]] = []
    steps: list[list[float]] = []
    for number in range(repeats + 1):
        steps.append([] if engine is None else seconds_of_steps(engine, prompt, number))
        rounds.append(seconds_of_grammar(tok, model_vocab))
    del steps[0], rounds[0]
    result["grammar_us"] = {
        section: microseconds(value for each in rounds for value in each[section]) for section in rounds[0]
    }
    turns = [mean([value for values in each.values() for value in values]) for each in rounds]
    result["token_us"] = microseconds(turns)
    result["repeats_token_us"] = [round(turn * 1e6, 2) for turn in turns]
    if engine is not None:
        result["step_us"] = microseconds(value for each in steps for value in each)
        result["repeats_step_us"] = [microseconds(each) for each in steps]
        result["percent_of_step"] = round(100 * median(turn / median(each) for turn, each in zip(turns, steps)), 3)
        result["worst_section_percent"] = round(100 * max(result["grammar_us"].values()) / result["step_us"], 3)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", help="folder of a model; nothing = the bundled one")
    args = parser.parse_args()
    result: dict[str, Any] = begin("grammar") | {
        "llguidance": version("llguidance"),
        "threads": torch.get_num_threads(),
    }
    model, tok = resolve.load(args.model)
    with Engine(model, slots=1, lookup=False) as engine:
        result["model"] = figures(tok, model.config.vocab_size, engine, args.repeats)
    result["wide"] = figures(wide := wide_vocabulary(WIDE), wide.vocab_size, None, args.repeats)
    result["goals"] = {"percent_of_step": f"< {GOAL}"}
    path = publish(result)
    for name in ("model", "wide"):
        print(f"{name:6} {result[name]['token_us']:9.2f} us a token, by section {result[name]['grammar_us']}")
    print(
        f"a step {result['model']['step_us']:9.2f} us; the grammar takes {result['model']['percent_of_step']} % of it"
    )
    print(f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
