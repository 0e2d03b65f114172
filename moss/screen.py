"""The events of a turn as people see them: thoughts dim, each command with its live status and result, the reply.

What the reply cites (`<sup><|2|></sup>`) is shown as [2], and named below it.
"""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from moss.errors import plain
from moss.tools import run

_CITATION = re.compile(r"<sup>((?:<\|\d{1,4}\|>)+)</sup>")
# What a citation may begin with, at the end of a text. `\Z`, for `$` also stands before a last line end.
_BEGUN = re.compile(r"<(?:s(?:u(?:p(?:>(?:<\|\d{1,4}\|>)*(?:<(?:\|(?:\d{1,4}\|?)?|/(?:s(?:u(?:p)?)?)?)?)?)?)?)?)?\Z")


class Citations:
    """The citations of a reply that comes in pieces, and the sources of its turn by their numbers."""

    def __init__(self) -> None:
        self.sources: dict[int, dict[str, Any]] = {}
        self.cited: list[int] = []
        self._held = ""

    def read(self, text: str, *, last: bool = False) -> str:
        """The text to show; the beginning of what may become a citation waits for its end, or for the `last` piece."""
        text = _CITATION.sub(self._short, self._held + text)
        begun = None if last else _BEGUN.search(text)
        self._held = begun.group() if begun else ""
        return text[: len(text) - len(self._held)]

    def _short(self, citation: re.Match[str]) -> str:
        numbers = [int(number) for number in re.findall(r"\d+", citation.group(1))]
        self.cited += [number for number in numbers if number not in self.cited]
        return "".join(f"[{number}]" for number in numbers)


class Screen:
    """The events of a turn as they come."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._section = ""
        self._raw: dict[int, str] = {}
        self._running: dict[int, str] = {}
        self._status: Status | None = None
        self._citations = Citations()

    def show(self, event: run.Event) -> None:
        """Show one event."""
        match event:
            case run.Thoughts(text, number):
                self._write(f"thoughts {number}", text, "dim")
            case run.Command(call=call, raw=raw):
                self._raw[call] = plain(" ".join(raw.split()))
            case run.ToolStarted(call=call, name=name):
                self._running[call] = self._raw.get(call, name)
                self._show_status()
            case run.ToolProgress(call=call, name=name, text=text):
                self._running[call] = f"{self._raw.get(call, name)}: {plain(text)}"
                self._show_status()
            case run.ToolDone():
                self._tool_done(event)
            case run.Reply(text):
                self._write("reply", self._citations.read(text), "")
            case run.Notice(text):
                self._line(Text(plain(text), style="yellow"))
            case run.Error(text):
                self._line(Text(plain(text), style="red"))
            case run.Done():
                self._end_reply()

    def _end_reply(self) -> None:
        """The rest of the reply, and the sources that it cites."""
        self._write("reply", self._citations.read("", last=True), "")
        self._close()
        for number in self._citations.cited:
            if source := self._citations.sources.get(number):
                self._line(Text(plain(f"[{number}] {source['title']}  {source['url']}"), style="dim"))

    def end(self) -> None:
        """The turn is over, also where it was stopped: close what is open, and forget its sources."""
        self._close()
        self._citations = Citations()
        self._raw.clear()

    def _close(self) -> None:
        """Close the line and the live status."""
        self._running.clear()
        self._show_status()
        self._break()

    def _write(self, section: str, text: str, style: str) -> None:
        """Go on with a section's text, on a new line where the section is new; blanks before its first word go."""
        if section != self._section:
            text = text.lstrip()
            if not text:
                return
            self._close()
            self._section = section
        if text:
            self.console.print(Text(plain(text), style=style), end="", soft_wrap=True)

    def _line(self, text: Text) -> None:
        self._break()
        self.console.print(text, soft_wrap=True)

    def _break(self) -> None:
        """End the line of the section that is being written."""
        if self._section:
            self.console.print()
        self._section = ""

    def _tool_done(self, event: run.ToolDone) -> None:
        self._running.pop(event.call, None)
        self._show_status()
        self._citations.sources.update({source["number"]: source for source in event.sources})
        line = Text(self._raw.get(event.call, event.name), style="cyan")
        if event.ok:
            body = plain(event.result)
            line.append(" =>" + ("\n  " + body.replace("\n", "\n  ") if "\n" in body else " " + body), style="bold")
        else:
            line.append(f" has no result: {plain(event.error)}", style="yellow")
        line.append(f"  {event.seconds * 1e3:.0f} ms", style="dim")
        self._line(line)

    def _show_status(self) -> None:
        """A spinner with the commands that are running, where the output is a terminal."""
        if self._status:
            self._status.stop()
            self._status = None
        if self._running:
            self._break()
            self._status = self.console.status(Text(", ".join(self._running.values()), style="cyan"))
            self._status.start()
