"""The events of a turn as people see them: thoughts dim, each command with its live status and result, the reply."""

from __future__ import annotations

from rich.console import Console
from rich.status import Status
from rich.text import Text

from moss.errors import plain
from moss.tools import run


class Screen:
    """The events of a turn as they come."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._section = ""
        self._raw: dict[int, str] = {}
        self._running: dict[int, str] = {}
        self._status: Status | None = None

    def show(self, event: run.Event) -> None:
        """Show one event."""
        match event:
            case run.Thoughts(text, number):
                self._write(f"thoughts {number}", text, "dim")
            case run.Command(call=call, raw=raw):
                self._raw[call] = plain(" ".join(raw.split()))
            case run.ToolStarted(call=call):
                self._running[call] = self._raw[call]
                self._show_status()
            case run.ToolProgress(call=call, text=text):
                self._running[call] = f"{self._raw[call]}: {plain(text)}"
                self._show_status()
            case run.ToolDone():
                self._tool_done(event)
            case run.Reply(text):
                self._write("reply", text, "")
            case run.Notice(text):
                self._line(Text(plain(text), style="yellow"))
            case run.Error(text):
                self._line(Text(plain(text), style="red"))
            case run.Done():
                self.end()

    def end(self) -> None:
        """Close what is open: the line, the live status."""
        self._running.clear()
        self._show_status()
        self._break()

    def _write(self, section: str, text: str, style: str) -> None:
        """Go on with a section's text, on a new line where the section is new."""
        if section != self._section:
            self.end()
            self._section = section
            text = text.lstrip()
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
