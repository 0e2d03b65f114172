"""Our tools over MCP, as a real client meets them: what is listed, called, refused, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters, stdio_client

from moss.tools.base import Source, Tool, ToolError, tool
from moss.tools.mcp_server import offered

ROOT = Path(__file__).parent.parent
WORDS = ["-m", "moss", "tool", "--serve-mcp"]

OWN = '''
import sys, time, moss
print("a file that prints")

@moss.tool
def echo(text: str, times: int = 1, loud: bool = False, *more: int) -> str:
    """Say it again."""
    print("a tool that prints", flush=True)
    if text == "stdin":
        return repr(sys.stdin.read())
    if text == "exit":
        sys.exit("enough")
    return f"{text * times} {loud} {more}"

@moss.tool(seconds=0.5)
def late(seconds: float) -> str:
    """Take a while."""
    time.sleep(seconds)
    return "done"

@moss.tool
def pages(query: str) -> list[moss.Source]:
    """Find pages."""
    return [moss.Source(f"About {query}", "https://x/1", "what\\nit says"), moss.Source("More", "https://x/2", "it's")]
'''


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


@contextlib.asynccontextmanager
async def connected(*more: str, log: Any = sys.stderr) -> AsyncIterator[Client]:
    """A client of `moss tool --serve-mcp`, with the flags `more`."""
    given = StdioServerParameters(command=sys.executable, args=[*WORDS, *more], cwd=str(ROOT))
    async with Client(stdio_client(given, errlog=log)) as client:
        yield client


async def told(client: Client, name: str, **arguments: Any) -> str:
    """What a call gives, its error behind a `!`."""
    result = await client.call_tool(name, arguments)
    text = "\n".join(block.text for block in result.content)  # type: ignore[union-attr]
    return "!" + text if result.is_error else text


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN, encoding="utf-8")
    return str(path)


def test_a_real_client(own: str, tmp_path: Path) -> None:
    """List, call, be refused, call many at once: through the package that other programs use."""

    async def work() -> None:
        with (tmp_path / "log").open("w") as log:
            async with connected("--tools-from", own, log=log) as client:
                listed = {each.name: each for each in (await client.list_tools()).tools}
                assert {"Calculate", "Solve", "Echo", "Late", "Pages"} <= listed.keys()
                assert (listed["Solve"].title, listed["Echo"].description) == ("Equation solver", "Say it again.")
                assert listed["Echo"].input_schema["required"] == ["text"]
                assert listed["Echo"].input_schema["properties"]["more"]["type"] == "array"

                assert await told(client, "Calculate", expression="37*12") == "444"
                assert await told(client, "Solve", equation="x+2=5") == "x = 3"
                assert await told(client, "Echo", text="你", times=2) == "你你 False ()"
                assert await told(client, "Echo", text="a", loud=True, more=[1, 2]) == "a True (1, 2)"
                assert await told(client, "Echo", text="stdin") == "''"
                sources = await told(client, "Pages", query="me")
                assert sources == (
                    "<|1|>: 'what it says'\n<|2|>: \"it's\"\n<|1|> About me https://x/1\n<|2|> More https://x/2"
                )

                assert (await told(client, "Calculate", expression="1/0")).startswith("!division by zero")
                assert await told(client, "Calculate") == "!Calculate was given nothing; write Calculate(expression)"
                assert (await told(client, "Calculate", expr="1")).startswith("!Calculate was given expr")
                assert (await told(client, "Echo", text="a", times="x")).startswith("!Echo was given 'x'")
                assert (await told(client, "Nope")).startswith("!no tool is called 'Nope'")
                assert await told(client, "Late", seconds=5) == "!Late took more than 0.5 s"
                assert await told(client, "Echo", text="exit") == "!Echo failed: SystemExit: enough"

                started = time.monotonic()
                many = [told(client, "Late", seconds=0.3) for _ in range(20)]
                assert await asyncio.gather(*many) == ["done"] * 20
                assert time.monotonic() - started < 3  # one after the other they would take six seconds
        log_text = (tmp_path / "log").read_text()
        assert "a file that prints" in log_text and "a tool that prints" in log_text

    run(work())


def test_what_lacks_a_package_is_not_listed() -> None:
    """A client would offer its model a tool that can only fail."""
    lacking = Tool("lacking", "Lacking", "Lack", lambda text: text, missing=lambda: "some package is not installed")

    @tool
    def here(text: str) -> str:
        """It is here."""
        return text

    async def work() -> None:
        async with Client(offered({"lacking": lacking, "here": here})) as client:
            assert [each.name for each in (await client.list_tools()).tools] == ["Here"]
            assert (await told(client, "Lack", text="x")).startswith("!no tool is called 'Lack'; there are Here")
            assert await told(client, "Here", text="x") == "x"

    run(work())


def test_a_client_that_gives_up_a_call() -> None:
    """Its other calls go on, and the tool's late answer goes nowhere."""

    @tool(seconds=5)
    def nap(seconds: float) -> list[Source]:
        """Sleep."""
        time.sleep(seconds)
        if seconds > 0.5:
            raise ToolError("too long")
        return []

    async def work() -> None:
        async with Client(offered({"nap": nap})) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.call_tool("Nap", {"seconds": 1}), 0.2)
            assert await told(client, "Nap", seconds=0) == "!nothing found"
            await asyncio.sleep(1)
            assert await told(client, "Nap", seconds=0.6) == "!too long"

    run(work())


@pytest.mark.parametrize(("how", "code"), [("INT", 130), ("TERM", 143), ("EOF", 0)])
def test_it_ends_when_it_is_told_to(how: str, code: int) -> None:
    """Ctrl-C had no effect while it waited for input."""
    hello = b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "Late", "arguments": {}}}\n{\n'
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *WORDS], cwd=ROOT, **pipes) as process:
        process.stdin.write(hello)  # out of turn, and no JSON: neither may end it
        process.stdin.flush()
        assert process.stdout.readline().startswith(b'{"jsonrpc":"2.0"')
        if how == "EOF":
            process.stdin.close()
        else:
            process.send_signal(getattr(signal, f"SIG{how}"))
        started = time.monotonic()
        assert process.wait(30) == code
        assert time.monotonic() - started < 5
        err = process.stderr.read()
        assert b"asyncio" not in err and b"KeyboardInterrupt" not in err
        assert err.endswith(b"moss tool: stopped\n") == (how == "INT")
