"""What a long run says while it runs: a bar on a terminal, plain lines elsewhere, and one JSON line a step on disk.

Everything for people goes to standard error, so that standard output stays for results. `log.jsonl` is for machines:
each line is one step, or one validation. When a run resumes, the lines of steps that are done again are dropped, so
that the file reads like that of an unbroken run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_LINE_EVERY = 15.0  # seconds between the lines of a run whose output is not a terminal

console = Console(stderr=True, highlight=False, force_jupyter=False)


def note(text: str) -> None:
    """One line for people."""
    console.print(text, markup=False, soft_wrap=True)


class RunLog:
    """The JSON lines of one run; lines after `step` are of work that was lost and is done again."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path, self.told = path, False
        kept = [line for line in read(path) if line["step"] <= step] if path.exists() else []
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Add one line; a full disk must not end a run whose checkpoints still stand, so it is only told, once."""
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            if not self.told:
                note(f"{self.path} cannot be written ({error.strerror}); the run goes on")
            self.told = True

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what a full disk refused once, it refuses again
            self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log, up to the first line that is none: a kill or a power cut may leave half a line."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


class Bar:
    """Where a run stands: `show(done, text)` after every step."""

    def __init__(self, title: str, done: int, total: int) -> None:
        self.title, self.first, self.total = title, done, total
        self.begun = self.said = time.monotonic()
        self.live: Progress | None = None
        if console.is_terminal:
            self.live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[words]}"),
                console=console,
            )
            self.task = self.live.add_task(title, total=total, completed=done, words="")
            self.live.start()

    def show(self, done: int, text: str) -> None:
        """Move the bar to `done`, or print a line when the last one is a while ago."""
        now = time.monotonic()
        words = f"{text}, {span(self._left(done, now))} left"
        if self.live:
            self.live.update(self.task, completed=done, words=words)
        elif now - self.said >= PLAIN_LINE_EVERY or done == self.total:
            self.said = now
            note(f"{self.title}: {done}/{self.total}, {words}")

    def close(self) -> None:
        if self.live:
            self.live.stop()

    def _left(self, done: int, now: float) -> float:
        return (self.total - done) * (now - self.begun) / max(done - self.first, 1)


@contextmanager
def bar(title: str, done: int, total: int) -> Iterator[Bar]:
    """A `Bar` that is taken down whatever happens."""
    shown = Bar(title, done, total)
    try:
        yield shown
    finally:
        shown.close()


def span(seconds: float) -> str:
    """A time span as people read it: `45s`, `3m05s`, `2h10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
