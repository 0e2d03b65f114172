"""The client for the web: whom it asks, what it takes from them, and what it never does."""

from __future__ import annotations

import ast
import asyncio
import gzip
import ipaddress
import json
import logging
import os
import random
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from moss.tools import fetch
from moss.tools.base import ToolError
from moss.tools.fetch import MAX_PAGE, MAX_WIRE, REDIRECTS, Page, ask, checked_url, is_public, read_page, read_pages
from moss.tools.search import search
from tests.fake_server import FakeServer, Request
from tests.fake_web import PUBLIC, Answer, FakeWeb, answer, connections, moved, packed, page

ROOT = Path(__file__).parents[1]


def read(web: FakeWeb, url: str = "http://one.example/", seconds: float = 5.0, **values: Any) -> Page:
    return asyncio.run(read_page(url, seconds, lookup=web.look_up, **{"inner": web.wire(), **values}))


def refusal(*answers: Answer, url: str = "http://one.example/", seconds: float = 5.0, **values: Any) -> str:
    """What is said of a page that cannot be read."""
    with FakeWeb(*answers, **values) as web, pytest.raises(ToolError) as caught:
        read(web, url, seconds)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_page_is_read() -> None:
    """Prevents a client so careful that it reads nothing."""
    with FakeWeb(page("Hello there.")) as web:
        got = read(web, "http://one.example/a?b=c")
    assert (got.url, got.type, got.charset) == ("http://one.example/a?b=c", "text/html", "utf-8")
    assert b"Hello there." in got.content
    assert web.heads[0].startswith("GET /a?b=c HTTP/1.1\r\n")
    assert "cookie" not in web.heads[0].lower() and "referer" not in web.heads[0].lower()
    with FakeWeb(answer(b"caf\xe9", kind="Text/Plain; Charset='ISO-8859-1'")) as web:
        got = read(web)
    assert (got.content, got.type, got.charset) == (b"caf\xe9", "text/plain", "ISO-8859-1")


# ------------------------------------------------------------------------------------------------------ whom it asks

NOT_PUBLIC = """
    0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1
    172.31.255.255 192.0.0.1 192.0.0.8 192.0.0.9 192.0.0.170 192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1
    192.168.1.1 192.175.48.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.5 224.0.0.1 239.255.255.255 240.0.0.1
    255.255.255.255
    :: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:8.8.8.8 64:ff9b::7f00:1 64:ff9b::808:808
    64:ff9b:1::1 100::1 2001::1 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:808:808::1
    2620:4f:8000::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 2600::1%eth0 fec0::1
    ff02::1 ff0e::1
    example.com localhost 127.1 2130706433 0x7f000001 0177.0.0.1 1.2.3 8.8.8.8/32 [2600::1]
""".split()


@pytest.mark.parametrize("address", [*NOT_PUBLIC, "", " 8.8.8.8", "8.8.8.8\n", "８.8.8.8"])
def test_what_is_not_of_the_open_internet(address: str) -> None:
    """Prevents a page's link that reads the machine itself, the network around it, or a cloud's keys."""
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "1.1.1.1", "223.255.255.254", "2600::1", "2a00:1450::1"])
def test_what_is(address: str) -> None:
    """Prevents a filter that lets nothing through."""
    assert is_public(address)


def test_every_special_network_is_left_out() -> None:
    """Prevents a hole where Python's own table has an exception, or is older than a registration."""
    rng = random.Random(0)
    for name in ("_private_networks", "_private_networks_exceptions", "_reserved_networks", "_multicast_network"):
        for constants in (ipaddress._IPv4Constants, ipaddress._IPv6Constants):  # type: ignore[attr-defined]
            networks = getattr(constants, name, ())
            for network in networks if isinstance(networks, list) else [networks]:
                for _ in range(20 if network else 0):
                    inside = network[rng.randrange(network.num_addresses)]
                    assert not is_public(str(inside)), inside


def rows() -> list[dict[str, Any]]:
    """The inputs of the collected attacks that are about searching."""
    if "MOSS_TEST_DATA" not in os.environ:
        return []
    lines = (Path(os.environ["MOSS_TEST_DATA"]) / "attacks.jsonl").read_text(encoding="utf-8").split("\n")
    return [row for row in map(json.loads, filter(None, lines)) if row["area"] == "fetch"]


MORE = """
    http://127.0.0.1/ http://127.1/ http://0177.0.0.1/ http://0/ http://[::1]/ http://[::ffff:127.0.0.1]/
    http://[64:ff9b::7f00:1]/ http://[2002:7f00:1::]/ http://10.0.0.1/ https://192.168.0.1/ http://localhost:22/
    http://8.8.8.8:8080/ https://8.8.8.8:22/ file:///etc/passwd gopher://127.0.0.1:70/x ws://127.0.0.1/ http:127.0.0.1
    http:/127.0.0.1/ http:\\\\127.0.0.1\\ javascript:alert(1) view-source:http://127.0.0.1/ about:blank HTTP://LOCALHOST/
    http://a:b@127.0.0.1/ http://%31%32%37.0.0.1/ http://127.0.0.1%00.example/ http://１２７.0.0.1/ http://127。0。0。1/
    ｈｔｔｐ：／／127.0.0.1/ mailto:root@localhost \u200bhttp://127.0.0.1/ dict://127.0.0.1:11211/ http://xn--/
""".split()


@pytest.mark.parametrize(
    "text", [row["input"] for row in rows() if row["must"] == "refuse" and not row["input"].startswith("MOCK")] + MORE
)
def test_no_address_is_asked_that_must_not_be(text: str) -> None:
    """Prevents a search, or a page that a provider names, that reaches into the own network (tests 29 and 41 of the
    security list): refused as a query, and refused as an address, with not one connection."""
    with connections() as found:
        with pytest.raises(ToolError):
            search(text)
        with pytest.raises(ToolError):
            asyncio.run(read_page(text, 3.0))
    assert found == []


def test_the_collected_attacks_are_all_here() -> None:
    """Prevents a row of the list that no test looks at."""
    if "MOSS_TEST_DATA" not in os.environ:
        pytest.skip("set MOSS_TEST_DATA to the folder with real data")
    covered = {
        "MOCK dns rebind public then 127.0.0.1": test_a_name_that_changes_its_address,
        "MOCK one byte per 0.5 s": test_no_server_takes_more_time_than_there_is,
        "MOCK Content-Encoding: br, gzip": test_refused_before_the_body,
        "MOCK Content-Type: application/pdf": test_refused_before_the_body,
        'MOCK HTML 4 MB of "<<<<<<"': "tests/test_tools_extract.py",
        "MOCK page text contains <|MOSS|>: and <eor>": "tests/test_tools_search.py",
        "MOCK provider key missing": "tests/test_tools_providers.py",
    }
    assert {row["input"] for row in rows() if row["input"].startswith("MOCK")} <= covered.keys()
    for row in rows():
        if row["must"] == "value":
            assert search(row["input"]), row


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (["127.0.0.1"], "one.example is refused: 127.0.0.1 is not a public address"),
        ([PUBLIC, "10.0.0.1"], "one.example is refused: 10.0.0.1 is not a public address"),
        (["::ffff:10.0.0.1", PUBLIC], "one.example is refused: ::ffff:10.0.0.1 is not a public address"),
        ([], "one.example has no address"),
    ],
)
def test_all_addresses_of_a_name_count(found: list[str], words: str) -> None:
    """Prevents a name with one public address beside a private one, of which the client takes the second (test 32)."""
    with FakeWeb(page("x"), lookup={"one.example": found}) as web, pytest.raises(ToolError) as caught:
        read(web)
    assert str(caught.value) == words
    assert (web.dialled, web.heads) == ([], [])


def test_what_was_checked_is_what_is_dialled() -> None:
    """Prevents a second look-up between check and connection, and a server that does not know what it is asked for."""
    with FakeWeb(page("x"), lookup={"one.example": ["2600::7", PUBLIC]}) as web:
        assert read(web).url == "http://one.example/"
    assert (web.asked, web.dialled) == (["one.example"], [("2600::7", None, "one.example")])
    assert "\r\nHost: one.example\r\n" in web.heads[0]


def test_a_name_that_changes_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents DNS rebinding: public when it is checked, 127.0.0.1 when it is dialled, or at the next hop (test 31)."""
    told = [PUBLIC, "127.0.0.1", "127.0.0.1"]
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (told[len(asked) - 1], port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with FakeWeb(page("x")) as web:
        asyncio.run(read_page("http://one.example/", inner=web.wire()))
    assert (asked, [where for where, _, _ in web.dialled]) == (["one.example"], [PUBLIC])
    asked.clear()
    with FakeWeb(moved("/again"), page("x")) as web, pytest.raises(ToolError, match=r"127\.0\.0\.1 is not a public"):
        asyncio.run(read_page("http://one.example/", inner=web.wire()))
    assert (asked, len(web.dialled), len(web.heads)) == (["one.example"] * 2, 1, 1)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://faß.example/", "xn--fa-hia.example"),  # the old rules, those of Python, make it fass.example
        ("http://例え.example/", "xn--r8jz45g.example"),
        ("http://One.EXAMPLE/", "one.example"),
    ],
)
def test_names_of_other_scripts(url: str, name: str) -> None:
    """Prevents a name that is looked up by other rules than it is asked by: two hosts for one address."""
    with FakeWeb(page("x")) as web:
        read(web, url)
    assert (web.asked, web.dialled) == ([name], [(PUBLIC, None, name)])
    assert f"\r\nHost: {name}\r\n" in web.heads[0]


def test_the_next_address_where_one_is_dead() -> None:
    """Prevents every page of a host that has an IPv6 address from being lost where there is no IPv6."""

    class Deaf(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            if request.url.host == "2600::7":
                web.dialled.append((request.url.host, None, ""))
                raise httpx2.ConnectError("no route to host")
            return await wire.handle_async_request(request)

    with FakeWeb(page("x"), lookup={"one.example": ["2600::7", "2600::7", PUBLIC]}) as web:
        wire = web.wire()
        assert b"<p>x</p>" in read(web, inner=Deaf()).content
    assert [where for where, _, _ in web.dialled] == ["2600::7", PUBLIC]
    with FakeWeb(page("x"), lookup={"one.example": ["2600::7"]}) as web, pytest.raises(ToolError, match="ConnectError"):
        read(web, inner=Deaf())


@pytest.mark.parametrize(("number", "seconds", "most"), [(1, 12.0, 3.0), (1, 1.0, 0.8), (3, 2.0, 1.8)])
def test_an_address_that_never_answers(number: int, seconds: float, most: float) -> None:
    """Prevents a page that is lost since a first address, whose packets somebody drops, takes all the time there is."""

    class Mute(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            if request.url.host.startswith("2600"):
                await asyncio.sleep(request.extensions["timeout"]["connect"])
                raise httpx2.ConnectTimeout("")
            assert request.extensions["timeout"]["connect"] == seconds  # the last one has what is left
            return await wire.handle_async_request(request)

    dead = [f"2600::{place}" for place in range(number)]
    begun = time.monotonic()
    with FakeWeb(page("x"), lookup={"one.example": [*dead, PUBLIC]}) as web:
        wire = web.wire()
        assert b"<p>x</p>" in read(web, seconds=seconds, inner=Mute()).content
    assert time.monotonic() - begun < most
    with FakeWeb(page("x"), lookup={"one.example": dead}) as web, pytest.raises(ToolError, match="took more than"):
        read(web, seconds=0.2, inner=Mute())


# -------------------------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for one.example that is its own authority, with its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "one.example")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    now = __import__("datetime").datetime.now(__import__("datetime").UTC)
    day = __import__("datetime").timedelta(days=1)
    made = made.not_valid_before(now - day).not_valid_after(now + day)
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("one.example")]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(key, hashes.SHA256())
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return file


def test_certificates_are_checked_against_the_name(certificate: Path) -> None:
    """Prevents a page over https from whoever answers at the address: the name must stay in the greeting (SNI), and
    the certificate must be its own, although an address is dialled."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate)
    greeted: list[str | None] = []
    theirs.sni_callback = lambda connection, name, context: greeted.append(name)
    ours = ssl.create_default_context(cafile=str(certificate))
    with FakeWeb(page("secret"), tls=theirs) as web:
        assert b"secret" in read(web, "https://one.example/", inner=web.wire(ours)).content
        assert b"secret" in read(web, "https://one.example./", inner=web.wire(ours)).content
        assert (web.dialled, greeted) == ([(PUBLIC, None, "one.example")] * 2, ["one.example"] * 2)
        with pytest.raises(ToolError, match=r"two\.example cannot be read: ConnectError"):
            read(web, "https://two.example/", inner=web.wire(ours))
        with pytest.raises(ToolError, match=r"one\.example cannot be read: ConnectError"):
            read(web, "https://one.example/", inner=web.wire(ssl.create_default_context()))
        assert len(web.heads) == 2


# -------------------------------------------------------------------------------------------------------- redirects


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254 is refused: it is not a public address"),
        ("//127.0.0.1/", "127.0.0.1 is refused: it is not a public address"),
        ("http://inside.example/", "inside.example is refused: 10.0.0.7 is not a public address"),
        ("file:///etc/passwd", "is refused: only http and https pages are read"),
        ("javascript:alert(1)", "is refused: only http and https"),
        ("http://two.example:8080/", "two.example:8080 is refused: only the ports of the web are asked"),
        ("http://a:b@two.example/", "two.example is refused: an address with a user name"),
        ("http://two.example\\@127.0.0.1/", "127.0.0.1 is refused: an address with a user name"),
        ("http://two.example/" + "a" * 3000, "is no address of a page"),
        ("http://[::1", "one.example cannot be read: InvalidURL"),
    ],
)
def test_every_hop_is_checked(where: str, words: str) -> None:
    """Prevents a public page that sends the client on to where it must not go (test 30)."""
    names = {"inside.example": ["10.0.0.7"]}
    with FakeWeb(moved(where), page("x"), lookup=names) as web, pytest.raises(ToolError) as caught:
        read(web)
    assert words in str(caught.value)
    assert (len(web.dialled), len(web.heads)) == (1, 1)


def test_redirects_are_followed_and_counted() -> None:
    """Prevents pages that are lost because they moved, and a ring of pages that never ends."""
    with FakeWeb(moved("/b", "301 Moved"), moved("//two.example/c", "307 Temporary"), page("there")) as web:
        assert read(web).url == "http://two.example/c"
    assert web.asked == ["one.example", "one.example", "two.example"]
    assert "sends from page to page without end" in refusal(moved("/"))
    with FakeWeb(*[moved("/")] * (REDIRECTS + 1), page("x")) as web, pytest.raises(ToolError):
        read(web)
    assert len(web.heads) == REDIRECTS + 1
    assert "answers 302" in refusal(answer(b"", status="302 Found"))


def test_nothing_is_remembered_on_the_way() -> None:
    """Prevents a cookie, or the page before, that tells one host of another."""
    cookies = ["Set-Cookie: a=b; Path=/; Max-Age=999", "Set-Cookie: c=d; Domain=example"]
    hop = answer(b"", f"Location: http://{PUBLIC}/c", *cookies, status="302 Found")
    names = {PUBLIC: [PUBLIC]}
    with FakeWeb(hop, answer(b"", "Location: /d", *cookies, status="302 Found"), page("x"), lookup=names) as web:
        read(web, f"http://{PUBLIC}/")
    assert len(web.heads) == 3
    for head in web.heads:
        assert "cookie" not in head.lower() and "referer" not in head.lower() and "authorization" not in head.lower()


# ------------------------------------------------------------------------------------------------ what it takes of it


def endless(piece: bytes, *headers: str, every: float = 0.0) -> Answer:
    """A page that does not end."""

    def reply(connection: socket.socket) -> None:
        connection.sendall(answer(b"", *headers))
        while True:
            connection.sendall(piece)
            time.sleep(every)

    return reply


def says(*pieces: bytes, every: float = 0.0) -> Answer:
    """Send these, then nothing more until the client leaves."""

    def reply(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(every)
        connection.recv(1)

    return reply


def test_a_bomb_is_not_unpacked() -> None:
    """Prevents a megabyte that becomes a gigabyte: the memory of the whole server for one page (test 33)."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    head = squeeze.compress(b"") + squeeze.flush(zlib.Z_FULL_FLUSH)
    bomb = head + (squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)) * 1024
    assert len(bomb) < MAX_WIRE
    with FakeWeb(answer(bomb, "Content-Encoding: gzip")) as web:
        wire = web.wire()
        tracemalloc.start()
        begun = time.monotonic()
        with pytest.raises(ToolError, match="sends too large a page"):
            read(web, inner=wire)
        took, (_, peak) = time.monotonic() - begun, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert took < 1.0
    assert peak < 30 << 20


@pytest.mark.parametrize("length", [MAX_WIRE - 1, MAX_WIRE, MAX_WIRE + 1])
def test_how_much_is_read(length: int) -> None:
    """Prevents a limit that is off by one, or that holds only for what the header says."""
    for reply in (answer(b"a" * length), answer(b"a" * length, f"Content-Length: {length}")):
        if length <= MAX_WIRE:
            with FakeWeb(reply) as web:
                assert len(read(web).content) == length
        else:
            assert "sends too large a page" in refusal(reply)


def test_packed_pages() -> None:
    """Prevents gzip that is read as text, and what is packed twice, cut or no gzip at all from being believed."""
    text = random.Random(0).randbytes(300_000)
    with FakeWeb(packed(text)) as web:
        assert read(web).content == text
    with FakeWeb(packed(b"a" * MAX_PAGE)) as web:
        assert len(read(web).content) == MAX_PAGE
    assert "too large" in refusal(packed(b"a" * (MAX_PAGE + 1)))
    assert "cannot be unpacked" in refusal(answer(b"plain text", "Content-Encoding: gzip"))
    twice = gzip.compress(text)
    with FakeWeb(packed(twice)) as web:
        assert read(web).content == twice  # one layer only: the second is no text to anybody


@pytest.mark.parametrize(
    "reply",
    [
        endless(b"a"),
        endless(b"a" * 65536, every=0.05),
        endless(b"a", every=0.5),
        endless(gzip.compress(b"a")[:20], "Content-Encoding: gzip", every=0.5),
        endless(b"1\r\na\r\n", "Transfer-Encoding: chunked", every=0.1),
        says(*[bytes([letter]) for letter in b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"], every=0.1),
        says(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 100, every=0.1),
        says(*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 100, every=0.02),
        says(b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000),
        says(b""),
        says(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 10\r\n\r\nhalf"),
        says(answer(b"", "X: " + "y" * (1 << 20))),
        says(answer(b"", *[f"X{n}: y" for n in range(100_000)])),
        says(answer(b"", *["Set-Cookie: a=b; expires=" + " " * 5000] * 10)),
        says(b"HTTP/1.1 200 " + b"O" * (1 << 20)),
    ],
    ids="fast large slow packed chunked head headers 100 hundreds mute half header many cookies status".split(),
)
def test_no_server_takes_more_time_than_there_is(reply: Answer) -> None:
    """Prevents a page that holds up its search: one byte now and then keeps every pause short (test 34)."""
    begun = time.monotonic()
    assert refusal(reply, seconds=1.0)
    assert time.monotonic() - begun < 1.5


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (answer(b"", "Content-Encoding: br"), "packs its page with br"),
        (answer(b"", "Content-Encoding: br, gzip"), "packs its page with br, gzip"),
        (answer(b"", "Content-Encoding: gzip, gzip"), "packs its page with gzip, gzip"),
        (answer(b"", "Content-Encoding: gzip", "Content-Encoding: gzip"), "packs its page with gzip, gzip"),
        (answer(b"", "Content-Encoding: deflate"), "packs its page with deflate"),
        (answer(b"", "Content-Encoding: zstd"), "packs its page with zstd"),
        (answer(b"", kind="application/pdf"), "sends application/pdf, not a page of text"),
        (answer(b"", kind="image/svg+xml"), "sends image/svg+xml"),
        (answer(b"", kind="application/octet-stream"), "sends application/octet-stream"),
        (answer(b"", kind="text/html+x"), "sends text/html+x"),
        (answer(b"", kind="a" * 500), "sends " + "a" * 40 + ","),
        (answer(b"", kind=""), "sends something, not a page of text"),
        (answer(b"", "Content-Length: 99999999"), "sends too large a page"),
        (answer(b"", status="404 Not Found"), "answers 404"),
        (answer(b"", status="500 Oh"), "answers 500"),
        (answer(b"", status="204 No Content"), "answers 204"),
        (answer(b"", status="206 Partial Content"), "answers 206"),
    ],
)
def test_refused_before_the_body(head: bytes, words: str) -> None:
    """Prevents time and memory for what nobody can read: the head says it, and the body never comes (test 35)."""
    begun = time.monotonic()
    assert words in refusal(says(head), seconds=10.0)
    assert time.monotonic() - begun < 2.0


@pytest.mark.parametrize(
    "bytes_",
    [
        b"",
        b"\r\n\r\n",
        b"\x00" * 5000,
        b"\xff\xfe<html>",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\nContent-Type: text/html\r\n\r\nxxxxx",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffffffff\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: \xff\xfe\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://\xc3\xa4.example:99999/\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://one.example:x/\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: " + b"%" * 500 + b"://\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: empty\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: \xff; charset=\xff\r\n\r\nx",
        b"<html><body>no head at all</body></html>",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_whatever_a_server_sends_is_one_line(bytes_: bytes) -> None:
    """Prevents an error of a library that ends the search instead of the page."""
    assert refusal(bytes_)


def test_noise_is_one_line() -> None:
    """Prevents the same where nobody thought of it: answers with bytes changed at random."""
    rng = random.Random(0)
    whole = answer(gzip.compress(b"<p>text</p>" * 20), "Content-Encoding: gzip", "Set-Cookie: a=b", "X: y")
    for _ in range(150):
        noisy = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        with FakeWeb(bytes(noisy)) as web:
            try:
                assert isinstance(read(web), Page)
            except ToolError as error:
                assert "\n" not in str(error)


# -------------------------------------------------------------------------------------------------- around it


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a proxy that sees every page, or that reaches where the client must not (test 38)."""
    with FakeWeb(page("of the proxy")) as proxy, FakeWeb(page("of the web"), answer(b"{}")) as web:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{proxy.port}")
        assert b"of the web" in read(web).content
        assert asyncio.run(ask(f"http://127.0.0.1:{web.port}/")) == {}
    assert proxy.heads == []


def test_a_name_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a look-up, which nothing can interrupt, from holding up the deadline, or the program's end."""
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(20) and [])
    begun = time.monotonic()
    with pytest.raises(ToolError, match=r"one\.example took more than 0\.3 s"):
        fetch.wait(read_page("http://one.example/", 0.3))
    with pytest.raises(ToolError, match=r"api\.example took more than 0\.3 s"):
        fetch.wait(ask("http://api.example/", seconds=0.3))
    assert time.monotonic() - begun < 1.6
    over.set()


def test_pages_are_read_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents three pages that take three times as long, and one dead page that takes the others with it (test 40)."""

    def late(connection: socket.socket) -> None:
        time.sleep(0.4)
        connection.sendall(page("late"))

    with FakeWeb(hosts={"dead.example": says(b""), "example": late}) as web:
        web.patch(monkeypatch)
        urls = ["http://a.example/", "http://dead.example/", "http://b.example/", "http://c.example/", "ftp://d/"]
        begun = time.monotonic()
        pages = asyncio.run(read_pages(urls, 1.0))
        took = time.monotonic() - begun
    assert [isinstance(each, Page) for each in pages] == [True, False, True, True, False]
    assert "dead.example took more than 1 s" in str(pages[1])
    assert took < 1.5


def test_from_code_that_runs_a_loop() -> None:
    """Prevents a tool that fails in a notebook, where a loop runs in the thread already."""

    async def cell() -> Any:
        return fetch.wait(asyncio.sleep(0, "done"))

    assert asyncio.run(cell()) == fetch.wait(asyncio.sleep(0, "done")) == "done"


# ---------------------------------------------------------------------------------------------------- APIs


def test_an_api_of_the_own_network(caplog: pytest.LogCaptureFixture) -> None:
    """Prevents a filter meant for strangers from shutting out the user's own server, and a key that is told."""
    caplog.set_level(logging.DEBUG)
    with FakeServer(lambda request: request.send(200, "application/json", b'{"a": [1]}')) as server:
        asked = ask(server.url, method="POST", headers={"X-Key": "geheim"}, body={"q": "moss"})
        assert fetch.wait(asked) == {"a": [1]}
    assert (server.asked, server.headers[0]["X-Key"]) == ([{"q": "moss"}], "geheim")
    assert server.headers[0]["Host"] == server.url.split("/")[2]
    with FakeServer(models=[{"id": "a"}]) as server:
        user = server.url.replace("http://", "http://me:geheim@")
        assert fetch.wait(ask(user, params={"q": "x y"})) == {"object": "list", "data": [{"id": "a"}]}
    assert server.headers[0]["Authorization"].startswith("Basic ")
    assert "geheim" not in caplog.text


def gives(status: int, content: bytes, kind: str = "application/json") -> Any:
    return lambda request: request.send(status, kind, content)


def hangs(request: Request) -> None:
    request.wait_until_left()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (gives(401, b'{"error": "geheim is no key"}'), "127.0.0.1 answers 401"),
        (gives(429, b"{}"), "127.0.0.1 answers 429"),
        (gives(500, b"<html>geheim"), "127.0.0.1 answers 500"),
        (gives(200, b"<html>geheim"), "127.0.0.1 sends something else than JSON"),
        (gives(200, b""), "something else than JSON"),
        (gives(200, b"\xff\xfe\xff"), "something else than JSON"),
        (gives(200, b"[" * 100_000), "something else than JSON"),
        (gives(200, b"1" * 10_000), "something else than JSON"),
        (gives(200, b" " * (MAX_WIRE + 1)), "sends too large a page"),
        (hangs, "127.0.0.1 took more than 0.5 s"),
        (lambda request: request.connection.close(), "127.0.0.1 cannot be asked: "),
    ],
)
def test_what_is_wrong_with_an_api_is_one_line(reply: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents a trace, or a key, in what the user reads: servers like to repeat what they were sent."""
    caplog.set_level(logging.DEBUG)
    with FakeServer(reply) as server, pytest.raises(ToolError) as caught:
        fetch.wait(ask(server.url, method="POST", headers={"X-Key": "geheim"}, body={"key": "geheim"}, seconds=0.5))
    assert words in str(caught.value)
    assert "geheim" not in str(caught.value) + caplog.text


@pytest.mark.parametrize(
    "url", ["", "searx", "/search", "http://", "http://[::1", "http://xn--/", "file:///x?key=geheim"]
)
def test_an_address_that_is_none(url: str) -> None:
    """Prevents a typing error in the settings that ends in a trace, or in an empty name."""
    with pytest.raises(ToolError) as caught:
        fetch.wait(ask(url, seconds=1.0))
    assert str(caught.value).startswith(("the address of the API that is set is none", "xn-- "))
    assert "geheim" not in str(caught.value)


def test_an_api_that_moved_is_not_followed() -> None:
    """Prevents a key that goes wherever a server points."""
    with FakeWeb(moved("http://127.0.0.1:1/"), answer(b"{}")) as web, pytest.raises(ToolError, match="answers 302"):
        fetch.wait(ask(f"http://127.0.0.1:{web.port}/", headers={"X-Key": "geheim"}))
    assert len(web.heads) == 1


# --------------------------------------------------------------------------------------------- the only client

CLIENTS = frozenset(
    """Client AsyncClient HTTPTransport AsyncHTTPTransport HTTPProxy AsyncHTTPProxy ConnectionPool AsyncConnectionPool
    PoolManager Session ClientSession HTTPConnection HTTPSConnection urlopen urlretrieve build_opener
    create_connection open_connection create_mcp_http_client connect_tcp FTP SMTP""".split()
)
MAY = {  # who makes a client, and of what
    "moss/tools/fetch.py": {"AsyncClient", "AsyncHTTPTransport"},
    "moss/engine/remote.py": {"AsyncClient"},
    "moss/serve/store/database.py": {"Session"},  # of SQLAlchemy: a transaction
    "moss/tools/mcp.py": {"create_mcp_http_client", "Client"},  # the library's own, to the servers in the settings
}
LOADERS = frozenset(
    """httpx httpcore httpcore2 requests urllib3 aiohttp pycurl ftplib smtplib urllib.request http.client""".split()
)


def clients(tree: ast.AST) -> Iterator[str]:
    """What a file calls that makes a client or opens a connection, and what it imports that can."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            module = getattr(getattr(node.func, "value", None), "id", "")
            if name in CLIENTS or (module == "httpx2" and name in ("get", "post", "put", "request", "stream")):
                yield name
            if (module, name) == ("socket", "socket") and not any(each.arg == "fileno" for each in node.keywords):
                yield "socket.socket"
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in names if name in LOADERS)


def test_there_is_one_client() -> None:
    """Prevents a forgotten call of another client, behind which none of the walls above stands (test 41)."""
    found = {}
    for file in sorted((ROOT / "moss").rglob("*.py")):
        if used := set(clients(ast.parse(file.read_text(encoding="utf-8")))):
            found[file.relative_to(ROOT).as_posix()] = used
    assert {name: used - MAY.get(name, set()) for name, used in found.items() if used - MAY.get(name, set())} == {}
    assert found["moss/tools/fetch.py"] == MAY["moss/tools/fetch.py"]  # or this test sees nothing
    for text in ("import requests", "httpx2.get(url)", "socket.socket()", "from urllib.request import urlopen"):
        assert list(clients(ast.parse(text))), text


def test_addresses_are_read_as_they_are_asked() -> None:
    """Prevents two readings of one address: one for the check, another for the connection."""
    for text in ("http://one.example/a#b", "https://one.example:443/", "http://one.example:80"):
        assert checked_url(text).raw_host == b"one.example"
    for text in ("http://one.example/a b", "http://one.example\t/", "http://one\u00a0.example/", "http://x" * 400):
        with pytest.raises(ToolError):
            checked_url(text)
