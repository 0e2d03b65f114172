"""The turn loop: a question in, events out, tools in between. Terminal, Python, evaluation and server all use it.

A turn is one or more passes of the engine. The first writes thoughts and commands; code runs the commands of the
tools that are switched on and appends their results; then the model chooses between another round and its reply,
until `max_rounds`, when the reply is asked for. A vocabulary without ids for the roles (the released models) has one
round. Control ids open and end sections, never their spelling, so that text can neither run a tool nor end a turn.
A grammar keeps each pass to the format and to the tools that are on; where an engine follows none, a pass that leaves
the format is stopped, and what it left unfinished is not run.

    for event in answer(dialog, engine, tok, standard_tools(), Options(conversation="a")):
        print(event.to_json())  # {"type": "thoughts", "text": "..."}, ..., {"type": "done", ...}

The last turn of `dialog` is the question; whatever else it holds is ignored. Closing the iterator cancels the pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from moss.chat import (
    MAX_ROUNDS,
    NONE,
    SWITCHES,
    Dialog,
    Form,
    Round,
    StreamParser,
    Switch,
    TooLong,
    Turn,
    Until,
    instruction,
    render,
    trim,
)
from moss.engine import EngineError, Grammar, Sampling, Stream
from moss.engine.grammar import commands_grammar
from moss.tokenizer import Tokenizer
from moss.tools.base import Tool
from moss.tools.calls import MAX_CALLS, Call, Outcome, format_results, parse_commands, refusal, stream_calls
from moss.tools.events import (
    Command,
    Done,
    Error,
    Event,
    Notice,
    Reply,
    Thoughts,
    ToolDone,
    ToolProgress,
    ToolStarted,
)

SAMPLING = Sampling(temperature=0.7, top_p=0.8)  # of the released models' RELEASED, without penalty and time limit
BROKEN = "the line of commands broke off, so nothing of it was run"
NO_REPLY = "the model gave no reply; ask in another way"
SHORTEST = 40  # characters of each result that the model reads; with less room there are fewer results
ROUND = 50  # tokens that must be left for one more round
PASSES = 16  # seeds set aside for one turn: more than its passes, which are at most MAX_ROUNDS + 2


class Submits(Protocol):
    """What the loop needs of an engine: the local one or anything that speaks token ids."""

    max_length: int

    def submit(
        self,
        ids: list[int],
        sampling: Sampling,
        *,
        conversation: Hashable | None = None,
        grammar: Grammar | None = None,
        prefix: int = 0,
    ) -> Stream: ...

    def forget(self, conversation: Hashable) -> None: ...


@dataclass(frozen=True)
class Options:
    """How one turn is answered.

    Of `sampling`, the stop ids and the seed are set by the loop, `max_tokens` holds for each pass, `time_limit` for
    the whole turn.
    """

    sampling: Sampling = SAMPLING
    max_rounds: int = MAX_ROUNDS
    quality: int | None = None  # the preference tag that opens the reply
    conversation: Hashable | None = None  # keeps the engine's cache for the next turn; None forgets it after this one
    seed: int | None = None
    form: Form = "plugin"  # `sft` and `base` ask for a reply alone
    grammar: bool = True  # hold the model to the format and to the tools that are on; False measures it as it is

    def __post_init__(self) -> None:
        if not 1 <= self.max_rounds <= MAX_ROUNDS:
            raise ValueError(f"max_rounds is {self.max_rounds}; it must be 1 to {MAX_ROUNDS}")


# --------------------------------------------------------------------------------------------------------------- loop


def answer(
    dialog: Dialog, engine: Submits, tok: Tokenizer, tools: Mapping[str, Tool], options: Options = Options()
) -> Iterator[Event]:
    """Answer the last turn of `dialog`. Ends with `Done`, or with `Error` where the turn cannot be finished.

    A tool runs only if it is in `tools` (by key) and switched on in `dialog.switches`; a switch without its tool
    shows as off in the prompt.
    """
    if not dialog.turns:
        raise ValueError("the conversation has no turn to answer; append a Turn with the question")
    turn = _Turn(dialog, engine, tok, tools, options)
    try:
        yield from turn.events()
    except (TooLong, EngineError) as error:
        yield Error(str(error))
    finally:
        if options.conversation is None:
            engine.forget(turn.conversation)


Wrote = Literal["round", "reply", "choice"]  # a choice: the reply's marker at most, its text is yet to come


@dataclass
class _Pass:
    """What one run of the engine wrote. `ended`: every marker came as the format has it, up to its end."""

    wrote: Wrote
    texts: dict[str, str]
    ended: bool
    finish: str


class _Turn:
    """One turn in the making."""

    def __init__(
        self, dialog: Dialog, engine: Submits, tok: Tokenizer, tools: Mapping[str, Tool], options: Options
    ) -> None:
        self.engine, self.tok, self.tools, self.options = engine, tok, tools, options
        self.turn = Turn(dialog.turns[-1].human, quality=options.quality)
        switches = {key: on and (key == "thoughts" or at_hand(key, tools)) for key, on in dialog.switches.items()}
        # As in training on tags: only the last reply has one.
        earlier = [replace(turn, quality=None) for turn in dialog.turns[:-1]]
        self.dialog = replace(dialog, switches=switches, turns=[*earlier, self.turn])
        self.enabled = {key for key, on in switches.items() if on}
        self.shows_thoughts = switches.get("thoughts", True)
        self.lines = SWITCHES | {key: Switch(tool.switch, tool.api) for key, tool in tools.items()}
        self.conversation: Hashable = object() if options.conversation is None else options.conversation
        self.prefix = self._prefix()
        self.num_calls = 0
        self.num_sources = 0
        self.num_passes = 0
        self.length = 0  # of the conversation so far, in tokens
        self.full = False  # a round was too long for the model and left out
        self.usage = {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}
        self.started = time.perf_counter()
        self.first_token = 0.0
        self.tool_seconds = 0.0

    def events(self) -> Iterator[Event]:
        until: Until = "thoughts" if self.options.form == "plugin" else "reply"
        while True:
            done = yield from self._pass(until)
            if done.wrote == "round":
                yield from self._round(done)
            until = "reply"
            if done.wrote == "reply":
                break
            asked = bool(self.turn.rounds) and self.turn.rounds[-1].commands != NONE  # else nothing to think about anew
            if done.wrote == "round" and asked and self._may_go_on():
                until = "results"
        self.turn.reply = done.texts.get("reply", "")
        if not done.ended:
            yield cut(done.finish)
        elif not self.turn.reply.strip():
            yield Notice(NO_REPLY)
        timing = {
            "first_token": self.first_token,
            "tools": self.tool_seconds,
            "total": time.perf_counter() - self.started,
        }
        yield Done(self.turn, done.finish, self.usage, timing)

    def _may_go_on(self) -> bool:
        """Whether the model may choose another round. Where roles are text it was never taught to choose."""
        more = self.tok.single_roles and len(self.turn.rounds) < self.options.max_rounds
        return more and not self.full and self._room() >= ROUND

    def _prefix(self) -> int:
        """How many ids open every conversation with this meta instruction and these switches."""
        if self.options.form == "base":
            return 0
        dialog = self.dialog if self.options.form == "plugin" else replace(self.dialog, switches={})
        return len(self.tok.encode_again(instruction(dialog, self.lines)))

    @property
    def _set_aside(self) -> int:
        """How many tokens are left for the answer."""
        return min(self.options.sampling.max_tokens, self.engine.max_length // 4)

    @property
    def _limit(self) -> int:
        """The longest prompt, in tokens."""
        return self.engine.max_length - self._set_aside

    @property
    def _most(self) -> int:
        """The longest prompt where the turn itself takes more than `_limit`: half of what is set aside goes to it."""
        return self.engine.max_length - self._set_aside // 2

    def _alone(self, until: Until, *more: Round) -> int:
        """How many tokens the prompt takes without the turns before, and with `more` rounds."""
        turn = replace(self.turn, rounds=[*self.turn.rounds, *more])
        form: Any = {"until": until, "switches": self.lines, "form": self.options.form}
        return len(render(replace(self.dialog, turns=[turn]), self.tok, **form)[0])

    def _room(self) -> int:
        """How many tokens the next round can take, so that its reply still fits."""
        return self._most - self._alone("reply", Round())

    def _prompt(self, until: Until) -> Generator[Event, None, list[int]]:
        """The ids of the conversation up to `until`. Where it would be too long, the oldest turns go, and at last the
        newest round: a turn that has begun does not end without a reply."""
        form: Any = {"until": until, "switches": self.lines, "form": self.options.form}
        while True:
            limit = self._limit
            if self.num_passes:
                limit = max(limit, min(self._most, self._alone(until)))
            try:
                self.dialog, dropped = trim(self.dialog, self.tok, limit, **form)
                break
            except TooLong:
                if not self.turn.rounds:
                    raise
            self.turn.rounds.pop()
            self.full = True
            yield Notice("the last round was too long for the model and was left out")
        if dropped:
            yield left_out(dropped)
        return render(self.dialog, self.tok, **form)[0]

    def _pass(self, until: Until) -> Generator[Event, None, _Pass]:
        """Run the engine once from the cut `until` and pass on what it writes."""
        prompt = yield from self._prompt(until)
        self.length = len(prompt)
        path = _Path(self.tok, until, self.options)
        room = self._room() if until != "reply" else 0
        stopped = False
        parser = StreamParser(self.tok, None if until == "results" else until)
        texts: dict[str, str] = {}
        stream = self.engine.submit(
            prompt,
            self._sampling(path.stops),
            conversation=self.conversation,
            grammar=self._grammar(until),
            prefix=self.prefix,
        )
        try:
            for token in stream:
                self.first_token = self.first_token or time.perf_counter() - self.started
                self.usage["completion_tokens"] += 1
                self.length += 1
                if not path.follow(token.id):
                    break
                yield from self._say(parser.feed([token.id]), texts)
                stopped = path.wrote == "round" and self.length - len(prompt) >= room
                if path.ended or stopped:
                    break
        finally:
            stream.cancel()
        yield from self._say(parser.close(), texts)
        if self.shows_thoughts and texts.get("thoughts", NONE) in ("N", "No", "Non"):
            yield Thoughts(texts["thoughts"], len(self.turn.rounds))  # it waited to become None, and did not
        if self.num_passes == 0:
            self.usage |= {"prompt_tokens": stream.prompt_tokens, "cached_tokens": stream.reused}
        self.num_passes += 1
        if stream.finish == "cancelled" and not (path.ended or path.left or stopped):
            raise EngineError("the engine was closed")
        finish = "stop" if path.ended else "length" if stopped else stream.finish or "stop"
        return _Pass(path.wrote, texts, path.ended, finish)

    def _sampling(self, stops: frozenset[int]) -> Sampling:
        """The options' sampling for the next pass: its own seed, and what is left of the turn's time."""
        base, seed = self.options.sampling, self.options.seed
        return replace(
            base,
            stop_ids=stops,
            seed=None if seed is None else seed * PASSES + self.num_passes,
            time_limit=None if base.time_limit is None else time_left(base.time_limit, self.started),
        )

    def _grammar(self, until: Until) -> Grammar | None:
        """What the next pass may write; made once for the same tools."""
        if not self.options.grammar:
            return None
        tools = {key: tool for key, tool in self.tools.items() if key in self.enabled}
        tagged = self.options.quality is not None
        return commands_grammar(self.tok, tools, until, form=self.options.form, tagged=tagged, max_calls=MAX_CALLS)

    def _say(self, pieces: list[tuple[str, str]], texts: dict[str, str]) -> Iterator[Event]:
        """Keep pieces of sections, and turn those that users see into events."""
        for section, text in pieces:
            before = texts.get(section, "")
            texts[section] = before + text
            if section == "reply":
                yield Reply(text)
            elif section == "thoughts" and self.shows_thoughts and not NONE.startswith(before + text):
                # "None" is no thought, so what may still become it has waited.
                yield Thoughts(before + text if NONE.startswith(before) else text, len(self.turn.rounds))

    def _round(self, done: _Pass) -> Iterator[Event]:
        """Run the commands of a pass and add its round to the turn. A line that broke off is shown, but never run."""
        commands = done.texts.get("commands", "")
        item = Round(done.texts.get("thoughts") or NONE, (commands if done.ended else "") or NONE)
        number = len(self.turn.rounds)
        self.turn.rounds.append(item)
        calls = parse_commands(commands)
        first, self.num_calls = self.num_calls, self.num_calls + len(calls)
        for index, call in enumerate(calls):
            yield Command(first + index, call.name, call.args, call.raw, number)
        if not done.ended:
            for index, call in enumerate(calls):
                yield ToolDone(first + index, call.name, False, error=BROKEN)
            return
        started = time.perf_counter()
        left = self._most - self._alone("reply")
        # Two thirds of what is left are for later rounds. Older turns may have to go for a quarter of it all.
        tokens = min(left, max((self._limit - self.length) // 3, min(left // 2, self._limit // 4)))
        limit = self._characters(tokens) // max(1, min(len(calls), MAX_CALLS))
        seconds = time_left(self.options.sampling.time_limit, self.started)
        outcomes = yield from work(calls, self.tools, self.enabled, first, self.num_sources + 1, limit, seconds)
        if not calls:
            return
        self.tool_seconds += time.perf_counter() - started
        self.num_sources += sum(len(outcome.sources) for outcome in outcomes)
        item.results, told = self._results(calls, outcomes, tokens, left)
        if told < len(calls):
            yield Notice(f"only {told} of {len(calls)} results fit what the model can read")

    def _results(self, calls: Sequence[Call], outcomes: Sequence[Outcome], tokens: int, most: int) -> tuple[str, int]:
        """The Results of a round in about `tokens` tokens, never more than `most`, and how many calls they tell of."""
        limit, told = max(SHORTEST, 4 * tokens // len(calls)), len(calls)  # a token is rarely more than 4 characters
        while told:
            results = format_results(calls[:told], outcomes[:told], self.tools, limit=limit)
            length = len(self.tok.encode(self.tok.guard(results)))
            if length <= tokens or (limit <= SHORTEST and length <= most):
                return results, told
            if limit > SHORTEST:
                limit = max(SHORTEST, limit * tokens // length * 9 // 10)
            else:
                told -= 1
        return NONE, told

    def _characters(self, tokens: int) -> int:
        """About how many characters so many tokens are, to judge by the question: Chinese takes more."""
        question = self.turn.human[:1000]
        return max(SHORTEST, tokens * len(question) // max(1, len(self.tok.encode(question))))


def at_hand(key: str, tools: Mapping[str, Tool]) -> bool:
    """Whether a tool is there and works here; a switch without it shows as off."""
    return key in tools and not tools[key].lacks


def work(
    calls: Sequence[Call],
    tools: Mapping[str, Tool],
    enabled: Collection[str],
    first: int,
    first_source: int = 1,
    room: int = 0,
    seconds: float = math.inf,
) -> Generator[Event, None, list[Outcome]]:
    """Run the calls of a round side by side; returns what became of each, in their order.

    `first` is the number of the first call in the turn, `first_source` that of the first source; `room` is how many
    characters of each result the model will read. A call ends when its tool's deadline passes, or `seconds` do; closing
    this iterator gives all of them up.
    """
    for index, call in enumerate(calls[:MAX_CALLS]):
        if isinstance(refusal(call, tools, enabled), Tool):
            yield ToolStarted(first + index, call.name)
    outcomes: dict[int, Outcome] = {}
    told: set[int] = set()
    for index, news in stream_calls(calls, tools, enabled, room=room, seconds=seconds):
        if isinstance(news, str):
            yield ToolProgress(first + index, calls[index].name, news)
            continue
        outcomes[index] = news
        for ready in _numberable(outcomes, told):
            told.add(ready)
            before = (len(outcomes[earlier].sources) for earlier in range(ready) if earlier in outcomes)
            outcomes[ready] = replace(outcomes[ready], first=first_source + sum(before))
            yield _done(first + ready, calls[ready].name, outcomes[ready])
    return [outcomes[index] for index in range(len(calls))]


def _numberable(outcomes: Mapping[int, Outcome], told: Collection[int]) -> list[int]:
    """The calls that can be told: those with sources only once all calls before them have theirs."""
    return [
        index
        for index, outcome in sorted(outcomes.items())
        if index not in told and (not outcome.sources or all(earlier in outcomes for earlier in range(index)))
    ]


def _done(number: int, name: str, outcome: Outcome) -> ToolDone:
    return ToolDone(number, name, outcome.ok, outcome.result, outcome.error, outcome.seconds, outcome.references)


def time_left(limit: float | None, started: float) -> float:
    """How many seconds a turn has left, a very short time at least."""
    return math.inf if limit is None else max(limit - (time.perf_counter() - started), 0.001)


def left_out(turns: int) -> Notice:
    """What the user is told where old turns did not fit."""
    what = "the oldest turn no longer fits and was" if turns == 1 else f"the {turns} oldest turns were"
    return Notice(f"{what} left out")


def cut(finish: str) -> Notice:
    """What the user is told where an answer did not come to its end."""
    why = {"length": "at its longest", "time": "when its time was over"}.get(finish, "in the middle")
    return Notice(f"the answer was cut {why}")


class _Path:
    """The control ids that a pass may write, in their order; any other one ends it.

    After `thoughts`: <eot> <|Commands|> <eoc>. After `reply`: <eom>. After `results` the first id chooses: either
    <|Inner Thoughts|> and then as after `thoughts`, or <|MOSS|> and then as after `reply`; if a quality tag is set,
    code must write it first, so that the pass ends there.
    """

    def __init__(self, tok: Tokenizer, until: Until, options: Options) -> None:
        self._control = tok.control_ids
        end = [tok.eos] if options.form == "base" else tok.marker("<eom>")
        rounds: list[int] = []
        if options.form == "plugin":
            names = ["<eot>", "<|Commands|>", "<eoc>"] if tok.single_roles else ["<eot>", "<eoc>"]
            rounds = [tok.marker(name)[0] for name in names]
        self._choices: dict[int, tuple[Wrote, list[int]]] = {}
        if until == "results":
            self._choices[tok.marker("<|Inner Thoughts|>")[0]] = ("round", rounds)
            reply: tuple[Wrote, list[int]] = ("reply", end) if options.quality is None else ("choice", [])
            self._choices[tok.marker("<|MOSS|>")[0]] = reply
        starts: dict[Until, tuple[Wrote, list[int]]] = {
            "thoughts": ("round", rounds), "results": ("choice", []), "reply": ("reply", end)
        }  # fmt: skip
        self.wrote: Wrote
        self.wrote, self._next = starts[until]
        inner = {id for id, (_, rest) in self._choices.items() if rest} | set(rounds[:-1] if until != "reply" else ())
        self.stops = tok.control_ids - inner
        self.ended = self.left = False

    def follow(self, id: int) -> bool:
        """Take the next id; False when it does not belong here, and the pass is over without an end."""
        if id in self._choices:
            self.wrote, self._next = self._choices[id]
            self._choices = {}
        elif self._next and id == self._next[0]:
            self._next = self._next[1:]
        elif self._choices or id in self._control:
            self.left = True
            return False
        else:
            return True
        self.ended = not self._next
        return True
