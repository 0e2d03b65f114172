"""The one way in which this package reads the web: `read_pages` for pages of strangers, `ask` for a configured API.

    page = await read_page("https://example.com/a", seconds=6.0)
    pages = wait(read_pages(["https://example.com/a", "https://example.org/b"]))   # from code that is not async

A page's address may come from a hostile search result, and its bytes from a hostile server, so for pages:

* the name is looked up once, every address that it has must be public, and the address that was checked is the one
  that is dialled; certificates are checked against the name;
* http and https on their own ports, no user names in the address, at most `REDIRECTS` hops, each checked anew;
* one deadline for everything, `MAX_WIRE` bytes from the wire and `MAX_PAGE` unpacked, gzip alone, and only HTML or
  plain text; all of it is refused before the body is read where the headers tell;
* no proxy, no cookies, nothing of the environment, nothing remembered between pages.

An API (a search provider, say) is named by the user in the settings, so it may stand in the own network; the deadline
and the limits are the same. Its key is in a header or a body and in no message. Nothing else in the package makes an
HTTP client, but the engine's own for model servers (`moss.engine.remote`), and the `mcp` library for MCP servers
(`moss.tools.mcp`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ipaddress
import json
import re
import socket
import ssl
import threading
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx2

from moss.tools.base import ToolError

SECONDS = 6.0  # for one page, from the look-up to the last byte
DIAL_SECONDS = 2.0  # for an address, at most its share of the time, while there is another one to try
MAX_WIRE = 2 << 20
MAX_PAGE = 4 << 20
MAX_URL = 2000
REDIRECTS = 3
TYPES = ("text/html", "text/plain", "application/xhtml+xml")
AGENT = "moss"

_NOT_PUBLIC = tuple(
    ipaddress.ip_network(each)
    for each in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 "
        "203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
        "2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20"
    ).split()
)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # whatever else IPv6 has is mapped, local, multicast or reserved

# what a server can make of an answer, and what is wrong with an address
_BROKEN = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError, ValueError)

T = TypeVar("T")
Lookup = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True)
class Page:
    """What a server sent: its address after redirects, the bytes, their type and the charset it named ("" = none)."""

    url: str
    content: bytes
    type: str
    charset: str


def checked_url(text: str) -> httpx2.URL:
    """The address of a page; `ToolError` for one that will not be asked, whoever gave it."""
    if len(text) > MAX_URL or re.search(r"[\x00-\x20\x7f-\xa0\\<>\"]", text):
        raise ToolError(f"{text[:60]!r} is no address of a page")
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError, UnicodeError):
        raise ToolError(f"{text[:60]!r} is no address of a page") from None
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise ToolError(f"{text[:60]!r} is refused: only http and https pages are read")
    if url.userinfo:
        raise ToolError(f"{_name(url)} is refused: an address with a user name")
    if url.port not in (None, 80, 443):
        raise ToolError(f"{_name(url)}:{url.port} is refused: only the ports of the web are asked")
    if _is_number(_name(url)) and not is_public(_name(url)):
        raise ToolError(f"{_name(url)} is refused: it is not a public address")
    return url


def is_address(text: str) -> bool:
    """Whether a page may be asked for at all; where its name leads is seen when it is."""
    try:
        checked_url(text)
    except ToolError:
        return False
    return True


def _name(url: httpx2.URL) -> str:
    """The host as it stands in the look-up, the certificate and the header: `URL.host` has other letters for some."""
    return url.raw_host.decode("ascii")


def _is_number(host: str) -> bool:
    """Whether a host is an address already."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet; names, zones and everything special do not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (ip.scope_id or ip not in _GLOBAL_UNICAST):
        return False
    return ip.is_global and not any(ip.version == net.version and ip in net for net in _NOT_PUBLIC)


async def look_up(host: str, port: int) -> list[str]:
    """The addresses of a name. In a thread of its own, which a deadline does not wait for."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[str]] = loop.create_future()

    def tell(addresses: list[str]) -> None:
        if not found.done():
            found.set_result(addresses)

    def work() -> None:
        try:
            addresses = [str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            addresses = []
        try:
            loop.call_soon_threadsafe(tell, addresses)
        except RuntimeError:  # the deadline has passed, and the loop is closed
            return

    threading.Thread(target=work, daemon=True, name="lookup").start()
    return await found


class _Guard(httpx2.AsyncBaseTransport):
    """Looks a name up once, and dials the addresses that it found; of strangers only where all of them are public."""

    def __init__(self, lookup: Lookup, inner: httpx2.AsyncBaseTransport, *, strangers: bool) -> None:
        self.lookup, self.inner, self.strangers = lookup, inner, strangers

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = checked_url(str(request.url)) if self.strangers else request.url
        name = _name(url)
        addresses = list(dict.fromkeys(await self.lookup(name, url.port or (443 if url.scheme == "https" else 80))))
        if not addresses:
            raise ToolError(f"{name} has no address")
        if self.strangers and (refused := [each for each in addresses if not is_public(each)]):
            raise ToolError(f"{name} is refused: {refused[0]} is not a public address")
        request.extensions = {**request.extensions, "sni_hostname": name.rstrip(".")}
        seconds = request.extensions["timeout"]["connect"]
        *others, last = addresses
        for address in others:
            with contextlib.suppress(httpx2.ConnectError, httpx2.ConnectTimeout):
                return await self._dial(request, url, address, min(DIAL_SECONDS, seconds / len(addresses)))
        return await self._dial(request, url, last, seconds)

    async def _dial(self, request: httpx2.Request, url: httpx2.URL, address: str, seconds: float) -> httpx2.Response:
        """Ask at one address, given so long to connect; the Host header and the certificate's name stay."""
        request.url = url.copy_with(host=address, username="", password="")
        timeout = {**request.extensions["timeout"], "connect": seconds}
        request.extensions = {**request.extensions, "timeout": timeout}
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self.inner.aclose()


def _client(transport: httpx2.AsyncBaseTransport, seconds: float) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        transport=transport,
        timeout=seconds,
        follow_redirects=False,
        trust_env=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        headers={"User-Agent": AGENT, "Accept-Encoding": "gzip"},
    )


def _dialer() -> httpx2.AsyncBaseTransport:
    """Connections that serve one request: one to an address must not answer for another name on it."""
    once = httpx2.Limits(max_keepalive_connections=0)
    return httpx2.AsyncHTTPTransport(verify=_certificates(), trust_env=False, limits=once)


@cache
def _certificates() -> ssl.SSLContext:
    """Whom to trust; reading them takes longer than most pages."""
    return httpx2.create_ssl_context(trust_env=False)


async def read_page(
    address: str, seconds: float = SECONDS, *, lookup: Lookup = look_up, inner: httpx2.AsyncBaseTransport | None = None
) -> Page:
    """One page; `ToolError` says why there is none. `lookup` and `inner` (which dials) are for tests."""
    url = checked_url(address)
    guard = _Guard(lookup, inner or _dialer(), strangers=True)
    try:
        async with asyncio.timeout(seconds), _client(guard, seconds) as client:
            for _ in range(REDIRECTS + 1):
                request = client.build_request("GET", url, headers={"Accept": ", ".join(TYPES)})
                response = await client.send(request, stream=True)
                try:
                    if not response.has_redirect_location:
                        return await _page(response, url)
                    url = checked_url(str(url.join(response.headers["Location"])))
                finally:
                    await response.aclose()
            raise ToolError(f"{_name(url)} sends from page to page without end")
    except (TimeoutError, httpx2.TimeoutException):
        raise ToolError(f"{_name(url)} took more than {seconds:g} s") from None
    except _BROKEN as error:
        raise ToolError(f"{_name(url)} cannot be read: {type(error).__name__}") from None


async def read_pages(addresses: Sequence[str], seconds: float = SECONDS) -> list[Page | ToolError]:
    """Several pages side by side, each a page or why there is none."""

    async def one(address: str) -> Page | ToolError:
        try:
            return await read_page(address, seconds)
        except ToolError as error:
            return error

    return await asyncio.gather(*map(one, addresses))


async def _page(response: httpx2.Response, url: httpx2.URL) -> Page:
    """The body of an answer whose headers promise text."""
    if response.status_code != 200:
        raise ToolError(f"{_name(url)} answers {response.status_code}")
    kind, _, rest = response.headers.get("Content-Type", "").partition(";")
    kind = kind.strip().lower()
    if kind not in TYPES:
        raise ToolError(f"{_name(url)} sends {kind[:40] or 'something'}, not a page of text")
    named = re.search(r"charset=[\"']?([\w.:-]{1,40})", rest, re.IGNORECASE | re.ASCII)
    return Page(str(url), await _body(response, _name(url)), kind, named.group(1) if named else "")


async def _body(response: httpx2.Response, host: str) -> bytes:
    """The whole body within the limits, unpacked from one layer of gzip at most."""
    packed = response.headers.get("Content-Encoding", "identity").strip().lower()
    if packed not in ("identity", "gzip", "x-gzip", ""):
        raise ToolError(f"{host} packs its page with {packed[:40]}, which was not asked for")
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > MAX_WIRE:
        raise ToolError(f"{host} sends too large a page")
    unpack = zlib.decompressobj(16 + zlib.MAX_WBITS) if "gzip" in packed else None
    body, wire = bytearray(), 0
    async for piece in response.aiter_raw():
        wire += len(piece)
        try:
            body += piece if unpack is None else unpack.decompress(piece, MAX_PAGE + 1 - len(body))
        except zlib.error:
            raise ToolError(f"{host} sends a page that cannot be unpacked") from None
        if wire > MAX_WIRE or len(body) > MAX_PAGE:
            raise ToolError(f"{host} sends too large a page")
    return bytes(body)


async def send(
    url: str,
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    params: dict[str, str] | None = None,
    body: dict[str, Any] | None = None,
    seconds: float = SECONDS,
    lookup: Lookup = look_up,
) -> tuple[int, bytes]:
    """The status and the body with which an API of the user's own settings answers.

    `ToolError` names the host and what went wrong; keys belong into `headers` or `body`, which no message holds.
    """
    try:
        name = _name(httpx2.URL(url))
    except _BROKEN:
        name = ""
    if not name:
        raise ToolError("the address of the API that is set is none; write https://host/path")
    try:
        guard = _Guard(lookup, _dialer(), strangers=False)
        async with asyncio.timeout(seconds), _client(guard, seconds) as client:
            request = client.build_request(method, url, headers=headers, params=params, json=body)
            response = await client.send(request, stream=True)
            try:
                return response.status_code, await _body(response, name)
            finally:
                await response.aclose()
    except (TimeoutError, httpx2.TimeoutException):
        raise ToolError(f"{name} took more than {seconds:g} s") from None
    except _BROKEN as error:
        raise ToolError(f"{name} cannot be asked: {type(error).__name__}") from None


async def ask(url: str, **values: Any) -> Any:
    """The JSON that an API answers with; see `send`."""
    status, content = await send(url, **values)
    name = _name(httpx2.URL(url))
    if status != 200:
        raise ToolError(f"{name} answers {status}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ToolError(f"{name} sends something else than JSON") from None


def wait(job: Coroutine[Any, Any, T]) -> T:
    """The result of any of these from plain code; in a notebook, whose thread has a loop already, by another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, asyncio.run, job).result()
