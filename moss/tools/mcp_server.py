"""Our tools for other programs, over MCP: `moss tool --serve-mcp` on the standard streams.

    serve(standard_tools())                             # until standard input ends

Any MCP client can start it: {"mcpServers": {"moss": {"command": "moss", "args": ["tool", "--serve-mcp"]}}}.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from moss import __version__
from moss.errors import UsageError
from moss.tools.base import Tool, ToolError, prepare
from moss.tools.calls import Call, Outcome, numbered, shown, stream_calls

try:
    from mcp import types
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server
except ImportError as error:
    raise UsageError(f"MCP needs the package mcp: pip install -e '.[mcp]' ({error})") from None


def serve(tools: Mapping[str, Tool]) -> None:
    """Offer tools on standard input and output until the other side leaves."""
    prepare(tools)
    asyncio.run(_serve(tools))


async def _serve(tools: Mapping[str, Tool]) -> None:
    lines: Any = _Lines(_taken(0))
    async with stdio_server(stdin=lines) as (read, write):
        server = offered(tools)
        await server.run(read, write, server.create_initialization_options())


def _taken(number: int) -> int:
    """A descriptor for ourselves alone: what tools and the programs they start read there is empty."""
    ours, empty = os.dup(number), os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, number)
    os.close(empty)
    return ours


class _Lines:
    """The lines of a descriptor. The thread that reads ends with the program; one that is waited for would keep it from
    ending at Ctrl-C."""

    def __init__(self, number: int) -> None:
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()
        _beside(self._read, number, asyncio.get_running_loop())

    def _read(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        rest = b""
        while data := os.read(number, 1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                loop.call_soon_threadsafe(self._queue.put_nowait, line.decode("utf-8", "replace"))
        loop.call_soon_threadsafe(self._queue.put_nowait, None)

    async def __aiter__(self) -> AsyncIterator[str]:
        while (line := await self._queue.get()) is not None:
            yield line


def _beside(work: Callable[..., None], *args: Any) -> None:
    """Do it in a thread that nobody waits for. What it cannot tell any more, since the loop is closed, is lost."""

    def job() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            work(*args)

    threading.Thread(target=job, daemon=True).start()


def offered(tools: Mapping[str, Tool]) -> Server[Any]:
    """An MCP server with those of these tools that work here."""
    at_hand = {key: tool for key, tool in tools.items() if not tool.lacks}

    async def on_list(context: Any, params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_described(tool) for tool in at_hand.values()])

    async def on_call(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        call = _read(params.name, params.arguments or {}, at_hand)
        loop, answer = asyncio.get_running_loop(), asyncio.Event()
        found: list[types.CallToolResult] = []

        def work() -> None:
            found.append(_answer(call, at_hand))
            loop.call_soon_threadsafe(answer.set)

        _beside(work)
        await answer.wait()
        return found[0]

    return Server("moss", version=__version__, on_list_tools=on_list, on_call_tool=on_call)


def _described(tool: Tool) -> types.Tool:
    schema = tool.schema["function"]
    return types.Tool(
        name=tool.name, title=tool.switch, description=schema["description"], input_schema=schema["parameters"]
    )


def _read(name: str, given: dict[str, Any], tools: Mapping[str, Tool]) -> Call:
    """A client's call as one of a line of commands; its `error` says why it can be none."""
    tool = next((tool for tool in tools.values() if tool.name == name), None)
    try:
        return Call(name, [] if tool is None else tool.spelled(given))
    except ToolError as error:
        return Call(name, error=str(error))


def _answer(call: Call, tools: Mapping[str, Tool]) -> types.CallToolResult:
    """What became of a call, with its tool's deadline; sources with their titles and addresses below."""
    (outcome,) = numbered([news for _, news in stream_calls([call], tools) if isinstance(news, Outcome)])
    text = shown(outcome) if outcome.ok else outcome.error
    for source in outcome.references:
        text += f"\n<|{source['number']}|> {source['title']} {source['url']}"
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=not outcome.ok)
