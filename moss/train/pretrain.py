"""`moss train pretrain`: a language model from plain text, new or going on from a base, in one language or several.

    moss train tokenizer --data text.jsonl --vocab-size 2048 --out runs/mine/tokenizer
    moss train pretrain --data text.jsonl --model runs/mine/tokenizer --depth 5 --steps 1000 --out runs/mine/base

A new model has one dial, `--depth`; its matrices are trained by Muon, everything else by AdamW, with a warm-up, a flat
middle and a linear decay to zero. A model that goes on from a base takes the paper's settings instead (section 3: Adam
0.9/0.95, peak 3e-5, cosine to 3e-6, 2 % warm-up, weight decay 0.1) and says so. The paper's run, for which a cluster
is needed, adds its batch of 2.6M tokens and its mixture:

    moss train tokenizer --extend codegen-16B-mono --data zh.jsonl --vocab-size 107000 --out runs/full/tokenizer
    torchrun … -m moss train pretrain --model runs/full/tokenizer --length 2048 --batch-tokens 2621440 \\
      --data en=pile/:57.1 code=bigquery/:17.6 python=bigpython/:10.6 baike=baike.jsonl:0.7 zh=web/:14.1 \\
      --valid en=pile_valid.jsonl code=code_valid.jsonl zh=web_valid.jsonl

The text is tokenised once, by all cores, into `OUT/tokens` (`data/tokens.py`), and drawn in the given shares
(`data/mix.py`). Every token is learnt, the first of a document too, and documents do not see each other.

Gradual unfreezing: where the tokenizer has been extended (`moss/extend.py`), the base grows a row for each new id, and
at first (a tenth of the steps) these alone learn; then the outer layers with them (up to three tenths), a quarter at
either end; then everything. The paper says no more than that it did so.

Validation is in bits per byte of each source, which tokenizers do not change, and going on from a base also in how much
of that was lost against the base itself: its forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from moss import checkpoint, dist, peft
from moss.config import option
from moss.data import mix
from moss.data.tokens import INDEX, Tokens, prepare
from moss.errors import UsageError
from moss.files import json_object
from moss.log import console, note
from moss.model import Decoder, ModelConfig
from moss.resolve import locate
from moss.tokenizer import Tokenizer
from moss.train import launch, machine
from moss.train.loss import next_token
from moss.train.settings import Settings, check
from moss.train.tokenizer import EXTENDS

LENGTH = 1024  # tokens that a new model can attend to, at least
MATERIAL = 10_000  # documents of the scripted teacher where no --data is given
SHARES = (0.1, 0.3)  # of the steps, up to which new rows, and then outer layers with them, learn alone
OUTER = 4  # the outer layers are a quarter of all at either end
# What settings that are not given are: for a new model, and for one that goes on from a base as the paper did.
NEW = {"lr": 3e-3, "matrix_lr": 0.02, "weight_decay": 0.0, "warmup": 20.0, "schedule": "linear"}
PAPER = {"lr": 3e-5, "matrix_lr": 0.0, "weight_decay": 0.1, "warmup": 0.02, "schedule": "cosine"}


@dataclass(frozen=True)
class Pretrain(Settings):
    """Train a language model from plain text."""

    # files, folders of them or of shards, with NAME=PATH:SHARE as a mixture, en=pile.jsonl:57.1 zh=web/:14.1; none =
    # material of the scripted teacher.
    data: list[Path] = option(list)
    valid: list[Path] = option(list)  # NAME=PATH, never trained on: bits per byte along the way, and the base's before
    out: Path = Path("runs/pretrain")  # folder of the run: log.jsonl, step-N checkpoints, at the end the model
    model: Path | None = None  # folder to start from: a model, an extended tokenizer, or any (none: the bundled one's)
    depth: int = 4  # of a new model: layers; width is 64 times as much
    # shares of the steps up to which only new rows, then these and the outer layers learn; none = 0.1 0.3 where the
    # tokenizer was extended, 0 0 = everything at once
    unfreeze: list[float] = option(list)
    # AdamW, for embeddings, head and norms (and for matrices without Muon); none = 3e-3, going on from a model 3e-5
    lr: float | None = None
    matrix_lr: float | None = None  # Muon, for the matrices of the blocks; 0 = AdamW; none = 0.02, going on 0
    weight_decay: float | None = None  # on matrices; none = 0, going on 0.1
    warmup: float | None = None  # steps of linear warm-up, below 1 a share of all; none = 20, going on 0.02
    # of the rate: linear to 0 over the second half, or cosine to 1/10; none = linear, going on cosine
    schedule: Literal["linear", "cosine", "constant"] | None = None


def main(config: Pretrain) -> int:
    """Tokenise, make, load or grow the model, train."""
    sources, held_out = mix.parse(config.data, "--data"), mix.parse(config.valid, "--valid")
    base = base_of(config.model)
    settings = completed(config, PAPER if base else NEW)
    check(settings)
    check_shares(settings)
    with launch.opened(replace(settings, model=base or settings.model)) as (start, stop):
        told = checkpoint.read_info(start) if start else {}
        settings = completed(config, told.get("run", PAPER if base else NEW))
        tokenizer, model, before = begin(settings, start, told, base, held_out)
        if before:
            settings = replace(settings, model=Path(before["folder"]))  # whose weights an adapter is for
        if not sources:
            sources = [mix.Source(mix.PLAIN, launch.material(settings, "text", MATERIAL))]
        rows = {source.name: read(source, tokenizer, settings) for source in sources}
        data = rows[sources[0].name]
        if len(rows) > 1:
            data = mix.Mixture(rows, {source.name: source.share for source in sources if source.share is not None})
            console.print(mixture(data, settings))
        checks = {source.name: read(source, tokenizer, settings, "valid-") for source in held_out}
        known = before.get("bits_per_byte", {})
        watch = Watch(checks, known, settings) if checks else None
        code = launch.train(
            "pretrain",
            settings,
            model,
            tokenizer,
            data,
            next_token,
            start=start,
            stop=stop,
            validate=watch,
            freeze=None if settings.lora else freezer(model, before.get("ids", 0), settings.unfreeze),
            extra={"base": before} if before else None,
        )
        if watch and watch.now:
            console.print(watch.table())
        return code


def base_of(folder: Path | None) -> Path | None:
    """The model that a run from this folder goes on from: the folder's own, or that of the base of its tokenizer."""
    if folder is None or (folder / "config.json").is_file() or peft.is_adapter(folder):
        return folder
    file = folder / EXTENDS
    if not file.is_file():
        return None
    base = Path(str(json_object(file).get("base")))
    if not base.is_dir():
        raise ValueError(f"{file} names the base {base}, which is not there; write down where it is now")
    return base if (base / "config.json").is_file() else None


def completed(config: Pretrain, values: Mapping[str, Any]) -> Pretrain:
    """The settings with those that were not given taken from `values`."""
    return replace(config, **{name: values[name] for name in NEW if getattr(config, name) is None})


def begin(
    config: Pretrain, start: Path | None, told: Mapping[str, Any], base: Path | None, held_out: Sequence[mix.Source]
) -> tuple[Tokenizer, Decoder, dict[str, Any]]:
    """Tokenizer, model, and what is known of the base before training: its ids, and its bits per byte of `held_out`."""
    known: dict[str, Any] = told.get("base", {})
    if start:
        base = base or (Path(known["folder"]) if known else start)
        extended = Tokenizer.load(start)
        return *launch.load(config, start, base, chat=False, extended=extended), known
    if not base:
        if config.lora:
            raise UsageError("--lora trains adapters on a model that is there; give it as --model, or leave --lora out")
        tokenizer = Tokenizer.load(config.model or locate(None))
        made = ModelConfig.from_depth(config.depth, tokenizer.vocab_size, max_length=max(LENGTH, config.length))
        model = Decoder(made)
        model.init_weights(config.seed)
        launch.check_fit(tokenizer, model, config.length)
        return tokenizer, model, {}
    note(f"going on from {base}: " + ", ".join(f"{name} {getattr(config, name)}" for name in PAPER))
    known = {"folder": str(base), "bits_per_byte": figures_of(base, held_out, config)}
    old, extended = Tokenizer.load(base), Tokenizer.load(config.model or base)
    if extended.sha256 != old.sha256:
        known["ids"] = old.vocab_size
    return *launch.load(config, None, base, chat=False, extended=extended), known


def figures_of(base: Path, held_out: Sequence[mix.Source], config: Pretrain) -> dict[str, float]:
    """The bits per byte of the base itself, with its own tokenizer; of sources that are text, or its own tokens."""
    if not held_out:
        note("no --valid: nothing will tell what is learnt of each language, and what is forgotten")
        return {}
    tokenizer, model = launch.load(config, None, base, chat=False)
    texts = [source for source in held_out if not source.tokens or fits(source.tokens, tokenizer)]
    if others := ", ".join(source.name for source in held_out if source not in texts):
        note(f"--valid {others}: tokens that the base does not read; give text, or what is forgotten will not be told")
    if not texts:
        return {}
    device = torch.device(machine.pick_device(config.device))
    net = launch.place(model, device, machine.pick_dtype(config.dtype, device))
    rows = {source.name: read(source, tokenizer, config, "base-") for source in texts}
    figures = Watch(rows, {}, config).bits_per_byte(net)
    note("the base: " + ", ".join(f"{name} {value:.4f} bits per byte" for name, value in figures.items()))
    return figures


def fits(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a folder of shards was made with this tokenizer."""
    return json_object(folder / INDEX).get("tokenizer_sha256") == tokenizer.sha256


def read(source: mix.Source, tokenizer: Tokenizer, config: Pretrain, prefix: str = "") -> mix.TokenRows:
    """A source as packed rows, tokenised into the run's folder or read from where it was tokenised before."""
    if source.tokens:
        tokens = Tokens.open(source.tokens, tokenizer)
    else:
        folder = config.out / "tokens" / (prefix + source.name)
        tokens = prepare(source.files, tokenizer, folder, anew=not config.resume)  # no run has read what is there
    return mix.TokenRows(tokens, config.length, config.seed)


def mixture(data: mix.Mixture, config: Pretrain) -> Table:
    """What is drawn from where, and how often this run goes through it."""
    rows = config.batch_tokens // config.length
    epochs = data.epochs(config.steps * rows or math.ceil(config.epochs * len(data)))
    table = Table(title="mixture")
    for column in ("source", "documents", "tokens", "share", "passes"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for (name, source), share in zip(data.sources.items(), data.shares):
        tokens = source.tokens
        numbers = f"{tokens.num_documents:,}", f"{tokens.num_tokens:,}"
        table.add_row(name, *numbers, f"{share:.1%}", f"{epochs[name]:.2f}")
    return table


# ---------------------------------------------------------------- bits per byte


def per_byte(nats: float, num_bytes: int) -> float:
    """Bits per byte of text whose tokens, the ends of documents included, have this summed cross-entropy."""
    return nats / (math.log(2) * num_bytes)


class Watch:
    """Validation: `watch(net)` gives bits per byte of each source, and what the base did better (its forgetting)."""

    def __init__(self, rows: Mapping[str, mix.TokenRows], base: Mapping[str, float], config: Pretrain) -> None:
        self.rows, self.base, self.now = rows, base, dict[str, float]()
        self._means = {name: launch.mean_loss(part, next_token, config) for name, part in rows.items()}

    def bits_per_byte(self, net: nn.Module) -> dict[str, float]:
        """Of every source; each of its tokens is a target once."""
        tokens = {name: part.tokens for name, part in self.rows.items()}
        sums = {name: mean(net)["loss"] * tokens[name].num_tokens for name, mean in self._means.items()}
        return {name: per_byte(nats, tokens[name].text_bytes) for name, nats in sums.items()}

    def __call__(self, net: nn.Module) -> dict[str, float]:
        self.now = self.bits_per_byte(net)
        figures = {f"bits_per_byte_{name}": value for name, value in self.now.items()}
        known = {name: value for name, value in self.base.items() if name in self.now}  # --valid may change
        return figures | {f"forgetting_{name}": self.now[name] - value for name, value in known.items()}

    def table(self) -> Table:
        """The last figures, beside the base's."""
        table = Table(title="bits per byte")
        for column in ("source", "base", "now", "forgetting"):
            table.add_column(column, justify="left" if column == "source" else "right")
        for name, value in self.now.items():
            before = self.base.get(name)
            cells = (
                ("", f"{value:.4f}", "")
                if before is None
                else (f"{before:.4f}", f"{value:.4f}", f"{value - before:+.4f}")
            )
            table.add_row(name, *cells)
        return table


# ---------------------------------------------------------------- gradual unfreezing


class Trainable(NamedTuple):
    """What learns in a step, besides the rows of new ids."""

    rest: bool  # the rows of old ids, and the last norm
    blocks: frozenset[int]


def trainable(step: int, steps: int, num_layers: int, shares: Sequence[float]) -> Trainable:
    """Up to shares[0] of the steps new rows alone; up to shares[1] the outer layers too; then everything."""
    if step < shares[0] * steps:
        return Trainable(False, frozenset())
    if step < shares[1] * steps:
        many = math.ceil(num_layers / OUTER)
        return Trainable(False, frozenset([*range(many), *range(num_layers - many, num_layers)]))
    return Trainable(True, frozenset(range(num_layers)))


def check_shares(config: Pretrain) -> None:
    """Refuse what cannot be the two borders of three phases, and phases of what adapters keep frozen for good."""
    shares = config.unfreeze
    if shares and not (len(shares) == 2 and 0 <= shares[0] <= shares[1] <= 1):
        given = " ".join(map(str, shares))
        raise UsageError(f"--unfreeze {given}: give two shares of the steps, the second not below the first: 0.1 0.3")
    if shares and config.lora:
        raise UsageError("--unfreeze with --lora: the base stays frozen, adapters and new rows learn from the start")


def freezer(model: Decoder, old_ids: int, given: Sequence[float]) -> Callable[[int, int], None] | None:
    """What takes the gradients of all that does not learn in a step; None where everything always learns.

    Rows below `old_ids` of embedding, head and its bias get a gradient of zero, and so keep every bit: Adam's step for
    them is 0, and tables have no weight decay. Whole parameters lose theirs, and no optimizer touches them.
    """
    shares = tuple(given) or (SHARES if old_ids else (0.0, 0.0))
    if not shares[1]:
        return None

    def freeze(step: int, steps: int) -> None:
        now = trainable(step, steps, model.config.num_layers, shares)
        for name, parameter in model.named_parameters():
            part, _, rest = name.partition(".")
            if parameter.grad is None or now.rest:
                continue
            if part in ("embed", "head"):
                own_rows(parameter.grad)[: max(0, old_ids - first_row(parameter.grad))] = 0
            elif part != "blocks" or int(rest.partition(".")[0]) not in now.blocks:
                parameter.grad = None

    return freeze


def own_rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor: all of them, where it is not cut."""
    return tensor.to_local() if dist.is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def first_row(tensor: Tensor) -> int:
    """The number of the first of this rank's rows (`dist.spread` says how they are cut)."""
    return dist.rank() * -(-len(tensor) // dist.world()) if dist.is_sharded(tensor) else 0
