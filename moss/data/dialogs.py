"""Conversations in files: read, recognise, turn into one another, look at.

Three row formats are read and written, one JSON object a line (or a JSON array of them):
- `moss`: the released MOSS JSON (`meta_instruction`, `chat.turn_N.{Human, Inner Thoughts, Commands, Tool Responses,
  MOSS}` with markers inside the texts); rounds after the first stand in keys with the suffix ` 2`, ` 3`, ` 4`;
- `openai` and `sharegpt`: see `moss/data/messages.py`.

What a target cannot say goes into a side field of the row, and only that, so that our own and the released rows lose
nothing. All three go through `chat.Dialog`, whose `extra` carries a row's other fields (id, category) along. Rows of
other projects may hold what has no place there (ids of calls, fields of single messages); `convert` counts them.

    moss data convert sft.jsonl --to openai -o openai.jsonl
    moss data show openai.jsonl --start 10 --count 1
"""

from __future__ import annotations

import json
import re
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.text import Text

from moss.chat import (
    CAPABILITIES,
    EDGE,
    NONE,
    QUALITIES,
    SECTIONS,
    SWITCHES,
    Dialog,
    Round,
    Turn,
    edge_whitespace,
    instruction,
    render,
)
from moss.config import option
from moss.data.messages import Row, from_openai, from_sharegpt, joined, suffix, text_of, to_openai, to_sharegpt
from moss.errors import UsageError, plain
from moss.files import replacing
from moss.tokenizer import Tokenizer, add_markers
from moss.tokenizer import load as load_tokenizer

Format = Literal["moss", "openai", "sharegpt"]
_ROUND_SECTIONS = ("thoughts", "commands", "results")
_KEYS = {
    "human": "Human",
    "thoughts": "Inner Thoughts",
    "commands": "Commands",
    "results": "Tool Responses",
    "reply": "MOSS",
}
_SECTION_OF_KEY = {key: section for section, key in _KEYS.items()}


# -- files -----------------------------------------------------------------------------------------------------------


def detect(row: Any) -> Format:
    """Which of the three formats a row is in."""
    for key, name in (("chat", "moss"), ("messages", "openai"), ("conversations", "sharegpt")):
        if isinstance(row, dict) and key in row:
            return name  # type: ignore[return-value]
    raise ValueError("a row must be a JSON object with chat (MOSS), messages (OpenAI) or conversations (ShareGPT)")


def from_row(row: Any) -> Dialog:
    """The conversation of a row in any of the three formats."""
    return {"moss": from_moss, "openai": from_openai, "sharegpt": from_sharegpt}[detect(row)](row)


def to_row(dialog: Dialog, to: Format) -> Row:
    """The row of a conversation in the format `to`."""
    return {"moss": to_moss, "openai": to_openai, "sharegpt": to_sharegpt}[to](dialog)


def read(path: str | Path) -> Iterator[Dialog]:
    """Every conversation of a file; a broken row is a ValueError that names file and line."""
    for place, row in read_rows(path):
        try:
            yield from_row(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def place(paths: Sequence[str | Path], number: int) -> str:
    """Where the conversation of this number, counted from 1 through all files, stands."""
    places = (where for path in paths for where, _ in read_rows(path))
    return next(islice(places, number - 1, None))


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, JSON value) of every row; `place` is FILE:LINE, or FILE: row N in a JSON array."""
    path = Path(path)
    with path.open("rb") as file:  # not as text, which is decoded in blocks of many lines
        for number, line in enumerate(file, 1):
            if number == 1 and line.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
                rows = _load(_text(line + file.read(), str(path)), str(path))
                yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, 1))
            elif text := _text(line, f"{path}:{number}").strip():
                yield f"{path}:{number}", _load(text, f"{path}:{number}")


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error.reason})") from None


def _load(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # escapes can spell half a surrogate pair, which no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: lone surrogate U+{ord(error.object[error.start]):04X} in a text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    return value


# -- released MOSS JSON ----------------------------------------------------------------------------------------------


def from_moss(row: Row) -> Dialog:
    """A conversation from a row of the released format."""
    chat = row["chat"]
    if not isinstance(chat, dict) or list(chat) != [f"turn_{i}" for i in range(1, len(chat) + 1)] or not chat:
        raise ValueError("chat must hold turn_1, turn_2, … in this order")
    turns = [_moss_turn(turn, name) for name, turn in chat.items()]
    extra = {key: value for key, value in row.items() if key not in ("meta_instruction", "num_turns", "chat")}
    if row.get("num_turns") != len(chat):
        extra["num_turns"] = row.get("num_turns")
    meta, switches, right = _split_meta(text_of(row.get("meta_instruction", ""), "meta_instruction"))
    if right != "\n" and meta:
        turns[0].edges["meta.right"] = right
    return Dialog(meta, switches, turns, extra)


def to_moss(dialog: Dialog) -> Row:
    """A row of the released format."""
    right = dialog.turns[0].edges.get("meta.right") if dialog.turns else None
    meta = instruction(dialog) if right is None or dialog.switches else dialog.meta + right
    extra = dict(dialog.extra)
    row: Row = {"conversation_id": extra.pop("conversation_id")} if "conversation_id" in extra else {}
    row |= {"meta_instruction": meta, "num_turns": extra.pop("num_turns", len(dialog.turns))}
    row["chat"] = {f"turn_{i}": _moss_chat(turn) for i, turn in enumerate(dialog.turns, 1)}
    return joined(row, extra)


def _split_meta(text: str) -> tuple[str, dict[str, bool], str]:
    """(meta instruction, switches, whitespace after it): the first reading that gives exactly `text` again."""
    head, mark, tail = text.rpartition(CAPABILITIES)
    lines = dict(re.findall(r"^- ([^:\n]+): (enabled|disabled)\.", tail, re.MULTILINE)) if mark else {}
    labels = {"thoughts": "Inner thoughts"} | {key: switch.label for key, switch in SWITCHES.items()}
    switches = {key: lines.get(label) == "enabled" for key, label in labels.items()}
    body = text.removesuffix("\n")
    for meta, on in ((head.removesuffix("\n"), switches if mark else {}), (body, {})):
        if instruction(Dialog(meta, on, [])) == text:
            return meta, on, "\n"
    return (body, {}, text[len(body) :]) if body else (text, {}, "")


def _moss_turn(values: Any, name: str) -> Turn:
    if not isinstance(values, dict) or "Human" not in values:
        raise ValueError(f"{name} must be an object with Human")
    turn = Turn("")
    last = 1
    for key in values:
        section, k = _section_of(key)
        if section is None or not 1 <= k <= 9:
            raise ValueError(f"{name} has the unknown key {key!r}")
        last = max(last, k)
    turn.rounds = [Round() for _ in range(last)]
    for k in range(last):
        for section in SECTIONS if k == 0 else _ROUND_SECTIONS:
            key = _KEYS[section] + suffix(k)
            if key in values:
                _read_section(turn, section, k, text_of(values[key], f"{name}.{key}"))
            else:
                turn.edges[section + suffix(k) + ".key"] = "absent"
    return turn


def _section_of(key: str) -> tuple[str | None, int]:
    """`Commands 2` -> (commands, 2)."""
    match = re.fullmatch(r"(.*?)(?: ([2-9]))?", key, re.DOTALL)
    assert match
    section = _SECTION_OF_KEY.get(match.group(1))
    k = int(match.group(2) or 1)
    return (section if k == 1 or section in _ROUND_SECTIONS else None), k


def _read_section(turn: Turn, section: str, k: int, value: str) -> None:
    """Take a section's text out of its markers; whatever is not as usual is noted in `edges`."""
    role, end = SECTIONS[section]
    name = section + suffix(k)
    body = value.removeprefix(role + ":")
    if body == value:
        turn.edges[f"{name}.open"] = ""
    inside, mark, after = body.rpartition(end)
    if not mark or after.strip(EDGE):  # no end marker, or text behind it, which then is text as all the rest
        inside, after = body, "\n"
        turn.edges[f"{name}.close"] = ""
    elif after != "\n":
        turn.edges[f"{name}.after"] = after
    tag = re.match(rf" <quality: ({'|'.join(map(str, QUALITIES))})>", inside) if section == "reply" else None
    if tag:
        turn.quality, inside = int(tag.group(1)), inside[tag.end() :]
    text = inside.lstrip(EDGE)
    left, text = inside[: len(inside) - len(text)], text.rstrip(EDGE)
    right = inside[len(left) + len(text) :]
    _set(turn, section, k, text)
    for side, found, usual in zip(("left", "right"), (left, right), _usual(turn, section, k), strict=True):
        if found != usual:
            turn.edges[f"{name}.{side}"] = found


def _set(turn: Turn, section: str, k: int, text: str) -> None:
    setattr(turn.rounds[k] if section in _ROUND_SECTIONS else turn, section, text)


def _get(turn: Turn, section: str, k: int) -> str:
    return getattr(turn.rounds[k] if section in _ROUND_SECTIONS else turn, section)


def _usual(turn: Turn, section: str, k: int) -> tuple[str, str]:
    unused = section == "results" and turn.rounds[k] == Round()
    return edge_whitespace(section, _get(turn, section, k), unused)


def _moss_chat(turn: Turn) -> dict[str, str]:
    whole = Turn(turn.human, turn.rounds or [Round()], turn.reply, turn.quality, turn.edges)
    texts = {}
    for k in range(len(whole.rounds)):
        for section in SECTIONS if k == 0 else _ROUND_SECTIONS:
            if f"{section}{suffix(k)}.key" not in turn.edges:
                texts[_KEYS[section] + suffix(k)] = _section_text(whole, section, k)
    if "MOSS" in texts:
        texts["MOSS"] = texts.pop("MOSS")  # the reply comes last, behind all rounds
    return texts


def _section_text(turn: Turn, section: str, k: int) -> str:
    """A section with its markers, the inverse of `_read_section`."""
    role, end = SECTIONS[section]
    name, edges = section + suffix(k), turn.edges
    left, right = _usual(turn, section, k)
    tag = f" <quality: {turn.quality}>" if section == "reply" and turn.quality is not None else ""
    text = edges.get(f"{name}.left", left) + _get(turn, section, k) + edges.get(f"{name}.right", right)
    close = "" if f"{name}.close" in edges else end + edges.get(f"{name}.after", "\n")
    return ("" if f"{name}.open" in edges else role + ":") + tag + text + close


# -- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convert:
    """Turn a file of conversations into another format, without loss."""

    source: Path  # a file of rows in MOSS JSON, OpenAI messages or ShareGPT (recognised by itself)
    to: Format = "moss"  # the format to write
    output: Path | None = option(None, short="-o")  # the file to write, one JSON object a line; standard output without


@dataclass(frozen=True)
class Show:
    """Print conversations of a file as they are read; with --tokenizer, what training learns is underlined."""

    file: Path  # a file of rows in MOSS JSON, OpenAI messages or ShareGPT
    start: int = 1  # the first row to show
    count: int = 3  # how many rows to show
    tokenizer: Path | None = None  # show the rendered row with this tokenizer (a directory or tokenizer.json)
    loss: Literal["assistant", "paper"] = "assistant"  # which loss to underline
    max_length: int | None = None  # cut the rendered row at whole turns, as training does


def main(config: Convert | Show) -> int:
    """Run `moss data convert` or `moss data show`."""
    return _convert(config) if isinstance(config, Convert) else _show(config)


def _convert(config: Convert) -> int:
    if config.output is None:
        return _write(config, sys.stdout, "standard output")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(config.output) as file, file.open("w", encoding="utf-8", newline="\n") as out:
        _write(config, out, str(config.output))
    return 0


def _write(config: Convert, out: TextIO, name: str) -> int:
    """Write every row, and say on standard error what was done."""
    formats: Counter[str] = Counter()
    changed: list[str] = []
    for place, row in read_rows(config.source):
        try:
            written, kind = to_row(from_row(row), config.to), detect(row)
            if to_row(from_row(written), kind) != row:
                changed.append(place)
            formats[kind] += 1
            out.write(json.dumps(written, ensure_ascii=False) + "\n")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not formats:
        raise ValueError(f"{config.source} holds no conversations")
    said = ", ".join(f"{count} {kind}" for kind, count in formats.items())
    print(f"{said} -> {config.to}: {name}", file=sys.stderr)
    if changed:
        print(f"{len(changed)} would not come back exactly as they were, the first at {changed[0]}", file=sys.stderr)
    return 0


def _show(config: Show) -> int:
    if config.start < 1 or config.count < 1:
        raise UsageError(f"--start {config.start} --count {config.count}: both must be 1 or more")
    tok = load_tokenizer(config.tokenizer) if config.tokenizer else None
    tok = add_markers(tok) if tok and not tok.has_markers else tok  # as `moss train sft` does
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    shown = 0
    for number, dialog in enumerate(read(config.file), 1):
        if number < config.start:
            continue
        if shown == config.count:
            break
        shown += 1
        console.print(Text(f"— row {number}: {len(dialog.turns)} turns", "bold"))
        console.print(_rendered(dialog, tok, config) if tok else _readable(dialog))
    if not shown:
        raise ValueError(f"{config.file} has no row {config.start}")
    return 0


def _readable(dialog: Dialog) -> Text:
    """A conversation for the eye: sections that say `None` are left out."""
    text = Text(plain(instruction(dialog)), "dim")
    for turn in dialog.turns:
        lines = [("Human", turn.human, "cyan")]
        for item in turn.rounds:
            lines += [("Inner Thoughts", item.thoughts, "dim"), ("Commands", item.commands, "yellow")]
            lines += [("Results", item.results, "green")]
        lines += [("MOSS" + (f" ({turn.quality})" if turn.quality is not None else ""), turn.reply, "")]
        for label, said, style in lines:
            if said != NONE:
                text.append(f"{label}: ", "bold").append(plain(said) + "\n", style)
    return text


def _rendered(dialog: Dialog, tok: Tokenizer, config: Show) -> Text:
    """A training row as the model sees it, with what is learnt underlined."""
    ids, mask = render(dialog, tok, loss=config.loss, max_length=config.max_length)
    text = Text()
    for learnt, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        shown = plain(tok.decode((i for i, _ in run), markers=True))
        text.append(shown, "underline green" if learnt else "dim")
    return text.append(f"{len(ids)} tokens, {sum(mask)} learnt", "bold")
