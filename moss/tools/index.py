"""The local search index: pages that are found by their words (tantivy, BM25), Chinese as pairs of characters.

    with Index.open(folder) as index:                   # made where there is none
        index.update("notes", read_source(Path("notes")))   # what has not changed is left alone
        index.search("who dug the Grand Canal?", 3)     # [Found(title, url, text, score), …]

A page has a title, a text, and perhaps keywords to find it by that nobody reads: its name in another language, say.
`Index.of(entries)` is an index in memory.

`update` is incremental and survives kill -9: what was committed stays, and the same call goes on from there, for a
page is known by its content. One process writes at a time; any number may read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import tantivy

from moss.tools.textrank import is_chinese
from moss.tools.words import terms

FIELDS = {"title_terms": 1.0, "keyword_terms": 1.2, "text_terms": 1.0}  # what is searched, and what a word there counts
OTHER_LANGUAGE = 0.95  # what a page counts that is in another language than the question
CANDIDATES = 10  # pages looked at for each that is wanted
COMMIT_EVERY = 2000  # pages; a kill loses at most as many
MEMORY = 64 << 20  # bytes that the writer fills before it writes
MAX_TERMS = 64  # of a question


@dataclass(frozen=True)
class Entry:
    """A page to be found."""

    title: str
    text: str
    url: str
    keywords: str = ""

    @property
    def digest(self) -> str:
        """What tells this page from every other, and from itself before a change."""
        whole = "\0".join((self.url, self.title, self.text, self.keywords))
        return hashlib.sha256(whole.encode("utf-8", "replace")).hexdigest()[:32]


class Found(NamedTuple):
    """A page that answers; a higher `score` answers better."""

    title: str
    url: str
    text: str
    score: float


class Updated(NamedTuple):
    """What `update` did, in pages."""

    added: int
    kept: int
    removed: int


class Index:
    """Pages in a folder, or in memory."""

    def __init__(self, index: tantivy.Index) -> None:
        self._index = index

    @classmethod
    def open(cls, folder: Path, *, make: bool = False) -> Index:
        """The index in a folder; ValueError where there is none and none shall be made, or it is none of ours."""
        if not tantivy.Index.exists(str(folder)) if folder.is_dir() else True:
            if not make:
                raise ValueError(f"{folder} holds no index; make one with: moss data index PATH --to {folder}")
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"{folder} is not empty and holds no index; name another folder")
            folder.mkdir(parents=True, exist_ok=True)
        try:
            return cls(tantivy.Index(_schema(), path=str(folder)))
        except (ValueError, OSError) as error:
            raise ValueError(f"{folder} cannot be opened as an index: {error}") from None

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
        known = self._known(source)
        seen: set[str] = set()
        added = 0
        try:
            writer = self._index.writer(heap_size=MEMORY, num_threads=1)
        except ValueError as error:
            raise BlockingIOError(f"another process writes to this index ({error}); wait for its end") from None
        try:
            for entry in entries:
                digest = entry.digest
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

    def search(self, question: str, limit: int = 3) -> list[Found]:
        """The pages that share the weightiest words with the question, the best first."""
        asked = list(dict.fromkeys(terms(question) or terms(question, stop=False)))[:MAX_TERMS]
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
        for name in set(re.findall("[\u3400-\u9fff]", question[:MAX_TERMS])):  # a title of one character is in no pair
            wanted.append((tantivy.Occur.Should, tantivy.Query.term_query(self._index.schema, "title", name)))
        best: dict[str, Found] = {}
        for score, address in self._searcher.search(tantivy.Query.boolean_query(wanted), limit * CANDIDATES).hits:
            page = self._readable(self._searcher.doc(address), is_chinese(question))
            title, url, text = (str(page.get_first(name)) for name in ("title", "url", "text"))
            if is_chinese(text) != is_chinese(question):
                score *= OTHER_LANGUAGE
            if title not in best or best[title].score < score:
                best[title] = Found(title, url, text, score)
        return sorted(best.values(), key=lambda each: -each.score)[:limit]

    def _readable(self, page: tantivy.Document, chinese: bool) -> tantivy.Document:
        """The page, or the one about the same thing in the language that was asked in."""
        if is_chinese(str(page.get_first("text"))) == chinese or not page.get_first("twin"):
            return page
        query = tantivy.Query.term_query(self._index.schema, "title", page.get_first("twin"))
        twins = self._searcher.search(query, 1).hits
        return self._searcher.doc(twins[0][1]) if twins else page

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


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for name in ("title", "url", "text", "twin", "digest", "source"):
        builder.add_text_field(name, stored=True, tokenizer_name="raw", index_option="basic")
    for name in FIELDS:
        builder.add_text_field(name, stored=False, tokenizer_name="whitespace", index_option="freq")
    return builder.build()


def _document(entry: Entry, digest: str, source: str) -> tantivy.Document:
    words = {"title_terms": entry.title, "keyword_terms": entry.keywords, "text_terms": entry.text}
    page = {"title": entry.title, "url": entry.url, "text": entry.text, "digest": digest, "source": source}
    page["twin"] = entry.keywords.split(";")[0].strip()
    indexed = {name: " ".join(terms(text)) for name, text in words.items()}
    return tantivy.Document(**{name: [value] for name, value in (page | indexed).items()})
