"""The terminal chat: what is shown, what is kept, what the slash commands do, and Ctrl-C on a real terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moss import __main__ as cli
from moss import session, terminal
from moss.chat import META_INSTRUCTION
from moss.engine import Engine
from moss.engine.fixed import WIDTH
from moss.errors import UsageError
from moss.screen import Screen
from moss.terminal import Chat, answer_line, ask_once, converse, open_chat
from moss.tokenizer import Tokenizer, train
from moss.tools import own
from tests.fakes import toy_folder
from tests.test_session import PLAIN, TOOLS, asked, scripted

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(["hello there, add 1+1 and solve x = 1 你好"] * 3, 300)


def talk(tok: Tokenizer, *passes: str) -> tuple[session.Chat, Screen, io.StringIO]:
    """A chat whose model writes `passes`, and what the terminal shows of it."""
    shown = io.StringIO()
    return scripted(tok, *passes), Screen(Console(file=shown, width=100, soft_wrap=True)), shown


# -------------------------------------------------------------------------------------------------------- one answer


def test_each_step_is_shown(tok: Tokenizer):
    """A tool that runs unseen, or a result that is not shown, leaves the user to trust blindly."""
    chat, screen, shown = talk(
        tok, ' add them<eot>\n<|Commands|>: Calculate("3+4"), Solve("x+y=3")<eoc>', "<|MOSS|>: It is 7.<eom>"
    )
    answer_line(chat, screen, "What is 3+4?")
    lines = [re.sub(r"\s+\d+ ms$", "", line) for line in shown.getvalue().splitlines()]
    assert lines == ["add them", 'Calculate("3+4") => 7', 'Solve("x+y=3") =>', "  x = 1", "  y = 2", "It is 7."]
    assert [turn.reply for turn in chat.history] == ["It is 7."]


def test_a_tool_that_fails_says_why(tok: Tokenizer):
    """The model reads `No result.`; the person should learn the reason."""
    chat, screen, shown = talk(tok, ' x<eot>\n<|Commands|>: Calculate("0/0")<eoc>', "<|MOSS|>: Sorry.<eom>")
    answer_line(chat, screen, "0/0?")
    assert 'Calculate("0/0") has no result: division by zero; change the divisor' in shown.getvalue()


def test_an_empty_reply_is_told(tok: Tokenizer):
    """The user saw nothing at all and could not know whether the program still worked."""
    chat, screen, shown = talk(tok, PLAIN, " <eom>")
    answer_line(chat, screen, "Hi")
    assert "the model gave no reply; ask in another way" in shown.getvalue()


def test_model_and_tool_text_cannot_steer_the_terminal(tok: Tokenizer):
    """An escape sequence in a reply could clear the screen, or rename the window; markup could hide text."""
    chat, screen, shown = talk(tok, PLAIN, " a\x1b[2Jb\x9bc\x07 [red]d[/red]<eom>")
    answer_line(chat, screen, "hi")
    assert "\x1b" not in shown.getvalue()
    assert "\x9b" not in shown.getvalue()
    assert "a␛[2Jb\ufffdc␇ [red]d[/red]" in shown.getvalue()


def test_json_answer(tok: Tokenizer, capsys: pytest.CaptureFixture[str]):
    """Programs read these names; `None` is how the format writes nothing, not text."""
    chat, screen, _ = talk(tok, ' add<eot>\n<|Commands|>: Calculate("3+4")<eoc>', "<|MOSS|>: 七<eom>")
    assert ask_once(chat, screen, "3+4?", as_json=True, loading=0.5) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert answer["thoughts"] == "add"
    assert answer["commands"] == [{"name": "Calculate", "args": ["3+4"]}]
    assert answer["results"] == 'Calculate("3+4") => 7'
    assert answer["sources"] == []
    assert answer["reply"] == "七"
    assert answer["finish"] == "stop"
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["timing"]["load"] == 0.5
    assert {"first_token", "total"} <= answer["timing"].keys()


def test_an_answer_that_fails_is_an_error(tok: Tokenizer, capsys: pytest.CaptureFixture[str]):
    """A script must not take an empty answer for a good one."""
    for as_json in (True, False):
        chat, screen, shown = talk(tok)
        asked(chat).max_length = 20
        with pytest.raises(ValueError, match=r"take \d+ tokens, \d+ are left: shorten"):
            ask_once(chat, screen, "word " * 100, as_json=as_json, loading=0)
        assert capsys.readouterr().out == shown.getvalue() == ""


# ---------------------------------------------------------------------------------------------------------- commands


def test_tools_are_shown_and_switched(tok: Tokenizer):
    """`/tools calculator off` that only changes the display would still let the tool run, and the other way round."""
    chat, screen, shown = talk(tok, PLAIN, " a<eom>")
    answer_line(chat, screen, "/tools calculator off")
    assert dict(chat.tools) == {"calculator": False, "solver": True}
    assert re.search(r"calculator +off", shown.getvalue())
    assert re.search(r"solver +on", shown.getvalue())
    assert re.search(r"text2img +off +not part of this version", shown.getvalue())
    answer_line(chat, screen, "/tools none")
    assert dict(chat.tools) == {"calculator": False, "solver": False}
    answer_line(chat, screen, "/tools all")
    assert dict(chat.tools) == {"calculator": True, "solver": True}


def test_clear_forgets_the_conversation(tok: Tokenizer):
    """Whoever clears the screen because of what was said expects the model not to know it any more."""
    chat, screen, _ = talk(tok, PLAIN, " a<eom>")
    answer_line(chat, screen, "hi")
    assert len(chat.history) == 1
    answer_line(chat, screen, "/clear")
    assert chat.history == []
    assert asked(chat).forgotten == asked(chat).conversations[:1]


def test_save_and_load_give_the_same_conversation(tok: Tokenizer, tmp_path: Path):
    """A saved conversation that loses its tool rounds or switches goes on differently."""
    path = tmp_path / "talk.json"
    chat, screen, _ = talk(tok, ' add<eot>\n<|Commands|>: Calculate("3+4")<eoc>', "<|MOSS|>: 是 7。<eom>")
    answer_line(chat, screen, "3+4?")
    answer_line(chat, screen, "/tools solver off")
    answer_line(chat, screen, f"/save {path}")
    other, screen, shown = talk(tok)
    answer_line(other, screen, f"/load {path}")
    assert other.dialog == chat.dialog
    assert "是 7。" in shown.getvalue()
    answer_line(other, screen, f"/save {path}")  # its own file may be replaced
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/sav x", "no command /sav"),
        ("/save", "write /save FILE"),
        ("/save x.json", "nothing to save"),
        ("/load", "write /load FILE"),
        ("/load {tmp}/nowhere.json", "nowhere.json"),
        ("/load {tmp}/bad.json", "bad.json"),
        ("/meta {tmp}/empty.txt", "is empty"),
        ("/meta {tmp}/latin.txt", "not text in UTF-8"),
        ("/tools calculator", "NAME on|off"),
        ("/tools oracle on", "no tool 'oracle'"),
        ("/tools speech on", "not part of this version"),
        ('/tools "', "NAME on|off"),
        ("/load ~nobody-of-this-name/x", "no such home folder"),
        ("/load {tmp}/two.jsonl", "several conversations"),
        ("/load {tmp}/\x1b]0;owned", "\N{SYMBOL FOR ESCAPE}]0;owned"),
    ],
)
def test_a_bad_command_is_one_line_and_the_chat_goes_on(
    tok: Tokenizer, tmp_path: Path, line: str, words: str, monkeypatch
):
    """An exception at a typing mistake would throw away the conversation."""
    (tmp_path / "bad.json").write_text("{")
    said = {"from": "human", "value": "q"}
    (tmp_path / "two.jsonl").write_text(2 * (json.dumps({"conversations": [said]}) + "\n"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    chat, screen, shown = talk(tok, PLAIN, " still here<eom>")
    monkeypatch.setattr(sys, "stdin", io.StringIO(line.format(tmp=tmp_path) + "\nhi\n"))
    assert converse(chat, screen) == 1  # to a script that pipes lines in, this did not go well
    lines = [text for text in shown.getvalue().replace("\n\n", "\n").splitlines() if not text.startswith("> ")]
    assert len(lines) == 2
    assert words in lines[0]
    assert lines[1] == "still here"


def test_an_answer_that_fails_in_a_pipe_is_no_success(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """`moss chat < questions` used to exit 0 although the answer was an error."""
    chat, screen, shown = talk(tok)
    asked(chat).max_length = 100
    monkeypatch.setattr(sys, "stdin", io.StringIO("a question that is too long " * 50 + "\n"))
    assert converse(chat, screen) == 1
    assert shown.getvalue().count("shorten them") == 1
    assert chat.history == []


def test_without_a_home_there_is_no_history(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """In a container whose user has no home the chat ended in a traceback before its first line."""

    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with terminal.line_history(terminal.HISTORY):
        pass
    assert list(tmp_path.iterdir()) == []


def test_meta_instruction_from_a_file(tok: Tokenizer, tmp_path: Path):
    """`/meta` has to reach the prompt, not just the screen."""
    path = tmp_path / "meta.txt"
    path.write_text("Answer in rhymes.\n", encoding="utf-8")
    chat, screen, _ = talk(tok, PLAIN, " a<eom>")
    answer_line(chat, screen, f"/meta {path}")
    answer_line(chat, screen, "hi")
    assert tok.decode(asked(chat).prompts[0]).startswith("Answer in rhymes.\n")


def test_quit_and_end_of_input_leave(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """A chat that cannot be left, or that reads on after /quit, is a trap."""
    chat, screen, _ = talk(tok)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\nnever read\n"))
    assert converse(chat, screen) == 0
    assert sys.stdin.read() == "never read\n"
    assert converse(chat, screen) == 0


def test_help_lists_every_command(tok: Tokenizer):
    """A command that /help hides is not found."""
    chat, screen, shown = talk(tok)
    answer_line(chat, screen, "/help")
    for name in (*terminal.COMMANDS, "/quit"):
        assert name in shown.getvalue()


# -------------------------------------------------------------------------------------------------- flags and models


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Chat(json=True), "--json needs a question"),
        (Chat(prompt="  "), "empty"),
        (Chat(prompt="x", quality=70), "quality 70 is not one of"),
        (Chat(prompt="x", tools="calculater"), "no tool 'calculater'"),
        (Chat(prompt="x", tools="speech"), "not part of this version"),
        (Chat(prompt="x", tools=""), "no tool ''"),
        (Chat(prompt="x", tools="calculator,"), "no tool ''"),
        (Chat(prompt="x", temperature=-1.0), "temperature is -1.0"),
        (Chat(prompt="x", top_p=7.0), "top_p is 7.0"),
        (Chat(prompt="x", max_tokens=0), "max_tokens is 0"),
    ],
)
def test_flags_that_cannot_work_are_bad_usage(config: Chat, words: str):
    """Found out before the model is loaded, and told apart from a failure by the exit code."""
    with pytest.raises(UsageError, match=re.escape(words)):
        terminal.main(config)


def test_flags_reach_the_chat(model_folder: Path, tmp_path: Path):
    """A flag that is read and then forgotten, such as `--tools` with a list that leaves others on."""
    (tmp_path / "meta.txt").write_text("Answer in rhymes.\n", encoding="utf-8")
    config = Chat(
        model=str(model_folder), tools="solver", dtype="bfloat16", temperature=0.5, top_p=0.4, max_tokens=7,
        quality=60, seed=3, meta_instruction=tmp_path / "meta.txt",
    )  # fmt: skip
    with open_chat(config) as chat:
        assert dict(chat.tools) == {"search": False, "calculator": False, "solver": True}
        assert (chat.quality, chat.seed, chat.meta_instruction) == (60, 3, "Answer in rhymes.")
        assert (chat.sampling.temperature, chat.sampling.top_p, chat.sampling.max_tokens) == (0.5, 0.4, 7)
        assert chat.about.endswith("M parameters as bfloat16")
    with open_chat(Chat(model=str(model_folder), tools="none")) as chat:
        assert not any(chat.tools.values())
        assert chat.meta_instruction == META_INSTRUCTION
        assert chat.about.endswith("M parameters as float32")


def test_deterministic_reaches_the_engine(model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A flag that promises equal bits and is then forgotten is worse than none."""
    engines: list[Engine] = []
    monkeypatch.setattr(session, "Engine", lambda *args, **named: engines.append(Engine(*args, **named)) or engines[-1])
    words = ["chat", "-p", "hi", "--model", str(model_folder), "--max-tokens", "4", "--temperature", "1", "--seed", "1"]
    replies = []
    for more in ([], ["--deterministic"], ["--deterministic"]):
        assert cli.main([*words, "--json", *more]) == 0
        replies.append(json.loads(capsys.readouterr().out)["reply"])
    assert [engine.most == WIDTH for engine in engines] == [False, True, True]
    assert replies[1] == replies[2] != ""


def test_tools_are_started_while_the_first_question_is_typed(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The first equation of a chat waited for SymPy; a tool that is switched off, or `-p`, must start nothing early."""
    started: list[str] = []
    made = {key: replace(each, prepare=lambda key=key: started.append(key)) for key, each in TOOLS.items()}
    monkeypatch.setattr(own, "standard_tools", lambda: made)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    assert terminal.main(Chat(model=str(model_folder), tools="solver")) == 0
    assert started == ["solver"]
    terminal.main(Chat(model=str(model_folder), prompt="hi", max_tokens=1))
    assert started == ["solver"]


@pytest.fixture
def model_folder(tok: Tokenizer, tmp_path: Path) -> Path:
    return toy_folder(tok, tmp_path / "model")


def test_a_base_model_is_called_one(model_folder: Path, capfd: pytest.CaptureFixture[str]):
    """A model before fine-tuning opened like any other, and its endless digits looked like a broken chat."""
    for stage, told in (("pretrain", True), ("sft", False)):
        (model_folder / "moss.json").write_text(json.dumps({"stage": stage}))
        assert terminal.main(Chat(model=str(model_folder), prompt="hi", max_tokens=1)) == 0
        assert ("this is a base model" in capfd.readouterr().err) == told


def test_a_dial_that_the_model_does_not_have_is_told(model_folder: Path, capfd: pytest.CaptureFixture[str]):
    """`--quality 20` of the bundled model made 37*12 "37", and nothing said that it had never seen a tag."""
    for stage, quality, told in (("sft", 20, True), ("sft", None, False), ("pat", 20, False)):
        (model_folder / "moss.json").write_text(json.dumps({"stage": stage}))
        assert terminal.main(Chat(model=str(model_folder), prompt="hi", max_tokens=1, quality=quality)) == 0
        assert ("--quality is a dial of models made by" in capfd.readouterr().err) == told


# ---------------------------------------------------------------------------------------------------- a real terminal

CHILD = """
import sys, time
sys.path[:0] = [{root!r}]
from moss import terminal
from moss.engine import Sampling
from moss.chat import Dialog
from moss.screen import Console, Screen
from moss.session import Chat
from moss.tokenizer import train
from tests.fakes import ScriptedEngine
from tests.test_session import TOOLS, ids, PLAIN

tok = train(["hello there, add 1+1 and solve x = 1"] * 3, 300)
HOME = {home!r}
terminal.HISTORY = terminal.Path(HOME) / "state" / "history"

class Slow(ScriptedEngine):
    def submit(self, *args, **kwargs):
        stream = super().submit(*args, **kwargs)
        if len(self.prompts) == 2:
            inner = type(stream).__next__
            class Dripping(type(stream)):
                def __next__(self):
                    time.sleep(0.05)
                    return inner(self)
            stream.__class__ = Dripping
        return stream

engine = Slow([ids(tok, text) for text in (PLAIN, " word" * 500 + "<eom>", PLAIN, " all is well<eom>")])
made = Chat(Dialog("Be kind.", {{"thoughts": True}}, []), engine, tok, TOOLS, Sampling(max_tokens=5000))
code = terminal.converse(made, Screen(Console(highlight=False, soft_wrap=True)))
print("turns kept:", [turn.human for turn in made.history])
sys.exit(code)
"""


class Terminal:
    """A program on a pseudo-terminal: type, and wait for what it shows."""

    def __init__(self, code: str) -> None:
        self.master, slave = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(slave),
        )
        os.close(slave)
        self.text = ""
        self.seen = 0

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait(self, words: str, seconds: float = 300) -> None:
        """Read until `words` come after what was waited for before."""
        end = time.monotonic() + seconds
        while words not in self.text[self.seen :]:
            assert time.monotonic() < end, f"no {words!r} in {self.text[self.seen :]!r}"
            if select.select([self.master], [], [], 0.5)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:  # the program has left
                    data = b""
                assert data, f"ended without {words!r}: {self.text[self.seen :]!r}"
                self.text += data.decode(errors="replace")
        self.seen = self.text.index(words, self.seen) + len(words)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def _take_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(textwrap.dedent(CHILD).format(root=str(ROOT), home=str(tmp_path)))
    yield made
    made.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(shell: Terminal, tmp_path: Path):
    """Ctrl-C during a long answer used to end the whole chat; at the prompt it must not leave either."""
    shell.wait("> ")
    shell.type("tell me all\r")
    shell.wait("word word word")
    shell.type("\x03")
    shell.wait("stopped; this question is left out")
    shell.wait("> ")
    shell.type("half a li")
    shell.wait("half a li")
    time.sleep(0.5)  # while it still handles that key, Python's readline sees a signal only at the next one
    shell.type("\x03")
    shell.wait("Ctrl-D leaves")
    steps = [
        ("are you there?", "all is well"),
        (f"/save {tmp_path}/talk.json", "1 turn saved"),
        ("/clear", "is empty"),
        (f"/load {tmp_path}/talk.json", "1 turn loaded"),
    ]
    for line, answer in steps:
        shell.wait("> ")
        shell.type(line + "\r")
        shell.wait(answer)
    shell.wait("> ")
    shell.type("\x04")
    shell.wait("turns kept: ['are you there?']")
    assert shell.process.wait(timeout=120) == 0
    history = tmp_path / "state" / "history"
    assert "tell me all" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
