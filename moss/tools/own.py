"""Tools of one's own: from a Python file (`--tools-from tools.py`) and from MCP servers (`--mcp "python server.py"`).

    tools = load_tools("tools.py", "http://127.0.0.1:9000/mcp")    # by key, the standard tools among them

A file's tools are whatever in it was made with `@tool`. It is run as every Python file is, and may import the files
beside it, so it is trusted as code of one's own; only what a tool returns is data.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from moss.chat import SWITCHES
from moss.errors import UsageError
from moss.tools.base import Tool, standard_tools


def load_tools(file: str | Path | None = None, mcp: str | None = None) -> dict[str, Tool]:
    """The standard tools, and those of a Python file and of an MCP server (or all of a settings file), by key.

    UsageError for a file without tools and for two tools of one name; ValueError where the file or a server fails.
    """
    tools = standard_tools()
    if file is not None:
        tools = merged(tools, from_file(Path(file)), str(file))
    if mcp is not None:
        connect = importlib.import_module("moss.tools.mcp").connect  # the extra is needed only here
        taken = {name for tool in tools.values() for name in (tool.key, tool.name, tool.switch)}
        tools = merged(tools, connect(mcp, taken), "--mcp")  # what it names may hold a key
    return tools


def merged(tools: dict[str, Tool], more: Iterable[Tool], place: str) -> dict[str, Tool]:
    """Both together; a tool of one's own may stand in for a standard one, not for another of one's own."""
    standard = standard_tools()
    for each in more:
        doubles = [tool for tool in tools.values() if each.key == tool.key or each.name == tool.name]
        for double in doubles:
            if standard.get(double.key) is not double:
                reason = f"there is a tool {double.key} ({double.name}) already; give this one another name"
                raise UsageError(f"{place}: {reason}")
        if not doubles and each.key in SWITCHES and each.name != SWITCHES[each.key].api.split("(")[0]:
            raise UsageError(f"{place}: the key {each.key} belongs to {SWITCHES[each.key].api}; choose another")
        tools = {key: tool for key, tool in tools.items() if tool not in doubles} | {each.key: each}
    return tools


def from_file(path: Path) -> list[Tool]:
    """The tools that a Python file makes."""
    if not path.is_file():
        raise UsageError(f"{path} is no file; name a Python file with tools")
    spec = importlib.util.spec_from_file_location(f"moss_tools_from_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file; its name must end in .py")
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # for good, since a tool may import when it is called; last, so that it hides nothing
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin] or [getattr(error, "lineno", None)]
        place = f"{path}, line {lines[-1]}" if lines[-1] else str(path)
        raise ValueError(f"{place}: {type(error).__name__}: {getattr(error, 'msg', error)}") from None
    found = {id(value): value for value in vars(module).values() if isinstance(value, Tool)}
    if not found:
        raise UsageError(f"{path} holds no tool; put @moss.tool over a function with a docstring")
    return list(found.values())
