"""The local index: what is found, what a second run changes, and what survives a kill, a neighbour and a bad disk."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tantivy

from moss.tools import index as module
from moss.tools.index import Entry, Index, Updated

ROOT = Path(__file__).parents[1]


def page(title: str, text: str = "", keywords: str = "") -> Entry:
    return Entry(title, text or f"The text of {title}.", f"file://{title}", keywords)


def titles(index: Index, question: str, limit: int = 3) -> list[str]:
    return [found.title for found in index.search(question, limit)]


# ----------------------------------------------------------------------------------------------------- what is found

PAGES = [
    page("Heart", "The heart pumps blood. It has four chambers.", "心脏; 心跳 血液"),
    page("心脏", "心脏把血液输送到全身，它有四个腔。", "Heart; pulse"),
    page("长城", "长城是中国古代的军事工程，明代修得最多。"),
    page("城市", "城市很大，路也很长。"),
    page("Great Wall", "A wall of stone in the north of China."),
    page("Studies", "She studied for many years."),
    page("水", "水是生命之源。"),
]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How many chambers does the heart have?", "Heart"),
        ("心脏有几个腔？", "心脏"),
        ("Which organ pumps blood?", "Heart"),
        ("pulse", "Heart"),  # a keyword of the Chinese page, asked in English
        ("心跳", "心脏"),  # and the other way
        ("长城", "长城"),
        ("万里长城是谁修的？", "长城"),
        ("studying", "Studies"),
        ("GREAT wall", "Great Wall"),
        ("水", "水"),
        ("什么是水？", "水"),
        ("ＨＥＡＲＴ", "Heart"),
    ],
)
def test_found(question: str, expected: str) -> None:
    """Prevents pages that are not found by another form of a word, by two characters, or from the other language."""
    assert titles(Index.of(PAGES), question)[0] == expected


def test_two_characters_are_a_word() -> None:
    """Prevents a page that holds both characters, but not the word, from passing for one that does."""
    index = Index.of(PAGES)
    assert titles(index, "长城") == ["长城"]
    assert titles(index, "城长") == []
    assert titles(index, "地铁") == titles(index, "unheard") == titles(index, "!?") == titles(index, "") == []


def test_a_title_of_one_character() -> None:
    """Prevents a page about gold from standing behind all that mention it: its title is in no pair of characters."""
    index = Index.of([page("金", "一种金属。"), page("银", "不是金，是另一种金属。"), page("金属", "金属有很多种。")])
    assert titles(index, "什么是金？")[0] == "金"
    assert titles(index, "金的颜色")[0] == "金"


def test_small_words_alone_are_asked_for() -> None:
    """Prevents a question that finds nothing because all of its words are in every question."""
    index = Index.of(
        [page("The Who", "A band of London."), page("是什么", "一首歌。"), page("Other", "Something else.")]
    )
    assert titles(index, "who are the who") == ["The Who"]
    assert titles(index, "是什么") == ["是什么"]


def test_a_page_is_found_once() -> None:
    """Prevents the same page twice in three, as itself and in the place of its twin; and two pages of one title, as in
    every folder that has a README, from passing for one."""
    index = Index.of(PAGES)
    assert titles(index, "heart blood chambers pulse") == ["Heart"]
    readme = [Entry("README", f"How to bake {what}.", f"{what}/README.md") for what in ("bread", "cake", "pies")]
    assert {found.url for found in Index.of(readme).search("how to bake", 3)} == {each.url for each in readme}


MANUAL = "\n".join(f"Part {n} of the machine is greased once a week with oil of kind {n}." for n in range(2000))


def test_the_end_of_a_long_page_is_found(tmp_path: Path) -> None:
    """Prevents a long page that is known by its first words alone, its passages from filling all the places, and a
    second run that reads it all anew."""
    manual = page("Manual", MANUAL + "\nThe coolant is replaced every 14 months.\n" + MANUAL.replace("week", "year"))
    index = Index.open(tmp_path / "index", make=True)
    done = index.update("s", [manual, page("note", "The machine and its oil are in the cellar. " * 30)])
    assert done.added == index.num_pages > 100
    (first,) = index.search("How often must the coolant be replaced?")
    assert first.title == "Manual" and "every 14 months" in first.text and len(first.text) <= 2000
    assert index.search("part 1234")[0].text.count("Part 1234 ") == 1
    assert titles(index, "greased oil of the machine") == ["Manual", "note"]
    changed = page("Manual", MANUAL + "\nThe coolant is replaced every 15 months.\n" + MANUAL.replace("week", "year"))
    again = index.update("s", [changed])
    assert again.kept > 30 and again.removed <= again.added + 1
    assert "15 months" in index.search("coolant")[0].text
    assert index.update("s", []).removed == again.added + again.kept


def test_in_how_many_pages_a_term_stands() -> None:
    """Prevents a word that is only in titles, or in most pages, from passing for the rarest."""
    index = Index.of(PAGES)
    assert [index.num_with(term) for term in ("heart", "wall", "studi", "心脏", "unheard")] == [1, 1, 1, 1, 0]
    assert Index.of([page(f"p{n}", "moss") for n in range(7)]).num_with("moss") == 7


def test_a_twin_is_of_the_other_language() -> None:
    """Prevents a keyword that happens to be a title from turning one page into another."""
    index = Index.of(
        [
            page("Garden", "苗圃和花园里种了很多花。", "soil"),
            page("soil", "What plants stand in."),
            page("鲜花", "花很美。"),
        ]
    )
    assert titles(index, "花园")[0] == "Garden"
    english = Index.of(
        [page("花园", "花园里有花。", "Linux; garden"), page("Linux", "内核"), page("Linux", "A garden of code.")]
    )
    (first, *_) = english.search("garden", 1)
    assert first.text == "A garden of code."


def test_the_best_stands_first_and_no_more_than_asked() -> None:
    """Prevents an order by anything but how well pages answer."""
    index = Index.of([page(f"p{n}", "moss " * n + "other words " * (20 - n)) for n in range(1, 20)])
    found = index.search("moss", 5)
    assert len(found) == 5
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert len(index.search("moss", 100)) == 19
    assert index.num_pages == 19


def test_long_and_odd_questions() -> None:
    """Prevents syntax of the library in what people type, and a question that costs without end."""
    index = Index.of(PAGES)
    for question in (
        '"heart',
        "heart AND OR (",
        "title:heart",
        "heart~2^5 *",
        "[a TO b]",
        "heart\0\n\t",
        "heart\ud800",
        "a:b:c",
    ):
        index.search(question)
    assert titles(index, "heart " + " ".join(f"word{n}" for n in range(5000)))[0] == "Heart"


def test_whatever_a_page_holds() -> None:
    """Prevents one odd page from ending the run that reads a million: half a character, a huge word, no word at all."""
    odd = [
        page("half \ud800", "moss \udfff text", "key \ud83d"),
        page("huge", "a" * 100_000 + " moss"),
        page("none", "!!! ???"),
        page("zero", "moss \0 text"),
        page("long" * 30_000, "moss"),
    ]
    index = Index.of(odd)
    assert index.num_pages == 6  # the huge one is two: equal passages, and the last
    assert sorted(title[:6] for title in titles(index, "moss", 9)) == ["half ?", "huge", "longlo", "zero"]


# ---------------------------------------------------------------------------------------------------- a second run


def test_only_what_changed_is_touched(tmp_path: Path) -> None:
    """Prevents a second run that doubles pages, keeps those that are gone, or shows the old text."""
    index = Index.open(tmp_path / "new" / "index", make=True)
    one, two, three = page("one", "old text"), page("two"), page("three")
    assert index.update("notes", [one, two, two]) == Updated(added=2, kept=0, removed=0)
    assert index.update("notes", [one, two]) == Updated(added=0, kept=2, removed=0)
    assert index.update("notes", [page("one", "new text"), three, two]) == Updated(added=2, kept=1, removed=1)
    assert index.num_pages == 3
    assert [found.text for found in index.search("new text")][:1] == ["new text"]
    assert index.search("old") == []
    assert Index.open(tmp_path / "new" / "index").num_pages == 3
    assert index.update("notes", []) == Updated(added=0, kept=0, removed=3)
    assert index.num_pages == 0


def test_sources_keep_apart(tmp_path: Path) -> None:
    """Prevents the pages of one folder from going with those of another: one inside of it holds the same."""
    index = Index.open(tmp_path / "index", make=True)
    index.update("notes", [page("a"), page("b")])
    index.update("notes/deep", [page("b"), page("c")])
    assert index.update("notes/deep", []) == Updated(added=0, kept=0, removed=2)
    assert sorted(titles(index, "text")) == ["a", "b"]
    assert index.update("notes", [page("a"), page("b")]) == Updated(added=0, kept=2, removed=0)


def test_what_was_left_out_stays(tmp_path: Path) -> None:
    """Prevents pages that go because their file could not be read this time, and others from staying with them."""
    one, two = (Entry(name, f"The text of {name}.", f"{name}#x", file=f"/{name}.md") for name in ("one", "two"))
    index = Index.open(tmp_path / "index", make=True)
    index.update("notes", [one, two])
    left_out: dict[str, str] = {}

    def broken() -> Iterator[Entry]:
        yield page("new")
        left_out["/one.md"] = "damaged"

    assert index.update("notes", broken(), left_out) == Updated(added=1, kept=1, removed=1)
    assert sorted(titles(index, "text")) == ["new", "one"]
    assert index.update("notes", [two]) == Updated(added=1, kept=0, removed=2)


def test_an_error_of_the_source_leaves_the_index(tmp_path: Path) -> None:
    """Prevents a bad line in the middle of a file from emptying the index, or from keeping it locked."""

    def broken() -> Iterator[Entry]:
        yield page("new")
        raise ValueError("a.jsonl, line 2: no JSON")

    index = Index.open(tmp_path / "index", make=True)
    index.update("notes", [page("old")])
    with pytest.raises(ValueError, match=r"^a\.jsonl, line 2: no JSON$"):
        index.update("notes", broken())
    assert titles(Index.open(tmp_path / "index"), "text") == ["old"]
    assert index.update("notes", [page("new")]) == Updated(added=1, kept=0, removed=1)


def test_one_process_writes(tmp_path: Path) -> None:
    """Prevents two runs at once from losing each other's pages: the second says so in one line, and nothing else."""
    index = Index.open(tmp_path / "index", make=True)
    index.update("notes", [page("old")])
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[Entry]:
        begun.set()
        go_on.wait(30)
        yield page("slow")

    first = threading.Thread(target=index.update, args=("slow", slow()))
    first.start()
    assert begun.wait(30)
    other = Index.open(tmp_path / "index")
    with pytest.raises(BlockingIOError) as caught:
        other.update("other", [page("other")])
    assert str(caught.value) == f"another process writes to {tmp_path / 'index'}; wait for its end"
    assert titles(other, "text") == ["old"]  # whoever reads goes on reading
    go_on.set()
    first.join()
    assert other.update("other", [page("other")]) == Updated(added=1, kept=0, removed=0)
    assert sorted(titles(Index.open(tmp_path / "index"), "text")) == ["old", "other", "slow"]


def test_what_is_there_is_looked_at_behind_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents pages that are doubled when one run ends between another's look and its first write."""
    index = Index.open(tmp_path / "index", make=True)
    known = Index._known

    def looks(self: Index, source: str) -> dict[str, str]:
        with pytest.raises(ValueError, match="LockBusy"):
            tantivy.Index.open(str(tmp_path / "index")).writer()
        return known(self, source)

    monkeypatch.setattr(Index, "_known", looks)
    assert index.update("notes", [page("a")]) == Updated(added=1, kept=0, removed=0)


# ------------------------------------------------------------------------------------------------- kill -9

CHILD = """
import sys, time
from pathlib import Path
from moss.tools import index
from tests.test_tools_index import version

def slowly(number):
    for entry in version(number):
        time.sleep(0.0005)
        yield entry

index.COMMIT_EVERY = 15
into = index.Index.open(Path(sys.argv[1]), make=True)
print("begun", flush=True)
into.update("notes", slowly(int(sys.argv[2])))
"""


def version(number: int) -> list[Entry]:
    """A hundred pages, of which a third changes from one version to the next, and some come and go."""
    entries = [page(f"page {n}", f"moss {n} as of {number if n % 3 == 0 else 0}") for n in range(100)]
    return entries + [page(f"extra {number} {n}", "moss") for n in range(20)]


@pytest.mark.repeated
def test_killed_at_any_moment(tmp_path: Path, repeats: int) -> None:
    """Prevents an index that is lost, or that has lost something, because the machine went down while it was written;
    the same command again completes it."""
    rng = random.Random(7)
    folder = tmp_path / "index"
    Index.open(folder, make=True).update("notes", version(0))
    for number in range(1, repeats + 1):
        old, new = ({entry.digest("notes") for entry in version(each)} for each in (number - 1, number))
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(number)], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        time.sleep(rng.random() * 0.25)
        child.kill()
        child.wait()
        child.stdout.close()
        index = Index.open(folder)
        there = index._known("notes").keys()
        assert old <= there <= old | new or there == new
        assert index.num_pages == len(there)
        assert all(found.text for found in index.search("moss", 200))
        done = index.update("notes", version(number))
        assert index._known("notes").keys() == new
        assert (done.kept + done.added, index.num_pages) == (len(new), len(new))


# ------------------------------------------------------------------------------------------- somebody else's folder

OTHER_USER = """
import os, sys
from pathlib import Path
from moss.tools.index import Index

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
folder = Path(sys.argv[1])
for work in (lambda: Index.open(folder).search("moss")[0].text, lambda: Index.open(folder).update("s", [])):
    try:
        print(work())
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
"""


def told_another_user(folder: Path) -> list[str]:
    """What somebody else is told who searches an index, and who writes to it."""
    for parent in folder.parents:  # pytest's folders are for one user
        if parent != Path("/") and parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 0o011)
    command = [sys.executable, "-c", OTHER_USER, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be somebody else")
def test_an_index_of_another_user(tmp_path: Path) -> None:
    """Prevents an index for several people that only one can search, since the library locks what it reads; and the
    advice to remove it."""
    folder = tmp_path / "index"
    Index.open(folder, make=True).update("s", [page("a", "moss text")])
    assert told_another_user(folder) == ["moss text", f"PermissionError {folder} may be read, but not written to"]
    assert titles(Index.open(folder), "moss") == ["a"]
    for file in folder.glob("[!.]*"):
        file.chmod(0o600)
    denied, _ = told_another_user(folder)
    assert denied.startswith(f"ValueError {folder} cannot be read as an index (") and "remove" not in denied
    for mode in (0o700, 0o711):
        folder.chmod(mode)
        denied, _ = told_another_user(folder)
        assert str(folder) in denied and "ermission" in denied and "remove" not in denied


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_an_index_that_may_only_be_read(tmp_path: Path) -> None:
    """Prevents an index on a disk that is for reading from being no index."""
    folder = tmp_path / "index"
    Index.open(folder, make=True).update("s", [page("a", "moss text")])
    for file in (*folder.iterdir(), folder):
        file.chmod(0o555)
    assert titles(Index.open(folder), "moss") == ["a"]
    with pytest.raises(PermissionError, match="may be read, but not written to"):
        Index.open(folder).update("s", [])


# ----------------------------------------------------------------------------------------------------- bad folders


def test_folders_that_are_none(tmp_path: Path) -> None:
    """Prevents an index that is written among other files, and a trace for a typing error."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("photos", "file", "empty", "nowhere"):
        with pytest.raises(ValueError, match="holds no index; make one with: moss data index PATH --to"):
            Index.open(tmp_path / name)
    for name in ("photos", "file"):
        with pytest.raises(ValueError, match="is not empty and holds no index; name another folder"):
            Index.open(tmp_path / name, make=True)
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    Index.open(tmp_path / "empty", make=True).update("s", [page("a")])
    assert not (tmp_path / "nowhere").exists()


def test_a_beginning_that_was_killed(tmp_path: Path) -> None:
    """Prevents a folder that nobody can use any more because the first run was stopped before the first page."""
    Index.open(tmp_path / "whole", make=True)
    for left in ([], [".managed.json"], [".managed.json", ".tantivy-meta.lock", ".tmp1234"]):
        folder = tmp_path / f"killed {len(left)}"
        folder.mkdir()
        for name in left:
            whole = tmp_path / "whole" / name
            (folder / name).write_bytes(whole.read_bytes() if whole.exists() else b"{")
        assert Index.open(folder, make=True).update("s", [page("a")]) == Updated(1, 0, 0)
        assert titles(Index.open(folder), "text") == ["a"]


def test_an_index_of_somebody_else(tmp_path: Path) -> None:
    """Prevents another program's index from being written into."""
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("body", stored=True)
    tantivy.Index(builder.build(), path=str(tmp_path))
    before = sorted(file.name for file in tmp_path.iterdir())
    for make in (False, True):
        with pytest.raises(ValueError, match=r"cannot be read as an index .*; remove it and make it anew") as caught:
            Index.open(tmp_path, make=make)
        assert "\n" not in str(caught.value)
    assert before == sorted(file.name for file in tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["empty", "noise", "gone", "flipped"])
def test_a_folder_that_is_damaged(kind: str, tmp_path: Path) -> None:
    """Prevents a search that ends with a trace, or never (the library's panic is no exception that anybody catches),
    because a file of the index is broken: one line says what to do."""
    Index.open(tmp_path / "whole", make=True).update("s", [page(str(n), f"moss {n} " * 50) for n in range(200)])
    rng = random.Random(3)
    for number, name in enumerate(sorted(file.name for file in (tmp_path / "whole").iterdir())):
        if name.startswith("."):
            continue
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        file = folder / name
        content = bytearray(file.read_bytes())
        if kind == "gone":
            file.unlink()
        elif kind == "flipped":
            for _ in range(20):
                content[rng.randrange(max(1, len(content) - 120))] ^= 0xFF
            file.write_bytes(content)
        else:
            file.write_bytes(b"" if kind == "empty" else rng.randbytes(len(content)))
        try:
            for found in Index.open(folder).search("moss 7"):
                assert "moss" in found.text
        except ValueError as error:
            assert str(folder) in str(error) and "\n" not in str(error)


# ------------------------------------------------------------------------------------------------------- many


@pytest.mark.slow
def test_twenty_thousand_pages(tmp_path: Path) -> None:
    """Prevents an index whose time or memory grows faster than its pages."""
    rng = random.Random(0)
    words = ["".join(rng.choices("bcdfghklmnprst", k=2)) + rng.choice("aeiou") * 2 for _ in range(3000)]
    signs = ["".join(chr(rng.randrange(0x4E00, 0x6000)) for _ in range(2)) for _ in range(3000)]
    entries = [
        page(f"{n}", " ".join(rng.choices(words, k=100)) if n % 2 else "".join(rng.choices(signs, k=100)))
        for n in range(20_000)
    ]
    index = Index.open(tmp_path / "index", make=True)
    begun = time.monotonic()
    assert index.update("s", iter(entries)) == Updated(20_000, 0, 0)
    built = time.monotonic() - begun
    begun = time.monotonic()
    assert index.update("s", iter(entries)) == Updated(0, 20_000, 0)
    again = time.monotonic() - begun
    assert built < 60 and again < built / 4
    begun = time.monotonic()
    for entry in rng.sample(entries, 50):
        assert Index.open(tmp_path / "index").search(entry.text[:60], 1)[0].title == entry.title
    assert (time.monotonic() - begun) / 50 < 0.1
    assert module.MEMORY < 100 << 20
