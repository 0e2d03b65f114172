"""What the grammar costs in the engine, as a share of a decode step of the bundled model.

Questions for both tools go through one engine, one stream, greedy and without lookup, with and without a grammar in
turn, many times each. The ids must be the same each time, so that nothing differs but the grammar. `with_us` and
`without_us` are medians over the rounds of a question, `percent` the median over the questions.

Beside it stands where the time goes: what the engine does with a grammar for each token of one turn, greedy or drawn,
by itself and so with warm processor caches, also for a vocabulary as large as the released one, made of random merges.
`compile` is what it takes to make a grammar, and the first turn with it, by itself (`first_turn_ms`).

    python -m benchmarks.grammar [--questions 12] [--rounds 40] [--model DIR]   # writes benchmarks/results/grammar.json
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from statistics import mean, median, quantiles
from typing import Any

import torch
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from benchmarks.record import begin, publish
from moss import resolve
from moss.chat import META_INSTRUCTION, Dialog, Round, Turn, Until, render
from moss.engine import Engine, Grammar, Sampling
from moss.engine.engine import _allowed, _masked
from moss.engine.grammar import commands_grammar
from moss.engine.requests import Request
from moss.evals.tool_cases import LANGS, scripted
from moss.tokenizer import EOS, MARKERS, Tokenizer
from moss.tools.base import standard_tools
from moss.tools.calls import MAX_CALLS

REPEATS = 9  # turns whose tokens are timed one by one
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


def grammar_of(tok: Tokenizer, until: Until = "thoughts") -> Grammar:
    """The grammar of all tools, as the turn loop asks for it."""
    return commands_grammar(tok, standard_tools(), until, max_calls=MAX_CALLS)


def seconds_a_token(
    engine: Engine, prompt: Sequence[int], stop: int, grammar: Grammar | None
) -> tuple[float, list[int]]:
    """Seconds of a decode step, the mean of one pass, and the ids."""
    sampling = Sampling(temperature=0, max_tokens=128, stop_ids=frozenset({stop}))
    stream = engine.submit(prompt, sampling, conversation=0, grammar=grammar)
    told = [(time.perf_counter(), token.id) for token in stream]
    return (told[-1][0] - told[0][0]) / (len(told) - 1), [id for _, id in told]


def in_the_engine(engine: Engine, tok: Tokenizer, number: int, rounds: int) -> dict[str, Any]:
    """What a grammar adds to a step."""
    sets = [scripted(kind, lang, number // 4, seed=0) for kind in ("calculator", "solver") for lang in LANGS]
    known, stop = grammar_of(tok), tok.marker("<eoc>")[0]
    pairs: list[tuple[float, float]] = []
    for case in (case for cases in sets for case in cases):
        prompt = render(replace(case.dialog, switches=DIALOG.switches), tok, until="thoughts")[0]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        said = set[tuple[int, ...]]()
        for turn in range(rounds + 1):
            for bound in (False, True) if turn % 2 else (True, False):
                took, ids = seconds_a_token(engine, prompt, stop, known if bound else None)
                said.add(tuple(ids))
                seconds[bound] += [took] * (turn > 0)  # the first round reads the prompt
        if len(said) == 1 and max(said)[-1] == stop:  # else the model alone leaves the format
            pairs.append((median(seconds[False]), median(seconds[True])))
    without, bound = (median(each) for each in zip(*pairs))
    low, middle, high = quantiles([100 * (b - a) / a for a, b in pairs], n=4)
    return {
        "questions": len(pairs),
        "without_us": us(without),
        "with_us": us(bound),
        "percent": round(middle, 2),
        "quartiles_percent": [round(low, 2), round(high, 2)],
    }


def by_itself(tok: Tokenizer, vocab_size: int, drawn: bool) -> dict[str, list[float]]:
    """Seconds of what the engine does with a grammar for each token of the turn, by the section it stands in.

    A token that is drawn needs a mask; of a greedy one the grammar is told.
    """
    logits = torch.zeros(1, vocab_size)
    seconds: dict[str, list[float]] = {}
    with torch.inference_mode():
        for until, ids in passes(tok):
            request = Request([0], Sampling(), grammar=grammar_of(tok, until))
            assert request.following is not None
            for section, id in ids:
                begun = time.perf_counter()
                if drawn:
                    allowed = _masked(logits, [_allowed(request.following, vocab_size)])
                request.following.advance(id)
                seconds.setdefault(section, []).append(time.perf_counter() - begun)
                assert not drawn or allowed[0, id] == 0, (section, tok.decode([id], markers=True))
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


def figures(tok: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What the grammar of one vocabulary costs by itself: to make, and for a token."""
    times = []
    for make in (
        lambda: commands_grammar(tok, {"calculator": standard_tools()["calculator"]}),
        lambda: grammar_of(tok),
        lambda: by_itself(tok, vocab_size, drawn=True),
    ):
        begun = time.perf_counter()
        make()
        times.append(round((time.perf_counter() - begun) * 1e3, 3))
    result: dict[str, Any] = {
        "vocab_size": tok.vocab_size,
        "compile": dict(zip(("vocabulary_ms", "tool_set_ms", "first_turn_ms"), times)),
    }
    for kind in ("greedy", "drawn"):
        rounds = [by_itself(tok, vocab_size, kind == "drawn") for _ in range(REPEATS)]
        parts = {part: us(median(value for each in rounds for value in each[part])) for part in rounds[0]}
        whole = us(median(mean(value for values in each.values() for value in values) for each in rounds))
        result[f"{kind}_us"] = parts | {"mean": whole}
    return result


def us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--model", help="folder of a model; nothing = the bundled one")
    args = parser.parse_args()
    result: dict[str, Any] = begin("grammar") | {
        "llguidance": version("llguidance"),
        "threads": torch.get_num_threads(),
    }
    model, tok = resolve.load(args.model)
    result["model"] = figures(tok, model.config.vocab_size)
    with Engine(model, slots=1, lookup=False) as engine:
        result["engine"] = in_the_engine(engine, tok, args.questions, args.rounds)
    result["wide"] = figures(wide := wide_vocabulary(WIDE), wide.vocab_size)
    result["goals"] = {"percent": f"< {GOAL}"}
    path = publish(result)
    print(f"in the engine: {result['engine']}")
    for name in ("model", "wide"):
        print(f"{name:6} by itself, us a token: {result[name]['greedy_us']}, drawn {result[name]['drawn_us']}")
    print(f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
