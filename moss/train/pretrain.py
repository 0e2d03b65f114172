"""`moss train pretrain`: a language model from plain text.

    moss train tokenizer --data text.jsonl --vocab-size 2048 --out runs/mine/tokenizer
    moss train pretrain --data text.jsonl --tokenizer runs/mine/tokenizer --depth 5 --steps 1000 --out runs/mine/base

Documents end in `<|endoftext|>`, every token but the first of each is learnt, and packed documents do not see each
other. `--depth` is the one dial of a new model's size. Matrices are trained by Muon, everything else by AdamW, with
a warm-up, a flat middle and a linear decay to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moss.data.pack import Packed
from moss.data.rows import check_files, documents, of_documents
from moss.log import note
from moss.model import Decoder, ModelConfig
from moss.tokenizer import Tokenizer
from moss.train import launch
from moss.train.loss import next_token
from moss.weights import load_model


@dataclass(frozen=True)
class Pretrain(launch.Settings):
    """Train a language model from plain text."""

    out: Path = Path("runs/pretrain")  # folder of the run: log.jsonl, step-N checkpoints, at the end the model
    tokenizer: Path = Path("runs/tokenizer")  # folder with tokenizer.json
    depth: int = 4  # of a new model: layers; width is 64 times as much
    max_length: int = 1024  # tokens that the new model can attend to
    model: Path | None = None  # start from these weights and their tokenizer instead of a new model


def main(config: Pretrain) -> int:
    """Tokenise, make or load the model, train."""
    launch.check(config)
    check_files(config.data, "--data")
    if config.valid:
        check_files(config.valid, "--valid")
    with launch.opened(config) as (start, stop):
        source = start or config.model
        tokenizer = Tokenizer.load(source or config.tokenizer)
        if source:
            model = load_model(source)
        else:
            made = ModelConfig.from_depth(config.depth, tokenizer.vocab_size, max_length=config.max_length)
            model = Decoder(made)
            model.init_weights(config.seed)
        launch.check_fit(tokenizer, model, config.length, source)
        note(f"reading {', '.join(map(str, config.data))}")
        data = read(config.data, tokenizer, config)
        valid = read(config.valid, tokenizer, config) if config.valid else None
        note(f"{len(data.rows.ids):,} tokens in {len(data.rows):,} pieces of up to {config.length}")
        return launch.train("pretrain", config, model, tokenizer, data, next_token, start=start, stop=stop, valid=valid)


def read(paths: list[Path], tokenizer: Tokenizer, config: Pretrain) -> Packed:
    """Documents as packed rows."""
    rows = of_documents(documents(paths), tokenizer, config.length)
    if not len(rows):
        raise ValueError(f"there is no text in {', '.join(map(str, paths))}")
    return Packed(rows, config.length, config.seed, tokenizer.pad)
