"""A chat from Python: what is asked, kept, switched, saved and freed. The terminal's tests use the same object."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moss
from moss.chat import SWITCHES, Dialog
from moss.engine import Sampling
from moss.errors import UsageError
from moss.session import Chat
from moss.tokenizer import MARKERS, Tokenizer, train
from moss.tools import run
from moss.tools.base import Source, Tool, ToolError, tool
from moss.weights import save_model
from tests.fakes import ScriptedEngine, toy_model


@tool(key="calculator", switch="Calculator", api="Calculate", same_line=True)
def calculate(expression: str) -> str:
    """Always seven."""
    if expression == "0/0":
        raise ToolError("division by zero; change the divisor")
    return "7"


@tool(key="solver", switch="Equation solver", api="Solve")
def solve(equation: str) -> str:
    """Two unknowns."""
    return "x = 1\ny = 2"


@tool(key="weather", switch="Weather", api="Weather", same_line=True)
def weather(city: str) -> str:
    """Always the same."""
    return f"sun over {city}"


ROOT = Path(__file__).parent.parent
TOOLS: dict[str, Tool] = {"calculator": calculate, "solver": solve}
PLAIN = " None<eot>\n<|Commands|>: None<eoc>"


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(["hello there, add 1+1 and solve x = 1 你好"] * 3, 300)


def ids(tok: Tokenizer, text: str) -> list[int]:
    """What a model writes, its markers as control ids."""
    pieces = re.split("(" + "|".join(map(re.escape, MARKERS)) + ")", text)
    return [id for piece in pieces for id in (tok.marker(piece) if piece in MARKERS else tok.encode(piece))]


def scripted(tok: Tokenizer, *passes: str, tools: dict[str, Tool] = TOOLS, **options: Any) -> Chat:
    """A chat whose model writes `passes`."""
    switches = {"thoughts": True, **dict.fromkeys(SWITCHES, False), **dict.fromkeys(tools, True)}
    engine = ScriptedEngine([ids(tok, text) for text in passes])
    return Chat(Dialog("Be kind.", switches, []), engine, tok, tools, Sampling(), **options)


def asked(chat: Chat) -> ScriptedEngine:
    """What the model was asked."""
    assert isinstance(chat.engine, ScriptedEngine)
    return chat.engine


def kinds(events: Sequence[run.Event]) -> list[str]:
    """The events' types, pieces of one text as one."""
    types = [event.type for event in events]
    return [kind for place, kind in enumerate(types) if place == 0 or types[place - 1] != kind]


# ------------------------------------------------------------------------------------------------------------- asking


def test_stream_gives_the_turn_as_it_comes_and_keeps_it(tok: Tokenizer):
    """A turn that is not kept makes the next question the first one again."""
    chat = scripted(tok, ' add<eot>\n<|Commands|>: Calculate("3+4")<eoc>', "<|MOSS|>: It is 7.<eom>")
    events = list(chat.stream("3+4?"))
    assert kinds(events) == ["thoughts", "command", "tool_started", "tool_done", "reply", "done"]
    assert [turn.reply for turn in chat.history] == ["It is 7."]
    assert json.loads(json.dumps(events[-1].to_json()))["turn"]["human"] == "3+4?"


def test_ask_gives_the_whole_answer(tok: Tokenizer):
    """Whoever wants the reply alone prints the answer; programs read the names of `moss chat --json`."""
    chat = scripted(tok, ' add<eot>\n<|Commands|>: Calculate("3+4")<eoc>', "<|MOSS|>: 七<eom>", PLAIN, " hi<eom>")
    seen: list[run.Event] = []
    answer = chat.ask("3+4?", watch=seen.append)
    assert kinds(seen) == ["thoughts", "command", "tool_started", "tool_done", "reply", "done"]
    assert str(answer) == answer.reply == "七"
    assert answer.thoughts == "add"
    assert answer.commands == [{"name": "Calculate", "args": ["3+4"]}]
    assert answer.results == 'Calculate("3+4") => 7'
    assert (answer.finish, answer.notices, answer.sources) == ("stop", [], [])
    assert answer.usage["completion_tokens"] > 0
    assert answer.timing.keys() == {"first_token", "tools", "total"}
    answer = chat.ask("hi")
    assert (answer.thoughts, answer.commands, answer.results) == ("", [], "")  # None is how the format writes nothing


@tool(key="search", switch="Web search", api="Search")
def search(query: str) -> list[Source]:
    """Two pages, named after the question."""
    return [Source(f"{query} {place}", f"https://{query}.example/{place}", "text") for place in "ab"]


def test_a_citation_leads_to_its_source(tok: Tokenizer):
    """A program, which sees no screen, could not tell what `<sup><|3|></sup>` in the reply stands for."""
    rounds = [f' look<eot>\n<|Commands|>: Search("{query}")<eoc>' for query in ("one", "two")]
    passes = [rounds[0], f"<|Inner Thoughts|>:{rounds[1]}", "<|MOSS|>: So it is.<sup><|3|></sup><eom>"]
    answer = scripted(tok, *passes, tools={"search": search}).ask("Is it?")
    by_number = {source["number"]: source for source in answer.sources}
    assert list(by_number) == [1, 2, 3, 4]
    (cited,) = map(int, re.findall(r"<\|(\d+)\|>", answer.reply))
    assert by_number[cited] == {"number": 3, "title": "two a", "url": "https://two.example/a"}


def test_history_reaches_the_next_prompt_and_what_is_taken_out_does_not(tok: Tokenizer):
    """A follow-up such as "and times 3?" means nothing without the turn before it."""
    chat = scripted(tok, PLAIN, " one<eom>", PLAIN, " two<eom>", PLAIN, " three<eom>", PLAIN, " four<eom>")
    chat.ask("first")
    chat.ask("second")
    assert "one" in tok.decode(asked(chat).prompts[2])
    del chat.history[-1]
    chat.ask("third")
    prompt = tok.decode(asked(chat).prompts[4])
    assert "first" in prompt
    assert "second" not in prompt
    chat.clear()
    assert chat.history == []
    assert asked(chat).forgotten == asked(chat).conversations[:1]
    chat.ask("fourth")
    assert "first" not in tok.decode(asked(chat).prompts[6])


def test_leaving_the_loop_stops_the_answer_and_keeps_nothing(tok: Tokenizer):
    """Half an answer in the history would be read by the model as what it said."""
    chat = scripted(tok, PLAIN, " a long reply<eom>", PLAIN, " b<eom>")
    for event in chat.stream("one"):
        if isinstance(event, moss.Reply):
            break
    assert chat.history == []
    chat.ask("two")
    assert [turn.human for turn in chat.history] == ["two"]


def test_a_new_question_ends_the_answer_under_way(tok: Tokenizer):
    """A notebook's interrupted cell leaves its loop standing; the next one must neither wait nor mix with it."""
    chat = scripted(tok, PLAIN, " a long reply<eom>", PLAIN, " b<eom>")
    first = chat.stream("one")
    while next(first).type != "reply":
        pass
    assert str(chat.ask("two")) == "b"
    assert list(first) == []
    assert [turn.human for turn in chat.history] == ["two"]
    assert asked(chat).streams[1]._cancelled


def test_two_threads_cannot_ask_at_once(tok: Tokenizer):
    """Their turns would end up in one history in the order of chance."""
    inside, leave = threading.Event(), threading.Event()

    @tool(key="calculator", switch="Calculator", api="Calculate", same_line=True)
    def slow(expression: str) -> str:
        """Waits."""
        inside.set()
        leave.wait(60)
        return "1"

    chat = scripted(tok, ' x<eot>\n<|Commands|>: Calculate("1")<eoc>', "<|MOSS|>: 1<eom>", tools={"calculator": slow})
    other = threading.Thread(target=chat.ask, args=("one",))
    other.start()
    inside.wait(60)
    with pytest.raises(ValueError, match="give each thread a chat of its own"):
        chat.ask("two")
    leave.set()
    other.join()
    assert [turn.human for turn in chat.history] == ["one"]


def test_an_answer_that_fails_is_an_error(tok: Tokenizer):
    """A script must not take an empty answer for a good one."""
    chat = scripted(tok)
    asked(chat).max_length = 20
    with pytest.raises(ValueError, match=r"take \d+ tokens, \d+ are left: shorten"):
        chat.ask("word " * 100)
    assert [event.type for event in chat.stream("word " * 100)] == ["error"]
    for empty in ("", " \n"):
        with pytest.raises(ValueError, match="the question is empty"):
            chat.stream(empty)
    assert chat.history == []


def test_seed_is_different_for_each_turn_and_the_same_for_each_run(tok: Tokenizer):
    """One seed for all turns would repeat a choice; no seed must stay random."""
    seeds = []
    for seed in (3, 3, None):
        chat = scripted(tok, PLAIN, " a<eom>", PLAIN, " b<eom>", seed=seed)
        chat.ask("one")
        chat.ask("two")
        seeds.append([sampling.seed for sampling in asked(chat).samplings])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 4
    assert seeds[2] == [None] * 4


def test_settings_count_from_the_next_question_on(tok: Tokenizer):
    """A setting that only changes the object and not the request is a lie."""
    chat = scripted(tok, PLAIN, " a<eom>", PLAIN, " b<eom>")
    chat.ask("one")
    chat.sampling = replace(chat.sampling, top_k=5)
    chat.meta_instruction = "Answer in rhymes."
    chat.quality = 80
    chat.ask("two")
    assert [sampling.top_k for sampling in asked(chat).samplings] == [0, 0, 5, 5]
    prompt = tok.decode(asked(chat).prompts[3], markers=True)
    assert prompt.startswith("Answer in rhymes.\n")
    assert prompt.endswith("<|MOSS|>: <quality: 80>")


# -------------------------------------------------------------------------------------------------------------- tools


def test_tools_are_switched_for_the_next_question(tok: Tokenizer):
    """A switch that only changes the display would still let the tool run."""
    chat = scripted(tok, PLAIN, " a<eom>", ' x<eot>\n<|Commands|>: Calculate("1")<eoc>', "<|MOSS|>: b<eom>")
    chat.tools["calculator"] = False
    assert repr(chat.tools) == "{'calculator': False, 'solver': True}"
    chat.ask("hi")
    prompt = tok.decode(asked(chat).prompts[0])
    assert "- Calculator: disabled." in prompt
    assert "- Equation solver: enabled." in prompt
    assert chat.ask("and?").results == ""  # the model asked for it all the same
    for wanted, on in (
        ("none", []),
        ("all", ["calculator", "solver"]),
        ("solver", ["solver"]),
        ([calculate], ["calculator"]),
    ):
        chat.tools = wanted
        assert [key for key in chat.tools if chat.tools[key]] == on
        assert chat.dialog.switches["thoughts"]


def test_a_tool_that_is_not_there_is_refused(tok: Tokenizer):
    """A misspelt name that is taken silently leaves the tool as it was."""
    chat = scripted(tok)
    with pytest.raises(UsageError, match="no tool 'calculater'; the tools are calculator, solver"):
        chat.tools["calculater"] = False
    with pytest.raises(UsageError, match=r"Web search \(search\) is not part of this version"):
        chat.tools["search"] = True
    with pytest.raises(KeyError):
        _ = chat.tools["search"]
    assert dict(chat.tools) == {"calculator": True, "solver": True}


def test_a_tool_of_ones_own(tok: Tokenizer, tmp_path: Path):
    """Builders bring a function; it has to reach the prompt, run, and not break saving, which knows six tools only."""
    chat = scripted(tok, ' look<eot>\n<|Commands|>: Weather("Oslo")<eoc>', "<|MOSS|>: Sun.<eom>", PLAIN, " b<eom>")
    chat.tools = ["solver", weather]
    assert dict(chat.tools) == {"calculator": False, "solver": True, "weather": True}
    assert chat.ask("Oslo?").results == 'Weather("Oslo") => sun over Oslo'
    assert "- Weather: enabled. API: Weather(city)\n" in tok.decode(asked(chat).prompts[0])
    chat.save(tmp_path / "talk.json")
    chat.load(tmp_path / "talk.json")
    assert chat.tools["weather"]
    chat.ask("again?")
    prompt = tok.decode(asked(chat).prompts[2])
    assert prompt.count("Capabilities and tools") == 1
    assert "- Weather: enabled." in prompt


def test_a_tool_of_ones_own_takes_the_place_of_a_standard_one(tok: Tokenizer):
    """A better calculator under the same key must be the one that runs."""

    @tool(key="calculator", switch="Calculator", api="Calculate", same_line=True)
    def better(expression: str) -> str:
        """Says what it was asked."""
        return f"[{expression}]"

    chat = scripted(tok, ' x<eot>\n<|Commands|>: Calculate("1")<eoc>', "<|MOSS|>: b<eom>")
    chat.tools = [better]
    assert chat.ask("1?").results == 'Calculate("1") => [1]'


# ----------------------------------------------------------------------------------------------------- save and load


def test_save_and_load_give_the_same_conversation(tok: Tokenizer, tmp_path: Path):
    """A saved conversation that loses its tool rounds or switches goes on differently."""
    path = tmp_path / "talk.json"
    chat = scripted(tok, ' add<eot>\n<|Commands|>: Calculate("3+4")<eoc>', "<|MOSS|>: 是 7。<eom>")
    chat.ask("3+4?")
    chat.tools["solver"] = False
    chat.save(str(path))
    row = json.loads(path.read_text(encoding="utf-8"))
    assert row["chat"]["turn_1"]["Commands"] == '<|Commands|>: Calculate("3+4")<eoc>\n'
    other = scripted(tok)
    other.load(path)
    assert other.dialog == chat.dialog
    other.save(path)  # its own file may be replaced
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_save_replaces_no_file_of_someone_else(tok: Tokenizer, tmp_path: Path):
    """A slip in a file name must not cost the user a file; a script that is run again may say so."""
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    chat = scripted(tok, PLAIN, " a<eom>")
    with pytest.raises(ValueError, match="nothing to save"):
        chat.save(tmp_path / "talk.json")
    chat.ask("hi")
    with pytest.raises(ValueError, match="exists already"):
        chat.save(path)
    assert path.read_text() == "years of work"
    chat.save(path, overwrite=True)
    assert json.loads(path.read_text())["num_turns"] == 1


def test_a_save_that_fails_says_so_and_leaves_nothing_behind(tok: Tokenizer, tmp_path: Path, monkeypatch):
    """On a full or read-only disk the conversation must go on, and no half-written file may stay."""
    chat = scripted(tok, PLAIN, " a<eom>")
    chat.ask("hi")
    with pytest.raises(ValueError, match="there is no folder"):
        chat.save(tmp_path / "none" / "talk.json")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ValueError, match=r"cannot write .*/talk.json: No space left on device; nothing was saved"):
        chat.save(tmp_path / "talk.json")
    assert list(tmp_path.iterdir()) == []


def test_load_keeps_meta_and_switches_where_the_file_has_none(tok: Tokenizer, tmp_path: Path):
    """A ShareGPT conversation switched every tool off and took the meta instruction away, and said nothing."""
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}))
    chat = scripted(tok, PLAIN, " b<eom>")
    chat.load(path)
    chat.ask("and now?")
    prompt = tok.decode(asked(chat).prompts[0])
    assert prompt.startswith("Be kind.\nCapabilities and tools that MOSS can possess.\n")
    assert "- Calculator: enabled." in prompt
    chat.save(path)
    other = scripted(tok)
    other.dialog = Dialog("", {}, [])
    other.load(path)
    assert other.dialog == chat.dialog


# ------------------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def folder(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model with a tokenizer."""
    made = tmp_path_factory.mktemp("toy")
    save_model(toy_model(vocab_size=tok.vocab_size), made)
    tok.save(made)
    return made


def test_three_lines_of_python(folder: Path):
    """The plain way in; a seed makes it draw the same again, and each dtype has to answer."""
    replies = []
    for dtype in ("auto", "float32", "int8"):
        with moss.load(folder, dtype=dtype, temperature=1.0, max_tokens=8, seed=1) as chat:
            assert re.fullmatch(rf"<moss.Chat with {folder.name}, \d\.\dM parameters as \w+, 0 turns>", repr(chat))
            assert [event.type for event in chat.stream("hello")][-1] == "done"
            replies.append(chat.history[0])
    assert replies[0] == replies[1]


def test_settings_that_cannot_work_are_told_before_the_model_is_read():
    """Reading 16 billion weights first, and then refusing, costs a minute for a typing mistake."""
    for settings, words in (
        ({"quality": 70}, "quality 70 is not one of 0, 20"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"tools": "calculater"}, "no tool 'calculater'"),
        ({"tools": ["calculator", "oracle"]}, "no tool 'oracle'"),
    ):
        with pytest.raises(UsageError, match=words):
            moss.load("nowhere", **settings)
    with pytest.raises(ValueError, match="no model folder 'nowhere'"):
        moss.load("nowhere")


def test_nothing_can_be_asked_after_close(folder: Path):
    """A closed chat that waits for ever would hang the script."""
    chat = moss.load(folder, max_tokens=4)
    chat.ask("hello")
    chat.close()
    chat.close()
    with pytest.raises(ValueError, match="the engine is closed"):
        chat.ask("hello")


def test_close_frees_the_model(folder: Path):
    """A closed chat kept its model for as long as anybody kept the chat."""
    chat = moss.load(folder, max_tokens=4)
    chat.ask("hello")
    model = weakref.ref(chat.engine.model)
    chat.close()
    gc.collect()
    assert model() is None


def test_a_chat_that_is_dropped_frees_its_model(folder: Path):
    """`chat = moss.load(…)` run twice in a notebook would keep both models, and a thread for each."""
    chat = moss.load(folder, max_tokens=4)
    chat.ask("hello")
    stopped = chat.stream("and?")
    next(stopped)
    model = weakref.ref(chat.engine.model)
    del chat, stopped
    gc.collect()
    assert model() is None


def test_import_moss_is_light():
    """`import moss` in a script that may never chat must not cost seconds and half a gigabyte."""
    code = (
        "import sys, moss; dir(moss);"
        "print([name for name in ('torch', 'numpy', 'rich', 'tokenizers', 'json') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr
