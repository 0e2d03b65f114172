"""The open web on this machine: a server of bytes, a look-up that knows its names, a wire that leads there.

    with FakeWeb(page("Hello"), lookup={"two.example": ["8.8.8.8", "127.0.0.1"]}) as web:
        asyncio.run(read_page("http://one.example/", lookup=web.look_up, inner=web.wire()))
        web.asked, web.dialled, web.heads       # names, (address, port, name of the certificate), requests

What is dialled is the address that the client chose; only the last step leads to this machine.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx2
import pytest

from moss.tools import fetch

PUBLIC = "93.184.215.14"
Answer = bytes | Callable[[socket.socket], None]


def answer(body: bytes = b"", *headers: str, status: str = "200 OK", kind: str = "text/html; charset=utf-8") -> bytes:
    """A whole answer; without a length of its own it ends with the connection."""
    lines = [f"HTTP/1.1 {status}", "Connection: close", *([f"Content-Type: {kind}"] if kind else []), *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def page(text: str, title: str = "Title") -> bytes:
    """A page of HTML with a text and a menu around it."""
    head, menu = f"<html><head><title>{title}</title></head>", "<nav>Menu Login</nav>"
    return answer(f"{head}<body>{menu}<article><p>{text}</p></article></body></html>".encode())


def moved(where: str, status: str = "302 Found") -> bytes:
    return answer(b"", f"Location: {where}", status=status)


def told(value: Any, status: str = "200 OK") -> bytes:
    """An answer of JSON."""
    return answer(json.dumps(value, ensure_ascii=False).encode(), status=status, kind="application/json")


def packed(body: bytes) -> bytes:
    return answer(gzip.compress(body), "Content-Encoding: gzip")


class FakeWeb:
    """Gives its answers in order, the last one again and again; or by what stands in the request's head (a mapping)."""

    def __init__(
        self,
        *answers: Answer,
        hosts: Mapping[str, Answer] | None = None,
        lookup: Mapping[str, Sequence[str]] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answers, self.hosts, self.names, self.tls = list(answers), hosts or {}, lookup or {}, tls
        self.asked: list[str] = []
        self.dialled: list[tuple[str, int | None, str]] = []
        self.heads: list[str] = []
        self.bodies: list[str] = []
        self.closing = threading.Event()

    def __enter__(self) -> FakeWeb:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._socket.close()

    async def look_up(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return list(self.names.get(host, [PUBLIC]))

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have every client of this process find this web in the place of the open one; this machine stays itself."""
        there, dial = socket.getaddrinfo, fetch._dialer

        def getaddrinfo(host: str, port: int, *args: Any, **values: Any) -> list[Any]:
            if not host.endswith(".example"):
                return there(host, port, *args, **values)
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in self.names.get(host, [PUBLIC])
            ]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(fetch, "_dialer", lambda: _Wire(self, dial()))

    def wire(self, trusts: ssl.SSLContext | None = None) -> httpx2.AsyncBaseTransport:
        """A transport that notes what it shall dial, and dials this server."""
        return _Wire(self, httpx2.AsyncHTTPTransport(verify=trusts or False, trust_env=False))

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
            data, wanted = b"", 0
            while b"\r\n\r\n" not in data or len(data.split(b"\r\n\r\n", 1)[1]) < wanted:
                piece = connection.recv(65536)
                if not piece:
                    return
                data += piece
                if length := re.search(rb"(?i)\r\ncontent-length: (\d+)\r\n", data):
                    wanted = int(length.group(1))
            head, body = data.decode("latin-1").split("\r\n\r\n", 1)
            self.heads.append(head + "\r\n")
            self.bodies.append(body)
            reply = self._answer(head)
            if callable(reply):
                reply(connection)
            else:
                connection.sendall(reply)
            if self.tls is not None:
                connection = connection.unwrap()  # type: ignore[attr-defined]

    def _answer(self, head: str) -> Answer:
        for words, reply in self.hosts.items():
            if words in head:
                return reply
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class _Wire(httpx2.AsyncBaseTransport):
    def __init__(self, web: FakeWeb, inner: httpx2.AsyncBaseTransport) -> None:
        self.web, self.inner = web, inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        if url.host == "127.0.0.1":
            return await self.inner.handle_async_request(request)
        self.web.dialled.append((url.host, url.port, request.extensions.get("sni_hostname", "")))
        there = url.copy_with(host="127.0.0.1", port=self.web.port)
        headers, extensions = (
            request.headers,
            request.extensions,
        )  # the request stays as it is: cookies go by its address
        sent = httpx2.Request(request.method, there, headers=headers, stream=request.stream, extensions=extensions)
        return await self.inner.handle_async_request(sent)

    async def aclose(self) -> None:
        await self.inner.aclose()


# ------------------------------------------------------------------------------------------------- who is connected to

_seen: list[Any] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event == "socket.connect":
        _seen.append(arguments[1])


@contextlib.contextmanager
def connections() -> Iterator[list[Any]]:
    """The addresses that any socket of this process connects to meanwhile."""
    global _seen
    if not getattr(connections, "hooked", False):
        sys.addaudithook(_hook)  # for good: there is no way to take one away
        connections.hooked = True  # type: ignore[attr-defined]
    _seen = found = []
    try:
        yield found
    finally:
        _seen = None
