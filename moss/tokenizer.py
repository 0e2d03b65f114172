"""Text to token ids and back: byte-level BPE in which text can never become a control id.

`train` learns a vocabulary from English, Chinese and code together; `load` also reads the released MOSS layout
(vocab.json, merges.txt, added_tokens.json) and any byte-level tokenizer.json (Llama 3, Qwen), and `add_markers` gives
such a base the ten markers of the chat format (`moss.extend` gives it a language). Everything is saved as the
tokenizer.json that stock transformers reads.

Three properties hold for every tokenizer here and are tested with arbitrary strings:
- `decode(encode(text)) == text`, byte for byte (bases that normalise Unicode excepted, see `load`);
- `encode` gives no control id, whatever the text spells: code alone adds those, through `marker`, `opening`, `eos`;
- a text that is not Unicode (lone surrogates) is refused by name.

    tok = train(texts, vocab_size=2048); tok.save("runs/nano"); tok = load("runs/nano")
    tok.encode("1 + 1 等于几？"); tok.decode(ids); tok.marker("<eom>")
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from moss.files import json_object, replacing

EOS = "<|endoftext|>"
MARKERS = (
    "<|Human|>",
    "<eoh>",
    "<|Inner Thoughts|>",
    "<eot>",
    "<|Commands|>",
    "<eoc>",
    "<|Results|>",
    "<eor>",
    "<|MOSS|>",
    "<eom>",
)
ROLES = MARKERS[0::2]  # the opening markers
ENDS = MARKERS[1::2]

# What ends a document in the bases that people build on, when tokenizer_config.json does not say.
_END_OF_TEXT = (EOS, "<|end_of_text|>", "<|eot_id|>", "</s>")

# Pieces that BPE merges within: one digit, one straight quote (so that the argument of Calculate("…") is spelt as in
# the question), a contraction, a word of letters and marks other than CJK, a run of CJK, a run of other signs,
# line ends with the blanks before them, blanks (the last one goes with the word that follows).
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}"
PATTERN = (
    r"\p{N}"
    r'| ?"'
    r"|(?i:'(?:s|t|re|ve|m|ll|d)\b)"
    rf"| ?[\p{{L}}\p{{M}}&&[^{_CJK}]]+"
    rf"|[{_CJK}]+"
    r'| ?[^\s\p{L}\p{M}\p{N}"]+'
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MIN_VOCAB = 256 + 1 + len(MARKERS)
MAX_VOCAB = 2**22  # far above any vocabulary, low enough that a hostile file is refused before a table is made


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, as {character: byte}; vocabularies are written in it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
SIGN_OF = {byte: sign for sign, byte in BYTE_OF.items()}
_ROLE_NAMES = "|".join(role[2:-2].replace(" ", r"\s*") for role in ROLES)
_ROLE_IN_TEXT = re.compile(rf"<(?=\s*\|\s*(?:{_ROLE_NAMES})\s*\|\s*>)", re.IGNORECASE)


class Tokenizer:
    """A byte-level BPE vocabulary. `control_ids` are the ids that no text yields: markers, end of text, and every
    other added token of the base that is not mere whitespace."""

    def __init__(
        self, backend: Backend, *, eos: str | None = None, origin: str = "this tokenizer", text: str | None = None
    ) -> None:
        """`text` is the tokenizer.json that `backend` was read from."""
        self._saved = backend  # with the base's own flags, as other readers know them
        self._text = text
        self._backend = _deaf(backend)
        self.origin = origin
        added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._added = {content: i for i, content in added.items()}
        self.control_ids: frozenset[int] = frozenset(i for i, content in added.items() if content.strip())
        self._bytes = self._byte_table(added)
        self.vocab_size = len(self._bytes)
        self.single_roles = all(role in self._added for role in ROLES)
        end = next((name for name in ((eos,) if eos else _END_OF_TEXT) if name in self._added), None)
        if end is None:
            raise ValueError(
                f"{origin} has no end-of-text token (looked for {', '.join((eos,) if eos else _END_OF_TEXT)}); "
                "name it as eos_token in tokenizer_config.json"
            )
        self.eos_token = end
        self.eos: int = self._added[end]
        self.pad: int = self.eos
        # `encode` with a memory, for what every conversation repeats: the meta instruction, ":", " None"
        self.encode_again = lru_cache(maxsize=256)(lambda text: tuple(self.encode(text)))

    def _byte_table(self, added: dict[int, str]) -> list[bytes]:
        """The bytes of each id; holes in the vocabulary are empty."""
        by_id = {i: token for token, i in self._backend.get_vocab(with_added_tokens=True).items()}
        size = max(by_id, default=-1) + 1
        if not 0 < size <= MAX_VOCAB:
            raise ValueError(f"{self.origin} has {size} ids; a vocabulary has 1 to {MAX_VOCAB}")
        table = [b""] * size
        for i, token in by_id.items():
            if i in added:
                table[i] = added[i].encode()
                continue
            try:
                table[i] = bytes([BYTE_OF[c] for c in token])
            except KeyError:
                raise ValueError(
                    f"{self.origin} is not byte-level BPE (token {i} is {token!r}); only byte-level vocabularies, "
                    "as of GPT-2, MOSS, Llama 3 and Qwen, can be used"
                ) from None
        return table

    # -- text ----------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text. Raises ValueError on a lone surrogate."""
        refuse_surrogates(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        for text in texts:
            refuse_surrogates(text)
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_words(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """`encode_batch` with, for each id, the number of the word that it is a piece of: merges end at its borders."""
        for text in texts:
            refuse_surrogates(text)
        found = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(e.ids, cast("list[int]", e.word_ids)) for e in found]

    def pieces(self, data: bytes) -> list[int]:
        """The ids that the merges make of these bytes, taken as one word; also of what is only part of a character."""
        word = "".join(SIGN_OF[byte] for byte in data)
        return [token.id for token in self._backend.model.tokenize(word)]

    def decode_bytes(self, ids: Iterable[int], *, markers: bool = False) -> bytes:
        """The bytes that `ids` stand for; control ids count for nothing unless `markers`."""
        table, control = self._bytes, self.control_ids
        return b"".join([table[i] for i in ids if markers or i not in control])

    def decode(self, ids: Iterable[int], *, markers: bool = False) -> str:
        """The text of `ids`, exactly what was encoded; control ids are shown only with `markers`. Bytes that a model
        sampled and that are no UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids, markers=markers).decode("utf-8", errors="replace")

    # -- control ids ---------------------------------------------------------------------------------------------

    @property
    def has_markers(self) -> bool:
        """Whether the end markers are ids of their own, without which no chat turn has an end."""
        return all(end in self._added for end in ENDS)

    def marker(self, name: str) -> list[int]:
        """The ids of a marker: one; in the released vocabulary several for the roles, which are text there."""
        if name not in MARKERS:
            raise ValueError(f"{name!r} is not a marker; the markers are {' '.join(MARKERS)}")
        if name in self._added:
            return [self._added[name]]
        if name in ENDS or not self.has_markers:
            require_markers(self)
        return self.encode(name)

    def opening(self, role: str) -> list[int]:
        """The ids of a role marker with its colon, as they open a section: `<|MOSS|>:`."""
        if role in self._added:
            return [self._added[role], *self.encode_again(":")]
        self.marker(role)  # refuses what is no marker here
        return list(self.encode_again(role + ":"))  # released vocabulary: `>:` is one token

    def guard(self, text: str) -> str:
        """`text` as it may stand in a prompt. Where role markers are ordinary text (the released vocabulary) their
        spelling is broken by a visible dot, `<·|MOSS|>`; elsewhere nothing changes, since text gives no marker."""
        return text if self.single_roles else _ROLE_IN_TEXT.sub("<·", text)

    # -- files ---------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The content of tokenizer.json. What was read stays as it was: versions of the library write differently."""
        return self._saved.to_str(pretty=False) if self._text is None else self._text

    @cached_property
    def sha256(self) -> str:
        """A name for exactly this vocabulary, its merges and its splitting."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as stock transformers reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "pad_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        for name, content in (
            ("tokenizer.json", self.to_json()),
            ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
        ):
            with replacing(directory / name) as file:
                file.write_text(content, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """See the module function `load`."""
        return load(path)


def _deaf(backend: Backend) -> Backend:
    """A backend that reads every added token's spelling as text; runs of blanks stay tokens of their own."""
    loud = [t for t in backend.get_added_tokens_decoder().values() if not t.special and t.content.strip()]
    if loud or backend.truncation or backend.padding:
        spec = json.loads(backend.to_str())
        for token in spec["added_tokens"]:
            token["special"] = bool(token["content"].strip())
        spec["truncation"] = spec["padding"] = None
        backend = Backend.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    return backend


def refuse_surrogates(text: str) -> None:
    """ValueError where a text holds half a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, "
            "which is no character; send valid Unicode"
        ) from None


def require_markers(tok: Tokenizer) -> None:
    """Refuse a chat model whose vocabulary knows none of the chat format's markers."""
    if not tok.has_markers:
        raise ValueError(
            f"{tok.origin} knows none of the chat markers ({' '.join(ENDS)}), so this is not a MOSS chat model; "
            "give one that was made here (make nano) or a released moss-moon-003"
        )


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary of `vocab_size` ids from `texts` (English, Chinese and code in the mix that is to come).

    It comes out smaller only where the texts have nothing left to merge. Ids 0..10 are `<|endoftext|>` and the ten
    markers, then come the 256 bytes, then the merges. Deterministic.
    """
    if vocab_size < MIN_VOCAB:
        raise ValueError(f"vocab_size {vocab_size} is too small: {MIN_VOCAB} ids are bytes and markers")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in (EOS, *MARKERS)],
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    backend.train_from_iterator(_checked(texts), trainer)
    return Tokenizer(backend)


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        refuse_surrogates(text)
        yield text


def load(path: str | Path) -> Tokenizer:
    """Read tokenizer.json (a file, or in a directory), or a directory in the released layout.

    A base whose tokenizer.json normalises Unicode (Qwen: NFC) keeps doing so: there the round trip holds for
    normalised text only.
    """
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        try:
            text = file.read_text(encoding="utf-8")
            spec = json.loads(text)
            model = spec["model"]["type"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from None
        if model != "BPE":
            raise ValueError(f"{file} holds a {model} tokenizer; only byte-level BPE can be used")
        return Tokenizer(_backend(spec, file), eos=_configured_eos(directory, spec), origin=str(file), text=text)
    if path.is_dir() and (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _load_released(path)
    raise ValueError(f"no tokenizer at {path}: neither tokenizer.json nor vocab.json with merges.txt is there")


def _backend(spec: dict[str, Any], file: Path) -> Backend:
    try:
        return Backend.from_str(json.dumps(spec))
    except Exception as error:
        if type(error) is not Exception:  # the Rust library raises the bare class; whatever else comes is a defect
            raise
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from None


def _configured_eos(directory: Path, spec: dict[str, Any]) -> str | None:
    """The end of a document: `<|endoftext|>` where it exists, else the eos_token of tokenizer_config.json."""
    known = {t["content"] for t in spec.get("added_tokens", [])}
    file = directory / "tokenizer_config.json"
    if EOS in known or not file.is_file():
        return None
    name = json_object(file).get("eos_token")
    name = name.get("content") if isinstance(name, dict) else name
    return name if isinstance(name, str) and name in known else None


def _load_released(directory: Path) -> Tokenizer:
    """vocab.json, merges.txt and added_tokens.json, split as GPT-2 does.

    Added tokens stand in the vocabulary under the ids that the file gives them (no merge reaches them), since the
    library would otherwise number them itself.
    """
    vocab = json_object(directory / "vocab.json")
    added_file = directory / "added_tokens.json"
    added = json_object(added_file) if added_file.is_file() else {}
    strange = next((token for token, i in added.items() if type(i) is not int), None)
    if strange is not None:
        raise ValueError(f"{added_file}: {strange!r} must have a number, not {added[strange]!r}")
    if type(vocab.get(EOS)) is int:
        added.setdefault(EOS, vocab[EOS])
    try:
        lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{directory / 'merges.txt'} is not text in UTF-8: {error}") from None
    merges = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    bad = next((merge for merge in merges if len(merge) != 2), None)
    if bad:
        raise ValueError(f"{directory / 'merges.txt'}: {' '.join(bad)!r} is not a pair of tokens")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": bool(token.strip())}
            for token, i in sorted(added.items(), key=lambda item: item[1])
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab | added, "merges": merges},
    }
    return Tokenizer(_backend(spec, directory / "vocab.json"), origin=str(directory))


def add_markers(base: Tokenizer | str | Path) -> Tokenizer:
    """Give another base's tokenizer the ten markers as new ids after its own; ids that exist stay as they are.

    The new rows of the embedding are the ids from the base's `vocab_size` on (some bases have spare rows there).
    """
    base = base if isinstance(base, Tokenizer) else load(base)
    backend = Backend.from_str(base.to_json())
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in MARKERS])
    return Tokenizer(backend, eos=base.eos_token, origin=base.origin)
