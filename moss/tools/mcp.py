"""The tools of MCP servers as tools of ours (`mcp_server.py` goes the other way).

    connect("python weather.py")                        # a program that speaks MCP on its standard streams
    connect("http://127.0.0.1:9000/mcp")                # a server, streamable HTTP
    connect("servers.json")                             # {"mcpServers": {"weather": {"command": …, "args": […]}, …}}

Each tool of a server becomes a `Tool` with its own switch, API line and schema. What a server says about itself stands
in prompts, so names and labels are cut to plain words. A connection lives on one background thread as long as the
program; a server that ended is started again at the next call. In a settings file `env` and `headers` may hold
`${NAME}` for what stands in the environment.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import json
import os
import re
import shlex
import tempfile
import threading
from collections.abc import Awaitable, Collection, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moss.errors import UsageError
from moss.tools.base import Tool, ToolError, command_name

try:
    import mcp
    from mcp import types
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client
except ImportError as error:
    raise UsageError(f"MCP needs the package mcp: pip install -e '.[mcp]' ({error})") from None

T = TypeVar("T")
CONNECT_SECONDS = 20.0  # a program may have to be installed first
CALL_SECONDS = 30.0
MAX_TOOLS = 64  # of a server
KINDS = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}


# ------------------------------------------------------------------------------------------------------ their tools


@dataclass(frozen=True)
class Target:
    """Where a server is: its address, or the program that is one."""

    name: str
    url: str = ""
    command: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None  # env, cwd or headers


def connect(where: str, taken: Collection[str] = ()) -> list[Tool]:
    """The tools of the server, or of all servers of a settings file; names that are `taken` get the server's before.

    UsageError where `where` names no server, ValueError where one does not start or answer.
    """
    found: list[Tool] = []
    for target in targets(where):
        server = _Server(target)
        for described in server.tools:
            used = {*taken, *(tool.name for tool in found)}
            found.append(_tool(server, described, used))
    return found


def targets(where: str) -> list[Target]:
    """What `--mcp` names."""
    if re.match(r"https?://", where):
        return [Target(re.sub(r"^https?://([^/:]+).*", r"\1", where), url=where)]
    if where.endswith(".json"):
        return _settings_file(Path(where))
    try:
        words = shlex.split(where)
    except ValueError as error:
        raise UsageError(f"{where!r} is no command line: {error}") from None
    if not words:
        raise UsageError("--mcp needs a command, an address or a settings file")
    return [Target(Path(words[-1]).stem, command=tuple(words))]


def _settings_file(path: Path) -> list[Target]:
    try:
        servers = json.loads(path.read_text(encoding="utf-8"))["mcpServers"]
        found = []
        for name, row in servers.items():
            command = (row["command"], *row.get("args", ())) if "url" not in row else ()
            found.append(Target(str(name), str(row.get("url", "")), tuple(map(str, command)), row))
        return found
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        example = '{"mcpServers": {"name": {"command": "…", "args": []}}} or {"url": "…"}'
        raise UsageError(f"{path} is no settings file of MCP servers; it looks like {example}") from None


class _Server:
    """A connection that is made again when it broke."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._client: mcp.Client | None = None
        self._end: asyncio.Event | None = None
        self._errors: Any = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self.tools = _run(self._list(), CONNECT_SECONDS)[:MAX_TOOLS]
        except FutureTimeout:
            raise ValueError(self._failed("gave no answer")) from None
        except Exception as error:
            raise ValueError(self._failed(_reason(error))) from None
        atexit.register(self.close)

    def call(self, name: str, arguments: dict[str, Any], seconds: float) -> str:
        """The text of a tool's answer; `ToolError` with the server's own reason, or with ours."""
        try:
            result = _run(self._call(name, arguments), seconds)
        except FutureTimeout:
            raise ToolError(f"{self.target.name} took more than {seconds:g} s") from None
        except ToolError:
            raise
        except Exception as error:
            self._end = self._client = None  # the next call connects anew
            raise ToolError(self._failed(_reason(error))) from None
        texts = [block.text for block in result.content if isinstance(block, types.TextContent)]
        others = [f"({block.type})" for block in result.content if not isinstance(block, types.TextContent)]
        text = "\n".join(texts + others) or json.dumps(result.structured_content, ensure_ascii=False)
        if result.is_error:
            raise ToolError(text)
        return text

    def close(self) -> None:
        with contextlib.suppress(Exception):
            _run(self._close(), 5.0)

    async def _call(self, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        client = await self._connected()
        result = await client.call_tool(name, arguments)
        if not isinstance(result, types.CallToolResult):
            raise ToolError(f"{self.target.name} asks for more, which is not possible here")
        return result

    async def _list(self) -> list[types.Tool]:
        client = await self._connected()
        found: list[types.Tool] = []
        cursor = None
        while len(found) < MAX_TOOLS:
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if cursor is None:
                break
        return found

    async def _connected(self) -> mcp.Client:
        """The open connection. It lives in a task of its own, since it must be closed where it was opened."""
        if self._client is None:
            ready: asyncio.Future[mcp.Client] = asyncio.get_running_loop().create_future()
            self._end = asyncio.Event()
            self._task = asyncio.create_task(self._live(ready, self._end))
            self._client = await ready
        return self._client

    async def _live(self, ready: asyncio.Future[mcp.Client], end: asyncio.Event) -> None:
        try:
            async with mcp.Client(self._transport(), read_timeout_seconds=CALL_SECONDS) as client:
                ready.set_result(client)
                await end.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(ValueError(_reason(error)))
        finally:
            if self._end is end:
                self._client = None

    async def _close(self) -> None:
        if self._end is not None:
            self._end.set()
            await self._task

    def _transport(self) -> Any:
        settings = self.target.settings or {}
        if self.target.url:
            headers = _expanded(settings.get("headers"))
            return streamable_http_client(self.target.url, http_client=create_mcp_http_client(headers=headers))
        program, *arguments = self.target.command
        given = mcp.StdioServerParameters(
            command=program, args=arguments, env=_expanded(settings.get("env")), cwd=settings.get("cwd")
        )
        return mcp.stdio_client(given, errlog=self._errors)

    def _failed(self, reason: str) -> str:
        """What went wrong, with the last thing the program said."""
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read()[-4000:].splitlines() if line.strip()]
        where = self.target.url or shlex.join(self.target.command)
        return f"the MCP server {where} failed: {reason}" + (f" ({said[-1][:200]})" if said else "")


def _tool(server: _Server, described: types.Tool, taken: Collection[str]) -> Tool:
    """A server's tool as one of ours."""
    name = command_name(described.name)[:60]
    if name in taken:
        name = command_name(f"{server.target.name} {described.name}")[:80]
    schema = described.input_schema or {}
    properties = {str(key): value for key, value in (schema.get("properties") or {}).items() if isinstance(value, dict)}
    required = [key for key in schema.get("required") or () if key in properties]
    order = [*required, *(key for key in properties if key not in required)]
    theirs = {_identifier(key): key for key in order}  # our name of an argument -> theirs

    def call(*args: Any, **kwargs: Any) -> str:
        given = inspect.signature(call).bind(*args, **kwargs).arguments
        return server.call(described.name, {theirs[key]: value for key, value in given.items()}, CALL_SECONDS)

    call.__name__ = described.name
    call.__doc__ = described.description or described.title or described.name
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                ours,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if key in required else None,
                annotation=KINDS.get(str(properties[key].get("type")), str),
            )
            for ours, key in theirs.items()
        ]
    )
    arguments = {ours: properties[key] for ours, key in theirs.items()}
    label = " ".join(re.findall(r"[\w'()+/&-]+", described.title or described.name.replace("_", " ")))[:40].strip()
    key = re.sub(r"\W+", "_", described.name.lower()).strip("_")[:60]
    if name != command_name(described.name)[:60]:
        key = _identifier(name)
    return Tool(key, label or name, name, call, seconds=CALL_SECONDS + 1, arguments=arguments)


def _identifier(name: str) -> str:
    """A name that may stand for an argument in Python and in an API line."""
    cleaned = re.sub(r"\W", "_", name)
    return cleaned if cleaned.isidentifier() else f"_{cleaned}"


def _expanded(values: Any) -> dict[str, str] | None:
    """Texts with `${NAME}` as it stands in the environment."""
    return {str(key): os.path.expandvars(str(value)) for key, value in values.items()} if values else None


def _reason(error: BaseException) -> str:
    """The innermost reason of what may be a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return (str(error) or type(error).__name__).splitlines()[0][:200]


_loop: asyncio.AbstractEventLoop | None = None
_lock = threading.Lock()


def _run(work: Awaitable[T], seconds: float) -> T:
    """Run on the background thread that all connections share; FutureTimeout after `seconds`."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, daemon=True, name="moss-mcp").start()

    async def bounded() -> T:
        return await work

    future = asyncio.run_coroutine_threadsafe(bounded(), _loop)
    try:
        return future.result(seconds)
    except FutureTimeout:
        future.cancel()
        raise
