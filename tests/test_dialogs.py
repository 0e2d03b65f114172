"""Conversations in files: three formats, there and back without loss, and errors that name file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss.chat import EDGE, SWITCHES, Dialog, Round, Turn, instruction, render
from moss.data.dialogs import Convert, Format, Show, detect, from_row, main, read, read_rows, to_row
from moss.tokenizer import Tokenizer, train
from tests.test_tokenizer import TEXTS

OFF = {"thoughts": False, **dict.fromkeys(SWITCHES, False)}
TOOLS = OFF | {"thoughts": True, "calculator": True, "solver": True}
FORMATS: tuple[Format, ...] = ("moss", "openai", "sharegpt")
CAPABILITIES = instruction(Dialog("", TOOLS, []))


def section(role: str, text: str, end: str) -> str:
    return f"<|{role}|>: {text}<{end}>\n"


def moss_row(**changes: str) -> dict[str, Any]:
    """A row as released: one turn with two calls."""
    results = '<|Results|>:\nCalculate("1+1") => 2\nSolve("x=3", "x") =>\nx = 3\n<eor>\n'
    turn = {
        "Human": section("Human", "Do both.", "eoh"),
        "Inner Thoughts": section("Inner Thoughts", "Two tools.", "eot"),
        "Commands": section("Commands", 'Calculate("1+1"), Solve("x=3", "x")', "eoc"),
        "Tool Responses": results,
        "MOSS": section("MOSS", "2 and 3.", "eom"),
    }
    return {
        "conversation_id": 7,
        "meta_instruction": "Be kind.\n" + CAPABILITIES,
        "num_turns": 1,
        "chat": {"turn_1": turn | changes},
        "category": "tool",
    }


DIALOG = Dialog(
    "Be kind.",
    TOOLS,
    [
        Turn(
            "Do both.",
            [
                Round(
                    "Two tools.",
                    'Calculate("1+1"), Solve("x=3", "x")',
                    'Calculate("1+1") => 2\nSolve("x=3", "x") =>\nx = 3',
                )
            ],
            "2 and 3.",
        )
    ],
    {"conversation_id": 7, "category": "tool"},
)


def test_moss_row_literally() -> None:
    """A released row is exactly this conversation, and this conversation exactly that row, order of keys included."""
    assert from_row(moss_row()) == DIALOG
    assert json.dumps(to_row(DIALOG, "moss")) == json.dumps(moss_row())


def test_openai_row_literally() -> None:
    """What trainers and APIs read: calls with JSON arguments, a tool message for each, thoughts beside them."""

    def call(number: int, name: str, arguments: str) -> dict[str, Any]:
        return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}

    def schema(name: str, argument: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    calls = [
        call(1, "Calculate", '{"expression": "1+1"}'),
        call(2, "Solve", '{"equation": "x=3", "argument_2": "x"}'),
    ]
    row = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Do both."},
            {"role": "assistant", "content": None, "reasoning_content": "Two tools.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "call_1", "content": "2"},
            {"role": "tool", "tool_call_id": "call_2", "content": "x = 3"},
            {"role": "assistant", "content": "2 and 3."},
        ],
        "tools": [schema("Calculate", "expression"), schema("Solve", "equation")],
        "conversation_id": 7,
        "category": "tool",
        "moss": {"switches": {"thoughts": True}},
    }
    assert to_row(DIALOG, "openai") == row
    assert from_row(row) == DIALOG


def test_sharegpt_row_literally() -> None:
    """The roles that ShareGPT readers know, and `thoughts`."""
    row = to_row(DIALOG, "sharegpt")
    assert [(m["from"], m["value"]) for m in row["conversations"]] == [
        ("system", "Be kind."),
        ("human", "Do both."),
        ("thoughts", "Two tools."),
        ("function_call", 'Calculate("1+1"), Solve("x=3", "x")'),
        ("observation", 'Calculate("1+1") => 2\nSolve("x=3", "x") =>\nx = 3'),
        ("gpt", "2 and 3."),
    ]
    assert row["moss"] == {"switches": TOOLS}
    assert from_row(row) == DIALOG


ODD_COMMANDS = [
    ("None. So I calculate by hand.", "None"),
    ("Non", "None"),
    ('Calculate("None")', "None"),
    ('Search("a b"), None', 'Search("a b") =>\n<|1|>: "x"\n<|2|>: "y"'),
    ('Search("say "hi" now")', 'Search("say "hi" now") =>\n<|1|>: "hi"'),
    ('Search("say \\"hi\\" now")', 'Search("say \\"hi\\" now") =>\nno'),
    ('Calculate( "1" ),Calculate("2")', 'Calculate( "1" ) =>\n1\nCalculate("2") => \'2\''),
    ('Calculate("1"), Calculate("1")', 'Calculate("1") => 1\nCalculate("1") => 1'),
    ('Calculate("1"), Calculate("2")', 'Calculate("2") => 2'),
    ("Calculate(1+1)", "No result."),
    ('Text2Image("a cat")', "Image generated successfully."),
    ("", ""),
    ("None", 'Calculate("1") => 1'),
    ('Delete("x")', 'Delete("x") =>gone'),
    ('Solve("x=1', "None"),
]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(("commands", "results"), ODD_COMMANDS)
def test_odd_commands(to: Format, commands: str, results: str) -> None:
    """Released commands hold prose, bare quotes and calls without results; each comes back to the letter."""
    for rounds in ([Round("t", commands, results)], [Round(), Round("None", commands, results), Round("c")]):
        dialog = Dialog("", {}, [Turn("q", rounds, "r"), Turn("p", [Round("None", commands, results)], "")])
        assert from_row(json.loads(json.dumps(to_row(dialog, to)))) == dialog


def test_side_field_holds_only_what_is_said_nowhere_else() -> None:
    """A copy of the text beside the text is no conversion: who edits one of them gets the other one back."""
    for commands, results in ODD_COMMANDS:
        turn = Turn("question", [Round("thinking", commands, results)], "the reply", 80, {"human.right": " "})
        row = to_row(Dialog("Be kind.", OFF, [turn], {"conversation_id": 1}), "openai")
        said = [m["content"] for m in row["messages"] if m["content"]] + ["thinking"]
        said += [
            a for m in row["messages"] for c in m.get("tool_calls", []) for a in c["function"]["arguments"].split('"')
        ]
        side = json.dumps(row["moss"], ensure_ascii=False)
        assert not [text for text in said if len(text) > 5 and text in side]
        assert row["moss"]["switches"] == {"thoughts": False}
        assert row["moss"]["turn_1"]["quality"] == 80


SHAPES = [
    [],
    [Round()],
    [Round("a")],
    [Round("a"), Round("b")],
    [Round(), Round()],
    [Round("a", 'Calculate("1")', 'Calculate("1") => 1'), Round()],
    [Round("a", 'Calculate("1")', 'Calculate("1") => 1'), Round("b"), Round("None", 'Calculate("2")', "None")],
    [Round("", "", "")],
]


@pytest.mark.parametrize("to", ["openai", "sharegpt"])
@pytest.mark.parametrize("rounds", SHAPES)
@pytest.mark.parametrize("reply", ["", "r"])
def test_shapes_of_turns(to: Format, rounds: list[Round], reply: str) -> None:
    """Turns without rounds, thoughts, calls or reply are easily merged with their neighbours."""
    dialog = Dialog("m", TOOLS, [Turn("q", rounds, reply), Turn("", rounds, reply), Turn("p", rounds, "end")])
    assert from_row(to_row(dialog, to)) == dialog


def test_rounds_in_released_keys() -> None:
    """Rounds after the first stand in keys that other readers ignore, and the reply stays last."""
    turn = Turn("q", [Round("a", 'Calculate("1")', 'Calculate("1") => 1'), Round("b"), Round("c")], "r", quality=40)
    row = to_row(Dialog("", {}, [turn]), "moss")
    keys = ["Inner Thoughts", "Commands", "Tool Responses"]
    chat = row["chat"]["turn_1"]
    assert list(chat) == ["Human", *keys, *(f"{k} {n}" for n in (2, 3) for k in keys), "MOSS"]
    assert chat["Inner Thoughts 2"] == "<|Inner Thoughts|>: b<eot>\n"
    assert chat["MOSS"] == "<|MOSS|>: <quality: 40> r<eom>\n"
    assert from_row(row).turns == [turn]


ODD_SECTIONS = {
    "Human": "<|Human|>: x <eoh>\n",
    "Inner Thoughts": "no markers at all",
    "Commands": "<|Commands|>:None<eoc>",
    "Tool Responses": "<|Results|>: \n a <eor> b\n<eor>\n\n",
    "MOSS": "<|MOSS|>:  \n <eor> text <quality: 20><eom>\n",
}


@pytest.mark.parametrize("key", ODD_SECTIONS)
@pytest.mark.parametrize("to", FORMATS)
def test_odd_sections(key: str, to: Format) -> None:
    """A row with a lost marker or a strange line end is kept as it is, and the text itself is clean."""
    row = moss_row(**{key: ODD_SECTIONS[key]})
    dialog = from_row(row)
    assert to_row(from_row(to_row(dialog, to)), "moss") == row
    turn = dialog.turns[0]
    for text in (turn.human, turn.reply, *vars(turn.rounds[0]).values()):
        assert text == text.strip(EDGE) and text
    assert turn.edges


@pytest.mark.parametrize("to", FORMATS)
def test_missing_keys_and_other_metas(to: Format) -> None:
    """Rows without thoughts, with a wrong count or with lines of switches that are not ours come back as they were."""
    plain = moss_row()
    for key in ("Inner Thoughts", "Commands", "Tool Responses"):
        del plain["chat"]["turn_1"][key]
    rows = [plain, moss_row() | {"num_turns": 3}]
    for meta in (
        "",
        "\n",
        "No line end",
        "Two\n\n",
        CAPABILITIES,
        "M\n" + CAPABILITIES.replace("- Text-to-speech: disabled.\n", ""),
        "M\n" + CAPABILITIES + "More.\n",
        "M" + CAPABILITIES,
    ):
        rows.append(moss_row() | {"meta_instruction": meta})
    for row in rows:
        assert to_row(from_row(to_row(from_row(row), to)), "moss") == row


texts = st.one_of(st.text(max_size=10), st.sampled_from(["None", '"', 'Calculate("1")', "=>", "<eom>", "\n", '", "']))
clean = st.lists(texts, max_size=4).map(lambda parts: "".join(parts).strip(EDGE))
a_round = st.builds(Round, clean, clean, clean)
a_turn = st.builds(
    Turn,
    clean,
    st.lists(a_round, min_size=1, max_size=3),
    clean.filter(lambda text: not text.startswith("<quality: ")),
    st.sampled_from([None, 0, 60]),
)
a_dialog = st.builds(Dialog, clean, st.sampled_from([{}, OFF, TOOLS]), st.lists(a_turn, min_size=1, max_size=3))


@settings(max_examples=300, deadline=None)
@given(a_dialog)
def test_any_conversation_through_all_formats(dialog: Dialog) -> None:
    """No text, however odd, may be lost or change its place on the way moss, openai, sharegpt, moss."""
    row: Any = None
    for to in ("moss", "openai", "sharegpt", "moss"):
        row = json.loads(json.dumps(to_row(dialog if row is None else from_row(row), to)))
    assert from_row(row) == dialog


def test_foreign_rows() -> None:
    """Rows of other projects: several words for the same role, words beside a call, text in parts, unknown tools."""
    shared = {
        "conversations": [
            {"from": "user", "value": "q"},
            {"from": "assistant", "value": "a"},
            {"from": "human", "value": "p"},
            {"from": "gpt", "value": "b"},
        ],
        "id": "x",
    }
    assert from_row(shared) == Dialog("", {}, [Turn("q", [Round()], "a"), Turn("p", [Round()], "b")], {"id": "x"})
    weather = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "巴黎", "days": 2}'},
    }
    openai = {
        "messages": [
            {"role": "developer", "content": "m"},
            {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "Let me look.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ],
        "tools": [weather],
    }
    dialog = from_row(openai)
    rounds = [Round("Let me look.", 'get_weather("巴黎", "2")', 'get_weather("巴黎", "2") =>\nsunny')]
    assert dialog.turns == [Turn("q?", rounds, "Sunny.")] and dialog.meta == "m"
    assert dialog.extra == {"tools": [weather]}
    assert to_row(dialog, "openai")["tools"] == [weather]


ASKED = {"role": "user", "content": "x"}
BROKEN: list[tuple[Any, str]] = [
    ("[1", "not JSON"),
    ("3", "must be a JSON object with chat"),
    ({"text": "x"}, "must be a JSON object with chat"),
    ({"chat": {"turn_2": {}}}, "turn_1, turn_2"),
    ({"chat": {"turn_1": {"MOSS": "x"}}}, "turn_1 must be an object with Human"),
    ({"chat": {"turn_1": {"Human": "x", "Foo": "y"}}}, "turn_1 has the unknown key 'Foo'"),
    ({"chat": {"turn_1": {"Human": 3}}}, "turn_1.Human must be text, not 3"),
    ({"messages": "x"}, "messages must be a list of objects"),
    ({"messages": []}, "no user message"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "role 'assistant', which cannot stand there"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content of a user message must be text"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}, "answers no call"),
    (
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "A", "arguments": "{"}}]},
            ]
        },
        "arguments of A are not JSON",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "A", "arguments": "{}"}}]},
            ]
        },
        "one for each",
    ),
    (
        {"messages": [ASKED], "tools": [{"function": 3}], "moss": {"switches": {"solver": 1}}},
        "switches must be true or",
    ),
    ({"messages": [ASKED, {"role": "assistant", "reasoning_content": [3]}]}, "reasoning_content must be text"),
    ({"messages": [ASKED], "moss": {"turn_1": {"quality": 7}}}, "quality 7 is none of 0, 20"),
    ({"messages": [ASKED], "moss": {"turn_1": {"edges": [1]}}}, "edges must be an object"),
    ({"conversations": []}, "nothing from a human"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "from 'gpt', which cannot stand there"),
    ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\].value must be text"),
    ('{"conversations": [{"from": "human", "value": "\\ud800"}]}', r"lone surrogate U\+D800"),
]


@pytest.mark.parametrize(("row", "said"), BROKEN)
def test_broken_rows_name_file_and_line(tmp_path: Path, row: Any, said: str) -> None:
    """In a million rows, an error without its line is no help."""
    file = tmp_path / "rows.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    file.write_text(json.dumps(moss_row()) + "\n\n" + text + "\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl:3: .*{said}"):
        list(read(file))


def test_files(tmp_path: Path) -> None:
    """JSON lines, an array, line separators inside texts, a byte order mark, and bytes that are no text."""
    rows = [moss_row(Human="<|Human|>: a\u2028b<eoh>\n"), to_row(DIALOG, "openai")]
    for content in (
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        json.dumps(rows, indent=1),
    ):
        file = tmp_path / "rows"
        file.write_text(content, encoding="utf-8")
        assert [row for _, row in read_rows(file)] == rows
        assert [d.turns[0].human for d in read(file)] == ["a\u2028b", "Do both."]
    for before in (1, 50, 2000):  # lines are read in blocks, and the whole block is what cannot be decoded
        file.write_bytes(b'{"chat": 1}\n' * before + b"\xff\xfe\n" + b'{"chat": 1}\n' * 50)
        with pytest.raises(ValueError, match=rf"rows:{before + 1}: not UTF-8"):
            list(read_rows(file))


def test_results_go_to_the_call_they_name() -> None:
    """Tool messages may come in any order; taken as they stand, a result went to another call."""
    calls = [{"id": n, "function": {"name": "A", "arguments": json.dumps({"x": n})}} for n in ("one", "two")]
    answers = [{"role": "tool", "tool_call_id": n, "content": f"of {n}"} for n in ("two", "one")]
    start = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]
    turn = from_row({"messages": [*start, *answers]}).turns[0]
    assert turn.rounds[0].results == 'A("one") =>\nof one\nA("two") =>\nof two'
    del answers[0]["tool_call_id"]  # then their order has to do
    turn = from_row({"messages": [*start, *answers]}).turns[0]
    assert turn.rounds[0].results == 'A("one") =>\nof two\nA("two") =>\nof one'


def test_switches_that_are_set_after_reading_are_written() -> None:
    """A conversation without a list of tools that got one in the chat lost it when it was saved."""
    dialog = from_row({"meta_instruction": "Odd end.  ", "num_turns": 1, "chat": {"turn_1": {"Human": "q"}}})
    assert from_row(to_row(dialog, "moss")) == dialog
    dialog.switches = {"thoughts": True, **dict.fromkeys(SWITCHES, False), "solver": True}
    assert from_row(to_row(dialog, "moss")).switches == dialog.switches


def test_convert_says_what_it_cannot_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A field of a foreign message went without a word, from a command that says "without loss"."""
    plain_row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    odd_row = {"messages": [{"role": "user", "content": "q", "name": "Ada"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "in").write_text("".join(json.dumps(row) + "\n" for row in (plain_row, odd_row)))
    assert main(Convert(tmp_path / "in", "moss", tmp_path / "out")) == 0
    assert f"1 would not come back exactly as they were, the first at {tmp_path}/in:2" in capsys.readouterr().err


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command there and back gives the same file; a broken row leaves the old output and no half-written one."""
    source, there, back = tmp_path / "in.jsonl", tmp_path / "new" / "openai.jsonl", tmp_path / "back.jsonl"
    source.write_text("".join(json.dumps(moss_row(), ensure_ascii=False) + "\n" for _ in range(3)), encoding="utf-8")
    assert main(Convert(source, "openai", there)) == 0
    assert "3 moss -> openai" in capsys.readouterr().err
    assert main(Convert(there, "moss", back)) == 0
    assert back.read_bytes() == source.read_bytes()
    source.write_text(json.dumps(moss_row()) + "\n{}\n")
    with pytest.raises(ValueError, match=r"in.jsonl:2"):
        main(Convert(source, "sharegpt", back))
    assert len(back.read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.jsonl", "in.jsonl", "new"]
    source.write_text("\n")
    with pytest.raises(ValueError, match="holds no conversations"):
        main(Convert(source, "moss", back))
    capsys.readouterr()
    assert main(Convert(there, "moss")) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [moss_row()] * 3


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_file_cannot_steer_the_terminal(
    with_tokenizer: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`moss data show` on data from the web printed escape sequences that rename windows and hide text."""
    evil = "\x1b]0;owned\x07\x1b[8m"
    row = {"conversations": [{"from": "system", "value": evil}, {"from": "human", "value": evil}]}
    row["conversations"].append({"from": "gpt", "value": evil})
    (tmp_path / "rows").write_text(json.dumps(row))
    train(["abc"], 270).save(tmp_path)
    assert main(Show(tmp_path / "rows", tokenizer=tmp_path if with_tokenizer else None)) == 0
    out = capsys.readouterr().out
    assert out.count("owned") == 3
    assert "\x1b]" not in out and "\x07" not in out and "\x1b[8m" not in out


def test_show_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A conversation for the eye, and the same as training sees it."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(moss_row()) + "\n" + json.dumps(to_row(DIALOG, "sharegpt")) + "\n")
    assert main(Show(file, start=2)) == 0
    out = capsys.readouterr().out
    assert "row 2" in out and "row 1" not in out
    assert 'Commands: Calculate("1+1"), Solve("x=3", "x")\n' in out and "MOSS: 2 and 3.\n" in out
    tok = train(TEXTS, 400)
    tok.save(tmp_path)
    assert main(Show(file, count=1, tokenizer=tmp_path)) == 0
    out = capsys.readouterr().out
    ids, mask = render(DIALOG, Tokenizer.load(tmp_path), loss="assistant")
    assert "<|Human|>: Do both.<eoh>" in out and f"{len(ids)} tokens, {sum(mask)} learnt" in out
    bare = json.loads(tok.to_json())  # a base that knows no marker is shown as it will be trained
    markers = [token["content"] for token in bare["added_tokens"][1:]]
    bare["added_tokens"] = bare["added_tokens"][:1]
    bare["model"]["vocab"] = {sign: i for sign, i in bare["model"]["vocab"].items() if sign not in markers}
    bare["model"]["vocab"] = {sign: i for i, sign in enumerate(bare["model"]["vocab"])}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    assert not Tokenizer.load(tmp_path / "bare.json").has_markers
    assert main(Show(file, count=1, tokenizer=tmp_path / "bare.json")) == 0
    assert "<|Human|>: Do both.<eoh>" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no row 5"):
        main(Show(file, start=5))


@pytest.fixture(scope="module")
def sample() -> list[dict[str, Any]]:
    data = os.environ.get("MOSS_TEST_DATA")
    if not data:
        pytest.skip("MOSS_TEST_DATA is not set: no released conversations to convert")
    return [row for _, row in read_rows(Path(data) / "moss_003_sft_sample.jsonl")]


@pytest.mark.parametrize("to", FORMATS)
def test_released_rows_there_and_back(sample: list[dict[str, Any]], to: Format) -> None:
    """Every released conversation, odd ones included, survives each format exactly, order of keys included."""
    assert len(sample) == 675
    for row in sample:
        assert detect(row) == "moss"
        there = json.loads(json.dumps(to_row(from_row(row), to)))
        assert json.dumps(to_row(from_row(there), "moss")) == json.dumps(row), row["conversation_id"]


def test_released_rows_are_rendered_byte_for_byte(sample: list[dict[str, Any]]) -> None:
    """What the model reads is the released row: meta instruction, switch lines and all edges."""
    tok = train(TEXTS, 400)
    for row in sample[::5]:
        text = row["meta_instruction"] + "".join(text for turn in row["chat"].values() for text in turn.values())
        assert tok.decode(render(from_row(row), tok)[0], markers=True) == text


def test_side_fields_of_released_rows_are_rare(sample: list[dict[str, Any]]) -> None:
    """The standard edges and results are those of the released data, or most turns would need a note."""
    notes = [
        key
        for row in sample
        for name, side in to_row(from_row(row), "openai")["moss"].items()
        if name != "switches"
        for key in {**side, **side.get("edges", {})}
        if key != "edges"
    ]
    # blanks after questions, blank lines before replies; image results for which no call is named; command text
    assert {key: notes.count(key) for key in set(notes)} == {
        "human.right": 219,
        "reply.left": 54,
        "calls": 65,
        "commands": 4,
    }


def test_functions_of_the_older_form_are_calls() -> None:
    """Prevents a call that vanishes in silence, whose answer is then learnt as though it came from nowhere."""
    call = {"name": "Calculate", "arguments": '{"expression": "1+1"}'}
    old: list[Any] = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "function_call": call},
    ]
    old += [{"role": "function", "name": "Calculate", "content": "2"}, {"role": "assistant", "content": "2."}]
    tool = {"type": "function", "function": {"name": "Calculate", "parameters": {}}}
    new: list[Any] = [old[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": call}]}]
    new += [{"role": "tool", "tool_call_id": "a", "content": "2"}, old[3]]
    first = from_row({"messages": old, "functions": [tool["function"]]})
    second = from_row({"messages": new, "tools": [tool]})
    assert first == second and first.turns[0].rounds[0].commands == 'Calculate("1+1")' and first.switches["calculator"]
