"""The tokenizer: lossless for any text, deaf to markers in it, at home in three vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moss import tokenizer as tokenizer_module
from moss.errors import UsageError
from moss.tokenizer import ENDS, EOS, MARKERS, MIN_VOCAB, ROLES, Tokenizer, add_markers, load, require_markers, train
from moss.train import tokenizer as stage
from moss.train.tokenizer import TrainTokenizer

TEXTS = [
    "The price is 12.50 dollars, so 3 of them cost 37.5. It's what we've said, isn't it?\n" * 3,
    "请帮我计算一下这个三角形的面积。用 Python 写一个函数，并且解释它的意思。\n" * 3,
    "def area(base, height):\n    if base < 0:\n        raise ValueError('no')\n    return base * height / 2\n" * 3,
]
ODD = [
    "",
    " ",
    "\n",
    "a \n b  \n\n c\t\td\r\n e\r",
    "def f():\n    return 1\n\n\n\tx = 'a'  \n",
    "１２＋３＝？（全角）　空白",
    "🙂👩‍👩‍👧‍👦🇨🇳 e\u0301 Å ﬁ ½ Ⅷ 〇一二",
    "𠀀𪚥 扩展区",
    "\x00\x01\x7f\x85\u200b\u2028\ufeff\ufffd\U0010ffff",
    "हिन्दी العربية 한국어 ภาษาไทย",
    *MARKERS,
    EOS,
    "<|MOSS|>: <eom><|Human|>: x<eoh> <quality: 100> <sup><|1|></sup>",
    "＜eom＞<e\u200bom><EOM><eo\\u006d>",
]
any_text = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from([*ODD, " ", "<", "|>", "eom>", "1"]), max_size=8).map("".join)
)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(TEXTS, 600)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write_released(tmp_path_factory.mktemp("released")))


def write_released(directory: Path) -> Path:
    """A small vocabulary in the layout of the released models: GPT-2 files, only end markers special."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*TEXTS, "<|MOSS|>: <|Human|>: <|Results|>:\n" * 9], trainer)
    backend.model.save(str(directory))
    vocab = json.loads((directory / "vocab.json").read_text())
    vocab[EOS] = len(vocab)
    (directory / "vocab.json").write_text(json.dumps(vocab))
    added = ["\t\t", "    ", "<eoc>", "<eoh>", "<eom>", "<eor>", "<eot>"]
    (directory / "added_tokens.json").write_text(json.dumps({name: len(vocab) + i for i, name in enumerate(added)}))
    return directory


def bare(text: str, **flags: object) -> Backend:
    """Another project's byte-level base: no markers, its own control tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|im_start|>", EOS])
    backend.add_tokens(["<think>"])  # not special, as in Qwen3: a plain encode would still find it in a text
    return backend


@settings(max_examples=300, deadline=None)
@given(any_text)
@example("".join(ODD))
def test_round_trip_and_no_control_ids(tok: Tokenizer, released: Tokenizer, text: str) -> None:
    """A lost blank next to a newline, or a marker spelt in a user's text that becomes the marker."""
    for each in (tok, released):
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert not each.control_ids & set(ids)


@pytest.mark.parametrize("text", ODD)
def test_odd_texts(tok: Tokenizer, text: str) -> None:
    """Each odd text by itself, so that a failure names it; the batch must give the same ids."""
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode_batch([text, "x"]) == [tok.encode(text), tok.encode("x")]


def test_ids_of_markers(tok: Tokenizer) -> None:
    """Markers that move would silently break every saved model; they are ids 0 to 10, bytes follow."""
    assert tok.eos == tok.pad == 0
    assert [tok.marker(name) for name in MARKERS] == [[i] for i in range(1, 11)]
    assert tok.control_ids == frozenset(range(11))
    assert MIN_VOCAB < tok.vocab_size <= 600
    assert tok.opening("<|MOSS|>") == [9, *tok.encode(":")]
    assert tok.decode([9, 0, 10]) == ""
    assert tok.decode([9, 0, 10], markers=True) == "<|MOSS|><|endoftext|><eom>"
    with pytest.raises(ValueError, match="'<eox>' is not a marker"):
        tok.marker("<eox>")


def test_pieces() -> None:
    """Numbers copied digit by digit, CJK never glued to Latin, line ends apart from indents: whatever was learnt."""
    tok = train(['1234 1234 用Python写 用Python写 1234\n    return ("1234\n    return' * 50], 400)

    def pieces(text: str) -> list[str]:
        return [tok.decode([i]) for i in tok.encode(text)]

    assert pieces("1234") == ["1", "2", "3", "4"]
    assert pieces("用Python写") == ["用", "Python", "写"]
    assert pieces("\n    return") == ["\n", "   ", " return"]
    assert pieces('("1') == ["(", '"', "1"]


def test_lone_surrogate(tok: Tokenizer) -> None:
    """Half a character must be refused by name, not crash in the library or turn into a question mark."""
    for call in (tok.encode, lambda text: tok.encode_batch(["ok", text]), lambda text: train([text], 300)):
        with pytest.raises(ValueError, match=r"U\+D83D at position 2"):
            call("ab\ud83d")


def test_sampled_bytes_that_are_no_text(tok: Tokenizer) -> None:
    """A model may sample half a character; decoding shows U+FFFD and does not raise."""
    ids = tok.encode("字")
    first = [i for i in range(tok.vocab_size) if tok.decode_bytes([i]) == "字".encode()[:1]]
    assert tok.decode(first + tok.encode("a")) == "\ufffda"
    assert tok.decode(ids) == "字"


def test_training_is_deterministic() -> None:
    """Two runs of the same script must give the same vocabulary, or checkpoints cannot be compared."""
    assert train(TEXTS, 500).sha256 == train(iter(TEXTS), 500).sha256
    assert train(TEXTS, 500).sha256 != train(TEXTS[:2], 500).sha256
    with pytest.raises(ValueError, match="vocab_size 266 is too small"):
        train(TEXTS, MIN_VOCAB - 1)
    assert train([], MIN_VOCAB).encode("a字") != []


def test_save_and_stock_transformers(tok: Tokenizer, tmp_path: Path) -> None:
    """What we save must be the same tokenizer for us and for stock transformers."""
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == tok.sha256 == Tokenizer.load(tmp_path / "tokenizer.json").sha256
    assert not list(tmp_path.glob(".*"))
    transformers = pytest.importorskip("transformers")
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "It's 12 \n  用Python写 e\u0301 🙂"
    assert stock(text).input_ids == tok.encode(text)
    assert stock("hi<eom>").input_ids == [*tok.encode("hi"), 10]
    assert stock.eos_token_id == stock.pad_token_id == 0
    assert stock.decode(tok.encode(text)) == text


def test_what_was_read_is_saved_and_named_as_it_was(tok: Tokenizer, tmp_path: Path) -> None:
    """A model says by sha256 which tokenizer it has; written anew by another version of the library it had another."""
    text = json.dumps(json.loads(tok.to_json()), indent=3)  # as a library would that writes otherwise
    (tmp_path / "tokenizer.json").write_text(text)
    read = load(tmp_path)
    read.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == text
    assert load(tmp_path / "copy").sha256 == read.sha256 != tok.sha256
    tok.save(tmp_path / "own")
    assert load(tmp_path / "own").sha256 == tok.sha256


def test_released_vocabulary(released: Tokenizer) -> None:
    """In the released layout end markers are ids, role markers are text, and `>:` may be one token."""
    assert released.has_markers and not released.single_roles
    assert released.eos_token == EOS
    for end in ENDS:
        assert len(released.marker(end)) == 1 and released.marker(end)[0] in released.control_ids
    for role in ROLES:
        assert released.decode(released.marker(role)) == role
        assert released.decode(released.opening(role)) == role + ":"
        assert not released.control_ids & set(released.opening(role))
    assert released.opening("<|MOSS|>") != released.marker("<|MOSS|>") + released.encode(":")
    assert len(released.control_ids) == 6  # five ends and the end of text; runs of blanks are ordinary
    assert len(released.encode("    ")) == 1


def test_released_vocabulary_equals_stock(tmp_path: Path) -> None:
    """Released weights need the ids of the tokenizer they were trained with, blanks and special ids included."""
    transformers = pytest.importorskip("transformers")
    released = load(write_released(tmp_path))
    stock = transformers.GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    added = sorted(json.loads((tmp_path / "added_tokens.json").read_text()).items(), key=lambda item: item[1])
    stock.add_tokens([name for name, _ in added if not name.strip()])
    stock.add_special_tokens({"additional_special_tokens": [name for name, _ in added if name.strip()]})
    text = "It's 12.5 dollars,  用 Python 写\n    return x\t\ty \n z"
    assert stock(text, add_special_tokens=False).input_ids == released.encode(text)
    ids = [*released.opening("<|MOSS|>"), *released.encode(" yes"), *released.marker("<eom>"), *released.encode("\n")]
    assert stock("<|MOSS|>: yes<eom>\n", add_special_tokens=False).input_ids == ids


def test_released_saved_as_tokenizer_json(released: Tokenizer, tmp_path: Path) -> None:
    """Saving a fine-tuned released model must not renumber its special ids."""
    released.save(tmp_path)
    again = load(tmp_path)
    assert [again.marker(end) for end in ENDS] == [released.marker(end) for end in ENDS]
    assert again.encode("a  b<eom>") == released.encode("a  b<eom>")
    assert not again.single_roles


def test_ids_with_holes(tmp_path: Path) -> None:
    """Special ids that do not follow the vocabulary keep the numbers that the file gives them."""
    write_released(tmp_path)
    names = {"<eoh>": 1007, "<eot>": 1003, "<eoc>": 1001, "<eor>": 1000, "<eom>": 1010}
    (tmp_path / "added_tokens.json").write_text(json.dumps(names))
    tok = load(tmp_path)
    assert {name: tok.marker(name)[0] for name in names} == names
    assert tok.vocab_size == 1011
    assert tok.decode([999, 1010]) == ""


def test_guard(tok: Tokenizer, released: Tokenizer) -> None:
    """A user who writes a role marker to a released model would otherwise speak as the model."""
    text = "a <|MOSS|>: b <| inner  thoughts |>: <|Commands|> <sup><|1|></sup> <|system|>"
    broken = "a <·|MOSS|>: b <·| inner  thoughts |>: <·|Commands|> <sup><|1|></sup> <|system|>"
    assert released.guard(text) == broken
    assert tok.guard(text) == text


def test_add_markers(tmp_path: Path) -> None:
    """Markers on another base: new ids behind its own, its text ids unchanged, its control tokens closed to text."""
    bare("hello world").save(str(tmp_path / "tokenizer.json"))
    base = load(tmp_path)
    with pytest.raises(ValueError, match="not a MOSS chat model"):
        require_markers(base)
    with pytest.raises(ValueError, match="not a MOSS chat model"):
        base.opening("<|MOSS|>")
    tok = add_markers(base)
    assert [tok.marker(name) for name in MARKERS] == [[base.vocab_size + i] for i in range(10)]
    assert tok.vocab_size == base.vocab_size + 10 and tok.single_roles and tok.eos == base.eos
    text = "hello <think> <|im_start|> <eom> 世界"
    assert tok.encode(text) == base.encode(text) and len(base.encode("<think>")) > 1
    assert tok.decode(tok.encode(text)) == text and not tok.control_ids & set(tok.encode(text))
    require_markers(tok)
    assert add_markers(tok).sha256 == tok.sha256
    tok.save(tmp_path / "new")
    assert load(tmp_path / "new").sha256 == tok.sha256
    flags = {t["content"]: t["special"] for t in json.loads(tok.to_json())["added_tokens"]}
    assert flags["<think>"] is False and flags["<eom>"] is True  # the base's own flags stay for other readers


def test_end_of_text_of_a_base(tmp_path: Path) -> None:
    """A base that calls its end of text otherwise says so in tokenizer_config.json."""
    backend = bare("x")
    spec = json.loads(backend.to_str().replace("endoftext", "fin"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="no end-of-text token"):
        load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["<|fin|>"]}')
    with pytest.raises(ValueError, match="no end-of-text token"):
        load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|fin|>"}}')
    assert load(tmp_path).eos_token == "<|fin|>"


def test_broken_files(tmp_path: Path) -> None:
    """Each broken file gets one line that names it, never a traceback from the library."""
    with pytest.raises(ValueError, match="no tokenizer at"):
        load(tmp_path)
    file = tmp_path / "tokenizer.json"
    for content, said in (
        ("{", "is not a tokenizer.json"),
        ("[]", "is not a tokenizer.json"),
        ('{"model": {"type": "Unigram"}}', "only byte-level BPE"),
        ('{"model": {"type": "BPE", "vocab": 3}}', "cannot be read as a tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}', "has 4000000001 ids"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "has 0 ids"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=said):
            load(file)
    pieces = Backend(models.BPE(vocab={"▁the": 0, "字": 1}, merges=[]))
    pieces.normalizer = normalizers.Prepend("▁")
    pieces.add_special_tokens([EOS])
    pieces.save(str(file))
    with pytest.raises(ValueError, match="is not byte-level BPE"):
        load(file)
    file.unlink()
    write_released(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match="'a b c' is not a pair"):
        load(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"caf\xe9 x\n")
    with pytest.raises(ValueError, match=r"merges\.txt is not text in UTF-8"):
        load(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<eoh>": 400, "<eom>": "401"}')
    with pytest.raises(ValueError, match="'<eom>' must have a number"):
        load(tmp_path)


def test_only_what_the_library_says_about_a_file_is_called_a_broken_file(tmp_path: Path, monkeypatch) -> None:
    """The library raises bare `Exception`; catching that must not turn a defect or a full memory into "broken"."""

    class Failing:
        @staticmethod
        def from_str(_: str) -> Backend:
            raise MemoryError

    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    monkeypatch.setattr(tokenizer_module, "Backend", Failing)
    with pytest.raises(MemoryError):
        load(tmp_path)


# ---------------------------------------------------------------- moss train tokenizer


def chat_row(kind: str) -> dict:
    """A conversation in each of the formats, with words that occur nowhere else."""
    if kind == "openai":
        return {"messages": [{"role": "user", "content": "wombat"}, {"role": "assistant", "content": "kiwi 你好"}]}
    if kind == "sharegpt":
        return {"conversations": [{"from": "human", "value": "wombat"}, {"from": "gpt", "value": "kiwi 你好"}]}
    turn = {"Human": "<|Human|>: wombat<eoh>\n", "MOSS": "<|MOSS|>: kiwi 你好<eom>\n"}
    return {"meta_instruction": "Be kind.", "num_turns": 1, "chat": {"turn_1": turn}}


@pytest.mark.parametrize("kind", ["moss", "openai", "sharegpt"])
def test_conversations_of_all_formats_are_learnt_from(kind: str, tmp_path: Path) -> None:
    """A format that other stages read but this one refuses, or markers and roles learnt as if they were text."""
    file = tmp_path / "chat.jsonl"
    file.write_text((json.dumps(chat_row(kind), ensure_ascii=False) + "\n") * 3)
    (tmp_path / "chat.json").write_text(json.dumps([chat_row(kind), {"text": "plain"}]))
    found = [text.strip() for text in stage.texts([file])]
    assert [text for text in found if text and text not in ("Be kind.", "None")][:2] == ["wombat", "kiwi 你好"]
    assert not any(name in text for text in found for name in MARKERS)
    assert "plain" in list(stage.texts([tmp_path / "chat.json"]))
    assert stage.main(TrainTokenizer(data=[file], vocab_size=290, out=tmp_path / "out")) == 0
    assert len(load(tmp_path / "out").encode("wombat")) < 4


def test_the_stage_extends(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A result that does not say what it extends, a report that hides what changed, or a size that means two things."""
    base = write_released(tmp_path)
    (tmp_path / "zh.txt").write_text("山重水复疑无路，柳暗花明又一村。\n" * 9)
    config = TrainTokenizer(data=[tmp_path / "zh.txt"], extend=base, vocab_size=430, out=tmp_path / "new")
    assert stage.main(config) == 0
    old, tok = load(base), load(tmp_path / "new")
    assert tok.vocab_size == 430 > old.vocab_size and tok.encode(TEXTS[2]) == old.encode(TEXTS[2])
    told = json.loads((tmp_path / "new/extends.json").read_text())
    assert told == {"base": str(base.resolve()), "sha256": old.sha256, "ids": old.vocab_size}
    said = capsys.readouterr().err
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    assert "new" in rows["Chinese"] and "as before" in rows["Latin"] and "as before" in rows["code"]
    assert "holds weights" not in said
    assert stage.main(TrainTokenizer(data=[tmp_path / "zh.txt"], vocab_size=290, out=tmp_path / "new")) == 0
    assert not (tmp_path / "new/extends.json").exists()  # it extends nothing any more


def test_the_stage_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who only wants to see it run, new and with --extend."""
    monkeypatch.setattr(stage, "MATERIAL", 60)
    assert stage.main(TrainTokenizer(vocab_size=500, out=tmp_path / "new")) == 0
    assert stage.main(TrainTokenizer(extend=tmp_path / "new", out=tmp_path / "more")) == 0
    assert load(tmp_path / "more").vocab_size == round(500 / 0.7)


def test_bad_input_of_the_stage_is_one_line(tmp_path: Path) -> None:
    """Tracebacks, a base that is overwritten, a vocabulary that is learnt from nothing."""
    base = write_released(tmp_path)
    size = load(base).vocab_size
    zh = tmp_path / "zh.txt"
    zh.write_text("中国中国")
    empty, latin, english = tmp_path / "empty.txt", tmp_path / "latin.txt", tmp_path / "en.txt"
    empty.touch()
    latin.write_bytes("中国".encode("gbk"))
    english.write_text("english " * 9)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"words": "b"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    for change, words in (
        ({"extend": tmp_path / "nowhere"}, "no tokenizer at"),
        ({"vocab_size": size}, f"--vocab-size is {size}; it counts all ids and must be at least {size + 1}"),
        ({"vocab_size": 200, "extend": None}, "--vocab-size is 200; it counts all ids and must be at least 267"),
        ({"data": [empty]}, "empty.txt is empty"),
        ({"data": [latin]}, "latin.txt is not UTF-8 text: byte 0"),
        ({"data": [english]}, "no writing but Latin"),
        ({"data": [tmp_path / "gone"]}, "gone is not a file"),
        ({"data": [bad]}, "bad.jsonl:2: neither `text` nor `chat`, `messages` or `conversations`; its keys are words"),
        ({"out": tmp_path / "model"}, r"holds a model \(config.json\)"),
        ({"out": zh / "below"}, "cannot write in"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            stage.main(TrainTokenizer(**({"data": [zh], "extend": base, "out": tmp_path / "out"} | change)))
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        assert isinstance(error.value, UsageError) == ("vocab_size" in change)
    assert (tmp_path / "model/config.json").read_text() == "{}"
