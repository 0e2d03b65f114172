"""The chat format: what a conversation is, how it becomes token ids, and how ids become a conversation again.

A conversation is a meta instruction, tool switches and turns; a turn is Human, up to four rounds of (Inner
Thoughts, Commands, Results), then MOSS:

    {meta instruction}
    Capabilities and tools that MOSS can possess.
    - Inner thoughts: enabled.
    - Calculator: enabled. API: Calculate(expression)
    - ...: disabled.
    <|Human|>: ...<eoh>
    <|Inner Thoughts|>: ...<eot>
    <|Commands|>: Calculate("7*11")<eoc>
    <|Results|>:
    Calculate("7*11") => 77
    <eor>
    <|MOSS|>: ...<eom>

`render` goes segment by segment: code writes the markers, every text is encoded alone as ordinary text, so no text
can ever become a marker and no flat transcript is tokenised again. A prompt (`until=`) ends where a segment ends, so
the model always continues from ids that it has also seen in training. `parse` and `StreamParser` go the other way.
Everything uses this one file; it knows nothing of the tools themselves (switch lines come from the caller).

    ids, mask = render(dialog, tok, loss="assistant")        # a training row
    prompt, _ = render(dialog, tok, until="thoughts")        # let the model think and command
    parser = StreamParser(tok, section="thoughts"); parser.feed(new_ids)  # [("thoughts", "add the"), ...]
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

from moss.tokenizer import Tokenizer

META_INSTRUCTION = (
    "You are MOSS, an AI assistant. Answer in the user's language, such as English or 中文. "
    "Be helpful, honest and harmless, and use only the tools that are enabled."
)
CAPABILITIES = "Capabilities and tools that MOSS can possess.\n"
QUALITIES = (0, 20, 40, 60, 80, 100)  # levels of the preference tag
MAX_ROUNDS = 4
NONE = "None"  # what stands in thoughts, commands and results that are not used
EDGE = " \t\r\n"  # whitespace that counts as a section's edge, not as its text

# section -> (opening marker, end marker), in the order of a turn
SECTIONS = {
    "human": ("<|Human|>", "<eoh>"),
    "thoughts": ("<|Inner Thoughts|>", "<eot>"),
    "commands": ("<|Commands|>", "<eoc>"),
    "results": ("<|Results|>", "<eor>"),
    "reply": ("<|MOSS|>", "<eom>"),
}

Loss = Literal["assistant", "paper"]
Until = Literal["thoughts", "results", "reply"]
Form = Literal["plugin", "sft", "base"]


@dataclass(frozen=True)
class Switch:
    """A tool's line in the prompt: `- {label}: enabled. API: {api}`."""

    label: str
    api: str


SWITCHES: dict[str, Switch] = {
    "search": Switch("Web search", "Search(query)"),
    "calculator": Switch("Calculator", "Calculate(expression)"),
    "solver": Switch("Equation solver", "Solve(equation)"),
    "text2img": Switch("Text-to-image", "Text2Image(description)"),
    "edit": Switch("Image edition", "EditImage(image, description)"),
    "speech": Switch("Text-to-speech", "Text2Speech(text)"),
}


@dataclass
class Round:
    """One round of thinking and acting: texts without markers and edge whitespace, `None` where unused."""

    thoughts: str = NONE
    commands: str = NONE
    results: str = NONE


@dataclass
class Turn:
    """A question and its answer. No rounds means one round of `None`s.

    `edges` keeps whitespace at section edges that differs from the standard (`edge_whitespace`), so that foreign
    data survives byte for byte: `{"human.right": " ", "results 2.left": "\\n"}`. Only parsers and converters fill it.
    """

    human: str
    rounds: list[Round] = field(default_factory=list)
    reply: str = ""
    quality: int | None = None
    edges: dict[str, str] = field(default_factory=dict)


@dataclass
class Dialog:
    """A conversation. `switches` maps `thoughts` and the keys of `SWITCHES` to on or off; an empty dict means that
    the prompt has no list of capabilities at all. `extra` holds a data row's other fields (id, category) untouched."""

    meta: str
    switches: dict[str, bool]
    turns: list[Turn]
    extra: dict[str, Any] = field(default_factory=dict)


class TooLong(ValueError):
    """A conversation of which not even one turn fits the length."""


# -- ids from a conversation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Ids, and who learns them: `own` where the model says them itself, `paper` where the released trainer did."""

    ids: Sequence[int]
    own: bool
    paper: bool


def render(
    dialog: Dialog,
    tok: Tokenizer,
    *,
    loss: Loss | None = None,
    max_length: int | None = None,
    until: Until | None = None,
    switches: Mapping[str, Switch] = SWITCHES,
    form: Form = "plugin",
) -> tuple[list[int], list[int]]:
    """A conversation as (ids, mask), of equal length; mask 1 marks ids that are learnt as targets.

    `loss`: `assistant` learns what the model itself says: thoughts, commands, reply with their end markers, the
    opening of Commands (one pass writes both) and the choice that follows `<eor>`; `paper` learns everything but the
    meta instruction and the contents of Results; None nothing. The quality tag is never learnt, nor is a turn in which
    the model says nothing, or a reply that is empty.
    `until` cuts a prompt in the last turn, whatever stands there after the cut: `thoughts` ends with the opening
    `<|Inner Thoughts|>:` after the question, `results` after the last round's `<eor>`, where the model chooses its next
    marker, `reply` with the opening `<|MOSS|>:` and the quality tag if one is set.
    `max_length`: whole turns that do not fit are dropped from the end; `TooLong` if the first, or a prompt, does not.
    `form`: `plugin` as above; `sft` without switches, thoughts, commands and results; `base` plain text alone.
    `switches` gives the lines of the tools, where they differ from the standard six.
    """
    if loss not in (None, "assistant", "paper"):
        raise ValueError(f"loss {loss!r} is none of assistant, paper")
    head, turns = _pieces(dialog, tok, until, switches, form)
    kept, length = 0, _length(head)
    for turn in turns:
        length += _length(turn)
        if max_length is not None and length > max_length:
            if until or not kept:
                what = f"the prompt for {until!r}" if until else "the first turn"
                raise TooLong(f"{what} takes {length} tokens and does not fit max_length {max_length}")
            break
        kept += 1
    ids: list[int] = []
    mask: list[int] = []
    said = [_says(turn) for turn in dialog.turns[:kept]]
    for spoken, pieces in ((False, head), *zip(said, turns)):
        for piece in pieces:
            learnt = spoken and loss is not None and (piece.own if loss == "assistant" else piece.paper)
            ids.extend(piece.ids)
            mask.extend([int(learnt)] * len(piece.ids))
    if loss is not None and 1 not in mask:
        raise ValueError("nothing in this row is learnt; it has no thoughts, commands or reply")
    return ids, mask


def trim(
    dialog: Dialog,
    tok: Tokenizer,
    max_length: int,
    *,
    until: Until = "thoughts",
    switches: Mapping[str, Switch] = SWITCHES,
    form: Form = "plugin",
) -> tuple[Dialog, int]:
    """Drop the oldest whole turns where the prompt exceeds `max_length` tokens; returns (dialog, turns dropped).

    They go in steps of about half of the room, which end where the lengths of the old turns alone put them: so a
    conversation that grows begins at the same turn until it is full again, and the cache knows that beginning, be it
    trimmed from the whole or from what was left the last time. They go one by one, and the steps begin anew, where the
    last turn alone takes more than half. It and the meta instruction always stay; `TooLong` if these do not fit.
    """
    head, turns = _pieces(dialog, tok, until, switches, form)
    tails = list(accumulate(_length(turn) for turn in reversed(turns)))[::-1]  # tokens from each turn to the end
    room, last = max_length - _length(head), len(turns) - 1
    if tails[last] > room:
        total = _length(head) + tails[last]
        tools = any(on for key, on in dialog.switches.items() if key != "thoughts")
        mend = "shorten them, or switch tools off" if tools else "shorten them"
        raise TooLong(f"question and meta instruction take {total} tokens, {max_length} are left: {mend}")
    cut, step = 0, room // 2 if tails[last] <= room // 2 else 0
    while (before := tails[cut]) > room:
        cut += 1
        while cut < last and before - tails[cut + 1] <= step:
            cut += 1
    return (replace(dialog, turns=dialog.turns[cut:]) if cut else dialog), cut


def _says(turn: Turn) -> bool:
    """Whether the model says anything in a turn: a question without an answer would teach it to answer nothing."""
    texts = (text for item in turn.rounds for text in (item.thoughts, item.commands))
    return bool(turn.reply.strip()) or any(text.strip() not in ("", NONE) for text in texts)


def _length(pieces: Iterable[_Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _pieces(
    dialog: Dialog, tok: Tokenizer, until: Until | None, switches: Mapping[str, Switch], form: Form
) -> tuple[list[_Piece], list[list[_Piece]]]:
    """What stands before the first turn, and each turn."""
    if not dialog.turns:
        raise ValueError("a conversation without turns cannot be rendered")
    if until not in (None, "thoughts", "results", "reply"):
        raise ValueError(f"until {until!r} is none of thoughts, results, reply")
    last = len(dialog.turns) - 1
    if form == "base":
        return [], [list(_plain_turn(t, tok, i == 0, bool(until) and i == last)) for i, t in enumerate(dialog.turns)]
    if form not in ("plugin", "sft"):
        raise ValueError(f"form {form!r} is none of plugin, sft, base")
    write = _plugin_turn if form == "plugin" else _sft_turn
    meta = instruction(dialog if form == "plugin" else replace(dialog, switches={}), switches)
    head = [_Piece(tok.encode_again(meta), False, False)] if meta else []
    return head, [list(write(turn, tok, until if i == last else None)) for i, turn in enumerate(dialog.turns)]


def instruction(dialog: Dialog, switches: Mapping[str, Switch] = SWITCHES) -> str:
    """What stands before the first turn: the meta instruction and the list of what the model may use."""
    on = dialog.switches
    strange = [key for key in on if key != "thoughts" and key not in switches]
    if strange:
        raise ValueError(f"unknown switch {strange[0]!r}; known are thoughts, {', '.join(switches)}")
    meta = dialog.meta + "\n" if dialog.meta else ""
    if not on:
        return meta
    lines = [f"- Inner thoughts: {'enabled' if on.get('thoughts') else 'disabled'}."]
    for key, switch in switches.items():
        lines.append(f"- {switch.label}: " + (f"enabled. API: {switch.api}" if on.get(key) else "disabled."))
    return meta + CAPABILITIES + "\n".join(lines) + "\n"


def edge_whitespace(section: str, text: str, unused_round: bool = False) -> tuple[str, str]:
    """The whitespace before and after a section's text, as the released data have it.

    A blank before; results of calls stand on lines of their own, unless the whole round is `None` or the result is a
    bare sentence (as of an image tool).
    """
    if section == "results" and not unused_round and (text == NONE or "=>" in text):
        return "\n", "\n"
    return " ", ""


def _edges(turn: Turn, section: str, k: int = 0) -> tuple[str, str]:
    """The edges of a section of `turn`, in its round `k` (from 0)."""
    name, text, unused = section, "", False
    if section in ("thoughts", "commands", "results") and turn.rounds:
        name = section if k == 0 else f"{section} {k + 1}"
        text, unused = getattr(turn.rounds[k], section), turn.rounds[k] == Round()
    elif section == "results":
        text, unused = NONE, True
    left, right = edge_whitespace(section, text, unused)
    return turn.edges.get(f"{name}.left", left), turn.edges.get(f"{name}.right", right)


def _plugin_turn(turn: Turn, tok: Tokenizer, until: Until | None) -> Iterator[_Piece]:
    """A turn with all its sections, or up to the cut `until`."""
    rounds = turn.rounds or [Round()]
    if len(rounds) > MAX_ROUNDS:
        raise ValueError(f"a turn has at most {MAX_ROUNDS} rounds; this one has {len(rounds)}")
    yield from _human(turn, tok)
    if until == "thoughts":
        yield _Piece(tok.opening("<|Inner Thoughts|>"), False, True)
        return
    newline = tok.encode_again("\n")
    for k, item in enumerate(rounds):
        own = {"thoughts": k > 0, "commands": True, "results": False}  # who writes the opening
        for section in ("thoughts", "commands", "results"):
            role, end = SECTIONS[section]
            learnt = section != "results"
            text = getattr(item, section)
            left, right = _edges(turn, section, k)
            body = left + (text if learnt else tok.guard(text)) + right
            yield _Piece(tok.opening(role), own[section], True)
            yield _Piece(tok.encode_again(body) if text == NONE else tok.encode(body), learnt, learnt)
            yield _Piece(tok.marker(end), learnt, True)
            yield _Piece(newline, section == "thoughts", True)
    if until != "results":
        yield from _reply(turn, tok, chosen=True, cut=until is not None)


def _sft_turn(turn: Turn, tok: Tokenizer, until: Until | None) -> Iterator[_Piece]:
    """A turn of question and reply alone."""
    yield from _human(turn, tok)
    yield from _reply(turn, tok, chosen=False, cut=until is not None)


def _plain_turn(turn: Turn, tok: Tokenizer, first: bool, cut: bool) -> Iterator[_Piece]:
    """A turn as bare lines of text."""
    yield _Piece(tok.encode(("" if first else "\n") + tok.guard(turn.human)), False, True)
    if not cut:
        yield _Piece(tok.encode("\n" + turn.reply), True, True)


def _human(turn: Turn, tok: Tokenizer) -> Iterator[_Piece]:
    left, right = _edges(turn, "human")
    yield _Piece(tok.opening("<|Human|>"), False, True)
    yield _Piece(tok.encode(left + tok.guard(turn.human) + right), False, True)
    yield _Piece([*tok.marker("<eoh>"), *tok.encode_again("\n")], False, True)


def _reply(turn: Turn, tok: Tokenizer, chosen: bool, cut: bool) -> Iterator[_Piece]:
    """The reply; `chosen` where the model picked its marker, `cut` to stop before the text."""
    told = bool(turn.reply.strip())
    yield _Piece(tok.opening("<|MOSS|>"), chosen and told, told)
    if turn.quality is not None:
        if turn.quality not in QUALITIES:
            raise ValueError(f"quality {turn.quality} is none of {', '.join(map(str, QUALITIES))}")
        yield _Piece(tok.encode_again(f" <quality: {turn.quality}>"), False, False)
    if cut:
        return
    left, right = _edges(turn, "reply")
    yield _Piece(tok.encode(left + turn.reply + right), told, told)
    yield _Piece(tok.marker("<eom>"), told, told)
    yield _Piece(tok.encode_again("\n"), False, told)


# -- a conversation from ids -----------------------------------------------------------------------------------------

_TAG = re.compile(r"<quality: (" + "|".join(map(str, QUALITIES)) + r")>")
_TAGS = tuple(f"<quality: {level}>" for level in QUALITIES)
_ROLE_TEXT = re.compile("(" + "|".join(re.escape(role) for role, _ in SECTIONS.values()) + "):?")
_SECTION_OF_ROLE = {role: section for section, (role, _) in SECTIONS.items()}


class _Section:
    """One section while it is read: text is released as soon as it can be neither edge, tag nor half a character."""

    def __init__(self, name: str, colon: bool) -> None:
        self.name = name
        self.text = self.left = self.right = ""
        self.quality: int | None = None
        self._colon = colon  # whether the opening's colon is still to come
        self._started = False
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes, *, end: bool = False) -> str:
        """Take bytes; `end` when the end marker came. Returns what is now sure to be text."""
        text = self._held + self._decoder.decode(data, end)
        if self._colon and text:
            text, self._colon = text.removeprefix(":"), False
        self._held = text
        if not self._started and not self._start(end):
            return ""
        body = self._held.rstrip(EDGE)
        self._held = self._held[len(body) :]
        self.text += body
        return body

    def close(self, *, end: bool) -> str:
        """The section is over, by its end marker or (`end` False) because the ids stop here."""
        text = self.feed(b"", end=end)
        if self._started:
            self.right = self._held
        elif not self._held.strip(EDGE):
            self.left = self._held
        return text

    def _start(self, end: bool) -> bool:
        """Take the left edge and the quality tag off what is held; False while more must come to know."""
        text = self._held.lstrip(EDGE)
        if not text:
            return False
        if self.name == "reply" and self.quality is None:
            tag = _TAG.match(text)
            if tag:
                self.quality = int(tag.group(1))
                self._held = text[tag.end() :]
                return self._start(end)
            if not end and any(t.startswith(text) for t in _TAGS):
                return False
        self.left = self._held[: len(self._held) - len(text)]
        self._held, self._started = text, True
        return True


class StreamParser:
    """Reads ids as they come; `feed` returns (section, text) pieces, sections being the keys of `SECTIONS`.

    The pieces of a section add up to what `parse` gives, however the ids are split: never half a character or marker,
    no whitespace of a section's edges, no quality tag, no colon of an opening. Only ids open and end sections; where
    the vocabulary has no ids for roles (the released one) their text opens one, but never inside another.
    `section` names the one that the ids begin in: `thoughts` after a prompt `until="thoughts"`, `reply` after
    `until="reply"`; None where a marker comes first (after `until="results"`, or for a whole conversation).
    """

    def __init__(self, tok: Tokenizer, section: str | None = None) -> None:
        if section is not None and section not in SECTIONS:
            raise ValueError(f"section {section!r} is none of {', '.join(SECTIONS)}")
        self.sections: list[_Section] = []
        self._tok = tok
        self._current = self._open(section, colon=False) if section else None
        self._roles = {tok.marker(role)[0]: name for name, (role, _) in SECTIONS.items()} if tok.single_roles else {}
        self._ends = frozenset(tok.marker(end)[0] for _, end in SECTIONS.values())
        self._between = b""  # what came after an end marker, where roles are text

    def feed(self, ids: Iterable[int]) -> list[tuple[str, str]]:
        """Take more ids; returns the text that they complete."""
        out: list[tuple[str, str]] = []
        pending: list[int] = []  # ordinary ids not yet given to the current section
        for i in ids:
            if i in self._roles or i in self._ends:
                self._text(pending, out)
                self._close(out)
                if i in self._roles:
                    self._current = self._open(self._roles[i], colon=True)
            elif i not in self._tok.control_ids:
                pending.append(i)
                if self._current is None and not self._roles:  # each id may complete a role's text
                    self._text(pending, out)
        self._text(pending, out)
        return out

    def close(self) -> list[tuple[str, str]]:
        """The ids stop here. Returns nothing new in a finished conversation."""
        out: list[tuple[str, str]] = []
        self._close(out, end=False)
        return out

    def _text(self, pending: list[int], out: list[tuple[str, str]]) -> None:
        data = self._tok.decode_bytes(pending)
        pending.clear()
        if self._current is not None:
            _say(out, self._current.name, self._current.feed(data))
        elif not self._roles:
            self._between += data
            match = _ROLE_TEXT.search(self._between.decode("utf-8", errors="replace"))
            if match:
                self._current = self._open(_SECTION_OF_ROLE[match.group(1)], colon=not match.group().endswith(":"))

    def _open(self, name: str, colon: bool) -> _Section:
        self.sections.append(_Section(name, colon))
        return self.sections[-1]

    def _close(self, out: list[tuple[str, str]], *, end: bool = True) -> None:
        if self._current is not None:
            _say(out, self._current.name, self._current.close(end=end))
        self._current, self._between = None, b""


def _say(out: list[tuple[str, str]], section: str, text: str) -> None:
    if text and out and out[-1][0] == section:
        out[-1] = (section, out[-1][1] + text)
    elif text:
        out.append((section, text))


def parse(ids: Iterable[int], tok: Tokenizer, *, section: str | None = None) -> Turn:
    """The turn that `ids` spell, the last one if they hold several: the inverse of `render`.

    `section` as in `StreamParser`, for ids that a model wrote after a prompt: what the prompt held is then empty.
    """
    turns = parse_turns(ids, tok, section=section)
    if not turns:
        raise ValueError("these ids hold no section of a conversation")
    return turns[-1]


def parse_turns(ids: Iterable[int], tok: Tokenizer, *, section: str | None = None) -> list[Turn]:
    """Every turn of a rendered conversation."""
    parser = StreamParser(tok, section)
    parser.feed(ids)
    parser.close()
    turns: list[Turn] = []
    filled: set[str] = set()  # sections seen in the current round
    for part in parser.sections:
        if part.name == "human" or not turns:
            turns.append(Turn(""))
            filled = set()
        turn = turns[-1]
        if part.name in ("thoughts", "commands", "results"):
            if not turn.rounds or part.name in filled or (part.name == "thoughts" and filled):
                turn.rounds.append(Round())
                filled = set()
            filled.add(part.name)
            setattr(turn.rounds[-1], part.name, part.text)
        else:
            setattr(turn, part.name, part.text)
            turn.quality = part.quality if part.name == "reply" else turn.quality
        _keep_edges(turn, part)
    return turns


def _keep_edges(turn: Turn, part: _Section) -> None:
    """Note the edges of a section that are not the standard ones."""
    k = max(len(turn.rounds) - 1, 0)
    unused = part.name == "results" and turn.rounds[k] == Round()
    name = f"{part.name} {k + 1}" if k and part.name in ("thoughts", "commands", "results") else part.name
    for side, found, standard in zip(
        ("left", "right"), (part.left, part.right), edge_whitespace(part.name, part.text, unused), strict=True
    ):
        if found != standard:
            turn.edges[f"{name}.{side}"] = found
