"""Training on a CPU: `moss train sft`'s own code beside TRL's `SFTTrainer`, same weights, conversations and dtype.

A llama-family model of 42M random weights learns the released conversations (`moss_003_sft_sample.jsonl`), cut at
whole turns to 1,024 tokens of a vocabulary of 16,000 trained on them, in steps of 8 x 1,024 places with AdamW. Every
arm is a process of its own, started afresh and loaded all the time; the parent lets one at a time take a step, round
after round, so that whatever else the machine does meets all alike. Counted are tokens of conversations, learnt or
not, never padding; the best matrix product of each round is the 100 % that model FLOPs are compared with. Peak memory
is VmHWM of the arm's process.

TRL gets the same ids and labels and its documented defaults (gradient checkpointing among them), padded and packed,
and beside them what may help it: no checkpointing, `torch_compile`.

    MOSS_TEST_DATA=DIR python -m benchmarks.train [--rounds 3] [--only NAME ...]  # writes benchmarks/results/train.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import begin, publish

LENGTH, ROWS, VOCAB = 1024, 8, 16_000
SIZES: dict[str, Any] = {"num_layers": 8, "hidden": 512, "num_heads": 8, "ffn": 1408, "max_length": LENGTH}
MICRO = 2  # rows of ours computed at a time
LR = 2e-5  # SFTTrainer's default
WARM = 1  # steps of each arm that are not counted; two where the first compiles
SQUARE = 2048  # of the matrices that tell the machine's rate


@dataclass(frozen=True)
class Arm:
    """One way to train. `settings` go to SFTConfig; ours has none."""

    name: str
    dtype: str
    settings: dict[str, Any] | None = None

    @property
    def warm(self) -> int:
        return WARM + (self.settings is None or "torch_compile" in self.settings)

    @property
    def key(self) -> str:
        return f"{self.name} {self.dtype}"


def arms() -> list[Arm]:
    """Ours, TRL as documented, TRL with what may help it."""
    ways: dict[str, dict[str, Any] | None] = {
        "moss": None,
        "trl padded": {},
        "trl packed": {"packing": True},  # "bfd", its default strategy: best fit, and no document sees another
        "trl padded, no checkpointing": {"gradient_checkpointing": False},
        "trl padded, compiled": {"torch_compile": True},
    }
    return [Arm(name, dtype, settings) for dtype in ("float32", "bfloat16") for name, settings in ways.items()]


# ---------------------------------------------------------------- an arm, in its own process


class Turns:
    """The arm's side: wait for the parent's word, take a step, tell how long it took."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")  # what libraries print goes to the error stream
        os.dup2(2, 1)
        self.began = self.ended = 0.0  # a step without an end of its own lasts till the next turn
        self.done: dict[str, Any] = {}

    def step(self) -> None:
        """Close the step under way, if there is one, and wait for the next."""
        if self.began:
            self.done["seconds"] = self.ended - self.began if self.ended else time.perf_counter() - self.began
        self.say(self.done)
        if sys.stdin.readline().strip() != "go":
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            found = re.search(r"VmHWM:\s+(\d+) kB", status)
            self.say({"peak_bytes": int(found[1]) * 1024 if found else 0})
            os._exit(0)
        self.done = {"tokens": 0, "learnt": 0, "pairs": 0}
        self.began = time.perf_counter()

    def say(self, what: dict[str, Any]) -> None:
        self.out.write(json.dumps(what) + "\n")
        self.out.flush()


def run_moss(arm: Arm, folder: Path, turns: Turns) -> None:
    """Our arm: `launch.train`, as `moss train sft` calls it, on data that waits for its turn."""
    # Imported here: an arm's peak memory is its own.
    import torch

    from moss.data.pack import Packed, Rows
    from moss.tokenizer import Tokenizer
    from moss.train import launch
    from moss.train.loss import next_token
    from moss.train.sft import SFT
    from moss.weights import load_model

    class Gated(Packed):
        def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
            if position % ROWS == 0:
                turns.step()
            batch = super().batch(position, count)
            lengths = [np.bincount(row)[1:] for row in batch["segments"]]
            turns.done["tokens"] += int(sum(row.sum() for row in lengths))
            turns.done["pairs"] += int(sum((row * (row + 1) // 2).sum() for row in lengths))
            turns.done["learnt"] += int(batch["mask"].sum())
            return batch

    data = np.load(folder / "rows.npz")
    tokenizer = Tokenizer.load(folder)
    packed = Gated(Rows(data["ids"], data["mask"], data["starts"]), LENGTH, 0, tokenizer.pad)
    config = SFT(
        out=folder / "out" / arm.dtype,
        steps=10**6,
        batch_tokens=ROWS * LENGTH,
        micro_tokens=MICRO * LENGTH,
        length=LENGTH,
        lr=LR,
        dtype=arm.dtype,  # type: ignore[arg-type]
        compile="on",
        device="cpu",
        save_every=0,
        matrix_lr=0.0,
    )
    torch.manual_seed(0)
    with launch.opened(config) as (start, stop):
        launch.train("sft", config, load_model(folder), tokenizer, packed, next_token, start=start, stop=stop)


def run_trl(arm: Arm, folder: Path, turns: Turns) -> None:
    """TRL's arm: its trainer on the same ids and labels; a callback waits for the turn."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    data = np.load(folder / "rows.npz")
    ids, mask, starts = data["ids"], data["mask"], data["starts"]
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for first, last in pairwise(starts):
        rows["input_ids"].append(ids[first:last].tolist())
        rows["labels"].append(np.where(mask[first:last] == 1, ids[first:last], -100).tolist())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer.pad_token = tokenizer.eos_token

    class Waiting(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.step()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.ended = time.perf_counter()  # before it logs

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = inputs.get("attention_mask")
            turns.done["tokens"] += int(inputs["input_ids"].numel() if found is None else found.sum())
            turns.done["learnt"] += int((inputs["labels"] != -100).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=LENGTH,
        max_steps=10**6,
        bf16=arm.dtype == "bfloat16",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **({"per_device_train_batch_size": ROWS} | (arm.settings or {})),
    )
    trainer = Counting(
        model=str(folder),
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[Waiting()],
    )
    trainer.train()


# ---------------------------------------------------------------- the parent


class Process:
    """The parent's side of an arm."""

    def __init__(self, arm: Arm, folder: Path, log: Path) -> None:
        self.arm = arm
        command = [sys.executable, "-m", "benchmarks.train", "--arm", arm.key, "--folder", str(folder)]
        self.log = log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.steps: list[dict[str, Any]] = []
        self.answer()

    def say(self, word: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.arm.key} ended with {self.process.wait()}; see {self.log.name}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        self.say("go")
        done = self.answer()
        self.steps.append(done | {"load": os.getloadavg()[0]})
        return done

    def end(self) -> int:
        self.say("end")
        peak = self.answer()["peak_bytes"]
        self.process.wait()
        return peak


def prepare(source: Path, folder: Path) -> dict[str, Any]:
    """Tokenizer, rows and weights that all arms read; says what they are."""
    import torch

    from moss.data import dialogs
    from moss.data.rows import of_dialogs
    from moss.model import Decoder, ModelConfig, num_parameters
    from moss.tokenizer import train
    from moss.train.tokenizer import texts
    from moss.weights import save_model

    tokenizer = train(texts([source]), VOCAB)
    tokenizer.save(folder)
    rows, dropped = of_dialogs(dialogs.read(source), tokenizer, "assistant", LENGTH)
    np.savez(folder / "rows.npz", ids=rows.ids, mask=rows.mask, starts=rows.starts)
    config = ModelConfig(vocab_size=VOCAB, **SIZES)
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02, generator=generator)
    save_model(model, folder)
    return {
        "parameters": num_parameters(config),
        "model": config.to_json(),
        "conversations": len(rows),
        "dropped": dropped,
        "tokens": len(rows.ids),
        "learnt": int(rows.mask.sum()),
    }


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a square matrix product, the best of five."""
    import torch

    a, b = (torch.randn(SQUARE, SQUARE, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * SQUARE**3 / min(_seconds(lambda: a @ b) for _ in range(5))


def _seconds(what: Callable[[], Any]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def flops(done: dict[str, Any]) -> float:
    """Multiplications and additions of a step that a model needs: forward and backward of every matrix at tokens of
    conversations, the head and what follows the last attention where something is learnt, attention inside documents.
    Padding counts for nothing."""
    hidden, ffn, layers = SIZES["hidden"], SIZES["ffn"], SIZES["num_layers"]
    after = hidden * hidden + 3 * hidden * ffn
    products = layers * (3 * hidden * hidden + after) * done["tokens"] + hidden * VOCAB * done["learnt"]
    products += 2 * layers * hidden * done["pairs"] - after * (done["tokens"] - done["learnt"])
    return 6.0 * products


def measure(chosen: list[Arm], rounds: int, folder: Path, logs: Path) -> dict[str, Any]:
    """Steps of every arm, round after round, with the matrix rate of each round; a dtype's arms, then the other's, for
    all of them together do not fit into 24 GB."""
    result: dict[str, Any] = {"matmul": {}, "arms": {}}
    for dtype in dict.fromkeys(arm.dtype for arm in chosen):
        running: list[Process] = []
        for arm in chosen:
            if arm.dtype == dtype:
                print(f"{arm.key}: starting", file=sys.stderr, flush=True)
                running.append(Process(arm, folder, logs / f"{arm.key}.log"))
                for _ in range(arm.warm):
                    show(running[-1], running[-1].step())
        rates: list[float] = []
        for number in range(rounds):
            rates.append(matmul_rate(dtype))
            print(f"round {number}: {rates[-1] / 1e9:.0f} GFLOP/s", file=sys.stderr, flush=True)
            for process in running:
                show(process, process.step())
        result["matmul"][dtype] = {"flops": rates}
        result["arms"] |= {process.arm.key: told(process, rates) for process in running}
    return result


def told(process: Process, rates: list[float]) -> dict[str, Any]:
    """What an arm did, and the end of it; of ours also the share of the matrix rate."""
    arm, counted = process.arm, process.steps[process.arm.warm :]
    found: dict[str, Any] = {"dtype": arm.dtype, "settings": arm.settings, "steps": process.steps}
    found["tokens_per_s"] = statistics.median(step["tokens"] / step["seconds"] for step in counted)
    found["peak_bytes"] = process.end()
    if arm.settings is None:
        shares = [flops(step) / step["seconds"] / rate for step, rate in zip(counted, rates, strict=True)]
        found["matmul_share"] = statistics.median(shares)
    return found


def show(process: Process, done: dict[str, Any]) -> None:
    speed = done["tokens"] / done["seconds"]
    print(f"{process.arm.key}: {done['seconds']:.1f} s, {speed:.0f} tokens/s", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each arm")
    parser.add_argument("--only", nargs="*", help="arms to run, e.g. 'moss float32'; nothing is written")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        arm = next(arm for arm in arms() if arm.key == given.arm)
        (run_moss if arm.settings is None else run_trl)(arm, given.folder, Turns())
        return 1  # an arm leaves when told to, never on its own
    source = Path(os.environ["MOSS_TEST_DATA"]) / "moss_003_sft_sample.jsonl"
    chosen = [arm for arm in arms() if not given.only or arm.key in given.only]
    result = begin("train")
    result["machine"]["versions"] |= {name: version(name) for name in ("transformers", "trl", "accelerate", "datasets")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        result |= prepare(source, folder)
        result |= measure(chosen, given.rounds, folder, folder)
    for key, arm in result["arms"].items():
        share = f", {arm['matmul_share']:.0%} of the matrix rate" if "matmul_share" in arm else ""
        print(f"{key}: {arm['tokens_per_s']:.0f} tokens/s, peak {arm['peak_bytes'] / 1e9:.2f} GB{share}")
    if not given.only:
        print(publish(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
