"""Preference rows: one conversation, several replies to it, and which of two replies is the better one.

Two forms are read, one JSON object a line (or a JSON array of them), also mixed in one file:
- ours, `{"history": …, "replies": [{"text", "source", "level"?}], "pairs": [[winner, loser, judge, order, tie], …]}`;
  the history is a conversation in any format of `dialogs.py` whose last turn has no reply, winner and loser are places
  in `replies`, `order` says which of the two the judge saw first, and a tie is left out, since nothing is learnt of it;
- `{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": …}`: the turns before the last reply are the history. A
  speaker who goes on after himself has said one text in two parts. Where the two histories differ the replies
  cannot be compared: such a row gives its history with the chosen reply, and no pair.

    for preference in read("pairs.jsonl"): ...
    groups = Groups(preferences, tok, length=704, seed=0)
    batch = groups.batch(position, 8)       # as of `pack.Packed`, with "last", "pairs" and "reply"

In `Groups` all replies of one prompt lie in one packed row, so that every pair of a prompt is in the same step. The
prompt stands there once, and each reply with its `<eom>` is a document that goes on from it (`attention.packed_mask`):
what is computed for a reply is what would be computed for the whole conversation, and however many pairs it is in,
once. An empty reply is a reply (its `<eom>` stands alone). Two replies that give the same ids cannot be told apart:
that pair is left out. A prompt without a pair, or one that with its replies is longer than a row, is left out and
counted. This file needs no torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moss.chat import META_INSTRUCTION, Dialog, Turn, render
from moss.data.dialogs import from_row, read_rows, to_moss
from moss.data.pack import FIELDS, Packed, Rows
from moss.tokenizer import Tokenizer

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Reply:
    """One reply: its text, who wrote it, and its stated quality (0 to 100) where that is known."""

    text: str
    source: str = ""
    level: int | None = None


@dataclass(frozen=True)
class Preference:
    """A conversation whose last turn awaits its reply, replies to it, and pairs (winner, loser) of places in them."""

    history: Dialog
    replies: list[Reply]
    pairs: list[tuple[int, int]] = field(default_factory=list)


def answered(history: Dialog, reply: str) -> Dialog:
    """The conversation with this reply in its last turn; `history` stays as it is."""
    return replace(history, turns=[*history.turns[:-1], replace(history.turns[-1], reply=reply)])


# -- files -----------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Iterator[Preference]:
    """Every row of a file; a broken one is a ValueError that names file and line."""
    for place, row in read_rows(path):
        try:
            yield from_json(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def from_json(row: Any) -> Preference:
    """A row in either form; ValueError says what is wrong with it."""
    if isinstance(row, dict) and {"history", "replies", "pairs"} <= row.keys():
        return _from_ours(row)
    if isinstance(row, dict) and {"chosen", "rejected"} <= row.keys():
        return _from_texts(row["chosen"], row["rejected"])
    raise ValueError("a preference row is a JSON object with history, replies and pairs, or with chosen and rejected")


def to_json(preference: Preference, judge: str = "") -> dict[str, Any]:
    """The row of a preference in our form, its history as released MOSS JSON without the last reply."""
    last = preference.history.turns[-1]
    open_turn = replace(last, edges=last.edges | {"reply.key": "absent"})
    history = to_moss(replace(preference.history, turns=[*preference.history.turns[:-1], open_turn]))
    replies = [
        {"text": reply.text, "source": reply.source} | ({} if reply.level is None else {"level": reply.level})
        for reply in preference.replies
    ]
    pairs = [[winner, loser, judge, 0, False] for winner, loser in preference.pairs]
    return {"history": history, "replies": replies, "pairs": pairs}


def _from_ours(row: Mapping[str, Any]) -> Preference:
    history = from_row(row["history"])
    last = history.turns[-1]
    if last.reply:
        raise ValueError(f"the last turn of the history has a reply ({last.reply[:40]!r}); replies go into `replies`")
    edges = {name: value for name, value in last.edges.items() if not name.startswith("reply.")}
    history.turns[-1] = replace(last, edges=edges)
    if not isinstance(row["replies"], list) or not isinstance(row["pairs"], list):
        raise ValueError("replies and pairs must be lists")
    replies = [_reply(value, number) for number, value in enumerate(row["replies"])]
    pairs = [pair for value in row["pairs"] if (pair := _pair(value, len(replies)))]
    return Preference(history, replies, pairs)


def _reply(value: Any, number: int) -> Reply:
    text, source, level = (
        (value.get(key) for key in ("text", "source", "level")) if isinstance(value, dict) else [None] * 3
    )
    if not isinstance(text, str):
        raise ValueError(f"reply {number} must be an object with a `text`")
    if level is not None and (not isinstance(level, int) or isinstance(level, bool)):
        raise ValueError(f"reply {number} has the level {level!r}; it must be a whole number")
    return Reply(text, "" if source is None else str(source), level)


def _pair(value: Any, count: int) -> tuple[int, int] | None:
    """(winner, loser), or None for a tie."""
    places = value[:2] if isinstance(value, list) else []
    if len(places) < 2 or any(isinstance(at, bool) or not isinstance(at, int) for at in places):
        raise ValueError(f"the pair {value!r} must begin with two places in `replies`: [winner, loser, …]")
    if not all(0 <= at < count for at in places) or places[0] == places[1]:
        raise ValueError(f"the pair {value!r} must name two different places among the {count} replies, from 0 on")
    return None if len(value) > 4 and value[4] else (places[0], places[1])


def _from_texts(chosen: Any, rejected: Any) -> Preference:
    (history, won), (other, lost) = _conversation(chosen, "chosen"), _conversation(rejected, "rejected")
    if history != other:
        return Preference(history, [Reply(won, "chosen")])
    return Preference(history, [Reply(won, "chosen"), Reply(lost, "rejected")], [(0, 1)])


def _conversation(text: Any, name: str) -> tuple[Dialog, str]:
    """(history, last reply) of a text with its speakers in it."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text")
    head, *parts = _SPEAKER.split("\n\n" + text.lstrip("\n"))
    said: list[tuple[str, str]] = []
    for speaker, words in zip(parts[::2], parts[1::2], strict=True):
        if said and said[-1][0] == speaker:
            said[-1] = (speaker, f"{said[-1][1]}\n\n{words.strip()}".strip())
        else:
            said.append((speaker, words.strip()))
    if head.strip() or not said or said[0][0] != "Human" or said[-1][0] != "Assistant":
        raise ValueError(f"{name} must begin with 'Human:' and end with the turn of 'Assistant:'")
    turns = [Turn(human, reply=reply) for (_, human), (_, reply) in zip(said[::2], said[1::2], strict=True)]
    reply, turns[-1].reply = turns[-1].reply, ""
    return Dialog(META_INSTRUCTION, {}, turns), reply


# -- ids -------------------------------------------------------------------------------------------------------------

CONTINUES = 2**16  # `attention.CONTINUES`, which this file cannot import: that one needs torch


def encode(dialog: Dialog, tok: Tokenizer) -> tuple[list[int], int]:
    """(ids, start): the conversation up to the `<eom>` of its last reply, which begins, with its edge, at `start`."""
    ids, _ = render(dialog, tok)
    start = len(render(dialog, tok, until="reply")[0])
    end = tok.marker("<eom>")[-1]
    return ids[: len(ids) - ids[::-1].index(end)], start


@dataclass(frozen=True)
class _Prompt:
    """What of a preference is learnt, in ids."""

    prompt: list[int]  # but for its last token, with which each reply begins: it is what the first learnt one follows
    replies: dict[int, list[int]]  # of those in a pair, by their place in the preference
    pairs: list[tuple[int, int]]

    @classmethod
    def of(cls, preference: Preference, tok: Tokenizer) -> _Prompt:
        """Without pairs of replies whose ids are the same."""
        named = {number for pair in preference.pairs for number in pair}
        encoded = {n: encode(answered(preference.history, preference.replies[n].text), tok) for n in sorted(named)}
        pairs = [(a, b) for a, b in preference.pairs if encoded[a][0] != encoded[b][0]]
        used = {number for pair in pairs for number in pair}
        begin = max((start for _, start in encoded.values()), default=1) - 1  # the same for all
        prompt = next((ids[:begin] for ids, _ in encoded.values()), [])
        return cls(prompt, {n: ids[begin:] for n, (ids, _) in encoded.items() if n in used}, pairs)

    def __len__(self) -> int:
        """Places that it takes in a row."""
        return len(self.prompt) + sum(map(len, self.replies.values()))


class Groups:
    """Preferences as packed rows, epoch after epoch without end: the `Data` of a stage that learns from pairs.

    A batch holds `ids`, `mask` (1 on a reply's own tokens, `<eom>` included), `positions` and `segments`, each (B,
    length), as `pack.Packed` gives them, and
    - `last` (B, S): the place in its row of the last token of reply s, -1 where a row has fewer than S replies;
    - `reply` (B, S): which reply it is, as an index into `replies`, -1 likewise;
    - `pairs` (P, 3): row in the batch, and the winner's and the loser's s.
    """

    def __init__(self, preferences: Iterable[Preference], tok: Tokenizer, length: int, seed: int = 0) -> None:
        """Raises ValueError where nothing is left to learn from."""
        self.length = length
        self.preferences: list[Preference] = []  # those that are kept
        self.replies: list[tuple[int, int]] = []  # of each reply: index in `preferences`, place in its replies
        self.dropped = {"no pair": 0, "too long": 0}
        self._prompts: list[_Prompt] = []
        self._first: list[int] = []  # of each prompt the index of its first reply in `replies`
        for preference in preferences:
            prompt = _Prompt.of(preference, tok)
            if not prompt.pairs or len(prompt) > length:
                self.dropped["too long" if prompt.pairs else "no pair"] += 1
                continue
            self._first.append(len(self.replies))
            self.replies += [(len(self.preferences), number) for number in prompt.replies]
            self.preferences.append(preference)
            self._prompts.append(prompt)
        if not any((self._prompts, *self.dropped.values())):
            raise ValueError("there is no preference to learn from: the data hold no row")
        if not self._prompts:
            raise ValueError(
                f"there is no preference to learn from: {self.dropped['no pair']} rows have no pair, and of "
                f"{self.dropped['too long']} the replies do not fit --length {length} together"
            )
        flat = ([*p.prompt, *(i for ids in p.replies.values() for i in ids)] for p in self._prompts)
        self._packed = Packed(Rows.of([(ids, [1] * len(ids)) for ids in flat]), length, seed, tok.pad)

    def __len__(self) -> int:
        """Packed rows in an epoch."""
        return len(self._packed)

    @property
    def fill(self) -> float:
        """The share of places that hold a token."""
        return self._packed.fill

    @cached_property
    def pairs(self) -> np.ndarray:
        """(P, 2) winner and loser of every pair, as indices into `replies`."""
        return np.concatenate([first + _local(p) for first, p in zip(self._first, self._prompts, strict=True)])

    @cached_property
    def reply_lengths(self) -> np.ndarray:
        """(R,) tokens of each reply itself, `<eom>` included."""
        return np.array([len(ids) - 1 for p in self._prompts for ids in p.replies.values()], dtype=np.int64)

    def record(self) -> dict[str, Any]:
        """What `moss.json` says of these rows; a run goes on with the same ones only."""
        rows = self._packed.rows
        digest = hashlib.sha256(rows.sha256().encode() + self.reply_lengths.tobytes() + self.pairs.tobytes())
        counts = {"rows": len(self.preferences), "replies": len(self.replies), "pairs": len(self.pairs)}
        return {"sha256": digest.hexdigest(), **counts, "tokens": len(rows.ids), "packed": len(self)}

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """`count` packed rows from `position` on, across the end of an epoch if need be."""
        members = [self._packed.members(position + index) for index in range(count)]
        out = {name: np.zeros((count, self.length), dtype=np.int64) for name in FIELDS}
        out["ids"][:] = self._packed.pad
        most = max(sum(len(self._prompts[number].replies) for number in row) for row in members)
        out |= {name: np.full((count, most), -1, dtype=np.int64) for name in ("last", "reply")}
        pairs = []
        for line, row in enumerate(members):
            at = place = 0
            for number in row:
                pairs.append(np.insert(_local(self._prompts[number]) + place, 0, line, axis=1))
                at, place = self._lay(number, {name: value[line] for name, value in out.items()}, at, place)
        return out | {"pairs": np.concatenate(pairs)}

    def _lay(self, number: int, row: dict[str, np.ndarray], at: int, place: int) -> tuple[int, int]:
        """Put a prompt and its replies into a row from `at` on, where `place` replies are; what they are then."""
        prompt = self._prompts[number]
        shared, own = len(prompt.prompt), at + 1  # a place is a number that no other document of this row has
        end = at + shared
        row["ids"][at:end], row["positions"][at:end], row["segments"][at:end] = prompt.prompt, np.arange(shared), own
        for index, ids in enumerate(prompt.replies.values()):
            at, end = end, end + len(ids)
            row["ids"][at:end], row["mask"][at + 1 : end] = ids, 1
            row["positions"][at:end] = np.arange(shared, shared + len(ids))
            row["segments"][at:end] = at + 1 + CONTINUES * own
            row["last"][place], row["reply"][place] = end - 1, self._first[number] + index
            place += 1
        return end, place


def _local(prompt: _Prompt) -> np.ndarray:
    """(P, 2) winner and loser of a prompt's pairs, as places among its replies."""
    place = {number: at for at, number in enumerate(prompt.replies)}
    return np.array([(place[winner], place[loser]) for winner, loser in prompt.pairs], dtype=np.int64)
