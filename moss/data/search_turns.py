"""Search turns of the scripted material: questions that need a search, answered from what the bundled pages say.

The facts and phrasings stand in `material/search.*.toml`: a *relation* has rows of pages with their answers and the
many ways in which people ask for it. The query is the question as it was typed: to copy is what a small model learns
soonest, and what the search was made for; a follow-up is searched for behind the question that it follows. The search
is run, never written down: a turn holds what `Search` gives, and its reply is the sentence found there that holds the
answer, with its citation. Where the bundled pages do not know (`unknown`: the weather, a price), the reply says so.
`compare` takes two searches side by side, whose queries name one thing each, and then a calculation: a turn of two
rounds. How much of each page the model reads is drawn, as it differs from model to model.

    moss data curriculum --kind questions --n 3
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from moss.chat import Round, Turn
from moss.data.casual import casual
from moss.data.family import Draft
from moss.data.slots import trim
from moss.tools.arithmetic import evaluate
from moss.tools.base import Source
from moss.tools.calls import Call, Outcome, format_results, numbered
from moss.tools.places import bundled
from moss.tools.words import sentences

Accept = Callable[[str, str], bool]
KINDS = ("search", "search_off")
FILES = ("things", "people")
TRIES = 2000
SHARES = {"relation": 0.72, "compare": 0.12, "unknown": 0.16}
ROOM = {"en": (330, 400, 480, 560), "zh": (150, 175, 200, 230)}  # characters of a result, one of which is drawn
LEAD_IN = 0.25  # of the replies say that it was found
LEADS = {
    "en": ("I looked it up: ", "Here is what I found: ", "This is what the page says: ", "Found it: "),
    "zh": ("我查到：", "查到的资料说：", "搜索结果是：", "资料里写道："),
}
THOUGHTS = {
    "en": (
        "I should look this up.",
        "A search will tell.",
        "This is something to search for.",
        "Facts like this are better looked up than guessed.",
        "I don't know this by heart, so I search for it.",
    ),
    "zh": ("需要查一下。", "先搜索再回答。", "这样的事要查资料，不能猜。", "搜一下才可靠。", "我记不住这个，去搜索。"),
}
NEXT = 0.25  # of the questions are followed by the same one about something else
FOLLOW_UPS = {
    "en": (
        "And {k}?",
        "What about {k}?",
        "How about {k}?",
        "Okay, and for {k}?",
        "Now the same for {k}.",
        "{k} too, please.",
    ),
    "zh": ("那{k}呢？", "{k}呢？", "换成{k}呢？", "再查一个：{k}。", "同样的问题，{k}。", "好的，{k}呢？"),
}


@dataclass(frozen=True)
class Fact:
    """What a page says: its subject as people name it, and the words that a right answer holds."""

    name: str
    answer: str


@dataclass(frozen=True)
class Entry:
    """A relation, a comparison or a kind of thing that changes by the day, in one language."""

    name: str
    kind: str
    lang: str
    ask: tuple[str, ...]
    query: str = ""  # of a relation that is compared
    rows: tuple[Fact, ...] = ()
    things: tuple[str, ...] = ()
    relations: tuple[str, ...] = ()  # of a comparison: of {a}, and of {b} where that is another
    calculate: str = ""
    thoughts: tuple[str, ...] = ()  # of a comparison
    then: tuple[str, ...] = ()
    reply: tuple[str, ...] = ()


@dataclass(frozen=True)
class Book:
    """All that one language has."""

    entries: Mapping[str, Mapping[str, Entry]]  # by kind and name
    off: Mapping[str, tuple[str, ...]]


@cache
def book(lang: str) -> Book:
    """The material of a language, read once."""
    folder = resources.files("moss.data") / "material"
    entries: dict[str, dict[str, Entry]] = {kind: {} for kind in SHARES}
    off: dict[str, tuple[str, ...]] = {}
    for file in FILES:
        content = tomllib.loads((folder / f"search.{file}.toml").read_text(encoding="utf-8"))
        for kind, found in entries.items():
            for table in content.get(kind, ()):
                found[table["name"]] = _entry(kind, lang, table)
        off.update({name: tuple(texts) for name, texts in content.get("off", {}).get(lang, {}).items()})
    return Book(entries, off)


def _entry(kind: str, lang: str, table: Mapping[str, Any]) -> Entry:
    side = dict(table[lang])
    at = 0 if lang == "en" else 2
    return Entry(
        table["name"],
        kind,
        lang,
        query=side.pop("query", ""),
        rows=tuple(Fact(row[at], row[at + 1]) for row in table.get("rows", ())),
        things=tuple(table.get("things", {}).get(lang, ())),
        relations=tuple(table[name] for name in ("relation", "relation2") if name in table),
        calculate=table.get("calculate", ""),
        **{name: tuple(texts) for name, texts in side.items()},
    )


def families(lang: str) -> list[str]:
    """Names of all phrasing families of a language."""
    found = [
        _family(entry, place)
        for entries in book(lang).entries.values()
        for entry in entries.values()
        for place in range(len(entry.ask))
    ]
    return found + [f"search.next.{lang}.{place}" for place in range(len(FOLLOW_UPS[lang]))]


def _family(entry: Entry, place: int) -> str:
    return f"search.{entry.kind}.{entry.name}.{entry.lang}.{place}"


@lru_cache(maxsize=1 << 14)
def found_for(query: str, room: int) -> tuple[Source, ...]:
    """What the bundled pages give for a query, where a model reads `room` characters of it."""
    return tuple(bundled(query, room))


def _typed(question: str, name: str) -> str | None:
    """A name as it stands in a question, in whatever case; None where a slip took it."""
    at = question.lower().find(name.lower())
    return question[at : at + len(name)] if at >= 0 else None


def _search(queries: list[str], room: int, first: int = 1) -> tuple[str, str, list[Outcome]]:
    """The line of commands, its results as the model reads them, and the outcomes."""
    calls = [Call("Search", [query], f'Search("{query}")') for query in queries]
    outcomes = numbered([Outcome(True, sources=found_for(query, room)) for query in queries], first)
    return ", ".join(call.raw for call in calls), format_results(calls, outcomes, limit=room), outcomes


def _sentence(outcome: Outcome, answer: str) -> tuple[int, str] | None:
    """The number of the first source that holds the answer, and the sentence that does."""
    whole = re.compile(rf"(?<![\d.,]){re.escape(answer)}(?!\d|[.,]\d)" if answer[:1].isdigit() else re.escape(answer))
    for number, source in enumerate(outcome.sources, outcome.first):
        for sentence in sentences(source.text):
            if whole.search(sentence) and not sentence.endswith("…"):
                return number, sentence
    return None


def cite(number: int) -> str:
    """A citation as replies hold it."""
    return f"<sup><|{number}|></sup>"


def uncited(reply: str) -> str:
    """A reply without its citations."""
    return re.sub(r"<sup>.*?</sup>", "", reply)


def _relation(
    rng: random.Random, entry: Entry, question: str, fact: Fact, family: str, before: str = ""
) -> Draft | None:
    """The turn that answers `question`, which asks for `fact` and may go on from the question `before`; None where the
    pages read do not hold it."""
    first = _first_round(rng, f"{before} {question}".strip(), entry.lang)
    if first is None or not (told := _sentence(first[1], fact.answer)):
        return None
    number, sentence = told
    lead = rng.choice(LEADS[entry.lang]) if rng.random() < LEAD_IN else ""
    return Draft(Turn(question, [first[0]], f"{lead}{sentence}{cite(number)}"), "search", family, (fact.answer,))


def _unknown(rng: random.Random, entry: Entry, question: str, thing: str, family: str) -> Draft | None:
    """The turn in which the pages found do not tell."""
    name, first = _typed(question, thing), _first_round(rng, question, entry.lang)
    if name is None or first is None:
        return None
    return Draft(Turn(question, [first[0]], rng.choice(entry.reply).format(k=name)), "search", family)


def _first_round(rng: random.Random, query: str, lang: str) -> tuple[Round, Outcome] | None:
    """The round that searches for what was typed, and what it finds; None where it cannot stand in a command."""
    if set(query) & set('"\\\n'):
        return None
    commands, results, (outcome,) = _search([query], rng.choice(ROOM[lang]))
    return Round(rng.choice(THOUGHTS[lang]), commands, results), outcome


def _compare(rng: random.Random, entry: Entry, question: str, facts: tuple[Fact, Fact], family: str) -> Draft | None:
    """The turn of two searches and a calculation."""
    relations = [book(entry.lang).entries["relation"][name] for name in entry.relations]
    names = [_typed(question, fact.name) for fact in facts]
    if None in names:
        return None
    queries = [relation.query.format(k=name) for relation, name in zip((relations * 2)[:2], names)]
    commands, results, outcomes = _search(queries, rng.choice(ROOM[entry.lang]) // 2)
    told = [_sentence(outcome, fact.answer) for outcome, fact in zip(outcomes, facts)]
    if None in told:
        return None
    a, b = (fact.answer.replace(",", "") for fact in facts)
    expression = entry.calculate.format(a=a, b=b)
    result = evaluate(expression)
    values = {"k": names[0], "k2": names[1], "a": a, "b": b, "r": trim(result)}
    rounds = [
        Round(rng.choice(entry.thoughts).format_map(values), commands, results),
        Round(
            rng.choice(entry.then).format_map(values),
            f'Calculate("{expression}")',
            f'Calculate("{expression}") => {result}',
        ),
    ]
    cited = dict.fromkeys(number for number, _ in filter(None, told))
    reply = rng.choice(entry.reply).format_map(values) + "".join(map(cite, cited))
    return Draft(Turn(question, rounds, reply), "search", family, (trim(result),))


def _pair(rng: random.Random, entry: Entry) -> tuple[Fact, Fact] | None:
    """Two facts to compare, the greater first; of one thing where the relations differ."""
    first, *second = (book(entry.lang).entries["relation"][name].rows for name in entry.relations)
    if second:
        others = {fact.name: fact for fact in second[0]}
        fact = rng.choice(first)
        return (fact, others[fact.name]) if fact.name in others else None
    a, b = rng.sample(first, 2)
    value = {fact: float(fact.answer.replace(",", "")) for fact in (a, b)}
    return None if value[a] == value[b] else (a, b) if value[a] > value[b] else (b, a)


def _ask(
    rng: random.Random, lang: str, switches: Mapping[str, bool], accept: Accept, off: bool
) -> tuple[Draft, Entry] | None:
    """One question of any kind and its turn, if it is accepted and can be answered."""
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "compare" and not switches.get("calculator"):
        return None
    every = list(book(lang).entries[kind].values())
    entry = rng.choices(every, [len(each.ask) + len(each.rows) for each in every])[0]
    place = rng.randrange(len(entry.ask))
    family = _family(entry, place)
    if kind == "compare":
        drawn: Any = _pair(rng, entry)
        if drawn is None:
            return None
        values = {"k": drawn[0].name, "k2": drawn[1].name}
    else:
        drawn = rng.choice(entry.rows or entry.things)
        values = {"k": drawn if isinstance(drawn, str) else drawn.name}
    text = entry.ask[place].format_map(values)
    question = casual(rng, text[0].upper() + text[1:] if entry.ask[place].startswith("{k}") else text, lang)
    if not accept(family, question):
        return None
    if off:
        texts = book(lang).off
        turn = Turn(question, [Round(rng.choice(texts["thoughts"]))], rng.choice(texts["reply"]))
        return Draft(turn, "search_off", family, ("/tools search on",)), entry
    make = {"relation": _relation, "compare": _compare, "unknown": _unknown}[kind]
    draft = make(rng, entry, question, drawn, family)
    return None if draft is None else (draft, entry)


def _next(rng: random.Random, entry: Entry, before: str, accept: Accept) -> Draft | None:
    """The same question about something else, after the question `before`."""
    place = rng.randrange(len(FOLLOW_UPS[entry.lang]))
    fact = rng.choice(entry.rows)
    text = FOLLOW_UPS[entry.lang][place].format(k=fact.name)
    question = casual(rng, text[0].upper() + text[1:], entry.lang)
    family = f"search.next.{entry.lang}.{place}"
    return _relation(rng, entry, question, fact, family, before) if accept(family, question) else None


def scene(
    rng: random.Random, lang: str, switches: Mapping[str, bool], *, kind: str, accept: Accept | None = None
) -> list[Draft]:
    """One or two turns that belong together, with the tools as switched; `accept(family, question)` filters each."""
    if kind not in KINDS or switches.get("search", False) == kind.endswith("_off"):
        raise ValueError(f"kind {kind!r} does not go with the switch search={switches.get('search')}")
    accept = accept or (lambda family, question: True)
    for _ in range(TRIES):
        if found := _ask(rng, lang, switches, accept, kind.endswith("_off")):
            break
    else:
        raise ValueError(f"no accepted question of kind {kind!r} in {lang!r} after {TRIES} draws: loosen `accept`")
    draft, entry = found
    drafts = [draft]
    if kind == "search" and entry.kind == "relation" and rng.random() < NEXT:
        drafts += filter(None, [_next(rng, entry, draft.turn.human, accept)])
    if not switches.get("thoughts", True):
        for each in drafts:
            each.turn.rounds[:] = [Round("None", step.commands, step.results) for step in each.turn.rounds]
    return drafts
