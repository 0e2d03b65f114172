"""A conversation with a model, for Python and for the terminal, which is this object with a screen.

    import moss

    chat = moss.load()                                # the bundled model; moss.load("out/nano/sft") for a folder,
                                                      # moss.load("http://host:port/v1#name") for one on a server
    for event in chat.stream("What is 37*12?"):       # thoughts, commands, results and reply as they come
        print(event)

    print(chat.ask("and times 3?"))                   # the whole answer; also .thoughts, .results, .sources, .usage, …
    chat.tools["calculator"] = False                  # or chat.tools = "none"
    chat.save("talk.json")                            # the released MOSS JSON, as /save in the terminal

`chat.history` holds the turns so far; taking the last one out (`del chat.history[-1]`) takes it back. `chat.sampling`,
`chat.quality`, `chat.seed` and `chat.meta_instruction` count from the next question on.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from moss.chat import META_INSTRUCTION, NONE, QUALITIES, SWITCHES, Dialog, Turn
from moss.data.dialogs import read, to_moss
from moss.engine import Engine, Sampling
from moss.errors import UsageError
from moss.files import replacing
from moss.model import num_parameters
from moss.resolve import Device, Dtype, dtype_of, locate, on_server
from moss.resolve import load as load_model
from moss.resolve import quality as quality_of
from moss.tokenizer import Tokenizer
from moss.tools import run
from moss.tools.base import Tool, prepare, standard_tools
from moss.tools.calls import parse_commands
from moss.tools.chat_server import ChatServer, answer, connect

Wanted = str | Tool | Iterable[str | Tool]  # `all`, `none`, `calculator,solver`, or keys and tools of one's own


def load(
    model: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tools: Wanted = "all",
    known: Mapping[str, Tool] | None = None,
    meta_instruction: str = META_INSTRUCTION,
    temperature: float = 0.0,
    top_p: float = 0.8,
    max_tokens: int = 512,
    quality: int | None = None,
    seed: int | None = None,
    deterministic: bool = False,
) -> Chat:
    """A new conversation with a model: a folder, a server's address, or None for the bundled one. Close it, or use
    it with `with`.

    tokenizer: for a model on a server alone: its folder makes the server complete our ids (`moss.engine.remote`);
    without it the server is asked to chat (`moss.tools.chat_server`).
    dtype, device: see `moss.resolve.choose` for what `auto` is. tools: those switched on, as in `moss chat --tools`,
    or a list that may hold tools of your own (`@moss.tool`), which go before standard ones with their key. known: the
    tools there are, by key, where they are not the standard ones alone (`moss.load_tools`).
    temperature: 0 always takes the likeliest token. max_tokens: of a pass, that is of a round or a reply. quality: the
    preference tag; a model of `moss train pat` gets 100 where none is named. seed: the same seed draws the same
    answers. deterministic: the model's scores are the same to the last bit, however the prompt is read or remembered
    (`moss.engine.fixed`). `chat.sampling` has what else can be set.
    UsageError (a ValueError) for a setting that cannot work, ValueError for a model that cannot be read or reached.
    """
    try:
        sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if quality is not None and quality not in QUALITIES:
        raise UsageError(f"quality {quality} is not one of {', '.join(map(str, QUALITIES))}")
    at_hand, switches = switched(tools, known)  # before the model is read, which takes its time
    if model is not None and on_server(model):
        if (dtype, device, deterministic) != ("auto", "auto", False):
            raise UsageError("dtype, device and deterministic are the server's own affair; leave them out")
        if tokenizer is None and quality is not None:
            raise UsageError("a chat server knows no preference tag; leave quality out, or give a tokenizer")
        engine, tok = connect(str(model), tokenizer)
        about = f"{engine.name} at {engine.url}"
    elif tokenizer is not None:
        raise UsageError("a folder has its own tokenizer; give one only for a model on a server")
    else:
        decoder, tok = load_model(model, dtype=dtype, device=device)
        name = "moss-nano" if model is None else locate(model).resolve().name
        about = f"{name}, {num_parameters(decoder.config) / 1e6:.1f}M parameters as {dtype_of(decoder)}"
        engine = Engine(decoder, slots=1, deterministic=deterministic)
        quality = quality_of(model, quality)
    dialog = Dialog(meta_instruction, switches, [])
    return Chat(dialog, engine, tok, at_hand, sampling, quality=quality, seed=seed, about=about, end=engine.close)


def switched(wanted: Wanted, known: Mapping[str, Tool] | None = None) -> tuple[dict[str, Tool], dict[str, bool]]:
    """The tools there are, by key, and the switches with which only the wanted ones are on."""
    tools = dict(standard_tools() if known is None else known)
    if wanted in ("all", "none"):
        wanted = [key for key, tool in tools.items() if not tool.lacks] if wanted == "all" else []
    elif isinstance(wanted, str):
        wanted = map(str.strip, wanted.split(","))
    elif isinstance(wanted, Tool):
        wanted = [wanted]
    chosen: list[Tool] = []
    for each in list(wanted):
        if isinstance(each, Tool):
            tools = {key: tool for key, tool in tools.items() if tool.name != each.name} | {each.key: each}
        key = each.key if isinstance(each, Tool) else each
        check_tool(key, tools)
        chosen.append(tools[key])
    for tool in chosen:
        if tools.get(tool.key) is not tool:
            raise UsageError(f"another of these tools is {tool.key} or {tool.name}, too; each needs a name of its own")
    keys = {tool.key for tool in chosen}
    return tools, {"thoughts": True, **{key: key in keys for key in SWITCHES | tools}}


def check_tool(key: str, tools: Mapping[str, Tool]) -> None:
    """UsageError where there is no such tool, or it cannot work here."""
    if key in tools:
        if tools[key].lacks:
            raise UsageError(f"{tools[key].switch} ({key}) cannot be used: {tools[key].lacks}")
        return
    if key in SWITCHES:
        raise UsageError(f"{SWITCHES[key].label} ({key}) is not part of this version; there are {', '.join(tools)}")
    raise UsageError(f"there is no tool {key!r}; the tools are {', '.join(tools)} (or all, or none)")


def expanded(path: str | Path) -> Path:
    """A path with `~` as the user's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such home folder; write the whole path") from None


def counted(turns: list[Turn]) -> str:
    """How many turns, in words."""
    return "1 turn" if len(turns) == 1 else f"{len(turns)} turns"


@dataclass(frozen=True)
class Answer:
    """A whole answer, with the names of `moss chat --json`; as text it is the reply.

    commands: {name, args} of each. sources: {number, title, url} of each that a `<sup><|number|></sup>` in the reply
    can cite. finish: why the reply ended: stop, length or time. usage: prompt_tokens, of which
    cached_tokens were not read again, and completion_tokens. timing in seconds: first_token, tools, total.
    """

    thoughts: str
    commands: list[dict[str, Any]]
    results: str
    sources: list[dict[str, Any]]
    reply: str
    finish: str
    notices: list[str]
    usage: dict[str, int]
    timing: dict[str, float]

    def __str__(self) -> str:
        return self.reply

    @classmethod
    def of(cls, done: run.Done, notices: list[str], sources: list[dict[str, Any]]) -> Answer:
        """What the last event of a turn holds, and what was collected on the way to it."""
        rounds = done.turn.rounds
        calls = [call for item in rounds for call in parse_commands(item.commands)]
        return cls(
            thoughts="\n".join(item.thoughts for item in rounds if item.thoughts != NONE),
            commands=[{"name": call.name, "args": call.args} for call in calls],
            results="\n".join(item.results for item in rounds if item.results != NONE),
            sources=sources,
            reply=done.turn.reply,
            finish=done.finish,
            notices=notices,
            usage=done.usage,
            timing={name: round(value, 4) for name, value in done.timing.items()},
        )


class Switches(Mapping[str, bool]):
    """The tools of a chat, by key: whether the model may use each. Setting one counts from the next question on."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def __getitem__(self, key: str) -> bool:
        if key not in self._chat.known:
            raise KeyError(key)
        return self._chat.dialog.switches.get(key, False)

    def __setitem__(self, key: str, on: bool) -> None:
        if on or key not in self._chat.known:
            check_tool(key, self._chat.known)
        self._chat.dialog.switches[key] = bool(on)

    def __iter__(self) -> Iterator[str]:
        return iter(self._chat.known)

    def __len__(self) -> int:
        return len(self._chat.known)

    def __repr__(self) -> str:
        return repr(dict(self))


class Chat:
    """A conversation and what answers it. One question at a time: a new one ends the answer that is under way."""

    def __init__(
        self,
        dialog: Dialog,
        engine: run.Submits | ChatServer,
        tok: Tokenizer | None,
        tools: Mapping[str, Tool],
        sampling: Sampling,
        *,
        quality: int | None = None,
        seed: int | None = None,
        about: str = "a model",
        end: Callable[[], None] = lambda: None,
    ) -> None:
        """`load` makes one; by hand, several chats can share an engine. `end` is what ends with this chat."""
        self.dialog, self.engine, self.tok, self.known = dialog, engine, tok, dict(tools)
        self.sampling, self.quality, self.seed, self.about = sampling, quality, seed, about
        self._files: set[Path] = set()  # saved or loaded here, so that saving may replace them
        self._name = object()  # of the conversation in the engine, which keeps what it has read of it
        self._under_way: Callable[[], Generator[run.Event] | None] = lambda: None
        # A chat that is dropped without a word must not leave its model in memory and a thread behind.
        self._end = weakref.finalize(self, end)

    def __repr__(self) -> str:
        return f"<moss.Chat with {self.about}, {counted(self.history)}>"

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way and free the model; nothing can be asked afterwards."""
        self._end()

    # ------------------------------------------------------------------------------------------------------ asking

    def stream(self, text: str) -> Generator[run.Event]:
        """Ask, and get the events of the turn as they come, the last one `done` or `error` (`moss.tools.run`).

        The turn goes into the history once it is done; leaving the loop before that stops the answer.
        """
        if not text.strip():
            raise ValueError("the question is empty")
        before = self._under_way()
        if before is not None:
            try:
                before.close()
            except ValueError:
                raise ValueError("another thread is being answered; give each thread a chat of its own") from None
        events = self._events(text)
        self._under_way = weakref.ref(events)
        return events

    def ask(self, text: str, *, watch: Callable[[run.Event], object] | None = None) -> Answer:
        """Ask, and get the whole answer. `watch` is shown each event. ValueError where there is no answer."""
        notices: list[str] = []
        sources: list[dict[str, Any]] = []
        with contextlib.closing(self.stream(text)) as events:
            for event in events:
                if isinstance(event, run.Error):
                    raise ValueError(event.text)
                if watch is not None:
                    watch(event)
                if isinstance(event, run.Notice):
                    notices.append(event.text)
                if isinstance(event, run.ToolDone):
                    sources += event.sources
                if isinstance(event, run.Done):
                    return Answer.of(event, notices, sources)
        raise AssertionError("a turn ends with done or error")

    def _events(self, text: str) -> Generator[run.Event]:
        dialog = self.dialog
        options = run.Options(
            sampling=self.sampling,
            quality=self.quality,
            conversation=self._name,
            seed=None if self.seed is None else self.seed * 2**16 + len(dialog.turns),
        )
        asked = replace(dialog, turns=[*dialog.turns, Turn(text)])
        for event in answer(asked, self.engine, self.tok, self.known, options):
            if isinstance(event, run.Done):
                dialog.turns.append(event.turn)
            yield event

    # ------------------------------------------------------------------------------------------------ the conversation

    @property
    def history(self) -> list[Turn]:
        """The turns so far, the list itself: what is taken out of it the model forgets."""
        return self.dialog.turns

    @property
    def meta_instruction(self) -> str:
        """What opens the conversation."""
        return self.dialog.meta

    @meta_instruction.setter
    def meta_instruction(self, text: str) -> None:
        self.dialog.meta = text

    @property
    def tools(self) -> Switches:
        """Which tools the model may use; set one (`chat.tools["solver"] = False`), or all at once as in `load`."""
        return Switches(self)

    @tools.setter
    def tools(self, wanted: Wanted) -> None:
        self.known, switches = switched(wanted, self.known)
        self.dialog.switches = switches | {"thoughts": self.dialog.switches.get("thoughts", True)}

    def prepare(self) -> None:
        """Begin to start what the tools that are on need, so that the first call does not wait for it."""
        prepare(self.known, [key for key, on in self.tools.items() if on])

    def clear(self) -> None:
        """Forget the conversation so far."""
        self._go_on(replace(self.dialog, turns=[], extra={}))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the conversation to a file, in the released MOSS JSON; whole, or ValueError and not at all.

        A file that this chat has neither saved nor loaded is replaced only with `overwrite`. Switches of tools of your
        own have no place in that format.
        """
        path = expanded(path)
        if not overwrite and path.exists() and path.resolve() not in self._files:
            raise ValueError(f"{path} exists already; save under another name")
        if not self.history:
            raise ValueError("there is nothing to save yet")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}; make it first, or save elsewhere")
        switches = {key: on for key, on in self.dialog.switches.items() if key == "thoughts" or key in SWITCHES}
        row = to_moss(replace(self.dialog, switches=switches))
        try:
            with replacing(path) as file:
                file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}; nothing was saved") from None
        self._files.add(path.resolve())

    def load(self, path: str | Path) -> None:
        """Go on with the conversation of a file, in any form that `moss data convert` reads.

        Where it has no meta instruction or no switches, those of now stay.
        """
        path = expanded(path)
        dialogs = list(islice(read(path), 2))
        if not dialogs:
            raise ValueError(f"{path} holds no conversation")
        if len(dialogs) > 1:
            raise ValueError(f"{path} holds several conversations; put the one to go on with into a file of its own")
        now, dialog = self.dialog, dialogs[0]
        own = {key: on for key, on in now.switches.items() if key in self.known and key not in SWITCHES}
        switches = own | dialog.switches if dialog.switches else now.switches
        self._go_on(replace(dialog, meta=dialog.meta or now.meta, switches=switches))
        self._files.add(path.resolve())

    def _go_on(self, dialog: Dialog) -> None:
        """Take another conversation."""
        self.dialog = dialog
        self.engine.forget(self._name)
