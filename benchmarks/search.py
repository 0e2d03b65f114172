"""What a local search costs, in time and memory, and how often it answers the questions of people.

20,000 generated pages, half English and half Chinese, are put into an index. Timed are `Search` itself with that index
before the encyclopaedia, asked for words of the pages and for what people ask (the questions below), and beside it the
index alone, opened for each search. Summaries are of a page of 3,000 words (Chinese: 5,000 characters) of the bundled
pages. Memory is that of a fresh process that has the bundled pages, that index, and the process that reads pages of
the web. The questions (`benchmarks/search/*.jsonl`) were written by people who saw neither the code nor how it ranks:
`dev` may be looked at while the search is worked on, `test` is for the figure.

    python -m benchmarks.search [--repeats 7] [--pages 20000]     # writes benchmarks/results/search.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.record import ROOT, begin, publish
from moss.tools import extract, places
from moss.tools.calls import ITEM_LIMIT
from moss.tools.index import Entry, Index
from moss.tools.search import search
from moss.tools.textrank import is_chinese, summarize
from moss.tools.words import terms

QUESTIONS = ROOT / "benchmarks" / "search"
SETS = ("dev", "test")
WORDS, SIGNS = 3000, 5000  # of the page that is summed up
SEARCHES = 400


def generated(count: int, seed: int = 0) -> Iterator[Entry]:
    """Pages of invented words, used as often as words are (Zipf), every second one in Chinese characters."""
    rng = random.Random(seed)
    often = list(accumulate(1 / rank for rank in range(1, 20_001)))
    english = ["".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(3)) for _ in often]
    chinese = ["".join(chr(rng.randrange(0x4E00, 0x5A00)) for _ in range(2)) for _ in often]
    for number in range(count):
        words, glue, end = (chinese, "", "。") if number % 2 else (english, " ", ". ")
        text = end.join(glue.join(rng.choices(words, cum_weights=often, k=14)).capitalize() for _ in range(10))
        title = glue.join(rng.choices(words, k=2))
        yield Entry(f"{title} {number}", text + end.strip(), f"https://example.com/{number}")


def seconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile of seconds, in milliseconds."""
    ordered = sorted(value * 1e3 for value in values)
    return {"median_ms": round(statistics.median(ordered), 3), "p95_ms": round(ordered[int(len(ordered) * 0.95)], 3)}


def of_index(folder: Path, count: int) -> dict[str, Any]:
    """Building and opening an index of generated pages, searching it, and how often a page is among the best three."""
    pages = list(generated(count))
    built = seconds(lambda: Index.open(folder, make=True).update("generated", pages))
    again = seconds(lambda: Index.open(folder).update("generated", pages))
    opened = [seconds(lambda: Index.open(folder)) for _ in range(50)]
    rng = random.Random(1)
    asked = {question(rng, page): page for page in rng.sample(pages, SEARCHES)}
    people = [row["question"] for name in SETS for row in questions(name)]
    right = [page.url in {found.url for found in Index.open(folder).search(words)} for words, page in asked.items()]
    places.bundled("anything")  # made at the first use
    with mock.patch.dict(os.environ, MOSS_INDEX=str(folder), MOSS_SEARCH=""):
        times = {
            "search_words": [seconds(lambda words=words: search(words)) for words in asked],
            "search_questions": [seconds(lambda words=words: search(words)) for words in people],
            "index_alone": [seconds(lambda words=words: Index.open(folder).search(words)) for words in asked],
        }
    return {
        "pages": count,
        "build_s": round(built, 2),
        "unchanged_s": round(again, 2),
        "open": spread(opened),
        **{name: spread(values) for name, values in times.items()},
        "page_in_top_3": round(sum(right) / len(right), 4),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def question(rng: random.Random, page: Entry) -> str:
    """Six words of a page, or as many characters as they take."""
    sentence = rng.choice(page.text.rstrip("。").split("。" if is_chinese(page.text) else ". "))
    return sentence[:12] if is_chinese(page.text) else " ".join(sentence.split()[:6])


def of_summaries(repeats: int) -> dict[str, Any]:
    """Summing up a long page in each language, as of one long page of the bundled ones."""
    folder = ROOT / "moss" / "tools" / "encyclopedia"
    english = " ".join(" ".join(_plain(folder / "history.en.md").split()[:WORDS]).split("@"))
    chinese = _plain(folder / "history.zh.md")[:SIGNS]
    asked = {"en": (english, "When did Columbus reach America?"), "zh": (chinese, "哥伦布哪一年到达美洲？")}
    times = {}
    for lang, (text, query) in asked.items():
        runs = [
            seconds(lambda text=text, query=query: summarize(text, limit=ITEM_LIMIT, query=query))
            for _ in range(repeats + 1)
        ]
        times[lang] = spread(runs[1:]) | {"first_ms": round(runs[0] * 1e3, 3)}  # stems are kept after the first
    return times


def _plain(file: Path) -> str:
    """The text of a bundled file without its headings and keywords."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return "\n".join(line for line in lines if not line.startswith(("# ", "@ ")))


def questions(name: str) -> list[dict[str, Any]]:
    """The rows of a set of questions that people wrote."""
    return [json.loads(row) for row in (QUESTIONS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def quality(name: str) -> dict[str, Any]:
    """How often a question of a set finds its page among three, and how often their summaries keep the answer."""
    groups: dict[str, list[tuple[bool, bool, bool]]] = {}
    for row in questions(name):
        asked, titles = row["question"], row["titles"]
        pages = places.bundled(asked)
        texts = [page.text.lower() for page in pages]
        right = any(page.title in titles for page in pages)
        kept = any(answer.lower() in text for answer in row["answer"] for text in texts)
        named = bool(set(terms(asked)) & set(terms(" ".join(titles))))
        across = all(is_chinese(title) != (row["lang"] == "zh") for title in titles)
        for group in ("all", row["lang"], *(["across languages"] if across else [])):
            groups.setdefault(group, []).append((right, kept, named))
    return {
        group: {
            "questions": len(found),
            "right_page_in_top_3": round(sum(right for right, _, _ in found) / len(found), 4),
            "summary_keeps_answer": round(sum(kept for _, kept, _ in found) / len(found), 4),
            "without_a_word_of_the_title": round(sum(not named for _, _, named in found) / len(found), 4),
        }
        for group, found in groups.items()
    }


def of_memory(folder: Path) -> dict[str, float]:
    """MiB of a fresh process that holds everything, and of the one that reads pages."""
    command = [sys.executable, "-m", "benchmarks.search", "--memory", str(folder)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


def hold(folder: Path) -> dict[str, float]:
    """What `of_memory` measures, in the process that it starts."""
    places.bundled("Who was the first emperor of China?")
    Index.open(folder).search("any question", 3)
    extract.main_text(b"<html><body><p>A page of the web.</p></body></html>")
    return {"search": resident("self"), "extract": resident(str(extract.BOX.pid))}


def resident(process: str) -> float:
    """MiB of a process: its share of what is shared, or where that is not told all of it."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except PermissionError:  # the process that reads pages is nobody's
        kib = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4
    return round(kib / 1024, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pages", type=int, default=20_000)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(hold(args.memory)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "index"
        result: dict[str, Any] = begin("search") | {"encyclopedia_s": round(seconds(places.encyclopedia), 3)}
        result["index"] = of_index(folder, args.pages)
        result["memory_mib"] = of_memory(folder)
    result["summary"] = of_summaries(args.repeats)
    result["quality"] = {name: quality(name) for name in SETS}
    result["goals"] = {
        "search": "<= 10 ms",
        "summary": "<= 50 ms",
        "memory": "< 300 MiB together",
        "quality": ">= 0.9 of each",
    }
    path = publish(result)
    show(result)
    print(f"-> {path}")
    return 0


def show(result: dict[str, Any]) -> None:
    """The figures as lines."""
    index, memory = result["index"], result["memory_mib"]
    print(f"{index['pages']} pages: built in {index['build_s']} s, run again in {index['unchanged_s']} s")
    timed = ("open", "search_words", "search_questions", "index_alone")
    for name, values in (*((name, index[name]) for name in timed), *result["summary"].items()):
        print(f"{name:16} median {values['median_ms']:7.2f} ms, p95 {values['p95_ms']:7.2f} ms")
    print(f"memory   {memory['search']} MiB, and {memory['extract']} MiB of what reads pages")
    for name, groups in result["quality"].items():
        for group, each in groups.items():
            figures = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in each.items())
            print(f"{name} {group}: {figures}")


if __name__ == "__main__":
    sys.exit(main())
