"""Tools of your own, in a file that moss is told to read.

    moss tool --tools-from examples/own_tool.py 'DaysBetween("2024-02-28", "2024-03-01")'
    NOTES=~/notes moss chat --tools-from examples/own_tool.py

What the model is told about a tool is read from its name, its arguments and its docstring. From Python they are
ordinary functions, and `chat.tools = [days_between, "calculator"]` gives one to a chat.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import moss


@moss.tool
def days_between(first: str, second: str = "") -> str:
    """Count the days from one date to another.

    Args:
        first: a date such as 2024-02-28
        second: another one; without it, today
    """
    days = (_day(second) if second else date.today()) - _day(first)
    return f"{days.days} days"


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text.strip())
    except ValueError:
        raise moss.ToolError(f"{text!r} is no date; write it as 2024-02-28") from None


@moss.tool(switch="My notes", api="FindNote", seconds=5)
def find_note(words: str, most: int = 3) -> list[moss.Source]:
    """Find paragraphs in the folder of notes that the environment names in NOTES.

    Args:
        words: what the paragraph is about
        most: how many paragraphs at most
    """
    folder = os.environ.get("NOTES")
    if not folder:
        raise moss.ToolError("set NOTES to the folder with your notes, files in .md or .txt")
    wanted = set(words.lower().split())
    moss.progress(f"reading {folder}")
    found = [(len(wanted & set(text.lower().split())), path, text) for path, text in _paragraphs(Path(folder))]
    best = sorted((row for row in found if row[0]), key=lambda row: -row[0])[: max(1, most)]
    return [moss.Source(path.stem, path.as_uri(), text) for _, path, text in best]


def _paragraphs(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.expanduser().resolve().rglob("*")):
        if path.suffix in (".md", ".txt"):
            for text in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
                yield path, text.strip()
