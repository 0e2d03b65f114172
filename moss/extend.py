"""A new language for an existing vocabulary: merges learnt on top of a base's own, which stay as they are.

What    `extend(base, texts, num_new)` gives the base's tokenizer `num_new` more ids for the writing of the texts
        (Chinese on a GPT-2 style base, as in section 3 of the paper). The base's splitting, merges and ids are kept.
Why     Merges that were learnt from scratch and then appended would often never fire, because the base's merges cut the
        same bytes in another way. So learning goes on where the base ends: the texts are split and merged by the base,
        and what is learnt are merges of the pieces that come out.
How     tok = extend(load("models/codegen"), texts, 20_000); tok.save("runs/tokenizer")

Three properties follow, and are tested:
- a text without characters of the new writing keeps its ids: each new token holds such a character (or begins one),
  and each new merge ranks after all old ones;
- each new token is what some text is encoded into (`unreachable` tries each; where one fails, learning begins again);
- new ids come after all old ones, added tokens included.

A new token is made of whole characters, or is the beginning of one (three bytes a Chinese character, two merges). No
two merges make the same token, so that learning sees exactly what encoding will do.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend

from moss.tokenizer import SIGN_OF, Tokenizer

# Writings other than Latin, as code points from and to. Those of Chinese, with the signs printed among them: Chinese
# text has its own comma and full stop, and English text has none of these.
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "Han": (
        (0x2E80, 0x2FFF), (0x3000, 0x303F), (0x3100, 0x312F), (0x31A0, 0x31EF), (0x3200, 0x4DBF), (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF), (0xFE30, 0xFE4F), (0xFF00, 0xFFEF), (0x20000, 0x3FFFF),
    ),
    "Kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF)),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "Greek": ((0x0370, 0x03FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x0400, 0x052F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "Armenian": ((0x0530, 0x058F),),
    "Hebrew": ((0x0590, 0x05FF), (0xFB1D, 0xFB4F)),
    "Arabic": ((0x0600, 0x06FF), (0x0750, 0x077F), (0x08A0, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)),
    "Indic": ((0x0900, 0x0DFF),),
    "Thai and Lao": ((0x0E00, 0x0EFF),),
    "Tibetan": ((0x0F00, 0x0FFF),),
    "Burmese": ((0x1000, 0x109F),),
    "Georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF)),
    "Ethiopic": ((0x1200, 0x139F),),
    "Khmer": ((0x1780, 0x17FF),),
    "Mongolian": ((0x1800, 0x18AF),),
}  # fmt: skip
SHARE = 0.02  # of the characters of all these writings, from which on one of them belongs to the new language
LANGUAGES = {"Han": "Chinese", "Latin": "Latin script"}  # by writing; others keep its name
TWICE = 2  # times that a pair must occur to be worth an id
PART, PARTS = 1 << 16, 16  # characters that the base splits at a time, and how many times so many at once
END = 0x10FFFF

Pair = tuple[int, int]


def extend(base: Tokenizer, texts: Iterable[str], num_new: int) -> Tokenizer:
    """The base's tokenizer with up to `num_new` more ids, learnt from `texts`; fewer where they have no more pairs.

    Deterministic. ValueError where the texts hold no writing but Latin: merges for it would change the ids of English.
    """
    if num_new < 1:
        raise ValueError(f"{num_new} new ids: there must be at least one")
    words, script = split(base, texts)
    banned: set[bytes] = set()
    while True:
        merges = learn(base, words, script, num_new, banned)
        tok = with_merges(base, merges)
        lost = unreachable(tok, base.vocab_size)
        if not lost:
            return tok
        for i in lost:  # the beginning of characters that all have tokens: the rarest of these gives way
            users = [number for number, (left, _) in enumerate(merges) if left == i]
            banned.add(tok.decode_bytes([base.vocab_size + max(users) if users else i]))


# -- the texts, as the base splits them ------------------------------------------------------------------------------


class Script:
    """The characters of the new language: `holds(text)`, and `begins(bytes)` for the first bytes of a character."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._ranges = [span for name in names for span in SCRIPTS[name]]
        spans = "".join(f"{chr(low)}-{chr(high)}" for low, high in self._ranges)
        self.holds = re.compile(f"[{spans}]").search

    def begins(self, start: bytes) -> bool:
        """Whether every character that begins with these bytes (2 or 3 of them, unfinished) is of this script."""
        size = 4 if start[0] >= 0xF0 else 3
        low, high = (start + bytes([fill]) * (size - len(start)) for fill in (0x80, 0xBF))
        try:
            first, last = ord(low.decode()), ord(high.decode())
        except UnicodeDecodeError:  # some of them would be no characters
            return False
        return any(a <= first and last <= b for a, b in self._ranges)


class Words(NamedTuple):
    """The words of a corpus, each once: W words, N pieces of the base in all."""

    ids: np.ndarray  # (N,) int32, word after word
    lengths: np.ndarray  # (W,)
    counts: np.ndarray  # (W,) how often each occurs


def split(base: Tokenizer, texts: Iterable[str]) -> tuple[Words, Script]:
    """What the base makes of each word of the texts that holds the new language; and what that is.

    A word is what the base merges within: a run of letters, for GPT-2. The script is found in the texts themselves.
    """
    found: Counter[bytes] = Counter()
    letters = np.zeros(END + 1, dtype=np.int64)
    for batch in _batches(texts):
        letters += histogram("".join(batch))
        for ids, words in base.encode_words(batch):
            edges = np.flatnonzero(np.diff(words, prepend=-1, append=-1)).tolist()
            raw = np.array(ids, dtype=np.int32).tobytes()
            found.update(raw[4 * begin : 4 * end] for begin, end in itertools.pairwise(edges) if end > begin + 1)
    totals = by_script(letters)
    names = [name for name, total in totals.items() if total > SHARE * sum(totals.values())]
    if not names:
        raise ValueError(
            "the texts hold no writing but Latin; a vocabulary can be extended for Chinese and the like only, since "
            "merges for Latin letters would change the ids of English and code"
        )
    script = Script(names)
    kept = [word for word in found if script.holds(base.decode(np.frombuffer(word, dtype=np.int32)))]
    lengths = np.array([len(word) // 4 for word in kept], dtype=np.int64)
    counts = np.array([found[word] for word in kept], dtype=np.int64)
    return Words(np.frombuffer(b"".join(kept), dtype=np.int32), lengths, counts), script


def histogram(text: str) -> np.ndarray:
    """How often each code point occurs, (0x110000,)."""
    return np.bincount(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), minlength=END + 1)


def by_script(letters: np.ndarray) -> dict[str, int]:
    """How many characters of each of `SCRIPTS` a histogram counts."""
    return {name: sum(int(letters[a : b + 1].sum()) for a, b in spans) for name, spans in SCRIPTS.items()}


def writing(text: str) -> str:
    """The one of `SCRIPTS` that a text is written in; "Latin" where it holds none of them, "mixed" where very few."""
    totals = by_script(histogram(text))
    name = max(totals, key=lambda name: totals[name])
    return "Latin" if not totals[name] else name if totals[name] > SHARE * len(text) else "mixed"


def language(text: str) -> str:
    """The language of a text as people call it, as far as its writing tells."""
    name = writing(text)
    return LANGUAGES.get(name, name)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in parts that end with a line, of `PART` characters or more, `PARTS` at a time: a book in one piece
    would take memory for nothing, and lines by themselves would take time."""
    parts, lines, size = [], [], 0
    for text in texts:
        for line in text.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= PART:
                parts.append("".join(lines))
                lines, size = [], 0
                if len(parts) == PARTS:
                    yield parts
                    parts = []
        lines.append("\n")
    yield [*parts, "".join(lines)]


# -- learning --------------------------------------------------------------------------------------------------------


class Corpus:
    """All words end to end as a linked list of pieces, with the places of each pair; a merge costs what it changes.

    A pair of pieces comes into being in one merge, everywhere at once (no two merges make the same piece), so that its
    places are written once, and its count can only fall afterwards.
    """

    def __init__(self, words: Words) -> None:
        size = len(words.ids)  # the place of this number stands for "no neighbour"
        self.ids = np.append(words.ids, np.int32(-1))  # -1 also where a piece was merged into the one before
        self.weight = np.repeat(words.counts, words.lengths)
        self.next = np.append(np.arange(1, size + 1, dtype=np.int32), np.int32(size))
        self.prev = np.arange(-1, size, dtype=np.int32)
        ends = np.cumsum(words.lengths)
        self.next[ends - 1] = size
        self.prev[np.concatenate(([0], ends[:-1]))] = size
        self.counts: dict[int, int] = {}  # by pair, both ids in one number
        self.places: dict[int, np.ndarray] = {}
        self.heap: list[tuple[int, int]] = []  # (-count, pair), counts as they once were
        self._add(np.arange(size, dtype=np.int32))

    def _pairs(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The pairs that begin at `at`: keys (K,), counts (K,), places grouped by pair, their borders (K + 1,)."""
        left, right = self.ids[at], self.ids[self.next[at]]
        there = (left >= 0) & (right >= 0)
        at, keys = at[there], left[there].astype(np.int64) << 32 | right[there]
        order = np.argsort(keys, kind="stable")
        at, keys = at[order], keys[order]
        borders = np.flatnonzero(np.diff(keys, prepend=-1, append=-1))
        sums = np.concatenate(([0], np.cumsum(self.weight[at])))[borders]
        return keys[borders[:-1]], np.diff(sums), at, borders

    def _add(self, at: np.ndarray) -> None:
        keys, counts, at, borders = self._pairs(at)
        for i in np.flatnonzero(counts >= TWICE).tolist():
            key, count = int(keys[i]), int(counts[i])
            self.counts[key], self.places[key] = count, at[borders[i] : borders[i + 1]]
            heapq.heappush(self.heap, (-count, key))

    def best(self) -> Pair | None:
        """The pair that occurs most often (of equals the one of the lowest ids), taken out; None where none is left."""
        while self.heap:
            once, key = heapq.heappop(self.heap)
            count = self.counts[key]
            if count == -once:
                return key >> 32, key & 0xFFFFFFFF
            if count >= TWICE:
                heapq.heappush(self.heap, (-count, key))
        return None

    def merge(self, pair: Pair, fresh: int) -> None:
        """Make the pair one piece with the id `fresh`, from left to right wherever it stands."""
        at = self.places.pop(pair[0] << 32 | pair[1])
        at = at[(self.ids[at] == pair[0]) & (self.ids[self.next[at]] == pair[1])]
        if pair[0] == pair[1] and len(at):  # of three in a row, the first two
            runs = np.flatnonzero(np.concatenate(([True], self.next[at[:-1]] != at[1:])))
            inside = np.arange(len(at)) - np.repeat(runs, np.diff(runs, append=len(at)))
            at = at[inside % 2 == 0]
        gone = self.next[at]
        keys, counts, *_ = self._pairs(np.unique(np.concatenate((self.prev[at], at, gone))))
        for key, count in zip(keys.tolist(), counts.tolist()):
            if key in self.counts:
                self.counts[key] -= count
        after = self.next[gone]
        self.ids[at], self.ids[gone] = fresh, -1
        self.next[at], self.prev[after] = after, at
        self._add(np.unique(np.concatenate((self.prev[at], at))))


def learn(base: Tokenizer, words: Words, script: Script, num_new: int, banned: set[bytes]) -> list[Pair]:
    """Up to `num_new` merges in the order of their ranks; the i-th makes the id `base.vocab_size + i`."""
    table = [base.decode_bytes([i], markers=True) for i in range(base.vocab_size)]
    known = set(table) | banned
    corpus = Corpus(words)
    merges: list[Pair] = []
    while len(merges) < num_new and (pair := corpus.best()):
        left, right = table[pair[0]], table[pair[1]]
        if left + right in known or not sound(left, right, script):
            continue
        corpus.merge(pair, len(table))
        table.append(left + right)
        known.add(left + right)
        merges.append(pair)
    return merges


def sound(left: bytes, right: bytes, script: Script) -> bool:
    """Whether a merge may make a token of these two: whole characters, at least one of the script; or, where `left`
    already ends within a character, that character's further beginning."""
    token = left + right
    try:
        return bool(script.holds(token.decode()))
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data" or error.start >= len(left):
            return False
        return script.begins(token[error.start :]) or bool(script.holds(token[: error.start].decode()))


# -- the result ------------------------------------------------------------------------------------------------------


def with_merges(base: Tokenizer, merges: Sequence[Pair]) -> Tokenizer:
    """The base's tokenizer.json with more merges and their tokens; the base's added tokens keep their ids by standing
    in the vocabulary too, which no merge and no text leads to."""
    spec = json.loads(base.to_json())
    model = spec["model"]
    vocab = model["vocab"]
    for token in spec["added_tokens"]:
        vocab.setdefault(token["content"], token["id"])
    names = ["".join(SIGN_OF[byte] for byte in base.decode_bytes([i], markers=True)) for i in range(base.vocab_size)]
    for left, right in merges:
        names.append(names[left] + names[right])
        vocab[names[-1]] = len(names) - 1
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)  # as older versions of the library write
    model["merges"] += [f"{names[a]} {names[b]}" if as_text else [names[a], names[b]] for a, b in merges]
    text = json.dumps(spec, ensure_ascii=False)
    tok = Tokenizer(Backend.from_str(text), eos=base.eos_token, origin=base.origin, text=text)
    for content in (token["content"] for token in spec["added_tokens"]):
        if tok.encode(content) != base.encode(content):
            raise ValueError(f"{base.origin} cannot be extended: text would give the id of its token {content!r}")
    return tok


def unreachable(tok: Tokenizer, first: int) -> list[int]:
    """The ids from `first` on that come out of no text: each token is encoded, or all that it may begin."""
    lost = []
    for i in range(first, tok.vocab_size):
        token = tok.decode_bytes([i])
        if not any(i in ids for ids in tok.encode_batch(completions(token))):
            lost.append(i)
    return lost


def completions(token: bytes) -> list[str]:
    """The token as text; of one that ends within a character, with every end that makes one of it."""
    try:
        return [token.decode()]
    except UnicodeDecodeError as error:
        size = {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}[token[error.start] >> 4] - (len(token) - error.start)
    texts = []
    for end in itertools.product(range(0x80, 0xC0), repeat=size):
        with contextlib.suppress(UnicodeDecodeError):
            texts.append((token + bytes(end)).decode())
    return texts
