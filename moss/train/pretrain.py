"""`moss train pretrain`: a language model from plain text.

    moss train tokenizer --data text.jsonl --vocab-size 2048 --out runs/mine/tokenizer
    moss train pretrain --data text.jsonl --model runs/mine/tokenizer --depth 5 --steps 1000 --out runs/mine/base

Documents end in `<|endoftext|>`, every token but the first of each is learnt, and packed documents do not see each
other. `--depth` is the one dial of a new model's size. Matrices are trained by Muon, everything else by AdamW, with
a warm-up, a flat middle and a linear decay to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moss.data.pack import Packed
from moss.data.rows import data_files, documents, of_documents
from moss.log import note
from moss.model import Decoder, ModelConfig
from moss.resolve import locate
from moss.tokenizer import Tokenizer
from moss.train import launch
from moss.train.loss import next_token

LENGTH = 1024  # tokens that a new model can attend to, at least
MATERIAL = 10_000  # documents of the scripted teacher where no --data is given


@dataclass(frozen=True)
class Pretrain(launch.Settings):
    """Train a language model from plain text."""

    out: Path = Path("runs/pretrain")  # folder of the run: log.jsonl, step-N checkpoints, at the end the model
    model: Path | None = (
        None  # folder to start from: a model, or a tokenizer for a new one (none: the bundled one's)
    )
    depth: int = 4  # of a new model: layers; width is 64 times as much


def main(config: Pretrain) -> int:
    """Tokenise, make or load the model, train."""
    launch.check(config)
    given, held_out = data_files(config.data, "--data"), data_files(config.valid, "--valid")
    with launch.opened(config) as (start, stop):
        folder = start or config.model
        if folder and (folder / "config.json").is_file():
            tokenizer, model = launch.load(config, start, config.model, chat=False)
        else:
            tokenizer = Tokenizer.load(folder or locate(None))
            made = ModelConfig.from_depth(config.depth, tokenizer.vocab_size, max_length=max(LENGTH, config.length))
            model = Decoder(made)
            model.init_weights(config.seed)
        data = read(given or launch.material(config, "text", MATERIAL), tokenizer, config)
        validate = launch.mean_loss(read(held_out, tokenizer, config), next_token, config) if held_out else None
        note(f"{len(data.rows.ids):,} tokens in {len(data.rows):,} pieces of up to {config.length}")
        return launch.train(
            "pretrain", config, model, tokenizer, data, next_token, start=start, stop=stop, validate=validate
        )


def read(paths: list[Path], tokenizer: Tokenizer, config: Pretrain) -> Packed:
    """Documents as packed rows."""
    note(f"reading {', '.join(map(str, paths))}")
    rows = of_documents(documents(paths), tokenizer, config.length)
    if not len(rows):
        raise ValueError(f"there is no text in {', '.join(map(str, paths))}")
    return Packed(rows, config.length, config.seed, tokenizer.pad)
