"""A new language on top of a base's vocabulary: old ids untouched, every new id reachable, rows that begin as means."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from moss.data import curriculum
from moss.extend import Script, Words, completions, extend, learn, sound, split, unreachable, with_merges, writing
from moss.grow import grow
from moss.model import Decoder, ModelConfig
from moss.tokenizer import EOS, MARKERS, Tokenizer, add_markers, load
from tests.test_tokenizer import ODD, TEXTS, write_released

LIBRARY = sorted(Path(os.__file__).parent.glob("*.py"))
CODE = [path.read_text(encoding="utf-8") for path in LIBRARY[::20]]
CHINESE = [text for text in islice(curriculum.text(0), 600) if writing(text) == "Han"]
HAN = Script(["Han"])
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(texts: list[str], size: int, **model: object) -> Backend:
    """A base as others make them, with the bytes and `size` ids."""
    backend = Backend(models.BPE(**model))  # type: ignore[arg-type]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def qwen(texts: list[str], *, ignore_merges: bool = False, merges_as_text: bool = False) -> Tokenizer:
    """A base in the layout of Qwen and Llama 3: their splitting, added tokens behind the vocabulary."""
    backend = byte_level(texts, 700)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens([EOS, "<|im_start|>"])
    backend.add_tokens(["<think>"])
    spec = json.loads(backend.to_str())
    spec["model"]["ignore_merges"] = ignore_merges
    if merges_as_text:
        spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    text = json.dumps(spec)
    return Tokenizer(Backend.from_str(text), text=text)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """GPT-2's way without and with Chinese in its own training, the released layout, Qwen's and Llama's way."""
    gpt2 = byte_level(CODE, 1200)
    gpt2.add_special_tokens([EOS])
    some = byte_level([*CODE, *CHINESE[:40], *ODD], 1500)  # merges of half characters, and across their borders
    some.add_special_tokens([EOS])
    return {
        "gpt2": Tokenizer(gpt2),
        "with some Chinese": Tokenizer(some),
        "released": load(write_released(tmp_path_factory.mktemp("released"))),
        "qwen": qwen([*CODE, *TEXTS], merges_as_text=True),
        "llama": qwen([*CODE, *TEXTS], ignore_merges=True),
        "markers": add_markers(qwen(CODE)),
    }


NAMES = ("gpt2", "with some Chinese", "released", "qwen", "llama", "markers")


@pytest.fixture(scope="module")
def extended(bases: dict[str, Tokenizer]) -> dict[str, Tokenizer]:
    return {name: extend(base, CHINESE, 500) for name, base in bases.items()}


# ---------------------------------------------------------------- old ids, new ids


@pytest.mark.parametrize("name", NAMES)
def test_text_without_the_new_language_keeps_its_ids(
    name: str, bases: dict[str, Tokenizer], extended: dict[str, Tokenizer]
) -> None:
    """A base whose English or code is cut in another way afterwards has lost what it knows."""
    base, tok = bases[name], extended[name]
    other = [text for text in ODD if not HAN.holds(text)]
    for text in [*CODE, *other, "“quoted” — it’s 3 €… Привет, κόσμε, 안녕, 🙂"]:
        assert tok.encode(text) == base.encode(text)
    assert len(other) > 15 and tok.vocab_size == base.vocab_size + 500


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: not HAN.holds(text)))
def test_any_text_without_it_keeps_its_ids(
    text: str, bases: dict[str, Tokenizer], extended: dict[str, Tokenizer]
) -> None:
    """A new token that holds only the bytes that some other script shares with Chinese."""
    for name in NAMES:
        assert extended[name].encode(text) == bases[name].encode(text)


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from([*ODD, *CHINESE[:20], " ", "，", "\u3000", "e\u0301"]), max_size=5).map("".join))
def test_what_is_encoded_comes_back(text: str, extended: dict[str, Tokenizer]) -> None:
    """A merge whose token is not the bytes of its parts."""
    for name in ("gpt2", "with some Chinese", "released"):  # the others normalise
        assert extended[name].decode(extended[name].encode(text)) == text


@pytest.mark.parametrize("name", NAMES)
def test_every_new_token_is_reached(name: str, bases: dict[str, Tokenizer], extended: dict[str, Tokenizer]) -> None:
    """Rows of the embedding that no text ever trains: merges learnt from scratch would leave many here."""
    base, tok = bases[name], extended[name]
    parts = set()
    for i in range(base.vocab_size, tok.vocab_size):
        token = tok.decode_bytes([i])
        texts = completions(token)
        if len(texts) == 1:
            assert tok.encode(texts[0]) == [i]  # whole characters are one token by themselves
        else:
            parts.add(i)
            assert any(i in tok.encode(text) for text in texts)
            assert all(HAN.holds(text) for text in texts)
    assert unreachable(tok, base.vocab_size) == [] and len(parts) < 180
    used = {i for ids in tok.encode_batch(CHINESE) for i in ids}
    whole = set(range(base.vocab_size, tok.vocab_size)) - parts
    assert len(whole & used) > 0.8 * len(whole)  # the others are only parts of longer ones in these very texts
    before, after = (sum(map(len, each.encode_batch(CHINESE))) for each in (base, tok))
    assert after < 0.72 * before


@pytest.mark.parametrize("name", NAMES)
def test_old_ids_and_control_ids_stay(
    name: str, bases: dict[str, Tokenizer], extended: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """Added tokens that are numbered anew, a control id that text can spell, a file that reads otherwise."""
    base, tok = bases[name], extended[name]
    assert all(
        tok.decode_bytes([i], markers=True) == base.decode_bytes([i], markers=True) for i in range(base.vocab_size)
    )
    assert tok.control_ids == base.control_ids and tok.eos == base.eos and tok.has_markers == base.has_markers
    text = "".join([*MARKERS, EOS, "<|im_start|><think>", *CHINESE[:3]])
    assert not tok.control_ids & set(tok.encode(text))
    tok.save(tmp_path)
    again = load(tmp_path)
    assert again.sha256 == tok.sha256 and again.encode(text) == tok.encode(text)
    more = add_markers(again) if not again.has_markers else again
    assert more.encode(text) == tok.encode(text) and more.vocab_size - tok.vocab_size in (0, 10)
    transformers = pytest.importorskip("transformers")
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*CHINESE[:10], *CODE[:3]):
        assert stock(text, add_special_tokens=False).input_ids == tok.encode(text)
    assert stock.eos_token_id == tok.eos


def test_ids_with_holes_are_not_filled(tmp_path: Path) -> None:
    """In a vocabulary with special ids far behind the others, a new token must not take one of these, nor a hole."""
    write_released(tmp_path)
    names = {"<eoh>": 1007, "<eot>": 1003, "<eoc>": 1001, "<eor>": 1000, "<eom>": 1010}
    (tmp_path / "added_tokens.json").write_text(json.dumps(names))
    tok = extend(load(tmp_path), CHINESE, 50)
    assert tok.vocab_size == 1011 + 50 and all(tok.marker(name) == [i] for name, i in names.items())
    assert unreachable(tok, 1011) == []


def test_extending_twice_and_for_two_scripts(bases: dict[str, Tokenizer]) -> None:
    """A second language must leave the first one's ids alone, and its script be found in its texts."""
    first = extend(bases["gpt2"], CHINESE, 100)
    russian = ["Привет, мир! Как дела? Хорошо, спасибо. Это просто текст на русском языке.\n" * 5]
    second = extend(first, russian, 30)
    assert all(second.encode(text) == first.encode(text) for text in [*CHINESE[:50], *CODE[:5]])
    assert (
        len(second.encode(russian[0])) < 0.7 * len(first.encode(russian[0]))
        and unreachable(second, first.vocab_size) == []
    )
    _, script = split(bases["gpt2"], [*CHINESE[:50], "これはペンです。ひらがなとカタカナ。" * 200])
    assert script.names == ("Han", "Kana")


# ---------------------------------------------------------------- learning


def slowly(words: list[list[int]], counts: list[int], table: list[bytes], num: int) -> list[tuple[int, int]]:
    """The same learning by counting all pairs anew for each merge."""
    table, merges = list(table), []
    while len(merges) < num:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in zip(words, counts):
            for pair in pairwise(word):
                pairs[pair] += count
        good = [
            (-count, pair)
            for pair, count in pairs.items()
            if count >= 2
            and table[pair[0]] + table[pair[1]] not in table
            and sound(table[pair[0]], table[pair[1]], HAN)
        ]
        if not good:
            break
        left, right = min(good)[1]
        merges.append((left, right))
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == (left, right):
                    word[at : at + 2] = [len(table)]
                at += 1
        table.append(table[left] + table[right])
    return merges


@pytest.mark.parametrize("seed", range(4))
def test_learning_equals_the_slow_way(seed: int, bases: dict[str, Tokenizer]) -> None:
    """Counts or places that go wrong after a merge, above all in runs such as 哈哈哈, whose pairs overlap."""
    base = bases["with some Chinese"]
    rng = random.Random(seed)
    signs = "哈哈哈哈一二三人你好 。，a"
    text = "".join(rng.choices(signs, k=1500)) + "".join(rng.choices("哈好", k=300))
    words, script = split(base, [text])
    borders = [0, *words.lengths.cumsum().tolist()]
    cut = [words.ids[a:b].tolist() for a, b in pairwise(borders)]
    table = [base.decode_bytes([i], markers=True) for i in range(base.vocab_size)]
    want = slowly(cut, words.counts.tolist(), table, 80)
    assert len(want) > 40 and learn(base, words, script, 80, set()) == want


def test_learning_sees_what_encoding_does(bases: dict[str, Tokenizer]) -> None:
    """Learning that cuts a word otherwise than the finished tokenizer chooses merges that do not occur."""
    base = bases["with some Chinese"]
    words, script = split(base, CHINESE)
    tok = with_merges(base, learn(base, words, script, 300, set()))
    cut = Words(words.ids, words.lengths, words.counts)
    again, _ = split(tok, CHINESE)
    assert int((again.lengths * again.counts).sum()) < int((cut.lengths * cut.counts).sum())
    total = sum(map(len, tok.encode_batch(CHINESE)))
    fewer = sum(map(len, base.encode_batch(CHINESE))) - total
    merged = sum(
        (len(base.pieces(tok.decode_bytes([i]))) - 1) * n
        for i, n in Counter(i for ids in tok.encode_batch(CHINESE) for i in ids).items()
        if i >= base.vocab_size
    )
    assert fewer == merged


def test_a_beginning_stays_reachable_when_all_its_characters_are_frequent(bases: dict[str, Tokenizer]) -> None:
    """The two bytes that 64 characters begin with: once each of the 64 has a token, nothing would end in them."""
    block = [chr(code) for code in range(0x4E00, 0x4E40)]
    text = "。".join(sign for number, sign in enumerate(block) for _ in range(100 - number))
    tok = extend(bases["gpt2"], [text], 100)
    whole = [sign for sign in block if len(tok.encode(sign)) == 1]
    assert whole == block[:-1]  # the rarest gave way
    assert len(tok.encode(block[-1])) == 2 and unreachable(tok, bases["gpt2"].vocab_size) == []


def test_which_merges_are_sound() -> None:
    """Tokens that end or begin within a character show as U+FFFD elsewhere, and are hard to reach."""
    zhong, guo = "中".encode(), "国".encode()
    for left, right in (
        (zhong, guo),
        (zhong[:1], zhong[1:2]),
        (zhong[:2], zhong[2:]),
        (zhong[:1], zhong[1:]),
        (b" ", zhong),
    ):
        assert sound(left, right, HAN)
    for left, right in (
        (zhong, guo[:2]),  # begins another character
        (zhong[1:2], zhong[2:]),  # the end of who knows what
        ("“".encode()[:1], "“".encode()[1:2]),  # E2 80 begins the signs of English too
        ("é".encode()[:1], "é".encode()[1:]),
        (b"a", b"b"),
        (zhong[2:], guo),
    ):
        assert not sound(left, right, HAN)
    assert HAN.begins("𠀀".encode()[:2]) and not HAN.begins("🙂".encode()[:2]) and not HAN.begins(b"\xed\xa0")


def test_what_cannot_be_extended_is_said(bases: dict[str, Tokenizer]) -> None:
    """English texts would give merges that change English; no new id is no extension."""
    with pytest.raises(ValueError, match="no writing but Latin"):
        extend(bases["gpt2"], ["only English, naïve “quotes” and 🙂"], 10)
    with pytest.raises(ValueError, match="no writing but Latin"):
        extend(bases["gpt2"], [], 10)
    with pytest.raises(ValueError, match="0 new ids"):
        extend(bases["gpt2"], CHINESE, 0)
    assert extend(bases["gpt2"], ["中国中国"], 1000).vocab_size < bases["gpt2"].vocab_size + 10  # no more pairs


def test_real_text(bases: dict[str, Tokenizer]) -> None:
    """On real Chinese the gain must be large, and a real English book must keep each id."""
    if "MOSS_TEST_DATA" not in os.environ:
        pytest.skip("set MOSS_TEST_DATA to the folder with real data")
    corpus = Path(os.environ["MOSS_TEST_DATA"]) / "corpus"
    chinese = (corpus / "zh_poetry.txt").read_text(encoding="utf-8")[:60_000]
    english = (corpus / "en_shakespeare.txt").read_text(encoding="utf-8")[:300_000]
    for base in (bases["gpt2"], bases["qwen"]):
        tok = extend(base, [chinese], 800)
        assert tok.encode(english) == base.encode(english)
        assert len(tok.encode(chinese)) < 0.5 * len(base.encode(chinese))


# ---------------------------------------------------------------- rows for new ids


@pytest.mark.parametrize(
    ("family", "tied", "spare"), [("llama", True, 0), ("llama", False, 7), ("moss", False, 0), ("moss", False, 2000)]
)
def test_new_rows_are_means_of_old_ones(family: str, tied: bool, spare: int, bases: dict[str, Tokenizer]) -> None:
    """A row that begins elsewhere, an old row that moves by a bit, a head or a bias that was forgotten."""
    base = bases["gpt2"]
    tok = extend(base, CHINESE, 40)
    size = {"num_layers": 1, "hidden": 8, "num_heads": 2, "family": family}
    model = Decoder(ModelConfig(base.vocab_size + spare, tie_embeddings=tied, **size))  # type: ignore[arg-type]
    tables = {name: p for name, p in model.named_parameters() if name.split(".")[0] in ("embed", "head")}
    with torch.no_grad():
        for number, table in enumerate(tables.values()):  # row i is i + 0.5 x its table
            table.copy_((torch.arange(len(table)) + 0.5 * number).reshape(-1, *[1] * (table.ndim - 1)).expand_as(table))
    assert len(tables) == (1 if tied else 2 if family == "llama" else 3)
    grown = grow(model, base, tok)
    assert grown.config.vocab_size == max(base.vocab_size + spare, tok.vocab_size)
    after = dict(grown.named_parameters())
    for name, parameter in model.named_parameters():
        old = base.vocab_size if name in tables else len(parameter)
        assert torch.equal(after[name][:old], parameter[:old])
    first = tok.decode_bytes([base.vocab_size])  # two of the three bytes of a character, or more of them
    pieces = base.pieces(first)
    assert b"".join(base.decode_bytes([i]) for i in pieces) == first and len(pieces) > 1
    for i in range(base.vocab_size, tok.vocab_size):
        mean = sum(base.pieces(tok.decode_bytes([i]))) / len(base.pieces(tok.decode_bytes([i])))
        for number, name in enumerate(tables):
            assert torch.allclose(after[name][i], torch.tensor(mean + 0.5 * number), rtol=1e-6)
    ids = torch.tensor([tok.encode("print(1) 中文")])
    assert grown(ids).shape == (1, ids.shape[1], grown.config.vocab_size) and grown(ids).isfinite().all()


def test_a_new_row_by_hand(bases: dict[str, Tokenizer]) -> None:
    """The one figure worked out on paper: 中 is the bytes E4 B8 AD, and its row is the mean of theirs."""
    base = bases["gpt2"]
    tok = extend(base, ["中中中"], 2)
    model = Decoder(ModelConfig(base.vocab_size, num_layers=1, hidden=2, num_heads=1, tie_embeddings=True))
    one, two, three = (base.pieces(bytes([byte]))[0] for byte in (0xE4, 0xB8, 0xAD))
    with torch.no_grad():
        for i, row in ((one, (3.0, 0.0)), (two, (6.0, 3.0)), (three, (0.0, -6.0))):
            model.embed.weight[i] = torch.tensor(row)
    grown = grow(model, base, tok)
    assert tok.encode("中") == [base.vocab_size + 1]
    assert grown.embed.weight[base.vocab_size].tolist() == [4.5, 1.5]  # E4 B8
    assert grown.embed.weight[base.vocab_size + 1].tolist() == [3.0, -1.0]


def test_a_tokenizer_of_another_base_is_refused(bases: dict[str, Tokenizer]) -> None:
    """Rows would be given to the wrong ids, and nothing would say so."""
    model = Decoder(ModelConfig(bases["gpt2"].vocab_size, num_layers=1, hidden=8, num_heads=1))
    with pytest.raises(ValueError, match="does not extend"):
        grow(model, bases["gpt2"], bases["with some Chinese"])
    with pytest.raises(ValueError, match="fewer than"):
        grow(model, bases["with some Chinese"], bases["gpt2"])
