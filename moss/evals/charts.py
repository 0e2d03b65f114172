"""Charts as inline SVG, and the markup that they are made of: text becomes markup in `tag` alone, which escapes it.

    bars("MMLU", [("all questions", [Bar("ours", "moss-nano", 0.25, "25.0 %", 0.21, 0.29)])], share=True)

Lengths are in units of the chart, which is as wide as its place; colours are classes of page.css.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from moss.errors import plain

# ---------------------------------------------------------------- markup


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, *inside: str, **attributes: object) -> Html:
    """An element; attributes are escaped, and what is inside where it is no `Html`. `class_` is class; None is left
    out."""
    own = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(plain(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{own}>{joined(inside)}</{name}>")


def joined(parts: Sequence[str] | Iterator[str]) -> Html:
    """Several of them in a row."""
    return Html("".join(each if isinstance(each, Html) else escape(plain(each)) for each in parts))


# ---------------------------------------------------------------- charts

WIDTH, PLOT = 320.0, 252.0  # of a chart, and of its bars, in units of its own; the rest of a line is for numbers
FITS = 42  # Latin characters of a label in a line
BAR, GAP, LABEL = 14.0, 5.0, 20.0  # heights of a bar, of the room below it, of the line above a group


class Bar(NamedTuple):
    """A bar of a series, with an interval or without; `text` stands beside it."""

    series: str
    name: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


def ceiling(value: float) -> float:
    """The end of a scale on which a value stands: 1, 2, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def bars(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], share: bool, mark: float | None = None) -> Html:
    """A chart of bars in groups, one below the other: whiskers are intervals, numbers stand at the right."""
    highest = max((max(bar.value, bar.high or 0.0) for _, each in groups for bar in each), default=1.0)
    top = 1.0 if share else ceiling(highest)
    height = sum(LABEL + len(each) * (BAR + GAP) + GAP for _, each in groups)
    parts: list[Html] = []
    for at in range(5):
        x = PLOT * at / 4
        words = f"{25 * at} %" if share else f"{top * at / 4:g}"
        anchor = "start" if at == 0 else "middle"
        parts.append(tag("line", class_="grid", x1=x, x2=x, y1=0, y2=height))
        parts.append(tag("text", words, class_="tick", x=x, y=height + 14, text_anchor=anchor))
    y = 0.0
    for label, each in groups:
        parts.append(tag("text", cut(label, FITS), tag("title", label), x=0, y=y + 15))
        y += LABEL
        for bar in each:
            parts.append(drawn(bar, y, PLOT / top))
            y += BAR + GAP
        if mark is not None:
            begun = y - len(each) * (BAR + GAP) - 2
            parts.append(tag("line", class_="mark", x1=PLOT * mark / top, x2=PLOT * mark / top, y1=begun, y2=y - 2))
        y += GAP
    said = "; ".join(f"{label}: {', '.join(f'{bar.name} {bar.text}' for bar in each)}" for label, each in groups)
    return chart(title, said, height + 18, parts)


def drawn(bar: Bar, y: float, scale: float) -> Html:
    """A bar at a height, its whisker and its number."""
    parts = [tag("rect", class_=f"bar {bar.series}", x=0, y=y, width=round(bar.value * scale, 3), height=BAR)]
    if bar.low is not None and bar.high is not None:
        low, high, middle = bar.low * scale, bar.high * scale, y + BAR / 2
        path = (
            f"M{low:.2f} {middle - 4}V{middle + 4}M{low:.2f} {middle}H{high:.2f}M{high:.2f} {middle - 4}V{middle + 4}"
        )
        parts.append(tag("path", class_="whisker", d=path))
    parts.append(tag("text", bar.text, class_="value", x=WIDTH, y=y + BAR - 3, text_anchor="end"))
    return tag("g", tag("title", f"{bar.name}: {bar.text}"), *parts)


def stacks(title: str, rows: Sequence[tuple[str, Sequence[Bar]]]) -> Html:
    """A chart of whole bars, each cut into its shares; the numbers stand below it."""
    parts: list[Html] = []
    y, said = 0.0, list[str]()
    for label, shares in rows:
        parts.append(tag("text", cut(label, FITS), tag("title", label), x=0, y=y + 15))
        x = 0.0
        for bar in shares:
            width = bar.value * WIDTH
            rect = tag("rect", class_=f"bar {bar.series}", x=round(x, 3), y=y + LABEL, width=round(width, 3), height=22)
            parts.append(tag("g", tag("title", f"{bar.name}: {bar.text}"), rect))
            x += width
        words = " · ".join(f"{bar.name} {bar.text}" for bar in shares)
        parts.append(tag("text", words, class_="value", x=0, y=y + LABEL + 38))
        said.append(f"{label}: {words}")
        y += LABEL + 56
    return chart(title, "; ".join(said), y - 8, parts)


def chart(title: str, said: str, height: float, parts: Sequence[Html]) -> Html:
    """An inline SVG that says in words what it shows."""
    inside = [tag("title", title), tag("desc", said), *parts]
    return tag("svg", *inside, class_="chart", viewBox=f"0 0 {WIDTH:g} {height:g}", role="img")


def cut(text: str, width: int) -> str:
    """The text as far as it fits, a Chinese character as wide as two Latin ones."""
    wide = [2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text]
    if sum(wide) <= width:
        return text
    keep = next(at for at in range(len(text)) if sum(wide[: at + 1]) > width - 1)
    return text[:keep].rstrip() + "…"


HATCH = tag(  # what the bars of the paper are filled with; once in a page
    "svg",
    tag("pattern", tag("path", d="M0 0V5"), id="hatch", width=5, height=5, patternUnits="userSpaceOnUse",
        patternTransform="rotate(45)"),
    class_="defs", width=0, height=0, aria_hidden="true",
)  # fmt: skip
