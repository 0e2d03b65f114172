"""Rows from shards, of one source or several: each token learnt once an epoch, shares exact, all from the position."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss.data import mix, tokens
from moss.data.mix import Mixture, TokenRows, in_whole_rows, num_bins, parse
from moss.data.pack import best_fit
from moss.data.tokens import Tokens, prepare
from moss.errors import UsageError
from moss.tokenizer import Tokenizer, train
from tests.test_tokenizer import TEXTS


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(TEXTS, 400)


def shards(texts: list[str], tok: Tokenizer, folder: Path, part: int = 1 << 20) -> Tokens:
    """Documents as shards of about `part` bytes."""
    folder.mkdir(parents=True)
    source = folder / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PART", (part, part))
        patch.setattr("os.cpu_count", lambda: 1)
        return prepare([source], tok, folder / "tokens")


def pieces(batch: dict[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """(ids, learnt ids) of each document's piece in a batch."""
    found = []
    for ids, mask, segments, positions in zip(*(batch[name] for name in ("ids", "mask", "segments", "positions"))):
        for number in range(1, int(segments.max()) + 1):
            here = segments == number
            assert positions[here].tolist() == list(range(int(here.sum())))
            found.append((ids[here].tolist(), ids[here & (mask == 1)].tolist()))
    return found


# ---------------------------------------------------------------- one source


def test_every_token_is_a_target_once_with_the_token_before_it(tok: Tokenizer, tmp_path: Path) -> None:
    """A first token that is never learnt, one at a cut that is learnt twice, or context from another document."""
    texts = ["a", "用 Python 写", "one two three four five six seven " * 3]
    found = shards(texts, tok, tmp_path / "a")
    rows = TokenRows(found, length=8)
    cut = sorted(pieces(rows.batch(0, len(rows))))
    want = []
    for text in texts:
        whole = [tok.eos, *tok.encode(text), tok.eos]  # the first is context
        want += [(whole[at : at + 8], whole[at + 1 : at + 8]) for at in range(0, len(whole) - 1, 7)]
    assert cut == sorted(want)
    assert sum(len(learnt) for _, learnt in cut) == found.num_tokens == sum(len(tok.encode(text)) + 1 for text in texts)
    assert rows.fill == sum(len(ids) for ids, _ in cut) / (8 * len(rows))


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60), seed=st.integers(0, 5))
def test_bins_are_counted_without_filling_them(lengths: list[int], seed: int) -> None:
    """An epoch whose length is not what the packing then gives: rows left out, or an index out of range."""
    sizes = np.array(lengths)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    assert num_bins(sizes, 16) == len(best_fit(sizes, 16, order.tolist()))


def test_an_epoch_has_every_row_once_whatever_the_batch(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that come twice or never where groups of shards or epochs meet, or that depend on how they are asked for."""
    monkeypatch.setattr(mix, "GROUP", 3)
    texts = [f"{number} " + TEXTS[number % 3] * (number % 4) for number in range(120)]
    found = shards(texts, tok, tmp_path / "a", part=2000)
    assert len(found.shards) > 7
    rows = TokenRows(found, length=32, seed=3)
    size = len(rows)
    one = Counter(str(piece) for piece in pieces(rows.batch(0, size)))
    two = Counter(str(piece) for piece in pieces(rows.batch(size, size)))
    assert one == two and sum(one.values()) == sum(-(-(len(tok.encode(text)) + 1) // 31) for text in texts)
    together = rows.batch(size - 20, 40)
    again = TokenRows(found, 32, 3)
    alone = [again.batch(at, 1) for at in range(size - 20, size + 20)]
    for name, values in together.items():
        assert np.array_equal(values, np.concatenate([part[name] for part in alone]))
    first = [rows.batch(at, 1)["ids"].tolist() for at in range(size)]
    second = [rows.batch(size + at, 1)["ids"].tolist() for at in range(size)]
    assert first != second  # another order, another company
    assert first != TokenRows(found, 32, 4).batch(0, size)["ids"][:, None].tolist()
    assert rows.record() == TokenRows(Tokens.open(found.folder, tok), 32, 3).record()


def test_damage_is_found_before_it_is_trained_on(tok: Tokenizer, tmp_path: Path) -> None:
    """Ids that a disk has changed since they were written."""
    found = shards(TEXTS, tok, tmp_path / "a")
    file = found.files(0)[0]
    file.write_bytes(file.read_bytes()[:-2] + b"\x01\x01")
    rows = TokenRows(found, 32)
    with pytest.raises(ValueError, match=r"00000-00000\.bin is damaged"):
        rows.batch(0, 1)


# ---------------------------------------------------------------- several


@pytest.fixture(scope="module")
def sources(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenRows]:
    """Three sources of 12, 7 and 3 packed rows whose documents say where they are from."""
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for name, rows in (("en", 12), ("zh", 7), ("code", 3)):
        texts = [f"{name} {number} " + "x y z " * 9 for number in range(rows)]
        made[name] = TokenRows(shards(texts, tok, folder / name), length=max(len(tok.encode(t)) for t in texts) + 2)
    length = max(rows.length for rows in made.values())
    made = {name: TokenRows(rows.tokens, length) for name, rows in made.items()}
    assert [len(rows) for rows in made.values()] == [12, 7, 3]
    return made


def drawn(mixture: Mixture, tok: Tokenizer, position: int, count: int) -> list[str]:
    """`en 3` for each row: which source, and which of its documents."""
    batch = mixture.batch(position, count)
    return [" ".join(tok.decode(ids).split()[:2]) for ids in batch["ids"]]


def test_shares_are_exact_and_even(sources: dict[str, TokenRows], tok: Tokenizer) -> None:
    """Shares that random draws only come near to, or that hold in the end but not on the way."""
    mixture = Mixture(sources, {"en": 57.1, "zh": 28.2, "code": 14.7})
    assert mixture.counts.tolist() == [571, 282, 147]
    got = [row.split()[0] for row in drawn(mixture, tok, 0, 2000)]
    assert Counter(got) == {"en": 1142, "zh": 564, "code": 294}
    for name, share in (("en", 0.571), ("zh", 0.282), ("code", 0.147)):
        ahead = [got[:n].count(name) - share * n for n in range(0, 2001, 7)]
        assert min(ahead) > -1.5 and max(ahead) < 1.5
    assert mixture.shares == pytest.approx([0.571, 0.282, 0.147])
    assert mixture.epochs(1200) == pytest.approx({"en": 57.1, "zh": 48.342857, "code": 58.8}, abs=1e-5)


def test_a_period_by_hand(sources: dict[str, TokenRows], tok: Tokenizer) -> None:
    """Times (k + 1/2) / m: of 3 rows of one source and 1 of another, the one stands in the middle."""
    mixture = Mixture({"en": sources["en"], "zh": sources["zh"]}, {"en": 3, "zh": 1})
    got = [row.split()[0] for row in drawn(mixture, tok, 0, 8)]
    assert got == ["en", "en", "zh", "en"] * 2  # times 1/6, 3/6, 5/6 and 1/2; of equals the first source


def test_no_row_comes_again_before_all_have_come(sources: dict[str, TokenRows], tok: Tokenizer) -> None:
    """A small source whose few rows are drawn again and again while others never come."""
    mixture = Mixture(sources, {"en": 2, "zh": 2, "code": 1})
    rows = drawn(mixture, tok, 0, 400)
    for name, size in (("en", 12), ("zh", 7), ("code", 3)):
        own = [row for row in rows if row.startswith(name)]
        for begin in range(0, len(own) - size, size):
            assert len(set(own[begin : begin + size])) == size
    plain = Mixture(sources)  # without shares each row comes once
    assert len(plain) == 22 and len(set(drawn(plain, tok, 0, 22))) == 22 == len(set(drawn(plain, tok, 22, 22)))


def test_the_position_is_all_there_is(sources: dict[str, TokenRows]) -> None:
    """A resumed run, another micro-batch or another rank that sees other rows than one unbroken process."""
    mixture = Mixture(sources, {"en": 1, "zh": 1.5, "code": 0.25})
    whole = mixture.batch(30, 24)
    for size in (1, 5, 8):
        again = Mixture(sources, {"en": 1, "zh": 1.5, "code": 0.25})
        parts = [again.batch(at, min(size, 54 - at)) for at in range(30, 54, size)]
        for name, values in whole.items():
            assert np.array_equal(values, np.concatenate([part[name] for part in parts]))
    assert whole["segments"].max() == 1  # one document a row here, so rows of one source only
    assert mixture.record() != Mixture(sources, {"en": 1, "zh": 1, "code": 1}).record()
    assert 0 < mixture.fill <= 1


def test_proportions_in_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A period that never ends, or a source of 0.7 % that is rounded away."""
    paper = [Fraction(part) for part in ("57.1", "17.6", "10.6", "0.7", "14.1")]
    assert in_whole_rows(paper) == [571, 176, 106, 7, 141]
    assert in_whole_rows([Fraction(4), Fraction(2)]) == [2, 1]
    monkeypatch.setattr(mix, "PERIOD", 1000)
    rounded = in_whole_rows([Fraction(1_000_003), Fraction(999_983), Fraction(5)])
    assert rounded == [500, 499, 1] and sum(rounded) == 1000


# ---------------------------------------------------------------- on the command line


def test_sources_from_the_command_line(tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path taken for a name, a share for a part of a path, a folder of shards for a folder of text."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "en=odd:1.txt", "folder/c.txt", "x:2"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}\n")

    def said(*entries: str) -> list[tuple[str, list[str], float | None]]:
        found = parse([Path(entry) for entry in entries], "--data")
        return [(source.name, [str(file) for file in source.files], source.share) for source in found]

    assert said() == []
    assert said("a.jsonl", "b.jsonl") == [("text", ["a.jsonl", "b.jsonl"], None)]
    assert said("en=a.jsonl:57.1", "zh=b.jsonl:14") == [("en", ["a.jsonl"], 57.1), ("zh", ["b.jsonl"], 14.0)]
    assert said("en=a.jsonl:57", "zh=folder:3", "en=b.jsonl:3") == [
        ("en", ["a.jsonl", "b.jsonl"], 60.0),
        ("zh", ["folder/c.txt"], 3.0),
    ]
    assert said("en=a.jsonl:57", "en=b.jsonl") == [("en", ["a.jsonl", "b.jsonl"], 57.0)]
    assert said("en=odd:1.txt") == [("text", ["en=odd:1.txt"], None)]
    assert said("zh=x:2") == [("zh", ["x:2"], None)]
    ready = shards(TEXTS, tok, tmp_path / "ready").folder
    (source,) = parse([Path(f"en={ready}")], "--data")
    assert source.tokens == ready and not source.files


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["en=missing.jsonl:5"], "--data: missing.jsonl is not a file"),
        (["nowhere=5"], "--data: 5 is not a file"),
        (["en=a.jsonl:1.2.3"], "1.2.3 is no share"),
        (["en=a.jsonl:5", "zh=b.jsonl"], "zh has no share above 0, en has one"),
        (["en=a.jsonl:0"], "en has no share above 0"),
        (["en=empty.jsonl"], "empty.jsonl is empty"),
    ],
)
def test_bad_sources_are_one_line(
    entries: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip in a long command that trains on half of the data."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text("{}\n")
    Path("empty.jsonl").touch()
    with pytest.raises(ValueError, match=words):
        parse([Path(entry) for entry in entries], "--data")


def test_a_folder_of_shards_stands_alone(tok: Tokenizer, tmp_path: Path) -> None:
    """Text that is silently left out because the name is taken by what was tokenised before."""
    folder = shards(TEXTS, tok, tmp_path / "a").folder
    (tmp_path / "b.txt").write_text("text")
    both = [Path(f"en={folder}"), Path(f"en={tmp_path}/b.txt")]
    for entries in (both, both[::-1]):
        with pytest.raises(UsageError, match="nothing can be added"):
            parse(entries, "--data")


def test_tokenising_beforehand(tok: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A command that makes other shards than training would, or that cannot be pointed at again."""
    tok.save(tmp_path / "tok")
    for name in ("en", "zh"):
        (tmp_path / f"{name}.txt").write_text(TEXTS[name == "zh"])
    data = [Path(f"{name}={tmp_path}/{name}.txt") for name in ("en", "zh")]
    assert mix.main(mix.TokenShards(tmp_path / "tok", data, tmp_path / "tokens")) == 0
    assert capsys.readouterr().out.split() == [f"{tmp_path}/tokens/en", f"{tmp_path}/tokens/zh"]
    ready = [Path(f"{name}={tmp_path}/tokens/{name}:1") for name in ("en", "zh")]
    for source, text in zip(parse(ready, "--data"), TEXTS):
        assert source.tokens
        assert Tokens.open(source.tokens, tok).num_tokens == len(tok.encode(text)) + 1
    for data, words in (([], "no --data"), (ready, "holds shards already")):
        with pytest.raises(UsageError, match=words):
            mix.main(mix.TokenShards(tmp_path / "tok", data, tmp_path / "again"))
