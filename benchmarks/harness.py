"""`moss eval` beside lm-evaluation-harness: the same scores of the same questions, and how fast.

A toy with random weights is written by `moss.weights`, and measured twice on the parts of MMLU and TruthfulQA in
MOSS_TEST_DATA: by `moss eval`, and by the harness with its own templates of both tasks over transformers, read from
local files. Compared are the log-likelihood of every choice and which one is taken; the program exits with 1 where a
score differs by more than `BOUND` of its size, or a choice by anything but a tie.

Speed is that of MMLU, questions a second, in turn: `moss eval` without its start, the harness, and the loop that one
would write: transformers, a forward for each choice of each question.

    MOSS_TEST_DATA=… python -m benchmarks.harness [--questions N] [--rounds 3]    # writes results/harness.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import lm_eval.tasks  # pyright: ignore[reportMissingImports]
import torch
import yaml  # pyright: ignore[reportMissingModuleSource]
from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks.truthfulqa.utils import process_results_mc2  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.record import begin, publish
from moss.evals import choice, truthful
from moss.evals.base import Kept, Task, subject
from moss.model import Decoder, ModelConfig, num_parameters
from moss.resolve import locate
from moss.tokenizer import Tokenizer
from moss.weights import save_model

BOUND = 1e-4
SIZES: dict[str, Any] = {"num_layers": 4, "hidden": 256, "num_heads": 4, "max_length": 4096}
TASKS = Path(lm_eval.tasks.__file__).parent
Score = tuple[list[float], int]  # of the choices of a question, and which is taken


def main() -> int:
    """Run the benchmark; returns 1 where scores differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--questions", type=int, default=0, help="of each subject, to compare scores; 0 = all")
    parser.add_argument("--timed", type=int, default=10, help="of each subject, to measure speed")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    data = Path(os.environ["MOSS_TEST_DATA"])
    torch.manual_seed(0)
    result = begin("harness") | {"versions": {name: version(name) for name in ("lm_eval", "transformers", "torch")}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_toy(folder / "toy")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "toy/tokenizer.json"), eos_token="<|endoftext|>"
        )
        model = AutoModelForCausalLM.from_pretrained(folder / "toy", dtype=torch.float32)
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1, max_length=SIZES["max_length"])
        asked = choice.read(data / "mmlu", 5, limit=args.questions)
        facts = truthful.read(data / "TruthfulQA.csv")[: 6 * args.questions or None]
        settings = {"model": str(folder / "toy"), "style": "plain", "json": True, "dtype": "float32"}
        mmlu = choice.Choice(choice.MMLU(**settings), asked)
        truth = truthful.Truthful(truthful.TruthfulQA(**settings), facts)
        compared = {
            "MMLU": compare(ours_of(mmlu, folder, mmlu_score), theirs_of(theirs, mmlu_tasks(asked, folder))),
            "TruthfulQA MC1": compare(
                ours_of(truth, folder, partial(mc1_score, facts)), theirs_of(theirs, [truth_task("mc1", facts, folder)])
            ),
            "TruthfulQA MC2": compare(
                ours_of(truth, folder, partial(mc2_score, facts)), theirs_of(theirs, [truth_task("mc2", facts, folder)])
            ),
        }
        timed = choice.read(data / "mmlu", 5, limit=args.timed)
        few = choice.Choice(choice.MMLU(**settings), timed)
        ways: dict[str, Callable[[], object]] = {
            "moss eval": lambda: ours_of(few, folder, mmlu_score),
            "lm-evaluation-harness": lambda: theirs_of(theirs, mmlu_tasks(timed, folder)),
            "a transformers loop": lambda: loop(model, tokenizer, timed),
        }
        number = sum(len(found) for _, found in timed.subjects.values())
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
    rates = {name: number / median(times) for name, times in seconds.items()}
    result |= {
        "parameters": size,
        "compared": compared,
        "questions": number,
        "seconds": seconds,
        "questions_per_s": rates,
    }
    result["times"] = {name: rates["moss eval"] / rate for name, rate in rates.items() if name != "moss eval"}
    for name, told in compared.items():
        others = f"{told['other']} other choices"
        print(f"{name}: {told['questions']} questions, scores differ by {told['apart']:.1e}, {others}")
    print(", ".join(f"{name} {rate:.1f} questions/s" for name, rate in rates.items()))
    print(publish(result))
    return int(any(told["apart"] > BOUND or told["other"] for told in compared.values()))


def write_toy(folder: Path) -> int:
    """A llama with random weights, spread so that choices differ; returns its parameters."""
    tok = Tokenizer.load(locate())
    model = Decoder(ModelConfig(tok.vocab_size, **SIZES))
    model.init_weights(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    save_model(model, folder, eos=tok.eos)
    tok.save(folder)
    return num_parameters(model.config)


# ---------------------------------------------------------------- ours


def ours_of(task: Task, folder: Path, score: Callable[[dict[str, Any]], Score]) -> list[Score]:
    """The scores of `moss eval`, nothing of it known from before."""
    config = task.config  # type: ignore[attr-defined]
    with subject(config.model, config) as who, (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        return [score(row) for row in task.measure(who, Kept(folder, {}, file))]


def mmlu_score(row: dict[str, Any]) -> Score:
    return row["scores"], "ABCD".index(row["choice"])


def mc1_score(facts: Sequence[truthful.Question], row: dict[str, Any]) -> Score:
    false = facts[int(row["id"])].false
    scores = [row["scores"][at] for at, text in enumerate(row["texts"]) if not at or text in false]
    return scores, scores.index(max(scores))


def mc2_score(facts: Sequence[truthful.Question], row: dict[str, Any]) -> Score:
    false = facts[int(row["id"])].false
    both = list(zip(row["texts"], row["scores"], strict=True))  # true ones first, as the harness is given them
    scores = [score for text, score in both if text not in false] + [score for text, score in both if text in false]
    return scores, scores.index(max(scores))


# ---------------------------------------------------------------- theirs


def theirs_of(model: HFLM, tasks: Sequence[ConfigurableTask]) -> list[Score]:
    """The scores of the harness, over all tasks in their order."""
    found: list[Score] = []
    for task in tasks:
        told = evaluate(model, {task.config.task: task}, bootstrap_iters=0, log_samples=True)
        for sample in sorted(told["samples"][task.config.task], key=lambda sample: sample["doc_id"]):
            scores = [float(each[0]) for each in sample["filtered_resps"]]
            found.append((scores, scores.index(max(scores))))
    return found


def mmlu_tasks(asked: choice.Set, folder: Path) -> list[ConfigurableTask]:
    """The harness's task of each subject, over local files."""
    template = yaml.safe_load((TASKS / "mmlu/default/_default_template_yaml").read_text())
    found = []
    for subject_, (examples, questions) in asked.subjects.items():
        files = {
            part: write(folder / f"{subject_}_{part}.jsonl", map(as_doc, each))
            for part, each in (("dev", examples), ("test", questions))
        }
        head = f"The following are multiple choice questions (with answers) about {subject_.replace('_', ' ')}.\n\n"
        more = {"task": f"mmlu_{subject_}", "description": head, "num_fewshot": len(examples)}
        found.append(ConfigurableTask(config=template | local(files) | more))
    return found


def truth_task(kind: str, facts: Sequence[truthful.Question], folder: Path) -> ConfigurableTask:
    """MC1 or MC2 of the harness over a local file."""
    template = yaml.safe_load((TASKS / "truthfulqa/truthfulqa_mc1.yaml").read_text())
    docs = []
    for each in facts:
        true = [each.best] if kind == "mc1" else [answer for answer in each.answers if answer not in each.false]
        choices = [*true, *(answer for answer in each.answers if answer in each.false)]
        labels = [int(number < len(true)) for number in range(len(choices))]
        docs.append({"question": each.text, f"{kind}_targets": {"choices": choices, "labels": labels}})
    files = {"validation": write(folder / f"{kind}.jsonl", docs)}
    more: dict[str, Any] = {"task": f"truthfulqa_{kind}"}
    if kind == "mc2":
        more |= {"doc_to_choice": "{{mc2_targets.choices}}", "process_results": process_results_mc2}
    return ConfigurableTask(config=template | local(files) | more)


def local(files: dict[str, str]) -> dict[str, Any]:
    """Where a task's documents come from."""
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "tag": None}


def as_doc(question: choice.Question) -> dict[str, Any]:
    return {"question": question.text, "choices": list(question.choices), "answer": question.answer}


def write(file: Path, docs: Any) -> str:
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    return str(file)


def compare(ours: Sequence[Score], theirs: Sequence[Score]) -> dict[str, Any]:
    """How far scores are apart, relative to the largest of a question, and how many choices are others."""
    assert len(ours) == len(theirs)
    apart, other = 0.0, 0
    for (mine, taken), (his, also) in zip(ours, theirs, strict=True):
        size = max(map(abs, his))
        apart = max(apart, *(abs(a - b) / size for a, b in zip(mine, his, strict=True)))
        other += taken != also and abs(his[taken] - his[also]) > BOUND * size
    return {"questions": len(ours), "scores": sum(len(mine) for mine, _ in ours), "apart": apart, "other": other}


# ---------------------------------------------------------------- a loop


@torch.inference_mode()
def loop(model: Any, tokenizer: Any, asked: choice.Set) -> list[int]:
    """What one would write: each choice behind its prompt, a forward each."""
    found = []
    for examples, questions in asked.subjects.values():
        for question in questions:
            text, scores = choice.plain(examples, question, asked), []
            before = len(tokenizer(text)["input_ids"])
            for letter in choice.LETTERS:
                ids = torch.tensor([tokenizer(f"{text} {letter}")["input_ids"]])
                logs = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
                scores.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(before, ids.shape[1])))
            found.append(scores.index(max(scores)))
    return found


if __name__ == "__main__":
    sys.exit(main())
