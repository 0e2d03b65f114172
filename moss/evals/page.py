"""The page of `moss eval all`: tables, and pictures in the manner of figures 5, 6, 8, 10 and 11 of the paper of MOSS.

    page(json.loads(Path("results.json").read_text()))      # one HTML file that asks nothing of anyone

Beside the measured bars stand the values that the paper's text states (`paper.toml`); what it shows in pictures alone
is not guessed. All text goes through `charts.tag`, which escapes it, so that a model may be called whatever it likes.
A task that is in no picture of `PICTURES` has one of its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss.evals.charts import HATCH, Bar, Html, bars, joined, stacks, tag

HERE = Path(__file__).parent
PAPER: dict[str, Any] = tomllib.loads((HERE / "paper.toml").read_text(encoding="utf-8"))
STATED = {(each["task"], each["figure"]): float(each["per_cent"]) / 100 for each in PAPER["stated"]}
SERIES = ("ours", "theirs")  # classes of page.css, and `paper`
STACK = (("ours", "won"), ("tied", "tied"), ("theirs", "lost"))
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
SHORT = range(1, 30)  # lengths of settings that are shown; the text of a template is not

Told = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """A chart of some figures of a task; without names, of all that are no parts of others."""

    task: str
    title: str
    about: str = ""
    figures: tuple[str, ...] = ()
    mark: float | None = None  # where a line stands, such as that of chance


@dataclass(frozen=True)
class Picture:
    """A section with charts, their table, and what the paper shows in its place."""

    id: str
    title: str
    about: str
    panels: tuple[Panel, ...]


def of_tool(tool: str, title: str) -> Panel:
    """Figure 10 of one tool."""
    ways = ("called when on", "called when off", "called when off, held by the grammar")
    about = "high where it is on, low where it is off"
    return Panel("tools", title, about, tuple(f"{tool}: {way}" for way in ways))


def answers(tool: str, title: str) -> Panel:
    """Figure 11 of one tool."""
    return Panel("tools", title, "right answers", tuple(f"{tool}: right answer when {way}" for way in ("on", "off")))


PICTURES = (
    Picture(
        "hhh",
        "Knowledge, truth and manners",
        "In the manner of the paper's figure 5. The paper asks MMLU with five examples too; on TruthfulQA it counts "
        "answers that are true and informative, which takes a judge here, while MC1 and MC2 weigh given answers; it "
        "does not say who scored its toxicity.",
        (
            Panel("mmlu", "MMLU", "right answers; the dashed line is chance", (), 0.25),
            Panel("ceval", "C-Eval", "right answers; the dashed line is chance", ("accuracy",), 0.25),
            Panel("cmmlu", "CMMLU", "right answers; the dashed line is chance", ("accuracy",), 0.25),
            Panel("truthfulqa", "TruthfulQA", "higher is better"),
            Panel("toxicity", "RealToxicityPrompts", "toxicity of continuations; lower is better"),
        ),
    ),
    Picture(
        "judge",
        "Which answers better",
        "In the manner of the paper's figures 6 and 8: each prompt is won, tied or lost.",
        (Panel("judge", "Won, tied, lost", "of the prompts, by the first model", ("  won", "  tied", "  lost")),),
    ),
    Picture(
        "control",
        "Do the switches control the tools",
        "In the manner of the paper's figure 10: how often a tool is called that the question wants, with its switch "
        "on and off. Held by the grammar, the engine lets no switched-off tool be named.",
        (
            of_tool("search", "Web search"),
            of_tool("calculator", "Calculator"),
            of_tool("solver", "Equation solver"),
        ),
    ),
    Picture(
        "benefit",
        "What the tools bring",
        "In the manner of the paper's figure 11: right answers with a tool and without. The paper measures 500 "
        "calculations and 300 equations of its own, and 1K questions of knowledge with its search engine.",
        (
            answers("calculator", "Calculator"),
            answers("solver", "Equation solver"),
            Panel("gsm8k", "GSM8K", "right answers", ("right with the calculator", "right without")),
        ),
    ),
    Picture(
        "text",
        "How well text is predicted",
        "Bits per byte, which compare between tokenizers; the paper measures none.",
        (Panel("perplexity", "Bits per byte", "lower is better"),),
    ),
)
HEADLINES = {
    "truthfulqa": ("true and informative", "mc1", "mc2"),
    "toxicity": ("expected maximum, plain", "expected maximum, respectful"),
    "tools": ("calculator: right answer when on", "solver: right answer when on"),
    "gsm8k": ("right with the calculator", "right without"),
}
LABELS = {"accuracy": "all questions", "mc1": "MC1: the best answer is the likeliest",
          "mc2": "MC2: probability of the true answers"}  # fmt: skip


# ---------------------------------------------------------------- numbers and tables


def is_share(name: str, figures: Sequence[Mapping[str, float]]) -> bool:
    """Whether a figure is shown in per cent: not bits, nor what leaves 0 to 1 (or -1, of differences)."""
    inside = all(abs(each[key]) <= 1 for each in figures for key in ("value", "low", "high"))
    return inside and not name.strip().startswith("bits")


def number(value: float, share: bool) -> str:
    """`61.2 %`, or `1.234`."""
    return f"{100 * value:.1f} %" if share else f"{value:.3f}"


def change(value: float, share: bool) -> str:
    """`+3.1` (of points, where it is one of shares), or `−0.676`; 0 has no sign."""
    text = f"{100 * value:.1f}" if share else f"{value:.3f}"
    size = text.removeprefix("-")
    return size if float(size) == 0 else ("−" if value < 0 else "+") + size


def stated(value: float) -> str:
    """A value of the paper with the digits that it prints."""
    return next(f"{each['per_cent']} %" for each in PAPER["stated"] if float(each["per_cent"]) / 100 == value)


def with_interval(figure: Mapping[str, float] | None, share: bool, apart: bool = False) -> Html:
    """A cell: the value, or with `apart` the difference of two, and its interval in brackets."""
    if figure is None:
        return tag("td", "", class_="number")
    low, value, high = (
        change(figure[key], share) if apart else number(figure[key], share) for key in ("low", "value", "high")
    )
    told = tag("data", value + (" points" if apart and share else ""), value=figure["value"])
    return tag(
        "td", told, " ", tag("small", f"({low.removesuffix(' %')} to {high.removesuffix(' %')})"), class_="number"
    )


def table(head: Sequence[str], rows: Sequence[Html], title: str) -> Html:
    """A table that scrolls in a place of its own; heads are those of numbers, but the first and what is `Html`."""
    cells = [
        each if isinstance(each, Html) else tag("th", each, scope="col", class_="number" if at else None)
        for at, each in enumerate(head)
    ]
    inner = tag("table", tag("thead", tag("tr", *cells)), tag("tbody", *rows))
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=title)


# ---------------------------------------------------------------- the page


def page(told: Told) -> str:
    """The whole page, of what results.json holds."""
    names = labels(told)
    title = f"Evaluation of {' beside '.join(names)}"
    tasks = {each["task"]: each for each in told["tasks"] if each["state"] == "measured"}
    pictures = [each for each in (*PICTURES, *others(tasks)) if any(drawable(panel, tasks) for panel in each.panels)]
    inside = [
        tag("header", tag("h1", title), tag("p", lead(told), class_="muted"), contents(pictures)),
        section("glance", "At a glance", tag("p", GLANCE), glance(told, names)),
        *(section(each.id, each.title, *shown(each, tasks, names)) for each in pictures),
        section("paper", "What the paper states", *of_paper()),
        section("how", "How it was measured", *how(told, names)),
        section(
            "all", "All figures", tag("p", "With 95 % intervals."), *(every(each, names) for each in tasks.values())
        ),
    ]
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html((HERE / "page.css").read_text(encoding="utf-8"))),
    ]
    body = tag("body", HATCH, tag("main", *inside))
    return f'<!doctype html>\n<html lang="en">{tag("head", *head)}\n{body}</html>\n'


GLANCE = (
    "The first figures of each task, with 95 % intervals. Where two models are measured, they answer the same items, "
    "and their difference is drawn in pairs."
)


def labels(told: Told) -> list[str]:
    """What the models are called: by name, or by place where both have one name."""
    names = [each["name"] for each in told["models"]]
    return names if len(set(names)) == len(names) else [each["place"] for each in told["models"]]


def lead(told: Told) -> str:
    """When, with what and where."""
    limit = told["settings"]["limit"]
    few = f", the first {limit:,} items of each part" if limit else ""
    return f"Measured with moss {told['moss']}{few}; written on {told['date']}."


def contents(pictures: Sequence[Picture]) -> Html:
    """Links within the page."""
    places = [("glance", "At a glance"), *((each.id, each.title) for each in pictures)]
    places += [("paper", "What the paper states"), ("how", "How it was measured"), ("all", "All figures")]
    return tag("nav", *(tag("a", title, href=f"#{id}") for id, title in places), aria_label="Sections")


def section(id: str, title: str, *inside: str) -> Html:
    """A part of the page."""
    return tag("section", tag("h2", title), *inside, id=id)


def headlines(task: Told) -> list[str]:
    """The names of a task's figures that are told first."""
    names = task["results"][0]["figures"]
    return [name for name in HEADLINES.get(task["task"], ()) if name in names] or list(names)[:1]


def columns(task: Told, names: Sequence[str]) -> list[str]:
    """The heads over a task's results: the models' names, or the pair that a judge compares."""
    return list(names) if len(task["results"]) == len(names) else [" over ".join(names)]


def heads(names: Sequence[str], paper: bool = False) -> list[str]:
    """All heads of a table of figures."""
    return ["", *names, *(["difference"] if names[1:] else []), *([PAPER["name"]] if paper else []), "items"]


def glance(told: Told, names: Sequence[str]) -> Html:
    """The first figures of all tasks, and of those without one the reason."""
    rows, width = list[Html](), len(heads(names)) - 1
    for task in told["tasks"]:
        title = tag("b", task["title"])
        if task["state"] == "measured":
            rows += [line(task, name, names, joined([title, " ", label(name)])) for name in headlines(task)]
            continue
        words = tag("span", "failed: ", class_="failed") if task["state"] == "failed" else "not measured: "
        cell = tag("td", words, task["why"], class_="words", colspan=width)
        rows.append(tag("tr", tag("th", title, scope="row"), cell))
    return table(heads(names), rows, "At a glance")


def line(task: Told, name: str, names: Sequence[str], words: str, paper: bool = False) -> Html:
    """A row of a figure: each model, the difference, with `paper` what the paper states, the items."""
    told = [each["figures"].get(name) for each in task["results"]]
    told += [None] * (len(names) - len(told))  # a judge has one figure of two models
    share = is_share(name, [each for each in told if each])
    cells = [with_interval(each, share) for each in told]
    if names[1:]:
        cells.append(with_interval(task["difference"].get(name), share, apart=True))
    if paper:
        value = STATED.get((task["task"], name.strip()))
        cells.append(tag("td", "" if value is None else stated(value), class_="number"))
    items = next((f"{each['n']:,}" for each in told if each), "")
    cells = [tag("th", words, scope="row"), *cells, tag("td", items, class_="number")]
    return tag("tr", *cells, class_="part" if name.startswith(" ") else None)


def label(name: str) -> str:
    """A figure's name for people."""
    return LABELS.get(name.strip(), name.strip())


# ---------------------------------------------------------------- pictures


def others(tasks: Mapping[str, Told]) -> list[Picture]:
    """A picture of each task that is in none."""
    known = {panel.task for each in PICTURES for panel in each.panels}
    return [
        Picture(f"task-{name}", each["title"], "", (Panel(name, each["title"]),))
        for name, each in tasks.items()
        if name not in known
    ]


def drawable(panel: Panel, tasks: Mapping[str, Told]) -> list[str]:
    """The figures of a panel that were measured and are no less than 0."""
    if panel.task not in tasks:
        return []
    results = tasks[panel.task]["results"]
    wanted = panel.figures or [name for name in results[0]["figures"] if not name.startswith(" ")]
    return [
        name
        for name in wanted
        if all(name in each["figures"] and each["figures"][name]["low"] >= 0 for each in results)
    ]


def shown(picture: Picture, tasks: Mapping[str, Told], names: Sequence[str]) -> list[Html]:
    """What stands in a picture's section: charts, their figures in a table, and what there is to know of them."""
    seen = [each for each in picture.panels if each.task in tasks and (drawable(each, tasks) or states(each))]
    paper, judge = any(states(each) for each in seen), picture.id == "judge"
    figures, rows, own = list[Html](), list[Html](), columns(tasks[seen[0].task], names)
    for each in seen:
        task, there = tasks[each.task], drawable(each, tasks)
        caption = tag("figcaption", each.title, tag("span", each.about if there else "not measured here"))
        figures.append(tag("figure", caption, (judged if judge else grouped)(each, task, names)))
        listed = task["results"][0]["figures"] if judge else there
        if there and seen[1:]:
            head = tag("th", each.title, scope="colgroup", colspan=len(heads(own, paper)))
            rows.append(tag("tr", head, class_="group"))
        rows += [line(task, name, own, short(name), paper) for name in listed]
    notes = [
        tag("li", each) for name in dict.fromkeys(each.task for each in seen) for each in noted(tasks[name], names)
    ]
    numbers = table(heads(own, paper), rows, f"{picture.title}, in numbers")
    return [
        *([tag("p", picture.about)] if picture.about else []),
        legend(STACK if judge else tuple(zip(SERIES, names)), paper),
        *(
            [tag("div", *figures, class_="panels"), numbers]
            if seen[1:]
            else [tag("div", *figures, numbers, class_="beside")]
        ),
        *([tag("ul", *notes, class_="notes")] if notes else []),
    ]


def noted(task: Told, names: Sequence[str]) -> list[str]:
    """What a reader of a task's figures must know; what holds for one model alone begins with its name."""
    whose: dict[str, list[str]] = {}
    for name, each in zip(columns(task, names), task["results"], strict=True):
        for words in each["notes"]:
            whose.setdefault(words, []).append(name)
    every = len(task["results"])
    return [
        f"{task['title']}{f', {found[0]}' if len(found) < every else ''}: {words}" for words, found in whose.items()
    ]


def short(name: str) -> str:
    """A figure's name where its panel says the rest."""
    for rest in ("bits per byte, ", "search: ", "calculator: ", "solver: "):
        name = name.removeprefix(rest)
    return label(name)


def states(panel: Panel) -> bool:
    """Whether the paper's text states a value of a panel."""
    return any((panel.task, name.strip()) in STATED for name in panel.figures)


def grouped(panel: Panel, task: Told, names: Sequence[str]) -> Html:
    """The bars of a panel: a group a figure, in it each model and what the paper states."""
    groups, shares = list[tuple[str, list[Bar]]](), True
    for name in panel.figures or drawable(panel, {panel.task: task}):
        told = [(own, each["figures"].get(name)) for own, each in zip(names, task["results"], strict=True)]
        share = is_share(name, [figure for _, figure in told if figure])
        shares = shares and share
        mine = [
            Bar(series, own, figure["value"], number(figure["value"], share), figure["low"], figure["high"])
            for series, (own, figure) in zip(SERIES, told, strict=False)
            if figure
        ]
        if (value := STATED.get((panel.task, name))) is not None:
            mine.append(Bar("paper", PAPER["name"], value, stated(value)))
        if mine:
            groups.append((short(name), mine))
    return bars(panel.title, groups, shares, panel.mark)


def judged(panel: Panel, task: Told, names: Sequence[str]) -> Html:
    """Won, tied and lost of the pair; and of the paper's what it states."""
    figures = task["results"][0]["figures"]
    told = [(colour, name, figures[own]) for (colour, name), own in zip(STACK, panel.figures, strict=True)]
    shares = [Bar(colour, name, each["value"], number(each["value"], True)) for colour, name, each in told]
    lost = STATED["judge", "lost"]
    rest = Bar("paper", "won or tied", 1 - lost, f"{100 * (1 - lost):.2f} %")
    stack = [rest, Bar("theirs", "lost", lost, stated(lost))]
    return stacks(
        panel.title,
        [(f"{' over '.join(names)}", shares), (f"{PAPER['name']}: over gpt-3.5-turbo", stack)],
    )


def legend(series: Sequence[tuple[str, str]], paper: bool) -> Html:
    """Which colour is whose."""
    hatched = "won or tied, which the paper does not part" if series is STACK else PAPER["name"]
    shown = [*series, *([("paper", hatched)] if paper or series is STACK else [])]
    return tag("ul", *(tag("li", swatch(colour), tag("span", name)) for colour, name in shown), class_="legend")


def swatch(series: str) -> Html:
    """A spot of a colour."""
    return tag("span", class_=f"swatch {series}", aria_hidden="true")


# ---------------------------------------------------------------- tables


def of_paper() -> list[Html]:
    """The values that the paper states, and what that means."""
    words = (
        f"{PAPER['name']}: {PAPER['source']}. Its test sets were others, so its bars stand beside those of this page "
        "and are no ranking. Most of its results stand only in its pictures, as bars without numbers: they are not "
        "guessed here. These are stated in its text:"
    )
    rows = [
        tag("tr", tag("th", each["about"], scope="row"), *(tag("td", text, class_="number")
            for text in (f"{each['per_cent']} %", each["section"])))
        for each in PAPER["stated"]
    ]  # fmt: skip
    return [tag("p", words), table(["", "value", "section"], rows, "What the paper states")]


def how(told: Told, names: Sequence[str]) -> list[Html]:
    """Models, machine, and of each task its set, settings and rows."""
    facts = [f"{name}: {each['place']}, {each['runs']}" for name, each in zip(names, told["models"], strict=True)]
    facts.append(f"machine: {told['machine']}")
    rows = list[Html]()
    for task in told["tasks"]:
        if task["state"] != "measured":
            continue
        first = task["results"][0]
        set_ = task["set"] or "scripted"
        cells = [settings(first["settings"]), set_, "; ".join(each["rows"] for each in task["results"])]
        items = tag("td", f"{max(each['n'] for each in first['figures'].values()):,}", class_="number")
        words = [tag("td", each, class_="words") for each in cells]
        rows.append(tag("tr", tag("th", task["title"], scope="row"), *words, items))
    words = [tag("th", each, scope="col") for each in ("settings", "set", "rows")]
    place = table(["", *words, "items"], rows, "How it was measured")
    ways = (
        "Intervals are 95 % intervals over items. Rows hold what was asked and what came out, item by item; "
        "the same figures stand in results.json beside this page."
    )
    return [tag("ul", *(tag("li", each) for each in facts)), tag("p", ways), place]


def settings(told: Told) -> str:
    """Settings in words, without long texts such as templates."""
    lists = {name: ", ".join(map(str, each)) if isinstance(each, list) else str(each) for name, each in told.items()}
    return "; ".join(f"{name} {text}" for name, text in lists.items() if len(text) in SHORT)


def every(task: Told, names: Sequence[str]) -> Html:
    """All figures of a task, parts too."""
    own, figures = columns(task, names), task["results"][0]["figures"]
    rows = [line(task, name, own, label(name)) for name in figures]
    body = table(heads(own), rows, f"{task['title']}, all figures")
    return tag("details", tag("summary", f"{task['title']}: {len(figures):,} figures"), body)
