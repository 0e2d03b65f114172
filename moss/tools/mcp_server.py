"""Our tools for other programs, over MCP: `moss tool --serve-mcp` on the standard streams.

    serve(standard_tools())                             # until standard input ends

Any MCP client can start it: {"mcpServers": {"moss": {"command": "moss", "args": ["tool", "--serve-mcp"]}}}.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from moss import __version__
from moss.errors import UsageError
from moss.tools.base import Tool
from moss.tools.calls import Call, Outcome, numbered, shown, stream_calls

try:
    from mcp import types
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server
except ImportError as error:
    raise UsageError(f"MCP needs the package mcp: pip install -e '.[mcp]' ({error})") from None


def serve(tools: Mapping[str, Tool]) -> None:
    """Offer tools on standard input and output until the other side leaves."""
    asyncio.run(_serve(tools))


async def _serve(tools: Mapping[str, Tool]) -> None:
    async with stdio_server() as (read, write):
        server = offered(tools)
        await server.run(read, write, server.create_initialization_options())


def offered(tools: Mapping[str, Tool]) -> Server[Any]:
    """An MCP server with those of these tools that work here."""
    at_hand = {key: tool for key, tool in tools.items() if not tool.lacks}

    async def on_list(context: Any, params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_described(tool) for tool in at_hand.values()])

    async def on_call(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        call = _read(params.name, params.arguments or {}, at_hand)
        return await asyncio.to_thread(_answer, call, at_hand)

    return Server("moss", version=__version__, on_list_tools=on_list, on_call_tool=on_call)


def _described(tool: Tool) -> types.Tool:
    schema = tool.schema["function"]
    return types.Tool(
        name=tool.name, title=tool.switch, description=schema["description"], input_schema=schema["parameters"]
    )


def _read(name: str, given: dict[str, Any], tools: Mapping[str, Tool]) -> Call:
    """A client's call as one of a line of commands; its `error` says why it can be none."""
    tool = next((tool for tool in tools.values() if tool.name == name), None)
    known = [] if tool is None else list(tool.parameters)
    names = [each for each in known if each in given]
    odd = [each for each in given if tool is not None and each not in known]
    error = (
        f"{name} has no argument {odd[0]!r}" if odd else "arguments are missing" if names != known[: len(names)] else ""
    )
    values = [given[each] for each in names]
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    return Call(name, texts, error=error)


def _answer(call: Call, tools: Mapping[str, Tool]) -> types.CallToolResult:
    """What became of a call, with its tool's deadline; sources with their titles and addresses below."""
    (outcome,) = numbered([news for _, news in stream_calls([call], tools) if isinstance(news, Outcome)])
    text = shown(outcome) if outcome.ok else outcome.error
    for number, source in enumerate(outcome.sources, outcome.first):
        text += f"\n<|{number}|> {source.title} {source.url}"
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=not outcome.ok)
