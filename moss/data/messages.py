"""OpenAI messages and ShareGPT rows from conversations, and back, without loss.

`openai`: `messages` with `tool_calls`, results as role `tool`, thoughts in `reasoning_content`, switched-on tools in
`tools`. `sharegpt`: `conversations` of `from` and `value`, with `thoughts`, `function_call` (the Commands text) and
`observation` (the Results text) between `human` and `gpt`. What these cannot say goes into the side field `moss`, and
only that: switches, quality tag, edge whitespace, and of a Commands text whatever is no call or is written in an
unusual way. `None` sections are left out. Used through `moss.data.dialogs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moss.chat import NONE, QUALITIES, SWITCHES, Dialog, Round, Turn
from moss.tools.calls import Call, parse_commands

Row = dict[str, Any]
SIDE = "moss"
_ROUND_SECTIONS = ("thoughts", "commands", "results")


def text_of(value: Any, what: str) -> str:
    """`value`, which must be text."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {json.dumps(value)[:60]}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{what} must be a list of objects")
    return value


def suffix(k: int) -> str:
    """How keys of round `k` (from 0) end: nothing, then ` 2`, ` 3`, ` 4`."""
    return f" {k + 1}" if k else ""


# -- commands and results as calls -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Calls:
    """A Commands text as calls: `between` is the text around the names and arguments where it is not the usual one,
    `bare` says that quotes inside arguments stand without a backslash."""

    calls: list[Call]
    between: list[str] | None = None
    bare: bool = False


def _split_calls(text: str) -> _Calls | None:
    """Take a Commands text apart so that `_join_calls` gives it again; None where that cannot be done."""
    calls = [call for call in parse_commands(text) if not call.error]
    for bare in (False, True):
        between, position = [], 0
        for token in _tokens(calls, bare):
            found = text.find(token, position)
            if found < 0:
                break
            between.append(text[position:found])
            position = found + len(token)
        else:
            between.append(text[position:])
            usual = between == _usual_between(calls)
            split = _Calls(calls, None if usual else between, bare and any('"' in arg for c in calls for arg in c.args))
            if calls and _join_calls(split) == text:
                return split
    return None


def _join_calls(split: _Calls) -> str:
    tokens, between = _tokens(split.calls, split.bare), _around(split)
    return between[0] + "".join(token + piece for token, piece in zip(tokens, between[1:], strict=True))


def _written(split: _Calls) -> list[str]:
    """Each call as it stands in the Commands text, `Name("argument")`."""
    tokens, between = _tokens(split.calls, split.bare), _around(split)[1:]
    texts, position = [], 0
    for call in split.calls:
        end = position + 1 + len(call.args)
        text = "".join(t + piece for t, piece in zip(tokens[position:end], between[position:end], strict=True))
        rest = between[end - 1]
        texts.append(text[: len(text) - len(rest) + rest.find(")") + 1])
        position = end
    return texts


def _around(split: _Calls) -> list[str]:
    """The text before, between and after all names and arguments."""
    between = _usual_between(split.calls) if split.between is None else _texts(split.between, "between")
    num_tokens = sum(1 + len(call.args) for call in split.calls)
    if len(between) != num_tokens + 1:
        raise ValueError(f"{SIDE}: {len(between)} pieces of command text do not fit {num_tokens} names and arguments")
    return between


def _tokens(calls: Sequence[Call], bare: bool) -> list[str]:
    """Names and arguments as they are written."""
    return [t for c in calls for t in (c.name, *(arg if bare else arg.replace('"', '\\"') for arg in c.args))]


def _usual_between(calls: Sequence[Call]) -> list[str]:
    """The text around names and arguments in `A("x"), B("y", "z")`."""
    pieces = [""]
    for i, call in enumerate(calls):
        if i:
            pieces[-1] += ", "
        pieces += ['("'] + ['", "'] * (len(call.args) - 1) + ['")'] if call.args else ["()"]
    return pieces


def _split_results(split: _Calls, results: str) -> tuple[list[str], list[str] | Literal["whole"] | None]:
    """What each call gave, and how the results are put together: None in the usual way, a list of the whitespace
    behind each `=>`, or `whole` where they are one text for all calls."""
    parts, rest = [], results
    for i, written in enumerate(_written(split)):
        head = ("\n" if i else "") + written + " =>"
        at = rest.find(head)
        if at < 0 or (at and not i):
            return [results] + [""] * (len(split.calls) - 1), "whole"
        if i:
            parts[-1] = rest[:at]
        rest = rest[at + len(head) :]
        parts.append(rest)
    blanks = [part[:1] if part[:1] in (" ", "\n") else "" for part in parts]
    contents = [part[len(blank) :] for part, blank in zip(parts, blanks, strict=True)]
    return contents, None if blanks == _usual_blanks(split) else blanks


def _join_results(split: _Calls, contents: Sequence[str], blanks: Any) -> str:
    written = _written(split)
    if len(contents) != len(written):
        raise ValueError(f"{len(written)} tool calls have {len(contents)} tool messages; there must be one for each")
    if blanks == "whole":
        return contents[0]
    blanks = _usual_blanks(split) if blanks is None else _texts(blanks, "results")
    return "\n".join(f"{call} =>{blank}{text}" for call, blank, text in zip(written, blanks, contents, strict=True))


def _usual_blanks(split: _Calls) -> list[str]:
    """A calculation's value stands on the line of its call, other results below it."""
    return [" " if call.name == "Calculate" else "\n" for call in split.calls]


def _parameters(name: str) -> list[str]:
    """The argument names of a standard tool, from its API line."""
    for switch in SWITCHES.values():
        api, _, arguments = switch.api.partition("(")
        if api == name:
            return arguments.rstrip(")").split(", ")
    return []


# -- OpenAI messages -------------------------------------------------------------------------------------------------


def to_openai(dialog: Dialog) -> Row:
    """A row of OpenAI messages, as chat fine-tuning reads them."""
    messages: list[Row] = [{"role": "system", "content": dialog.meta}] if dialog.meta else []
    sides: dict[str, Row] = {}
    for i, turn in enumerate(dialog.turns, 1):
        side = _turn_side(turn)
        messages += _openai_turn(turn, side, sum(len(m.get("tool_calls", ())) for m in messages))
        if side:
            sides[f"turn_{i}"] = side
    row: Row = {"messages": messages}
    on = [key for key in SWITCHES if dialog.switches.get(key)]
    if on and "tools" not in dialog.extra:
        row["tools"] = [_schema(key) for key in on]
    switches = {"thoughts": bool(dialog.switches.get("thoughts"))} if dialog.switches else {}
    return _with_side(row, switches, sides, dialog.extra)


def _openai_turn(turn: Turn, side: Row, number: int) -> Iterator[Row]:
    """The messages of a turn; `number` is that of the calls before it."""
    yield {"role": "user", "content": turn.human}
    pending: Row = {}  # thoughts of a round without calls, said with the reply
    for k, item in enumerate(turn.rounds):
        if pending:
            yield {"role": "assistant", "content": None, **pending}
        thoughts = {"reasoning_content": item.thoughts} if item.thoughts != NONE or len(turn.rounds) > 1 else {}
        split = _split_calls(item.commands)
        if split is None:
            pending = thoughts
            for section in ("commands", "results"):
                if getattr(item, section) != NONE:
                    side[section + suffix(k)] = getattr(item, section)
            continue
        pending = {}
        contents, blanks = _split_results(split, item.results)
        odd = {"between": split.between, "bare": split.bare or None, "results": blanks}
        odd = {key: value for key, value in odd.items() if value is not None}
        if odd:
            side["calls" + suffix(k)] = odd
        calls = [_tool_call(call, f"call_{number + j}") for j, call in enumerate(split.calls, 1)]
        number += len(calls)
        yield {"role": "assistant", "content": None, **thoughts, "tool_calls": calls}
        for call, content in zip(calls, contents, strict=True):
            yield {"role": "tool", "tool_call_id": call["id"], "content": content}
    if turn.reply or pending or "commands" in side or "results" in side:
        yield {"role": "assistant", "content": turn.reply, **pending}


def _tool_call(call: Call, name: str) -> Row:
    known = _parameters(call.name)
    keys = known[: len(call.args)] + [f"argument_{i + 1}" for i in range(len(known), len(call.args))]
    arguments = json.dumps(dict(zip(keys, call.args, strict=True)), ensure_ascii=False)
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _schema(key: str) -> Row:
    name = SWITCHES[key].api.partition("(")[0]
    names = _parameters(name)
    parameters = {"type": "object", "properties": {n: {"type": "string"} for n in names}, "required": names}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def from_openai(row: Row) -> Dialog:
    """A conversation from a row of OpenAI messages, the older form with functions too. Words said beside a call count
    as its thoughts."""
    if "functions" in row and "tools" not in row:
        known = [{"type": "function", "function": each} for each in _list(row["functions"], "functions")]
        row = {name: value for name, value in row.items() if name != "functions"} | {"tools": known}
    messages = [_of_now(message) for message in _list(row["messages"], "messages")]
    switches, sides, extra = _from_side(row, ("messages", "tools"))
    metas: list[str] = []
    turns: list[list[Row]] = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role in ("system", "developer") and not turns:
            metas.append(_content(message, i))
        elif role == "user":
            turns.append([message])
        elif role in ("assistant", "tool") and turns:
            turns[-1].append(message)
        else:
            raise ValueError(f"messages[{i}] has role {role!r}, which cannot stand there")
    if not turns:
        raise ValueError("messages hold no user message")
    dialog = Dialog("\n".join(metas), {}, [], extra)
    for i, group in enumerate(turns, 1):
        dialog.turns.append(_turn_from_messages(group, sides.get(f"turn_{i}", {}), f"turn {i}"))
    tools = row.get("tools")
    functions = [tool.get("function") for tool in _list(tools, "tools")] if tools is not None else []
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    on = {key: SWITCHES[key].api.partition("(")[0] in names for key in SWITCHES}
    if tools is not None and tools != [_schema(key) for key in on if on[key]]:
        extra["tools"] = tools
    if switches or tools:
        thought = any("reasoning_content" in message for message in messages)
        dialog.switches = {"thoughts": switches.get("thoughts", thought), **on}
    return dialog


def _of_now(message: Row) -> Row:
    """A message whose call is a `function_call`, or its answer of role `function`, in the form with tools."""
    if message.get("function_call"):
        kept = {name: value for name, value in message.items() if name != "function_call"}
        return kept | {"tool_calls": [{"type": "function", "function": message["function_call"]}]}
    return message | {"role": "tool"} if message.get("role") == "function" else message


def _turn_from_messages(messages: list[Row], side: Row, place: str) -> Turn:
    turn = Turn(_content(messages[0], place))
    position = 1
    while position < len(messages):
        message = messages[position]
        if message.get("role") == "tool":
            raise ValueError(f"{place}: a tool message answers no call")
        position += 1
        content = _content(message, place)
        thoughts = message.get("reasoning_content")
        if thoughts is not None:
            text_of(thoughts, f"{place}: reasoning_content")
        if message.get("tool_calls"):
            said = [part for part in (thoughts, content) if part]
            item = Round("\n".join(said) if said else NONE if thoughts is None else thoughts)
            calls = [_call(call, place) for call in _list(message["tool_calls"], f"{place}: tool_calls")]
            odd = side.get("calls" + suffix(len(turn.rounds)), {})
            if not isinstance(odd, dict):
                raise ValueError(f"{SIDE}: calls must be an object, not {json.dumps(odd)[:60]}")
            split = _Calls(calls, odd.get("between"), bool(odd.get("bare")))
            item.commands = _join_calls(split)
            answers = []
            while position < len(messages) and messages[position].get("role") == "tool":
                answers.append(messages[position])
                position += 1
            contents = [_content(answer, place) for answer in _in_order(message["tool_calls"], answers)]
            item.results = _join_results(split, contents, odd.get("results"))
            turn.rounds.append(item)
            continue
        if thoughts is not None or not turn.rounds:
            k = suffix(len(turn.rounds))
            texts = (text_of(side.get(name + k, NONE), f"{SIDE}: {name}") for name in ("commands", "results"))
            turn.rounds.append(Round(NONE if thoughts is None else thoughts, *texts))
        if turn.reply:
            raise ValueError(f"{place}: two replies to one user message")
        turn.reply = content
    turn.rounds = turn.rounds or [Round()]
    return _take_side(turn, side)


def _in_order(calls: Sequence[Row], answers: list[Row]) -> list[Row]:
    """Tool messages in the order of the calls that they name; as they stand where one names none of these."""
    ids = [call.get("id") for call in calls]
    if any(answer.get("tool_call_id") not in ids for answer in answers):
        return answers
    return sorted(answers, key=lambda answer: ids.index(answer.get("tool_call_id")))


def _call(call: Row, place: str) -> Call:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place}: a tool call must have function.name")
    try:
        arguments = json.loads(text_of(function.get("arguments"), f"{place}: arguments of {function['name']}"))
    except ValueError as error:
        raise ValueError(f"{place}: arguments of {function['name']} are not JSON text ({error})") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"{place}: arguments of {function['name']} must be an object")
    texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in arguments.values()]
    return Call(function["name"], texts)


def _content(message: Row, place: int | str) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(text_of(part.get("text"), f"{place}: text") for part in content)
    return text_of(content, f"{place}: content of a {message.get('role')} message")


# -- ShareGPT --------------------------------------------------------------------------------------------------------

_SHAREGPT = {"human": "human", "thoughts": "thoughts", "commands": "function_call", "results": "observation"}
_FROM = {role: section for section, role in _SHAREGPT.items()} | {
    "user": "human",
    "gpt": "reply",
    "assistant": "reply",
    "system": "meta",
}


def to_sharegpt(dialog: Dialog) -> Row:
    """A row of ShareGPT conversations."""
    said = [{"from": "system", "value": dialog.meta}] if dialog.meta else []
    sides: dict[str, Row] = {}
    for i, turn in enumerate(dialog.turns, 1):
        said.append({"from": "human", "value": turn.human})
        for item in turn.rounds:
            for section in _ROUND_SECTIONS:  # of several rounds each begins with its thoughts, even without any
                if getattr(item, section) != NONE or (section == "thoughts" and len(turn.rounds) > 1):
                    said.append({"from": _SHAREGPT[section], "value": getattr(item, section)})
        if turn.reply:
            said.append({"from": "gpt", "value": turn.reply})
        if side := _turn_side(turn):
            sides[f"turn_{i}"] = side
    return _with_side({"conversations": said}, dialog.switches, sides, dialog.extra)


def from_sharegpt(row: Row) -> Dialog:
    """A conversation from a row of ShareGPT conversations."""
    switches, sides, extra = _from_side(row, ("conversations",))
    dialog = Dialog("", switches, [], extra)
    for i, message in enumerate(_list(row["conversations"], "conversations")):
        section = _FROM.get(str(message.get("from")))
        value = text_of(message.get("value"), f"conversations[{i}].value")
        if section == "human":
            dialog.turns.append(Turn(value))
        elif section == "meta" and not dialog.turns and not dialog.meta:
            dialog.meta = value
        elif section in (None, "meta") or not dialog.turns or dialog.turns[-1].reply:
            raise ValueError(f"conversations[{i}] is from {message.get('from')!r}, which cannot stand there")
        elif section == "reply":
            dialog.turns[-1].reply = value
        else:
            rounds = dialog.turns[-1].rounds
            later = rounds and _ROUND_SECTIONS.index(section) <= _filled(rounds[-1])
            if not rounds or later:
                rounds.append(Round())
            setattr(rounds[-1], section, value)
    if not dialog.turns:
        raise ValueError("conversations hold nothing from a human")
    for i, turn in enumerate(dialog.turns, 1):
        turn.rounds = turn.rounds or [Round()]
        _take_side(turn, sides.get(f"turn_{i}", {}))
    return dialog


def _filled(item: Round) -> int:
    """The place of the last section that says something; a round always has its thoughts."""
    return max((i for i, section in enumerate(_ROUND_SECTIONS) if getattr(item, section) != NONE), default=0)


# -- the side field --------------------------------------------------------------------------------------------------


def _turn_side(turn: Turn) -> Row:
    """What neither format says of a turn."""
    side: Row = {"quality": turn.quality} if turn.quality is not None else {}
    side |= {"edges": turn.edges} if turn.edges else {}
    return side | ({} if turn.rounds else {"rounds": 0})


def _texts(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{SIDE}: {what} must be a list of texts, not {json.dumps(value)[:60]}")
    return value


def _take_side(turn: Turn, side: Row) -> Turn:
    turn.quality, turn.edges = side.get("quality"), side.get("edges", {})
    if turn.quality is not None and (type(turn.quality) is not int or turn.quality not in QUALITIES):
        raise ValueError(f"{SIDE}: quality {turn.quality!r} is none of {', '.join(map(str, QUALITIES))}")
    if not isinstance(turn.edges, dict) or not all(isinstance(edge, str) for edge in turn.edges.values()):
        raise ValueError(f"{SIDE}: edges must be an object of texts, not {json.dumps(turn.edges)[:60]}")
    if side.get("rounds") == 0:
        turn.rounds = []
    return turn


def _with_side(row: Row, switches: Mapping[str, bool], sides: Mapping[str, Row], extra: Row) -> Row:
    side = ({"switches": dict(switches)} if switches else {}) | dict(sides)
    return joined(row, extra | ({SIDE: side} if side else {}))


def _from_side(row: Row, own: Sequence[str]) -> tuple[dict[str, bool], Row, Row]:
    """(switches, side of each turn, fields that belong to nobody)."""
    side = row.get(SIDE, {})
    if not isinstance(side, dict) or not all(isinstance(value, dict) for value in side.values()):
        raise ValueError(f"the field {SIDE!r} must be an object of objects")
    turns = dict(side)
    switches = turns.pop("switches", {})
    if not all(isinstance(on, bool) for on in switches.values()):
        raise ValueError(f"{SIDE}: switches must be true or false, not {json.dumps(switches)[:60]}")
    return switches, turns, {k: v for k, v in row.items() if k not in (*own, SIDE)}


def joined(row: Row, extra: Row) -> Row:
    """`row` with its other fields; they may not hide its own."""
    for key in extra:
        if key in row:
            raise ValueError(f"the field {key!r} of this row has another meaning in the target format; rename it")
    return row | extra
