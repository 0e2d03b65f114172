"""The local search index: pages that are found by their words (tantivy, BM25), Chinese as pairs of characters.

    index = Index.open(folder, make=True)               # made where there is none
    index.update("notes", read_source(Path("notes")))   # what has not changed is left alone
    index.search("who dug the Grand Canal?", 3)         # [Found(title, url, text, score, share), …]

A page has a title, a text, and perhaps keywords to find it by that nobody reads: its name in another language, say.
`Index.of(entries)` is an index in memory.

`update` is incremental and survives kill -9: what was committed stays, and the same call goes on from there, for a
page is known by its content. One process writes at a time; any number may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import tantivy

from moss.tools.textrank import is_chinese
from moss.tools.words import terms

KEPT = ("url", "text", "keywords", "chinese")  # of a page, beside its title
FIELDS = {"title_terms": 1.0, "keyword_terms": 1.2, "text_terms": 1.0}  # what is searched, and what a word there counts
SINGLE = 0.4  # what a character of the question counts that is a whole title
OTHER_LANGUAGE = 0.95  # what a page counts that is in another language than the question
CANDIDATES = 10  # pages looked at for each that is wanted
COMMIT_EVERY = 2000  # pages; a kill loses at most as many
MEMORY = 64 << 20  # bytes that the writer fills before it writes
MAX_TERMS = 64  # of a question
READ = 20_000  # characters of a page in which the question's words are counted


@dataclass(frozen=True)
class Entry:
    """A page to be found. The first of its `keywords`, up to a semicolon, may be the title of a page about the same
    thing in the other language, which is then shown in its place to who asks in that."""

    title: str
    text: str
    url: str
    keywords: str = ""

    def digest(self, source: str) -> str:
        """What tells this page of a source from every other, and from itself before a change."""
        whole = "\0".join((source, self.url, self.title, self.text, self.keywords))
        return hashlib.sha256(whole.encode("utf-8", "replace")).hexdigest()[:32]


class Found(NamedTuple):
    """A page that answers; a higher `score` answers better. `share` of the question's words stand in it."""

    title: str
    url: str
    text: str
    score: float
    share: float


class Updated(NamedTuple):
    """What `update` did, in pages."""

    added: int
    kept: int
    removed: int


class Index:
    """Pages in a folder, or in memory."""

    def __init__(self, index: tantivy.Index, name: str = "the index in memory") -> None:
        self._index, self._name = index, name

    @classmethod
    def open(cls, folder: Path, *, make: bool = False) -> Index:
        """The index in a folder; ValueError where there is none and none shall be made, or it cannot be read."""
        if not (folder.is_dir() and tantivy.Index.exists(str(folder))):
            if not make:
                raise ValueError(f"{folder} holds no index; make one with: moss data index PATH --to {folder}")
            if (folder.exists() and not folder.is_dir()) or any(folder.glob("[!.]*")):
                raise ValueError(f"{folder} is not empty and holds no index; name another folder")
            folder.mkdir(parents=True, exist_ok=True)
        with _intact(str(folder)):
            return cls(tantivy.Index(_schema(), path=str(folder)), str(folder))

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Index:
        """An index in memory."""
        index = cls(tantivy.Index(_schema()))
        index.update("", entries)
        return index

    @property
    def num_pages(self) -> int:
        """How many pages there are."""
        return self._searcher.num_docs

    def update(self, source: str, entries: Iterable[Entry]) -> Updated:
        """Have the pages of `source` be `entries`: new ones are added, those that are gone removed.

        BlockingIOError while another process writes. Whatever stops it, nothing is lost that was there before.
        """
        with _intact(self._name):
            try:
                writer = self._index.writer(heap_size=MEMORY, num_threads=1)
            except ValueError as error:
                if "LockBusy" not in str(error):
                    raise
                raise BlockingIOError(f"another process writes to {self._name}; wait for its end") from None
            known = self._known(source)
        seen: set[str] = set()
        added = 0
        try:
            for entry in entries:
                digest = entry.digest(source)
                if digest not in known and digest not in seen:
                    writer.add_document(_document(entry, digest, source))
                    added += 1
                    if added % COMMIT_EVERY == 0:
                        writer.commit()
                seen.add(digest)
            for digest in known - seen:
                writer.delete_documents_by_term("digest", digest)
            writer.commit()
        finally:
            writer.wait_merging_threads()
        self._index.reload()
        self.__dict__.pop("_searcher", None)
        return Updated(added, len(known & seen), len(known - seen))

    def search(self, question: str, limit: int = 3, also: str = "") -> list[Found]:
        """The pages that share the weightiest words with the question, the best first; `also` holds more words to look
        for, such as names in another language."""
        own = list(dict.fromkeys(terms(question) or terms(question, stop=False)))[:MAX_TERMS]
        asked = list(dict.fromkeys([*own, *terms(also)]))[:MAX_TERMS]
        if not asked:
            return []
        wanted = [
            (
                tantivy.Occur.Should,
                tantivy.Query.boost_query(tantivy.Query.term_query(self._index.schema, name, term), weight),
            )
            for name, weight in FIELDS.items()
            for term in asked
        ]
        # a title of one character is in no pair, and the character in the question perhaps no word
        for name in dict.fromkeys(re.findall("[\u3400-\u9fff]", question[:MAX_TERMS])):
            title = tantivy.Query.term_query(self._index.schema, "title", name)
            wanted.append((tantivy.Occur.Should, tantivy.Query.boost_query(title, SINGLE)))
        chinese = is_chinese(question)
        best: dict[tuple[str, str], tuple[float, tantivy.Document]] = {}
        with _intact(self._name):
            query = tantivy.Query.boolean_query(wanted)
            for score, address in self._searcher.search(query, limit * CANDIDATES, count=False).hits:
                page = self._readable(self._searcher.doc(address), chinese)
                if bool(_stored(page, "chinese")) != chinese:
                    score *= OTHER_LANGUAGE
                key = (_stored(page, "title"), _stored(page, "url"))
                if key not in best or best[key][0] < score:
                    best[key] = (score, page)
        chosen = sorted(best.values(), key=lambda each: -each[0])[:limit]
        return [_found(page, score, asked, len(own)) for score, page in chosen]

    def _readable(self, page: tantivy.Document, chinese: bool) -> tantivy.Document:
        """The page, or the one about the same thing in the language that was asked in."""
        twin = _stored(page, "keywords").split(";")[0].strip()
        if bool(_stored(page, "chinese")) == chinese or not twin:
            return page
        query = tantivy.Query.term_query(self._index.schema, "title", twin)
        twins = (self._searcher.doc(address) for _, address in self._searcher.search(query, 3).hits)
        return next((each for each in twins if bool(_stored(each, "chinese")) == chinese), page)

    @cached_property
    def _searcher(self) -> tantivy.Searcher:
        return self._index.searcher()

    def _known(self, source: str) -> set[str]:
        """The digests of the pages of a source."""
        self._index.reload()
        searcher = self._index.searcher()
        query = tantivy.Query.term_query(self._index.schema, "source", source)
        hits = searcher.search(query, max(1, searcher.num_docs)).hits
        return {str(searcher.doc(address).get_first("digest")) for _, address in hits}


@contextlib.contextmanager
def _intact(name: str) -> Iterator[None]:
    """Turn what the library says of a folder that is damaged, or none of ours, into ValueError."""
    try:
        yield
    except BlockingIOError:
        raise
    except BaseException as error:
        if not isinstance(error, ValueError | OSError) and type(error).__name__ != "PanicException":
            raise
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} cannot be read as an index ({why}); remove it and make it anew") from None


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for name in KEPT:
        builder.add_bytes_field(name, stored=True)
    for name in ("title", "digest", "source"):
        builder.add_text_field(name, stored=True, tokenizer_name="raw", index_option="basic")
    for name in FIELDS:
        builder.add_text_field(name, stored=False, tokenizer_name="whitespace", index_option="freq")
    return builder.build()


def _document(entry: Entry, digest: str, source: str) -> tantivy.Document:
    words = {"title_terms": entry.title, "keyword_terms": entry.keywords, "text_terms": entry.text}
    kept = {"url": entry.url, "text": entry.text, "keywords": entry.keywords}
    kept["chinese"] = "yes" if is_chinese(entry.text) else ""
    page: dict[str, list[str | bytes]] = {
        "title": [_whole(entry.title)],
        "digest": [digest],
        "source": [_whole(source)],
    }
    page |= {name: [" ".join(terms(_whole(text)))] for name, text in words.items()}
    if page["title_terms"] == [""]:  # The Who, It
        page["title_terms"] = [" ".join(terms(_whole(entry.title), stop=False))]
    return tantivy.Document(**page, **{name: [text.encode("utf-8", "replace")] for name, text in kept.items()})


def _found(page: tantivy.Document, score: float, asked: list[str], wanted: int) -> Found:
    """A page as it is given; `asked` may hold more words than the `wanted` ones of the question itself."""
    title, url, text, keywords = (_stored(page, name) for name in ("title", "url", "text", "keywords"))
    held = set(terms(f"{title} {keywords} {text[:READ]}", stop=False)).intersection(asked)
    return Found(title, url, text, score, min(1.0, len(held) / wanted))


def _stored(page: tantivy.Document, name: str) -> str:
    value = page.get_first(name)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _whole(text: str) -> str:
    """A text without halves of characters, which cannot be written down."""
    return text.encode("utf-8", "replace").decode("utf-8")
