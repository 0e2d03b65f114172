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
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moss import terminal
from moss.chat import META_INSTRUCTION, SWITCHES, Dialog
from moss.engine import Sampling
from moss.errors import UsageError
from moss.resolve import load, locate
from moss.terminal import Chat, Session, answer_line, ask_once, converse, opening
from moss.tokenizer import MARKERS, Tokenizer, train
from moss.tools.base import Tool, ToolError, tool
from moss.weights import save_model
from tests.fakes import ScriptedEngine, toy_model

ROOT = Path(__file__).parent.parent


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


TOOLS: dict[str, Tool] = {"calculator": calculate, "solver": solve}
PLAIN = " None<eot>\n<|Commands|>: None<eoc>"


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(["hello there, add 1+1 and solve x = 1 你好"] * 3, 300)


def ids(tok: Tokenizer, text: str) -> list[int]:
    """What a model writes, its markers as control ids."""
    pieces = re.split("(" + "|".join(map(re.escape, MARKERS)) + ")", text)
    return [id for piece in pieces for id in (tok.marker(piece) if piece in MARKERS else tok.encode(piece))]


def session(tok: Tokenizer, *passes: str, **options) -> tuple[Session, io.StringIO]:
    """A session whose model writes `passes`, and what it shows."""
    shown = io.StringIO()
    dialog = Dialog(
        "Be kind.", {"thoughts": True, **dict.fromkeys(SWITCHES, False), "calculator": True, "solver": True}, []
    )
    engine = ScriptedEngine([ids(tok, text) for text in passes])
    made = Session(
        dialog, engine, tok, TOOLS, Sampling(), console=Console(file=shown, width=100, soft_wrap=True), **options
    )
    return made, shown


# -------------------------------------------------------------------------------------------------------- one answer


def test_each_step_is_shown(tok: Tokenizer):
    """A tool that runs unseen, or a result that is not shown, leaves the user to trust blindly."""
    chat, shown = session(
        tok, ' add them<eot>\n<|Commands|>: Calculate("3+4"), Solve("x+y=3")<eoc>', "<|MOSS|>: It is 7.<eom>"
    )
    answer_line(chat, "What is 3+4?")
    lines = [re.sub(r"\s+\d+ ms$", "", line) for line in shown.getvalue().splitlines()]
    assert lines == ["add them", 'Calculate("3+4") => 7', 'Solve("x+y=3") =>', "  x = 1", "  y = 2", "It is 7."]
    assert [turn.reply for turn in chat.dialog.turns] == ["It is 7."]


def test_a_tool_that_fails_says_why(tok: Tokenizer):
    """The model reads `No result.`; the person should learn the reason."""
    chat, shown = session(tok, ' x<eot>\n<|Commands|>: Calculate("0/0")<eoc>', "<|MOSS|>: Sorry.<eom>")
    answer_line(chat, "0/0?")
    assert 'Calculate("0/0") has no result: division by zero; change the divisor' in shown.getvalue()


def test_model_and_tool_text_cannot_steer_the_terminal(tok: Tokenizer):
    """An escape sequence in a reply could clear the screen, or rename the window; markup could hide text."""
    chat, shown = session(tok, PLAIN, " a\x1b[2Jb\x9bc\x07 [red]d[/red]<eom>")
    answer_line(chat, "hi")
    assert "\x1b" not in shown.getvalue()
    assert "\x9b" not in shown.getvalue()
    assert "a␛[2Jb\ufffdc␇ [red]d[/red]" in shown.getvalue()


def test_json_answer(tok: Tokenizer, capsys: pytest.CaptureFixture[str]):
    """Programs read these names; `None` is how the format writes nothing, not text."""
    chat, _ = session(tok, ' add<eot>\n<|Commands|>: Calculate("3+4")<eoc>', "<|MOSS|>: 七<eom>")
    assert ask_once(chat, "3+4?", as_json=True, loading=0.5) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert answer["thoughts"] == "add"
    assert answer["commands"] == [{"name": "Calculate", "args": ["3+4"]}]
    assert answer["results"] == 'Calculate("3+4") => 7'
    assert answer["reply"] == "七"
    assert answer["finish"] == "stop"
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["timing"]["load"] == 0.5
    assert {"first_token", "total"} <= answer["timing"].keys()

    chat, _ = session(tok, PLAIN, " hi<eom>")
    ask_once(chat, "hi", as_json=True, loading=0)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["thoughts"], answer["commands"], answer["results"]) == ("", [], "")


def test_an_answer_that_fails_is_an_error(tok: Tokenizer):
    """A script must not take an empty answer for a good one."""
    chat, _ = session(tok)
    chat.engine = ScriptedEngine([], max_length=20)
    with pytest.raises(ValueError, match=r"take \d+ tokens, \d+ are left: shorten"):
        ask_once(chat, "word " * 100, as_json=False, loading=0)


def test_history_reaches_the_next_prompt(tok: Tokenizer):
    """A follow-up such as "and times 3?" means nothing without the turn before it."""
    chat, _ = session(tok, PLAIN, " first reply<eom>", PLAIN, " second<eom>")
    answer_line(chat, "one")
    answer_line(chat, "two")
    assert isinstance(chat.engine, ScriptedEngine)
    assert "first reply" in tok.decode(chat.engine.prompts[2])
    answer_line(chat, "/clear")
    assert chat.dialog.turns == []
    assert chat.engine.forgotten == [terminal.CONVERSATION]


def test_seed_is_different_for_each_turn_and_the_same_for_each_run(tok: Tokenizer):
    """One seed for all turns would repeat a choice; no seed must stay random."""
    seeds = []
    for _ in range(2):
        chat, _ = session(tok, PLAIN, " a<eom>", PLAIN, " b<eom>", seed=3)
        answer_line(chat, "one")
        answer_line(chat, "two")
        assert isinstance(chat.engine, ScriptedEngine)
        seeds.append([sampling.seed for sampling in chat.engine.samplings])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 4


# ---------------------------------------------------------------------------------------------------------- commands


def test_tools_are_switched_for_the_next_question(tok: Tokenizer):
    """`/tools calculator off` that only changes the display would still let the tool run."""
    chat, shown = session(tok, PLAIN, " a<eom>")
    answer_line(chat, "/tools calculator off")
    assert not chat.dialog.switches["calculator"]
    assert re.search(r"calculator +off", shown.getvalue())
    assert re.search(r"solver +on", shown.getvalue())
    answer_line(chat, "hi")
    assert isinstance(chat.engine, ScriptedEngine)
    prompt = tok.decode(chat.engine.prompts[0])
    assert "- Calculator: disabled." in prompt
    assert "- Equation solver: enabled." in prompt
    answer_line(chat, "/tools none")
    assert not any(chat.dialog.switches[key] for key in SWITCHES)
    answer_line(chat, "/tools all")
    assert [key for key in SWITCHES if chat.dialog.switches[key]] == ["calculator", "solver"]
    assert chat.dialog.switches["thoughts"]


def test_save_and_load_give_the_same_conversation(tok: Tokenizer, tmp_path: Path):
    """A saved conversation that loses its tool rounds or switches goes on differently."""
    path = tmp_path / "talk.json"
    chat, _ = session(tok, ' add<eot>\n<|Commands|>: Calculate("3+4")<eoc>', "<|MOSS|>: 是 7。<eom>")
    answer_line(chat, "3+4?")
    answer_line(chat, "/tools solver off")
    answer_line(chat, f"/save {path}")
    other, shown = session(tok)
    answer_line(other, f"/load {path}")
    assert other.dialog.turns == chat.dialog.turns
    assert other.dialog.meta == chat.dialog.meta
    assert other.dialog.switches == chat.dialog.switches
    assert "是 7。" in shown.getvalue()
    answer_line(other, f"/save {path}")  # its own file may be replaced
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_save_replaces_no_file_of_someone_else(tok: Tokenizer, tmp_path: Path):
    """A slip in a file name must not cost the user a file."""
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    chat, _ = session(tok, PLAIN, " a<eom>")
    answer_line(chat, "hi")
    with pytest.raises(ValueError, match="exists already"):
        answer_line(chat, f"/save {path}")
    assert path.read_text() == "years of work"


def test_a_save_that_fails_says_so_and_leaves_nothing_behind(tok: Tokenizer, tmp_path: Path, monkeypatch):
    """On a full or read-only disk the conversation must go on, and no half-written file may stay."""
    chat, _ = session(tok, PLAIN, " a<eom>")
    answer_line(chat, "hi")
    with pytest.raises(ValueError, match="there is no folder"):
        answer_line(chat, f"/save {tmp_path}/none/talk.json")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ValueError, match=r"cannot write .*/talk.json: No space left on device; nothing was saved"):
        answer_line(chat, f"/save {tmp_path}/talk.json")
    assert list(tmp_path.iterdir()) == []


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
        ("/tools search on", "not part of this version"),
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
    chat, shown = session(tok, PLAIN, " still here<eom>")
    monkeypatch.setattr(sys, "stdin", io.StringIO(line.format(tmp=tmp_path) + "\nhi\n"))
    assert converse(chat) == 1  # to a script that pipes lines in, this did not go well
    lines = [text for text in shown.getvalue().replace("\n\n", "\n").splitlines() if not text.startswith("> ")]
    assert len(lines) == 2
    assert words in lines[0]
    assert lines[1] == "still here"


def test_an_answer_that_fails_in_a_pipe_is_no_success(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """`moss chat < questions` used to exit 0 although the answer was an error."""
    chat, shown = session(tok)
    chat.engine.max_length = 100  # type: ignore[misc]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a question that is too long " * 50 + "\n"))
    assert converse(chat) == 1
    assert shown.getvalue().count("shorten them") == 1
    assert chat.dialog.turns == []


def test_load_keeps_meta_and_switches_where_the_file_has_none(tok: Tokenizer, tmp_path: Path):
    """A ShareGPT conversation switched every tool off and took the meta instruction away, and said nothing."""
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}))
    chat, _ = session(tok, PLAIN, " b<eom>")
    answer_line(chat, f"/load {path}")
    assert isinstance(chat.engine, ScriptedEngine)
    answer_line(chat, "and now?")
    prompt = tok.decode(chat.engine.prompts[0])
    assert prompt.startswith("Be kind.\nCapabilities and tools that MOSS can possess.\n")
    assert "- Calculator: enabled." in prompt
    answer_line(chat, f"/save {path}")
    other, _ = session(tok)
    other.dialog = Dialog("", {}, [])
    answer_line(other, f"/load {path}")
    assert other.dialog == chat.dialog


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
    chat, _ = session(tok, PLAIN, " a<eom>")
    answer_line(chat, f"/meta {path}")
    answer_line(chat, "hi")
    assert isinstance(chat.engine, ScriptedEngine)
    assert tok.decode(chat.engine.prompts[0]).startswith("Answer in rhymes.\n")
    assert opening(Chat(meta_instruction=path)).meta == "Answer in rhymes."
    assert opening(Chat()).meta == META_INSTRUCTION


def test_quit_and_end_of_input_leave(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """A chat that cannot be left, or that reads on after /quit, is a trap."""
    chat, _ = session(tok)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\nnever read\n"))
    assert converse(chat) == 0
    assert sys.stdin.read() == "never read\n"
    assert converse(chat) == 0


def test_help_lists_every_command(tok: Tokenizer):
    """A command that /help hides is not found."""
    chat, shown = session(tok)
    answer_line(chat, "/help")
    for name in (*terminal.COMMANDS, "/quit"):
        assert name in shown.getvalue()


# -------------------------------------------------------------------------------------------------- flags and models


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Chat(json=True), "--json needs a question"),
        (Chat(prompt="  "), "empty"),
        (Chat(prompt="x", quality=70), "--quality 70"),
        (Chat(prompt="x", tools="calculater"), "no tool 'calculater'"),
        (Chat(prompt="x", tools="search"), "not part of this version"),
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


def test_tools_flag():
    """`--tools` with a list must not silently leave others on."""
    assert [key for key, on in opening(Chat(tools="solver")).switches.items() if on] == ["thoughts", "solver"]
    assert [key for key, on in opening(Chat(tools="none")).switches.items() if on] == ["thoughts"]
    assert [key for key, on in opening(Chat(tools="all")).switches.items() if on] == [
        "thoughts",
        "calculator",
        "solver",
    ]


def test_tools_are_started_while_the_first_question_is_typed(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The first equation of a chat waited for SymPy; a tool that is switched off, or `-p`, must start nothing early."""
    started: list[str] = []
    made = {key: replace(each, prepare=lambda key=key: started.append(key)) for key, each in TOOLS.items()}
    monkeypatch.setattr(terminal, "standard_tools", lambda: made)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    assert terminal.main(Chat(model=str(model_folder), tools="solver")) == 0
    assert started == ["solver"]
    terminal.main(Chat(model=str(model_folder), prompt="hi", max_tokens=1))
    assert started == ["solver"]


@pytest.fixture
def model_folder(tok: Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_model(toy_model(vocab_size=tok.vocab_size), folder)
    tok.save(folder)
    return folder


def test_load_gives_a_model_and_its_tokenizer(model_folder: Path, tok: Tokenizer):
    """The plain case, so that the refusals below are about what they say."""
    model, loaded = load(model_folder)
    assert loaded.sha256 == tok.sha256
    assert model.config.vocab_size == tok.vocab_size


def test_loading_does_not_wake_the_compiler(model_folder: Path):
    """One random initialisation on the meta device imports torch._dynamo: 1.4 s more until the first token."""
    code = (
        "import sys; from moss.resolve import load; load(sys.argv[1]);"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(model_folder)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_models_that_cannot_talk_are_refused_with_what_to_do(model_folder: Path, tmp_path: Path):
    """Each of these once ended in a traceback, or worse in a chat of nonsense."""

    def refusal(folder: Path | str) -> str:
        with pytest.raises(ValueError) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no model folder" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(model_folder / "config.json")
    assert "on a server" in refusal("http://127.0.0.1:9/v1#some")
    (tmp_path / "run" / "step-000020").mkdir(parents=True)
    assert "holds no config.json" in refusal(tmp_path / "run")
    (tmp_path / "run" / "step-000020" / "config.json").write_text("{}")
    assert "did you mean" in refusal(tmp_path / "run")

    larger = train(["hello there, this one has more words in it, many more, 你好吗"] * 3, 330)
    larger.save(model_folder)
    assert "another model's tokenizer" in refusal(model_folder)
    other = train(["quite other words, and no digits"] * 3, 290)
    other.save(model_folder)
    (model_folder / "moss.json").write_text(json.dumps({"tokenizer_sha256": larger.sha256}))
    assert "not the one this model was trained with" in refusal(model_folder)
    (model_folder / "moss.json").write_text("{")
    assert "moss.json is broken" in refusal(model_folder)
    (model_folder / "moss.json").unlink()
    (model_folder / "model.safetensors").write_bytes(b"not weights")
    assert "model.safetensors" in refusal(model_folder)
    (model_folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refusal(model_folder)


def test_a_model_without_chat_markers_is_refused(model_folder: Path):
    """A base model would never end a section; its answer would run on as noise."""
    base = Backend(BPE())
    base.pre_tokenizer = ByteLevel(add_prefix_space=False)
    base.train_from_iterator(
        ["hello"], BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=ByteLevel.alphabet())
    )
    base.save(str(model_folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="knows none of the chat markers"):
        load(model_folder)


def test_without_a_name_the_bundled_model_is_found():
    """`moss chat` has to work from any folder."""
    assert locate() == ROOT / "moss" / "models" / "nano"


# ---------------------------------------------------------------------------------------------------- a real terminal

CHILD = """
import sys, time
sys.path[:0] = [{root!r}]
from moss import terminal
from moss.engine import Sampling
from tests.fakes import ScriptedEngine
from tests.test_terminal import TOOLS, ids, PLAIN
from moss.chat import Dialog
from moss.tokenizer import train

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
made = terminal.Session(Dialog("Be kind.", {{"thoughts": True}}, []), engine, tok, TOOLS, Sampling(max_tokens=5000))
code = terminal.converse(made)
print("turns kept:", [turn.human for turn in made.dialog.turns])
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

    def wait(self, words: str, seconds: float = 60) -> None:
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
    assert shell.process.wait(timeout=20) == 0
    history = tmp_path / "state" / "history"
    assert "tell me all" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
