"""Tools of one's own: from a file, from Python, in the terminal; in the prompt, the grammar and what is saved."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

import moss
from moss import __main__ as cli
from moss import session, terminal
from moss.chat import render
from moss.errors import UsageError
from moss.screen import Screen
from moss.session import switched
from moss.terminal import answer_line
from moss.tokenizer import Tokenizer, train
from moss.tools.base import Tool, standard_tools, tool
from moss.tools.own import from_file, load_tools, merged
from tests.test_grammar import at_commands, follows
from tests.test_session import PLAIN, TOOLS, asked, ids, scripted

MONEY = '''
from __future__ import annotations
from typing import Optional
import moss

@moss.tool
def convert_money(amount: float, currency: str, rates: Optional[dict[str, float]] = None) -> str:
    """Convert an amount of euros into another currency.

    Args:
        amount: euros, for example 12.5
        currency: three letters, for example USD
    """
    known = {"USD": 1.1, **(rates or {})}
    if currency not in known:
        raise moss.ToolError(f"no rate is known for {currency}; give one")
    return f"{amount * known[currency]:.2f} {currency}"

@moss.tool(key="pages", switch="My pages", api="FindPage", seconds=2)
def find(query: str) -> list[moss.Source]:
    """Find one of my pages."""
    moss.progress("looking")
    return [moss.Source(f"About {query}", "file:///pages/1", f"what I know of {query}")]

again = convert_money  # another name of the same tool
'''
LOOK = ' look<eot>\n<|Commands|>: ConvertMoney("2", "USD")<eoc>'


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(["hello there, add 1+1 and solve x = 1 你好"] * 3, 300)


@pytest.fixture
def money(tmp_path: Path) -> Path:
    path = tmp_path / "money.py"
    path.write_text(MONEY, encoding="utf-8")
    return path


def written(folder: Path, text: str) -> Path:
    path = folder / "tools.py"
    path.write_text(text, encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------------- from a file


def test_a_file_of_tools(money: Path) -> None:
    """The plain case: what the file decorates is there beside the standard tools."""
    tools = load_tools(money)
    assert list(tools) == [*standard_tools(), "convert_money", "pages"]
    assert tools["convert_money"].api == "ConvertMoney(amount, currency)"
    assert tools["pages"].switch == "My pages" and tools["pages"].seconds == 2
    assert tools["convert_money"](2, "USD") == "2.20 USD"
    assert load_tools() == standard_tools()


def test_a_file_imports_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second file for what tools share is where everybody begins, and the name of a library must stay the library."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path.parent)
    for name, text in (("rates_here", "USD = 2"), ("later_here", "FEE = 1"), ("json", "1/0")):
        (tmp_path / f"{name}.py").write_text(text)
    text = """
import json, moss, rates_here
@moss.tool
def convert(amount: float) -> str:
    'Convert.'
    import later_here
    return str(amount * rates_here.USD - later_here.FEE)
"""
    written(tmp_path, text)
    tools = load_tools(Path(tmp_path.name) / "tools.py")
    monkeypatch.chdir("/")
    assert tools["convert"](3) == "5"
    load_tools(tmp_path / "tools.py")
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import moss\n\nx = 1 +\n", "tools.py, line 3: SyntaxError: invalid syntax"),
        ("import moss\n1/0\n", "tools.py, line 2: ZeroDivisionError: division by zero"),
        ("def f():\n    raise KeyError('a')\n\nf()\n", "tools.py, line 2: KeyError: 'a'"),
        ("import json\njson.loads('{')\n", "tools.py, line 2: JSONDecodeError"),
        ("import no_such_module_anywhere\n", "line 1: ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("import sys\nsys.exit('usage: …')\n", "tools.py, line 2: SystemExit: usage"),
        ("import moss\n@moss.tool\ndef f(a: str): return a\n", "line 2: ValueError: tool F needs a docstring"),
        ("import moss\n@moss.tool\ndef f(a: set):\n    'Doc.'\n", "line 2: ValueError: argument a is a <class 'set'>"),
        ("x = '\0'\n", "tools.py: SyntaxError: source code string cannot contain null bytes"),
    ],
)
@pytest.mark.parametrize("relative", [True, False])
def test_a_file_that_fails_names_the_line(
    tmp_path: Path, text: str, words: str, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who writes a first tool must see where the mistake is, not the inside of importlib."""
    path = written(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        load_tools(Path(path.name) if relative else path)
    assert not isinstance(raised.value, UsageError)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("nowhere.py", None, "nowhere.py is no file; name a Python file with tools"),
        ("", None, "is no file"),
        ("tools.txt", "x = 1", "tools.txt is no Python file; its name must end in .py"),
        ("tools.py", "def f(a): return a", "tools.py holds no tool; put @moss.tool over a function with a docstring"),
        ("tools.py", "", "holds no tool"),
    ],
)
def test_what_is_no_file_of_tools_is_bad_usage(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    """A path with a slip in it, or a file whose author forgot the decorator."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=re.escape(words)):
        from_file(tmp_path / name)


def named(key: str, api: str) -> Tool:
    @tool(key=key, switch="Mine", api=api)
    def mine(text: str) -> str:
        """Mine."""
        return text

    return mine


def test_a_tool_of_ones_own_may_stand_in_for_a_standard_one() -> None:
    """A better calculator is what the file is for; two under one name would let chance choose."""
    for better in (named("calculator", "Calculate"), named("mine", "Calculate"), named("calculator", "Sum")):
        tools = merged(standard_tools(), [better], "f.py")
        assert tools[better.key] is better and len(tools) == 3
        assert [each.name for each in tools.values()].count(better.name) == 1
    both = merged(standard_tools(), [named("calculator", "Solve")], "f.py")
    assert list(both) == ["search", "calculator"]
    mine = standard_tools()["calculator"]
    assert merged(standard_tools(), [mine], "f.py") == standard_tools()  # one that the file only imports


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (named("one", "Two"), r"f.py: there is a tool one \(One\) already; give this one another name"),
        (named("two", "One"), r"there is a tool one \(One\) already"),
        (named("text2img", "Paint"), r"the key text2img belongs to Text2Image\(description\); choose another"),
    ],
)
def test_names_that_clash_are_bad_usage(second: Tool, words: str) -> None:
    """The one that is found last would win, and nothing would say so."""
    with pytest.raises(UsageError, match=words):
        merged(standard_tools(), [named("one", "One"), second], "f.py")


# ---------------------------------------------------------------------------------------------------- a turn with them


def test_a_whole_turn(tok: Tokenizer, money: Path) -> None:
    """Switch line, API line, place in the grammar, events, result: all of a tool that nobody here knows."""
    tools = load_tools(money)
    chat = scripted(tok, LOOK, '<|Inner Thoughts|>: x<eot>\n<|Commands|>: FindPage("me")<eoc>', "<|MOSS|>: ok<eom>")
    chat.known, switches = switched(["convert_money", "pages"], tools)
    chat.dialog.switches = switches
    events = list(chat.stream("2 euros?"))
    prompt = tok.decode(asked(chat).prompts[0])
    assert "- Convert money: enabled. API: ConvertMoney(amount, currency)\n" in prompt
    assert "- My pages: enabled. API: FindPage(query)\n" in prompt
    assert "- Calculator: disabled.\n" in prompt
    kinds = [event.type for event in events if event.type.startswith("tool")]
    assert kinds == ["tool_started", "tool_done", "tool_started", "tool_progress", "tool_done"]
    assert [item.results for item in chat.history[0].rounds] == [
        'ConvertMoney("2", "USD") =>\n2.20 USD',
        "FindPage(\"me\") =>\n<|1|>: 'what I know of me'",
    ]


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ('ConvertMoney("2", "USD")', True),
        ('ConvertMoney("2", "USD", "{}")', True),
        ('ConvertMoney("2", "USD"), ConvertMoney("3", "GBP")', True),
        ("None", True),
        ('ConvertMoney("2")', False),
        ('ConvertMoney("2", "USD", "{}", "x")', False),
        ('FindPage("me")', False),  # it is off
        ('Calculate("1")', False),
    ],
)
def test_the_grammar_allows_what_is_on_and_nothing_else(tok: Tokenizer, money: Path, line: str, right: bool) -> None:
    """A model held to a grammar that does not know the tool could never use it."""
    chat = scripted(tok, PLAIN, " a<eom>")
    chat.known, chat.dialog.switches = switched("convert_money", load_tools(money))
    chat.ask("hi")
    grammar = asked(chat).grammars[0]
    assert grammar is not None
    state = at_commands(grammar, tok)  # type: ignore[arg-type]
    assert follows(state, [*tok.encode(" " + line), *tok.marker("<eoc>")]) == right
    assert "- My pages: disabled.\n" in tok.decode(asked(chat).prompts[0])


def test_what_is_off_does_not_run(tok: Tokenizer, money: Path) -> None:
    """The switch decides, whatever the model writes."""
    chat = scripted(tok, LOOK, "<|MOSS|>: ok<eom>")
    chat.known, chat.dialog.switches = switched("pages", load_tools(money))
    assert chat.ask("2 euros?").results == ""


def test_tools_given_to_load() -> None:
    """A notebook makes a function a tool and asks at once; running the cell again makes another one of that name."""
    one, two = named("mine", "Mine"), named("mine", "Mine")
    with moss.load(tools=["calculator", one], max_tokens=30) as chat:
        assert dict(chat.tools) == {"search": False, "calculator": True, "solver": False, "mine": True}
        assert "444" in str(chat.ask("What is 37*12?").results)
        chat.tools = two
        assert chat.known["mine"] is two and not chat.tools["calculator"]
        chat.tools = [named("other", "Mine")]  # the name stays, the key is another one
        assert "mine" not in chat.tools and "mine" not in chat.dialog.switches
        chat.ask("hi")
    for clash in ([named("a", "Same"), named("b", "Same")], [named("a", "A"), named("a", "B")]):
        with pytest.raises(UsageError, match="each needs a name of its own"):
            moss.load(tools=clash)


def test_saved_and_loaded_conversations(tok: Tokenizer, money: Path, tmp_path: Path) -> None:
    """What a tool of one's own said stays in the conversation, also where the tool is not known any more."""
    path = tmp_path / "talk.json"
    tools = load_tools(money)
    chat = scripted(tok, LOOK, "<|MOSS|>: 2.20<eom>", PLAIN, " b<eom>", tools=tools)
    chat.ask("2 euros?")
    chat.save(path)
    other = scripted(tok, PLAIN, " b<eom>", tools=tools)
    stranger = scripted(tok, PLAIN, " b<eom>", tools=TOOLS)
    for each in (other, stranger):
        each.load(path)
        assert each.history == chat.history
        each.ask("and?")
        assert 'ConvertMoney("2", "USD") =>\n2.20 USD' in tok.decode(asked(each).prompts[0])
    chat.ask("and?")
    assert asked(chat).prompts[2] == asked(other).prompts[0]  # to the id what the live conversation has
    assert "- Convert money: enabled." in tok.decode(asked(other).prompts[0])
    assert "Convert money" not in tok.decode(asked(stranger).prompts[0])
    lines = {**moss.chat.SWITCHES, **{each.key: moss.chat.Switch(each.switch, each.api) for each in tools.values()}}
    whole = render(chat.dialog, tok, switches=lines)[0]
    assert whole[: len(asked(chat).prompts[3])] == asked(chat).prompts[3]


# ------------------------------------------------------------------------------------------- terminal and command line


def test_slash_tools(tok: Tokenizer, money: Path) -> None:
    """`/tools` is where a person sees whether the tool is there, what it takes, and what it lacks."""
    shown = io.StringIO()
    screen = Screen(Console(file=shown, width=120, soft_wrap=True))
    tools = load_tools(money)
    lacking = Tool("lacking", "Lacking", "Lack", lambda text: text, missing=lambda: "[b]no[/b] package\x1b[2J")
    chat = scripted(tok, LOOK, "<|MOSS|>: ok<eom>", tools=tools | {"lacking": lacking})
    chat.dialog.switches["lacking"] = False
    answer_line(chat, screen, "/tools")
    assert re.search(r"convert_money +on +ConvertMoney\(amount, currency\)", shown.getvalue())
    assert re.search(r"lacking +off +\[b\]no\[/b\] package␛\[2J", shown.getvalue())
    answer_line(chat, screen, "/tools pages off")
    assert re.search(r"pages +off +FindPage\(query\)", shown.getvalue())
    with pytest.raises(UsageError, match=r"Lacking \(lacking\) cannot be used"):
        answer_line(chat, screen, "/tools lacking on")
    answer_line(chat, screen, "2 euros?")
    assert re.search(r'ConvertMoney\("2", "USD"\) => 2\.20 USD', shown.getvalue())


def test_moss_tool_with_a_file(money: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A tool can be tried without a model, as it will be called."""
    line = 'ConvertMoney("12.5", "USD"), FindPage("me"), ConvertMoney("x", "USD"), ConvertMoney("1", "GBP")'
    assert cli.main(["tool", "--tools-from", str(money), line]) == 1
    out, err = capfd.readouterr()
    assert out == (
        'ConvertMoney("12.5", "USD") =>\n13.75 USD\nFindPage("me") =>\n<|1|>: \'what I know of me\'\n'
        'ConvertMoney("x", "USD") =>\nNo result.\nConvertMoney("1", "GBP") =>\nNo result.\n'
    )
    assert err.splitlines() == [
        "[1] About me  file:///pages/1",
        "moss tool: ConvertMoney: ConvertMoney was given 'x' where it takes number",
        "moss tool: ConvertMoney: no rate is known for GBP; give one",
    ]
    assert cli.main(["tool", "--tools-from", str(money), 'Calculate("1+1")', "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["results"] == 'Calculate("1+1") => 2'


@pytest.mark.parametrize(("text", "code"), [("1/0", 1), ("x = 1", 2)])
def test_a_bad_file_is_one_line_and_an_exit_code(
    tmp_path: Path, text: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """A traceback of ours would hide the mistake that is theirs."""
    path = written(tmp_path, text)
    for verb in (["tool", 'Calculate("1")'], ["chat", "-p", "hi"]):
        assert cli.main([*verb, "--tools-from", str(path)]) == code
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and "tools.py" in err


def test_moss_chat_with_a_file(money: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model has never seen such a tool; it may not use it well, but nothing may break."""
    config = terminal.Chat(prompt="What is 37*12?", tools_from=money, json=True)
    assert terminal.main(config) == 0
    assert json.loads(capfd.readouterr().out)["results"] == 'Calculate("37*12") => 444'
    config = terminal.Chat(tools_from=money, tools="convert_money", max_tokens=60)
    lines = (
        "Convert 12.5 euros to USD with ConvertMoney.\n把十欧元换成美元\n/tools convert_money off\nand now?\n/tools\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert terminal.main(config) == 0
    assert re.search(r"convert_money +off", capfd.readouterr().out)


def test_the_flag_of_tools_takes_own_keys(money: Path) -> None:
    """`--tools` with a list is how one switches everything else off."""
    tools, switches = session.switched("pages,calculator", load_tools(money))
    assert [key for key, on in switches.items() if on] == ["thoughts", "calculator", "pages"]
    with pytest.raises(UsageError, match=r"no tool 'convert'; the tools are search, .*convert_money, pages"):
        session.switched("convert", tools)


def test_ids_of_own_commands_are_plain_text(tok: Tokenizer) -> None:
    """The name of a tool is ordinary text in the prompt, whatever it is."""
    assert not set(ids(tok, 'ConvertMoney("2", "USD")')) & tok.control_ids
