"""Conversations in which no tool is called: facts, lists, small writing, role play, code, small talk, refusals.

Half of what a tool-using model must learn is when to leave the tools alone. The material stands in
`material/*.toml`, written for this project: topics with several ways to ask (each a *family* of its own, see
`family.py`), replies, slots that are drawn anew each time, and follow-up turns that only make sense with what
was said before. Tools may be switched on here; no turn calls one. Everything is drawn from the `rng` alone.

    scene(random.Random(1), "en", switches, kind="harmful")        # or: moss data curriculum --kind dialogs --n 3
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from moss.chat import Round, Turn
from moss.data.casual import casual
from moss.data.family import Draft

MATERIAL = Path(__file__).parent / "material"
LANGS = ("en", "zh")
OTHER = {"en": "zh", "zh": "en"}
WEIGHTS = {
    "fact": 10, "list": 5, "writing": 4, "roleplay": 3, "code": 4, "identity": 14,
    "harmful": 30, "lookalike": 32, "chat": 10, "switch_language": 3,
}  # fmt: skip
KINDS = tuple(WEIGHTS)
# Every refusal holds one of these, and no other reply does: this is how an evaluation tells them apart.
REFUSAL_MARKS = {"en": ("can't help with", "won't help with"), "zh": ("不能帮", "没法帮")}
FOLLOW_SHARE = 0.45  # of the scenes whose topic has follow-up turns
LEAD_SHARE = {"identity": 0.5, "roleplay": 0.5, "harmful": 0.15, "lookalike": 0.15}  # with a sentence in front
FRAMED = ("harmful", "lookalike")  # kinds that share frames
INSIST_SHARE = 0.15  # of the harmful scenes: the user asks again
FRAME_SHARE = 0.5  # of the scenes whose topics have acts: asked in a frame that all topics share
MAX_DEPTH = 10  # slots inside of values inside of values
MAX_DRAWS = 4000  # a rare family or question is found by drawing; past this, none is there

Accept = Callable[[str, str], bool]
_SLOT = re.compile(r"\{([a-z_]+)(\d?)(?:\.(\d))?\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Side:
    """A topic in one language: `ask` holds (family, phrasing); `own` the replies of phrasings that need other ones."""

    ask: tuple[tuple[str, str], ...]
    reply: tuple[str, ...]
    otherwise: tuple[str, ...] = ()
    act: tuple[str, ...] = ()
    thing: tuple[str, ...] = ()
    own: Mapping[str, tuple[str, ...]] | None = None
    slots: Mapping[str, Any] | None = None
    answer: tuple[str, ...] = ()


@dataclass(frozen=True)
class Topic:
    """What can be asked and answered about one thing; `rows` hold (en key, en value, zh key, zh value)."""

    kind: str
    name: str
    sides: Mapping[str, Side]
    follows: tuple[Topic, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    when: str = ""  # the switch that `reply` needs; `otherwise` is said where it is off
    weight: float = 1.0


class Filler:
    """Fills slots: `{name}` is drawn once and stays, `{name2}` is another one, `{dish.1}` is a field of a record."""

    def __init__(self, rng: Random, pools: Iterable[Mapping[str, Any] | None], known: Mapping[str, str] | None = None):
        self.rng = rng
        self.pools = [pool for pool in pools if pool]
        self.values: dict[str, Any] = dict(known or {})

    def __call__(self, text: str) -> str:
        """The text with every slot filled, also slots inside of values. ValueError where a value names its own slot."""
        for _ in range(MAX_DEPTH):
            filled = _SLOT.sub(self._value, text)
            if filled == text:
                return text
            text = filled
        raise ValueError(f"a value names its own slot, so this text never ends: {text[:80]!r}")

    def _value(self, match: re.Match[str]) -> str:
        base, number, field = match.groups()
        key = base + number
        if key not in self.values:
            taken = [value for name, value in self.values.items() if name.rstrip("0123456789") == base]
            self.values[key] = self._draw(base, taken)
        value = self.values[key]
        return value[int(field or 0)] if isinstance(value, list | tuple) else value

    def _draw(self, base: str, taken: list[Any]) -> Any:
        pool = next((pool[base] for pool in self.pools if base in pool), None)
        if pool is None:
            raise ValueError(f"no values for the slot {{{base}}}; add them to its topic or to material/slots.toml")
        for _ in range(50):
            value = self.rng.choice(pool)
            if isinstance(value, str) and (limits := _RANGE.fullmatch(value)):
                value = str(self.rng.randint(int(limits[1]), int(limits[2])))
            if value not in taken:
                return value
        raise ValueError(f"too few different values for the slot {{{base}}}: {pool}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading the material


@cache
def material(name: str) -> dict[str, Any]:
    """One file of the material, read once."""
    return tomllib.loads((MATERIAL / f"{name}.toml").read_text(encoding="utf-8"))


def _topic(kind: str, table: Mapping[str, Any], prefix: str = "", rows: tuple[tuple[str, ...], ...] = ()) -> Topic:
    name = prefix + table["name"]
    sides = {}
    for lang in LANGS:
        if lang not in table:
            continue
        side = table[lang]
        own: dict[str, tuple[str, ...]] = {}
        ask = tuple((f"{kind}.{lang}.{name}.{i}", text) for i, text in enumerate(_texts(side, "ask", own), 1))
        act, thing = (tuple(_texts(side, key, own)) for key in ("act", "thing"))
        lists = {key: tuple(side.get(key, ())) for key in ("reply", "otherwise", "answer")}
        sides[lang] = Side(ask=ask, act=act, thing=thing, own=own, slots=side.get("slots"), **lists)
    follows = tuple(_topic(kind, follow, name + "_") for follow in table.get("follow", ()))
    weight = table.get("weight", len(rows) ** 0.7 if rows else 1.0)
    return Topic(kind, name, sides, follows, rows, table.get("when", ""), weight)


def _texts(side: Mapping[str, Any], key: str, own: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """The texts under `key`; one written as [text, reply, …] brings its own replies, which go into `own`."""
    for text in side.get(key, ()):
        if isinstance(text, list):
            own[text[0]] = tuple(text[1:])
            text = text[0]
        yield text


@cache
def topics(kind: str, lang: str) -> tuple[Topic, ...]:
    """The topics of a kind that are written in this language."""
    found = [topic for topic in (_facts() if kind == "fact" else _plain_topics(kind)) if lang in topic.sides]
    return tuple(found)


@cache
def _plain_topics(kind: str) -> tuple[Topic, ...]:
    tables = material(kind)
    shared = tuple(_topic(kind, table) for table in tables.get("follow_all", ()))
    built = (_topic(kind, table) for table in tables["topic"])
    return tuple(topic if topic.follows else replace(topic, follows=shared) for topic in built)


@cache
def _facts() -> tuple[Topic, ...]:
    tables = material("facts")["relation"]
    rows = {table["name"]: tuple(tuple(row) for row in table["rows"]) for table in tables if "rows" in table}
    follows = [] if "next" not in material("facts") else [material("facts")["next"]]
    built = []
    for table in tables:
        chain = follows if table.get("next", True) else []
        topic = _topic("fact", table, rows=rows[table.get("rows_of", table["name"])])
        built.append(replace(topic, follows=tuple(_topic("fact", follow) for follow in chain)))
    return tuple(built)


@cache
def frames(kind: str, lang: str, slot: str) -> tuple[tuple[str, str], ...]:
    """Phrasings with an `{act}` or a `{thing}`. Harmful and harmless requests share them, under the same family names,
    so that the frame tells nothing; a few belong to harmful requests alone.
    """
    table = material("frames")
    shared = table["shared" if slot == "act" else "things"][lang]
    own = table["harmful"][lang] if slot == "act" and kind == "harmful" else {}
    names = [(f"frame.{lang}.{name}", text) for name, text in shared.items()]
    return tuple(names + [(f"harmful.{lang}.frame.{name}", text) for name, text in own.items()])


@cache
def families(lang: str) -> dict[str, list[str]]:
    """kind -> the names of its phrasing families in this language, each once, sorted."""
    found: dict[str, list[str]] = {}
    for kind in KINDS:
        names: set[str] = set()
        if kind in ("list", "switch_language"):
            names.update(family for group in _phrasings(kind, lang).values() for family, _ in group)
        else:
            for topic in topics(kind, lang):
                for part in (topic, *topic.follows):
                    names.update(family for family, _ in part.sides[lang].ask)
        if kind in FRAMED:
            names.update(family for slot in ("act", "thing") for family, _ in frames(kind, lang, slot))
        found[kind] = sorted(names)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Words around a question


def sentence(text: str, lang: str) -> str:
    """English sentences begin with a capital letter, whatever a slot put there."""
    if lang != "en":
        return text
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text).replace("D.C..", "D.C.")


def typed(rng: Random, text: str, lang: str, keep: Iterable[str] = ()) -> str:
    """The question as people type it (`casual.py`), unless that would change a word of `keep`."""
    varied = casual(rng, text, lang)
    return varied if all(word in varied for word in keep) else text


def thoughts(rng: Random, kind: str, lang: str, switches: Mapping[str, bool]) -> str:
    """One very short sentence, or `None` where thoughts are switched off."""
    return rng.choice(material("frames")["thoughts"][lang][kind]) if switches.get("thoughts", True) else "None"


def _draft(
    rng: Random, kind: str, lang: str, switches: Mapping[str, bool], family: str, human: str, reply: str, answer=()
) -> Draft:
    turn = Turn(human=human, rounds=[Round(thoughts(rng, kind, lang, switches), "None", "None")], reply=reply)
    return Draft(turn, kind, family, tuple(map(_bare, answer)))


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


def scene(
    rng: Random, lang: str, switches: Mapping[str, bool], *, kind: str | None = None, accept: Accept | None = None
) -> list[Draft]:
    """One to three turns that belong together, each accepted by `accept(family, question)`.

    Raises ValueError for an unknown kind or language, and when drawing finds nothing that is accepted.
    """
    if lang not in LANGS or (kind is not None and kind not in WEIGHTS):
        raise ValueError(f"unknown language or kind: {lang!r}, {kind!r}; there are {LANGS} and {KINDS}")
    accept = accept or (lambda family, question: True)
    special = {"list": _list_scene, "switch_language": _switch_scene}
    for _ in range(MAX_DRAWS):
        drawn = kind or rng.choices(KINDS, list(WEIGHTS.values()))[0]
        drafts = (
            special[drawn](rng, lang, switches, accept)
            if drawn in special
            else _topic_scene(rng, drawn, lang, switches, accept)
        )
        if drafts:
            return drafts
    raise ValueError(f"no {kind or 'talk'} turn in {lang!r} was accepted in {MAX_DRAWS} draws; accept more families")


def _pick(rng: Random, among: tuple[Topic, ...]) -> Topic:
    return rng.choices(among, [topic.weight for topic in among])[0]


def _filler(rng: Random, topic: Topic, lang: str, known: Mapping[str, str] | None = None) -> Filler:
    return Filler(rng, (topic.sides[lang].slots, material("slots")[lang]), known)


def _row(topic: Topic, row: tuple[str, ...], lang: str) -> dict[str, str]:
    key, value = row[:2] if lang == "en" else row[2:4]
    return {"k": key, "v": value}


def _reply(rng: Random, topic: Topic, side: Side, switches: Mapping[str, bool], asked: str = "") -> str:
    if side.own and asked in side.own:
        return rng.choice(side.own[asked])
    return rng.choice(side.otherwise if topic.when and not switches.get(topic.when, False) else side.reply)


def _topic_scene(rng: Random, kind: str, lang: str, switches: Mapping[str, bool], accept: Accept) -> list[Draft]:
    topic = _pick(rng, topics(kind, lang))
    side = topic.sides[lang]
    known = _row(topic, rng.choice(topic.rows), lang) if topic.rows else {}
    fill = _filler(rng, topic, lang, known)
    family, text, asked = _phrasing(rng, topic, side, lang, fill)
    human = sentence(fill(text), lang)
    leads = material("frames")["lead"].get(kind, {}).get(lang)
    if leads and rng.random() < LEAD_SHARE[kind]:
        human = sentence(fill(rng.choice(leads)), lang) + human
    reply = fill(_reply(rng, topic, side, switches, asked))
    reply = reply if kind == "code" else sentence(reply, lang)
    if kind == "chat":
        human = human.rstrip(".。") if rng.random() < 0.15 else human
    else:
        copied = (value for value in fill.values.values() if isinstance(value, str) and value in reply)
        human = typed(rng, human, lang, () if topic.rows else copied)
    if not accept(family, human):
        return []
    drafts = [_draft(rng, kind, lang, switches, family, human, reply, map(fill, _answer(topic, side)))]
    follows = [follow for follow in topic.follows if lang in follow.sides]
    for _ in range(2):
        if not follows or rng.random() > (INSIST_SHARE if kind == "harmful" else FOLLOW_SHARE):
            break
        if topic.rows:
            fill = _filler(rng, topic, lang, _row(topic, rng.choice(topic.rows), lang))
        extra = _follow(rng, topic, rng.choice(follows), lang, switches, accept, fill, drafts)
        if extra is None:
            break
        drafts.append(extra)
        follows = follows if topic.rows else [follow for follow in follows if follow.name not in extra.family]
    return drafts


def _phrasing(rng: Random, topic: Topic, side: Side, lang: str, fill: Filler) -> tuple[str, str, str]:
    """(family, text, what the reply depends on): the topic's own phrasing, or one of its acts or things in a frame."""
    slots = {"act": side.act, "thing": side.thing} if rng.random() < FRAME_SHARE else {}
    usable = [slot for slot, texts in slots.items() if texts]
    if not usable:
        family, text = rng.choice(side.ask)
        return family, text, text
    slot = rng.choice(usable) if rng.random() < 0.7 else usable[0]
    family, text = rng.choice(frames(topic.kind, lang, slot))
    asked = fill.values[slot] = rng.choice(slots[slot])
    return family, text, asked


def _answer(topic: Topic, side: Side) -> tuple[str, ...]:
    if topic.kind == "identity":
        return ("MOSS",)
    return side.answer or (("{v}",) if topic.rows else ())


def _bare(answer: str) -> str:
    """Without the article, whose first letter a reply may write large."""
    return re.sub(r"^(?:a|an|the) ", "", answer)


def _follow(
    rng: Random, topic: Topic, follow: Topic, lang: str, switches: Mapping[str, bool], accept: Accept,
    fill: Filler, drafts: list[Draft],
) -> Draft | None:  # fmt: skip
    """A turn that needs the history: what was told is asked back, or the question goes on with another thing."""
    side = follow.sides[lang]
    if side.slots:
        fill.pools.insert(0, side.slots)
    for _ in range(6):
        family, text = rng.choice(side.ask)
        human = sentence(fill(text), lang)
        if accept(family, human) and all(human != draft.turn.human for draft in drafts):
            said = topic.sides[lang] if topic.rows else side
            reply = sentence(fill(_reply(rng, follow, said, switches)), lang)
            if reply == drafts[-1].turn.reply:
                return None
            return _draft(rng, topic.kind, lang, switches, family, human, reply, map(fill, _answer(topic, said)))
    return None


@cache
def _phrasings(kind: str, lang: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """group -> (family, text) of the kinds whose scenes are composed by code."""
    groups = material(kind)["ask"][lang]
    return {
        group: tuple((f"{kind}.{lang}.{group}.{i}", text) for i, text in enumerate(texts, 1))
        for group, texts in groups.items()
    }


# Lists ---------------------------------------------------------------------------------------------------------------


def _joined(items: list[str], lang: str, style: str) -> str:
    if style == "lines":
        return "\n" + "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    if len(items) == 1:
        return items[0]
    comma, last = (", ", " and ") if lang == "en" else ("、", "和")
    return comma.join(items[:-1]) + last + items[-1]


def _list_scene(rng: Random, lang: str, switches: Mapping[str, bool], accept: Accept) -> list[Draft]:
    table = material("list")
    group = rng.choice(table["group"])
    category, unit = group[lang]["name"], group[lang].get("unit", "个")
    items = [item[LANGS.index(lang)] for item in group["items"]]
    rng.shuffle(items)
    asks = _phrasings("list", lang)
    style = rng.choices(("count", "some", "lines", "one"), (6, 2, 2, 1))[0]
    family, text = rng.choice(asks[style])
    number = {"some": 3, "one": 1}.get(style, rng.randint(2, min(6, len(items) - 2)))
    words = table["numbers"][lang]
    written = {"n": rng.choice((str(number), words[number - 1])), "cat": category, "u": unit}
    human = typed(rng, sentence(Filler(rng, (), written)(text), lang), lang)
    if not accept(family, human):
        return []
    body = _joined(items[:number], lang, "lines" if style == "lines" else "line")
    said = rng.choice(table["reply"][lang][style])
    written = {"n": words[number - 1], "cat": category, "u": unit, "items": body}
    reply = sentence(Filler(rng, (), written)(said), lang)
    drafts = [_draft(rng, "list", lang, switches, family, human, reply)]
    left = items[number:]
    if len(left) >= 2 and rng.random() < FOLLOW_SHARE:
        number = rng.randint(1, min(3, len(left)))
        written = {"n": words[number - 1], "cat": category, "u": unit}
        family, text = rng.choice(asks["more"] if number > 1 else asks["another"])
        human = sentence(Filler(rng, (), written)(text), lang)
        if accept(family, human):
            written["items"] = _joined(left[:number], lang, "line")
            said = rng.choice(table["reply"][lang]["more" if number > 1 else "another"])
            reply = sentence(Filler(rng, (), written)(said), lang)
            drafts.append(_draft(rng, "list", lang, switches, family, human, reply))
    return drafts


# Changing the language -----------------------------------------------------------------------------------------------


def _bilingual(rng: Random) -> Iterator[tuple[Topic, tuple[str, ...]]]:
    """Endless draws of a fact that both languages can tell."""
    among = tuple(topic for topic in topics("fact", "en") if topic.rows and "zh" in topic.sides and topic.follows)
    while True:
        topic = _pick(rng, among)
        yield topic, rng.choice(topic.rows)


def _tell(rng: Random, topic: Topic, row: tuple[str, ...], lang: str) -> tuple[str, tuple[str, ...]]:
    fill = _filler(rng, topic, lang, _row(topic, row, lang))
    side = topic.sides[lang]
    return sentence(fill(rng.choice(side.reply)), lang), tuple(map(fill, _answer(topic, side)))


def _ask_fact(rng: Random, topic: Topic, row: tuple[str, ...], lang: str) -> tuple[str, str]:
    family, text = rng.choice(topic.sides[lang].ask)
    return family, sentence(_filler(rng, topic, lang, _row(topic, row, lang))(text), lang)


def _switch_scene(rng: Random, lang: str, switches: Mapping[str, bool], accept: Accept) -> list[Draft]:
    other = OTHER[lang]
    asks = _phrasings("switch_language", lang)
    facts = _bilingual(rng)
    topic, row = next(facts)
    style = rng.choices(("wrapped", "again", "agree", "plain"), (4, 4, 3, 2))[0]
    drafts: list[Draft] = []

    def add(kind: str, said: str, family: str, human: str, reply: str, answer: tuple[str, ...] = ()) -> bool:
        fine = accept(family, human)
        if fine:
            drafts.append(_draft(rng, kind, said, switches, family, human, reply, answer))
        return fine

    asked_in, asked = _ask_fact(rng, topic, row, lang)
    if style == "wrapped":  # one turn: asked in one language, to be answered in the other
        family, text = rng.choice(asks["wrapped"])
        human = Filler(rng, (), {"question": asked})(text)
        fine = accept(asked_in, asked)
        return drafts if fine and add("switch_language", lang, family, human, *_tell(rng, topic, row, other)) else []
    if style == "agree":  # from now on in the other language
        family, text = rng.choice(asks["agree"])
        text = typed(rng, text, lang)
        if not add("switch_language", lang, family, text, rng.choice(material("switch_language")["agreed"][other])):
            return []
        asked_in, asked = _ask_fact(rng, topic, row, other)
        add("switch_language", other, asked_in, asked, *_tell(rng, topic, row, other))
        return drafts
    if not add("fact", lang, asked_in, asked, *_tell(rng, topic, row, lang)):
        return []
    if style == "again":  # the last answer once more, in the other language
        family, text = rng.choice(asks["again"])
        text = typed(rng, text, lang)
        fine = add("switch_language", lang, family, text, *_tell(rng, topic, row, other))
    else:  # the next question simply comes in the other language
        topic, row = next(facts)
        asked_in, asked = _ask_fact(rng, topic, row, other)
        fine = add("switch_language", other, asked_in, asked, *_tell(rng, topic, row, other))
    return drafts if fine else []
