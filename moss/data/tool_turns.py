"""Tool turns of the scripted material: questions that need a calculator or an equation solver, and their answers.

The phrasings stand in `material/{calculator,solver,numbers}.{en,zh}.toml`: a *situation* (what is asked, and the call
that answers it) with the many ways in which people say it. Every result is computed, never written down. Those of
`numbers` are the negatives, of kind "chat": there are numbers, but nothing to calculate.

Conventions of the arguments, so that one question has one right call:
- no blanks; `+ - * / ^ %` and `sqrt( )`, `pi`; `2x` for a product with an unknown; `;` between equations;
- digits as the person wrote them, without separators or currency; symbols the person typed, in ASCII;
- where several orders say the same (`{n}*{p} | {p}*{n}`), the one that follows the order of the question;
- percent as `p*d/100`, `p*(100-d)/100`, `p*(100+d)/100`, which stay exact; unknowns are `x`, then `y`.

    moss data curriculum --kind dialogs --n 3
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import accumulate, combinations
from typing import Any

from moss.chat import Round, Turn
from moss.data.casual import casual
from moss.data.family import Draft
from moss.data.slots import CURRENCIES, Draw, Number, compile_spec, trim
from moss.data.symbols import EQUATIONS, expression
from moss.tools.arithmetic import evaluate

Accept = Callable[[str, str], bool]
NAMES = {"calculator": "Calculate", "solver": "Solve"}
TRIES = 20_000  # draws before `scene` gives up on its `accept`
SHOWN_RESULT = 9  # characters; longer results are mostly drawn again
KINDS = ("calculator", "solver", "calculator_off", "solver_off", "chat")
SLOT = re.compile(r"\{(\w+)(?::\$)?\}")
CONDITION = re.compile(r"(\w+)(>=|<=|!=)(-?\d+)")
TINY = re.compile(r"\d[-+*]\d")


@dataclass(frozen=True)
class Situation:
    """What is asked and how it is answered; the fields are the keys of the material files."""

    name: str
    tool: str
    lang: str
    ask: list[str]
    rounds: list[list[str]]  # calls of each round, alternatives separated by " | "
    reply: list[str]
    thoughts: list[str]
    then: list[str] = field(default_factory=list)  # thoughts of the second round
    use: list[str] = field(default_factory=list)  # lists of things to pick a row from
    slots: dict[str, Draw] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)  # slot -> kind of expression or equation
    lines: list[str] = field(default_factory=list)  # what the solver prints, when not a symbol
    want: list[str] = field(default_factory=list)  # results positive, whole, short, long; slots as in `b>=1`
    again: dict[str, list[str]] = field(default_factory=dict)  # slot -> follow-ups that change it
    answer: list[str] = field(default_factory=list)
    after: bool = False  # a follow-up on a number found before: `{r0}`
    weight: float = 1.0


@dataclass(frozen=True)
class Phrase:
    """One family: a way of asking, with the calls in its own order."""

    name: str
    ask: str
    situation: Situation
    rounds: list[list[str]]


@dataclass(frozen=True)
class Book:
    """All that one language's files hold."""

    phrases: dict[str, list[Phrase]]  # by tool; "chat" are the negatives
    weights: dict[str, list[float]]  # cumulative
    follow_ups: list[Phrase]
    again: dict[str, list[Phrase]]  # by situation name
    lists: dict[str, dict[str, Any]]
    off: dict[str, dict[str, list[str]]]


def _order(template: str) -> list[str]:
    return list(dict.fromkeys(SLOT.findall(template)))


def in_order(calls: str, ask: str) -> str:
    """Of `a | b | c` the call whose slots stand most nearly in the order in which the question names them."""
    place = {slot: i for i, slot in enumerate(_order(ask))}

    def swaps(call: str) -> int:
        places = [place[slot] for slot in _order(call) if slot in place]
        return sum(a > b for a, b in combinations(places, 2))

    return min(calls.split(" | "), key=swaps)


def _phrases(situation: Situation) -> list[Phrase]:
    stem = f"{situation.tool}.{situation.name}.{situation.lang}"
    return [
        Phrase(f"{stem}.{i}", ask, situation, [[in_order(call, ask) for call in calls] for calls in situation.rounds])
        for i, ask in enumerate(situation.ask)
    ]


def _situation(tool: str, lang: str, row: dict[str, Any]) -> Situation:
    row = dict(row)
    slots = {name: compile_spec(spec) for name, spec in row.pop("slots", {}).items()}
    rounds = row.pop("rounds", None) or [[row.pop("call")]] if "call" in row or "rounds" in row else []
    try:
        return Situation(tool=tool, lang=lang, slots=slots, rounds=rounds, **{"thoughts": [], **row})
    except TypeError as error:
        raise ValueError(f"situation {row.get('name')!r} of {tool}.{lang}.toml: {error}") from error


@cache
def book(lang: str) -> Book:
    """The phrasings of a language, read once."""
    found = Book({}, {}, [], {}, {}, {})
    folder = resources.files("moss.data") / "material"
    for tool in (*NAMES, "numbers"):
        content = tomllib.loads((folder / f"{tool}.{lang}.toml").read_text(encoding="utf-8"))
        found.lists.update(content.get("lists", {}))
        found.off[tool] = content.get("off", {})
        for row in content["situation"]:
            situation = _situation(tool, lang, row)
            phrases = _phrases(situation)
            kind = tool if tool in NAMES else "chat"
            if situation.after:
                found.follow_ups.extend(phrases)
                continue
            found.phrases.setdefault(kind, []).extend(phrases)
            found.weights.setdefault(kind, []).extend([situation.weight] * len(phrases))
            for slot, asks in situation.again.items():
                stem = f"{tool}.{situation.name}.again_{slot}.{lang}"
                more = [Phrase(f"{stem}.{i}", ask, situation, [[slot]]) for i, ask in enumerate(asks)]
                found.again.setdefault(situation.name, []).extend(more)
    for kind, weights in found.weights.items():
        found.weights[kind] = list(accumulate(weights))
    return found


def families(lang: str) -> list[str]:
    """Names of all phrasing families of a language."""
    found = book(lang)
    every = [*found.phrases.values(), found.follow_ups, *found.again.values()]
    return [phrase.name for phrases in every for phrase in phrases]


@dataclass
class Drawn:
    """The values of one question and what the tools gave."""

    phrase: Phrase
    values: dict[str, Any]
    question: str
    rounds: list[Round] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)


def _pick(values: dict[str, Any], name: str, rng: random.Random, rows: dict[str, Any]) -> None:
    """Binds every field of a random row; `who` twice gives another name as `who2`."""
    picked = rng.choice(rows["rows"])
    cells = picked.split("|")
    for key, cell in zip(rows["fields"], cells, strict=True):
        while key in values and cell == values[key]:
            cell = rng.choice(rows["rows"]).split("|")[0]
        values[key + "2" if key in values else key] = cell
        values[f"an_{key}"] = ("an " if cell[:1] in "aeiou" else "a ") + cell


def _sentence(template: str, values: dict[str, Any]) -> str:
    """The filled template; a thing or a person at its start gets a capital letter, an equation does not."""
    text = template.format_map(values)
    return text[:1].upper() + text[1:] if template.startswith(("{an_", "{who", "{frac", "{item", "{group")) else text


def _draw(rng: random.Random, phrase: Phrase, lang: str, earlier: dict[str, Any] | None = None) -> Drawn:
    """Values for a phrase, and the question."""
    situation = phrase.situation
    values: dict[str, Any] = dict(earlier or {})
    money = values.get("_money") or rng.choice(CURRENCIES[lang])
    values["_money"] = money
    for name in situation.use:
        _pick(values, name, rng, book(lang).lists[name])
    lines: list[str] = []
    for name, kind in situation.symbols.items():
        if kind in EQUATIONS:
            plain, shown, lines = EQUATIONS[kind](rng, lang)
        else:
            plain, shown = expression(rng, kind, lang)
        values[name] = Number(plain, shown)
    for name, draw in situation.slots.items():
        values[name] = Number(*draw(rng, values, lang), money)
    question = casual(rng, _sentence(phrase.ask, values), lang)
    values = {name: value.plain() if isinstance(value, Number) else value for name, value in values.items()}
    return Drawn(phrase, values, question, lines=lines or [line.format_map(values) for line in situation.lines])


def _change(rng: random.Random, phrase: Phrase, before: Drawn, lang: str) -> Drawn:
    """A follow-up that asks the same again with one value changed, or `all` of them."""
    (changed,) = phrase.rounds[0]
    slots = list(phrase.situation.slots) if changed == "all" else [changed]
    values = dict(before.values)
    while all(values[slot] == before.values[slot] for slot in slots):
        for slot in slots:
            values[slot] = Number(*phrase.situation.slots[slot](rng, values, lang), values["_money"])
    question = casual(rng, phrase.ask.format_map(values), lang)
    values |= {slot: values[slot].plain() for slot in slots}
    asked = Phrase(phrase.name, phrase.ask, phrase.situation, before.phrase.rounds)
    lines = [line.format_map(values) for line in phrase.situation.lines]
    return Drawn(asked, values, question, lines=lines)


def _call(tool: str, argument: str, drawn: Drawn) -> tuple[str, str]:
    """Runs one call: the Results text and the bare value."""
    if tool == "solver":
        return f'Solve("{argument}") =>\n' + "\n".join(drawn.lines), ""
    result = evaluate(argument)
    return f'Calculate("{argument}") => {result}', trim(result)


def _answer_rounds(rng: random.Random, drawn: Drawn) -> bool:
    """Fills in thoughts, commands and results; False when the values do not suit the situation."""
    situation, values = drawn.phrase.situation, drawn.values
    for index, calls in enumerate(drawn.phrase.rounds):
        commands, results = [], []
        for template in calls:
            tool = "calculator" if template.startswith("calculate:") else situation.tool
            argument = template.removeprefix("calculate:").format_map(values)
            text, value = _call(tool, argument, drawn)
            if tool == "calculator":
                drawn.results.append(value)
                values[f"r{len(drawn.results)}"] = values["r"] = Number(value, money=values["_money"])
            else:
                _solutions(drawn, situation.lang)
            commands.append(f'{NAMES[tool]}("{argument}")')
            results.append(text)
        thoughts = rng.choice(situation.then if index else situation.thoughts).format_map(values)
        drawn.rounds.append(Round(thoughts, ", ".join(commands), "\n".join(results)))
    return _suits(rng, drawn)


def _solutions(drawn: Drawn, lang: str) -> None:
    """Names the solver's values for the reply: `v1`, `v2` and all of them as `sols`."""
    pairs = [trim(line).split(" = ") for line in drawn.lines]
    said = [f"{name.split('_')[0]} = {value}" for name, value in pairs]
    roots = len({name.split("_")[0] for name, _ in pairs}) < len(pairs)
    glue = (" or " if roots else " and ") if lang == "en" else (" 或 " if roots else "，")
    drawn.values["sols"] = glue.join(said)
    drawn.values["_said"] = said
    money = drawn.values["_money"]
    drawn.values.update({f"v{i}": Number(value, money=money) for i, (_, value) in enumerate(pairs, 1)})


def _holds(condition: re.Match[str], values: dict[str, Any]) -> bool:
    """Whether a condition on a slot, such as `b>=1`, is true."""
    name, relation, bound = condition.groups()
    value = float(values[name])
    return {">=": value >= float(bound), "<=": value <= float(bound), "!=": value != float(bound)}[relation]


def _suits(rng: random.Random, drawn: Drawn) -> bool:
    """Whether values and results are such as people meet: the situation's `want`, and mostly short results."""
    want = drawn.phrase.situation.want
    if not all(_holds(condition, drawn.values) for condition in map(CONDITION.fullmatch, want) if condition):
        return False
    for value in drawn.results:
        if "positive" in want and (value.startswith("-") or value == "0"):
            return False
        if "whole" in want and not value.lstrip("-").isdigit():
            return False
        if len(value) > SHOWN_RESULT and "long" not in want and ("short" in want or rng.random() > 0.03):
            return False
        if not value or not value.lstrip("-")[0].isdigit() or "e" in value:
            return False
    return True


def _draft(rng: random.Random, drawn: Drawn, kind: str) -> Draft:
    """The finished turn of a question that a tool answered."""
    situation, values = drawn.phrase.situation, drawn.values
    reply = _sentence(rng.choice(situation.reply), values)
    if situation.answer:
        answer = tuple(part.format_map(values) for part in situation.answer)
    elif situation.tool == "solver" and not drawn.results:
        answer = tuple(values["_said"])
    else:
        answer = tuple(drawn.results[-len(drawn.phrase.rounds[-1]) :])
    return Draft(Turn(drawn.question, drawn.rounds, reply), kind, drawn.phrase.name, answer)


def _off(rng: random.Random, drawn: Drawn, lang: str, tool: str) -> Draft:
    """The same question with the tool switched off: said so, or a very small sum done by head."""
    texts, values = book(lang).off[tool], drawn.values
    plain = str(values.get("e", ""))
    if TINY.fullmatch(plain):
        result = trim(evaluate(plain))
        shown = " ".join(plain).replace("*", "×")
        thoughts, reply = rng.choice(texts["tiny_thoughts"]), rng.choice(texts["tiny"]).format(e=shown, r=result)
        return Draft(Turn(drawn.question, [Round(thoughts)], reply), f"{tool}_off", drawn.phrase.name, (result,))
    thoughts, reply = rng.choice(texts["thoughts"]), rng.choice(texts["reply"])
    answer = (f"/tools {tool} on",)
    return Draft(Turn(drawn.question, [Round(thoughts)], reply), f"{tool}_off", drawn.phrase.name, answer)


def _plain(rng: random.Random, drawn: Drawn) -> Draft:
    """A message with numbers that asks for no calculation."""
    situation = drawn.phrase.situation
    thoughts, reply = rng.choice(situation.thoughts), _sentence(rng.choice(situation.reply), drawn.values)
    return Draft(Turn(drawn.question, [Round(thoughts.format_map(drawn.values))], reply), "chat", drawn.phrase.name)


def _first(
    rng: random.Random, lang: str, switches: dict[str, bool], kind: str, accept: Accept | None
) -> tuple[Drawn, Draft]:
    """One turn of the kind that is accepted."""
    found, tool = book(lang), kind.removesuffix("_off")
    for _ in range(TRIES):
        (phrase,) = rng.choices(found.phrases[tool], cum_weights=found.weights[tool])
        drawn = _draw(rng, phrase, lang)
        if accept and not accept(phrase.name, drawn.question):
            continue
        if tool == "chat":
            return drawn, _plain(rng, drawn)
        mixed = any(call.startswith("calculate:") for calls in phrase.rounds for call in calls)
        if mixed and (kind.endswith("_off") or not switches["calculator"]):
            continue
        if kind.endswith("_off"):
            return drawn, _off(rng, drawn, lang, tool)
        if _answer_rounds(rng, drawn):
            return drawn, _draft(rng, drawn, kind)
    raise ValueError(f"no accepted question of kind {kind!r} in {lang!r} after {TRIES} draws: loosen `accept`")


def _next(rng: random.Random, lang: str, before: Drawn, accept: Accept | None) -> tuple[Drawn, Draft] | None:
    """A follow-up on what was just computed, or None when this question has none."""
    found = book(lang)
    result = before.results[-1] if before.results else ""
    changes = found.again.get(before.phrase.situation.name, []) if before.phrase.situation.again else []
    for _ in range(8):
        if changes and rng.random() < 0.6:
            drawn = _change(rng, rng.choice(changes), before, lang)
        elif result and len(result) <= 7 and before.phrase.situation.tool == "calculator" and len(before.results) == 1:
            phrase = rng.choice(found.follow_ups)
            drawn = _draw(rng, phrase, lang, {"r0": Number(result), "_money": before.values["_money"]})
        else:
            continue
        if (not accept or accept(drawn.phrase.name, drawn.question)) and _answer_rounds(rng, drawn):
            return drawn, _draft(rng, drawn, before.phrase.situation.tool)
    return None


def _kind(rng: random.Random, switches: dict[str, bool]) -> str:
    tool = rng.choices(["calculator", "solver"], [2, 1])[0]
    return tool if switches[tool] else f"{tool}_off"


def scene(
    rng: random.Random, lang: str, switches: dict[str, bool], *, kind: str | None = None, accept: Accept | None = None
) -> list[Draft]:
    """One to three turns that belong together, with the tools as switched; `accept(family, question)` filters each.

    `kind` is one of `KINDS`; None takes calculator or solver, and its `_off` form where the switch is off.
    """
    kind = kind or _kind(rng, switches)
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: tool turns come as {', '.join(KINDS)}")
    tool = kind.removesuffix("_off")
    if tool in NAMES and switches[tool] == kind.endswith("_off"):
        raise ValueError(f"kind {kind!r} does not go with the switch {tool}={switches[tool]}")
    drawn, draft = _first(rng, lang, switches, kind, accept)
    drafts = [draft]
    while kind in NAMES and len(drafts) < 3 and rng.random() < 0.3:
        more = _next(rng, lang, drawn, accept)
        if more is None:
            break
        drawn, draft = more
        drafts.append(draft)
    if not switches.get("thoughts", True):
        for draft in drafts:
            draft.turn.rounds[:] = [Round("None", step.commands, step.results) for step in draft.turn.rounds]
    return drafts
