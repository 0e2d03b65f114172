"""The grammar against the reader of commands: what it allows is read without complaint, what is read it allows."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from moss.chat import Dialog, Round, StreamParser, Turn, Until, render
from moss.engine import Engine, Sampling
from moss.engine import grammar as grammar_module
from moss.engine.grammar import PassGrammar, State, commands_grammar
from moss.tokenizer import EOS, Tokenizer, add_markers, load, train
from moss.tools.base import Tool, ToolError, standard_tools, tool
from moss.tools.calls import MAX_CALLS, read_commands
from tests.fakes import toy_model

STANDARD = standard_tools()
CALCULATOR = {"calculator": STANDARD["calculator"]}
LINES = [
    'None\nCalculate("37*12"), Solve("x+2=5", "x"), Calculate("1/2")\n',
    'Search("谁写了"红楼梦"？"), Search("the weather in Paris"), Paint("a cat", "a hat")\n',
    "<|Inner Thoughts|>: add\n<|Commands|>: None\n<|Results|>:\n<|MOSS|>: the answer is 42\n",
]


def fake(name: str, function: Callable[..., str]) -> Tool:
    return Tool(name.lower(), name, name, function)


@tool(key="paint", switch="Paint", api="Paint")
def paint(image: str, description: str) -> str:
    """Two arguments, both needed."""
    return image + description


def ours() -> Tokenizer:
    """A vocabulary as it is trained here: ten markers, quotes alone."""
    return train(LINES * 3, 360)


def gpt2() -> Backend:
    """A base whose quotes and brackets are merged with what stands beside them."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(LINES * 9, trainer)
    return backend


def released(folder: Path) -> Tokenizer:
    """The released layout: roles are text; here with holes between the ids."""
    gpt2().model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab[EOS] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    added = ["    ", "<eoc>", "<eoh>", "<eom>", "<eor>", "<eot>"]
    (folder / "added_tokens.json").write_text(json.dumps({name: len(vocab) + 3 * i for i, name in enumerate(added)}))
    return load(folder)


def other() -> Tokenizer:
    """Another project's base, with the ten markers added behind its own control ids."""
    backend = gpt2()
    backend.add_special_tokens([EOS, "<|im_start|>"])
    return add_markers(Tokenizer(backend))


@pytest.fixture(scope="module")
def toks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {"ours": ours(), "released": released(tmp_path_factory.mktemp("released")), "other": other()}


VOCABULARIES = pytest.mark.parametrize("vocabulary", ["ours", "released", "other"])


def follows(state: State, ids: Iterable[int]) -> bool:
    """Whether the state allows these ids one after the other; it has taken those before the first that it forbids."""
    for id in ids:
        if not state.mask()[id]:
            return False
        state.advance(id)
    return True


def at_commands(grammar: PassGrammar, tok: Tokenizer) -> State:
    """A state that stands right after `<|Commands|>:`."""
    state = grammar.start()
    assert follows(state, [*tok.marker("<eot>"), *tok.encode("\n"), *tok.opening("<|Commands|>")])
    return state


def allows(tok: Tokenizer, tools: Mapping[str, Tool], line: str, **options: int) -> bool:
    """Whether a whole line of commands, written after a blank as `render` does, is allowed up to its end."""
    state = at_commands(commands_grammar(tok, tools, **options), tok)
    return follows(state, [*tok.encode(" " + line), *tok.marker("<eoc>")])


def is_clean(line: str, tools: Mapping[str, Tool]) -> bool:
    """The specification: `None`, or calls that the turn loop would run, each in the next's sight."""
    calls = read_commands(line).calls
    by_name = {each.name: each for each in tools.values()}
    rest = line
    for number, call in enumerate(calls):
        if call.error or call.name not in by_name:
            return False
        try:
            by_name[call.name].read(call.args)
        except ToolError:
            return False
        before, found, rest = rest.partition(call.raw)
        if not found or not re.fullmatch(r" ?([,;，；、][ \n]?|\n)" if number else "", before):
            return False
    return rest == "" if calls else line == "None"


# ------------------------------------------------------------------------------------------- the line of commands

PIECES = [
    "Calculate", "Solve", "Search", "Paint", "None", "Sol", 'Calculate("', 'Calculate("1")', 'Solve("x=1", "x")',
    "(", ")", '"', '""', "\\", '\\"', "\\\\", ",", ", ", '")', '", "', '" , "', '"\n)', '"),', '"), ',
    " ", "\n", "\t", "；", "\u3000", "\x85", "\x1c", "\xa0", "x", "1+1", "é", "谁", "🙂", ".", "=",
    "<eoc>", "<|Commands|>",
]  # fmt: skip
pieces = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
arguments = st.one_of(pieces, st.text(max_size=8), st.sampled_from(["1+1", "", "f(x)", 'a "b" c']))
BLANKS = [chr(code) for code in range(0x110000) if chr(code).isspace()]
blanks = st.one_of(st.just(""), st.text(st.sampled_from(BLANKS), max_size=2))


@st.composite
def written_calls(draw: st.DrawFn) -> str:
    """A call with its argument as it is or escaped, with odd blanks."""
    name = draw(st.sampled_from(["Calculate", "Solve", "Search", "Paint"])) + draw(st.sampled_from(["", " ", "\t "]))
    escaped = draw(st.booleans())
    texts = draw(st.lists(arguments, min_size=1, max_size=3))
    quoted = ['"' + (text.replace('"', '\\"') if escaped else text) + '"' for text in texts]
    inner = "".join(draw(blanks) + text + draw(blanks) + "," for text in quoted)[:-1]
    return f"{name}({inner})"


@st.composite
def written_lines(draw: st.DrawFn) -> str:
    calls = draw(st.lists(written_calls(), min_size=1, max_size=6))
    separator = draw(st.sampled_from([", ", ",", "\n", "；", " , ", " ", ", ,", " = 0, "]))
    return separator.join(calls) + draw(st.sampled_from(["", "", "", " ", ",", ".", '"', "\n"]))


@VOCABULARIES
@settings(max_examples=400, deadline=None)
@given(line=st.one_of(pieces, written_lines(), st.text(max_size=12)))
@example(line="None")
@example(line="None.")
@example(line='Calculate("1")')
@example(line='Calculate("say "this" loud")')
@example(line='Calculate("1", "2")')
@example(line='Solve("a", b")')
@example(line='Solve("a"b", "c")')
@example(line='Solve("x\\", "y")')
@example(line='Paint("a")')
@example(line='Paint("a" , "b"\u3000)')
@example(line='Paint("a"b", "c")')
@example(line='Calculate("1""\n)')
@example(line='Calculate("1" \x1c)')
@example(line=f'Calculate("{"".join(x + chr(34) + x for x in BLANKS)}")')
@example(line='Calculate("a\\\\")')
@example(line='Calculate("a", \\"b")')
@example(line='Calculate("1")Calculate("2")')
def test_allowed_is_what_is_read_without_complaint(toks: dict[str, Tokenizer], vocabulary: str, line: str) -> None:
    """Prevents both faults: a line that cannot be read, or of a tool that is off; and a good call that is forbidden."""
    tools = {**STANDARD, "paint": paint}
    for on in (tools, CALCULATOR):
        assert allows(toks[vocabulary], on, line) == is_clean(line, on), line


@settings(max_examples=300, deadline=None)
@given(line=written_lines())
def test_every_readable_call_can_be_written(toks: dict[str, Tokenizer], line: str) -> None:
    """A call of the standard tools that is read from any text, junk around it or not, can be written to the letter."""
    good = [c for c in read_commands(line).calls if is_clean(c.raw, STANDARD)]
    assert all(allows(tok, STANDARD, call.raw) for tok in toks.values() for call in good)
    together = ", ".join(call.raw for call in good) or "None"
    assert allows(toks["ours"], STANDARD, together)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(max_size=30), pieces), second=arguments)
def test_every_argument_can_be_given(toks: dict[str, Tokenizer], text: str, second: str) -> None:
    """Whatever a user asks about can be said to a tool, once its quotes are escaped."""
    first, second = (re.sub(r'(?=")|\\$', r"\\", each) for each in (text.replace("\\", "/"), second.replace("\\", "/")))
    assert allows(toks["ours"], CALCULATOR, f'Calculate("{first}")')
    line = f'Paint("{first}", "{second}")'
    assert allows(toks["released"], {"paint": paint}, line)
    assert [c.args for c in read_commands(line).calls] == [[a.replace('\\"', '"') for a in (first, second)]]


def test_number_of_calls(toks: dict[str, Tokenizer]) -> None:
    """A model that repeats a call for ever is stopped after those that would run."""
    line = ", ".join(['Calculate("1")'] * (MAX_CALLS + 1))
    assert allows(toks["ours"], CALCULATOR, line)
    assert not allows(toks["ours"], CALCULATOR, line, max_calls=MAX_CALLS)
    assert allows(toks["ours"], CALCULATOR, line.partition(", ")[2], max_calls=MAX_CALLS)


def test_number_of_arguments(toks: dict[str, Tokenizer]) -> None:
    """It comes from the function itself: needed, optional, any number."""
    tools = {
        "one": fake("One", lambda a: a),
        "two": fake("Two", lambda a, b: a),
        "upto": fake("Upto", lambda a="", b="", *, c="": a),
        "three": fake("Three", lambda a, b, c: a),
        "many": fake("Many", lambda a, b, *rest: a),
        "any": fake("Any", lambda *rest: ""),
        "now": fake("Now", lambda: ""),
    }
    counts = {"One": {1}, "Two": {2}, "Upto": {1, 2}, "Three": {3}, "Many": {2, 3, 4}, "Any": {1, 2, 3, 4}, "Now": {1}}
    for name, right in counts.items():
        for number in range(5):
            line = name + "(" + ", ".join(['"x"'] * number) + ")"
            assert allows(toks["ours"], tools, line) == (number in right), line


def test_tools_that_no_line_can_call(toks: dict[str, Tokenizer]) -> None:
    """Left in silence, such a tool would be offered in the prompt and could never be used."""
    for broken in (fake("get_weather", len), fake("Say", lambda a, *, tone: a)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"can call '?{broken.name}"):
            commands_grammar(toks["ours"], {"x": broken})


def test_no_tools(toks: dict[str, Tokenizer]) -> None:
    """With everything switched off there is `None` and nothing else."""
    tok = toks["ours"]
    state = at_commands(commands_grammar(tok, {}), tok)
    assert follows(state, tok.encode(" None")) and state.mask().nonzero().tolist() == [tok.marker("<eoc>")]
    assert not allows(tok, {}, 'Calculate("1")')


def test_real_lines(toks: dict[str, Tokenizer]) -> None:
    """The released conversations' commands can be written as they stand, but for prose and `None` beside a call."""
    if "MOSS_TEST_DATA" not in os.environ:
        pytest.skip("set MOSS_TEST_DATA to the folder with real data")
    tools = STANDARD | {"search": fake("Search", lambda query: ""), "image": fake("Text2Image", lambda description: "")}
    lines = []
    for row in (Path(os.environ["MOSS_TEST_DATA"]) / "moss_003_sft_sample.jsonl").read_text("utf-8").splitlines():
        for turn in json.loads(row)["chat"].values():
            lines.append(turn["Commands"].removeprefix("<|Commands|>: ").removesuffix("\n").removesuffix("<eoc>"))
    forbidden = [line for line in lines if not allows(toks["released"], tools, line)]
    assert len(lines) > 2000 and len(forbidden) <= len(lines) / 400, forbidden
    assert not any(is_clean(line, tools) for line in forbidden)


# ------------------------------------------------------------------------------------------------ the whole pass


def turn(thoughts: str, commands: str, reply: str = "ok") -> Dialog:
    return Dialog("m", {"calculator": True}, [Turn("q", [Round(thoughts, commands, "None")], reply)])


def written_by_model(tok: Tokenizer, dialog: Dialog, until: Until) -> list[int]:
    """What the model itself writes of `dialog` from the cut `until` on, as it is trained."""
    whole, cut = render(dialog, tok)[0], render(dialog, tok, until=until)[0]
    assert whole[: len(cut)] == cut
    end = tok.marker("<eoc>" if until == "thoughts" else "<eom>")[0]
    return whole[len(cut) : whole.index(end, len(cut)) + 1]


@VOCABULARIES
@settings(max_examples=100, deadline=None)
@given(thoughts=st.text(max_size=20), reply=st.text(max_size=20), argument=st.text(max_size=10))
@example(thoughts="<|MOSS|>: <eot>", reply="<eom><|Human|>:", argument="<eoc>")
def test_training_rows_fit(
    toks: dict[str, Tokenizer], vocabulary: str, thoughts: str, reply: str, argument: str
) -> None:
    """The grammar must allow exactly the ids that the chat format renders, or a model is held to what it never saw."""
    tok = toks[vocabulary]
    commands = 'Calculate("' + argument.replace("\\", "/").replace('"', '\\"') + '")'
    for row in (turn(thoughts, commands, reply), turn("None", "None", reply)):
        for until in ("thoughts", "reply"):
            ids = written_by_model(tok, row, until)
            assert follows(commands_grammar(tok, CALCULATOR, until).start(), ids)


@pytest.mark.parametrize("vocabulary", ["ours", "other"])
def test_choice_after_results(toks: dict[str, Tokenizer], vocabulary: str) -> None:
    """After results the model chooses between thoughts and reply, and both roads lead through their own format."""
    tok = toks[vocabulary]
    think, say = tok.opening("<|Inner Thoughts|>"), tok.opening("<|MOSS|>")
    grammar = commands_grammar(tok, CALCULATOR, "results")
    state = grammar.start()
    assert set(state.mask().nonzero().flatten().tolist()) == {think[0], say[0]}
    row = turn("again", 'Calculate("1")')
    assert follows(state, [*think, *written_by_model(tok, row, "thoughts")])
    assert follows(grammar.start(), [*say, *written_by_model(tok, row, "reply")])
    assert not follows(grammar.start(), tok.encode(" hello"))
    tagged = commands_grammar(tok, CALCULATOR, "results", tagged=True).start()
    assert follows(tagged, [say[0]]) and tagged.mask().nonzero().tolist() == [[say[0]]]  # code writes what follows


def test_nothing_to_choose_where_roles_are_text(toks: dict[str, Tokenizer]) -> None:
    """Both openings begin with the same id there; a mask could not tell them apart."""
    with pytest.raises(ValueError, match="no ids for roles"):
        commands_grammar(toks["released"], CALCULATOR, "results")


@VOCABULARIES
def test_free_text_holds_no_control_ids(toks: dict[str, Tokenizer], vocabulary: str) -> None:
    """Thoughts and reply may say anything, but of control ids and holes in the vocabulary only their own end."""
    tok = toks[vocabulary]
    barred = tok.control_ids | {id for id in range(tok.vocab_size) if not tok.decode_bytes([id], markers=True)}
    assert len(barred) >= 11
    for until, end in (("thoughts", "<eot>"), ("reply", "<eom>")):
        mask = commands_grammar(tok, CALCULATOR, until).start().mask()
        assert len(mask) == tok.vocab_size and mask.dtype == torch.bool
        assert set((~mask).nonzero().flatten().tolist()) == barred - set(tok.marker(end))


def test_other_forms_are_a_reply(toks: dict[str, Tokenizer]) -> None:
    """The released sft form ends with `<eom>`, plain text with the end of the document."""
    tok = toks["released"]
    for form, end in (("sft", tok.marker("<eom>")[0]), ("base", tok.eos)):
        state = commands_grammar(tok, {}, "reply", form=form).start()  # type: ignore[arg-type]
        assert follows(state, [*tok.encode("hi"), end])
        assert not state.mask()[tok.encode("hi")[0]] and state.mask()[end]


def sample(state: State, generator: torch.Generator, ends: set[int], lean: Sequence[int], length: int) -> list[int]:
    """Random ids under the mask; after `length` of them with a lean to what closes. Stops at an id of `ends`."""
    ids: list[int] = []
    while not (ids and ids[-1] in ends):
        assert len(ids) < length + 2000, "no end in sight"
        mask = state.mask()
        scores = torch.randn(len(mask), generator=generator) * 4
        if len(ids) > length:
            scores[list(lean)] += 20
        ids.append(int(scores.masked_fill(~mask, -torch.inf).argmax()))
        state.advance(ids[-1])
    return ids


@VOCABULARIES
def test_random_models_keep_the_format(toks: dict[str, Tokenizer], vocabulary: str) -> None:
    """Whatever the scores: only `None` or good calls of enabled tools, no control id out of place, always an end."""
    tok = toks[vocabulary]
    generator = torch.Generator().manual_seed(0)
    ends = tok.marker("<eoc>") + tok.marker("<eom>")
    lean = [*ends, *tok.marker("<eot>"), *(tok.encode(sign)[0] for sign in '")(eP')]
    called = set()
    for number in range(120):
        tools = ({}, CALCULATOR, STANDARD, {**STANDARD, "paint": paint})[number % 4]
        until: Until = "thoughts" if number % 3 or vocabulary == "released" else "results"
        grammar = commands_grammar(tok, tools, until, max_calls=MAX_CALLS)
        ids = sample(grammar.start(), generator, set(ends), lean, number // 4)
        parser = StreamParser(tok, None if until == "results" else until)
        parser.feed(ids)
        names = [section.name for section in parser.sections]
        assert names in (["thoughts", "commands"], ["reply"])
        control = [id for id in ids if id in tok.control_ids]
        roles = {name: tok.marker(role) for name, role in (("think", "<|Inner Thoughts|>"), ("say", "<|MOSS|>"))}
        if names == ["reply"]:
            assert control == roles["say"] + tok.marker("<eom>")
            continue
        assert control == [
            *(roles["think"] if until == "results" else []),
            *tok.marker("<eot>"),
            *(tok.marker("<|Commands|>") if tok.single_roles else []),
            *tok.marker("<eoc>"),
        ]
        line = parser.sections[1].text
        assert is_clean(line, tools), line
        called |= {call.name for call in read_commands(line).calls}
    assert called == {"Search", "Calculate", "Solve", "Paint"}  # it is no proof when nothing was called


# --------------------------------------------------------------------------------------------------- the plumbing


def test_engine_samples_under_the_mask(toks: dict[str, Tokenizer]) -> None:
    """Masked ids and those that only the model has are never chosen; log-probabilities stay the model's own."""
    tok = toks["ours"]
    think, say = tok.opening("<|Inner Thoughts|>"), tok.opening("<|MOSS|>")
    prompt = tok.encode("hello")
    grammar = commands_grammar(tok, CALCULATOR, "results")
    with Engine(toy_model(vocab_size=tok.vocab_size + 30)) as engine:
        streams = [
            engine.submit(prompt, Sampling(temperature=20, max_tokens=2, seed=n), grammar=grammar) for n in range(12)
        ]
        chosen = [list(stream) for stream in streams]
        assert {tuple(token.id for token in tokens) for tokens in chosen} == {tuple(think), tuple(say)}
        raw = engine.score([*prompt, *think])[-2:]
    assert [token.logprob for tokens in chosen for token in tokens if tokens[0].id == think[0]][:2] == pytest.approx(
        raw
    )


def test_states_are_apart(toks: dict[str, Tokenizer]) -> None:
    """Two requests share what was compiled, never where they stand."""
    tok = toks["ours"]
    grammar = commands_grammar(tok, STANDARD)
    first, second = at_commands(grammar, tok), at_commands(grammar, tok)
    assert follows(first, tok.encode(' Solve("x'))
    assert follows(second, tok.encode(" None")) and follows(second, tok.marker("<eoc>"))
    assert follows(first, [*tok.encode('=1")'), *tok.marker("<eoc>")])


def test_long_argument(toks: dict[str, Tokenizer]) -> None:
    """The library gives up silently at its limits, and would then allow nothing but the end."""
    assert allows(toks["ours"], CALCULATOR, f'Calculate("{"1+" * 3000}1")')


def test_many_threads(toks: dict[str, Tokenizer]) -> None:
    """Several engines and the threads of a server use one compiled grammar at once."""
    lines = ['Calculate("1"), Solve("x=1", "x")', "None", 'Solve("she said "hi"")'] * 20
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda line: allows(toks["ours"], STANDARD, line), lines))


def test_forbidden_ids_are_refused(toks: dict[str, Tokenizer]) -> None:
    """An id taken against the mask would leave the state nowhere; the caller hears of it and the state stands."""
    tok = toks["ours"]
    state = at_commands(commands_grammar(tok, CALCULATOR), tok)
    for wrong in (tok.encode("hello")[0], tok.marker("<eoc>")[0], tok.marker("<eom>")[0]):
        with pytest.raises(ValueError, match=f"id {wrong} cannot"):
            state.advance(wrong)
    assert follows(state, [*tok.encode(' Calculate("1")'), *tok.marker("<eoc>")])
    text = commands_grammar(tok, CALCULATOR, "reply").start()
    with pytest.raises(ValueError, match="cannot come next"):
        text.advance(tok.marker("<|Human|>")[0])


def test_compiled_once(toks: dict[str, Tokenizer]) -> None:
    """A second turn with the same tools, or with others of the same form, must not compile again."""
    tok = toks["ours"]
    twin = fake("Calculate", lambda other_name: other_name)
    assert commands_grammar(tok, CALCULATOR) is commands_grammar(tok, {"twin": twin})
    assert commands_grammar(tok, CALCULATOR) is not commands_grammar(tok, STANDARD)
    assert commands_grammar(tok, CALCULATOR) is not commands_grammar(toks["other"], CALCULATOR)


def test_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without llguidance a user must read what to install, not a traceback; replies need none."""
    monkeypatch.setattr(grammar_module, "INSTALLED", False)
    tok = ours()
    with pytest.raises(ValueError, match="pip install llguidance"):
        commands_grammar(tok, CALCULATOR)
    assert commands_grammar(tok, CALCULATOR, "reply").start().mask().any()


def test_only_the_grammar_imports_the_library() -> None:
    """Everything else has to work, and to be tested, without it."""
    package = Path(inspect.getfile(grammar_module)).parent.parent
    users = [path.name for path in package.rglob("*.py") if "import llguidance" in path.read_text("utf-8")]
    assert users == ["grammar.py"]
