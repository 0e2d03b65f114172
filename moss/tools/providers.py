"""Search engines on the network, one row of a table each: how it is asked, and where its answer holds the pages.

    hits = await ask("brave", "deep sea fish")          # [Hit(title, url, text), …]

The key of a provider stands in the environment (`BRAVE_API_KEY`), the address of a SearXNG of one's own in
`SEARXNG_URL`; `SERPER_URL` and so on name another address that speaks the same language. Keys go to the provider and
nowhere else. Written from the providers' documentation, and tested against a local server only.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moss.tools import fetch
from moss.tools.base import ToolError

SECONDS = 4.0  # for the list of pages; reading them has its own time
WANTED = 10  # pages asked for; most providers count the answer, not its length


class Hit(NamedTuple):
    """A page that a provider names, with what it says about it."""

    title: str
    url: str
    text: str


@dataclass(frozen=True)
class Provider:
    """How a provider is asked. `query`, `count` and `language` name its parameters ("" = it has none)."""

    url: str  # "" = the user's own, from the environment
    path: tuple[str, ...]  # to the list of pages in its answer
    fields: tuple[str, str, str]  # of title, address and text in a page
    query: str = "q"
    count: str = ""
    language: str = ""
    languages: Mapping[str, str] = field(default_factory=lambda: {"en": "en", "zh": "zh"})
    post: bool = False
    key_header: str = ""  # the header that carries the key, "" = no key
    key_prefix: str = ""
    refused: str = "is its key right?"  # what to look at where it answers 401 or 403
    extra: Mapping[str, str] = field(default_factory=dict)


PROVIDERS = {
    "searxng": Provider(
        url="",
        path=("results",),
        fields=("title", "url", "content"),
        language="language",
        refused="is json among the search.formats of its settings.yml?",
        extra={"format": "json"},
    ),
    "serper": Provider(
        url="https://google.serper.dev/search",
        path=("organic",),
        fields=("title", "link", "snippet"),
        count="num",
        language="hl",
        languages={"en": "en", "zh": "zh-cn"},
        post=True,
        key_header="X-API-KEY",
    ),
    "brave": Provider(
        url="https://api.search.brave.com/res/v1/web/search",
        path=("web", "results"),
        fields=("title", "url", "description"),
        count="count",
        language="search_lang",
        languages={"en": "en", "zh": "zh-hans"},
        key_header="X-Subscription-Token",
        extra={"text_decorations": "false"},
    ),
    "tavily": Provider(
        url="https://api.tavily.com/search",
        path=("results",),
        fields=("title", "url", "content"),
        query="query",
        count="max_results",
        post=True,
        key_header="Authorization",
        key_prefix="Bearer ",
    ),
}


async def ask(name: str, query: str, language: str = "en", seconds: float = SECONDS) -> list[Hit]:
    """The pages that a provider names, in its order; `ToolError` where it is not set up or gives no answer."""
    provider = PROVIDERS[name]
    address, headers = _address(name, provider), {}
    if provider.key_header:
        headers[provider.key_header] = provider.key_prefix + _setting(f"{name.upper()}_API_KEY", name)
    asked: dict[str, Any] = {provider.query: query, **provider.extra}
    if provider.count:
        asked[provider.count] = WANTED
    if provider.language:
        asked[provider.language] = provider.languages[language]
    if provider.post:
        request = fetch.ask(address, method="POST", headers=headers, body=asked, seconds=seconds)
    else:
        texts = {key: str(value) for key, value in asked.items()}
        request = fetch.ask(address, headers=headers, params=texts, seconds=seconds)
    try:
        return _hits(await request, provider, name)
    except ToolError as error:
        refused = str(error).endswith((" 401", " 403"))
        raise ToolError(f"{error}; {provider.refused}" if refused else str(error)) from None


def _address(name: str, provider: Provider) -> str:
    """Where the provider is; a SearXNG is given by its start page."""
    own = f"{name.upper()}_URL"
    if provider.url:
        return os.environ.get(own, "").strip() or provider.url
    return _setting(own, name).rstrip("/").removesuffix("/search") + "/search"


def _setting(variable: str, name: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ToolError(f"{variable} is not set; {name} needs it")
    if not (value.isascii() and value.isprintable()):
        raise ToolError(f"{variable} holds characters that it cannot have; copy it anew")
    return value


def _hits(answer: Any, provider: Provider, name: str) -> list[Hit]:
    """What an answer holds; a page without an address is left out, any other form refused."""
    for step in provider.path:
        if not isinstance(answer, dict):
            raise ToolError(f"{name} answers in a form that is not known here")
        answer = answer.get(step)
        if answer is None:  # Brave leaves out `web` where nothing was found
            return []
    if not isinstance(answer, list):
        raise ToolError(f"{name} answers in a form that is not known here")
    found = []
    for page in answer:
        texts = [page.get(each) for each in provider.fields] if isinstance(page, dict) else []
        if len(texts) == 3 and isinstance(texts[1], str) and texts[1]:
            title, url, text = (each if isinstance(each, str) else "" for each in texts)
            found.append(Hit(_plain(title), url, _plain(text)))
    return found


def _plain(text: str) -> str:
    """A text without what some providers mark the words of the question with."""
    return html.unescape(re.sub(r"</?(?:strong|em|b)>", "", text))
