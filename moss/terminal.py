"""`moss chat`: talk to a model in the terminal.

The turn itself happens in `tools.run.answer`; this file reads what a person types, shows the events as they come
(thoughts dim, each command with its live status and result, the reply), and keeps the conversation between turns. A
line that starts with `/` is a command to the program, see `COMMANDS`. Ctrl-C stops an answer, not the program.

    moss chat                                          # a conversation
    moss chat -p "What is 37*12?" --json               # one answer, for programs
    moss chat --model http://host:port/v1#name         # a model on a server; its key in MOSS_API_KEY
    printf 'Hello\\nWhat is 2^10?\\n' | moss chat      # a question a line
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moss import session
from moss.chat import META_INSTRUCTION, SWITCHES
from moss.config import option
from moss.errors import UsageError, one_line, plain
from moss.log import note
from moss.resolve import Device, Dtype, stage
from moss.screen import Screen
from moss.session import counted, expanded
from moss.tools.own import load_tools

try:
    import readline
except ImportError:  # a Python that was built without it: no history, no editing of the line
    readline = None

HISTORY = Path("~/.local/state/moss/history")
HISTORY_LINES = 1000
META_LIMIT = 64 * 1024  # bytes of a meta instruction file that will be read


@dataclass(frozen=True)
class Chat:
    """Talk to a model in the terminal; it shows its thoughts, its tools at work and its reply."""

    prompt: str | None = option(None, short="-p")  # ask this once, show the answer and leave
    model: str | None = None  # folder of a model, or http://host:port/v1#name; without it the bundled moss-nano
    tokenizer: Path | None = None  # the model's tokenizer, to send a server ids to complete; without it, it is to chat
    dtype: Dtype = "auto"  # format of the weights; auto takes what fits this machine and the model's size
    device: Device = "auto"  # where the model runs; auto takes the GPU where there is one and it gains
    tools: str = "all"  # tools switched on: all, none, or a list such as calculator,solver
    tools_from: Path | None = None  # Python file with tools of your own: functions under @moss.tool
    mcp: str | None = None  # MCP server whose tools to use: a command in quotes, an address, or a settings file
    temperature: float = 0.0  # how freely tokens are drawn; 0 = always the likeliest
    top_p: float = 0.8  # draw among the likeliest tokens that make up this share
    max_tokens: int = 512  # most tokens of a pass, that is of a round of thinking or of a reply
    quality: int | None = None  # ask for replies of this quality, 0, 20, … 100; none = 100 of a model of `train pat`
    meta_instruction: Path | None = None  # file with the meta instruction that opens the conversation
    seed: int | None = None  # the same seed draws the same answer
    deterministic: bool = False  # the same scores to the last bit, however the prompt is read or remembered
    json: bool = False  # with -p: print the answer as one JSON object


def main(config: Chat) -> int:
    """Entry of `moss chat`."""
    if config.json and config.prompt is None:
        raise UsageError("--json needs a question: moss chat -p TEXT --json")
    if config.prompt is not None and not config.prompt.strip():
        raise UsageError("the question after -p is empty")
    begun = time.perf_counter()
    for stream in (sys.stdin, sys.stdout):  # what cannot be shown or read here must not end the conversation
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    screen = Screen(Console(highlight=False, soft_wrap=True))
    with open_chat(config) as chat:
        if config.prompt is not None:
            return ask_once(chat, screen, config.prompt, as_json=config.json, loading=time.perf_counter() - begun)
        screen.console.print(f"[bold]{escape(chat.about)}[/]. /help lists commands, /quit leaves.")
        chat.prepare()  # while the first question is typed
        return converse(chat, screen)


def open_chat(config: Chat) -> session.Chat:
    """The empty conversation that the flags describe."""
    chat = session.load(
        config.model,
        tokenizer=config.tokenizer,
        dtype=config.dtype,
        device=config.device,
        tools=config.tools,
        known=load_tools(config.tools_from, config.mcp),
        meta_instruction=META_INSTRUCTION if config.meta_instruction is None else read_meta(config.meta_instruction),
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        quality=config.quality,
        seed=config.seed,
        deterministic=config.deterministic,
    )
    made_by = stage(config.model)
    if made_by == "pretrain":
        note("this is a base model: it continues text, and learns to answer only by `moss train sft`")
    if config.quality is not None and made_by != "pat":
        note("--quality is a dial of models made by `moss train pat`; this one may not know its tag, and answer worse")
    return chat


def read_meta(path: Path) -> str:
    """The meta instruction in a file."""
    with expanded(path).open("rb") as file:
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


def ask_once(chat: session.Chat, screen: Screen, question: str, *, as_json: bool, loading: float) -> int:
    """`moss chat -p`: one answer, for people or as JSON; times in seconds."""
    answer = ask(chat, None if as_json else screen, question)
    if as_json:
        row = asdict(answer)
        row["timing"] = {"load": round(loading, 4), **answer.timing}
        print(json.dumps(row, ensure_ascii=False))
    return 0


def ask(chat: session.Chat, screen: Screen | None, question: str) -> session.Answer:
    """One answer, shown as it comes."""
    if screen is None:
        return chat.ask(question)
    try:
        return chat.ask(question, watch=screen.show)
    finally:
        screen.end()


def converse(chat: session.Chat, screen: Screen) -> int:
    """Questions and commands, line by line, until `/quit` or the end of the input.

    Whoever sits at the keyboard sees what failed; of lines from a pipe, one that failed makes the exit code 1.
    """
    at_keyboard, code = sys.stdin.isatty(), 0
    with line_history(HISTORY) if at_keyboard else contextlib.nullcontext():
        while True:
            try:
                line = read_line(screen.console, sys.stdin)
            except KeyboardInterrupt:
                if not at_keyboard:
                    raise
                screen.console.print("\n[dim]/quit or Ctrl-D leaves[/]")
                continue
            if line is None:
                return code
            try:
                if not answer_line(chat, screen, line):
                    return code
                screen.console.print()
            except KeyboardInterrupt:
                if not at_keyboard:
                    raise
                what = "" if line.lstrip().startswith("/") else "; this question is left out of the conversation"
                screen.console.print(f"[yellow]stopped{what}[/]")
            except (ValueError, OSError) as error:
                screen.console.print(Text(one_line(error), style="red"))
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


def answer_line(chat: session.Chat, screen: Screen, line: str) -> bool:
    """Do what one line asks for; False when the conversation is over."""
    line = line.strip()
    if line.startswith("/"):
        return command(chat, screen.console, line)
    if line:
        ask(chat, screen, line)
    return True


@contextlib.contextmanager
def line_history(path: Path) -> Iterator[None]:
    """Lines typed earlier, for the arrow keys; where the file cannot be read or written there simply is none."""
    try:
        path = expanded(path)
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


def command(chat: session.Chat, console: Console, line: str) -> bool:
    """Run a `/` command; False when it ends the conversation. ValueError says what was wrong with it."""
    name, _, rest = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name}; /help lists them. (A question cannot start with a slash.)")
    words = rest.split() if name == "/tools" else [rest.strip()] if rest.strip() else []
    COMMANDS[name][1](chat, console, words)
    return True


def _help(chat: session.Chat, console: Console, words: list[str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for usage, _, text in COMMANDS.values():
        table.add_row(Text(usage), text)
    table.add_row("/quit", "leave; Ctrl-D does the same")
    console.print(table)
    console.print("Ctrl-C stops an answer. Anything else you type is a question.")


def _tools(chat: session.Chat, console: Console, words: list[str]) -> None:
    if words and (len(words) != 2 or words[1] not in ("on", "off")) and words not in (["all"], ["none"]):
        raise ValueError("write /tools, /tools all, /tools none, or /tools NAME on|off")
    if len(words) == 1:
        chat.tools = words[0]
    elif words:
        chat.tools[words[0]] = words[1] == "on"
    table = Table(box=None, show_header=False, pad_edge=False)
    for key in SWITCHES | chat.known:
        state = "[green]on[/]" if chat.tools.get(key) else "off"
        tool = chat.known.get(key)
        lacks = "not part of this version" if tool is None else tool.lacks
        about = Text(plain(lacks), style="dim") if lacks or tool is None else Text(plain(tool.api))
        table.add_row(Text(plain(key)), state, about)
    console.print(table)


def _clear(chat: session.Chat, console: Console, words: list[str]) -> None:
    chat.clear()
    console.print("[dim]the conversation is empty[/]")


def _save(chat: session.Chat, console: Console, words: list[str]) -> None:
    path = _path(words, "/save FILE")
    chat.save(path)
    console.print(Text(f"{counted(chat.history)} saved in {plain(str(path))}", style="dim"))


def _load(chat: session.Chat, console: Console, words: list[str]) -> None:
    path = _path(words, "/load FILE")
    chat.load(path)
    for turn in chat.history[-2:]:
        console.print(Text("> " + plain(turn.human)))
        console.print(Text(plain(turn.reply)))
    console.print(Text(f"{counted(chat.history)} loaded from {plain(str(path))}", style="dim"))


def _meta(chat: session.Chat, console: Console, words: list[str]) -> None:
    if not words:
        console.print(Text(plain(chat.meta_instruction), style="dim"))
        return
    chat.meta_instruction = read_meta(_path(words, "/meta FILE"))
    console.print("[dim]the meta instruction is now that of the file[/]")


def _path(words: list[str], usage: str) -> Path:
    if not words:
        raise ValueError(f"write {usage}")
    return expanded(words[0])


# name -> (how it is written, what does it, what it does)
COMMANDS: dict[str, tuple[str, Callable[[session.Chat, Console, list[str]], None], str]] = {
    "/help": ("/help", _help, "this list"),
    "/tools": ("/tools [NAME on|off]", _tools, "which tools the model may use; switch one: /tools calculator off"),
    "/meta": ("/meta [FILE]", _meta, "show the meta instruction, or take another one from a file"),
    "/clear": ("/clear", _clear, "forget the conversation so far"),
    "/save": ("/save FILE", _save, "write the conversation to a file"),
    "/load": ("/load FILE", _load, "go on with a conversation from a file"),
}
