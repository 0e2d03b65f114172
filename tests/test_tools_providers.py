"""Search providers: asked as their documentation says, and one line for whatever comes back instead of pages."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from typing import Any
from urllib.parse import parse_qsl

import pytest

from moss.tools import fetch, providers
from moss.tools.base import Source, ToolError
from moss.tools.providers import PROVIDERS, Hit
from moss.tools.search import search
from tests.fake_web import FakeWeb, answer, told

KEYED = ("serper", "brave", "tavily")

# What each answers, as documented, with what is not needed here around it.
ANSWERS: dict[str, Any] = {
    "searxng": {
        "query": "moss",
        "number_of_results": 0,
        "results": [
            {"url": "http://a.example/", "title": "Moss", "content": "A small plant.", "engine": "x", "score": 1.0},
            {"url": "http://b.example/", "title": "苔藓", "content": None, "publishedDate": None},
        ],
        "answers": [],
        "infoboxes": [],
        "unresponsive_engines": [["bing", "timeout"]],
    },
    "serper": {
        "searchParameters": {"q": "moss", "type": "search", "engine": "google"},
        "knowledgeGraph": {"title": "Moss"},
        "organic": [
            {"title": "Moss", "link": "http://a.example/", "snippet": "A small plant.", "position": 1},
            {"title": "苔藓", "link": "http://b.example/", "position": 2, "sitelinks": []},
        ],
        "peopleAlsoAsk": [],
        "credits": 1,
    },
    "brave": {
        "type": "search",
        "query": {"original": "moss", "more_results_available": True},
        "web": {
            "type": "search",
            "results": [
                {
                    "title": "Moss",
                    "url": "http://a.example/",
                    "description": "A <strong>small</strong> plant.",
                    "age": "",
                },
                {"title": "苔藓", "url": "http://b.example/", "description": ""},
            ],
            "family_friendly": True,
        },
    },
    "tavily": {
        "query": "moss",
        "answer": None,
        "images": [],
        "results": [
            {
                "title": "Moss",
                "url": "http://a.example/",
                "content": "A small plant.",
                "score": 0.9,
                "raw_content": None,
            },
            {"title": "苔藓", "url": "http://b.example/", "content": ""},
        ],
        "response_time": 1.1,
    },
}

# The request: method, path, parameters or body in English, and what differs in Chinese.
REQUESTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "searxng": ("GET", "/search", {"q": "a&b=c 1+1", "format": "json", "language": "en"}, {"language": "zh"}),
    "serper": ("POST", "/search", {"q": "a&b=c 1+1", "num": 10, "hl": "en"}, {"hl": "zh-cn"}),
    "brave": (
        "GET",
        "/res/v1/web/search",
        {"q": "a&b=c 1+1", "count": "10", "search_lang": "en", "text_decorations": "false"},
        {"search_lang": "zh-hans"},
    ),
    "tavily": ("POST", "/search", {"query": "a&b=c 1+1", "max_results": 10}, {}),
}
KEY_HEADERS = {
    "serper": "X-API-KEY: geheim",
    "brave": "X-Subscription-Token: geheim",
    "tavily": "Authorization: Bearer geheim",
}


def ask(name: str, query: str = "moss", language: str = "en", seconds: float = 5.0) -> list[Hit]:
    return fetch.wait(providers.ask(name, query, language, seconds))


def point(monkeypatch: pytest.MonkeyPatch, name: str, web: FakeWeb) -> None:
    """Have a provider be this server, with a key."""
    path = "" if name == "searxng" else REQUESTS[name][1]
    monkeypatch.setenv(f"{name.upper()}_URL", f"http://127.0.0.1:{web.port}{path}")
    monkeypatch.setenv(f"{name.upper()}_API_KEY", "geheim")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key and no address of whoever runs the tests."""
    for name in PROVIDERS:
        monkeypatch.delenv(f"{name.upper()}_API_KEY", raising=False)
        monkeypatch.delenv(f"{name.upper()}_URL", raising=False)
    monkeypatch.delenv("MOSS_SEARCH", raising=False)
    monkeypatch.setattr("moss.tools.search.INDEX", "/nowhere/index")


@pytest.mark.parametrize("name", PROVIDERS)
def test_asked_as_documented(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a parameter, a header or a field by a name that the provider does not know: it would answer nothing, or
    bill for it."""
    method, path, english, chinese = REQUESTS[name]
    with FakeWeb(told(ANSWERS[name])) as web:
        point(monkeypatch, name, web)
        hits = ask(name, "a&b=c 1+1")
        ask(name, "苔藓", "zh")
    assert hits == [Hit("Moss", "http://a.example/", "A small plant."), Hit("苔藓", "http://b.example/", "")]
    for head, body, expected in zip(web.heads, web.bodies, (english, english | chinese)):
        expected = expected | ({} if expected is english else {next(iter(english)): "苔藓"})
        line, _, headers = head.partition("\r\n")
        asked, where, _ = line.split(" ")
        if method == "GET":
            found = dict(parse_qsl(where.partition("?")[2], strict_parsing=True, encoding="utf-8"))
            assert body == ""
        else:
            found = json.loads(body.encode("latin-1"))
            assert "?" not in where and "\r\nContent-Type: application/json\r\n" in headers
        assert (asked, where.partition("?")[0], found) == (method, path, expected)
        if name in KEYED:
            assert KEY_HEADERS[name] in headers.split("\r\n")
        else:
            assert "geheim" not in head
        assert "geheim" not in where + body


def test_the_documented_addresses() -> None:
    """Prevents a key that goes to another host than the provider's own, or over http."""
    assert {name: each.url for name, each in PROVIDERS.items()} == {
        "searxng": "",
        "serper": "https://google.serper.dev/search",
        "brave": "https://api.search.brave.com/res/v1/web/search",
        "tavily": "https://api.tavily.com/search",
    }


@pytest.mark.parametrize("given", ["", "/", "/search", "/search/"])
def test_the_start_page_of_a_searxng(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents /search/search, where somebody gave the address that the browser shows."""
    with FakeWeb(told(ANSWERS["searxng"])) as web:
        monkeypatch.setenv("SEARXNG_URL", f" http://127.0.0.1:{web.port}/searx{given} ")
        assert len(ask("searxng")) == 2
    assert web.heads[0].startswith("GET /searx/search?")


@pytest.mark.parametrize("name", PROVIDERS)
def test_what_is_not_set_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a request without a key, and an error that does not say which variable is meant."""
    variable = f"{name.upper()}_API_KEY" if name in KEYED else "SEARXNG_URL"
    for value in ("", "  "):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ToolError, match=f"{variable} is not set; {name} needs it"):
            ask(name)
    for value in ("gehe\nim", "geheim\u200b", "gehéim"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ToolError, match=f"{variable} holds characters that it cannot have") as caught:
            ask(name)
        assert "gehe" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (told({"message": "geheim"}, "401 Unauthorized"), "127.0.0.1 answers 401; is"),
        (told({}, "403 Forbidden"), "127.0.0.1 answers 403; is"),
        (told({"detail": "geheim"}, "429 Too Many Requests"), "127.0.0.1 answers 429"),
        (told({}, "500 Internal Server Error"), "127.0.0.1 answers 500"),
        (answer(b"<html>geheim</html>"), "127.0.0.1 sends something else than JSON"),
        (answer(b'{"results": ['), "127.0.0.1 sends something else than JSON"),
        (told([]), "answers in a form that is not known here"),
        (told("geheim"), "answers in a form that is not known here"),
        (told(None), "answers in a form that is not known here"),
        (
            told({"results": "geheim", "organic": {"a": 1}, "web": ["geheim"]}),
            "answers in a form that is not known here",
        ),
        (told({"results": 5, "organic": 5, "web": {"results": 5}}), "answers in a form that is not known here"),
        (lambda connection: connection.recv(1), "127.0.0.1 took more than 0.5 s"),
        (lambda connection: None, "127.0.0.1 cannot be asked: RemoteProtocolError"),
    ],
    ids="401 403 429 500 html cut list text null inside number mute gone".split(),
)
@pytest.mark.parametrize("name", PROVIDERS)
def test_other_answers_are_one_line(
    name: str, reply: Any, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents a trace, or the key, in what is told, printed or logged (test 39 of the security list): servers repeat
    what they are sent."""
    caplog.set_level(logging.DEBUG)
    with FakeWeb(reply) as web:
        point(monkeypatch, name, web)
        with pytest.raises(ToolError) as caught:
            ask(name, seconds=0.5)
        assert words in str(caught.value)
        assert len(web.heads) == 1  # it is not tried again: that may be billed
    assert "\n" not in str(caught.value)
    assert "geheim" not in str(caught.value) + repr(caught.value.__cause__) + caplog.text


@pytest.mark.parametrize("name", PROVIDERS)
def test_pages_that_are_none_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents one odd entry from losing the others, and nothing found from being a failure."""
    where = PROVIDERS[name].path
    title, url, text = PROVIDERS[name].fields

    def inside(value: Any) -> Any:
        for step in reversed(where):
            value = {step: value}
        return value

    good = {title: "A &amp; <b>B</b>", url: "http://a.example/", text: 5, "more": {}}
    odd = [None, 3, "x", [], {}, {title: "no address"}, {url: 7}, {url: ""}, {url: None}, good]
    with FakeWeb(told(inside(odd)), told(inside([])), told(inside(None)), told({})) as web:
        point(monkeypatch, name, web)
        assert ask(name) == [Hit("A & B", "http://a.example/", "")]
        assert ask(name) == ask(name) == ask(name) == []


def test_the_next_place_answers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents a search that ends where the first provider is down, in another order than the settings name, or that
    asks on when it has an answer."""
    caplog.set_level(logging.DEBUG)
    good = {"organic": [{"title": "T", "link": "http://good.example/", "snippet": "Moss is a small plant."}]}
    replies = {
        "brave": told({}, "500 Oh"),
        "searxng": told({"results": []}),
        "serper": told(good),
        "tavily": told(ANSWERS["tavily"]),
    }
    with contextlib.ExitStack() as all_of_them:
        all_of_them.enter_context(FakeWeb(answer(b"", status="404 Not Found"))).patch(monkeypatch)
        webs = {name: all_of_them.enter_context(FakeWeb(reply)) for name, reply in replies.items()}
        for name, web in webs.items():
            point(monkeypatch, name, web)
        monkeypatch.setenv("MOSS_SEARCH", " brave, searxng ,serper,tavily")
        assert search("moss") == [Source("T", "http://good.example/", "Moss is a small plant.")]
        assert [len(web.heads) for web in webs.values()] == [1, 1, 1, 0]
        monkeypatch.setenv("MOSS_SEARCH", "brave,encyclopedia")
        assert search("Mount Everest")[0].url.startswith("encyclopedia/")
        monkeypatch.setenv("MOSS_SEARCH", "brave,searxng")
        with pytest.raises(ToolError) as caught:
            search("moss")
        assert str(caught.value) == "brave: 127.0.0.1 answers 500"
        monkeypatch.delenv("BRAVE_API_KEY")
        with pytest.raises(ToolError, match="brave: BRAVE_API_KEY is not set; brave needs it"):
            search("moss")
    assert "geheim" not in caplog.text


@pytest.mark.parametrize("value", ["google", "brave;tavily", "encyclopedia,bing"])
def test_a_place_that_there_is_not(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a misspelt provider that is passed over in silence."""
    monkeypatch.setenv("MOSS_SEARCH", value)
    with pytest.raises(
        ToolError, match=r"MOSS_SEARCH names '.*'; there are index, encyclopedia, searxng, serper, brave"
    ):
        search("moss")


def test_nobody_is_asked_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a question of the user's from leaving the machine because a key happens to be in the environment."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    for name in KEYED:
        monkeypatch.setenv(f"{name.upper()}_API_KEY", "geheim")
    for value in ("", "encyclopedia", "index,encyclopedia"):
        monkeypatch.setenv("MOSS_SEARCH", value)
        assert search("Mount Everest")
