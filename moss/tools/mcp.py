"""The tools of MCP servers as tools of ours (`mcp_server.py` goes the other way).

    connect("python weather.py")                        # a program that speaks MCP on its standard streams
    connect("http://127.0.0.1:9000/mcp")                # a server, streamable HTTP
    connect("servers.json")                             # {"mcpServers": {"weather": {"command": …, "args": […]}, …}}

Each tool of a server becomes a `Tool` with its own switch, API line and schema. What a server says about itself stands
in prompts, so names and labels are cut to plain words; none takes the name or key of another tool. A connection lives
on one background thread as long as the program; a server that ended is started again at the next call. In a settings
file `${NAME}` is what stands in the environment. Keys are often among the settings, so messages leave out whatever may
be one (`Target.hush`).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import inspect
import itertools
import json
import keyword
import logging
import os
import re
import shlex
import tempfile
import threading
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from moss.chat import SWITCHES
from moss.errors import UsageError
from moss.tools import base
from moss.tools.base import Tool, ToolError, command_name

try:
    import anyio
    import mcp
    from mcp import types
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client
except ImportError as error:
    raise UsageError(f"MCP needs the package mcp: pip install -e '.[mcp]' ({error})") from None

T = TypeVar("T")
CONNECT_SECONDS = 20.0  # a program may have to be installed first
CALL_SECONDS = 30.0
CLOSE_SECONDS = 8.0  # a program that does not leave when it is told to is killed before that
MAX_TOOLS = 64  # of a server
MAX_ARGUMENTS = 32  # of a tool
MAX_DEPTH = 24  # of a schema that is looked into
SETTINGS = ("command", "args", "cwd", "env", "url", "headers")  # what is read of a server in a settings file
_WORD = re.compile(r"[^\s\x00-\x1f\x7f:&=?#@]{6,}")  # of a setting, long enough to be a secret
_RUNNERS = re.compile(r"(python|pipx|uvx?|node|npx|bunx?|deno)[\d.]*$")  # programs that run what is named next
LOST = (types.CONNECTION_CLOSED, types.INVALID_REQUEST, types.METHOD_NOT_FOUND)  # errors where a server began anew
KINDS = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
_RESERVED = {"thoughts", "Inner thoughts", "all", "none", "None", *SWITCHES}  # what no tool of a server is called
_RESERVED |= {name for switch in SWITCHES.values() for name in (switch.label, switch.api.split("(")[0])}

logging.getLogger("mcp").addHandler(logging.NullHandler())  # a server's garbage is no news for the terminal


# ------------------------------------------------------------------------------------------------------ their tools


@dataclass(frozen=True)
class Target:
    """Where a server is: its address, or the program that is one. `shown` is how messages name it."""

    name: str
    shown: str
    url: str = ""
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None

    def hush(self, text: str) -> str:
        """A message without what may be a secret, since servers repeat what they were given: the words of environment,
        headers, address and arguments, but no options, what is run, and what lies on the disk."""
        address = urlsplit(self.url)
        given = [*self.env.values(), *self.headers.values(), *self.command[1:]]
        given += [address.netloc.rpartition("@")[0], address.path, address.query]
        words = {word for each in given for word in _WORD.findall(each)} - set(_WORD.findall(_program(self.command)))
        for word in sorted(words, key=len, reverse=True):
            if not (word.startswith("-") or os.path.exists(word)):  # noqa: PTH110, for Path's fails with a long key
                text = text.replace(word, "…")
        return text


def connect(where: str, taken: Collection[str] = ()) -> list[Tool]:
    """The tools of the server, or of all servers of a settings file; `taken` are names of other tools, of each kind.

    UsageError where `where` names no server, ValueError where one does not start or answer.
    """
    found: list[Tool] = []
    used = _RESERVED | set(taken)
    for target in targets(where):
        server = _Server(target)
        for described in server.tools:
            found.append(_tool(server, described, used))
            used |= {found[-1].key, found[-1].name, found[-1].switch}
    return found


def targets(where: str) -> list[Target]:
    """What `--mcp` names."""
    if re.match(r"https?://", where):
        address = _address(where, "what --mcp names")
        host = address.netloc.rpartition("@")[2]
        return [Target(address.hostname or host, f"{address.scheme}://{host}{address.path}", url=where)]
    try:
        words = shlex.split(where)
    except ValueError as error:
        raise UsageError(f"what --mcp names is no command line: {error}") from None
    if not words:
        raise UsageError("--mcp needs a command, an address or a settings file")
    if where.endswith(".json") and (len(words) == 1 or Path(where).is_file()):
        return _settings_file(Path(where))
    return [Target(Path(_program(words)).stem, words[0], command=tuple(words))]


def _program(command: Sequence[str]) -> str:
    """The word that names a program: what a runner, such as python or npx, is told to run, else the first."""
    ran = command[1:] if command and _RUNNERS.match(Path(command[0]).name) else []
    return next((word for word in (*ran, *command) if not word.startswith("-")), "")


def _address(url: str, what: str) -> SplitResult:
    """The parts of a server's address; UsageError, which does not repeat it, where it is none."""
    try:
        address = urlsplit(url)
        valid = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # from `port`, too
        valid = False
    if valid:
        return address
    raise UsageError(f"{what} is no address of an MCP server; write http://host:port/path")


def _settings_file(path: Path) -> list[Target]:
    try:
        servers = json.loads(path.read_text(encoding="utf-8"))["mcpServers"]
        found = []
        for name, row in servers.items():
            given = _expanded({part: row[part] for part in SETTINGS if row.get(part)}, path)
            command = (given["command"], *given.get("args", ())) if "url" not in given else ()
            env, headers = (dict(given.get(part, {})) for part in ("env", "headers"))
            if "url" in given:
                _address(given["url"], f"{path}: the url of {name}")
            found.append(Target(name, name, given.get("url", ""), command, env, headers, given.get("cwd")))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        found = []
    if not found:
        example = '{"mcpServers": {"name": {"command": "…", "args": []}}} or {"url": "…"}'
        raise UsageError(f"{path} is no settings file of MCP servers; it looks like {example}")
    return found


def _expanded(value: Any, path: Path) -> Any:
    """Settings as texts, with `${NAME}` as it stands in the environment."""
    if isinstance(value, dict):
        return {name: _expanded(each, path) for name, each in value.items()}
    if isinstance(value, list):
        return [_expanded(each, path) for each in value]

    def look_up(name: re.Match[str]) -> str:
        if name[1] not in os.environ:
            raise UsageError(f"{path} wants {name[0]}, which the environment does not have")
        return os.environ[name[1]]

    return re.sub(r"\$\{(\w+)\}", look_up, str(value))


class _Connection:
    """A connection in a task of its own, since it must be closed where it was opened. All of it runs in the loop."""

    def __init__(self, client: mcp.Client) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[mcp.Client] = loop.create_future()
        self._end, self._scope = asyncio.Event(), anyio.CancelScope()
        self.task = loop.create_task(self._live(client))
        loop.call_later(CONNECT_SECONDS, self._fail, TimeoutError())

    async def _live(self, client: mcp.Client) -> None:
        try:
            with self._scope:
                async with client:
                    self.ready.set_result(client)
                    await self._end.wait()
        except BaseException as error:
            self._fail(error)
        self._fail(ConnectionError("the connection was closed"))

    def _fail(self, error: BaseException) -> None:
        """Nobody waits for the connection any more; nothing where it stands."""
        if not self.ready.done():
            self.ready.set_exception(ValueError(_reason(error)))
            self.ready.exception()  # it may be that nobody has waited
            self._scope.cancel()

    def close(self) -> None:
        """End it, and the program behind it; `task` is done when it has ended."""
        self._end.set()
        self._fail(ConnectionError("the connection was closed"))


_servers: list[_Server] = []  # until the program ends


@atexit.register
def close() -> None:
    """End all connections, and the programs behind them."""
    while _servers:
        _servers.pop().close()


class _Server:
    """A connection that is made again when it broke. Methods with `async` run in the loop that all servers share."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._now: _Connection | None = None
        self._all: set[_Connection] = set()  # also those that have not quite ended
        self._errors: Any = tempfile.TemporaryFile("a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        _servers.append(self)
        try:
            self.tools = _run(self._list(), CONNECT_SECONDS + 1)[:MAX_TOOLS]
        except Exception as error:
            _background().call_soon_threadsafe(self._drop)
            raise ValueError(f"the MCP server {target.shown} failed: {self._why(error)}") from None

    def call(self, name: str, arguments: dict[str, Any], seconds: float) -> str:
        """The text of a tool's answer; `ToolError` with the server's own reason, or with ours."""
        try:
            result = _run(self._call(name, arguments), seconds)
        except TimeoutError:
            raise ToolError(f"{self.target.name} took more than {seconds:g} s") from None
        except Exception as error:
            raise ToolError(f"{self.target.name} failed: {self._why(error)}") from None
        text = "\n".join(map(_block, result.content))
        if result.is_error:
            raise ToolError(self.target.hush(text) or f"{self.target.name} failed without a reason")
        if not text and result.structured_content is not None:
            return json.dumps(result.structured_content, ensure_ascii=False)
        return text

    def close(self) -> None:
        """End the connection, and its program with it."""
        with contextlib.suppress(Exception):
            _run(self._close(), CLOSE_SECONDS)

    async def _call(self, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        say = partial(contextvars.copy_context().run, base.progress)  # in the context of the call, where one listens

        async def tell(progress: float, total: float | None, message: str | None) -> None:
            say(message or (f"{progress:g}" if total is None else f"{progress:g} of {total:g}"))

        connection = self._connected()
        client = await asyncio.shield(connection.ready)
        try:
            return await client.call_tool(name, arguments, progress_callback=tell)
        except Exception as error:
            if connection is self._now and not (isinstance(error, mcp.MCPError) and error.code not in LOST):
                self._drop()
            raise

    async def _list(self) -> list[types.Tool]:
        client = await asyncio.shield(self._connected().ready)
        found: list[types.Tool] = []
        cursor = None
        while len(found) < MAX_TOOLS:
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if cursor is None or not page.tools:
                break
        return found

    def _connected(self) -> _Connection:
        """The connection, open or about to be; a new one where there is none or the last one failed."""
        if self._now is None or self._now.task.done():
            client = mcp.Client(self._transport(), read_timeout_seconds=CALL_SECONDS + 5)
            self._now = connection = _Connection(client)
            self._all.add(connection)
            connection.task.add_done_callback(lambda task: self._all.discard(connection))
        return self._now

    def _drop(self) -> None:
        """Let go of the connection; the next call makes another."""
        if self._now is not None:
            self._now.close()
            self._now = None

    async def _close(self) -> None:
        self._drop()
        if self._all:
            await asyncio.wait([connection.task for connection in self._all])

    def _transport(self) -> Any:
        target = self.target
        if target.url:
            headers = dict(target.headers) or None
            return streamable_http_client(target.url, http_client=create_mcp_http_client(headers=headers))
        program, *arguments = target.command
        given = mcp.StdioServerParameters(command=program, args=arguments, env=dict(target.env), cwd=target.cwd)
        return mcp.stdio_client(given, errlog=self._errors)

    def _why(self, error: BaseException) -> str:
        """The reason of an error and, in brackets, the last thing that the program said about its trouble."""
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read()[-4000:].splitlines() if line.strip()]
        reason, *last = (self.target.hush(text)[:200] for text in (_reason(error), *said[-1:]))
        return f"{reason} ({last[0]})" if last else reason


def _block(block: types.ContentBlock) -> str:
    """A piece of a result as text; what is none is named by its kind."""
    if isinstance(block, types.TextContent):
        return block.text
    if isinstance(block, types.EmbeddedResource) and isinstance(block.resource, types.TextResourceContents):
        return block.resource.text
    return f"({block.type})"


def _tool(server: _Server, described: types.Tool, used: Collection[str]) -> Tool:
    """A server's tool as one of ours."""
    schema = _dict(_with_items(described.input_schema, MAX_DEPTH))
    properties = {str(name): form for name, form in _dict(schema.get("properties")).items()}
    required = [name for name in properties if name in _list(schema.get("required"))]
    order = [*required, *(name for name in properties if name not in required)][:MAX_ARGUMENTS]
    theirs = _identifiers(order)

    def call(*args: Any, **kwargs: Any) -> str:
        given = inspect.signature(call).bind(*args, **kwargs).arguments
        arguments = {theirs[name]: value for name, value in given.items() if value is not None}
        return server.call(described.name, arguments, CALL_SECONDS)

    call.__name__ = described.name
    call.__doc__ = (described.description or described.title or described.name)[:2000]
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                ours,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if name in required else None,
                annotation=_kind(properties[name], schema),
            )
            for ours, name in theirs.items()
        ]
    )
    arguments = {ours: properties[name] for ours, name in theirs.items() if isinstance(properties[name], dict)}
    definitions = {name: schema[name] for name in ("$defs", "definitions") if _dict(schema.get(name))}
    key, name = _names(server.target.name, described.name, used)
    words = re.findall(r"[\w'()+/&-]+", described.title or described.name.replace("_", " "))
    label = " ".join(words)[:40].strip()
    label = label[:1].upper() + label[1:]
    label = name if not label or label in used else label
    return Tool(key, label, name, call, seconds=CALL_SECONDS + 1, arguments=arguments, definitions=definitions)


def _names(server: str, tool: str, used: Collection[str]) -> tuple[str, str]:
    """Key and command of a tool: its own name, before it the server's where that is taken, at last with a number."""
    for number in itertools.count():
        full = tool if number == 0 else f"{server} {tool}"
        last = "" if number < 2 else str(number)
        key = (re.sub(r"\W+", "_", full.lower())[:50].strip("_") or "tool") + last
        name = command_name(full)[:50] + last
        if key not in used and name not in used:
            return key, name
    raise AssertionError("there is always one more number")


def _identifiers(names: Iterable[str]) -> dict[str, str]:
    """Names that may stand for arguments in Python and in an API line, and what each is at the server."""
    found: dict[str, str] = {}
    for place, name in enumerate(names, 1):
        cleaned = re.sub(r"\W", "_", name)[:40]
        cleaned = f"{cleaned}_" if keyword.iskeyword(cleaned) else cleaned if cleaned.isidentifier() else f"_{cleaned}"
        if cleaned in found or not cleaned.isidentifier():
            cleaned = f"{cleaned if cleaned.isidentifier() else 'argument'}_{place}"
        found[cleaned] = name
    return found


def _with_items(form: Any, depth: int) -> Any:
    """A JSON schema whose arrays all name their elements, or OpenAI refuses the whole request."""
    if isinstance(form, list) and depth:
        return [_with_items(each, depth - 1) for each in form]
    if not isinstance(form, dict) or not depth:
        return form
    form = {name: _with_items(each, depth - 1) for name, each in form.items()}
    if "array" in (_list(form.get("type")) or [form.get("type")]):
        form.setdefault("items", {"type": "string"})
    return form


def _kind(form: Any, schema: Mapping[str, Any]) -> type:
    """The type that an argument of this form is given as: text, where text fits or nothing is said."""
    kinds = _kinds(form, schema, 6)
    return str if str in kinds or not kinds else kinds[0]


def _kinds(form: Any, schema: Mapping[str, Any], depth: int) -> list[type]:
    """The types that a JSON schema names, through its references into the whole `schema` and its alternatives."""
    if not isinstance(form, dict) or not depth:
        return []
    reference = form.get("$ref")
    if isinstance(reference, str):
        place: Any = schema
        for step in reference.removeprefix("#/").split("/"):
            place = _dict(place).get(step)
        return _kinds(place, schema, depth - 1)
    given = form.get("type")
    found = [KINDS[name] for name in _list(given) or [given] if isinstance(name, str) and name in KINDS]
    for key in ("anyOf", "oneOf", "allOf"):
        for each in _list(form.get(key))[:4]:
            found += _kinds(each, schema, depth - 1)
    return found


def _dict(value: Any) -> dict[str, Any]:
    """What a server says is an object, if it is one."""
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    """What a server says is a list, if it is one."""
    return value if isinstance(value, list) else []


def _reason(error: BaseException) -> str:
    """The innermost reason of what may be a group of errors, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = "it gave no answer in time" if isinstance(error, TimeoutError) else " ".join(str(error).split())
    return text or type(error).__name__


# --------------------------------------------------------------------------------------------- the thread of all


@cache
def _background() -> asyncio.AbstractEventLoop:
    """The loop in which all connections live, on a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="moss-mcp").start()
    return loop


def _run(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Run in the loop of all connections; TimeoutError after `seconds`."""
    future = asyncio.run_coroutine_threadsafe(work, _background())
    try:
        return future.result(seconds)
    except TimeoutError:
        future.cancel()
        raise
