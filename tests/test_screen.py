"""The events of a turn on the screen: citations and their sources, whatever the pieces, and nothing that steers it."""

from __future__ import annotations

import io
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from moss.chat import Turn
from moss.screen import Citations, Screen
from moss.tools.run import Command, Done, Error, Event, Notice, Reply, Thoughts, ToolDone, ToolProgress, ToolStarted

FOUND = [{"number": number, "title": f"Page {number}", "url": f"https://x/{number}"} for number in (1, 2, 3)]
CITED = "Blue<sup><|1|></sup>, says <b>one</b> <su; <sup>th</sup> and\n<sup><|2|><|1|></sup> 3<4 <\n<sup><|9|></sup>\n<"
SHOWN = "Blue[1], says <b>one</b> <su; <sup>th</sup> and\n[2][1] 3<4 <\n[9]\n<"


def searched() -> list[Event]:
    """What comes before a reply that cites."""
    return [
        Command(0, "Search", ["sky"], 'Search("sky")'),
        ToolStarted(0, "Search"),
        ToolDone(0, "Search", True, "<|1|>: 'a'\n<|2|>: 'b'\n<|3|>: 'c'", "", 0.001, FOUND),
    ]


def shown(*events: Event, screen: Screen | None = None) -> str:
    """What the screen shows of a turn with these events."""
    screen = screen or Screen(Console(width=80, soft_wrap=True))
    file = screen.console.file = io.StringIO()
    try:
        for event in events:
            screen.show(event)
    finally:
        screen.end()
    return file.getvalue()


def replied(*pieces: str) -> str:
    """What stands on the screen after the tools, for a reply in these pieces."""
    text = shown(*searched(), *map(Reply, pieces), Done(Turn("q"), "stop"))
    return text.split(" ms\n", 1)[1]


def test_citations_are_short_and_their_sources_stand_below() -> None:
    """A reader wants [2] and where that is, not the marker; a source that is not cited is noise."""
    assert replied(CITED) == SHOWN + "\n[1] Page 1  https://x/1\n[2] Page 2  https://x/2\n"
    assert replied("No source.") == "No source.\n"


def test_every_split_shows_the_same() -> None:
    """Models write in pieces of any length: half a marker on the screen, or a lost line end, is a matter of luck."""
    whole = replied(CITED)
    for place in range(len(CITED) + 1):
        assert replied(CITED[:place], CITED[place:]) == whole
    for first, second in itertools.combinations(range(0, len(CITED), 3), 2):
        assert replied(CITED[:first], CITED[first:second], CITED[second:]) == whole
    assert replied(*CITED) == whole


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["<", "sup", ">", "<sup>", "<|", "1", "|>", "</sup>", "<|2|>", "\n", " ", "a", "你", "/"])
    ),
    st.lists(st.integers(0, 40)),
)
def test_any_text_in_any_pieces(words: list[str], cuts: list[int]) -> None:
    """The pieces add up to what the whole text gives, and nothing stays behind."""
    text = "".join(words)
    places = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    whole, split = Citations(), Citations()
    assert "".join([split.read(piece) for piece in pieces] + [split.read("", last=True)]) == whole.read(text, last=True)
    assert split.cited == whole.cited


def test_what_only_looks_like_a_citation_is_text() -> None:
    """A number of five thousand digits was an error in the middle of the reply."""
    for text in ("<sup><|" + "9" * 5000 + "|></sup>", "<sup>2</sup>", "<sup><|a|></sup>", "<sup></sup>", "<|1|>"):
        assert replied(text, " end") == text + " end\n"
    assert replied("<sup><|77|></sup>") == "[77]\n"  # there is no such source


def test_a_reply_that_is_stopped_leaves_nothing_to_the_next() -> None:
    """Ctrl-C in the middle of a citation: the next reply began with its rest, and cited pages of another question."""
    screen = Screen(Console(width=80, soft_wrap=True))
    assert shown(*searched(), Reply("Blue <sup><|1|"), screen=screen).endswith(" ms\nBlue \n")
    done = Done(Turn("q"), "stop")
    assert shown(Reply("Hello<sup><|1|></sup>"), done, screen=screen) == "Hello[1]\n"
    assert shown(*searched(), Error("it broke"), screen=screen).endswith(" ms\nit broke\n")
    assert shown(Reply("Again<sup><|2|></sup>"), done, screen=screen) == "Again[2]\n"


def test_sources_of_two_rounds() -> None:
    """Their numbers go on through the turn; each is listed once, in the order in which the reply names them."""
    more = [{"number": 4, "title": "Page 4", "url": "https://x/4"}]
    second = [Command(1, "Search", ["x"], 'Search("x")'), ToolDone(1, "Search", True, "<|4|>: 'd'", "", 0.001, more)]
    reply = Reply("a<sup><|4|></sup> b<sup><|2|></sup> c<sup><|4|></sup>")
    text = shown(*searched(), *second, reply, Done(Turn("q"), "stop"))
    assert text.endswith("\na[4] b[2] c[4]\n[4] Page 4  https://x/4\n[2] Page 2  https://x/2\n")


def test_progress_and_odd_text_stay_in_their_place() -> None:
    """Titles, progress and results come from outside: markup, escape sequences and blanks before a text."""
    odd = [{"number": 1, "title": "[red]x\x1b[2J", "url": "[/red]"}]
    text = shown(
        Thoughts("  "),
        Thoughts(" \n think"),
        Command(0, "Search", ["x"], 'Search("[b]\nx\x07")'),
        ToolStarted(0, "Search"),
        ToolProgress(0, "Search", "[red]reading\x1b[2J"),
        ToolDone(0, "Search", True, "<|1|>: 'a'", "", 0.001, odd),
        Reply("\u3000"),
        Reply("\u3000天<sup><|1|></sup>"),
        Notice("[b]told"),
        Done(Turn("q"), "stop"),
    )
    assert text == ("think\nSearch(\"[b] x␇\") => <|1|>: 'a'  1 ms\n天[1]\n[b]told\n[1] [red]x␛[2J  [/red]\n")


@pytest.mark.parametrize("event", [ToolDone(5, "Search", False, error="no [b]such[/b]"), ToolProgress(0, "S", "x")])
def test_events_without_their_command(event: Event) -> None:
    """A program may show the events of a turn from its middle on."""
    if isinstance(event, ToolDone):
        assert shown(event) == "Search has no result: no [b]such[/b]  0 ms\n"
    else:
        assert shown(event) == ""
