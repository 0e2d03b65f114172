"""What every evaluation of a model has in common: its settings, rows that outlive a crash, figures with intervals.

    class Task:                                       # of one file and one line in `moss/__main__.py`
        name = "mmlu"
        def template(self, who): …                    # all that rows depend on besides items and model
        def measure(self, who, kept): …               # the rows of all items; `kept` has those of before
        def values(self, rows): …                     # {"accuracy": (one number an item, weights or None), …}
    return run(config, Task())

Rows stand in `--out`/TASK/MODEL-KEY/rows.jsonl, one JSON object an item, written as they come; KEY is made of the
weights, their config, the tokenizer, the kind of arithmetic, the task and its template. So the same question is not
asked twice of the same model, and is never answered from another's rows; and what one row is made of, the ids of its
prompt among it, has a hash in the row: where an item has changed, it is measured anew. The figures stand beside, in
result.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import numpy as np
from rich.console import Console
from rich.table import Table

from moss.chat import META_INSTRUCTION, SWITCHES, Dialog, Turn
from moss.checkpoint import lock
from moss.engine.remote import RemoteEngine
from moss.errors import UsageError
from moss.evals.likelihood import Continuation, likelihoods
from moss.evals.stats import Figure, difference, mean
from moss.files import replacing, sha256
from moss.log import note
from moss.model import Decoder
from moss.peft import CONFIG, base_folder, tokenizer_of, weights_sha256
from moss.resolve import Device, Dtype, dtype_of, load, locate, on_server, quality
from moss.tokenizer import Tokenizer
from moss.tools.chat_server import ChatServer, connect

Style = Literal["auto", "chat", "plain"]

CONFIGS = ("config.json", CONFIG)
SERVED = 8  # continuations that a server scores at a time
WIDTH = 120  # of tables where no terminal says how wide it is


@dataclass(frozen=True)
class Evaluation:
    """Settings of every evaluation."""

    model: str | None = None  # folder of a model, or http://host:port/v1#name; the bundled one if left out
    against: str | None = None  # a second model, measured on the same items; differences come in pairs
    tokenizer: Path | None = None  # of a model on a server: then it completes our ids, and may tell their probabilities
    limit: int = 0  # items at most, the first of each part; 0 = all
    out: Path = Path("runs/evals")  # folder for rows and results; what stands there is not measured again
    device: Device = "auto"  # where the model runs; auto takes the GPU where there is one and it gains
    dtype: Dtype = "auto"  # format of the weights; auto takes what fits this machine and the model's size
    json: bool = False  # print the result as one JSON object


# ---------------------------------------------------------------- who is measured


@dataclass(frozen=True)
class Subject:
    """A model that is measured: in memory, on a server that completes ids, or on one that chats."""

    name: str  # as shown
    print: str  # of weights, tokenizer and arithmetic, or of an address: another model has another
    tok: Tokenizer | None  # None of a chat server
    model: Decoder | None = None
    server: RemoteEngine | ChatServer | None = None
    quality: int | None = None  # the tag that opens its replies

    @property
    def chats(self) -> bool:
        """Whether it knows the format of conversations."""
        return self.tok is None or self.tok.has_markers

    @property
    def tokens(self) -> Tokenizer:
        """The tokenizer, of which likelihoods are told; UsageError of a chat server, which tells none."""
        if self.tok is None:
            raise UsageError(f"{self.name} is a chat server and tells no probabilities; give its --tokenizer")
        return self.tok

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its answer, as far as is known."""
        if self.model is not None:
            return self.model.config.max_length
        return self.server.max_length - 1 if isinstance(self.server, RemoteEngine) else sys.maxsize

    def likelihoods(self, asked: Sequence[Continuation]) -> list[float]:
        """The log-probability of each answer; EngineError of a server that does not score prompts."""
        if self.model is not None:
            return likelihoods(self.model, asked)
        assert isinstance(self.server, RemoteEngine), "a chat server has no ids"
        score = self.server.score
        with ThreadPoolExecutor(SERVED) as pool:
            return list(pool.map(lambda each: sum(score([*each.prompt, *each.answer])[-len(each.answer) :]), asked))


def chats(style: Style, who: Subject) -> bool:
    """Whether a model is asked in conversations."""
    if style == "plain" and who.tok is None:
        raise UsageError(f"--style plain: {who.name} is a chat server, which reads conversations alone")
    if style == "chat" and not who.chats:
        raise UsageError(f"--style chat: {who.name} does not know the format of conversations; take --style plain")
    return who.chats if style == "auto" else style == "chat"


def silent(turns: list[Turn]) -> Dialog:
    """A conversation in which nothing is switched on, neither thoughts nor tools."""
    return Dialog(META_INSTRUCTION, dict.fromkeys(("thoughts", *SWITCHES), False), turns)


@contextmanager
def subject(model: str | None, config: Evaluation) -> Iterator[Subject]:
    """The model in a folder (None: the bundled one), of chats or of plain text, or at an address; a server is let go of
    in the end."""
    if model is not None and on_server(model):
        server, tok = connect(model, config.tokenizer, chat=False)
        told = f"{server.url} {server.name} {tok.sha256 if tok else ''}"
        with server:
            yield Subject(server.name, hashlib.sha256(told.encode()).hexdigest(), tok, server=server)
        return
    where = locate(model)
    decoder, tok = load(model, chat=False, dtype=config.dtype, device=config.device)
    kind = f"{dtype_of(decoder)} {decoder.embed.weight.device.type}"
    told = "".join((weights_sha256(where), tokenizer_of(where).sha256, kind, *map(sha256, configs(where))))
    yield Subject(named(model), hashlib.sha256(told.encode()).hexdigest(), tok, decoder, quality=quality(model))


def configs(folder: Path) -> list[Path]:
    """The files that say what is computed with the weights of a model, or of an adapter and its base."""
    folders = dict.fromkeys((folder, base_folder(folder)))
    return [file for name in CONFIGS for each in folders if (file := each / name).is_file()]


def named(folder: str | None) -> str:
    """A short name for a model: the last parts of its path that say something."""
    if folder is None:
        return "moss-nano"
    parts = [part for part in Path(folder).resolve().parts if part not in ("/", "model")]
    return "-".join(parts[-2:] if parts[-1].startswith(("step-", "adapter")) else parts[-1:])


# ---------------------------------------------------------------- rows


@dataclass
class Kept:
    """The rows of a task and a model: those of before by id, and a file for those to come."""

    folder: Path
    rows: dict[str, dict[str, Any]]  # by id, those that were asked for last
    file: TextIO = field(repr=False)
    known: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # all, by id and what they are made of

    def add(self, row: dict[str, Any], lasting: bool = True) -> None:
        """Keep a row; it is in the file when this returns, but where it stands for an answer that did not come: then it
        counts now, and the next run asks again."""
        self.rows[row["id"]] = row
        if not lasting:
            return
        self.known[row["id"], row["made_of"]] = row
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()

    def have(self, id: str, made_of: str) -> bool:
        """Whether a row of this id is there that was made of the same; then it is the one in `rows`."""
        row = self.known.get((id, made_of))
        if row is not None:
            self.rows[id] = row
        return row is not None

    def missing(self, ids: Sequence[str], made_of: Sequence[str]) -> list[int]:
        """The numbers of those items that are to be measured."""
        return [at for at, (id, mine) in enumerate(zip(ids, made_of, strict=True)) if not self.have(id, mine)]


@contextmanager
def measured(config: Evaluation, task: str, who: Subject, template: Mapping[str, Any]) -> Iterator[Kept]:
    """The rows of a task and a model, held for this process; `template` says all that rows depend on besides items."""
    key = hashlib.sha256(json.dumps([task, template, who.print], sort_keys=True).encode()).hexdigest()
    folder = config.out / task / f"{who.name}-{key[:12]}"
    with lock(folder):
        path = folder / "rows.jsonl"
        rows = stored(path)
        if rows:
            note(f"{len(rows):,} rows stand in {path}")
        with path.open("a", encoding="utf-8") as file:
            yield Kept(folder, by_id(rows), file, {(row["id"], row["made_of"]): row for row in rows})


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows in a file by id, a later one in place of an earlier."""
    return by_id(stored(path))


def by_id(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last row of each id."""
    return {row["id"]: row for row in rows}


def stored(path: Path) -> list[dict[str, Any]]:
    """The rows in a file, those of other sets among them; a line that broke off, and what follows, is cut."""
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    whole = 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if not (isinstance(row["id"], str) and isinstance(row["made_of"], str)):
                    break
                found.append(row)
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
    if whole < path.stat().st_size:
        note(f"{path}: what follows byte {whole:,} broke off and is measured anew")
        with path.open("rb+") as file:
            file.truncate(whole)
    return found


def made_of(*parts: Any) -> str:
    """A hash of what a row is made of: ids, choices, settings of one item."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- results

Results = tuple[list[dict[str, Any]], dict[str, Any]]  # of each model, and of two the differences of their figures
Values = tuple[Sequence[float | None] | np.ndarray, Sequence[float] | np.ndarray | None]


class Task(Protocol):
    """What a task adds to a run."""

    @property
    def name(self) -> str: ...

    def template(self, who: Subject) -> Mapping[str, Any]:
        """All that a row depends on besides its item and the model: plain values."""
        ...

    def measure(self, who: Subject, kept: Kept) -> list[dict[str, Any]]:
        """The rows of all items in their order, those that are not `kept` yet measured and kept."""
        ...

    def values(self, rows: Sequence[dict[str, Any]]) -> dict[str, Values]:
        """Of each figure one number an item (None: it counts for nothing), and weights (a ratio of sums) or None;
        "  law" is a part."""
        ...

    def notes(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """What a reader of the figures must know: what was left out, cut or guessed."""
        ...


def run(config: Evaluation, task: Task) -> int:
    """Measure one model, or two on the same items; the table on standard output, or JSON with `--json`."""
    show(config, *results(config, task))
    return 0


def results(config: Evaluation, task: Task) -> Results:
    """What result.json holds of each model, and of two the differences of their figures."""
    told = [_measure(config, task, model) for model in checked(config)]
    apart: dict[str, Any] = {}
    if len(told) == 2:
        (_, ours), (_, theirs) = told
        shared = [name for name in ours if name in theirs and _pairs(ours[name], theirs[name])]
        apart = {name: figure(ours[name], theirs[name])._asdict() for name in shared}
    return [each for each, _ in told], apart


def checked(config: Evaluation) -> list[str | None]:
    """The models that are measured; UsageError for settings that fit none of them."""
    if config.limit < 0:
        raise UsageError(f"--limit is {config.limit}; give a number of items, or 0 for all")
    models = [config.model] if config.against is None else [config.model, config.against]
    if config.tokenizer is not None and not any(model and on_server(model) for model in models):
        raise UsageError("--tokenizer is for a model on a server; a folder has its own")
    return models


def _measure(config: Evaluation, task: Task, model: str | None) -> tuple[dict[str, Any], dict[str, Values]]:
    """The result of one model and its values; the model is gone when this returns, for another needs the room."""
    with subject(model, config) as who, measured(config, task.name, who, task.template(who)) as kept:
        rows = task.measure(who, kept)
        values = {name: each for name, each in task.values(rows).items() if _pairs(each, each)}
        if not values:
            raise ValueError(f"{task.name}: nothing was measured; {'; '.join(task.notes(rows))}")
        figures = {name: figure(each) for name, each in values.items()}
        return result(kept, task.name, who.name, task.template(who), figures, task.notes(rows)), values


def unanswered(failed: Sequence[str]) -> list[str]:
    """What to say of items that a server did not answer; "" is one that it did."""
    why = [each for each in failed if each]
    if not why:
        return []
    return [f"{len(why):,} of {len(failed):,} were not answered and count for nothing; the first: {why[0]}"]


def figure(mine: Values, others: Values | None = None) -> Figure:
    """The mean of values, or by how much it exceeds that of others, over the items of which there are values."""
    there = _pairs(mine, others or mine)
    weights = None if mine[1] is None else np.asarray(mine[1])[there]
    picked = [np.array([column[at] for at in there], np.float64) for column, _ in filter(None, (mine, others))]
    return mean(picked[0], weights) if others is None else difference(picked[0], picked[1], weights)


def _pairs(mine: Values, others: Values) -> list[int]:
    """The numbers of the items of which both have values."""
    return [at for at, (a, b) in enumerate(zip(mine[0], others[0], strict=True)) if a is not None and b is not None]


def result(
    kept: Kept,
    task: str,
    name: str,
    settings: Mapping[str, Any],
    figures: Mapping[str, Figure],
    notes: Sequence[str],
) -> dict[str, Any]:
    """What stands in result.json beside the rows."""
    told = {
        "task": task,
        "model": name,
        "settings": dict(settings),
        "figures": {name: figure._asdict() for name, figure in figures.items()},
        "notes": list(notes),
        "rows": str(kept.folder / "rows.jsonl"),
    }
    with replacing(kept.folder / "result.json") as beside:
        beside.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return told


def show(config: Evaluation, told: Sequence[Mapping[str, Any]], apart: Mapping[str, Any]) -> None:
    """A table of the figures, a column a model, and what there is to know of them; or all as JSON."""
    if config.json:
        print(json.dumps(told[0] if len(told) == 1 else {"models": told, "difference": apart}, ensure_ascii=False))
        return
    screen = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDTH)
    table = Table(title=f"{told[0]['task']}, with 95 % intervals", title_justify="left", header_style="bold")
    table.add_column("")
    for each in told:
        table.add_column(each["model"], justify="right")
    if apart:
        table.add_column("difference", justify="right")
    table.add_column("items", justify="right")
    for name in dict.fromkeys(name for each in told for name in each["figures"]):
        own = [each["figures"].get(name) for each in told]
        cells = ["" if each is None else cell(each) for each in (*own, *([apart.get(name)] if apart else ()))]
        table.add_row(name, *cells, f"{next(each['n'] for each in own if each):,}")
    screen.print(table)
    for each in told:
        for line in each["notes"]:
            note(f"{each['model']}: {line}")
        note(f"rows: {each['rows']}")


def cell(figure: Mapping[str, float]) -> str:
    """`0.612 (0.580 to 0.644)`."""
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
