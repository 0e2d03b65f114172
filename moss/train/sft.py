"""`moss train sft`: supervised fine-tuning on conversations.

    moss train sft --model runs/mine/base --data dialogs.jsonl --out runs/mine/sft --length 512
    moss train sft --model base-16b --data dialogs.jsonl --length 2048 --batch-tokens 65536 --epochs 2

Reads conversations in the released MOSS JSON, OpenAI or ShareGPT form. Under the loss `assistant` the model learns
what it has to write itself: thoughts, commands, reply and their end markers; under `paper` everything but the meta
instruction and the contents of Results. Whole turns that do not fit `--length` are dropped and counted; a conversation
in which the model says nothing is an error. A run begins with a table of what is learnt in each section.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from moss.chat import Dialog
from moss.data import dialogs
from moss.data.pack import Packed, Rows
from moss.data.rows import Unusable, by_section, data_files, of_dialogs
from moss.log import console, note
from moss.tokenizer import Tokenizer
from moss.train import launch
from moss.train.loss import next_token
from moss.train.settings import Settings, check, with_rates

MATERIAL = 4000  # conversations of the scripted teacher where no --data is given
RATES = {"lr": 3e-3, "matrix_lr": 0.02}  # of a nano
PAPER = 9e-6  # of large models


@dataclass(frozen=True)
class SFT(Settings):
    """Fine-tune a language model on conversations."""

    out: Path = Path("runs/sft")  # folder of the run: log.jsonl, step-N checkpoints, at the end the model
    model: Path | None = None  # folder of the model to start from, with its tokenizer; none = the bundled model
    loss: Literal["assistant", "paper"] = "assistant"  # what is learnt
    lr: float | None = None  # AdamW, for embeddings, head and norms; none = 3e-3 for a nano, 9e-6 for a large model
    matrix_lr: float | None = None  # Muon, for the matrices of the blocks; 0 = AdamW; none = 0.02 for a nano, else 0


def main(config: SFT) -> int:
    """Render, show what is learnt, train."""
    config = with_rates(config, RATES, PAPER)
    check(config)
    given, held_out = data_files(config.data, "--data"), data_files(config.valid, "--valid")
    with launch.opened(config) as (start, stop):
        tokenizer, model = launch.load(config, start, config.model)
        data = read(given or launch.material(config, "dialogs", MATERIAL), tokenizer, config)
        validate = launch.mean_loss(read(held_out, tokenizer, config), next_token, config) if held_out else None
        console.print(sections(data.rows, tokenizer))
        return launch.train(
            "sft", config, model, tokenizer, data, next_token, start=start, stop=stop, validate=validate
        )


def read(paths: Sequence[Path], tokenizer: Tokenizer, config: SFT) -> Packed:
    """Conversations as packed rows."""
    names = ", ".join(map(str, paths))
    note(f"reading {names}")
    turns = 0

    def found() -> Iterator[Dialog]:
        nonlocal turns
        for dialog in (dialog for path in paths for dialog in dialogs.read(path)):
            turns += len(dialog.turns)
            yield dialog

    try:
        rows, dropped = of_dialogs(found(), tokenizer, config.loss, config.length)
    except Unusable as error:
        raise ValueError(f"{dialogs.place(paths, error.number)}: {error.reason}") from None
    if not len(rows) and not dropped:
        raise ValueError(f"{names}: there is no conversation")
    if not len(rows):
        raise ValueError(
            f"{names}: of {dropped} conversations not one has a first turn within --length {config.length}"
        )
    kept = int((rows.ids == tokenizer.marker("<eom>")[0]).sum())
    note(
        f"{len(rows):,} conversations of {kept:,} turns; {turns - kept:,} turns dropped, which do not fit "
        f"{config.length} tokens, with {dropped:,} conversations whose first turn is one of them"
    )
    return Packed(rows, config.length, config.seed, tokenizer.pad)


def sections(rows: Rows, tokenizer: Tokenizer) -> Table:
    """What is learnt, section by section."""
    table = Table(title="learnt tokens")
    for column in ("section", "tokens", "learnt", "share of the loss"):
        table.add_column(column, justify="left" if column == "section" else "right")
    counts = by_section(rows, tokenizer)
    whole = sum(learnt for _, learnt in counts.values())
    for name, (tokens, learnt) in counts.items():
        table.add_row(name, f"{tokens:,}", f"{learnt:,}", f"{learnt / whole:.1%}")
    return table
