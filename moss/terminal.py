"""`moss chat`: talk to a model in the terminal.

The turn itself happens in `tools.run.answer`; this file reads what a person types, shows the events as they come
(thoughts dim, each command with its live status and result, the reply), and keeps the conversation between turns. A
line that starts with `/` is a command to the program, see `COMMANDS`. Ctrl-C stops an answer, not the program.

    moss chat                                          # a conversation
    moss chat -p "What is 37*12?" --json               # one answer, for programs
    printf 'Hello\\nWhat is 2^10?\\n' | moss chat      # a question a line
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moss.chat import META_INSTRUCTION, NONE, QUALITIES, SWITCHES, Dialog, Turn
from moss.config import option
from moss.data.dialogs import read, to_moss
from moss.engine import Engine, Sampling
from moss.errors import UsageError, one_line, plain
from moss.files import replacing
from moss.model import num_parameters
from moss.resolve import load, locate
from moss.screen import Screen
from moss.tokenizer import Tokenizer
from moss.tools import run
from moss.tools.base import Tool, prepare, standard_tools

try:
    import readline
except ImportError:  # a Python that was built without it: no history, no editing of the line
    readline = None

HISTORY = Path("~/.local/state/moss/history")
HISTORY_LINES = 1000
META_LIMIT = 64 * 1024  # bytes of a meta instruction file that will be read
CONVERSATION = "terminal"


@dataclass(frozen=True)
class Chat:
    """Talk to a model in the terminal; it shows its thoughts, its tools at work and its reply."""

    prompt: str | None = option(None, short="-p")  # ask this once, show the answer and leave
    model: str | None = None  # folder of a model; without it the bundled moss-nano
    tools: str = "all"  # tools switched on: all, none, or a list such as calculator,solver
    temperature: float = 0.0  # how freely tokens are drawn; 0 = always the likeliest
    top_p: float = 0.8  # draw among the likeliest tokens that make up this share
    max_tokens: int = 512  # most tokens of a pass, that is of a round of thinking or of a reply
    quality: int | None = None  # ask for replies of this quality: 0, 20, 40, 60, 80 or 100
    meta_instruction: Path | None = None  # file with the meta instruction that opens the conversation
    seed: int | None = None  # the same seed draws the same answer
    json: bool = False  # with -p: print the answer as one JSON object


def main(config: Chat) -> int:
    """Entry of `moss chat`."""
    if config.json and config.prompt is None:
        raise UsageError("--json needs a question: moss chat -p TEXT --json")
    if config.prompt is not None and not config.prompt.strip():
        raise UsageError("the question after -p is empty")
    if config.quality is not None and config.quality not in QUALITIES:
        raise UsageError(f"--quality {config.quality} is not one of {', '.join(map(str, QUALITIES))}")
    begun = time.perf_counter()
    for stream in (sys.stdin, sys.stdout):  # what cannot be shown or read here must not end the conversation
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    dialog = opening(config)
    try:
        sampling = Sampling(temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens)
    except ValueError as error:
        raise UsageError(str(error)) from None
    model, tok = load(config.model)
    with Engine(model, slots=1) as engine:
        session = Session(dialog, engine, tok, standard_tools(), sampling, quality=config.quality, seed=config.seed)
        if config.prompt is not None:
            return ask_once(session, config.prompt, as_json=config.json, loading=time.perf_counter() - begun)
        name = "moss-nano" if config.model is None else locate(config.model).resolve().name
        size = f"{num_parameters(model.config) / 1e6:.1f}M parameters"
        session.say(f"[bold]{escape(name)}[/], {size}. /help lists commands, /quit leaves.")
        prepare(session.tools, [key for key, on in dialog.switches.items() if on])  # while the first question is typed
        return converse(session)


def opening(config: Chat) -> Dialog:
    """The empty conversation that the flags describe."""
    meta = META_INSTRUCTION if config.meta_instruction is None else read_meta(config.meta_instruction)
    return Dialog(meta, switches(config.tools, standard_tools()), [])


def switches(wanted: str, tools: Mapping[str, Tool]) -> dict[str, bool]:
    """`all`, `none` or a list of keys as the switches of a conversation."""
    keys = set(tools) if wanted == "all" else set()
    for key in [] if wanted in ("all", "none") else map(str.strip, wanted.split(",")):
        _check_tool(key, tools)
        keys.add(key)
    return {"thoughts": True, **{key: key in keys for key in SWITCHES}}


def _check_tool(key: str, tools: Mapping[str, Tool]) -> None:
    if key not in SWITCHES:
        raise UsageError(f"there is no tool {key!r}; the tools are {', '.join(tools)} (or all, or none)")
    if key not in tools:
        raise UsageError(f"{SWITCHES[key].label} ({key}) is not part of this version; there are {', '.join(tools)}")


def read_meta(path: Path) -> str:
    """The meta instruction in a file."""
    with _expanded(path).open("rb") as file:
        data = file.read(META_LIMIT + 1)
    if len(data) > META_LIMIT:
        raise ValueError(f"{path} is longer than {META_LIMIT} bytes; a meta instruction is a short text")
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None
    if not text:
        raise ValueError(f"{path} is empty; write the meta instruction into it")
    return text


# ------------------------------------------------------------------------------------------------------- conversation


class Session:
    """A conversation and what answers it."""

    def __init__(
        self,
        dialog: Dialog,
        engine: run.Submits,
        tok: Tokenizer,
        tools: Mapping[str, Tool],
        sampling: Sampling,
        *,
        quality: int | None = None,
        seed: int | None = None,
        console: Console | None = None,
    ) -> None:
        self.dialog, self.engine, self.tok, self.tools = dialog, engine, tok, dict(tools)
        self.sampling, self.quality, self.seed = sampling, quality, seed
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.files: set[Path] = set()  # saved or loaded here, so that saving may replace them

    def say(self, text: str) -> None:
        """A line from the program itself, in rich's markup."""
        self.console.print(text)

    def events(self, question: str) -> Iterator[run.Event]:
        """Ask, and keep the turn once it is done."""
        number = len(self.dialog.turns)
        options = run.Options(
            sampling=self.sampling,
            quality=self.quality,
            conversation=CONVERSATION,
            seed=None if self.seed is None else self.seed * 2**16 + number,
        )
        asked = replace(self.dialog, turns=[*self.dialog.turns, Turn(question)])
        for event in run.answer(asked, self.engine, self.tok, self.tools, options):
            if isinstance(event, run.Done):
                self.dialog.turns.append(event.turn)
            yield event


def ask_once(session: Session, question: str, *, as_json: bool, loading: float) -> int:
    """`moss chat -p`: one answer, for people or as JSON."""
    screen = Screen(session.console)
    notices: list[str] = []
    done: run.Done | None = None
    try:
        for event in session.events(question):
            if isinstance(event, run.Error):
                raise ValueError(event.text)
            if isinstance(event, run.Notice):
                notices.append(event.text)
            if isinstance(event, run.Done):
                done = event
            if not as_json:
                screen.show(event)
    finally:
        screen.end()
    if as_json and done:
        print(json.dumps(answer_json(done, notices, loading), ensure_ascii=False))
    return 0


def answer_json(done: run.Done, notices: list[str], loading: float) -> dict[str, Any]:
    """One answer for programs; times in seconds."""
    rounds = done.turn.rounds
    calls = [call for item in rounds for call in run.parse_commands(item.commands)]
    return {
        "thoughts": "\n".join(item.thoughts for item in rounds if item.thoughts != NONE),
        "commands": [{"name": call.name, "args": call.args} for call in calls],
        "results": "\n".join(item.results for item in rounds if item.results != NONE),
        "reply": done.turn.reply,
        "finish": done.finish,
        "notices": notices,
        "usage": done.usage,
        "timing": {"load": round(loading, 4), **{name: round(value, 4) for name, value in done.timing.items()}},
    }


def converse(session: Session) -> int:
    """Questions and commands, line by line, until `/quit` or the end of the input.

    Whoever sits at the keyboard sees what failed; of lines from a pipe, one that failed makes the exit code 1.
    """
    at_keyboard, code = sys.stdin.isatty(), 0
    with line_history(HISTORY) if at_keyboard else contextlib.nullcontext():
        while True:
            try:
                line = read_line(session.console, sys.stdin)
            except KeyboardInterrupt:
                if not at_keyboard:
                    raise
                session.say("\n[dim]/quit or Ctrl-D leaves[/]")
                continue
            if line is None:
                return code
            try:
                if not answer_line(session, line):
                    return code
                session.console.print()
            except KeyboardInterrupt:
                if not at_keyboard:
                    raise
                what = "" if line.lstrip().startswith("/") else "; this question is left out of the conversation"
                session.say(f"[yellow]stopped{what}[/]")
            except (ValueError, OSError) as error:
                session.console.print(Text(one_line(error), style="red"))
                code = 0 if at_keyboard else 1


def read_line(console: Console, stdin: TextIO) -> str | None:
    """The next line without its end; None after the last. A line from a pipe is echoed, so that the output is whole."""
    if stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            console.print()
            return None
    line = stdin.readline()
    if line:
        console.print(Text("> " + plain(line.rstrip("\n"))), soft_wrap=True)
    return line.rstrip("\n") if line else None


def answer_line(session: Session, line: str) -> bool:
    """Do what one line asks for; False when the conversation is over."""
    line = line.strip()
    if not line:
        return True
    if line.startswith("/"):
        return command(session, line)
    screen = Screen(session.console)
    try:
        for event in session.events(line):
            if isinstance(event, run.Error):
                raise ValueError(event.text)
            screen.show(event)
    finally:
        screen.end()
    return True


@contextlib.contextmanager
def line_history(path: Path) -> Iterator[None]:
    """Lines typed earlier, for the arrow keys; where the file cannot be read or written there simply is none."""
    try:
        path = _expanded(path)
    except ValueError:  # a user without a home, as in some containers
        yield
        return
    if readline is None:
        yield
        return
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # what people ask is nobody else's business
            readline.write_history_file(path)


# ----------------------------------------------------------------------------------------------------------- commands


def command(session: Session, line: str) -> bool:
    """Run a `/` command; False when it ends the conversation. ValueError says what was wrong with it."""
    name, _, rest = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name}; /help lists them. (A question cannot start with a slash.)")
    words = rest.split() if name == "/tools" else [rest.strip()] if rest.strip() else []
    COMMANDS[name][1](session, words)
    return True


def _help(session: Session, words: list[str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for usage, _, text in COMMANDS.values():
        table.add_row(Text(usage), text)
    table.add_row("/quit", "leave; Ctrl-D does the same")
    session.console.print(table)
    session.say("Ctrl-C stops an answer. Anything else you type is a question.")


def _tools(session: Session, words: list[str]) -> None:
    if words and (len(words) != 2 or words[1] not in ("on", "off")) and words not in (["all"], ["none"]):
        raise ValueError("write /tools, /tools all, /tools none, or /tools NAME on|off")
    if len(words) == 1:
        session.dialog.switches.update(dict.fromkeys(SWITCHES, False) | dict.fromkeys(session.tools, words == ["all"]))
    elif words:
        _check_tool(words[0], session.tools)
        session.dialog.switches[words[0]] = words[1] == "on"
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, switch in SWITCHES.items():
        on = session.dialog.switches.get(key, False) and key in session.tools
        state = "[green]on[/]" if on else "off"
        table.add_row(key, state, switch.api if key in session.tools else "[dim]not part of this version[/]")
    session.console.print(table)


def _clear(session: Session, words: list[str]) -> None:
    session.dialog = replace(session.dialog, turns=[], extra={})
    session.engine.forget(CONVERSATION)
    session.say("[dim]the conversation is empty[/]")


def _save(session: Session, words: list[str]) -> None:
    path = _path(words, "/save FILE")
    if path.exists() and path.resolve() not in session.files:
        raise ValueError(f"{path} exists already; save under another name")
    if not session.dialog.turns:
        raise ValueError("there is nothing to save yet")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}; make it first, or save elsewhere")
    try:
        with replacing(path) as file:
            file.write_text(json.dumps(to_moss(session.dialog), ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; nothing was saved") from None
    session.files.add(path.resolve())
    session.console.print(Text(f"{_turns(session.dialog)} saved in {plain(str(path))}", style="dim"))


def _load(session: Session, words: list[str]) -> None:
    """Take the conversation of a file; where it has no meta instruction or no switches, those of now stay."""
    path = _path(words, "/load FILE")
    dialogs = list(islice(read(path), 2))
    if not dialogs:
        raise ValueError(f"{path} holds no conversation")
    if len(dialogs) > 1:
        raise ValueError(f"{path} holds several conversations; put the one to go on with into a file of its own")
    now, dialog = session.dialog, dialogs[0]
    session.dialog = replace(dialog, meta=dialog.meta or now.meta, switches=dialog.switches or now.switches)
    session.engine.forget(CONVERSATION)
    session.files.add(path.resolve())
    for turn in dialog.turns[-2:]:
        session.console.print(Text("> " + plain(turn.human)))
        session.console.print(Text(plain(turn.reply)))
    session.console.print(Text(f"{_turns(dialog)} loaded from {plain(str(path))}", style="dim"))


def _turns(dialog: Dialog) -> str:
    return "1 turn" if len(dialog.turns) == 1 else f"{len(dialog.turns)} turns"


def _meta(session: Session, words: list[str]) -> None:
    if not words:
        session.console.print(Text(plain(session.dialog.meta), style="dim"))
        return
    session.dialog = replace(session.dialog, meta=read_meta(_path(words, "/meta FILE")))
    session.say("[dim]the meta instruction is now that of the file[/]")


def _path(words: list[str], usage: str) -> Path:
    if not words:
        raise ValueError(f"write {usage}")
    return _expanded(Path(words[0]))


def _expanded(path: Path) -> Path:
    """A path with `~` as the user's home."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such home folder; write the whole path") from None


# name -> (how it is written, what does it, what it does)
COMMANDS: dict[str, tuple[str, Callable[[Session, list[str]], None], str]] = {
    "/help": ("/help", _help, "this list"),
    "/tools": ("/tools [NAME on|off]", _tools, "which tools the model may use; switch one: /tools calculator off"),
    "/meta": ("/meta [FILE]", _meta, "show the meta instruction, or take another one from a file"),
    "/clear": ("/clear", _clear, "forget the conversation so far"),
    "/save": ("/save FILE", _save, "write the conversation to a file"),
    "/load": ("/load FILE", _load, "go on with a conversation from a file"),
}
