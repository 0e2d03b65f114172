"""`moss tool`: run a line of commands by hand, exactly as the model's lines are run.

moss tool 'Calculate("x=1.5;y=x^2;x+y=?")'
moss tool - --json < lines.txt
moss tool --tools-from tools.py 'ConvertMoney("12.5", "USD")'
moss tool --serve-mcp                                # the tools for other programs, until they leave
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moss.config import option
from moss.errors import UsageError, plain
from moss.tools.base import Tool, prepare
from moss.tools.calls import MAX_CALLS, NO_RESULT, format_results, read_commands, run_calls, shown
from moss.tools.own import load_tools


@dataclasses.dataclass(frozen=True)
class ToolCommand:
    """Run a line of tool commands, as the model writes them, and print the results."""

    commands: str = option("", positional=True)  # such as 'Calculate("1+1"), Solve("x+2=5")'; - reads lines from stdin
    tools_from: Path | None = None  # Python file with tools of your own: functions under @moss.tool
    mcp: str | None = None  # MCP server whose tools to use: a command in quotes, an address, or a settings file
    serve_mcp: bool = False  # serve the tools to an MCP client on standard input and output
    json: bool = False  # one JSON line each: calls (name, args, ok, result, sources, seconds, error), results, ignored


def main(config: ToolCommand) -> int:
    """Run the line, or every line of standard input; 1 when a single line gives no result."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    if config.serve_mcp == bool(config.commands):
        raise UsageError("""write a line of commands, such as moss tool 'Calculate("1+1")', or --serve-mcp""")
    with contextlib.redirect_stdout(sys.stderr) if config.serve_mcp else contextlib.nullcontext():
        tools = load_tools(config.tools_from, config.mcp)  # a file that prints must not get into the protocol
    if config.serve_mcp:
        importlib.import_module("moss.tools.mcp_server").serve(tools)
        return 0
    if config.commands != "-":
        report = run_line(config.commands, tools)
        _show(report, as_json=config.json)
        if not report["calls"] and report["ignored"]:
            raise ValueError(f'no command in {config.commands[:60]!r}; write for example Calculate("1+1")')
        return 0 if all(call["ok"] for call in report["calls"]) else 1
    prepare(tools)
    for line in _lines():
        _show(run_line(line, tools), as_json=config.json)
    return 0


def run_line(line: str, tools: Mapping[str, Tool]) -> dict[str, Any]:
    """What became of a line of commands, ready for JSON."""
    calls, ignored = read_commands(line)
    outcomes = run_calls(calls, tools)
    reports = []
    for call, outcome in zip(calls, outcomes):
        result = shown(outcome) if outcome.ok else NO_RESULT if outcome.ran else "None"
        report = {"name": call.name, "args": call.args, "ok": outcome.ok, "result": result}
        report["sources"] = outcome.references
        reports.append(report | {"seconds": round(outcome.seconds, 6), "error": outcome.error or None})
    results = format_results(calls[:MAX_CALLS], outcomes[:MAX_CALLS], tools)
    return {"calls": reports, "results": results, "ignored": ignored}


def _lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="replace").rstrip("\r\n")


def _show(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, ensure_ascii=False), flush=True)
        return
    print(report["results"], flush=True)
    for call in report["calls"]:
        for source in call["sources"]:  # not on standard output, which is what the model reads
            print(plain(f"[{source['number']}] {source['title']}  {source['url']}"), file=sys.stderr)
        if call["error"]:
            print(f"moss tool: {call['name']}: {call['error']}", file=sys.stderr)
    for text in report["ignored"]:
        print(f"moss tool: ignored: {text}", file=sys.stderr)
