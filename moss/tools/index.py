"""The local search index: pages that are found by their words (tantivy, BM25), Chinese as pairs of characters.

    index = Index.open(folder, make=True)               # made where there is none
    index.update("notes", read_source(Path("notes")))   # what has not changed is left alone
    index.search("who dug the Grand Canal?", 3)         # [Found(title, url, text, score), …]

A page has a title, a text, and perhaps keywords to find it by that nobody reads: its name in another language, say. A
long text goes in as several pages of one title and url, of which a search gives the best.
`Index.of(entries)` is an index in memory.

`update` is incremental and survives kill -9: what was committed stays, and the same call goes on from there, for a
page is known by its content. One process writes at a time; any number may read, those too that may not write.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import tantivy

from moss.tools.textrank import is_chinese
from moss.tools.words import MAX_TERMS, passages, question_terms, terms

KEPT = ("url", "text", "keywords", "chinese", "file")  # of a page, beside its title
FIELDS = {"title_terms": 1.0, "keyword_terms": 1.2, "text_terms": 1.0}  # what is searched, and what a word there counts
SINGLE = 0.4  # what a character of the question counts that is a whole title
OTHER_LANGUAGE = 0.95  # what a page counts that is in another language than the question
CANDIDATES = (10, 50)  # pages looked at for each that is wanted; more where the first are parts of too few
COMMIT_EVERY = 2000  # pages; a kill loses at most as many
MEMORY = 64 << 20  # bytes that the writer fills before it writes
LOCK, META = ".tantivy-meta.lock", "meta.json"  # files of the library: one reads with the first locked for writing


@dataclass(frozen=True)
class Entry:
    """A page to be found. The first of its `keywords`, up to a semicolon, may be the title of a page about the same
    thing in the other language, which is then shown in its place to who asks in that."""

    title: str
    text: str
    url: str
    keywords: str = ""
    file: str = field(default="", compare=False)  # that it was read from

    def digest(self, source: str) -> str:
        """What tells this page of a source from every other, and from itself before a change."""
        whole = "\0".join((source, self.url, self.title, self.text, self.keywords))
        return hashlib.sha256(whole.encode("utf-8", "replace")).hexdigest()[:32]


class Found(NamedTuple):
    """A page that answers; a higher `score` answers better."""

    title: str
    url: str
    text: str
    keywords: str
    score: float


class Updated(NamedTuple):
    """What `update` did, in pages."""

    added: int
    kept: int
    removed: int


class Index:
    """Pages in a folder, or in memory."""

    def __init__(self, index: tantivy.Index, folder: Path | None = None, *, writable: bool = True) -> None:
        self._index, self._folder, self._writable = index, folder, writable
        self._name = str(folder or "the index in memory")

    @classmethod
    def open(cls, folder: Path, *, make: bool = False) -> Index:
        """The index in a folder; ValueError where there is none and none shall be made, or it cannot be read."""
        with _intact(str(folder)):
            there = folder.is_dir() and tantivy.Index.exists(str(folder))
        if not there:
            if not make:
                raise ValueError(f"{folder} holds no index; make one with: moss data index PATH --to {folder}")
            if (folder.exists() and not folder.is_dir()) or any(folder.glob("[!.]*")):
                raise ValueError(f"{folder} is not empty and holds no index; name another folder")
            folder.mkdir(parents=True, exist_ok=True)
        with _lockable(folder) as place, _intact(str(folder)):
            return cls(tantivy.Index(_schema(), path=str(place)), folder, writable=place == folder)

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

    def update(self, source: str, entries: Iterable[Entry], left_out: Collection[str] = ()) -> Updated:
        """Have the pages of `source` be `entries`: new ones are added, those that are gone removed. What was read from
        a file in `left_out`, which may grow while `entries` are read, stays.

        BlockingIOError while another process writes, PermissionError where one may only read. Whatever stops it,
        nothing is lost that was there before.
        """
        if not self._writable:
            raise PermissionError(f"{self._name} may be read, but not written to")
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
            for page in (replace(entry, text=text) for entry in entries for text in passages(entry.text)):
                digest = page.digest(source)
                if digest not in known and digest not in seen:
                    writer.add_document(_document(page, digest, source))
                    added += 1
                    if added % COMMIT_EVERY == 0:
                        writer.commit()
                seen.add(digest)
            gone = {digest for digest in known.keys() - seen if known[digest] not in left_out}
            for digest in gone:
                writer.delete_documents_by_term("digest", digest)
            writer.commit()
        finally:
            writer.wait_merging_threads()
            if self._folder is not None:  # the library writes it for this user alone; the others as umask has it
                (self._folder / META).chmod((self._folder / LOCK).stat().st_mode)
        self._index.reload()
        self.__dict__.pop("_searcher", None)
        return Updated(added, len(known) - len(gone), len(gone))

    def search(self, question: str, limit: int = 3, also: str = "") -> list[Found]:
        """The pages that share the weightiest words with the question, the best first; `also` holds more words to look
        for, such as names in another language."""
        asked = list(dict.fromkeys([*question_terms(question), *terms(also)]))[:MAX_TERMS]
        if not asked:
            return []
        with _intact(self._name):
            best = self._best(self._query(question, asked), limit, is_chinese(question))
        return [_found(page, score) for score, page in best]

    def _query(self, question: str, asked: list[str]) -> tantivy.Query:
        """Any of the terms in any of the fields."""
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
        return tantivy.Query.boolean_query(wanted)

    def _best(self, query: tantivy.Query, limit: int, chinese: bool) -> list[tuple[float, tantivy.Document]]:
        """The best pages with their scores, of several of one title and url the best; in the language asked in, if
        there is a choice."""
        best: dict[tuple[str, str], tuple[float, tantivy.Document]] = {}
        looked_at = 0
        for most in (each * limit for each in CANDIDATES):
            hits = self._searcher.search(query, most, count=False).hits
            for score, address in hits[looked_at:]:
                page = self._readable(self._searcher.doc(address), chinese)
                if bool(_stored(page, "chinese")) != chinese:
                    score *= OTHER_LANGUAGE
                key = (_stored(page, "title"), _stored(page, "url"))
                if key not in best or best[key][0] < score:
                    best[key] = (score, page)
            looked_at = len(hits)
            if len(best) >= limit or looked_at < most:
                break
        return sorted(best.values(), key=lambda each: -each[0])[:limit]

    def num_with(self, term: str) -> int:
        """In how many pages a term stands, at least."""
        with _intact(self._name):
            return max(self._searcher.doc_freq(name, term) for name in FIELDS)

    def _readable(self, page: tantivy.Document, chinese: bool) -> tantivy.Document:
        """The page, or the one about the same thing in the language that was asked in."""
        if bool(_stored(page, "chinese")) == chinese:
            return page
        twin = _stored(page, "keywords").split(";")[0].strip()
        if not twin:
            return page
        query = tantivy.Query.term_query(self._index.schema, "title", twin)
        twins = (self._searcher.doc(address) for _, address in self._searcher.search(query, 3).hits)
        return next((each for each in twins if bool(_stored(each, "chinese")) == chinese), page)

    @cached_property
    def _searcher(self) -> tantivy.Searcher:
        return self._index.searcher()

    def _known(self, source: str) -> dict[str, str]:
        """The digests of the pages of a source, each with its file."""
        self._index.reload()
        searcher = self._index.searcher()
        query = tantivy.Query.term_query(self._index.schema, "source", source)
        hits = searcher.search(query, max(1, searcher.num_docs)).hits
        pages = (searcher.doc(address) for _, address in hits)
        return {_stored(page, "digest"): _stored(page, "file") for page in pages}


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
        denied = isinstance(error, PermissionError) or "PermissionDenied" in why.replace(" d", "D")
        advice = "its files and folder need other permissions" if denied else "remove it and make it anew"
        raise ValueError(f"{name} cannot be read as an index ({why}); {advice}") from None


@contextlib.contextmanager
def _lockable(folder: Path) -> Iterator[Path]:
    """The folder, or where one may only read in it, another with links to its files: whoever reads takes a lock."""
    lock = folder / LOCK
    if os.access(lock if lock.exists() else folder, os.W_OK):
        yield folder
        return
    with tempfile.TemporaryDirectory() as links:
        for file in folder.resolve().iterdir():
            if not file.name.startswith("."):
                (Path(links) / file.name).symlink_to(file)
        yield Path(links)


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
    kept = {"url": entry.url, "text": entry.text, "keywords": entry.keywords, "file": entry.file}
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


def _found(page: tantivy.Document, score: float) -> Found:
    title, url, text, keywords = (_stored(page, name) for name in ("title", "url", "text", "keywords"))
    return Found(title, url, text, keywords, score)


def _stored(page: tantivy.Document, name: str) -> str:
    value = page.get_first(name)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _whole(text: str) -> str:
    """A text without halves of characters, which cannot be written down."""
    return text.encode("utf-8", "replace").decode("utf-8")
