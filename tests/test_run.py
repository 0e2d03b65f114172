"""The turn loop against a scripted engine: what runs, what the model is shown, what the user sees."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend

from moss.chat import SWITCHES, Dialog, Round, Switch, Turn, instruction, render
from moss.engine import Engine, Grammar, Sampling, Stream
from moss.engine.cache import common_prefix
from moss.tokenizer import MARKERS, ROLES, Tokenizer, train
from moss.tools.base import Tool, ToolError, tool
from moss.tools.run import BROKEN, Done, Error, Event, Notice, Options, Reply, Thoughts, ToolDone, ToolStarted, answer
from tests.fakes import ScriptedEngine, toy_model

calls: list[str] = []  # what the fake tools were really asked


@tool(key="calculator", switch="Calculator", api="Calculate", same_line=True)
def calculate(expression: str) -> str:
    """Repeat the expression in angle brackets."""
    calls.append(expression)
    if "/0" in expression:
        raise ToolError("division by zero; change the divisor")
    return f"<{expression}>"


@tool(key="solver", switch="Equation solver", api="Solve")
def solve(equation: str) -> str:
    """One, or very much."""
    calls.append(equation)
    return "9" * 3000 if equation == "long" else "x = 1"


TOOLS: dict[str, Tool] = {"calculator": calculate, "solver": solve}
THINK_ONE = ' add<eot>\n<|Commands|>: Calculate("1+1")<eoc>'
NOTHING = " None<eot>\n<|Commands|>: None<eoc>"
SAY = " hello<eom>"


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(["hello there, add 1+1 and solve x = 1 你好"] * 3, 300)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def ids(tok: Tokenizer, text: str) -> list[int]:
    """Ids of what a model writes: markers as control ids, the rest as text."""
    for marker in MARKERS:
        if marker in text and (tok.single_roles or marker not in ROLES):
            before, after = text.split(marker, 1)
            return ids(tok, before) + tok.marker(marker) + ids(tok, after)
    return tok.encode(text)


def dialog(**switches: bool) -> Dialog:
    return Dialog("Be kind.", {"thoughts": True, "calculator": True, **switches}, [Turn("hi")])


def run(
    tok: Tokenizer, *passes: str, on: Dialog | None = None, max_length: int = 100_000, **options: Any
) -> tuple[list[Event], ScriptedEngine]:
    """The events of one turn, and the engine with the prompts it got; every pass must have been used."""
    engine = ScriptedEngine([ids(tok, text) for text in passes], max_length=max_length)
    events = list(answer(on or dialog(), engine, tok, TOOLS, Options(**options)))
    assert engine.answers == [], "the loop asked for fewer passes"
    return events, engine


def turn_of(events: list[Event]) -> Turn:
    assert isinstance(events[-1], Done), events
    return events[-1].turn


def said(events: list[Event], kind: type) -> str:
    return "".join(e.text for e in events if isinstance(e, kind))  # type: ignore[attr-defined]


def test_tool_turn(tok: Tokenizer) -> None:
    """The whole road: thoughts, command, result in the next prompt, reply; all as it will be rendered again."""
    events, engine = run(tok, THINK_ONE, "<|MOSS|>:" + SAY)
    want = Turn("hi", [Round("add", 'Calculate("1+1")', 'Calculate("1+1") => <1+1>')], "hello")
    assert turn_of(events) == want
    assert (said(events, Thoughts), said(events, Reply)) == ("add", "hello")
    kinds = [e.type for e in events if e.type not in ("thoughts", "reply")]
    assert kinds == ["command", "tool_started", "tool_done", "done"]
    full = Dialog("Be kind.", {"thoughts": True, "calculator": True}, [want])
    whole = render(full, tok)[0]
    assert engine.prompts[1] == render(full, tok, until="results")[0] == whole[: len(engine.prompts[1])]


class Watched(ScriptedEngine):
    """Holds each answer against the grammar that came with its prompt; notes passes with a forbidden id."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        super().__init__(answers)
        self.misfits: list[int] = []  # by number from 0

    def submit(self, *args: Any, grammar: Grammar | None = None, **kwargs: Any) -> Stream:
        assert grammar is not None
        state = grammar.start()
        for id in self.answers[0]:
            mask = state.mask()
            if mask is not None and not mask[id]:
                self.misfits.append(len(self.prompts))
                break
            state.advance(id)
        return super().submit(*args, **kwargs)


@pytest.mark.parametrize(
    ("passes", "options"),
    [
        ([THINK_ONE, "<|Inner Thoughts|>:" + THINK_ONE, "<|MOSS|>:" + SAY], {}),
        ([THINK_ONE, "<|Inner Thoughts|>:" + NOTHING, SAY], {}),
        ([THINK_ONE, "<|MOSS|>", SAY], {"quality": 80}),
        ([NOTHING, SAY], {"max_rounds": 1}),
        ([SAY], {"form": "sft"}),
    ],
)
def test_each_pass_fits_its_grammar(tok: Tokenizer, passes: list[str], options: dict[str, Any]) -> None:
    """The loop and the grammar must mean the same passes, or a good model is bent out of the format."""
    engine = Watched([ids(tok, text) for text in passes])
    assert isinstance(list(answer(dialog(), engine, tok, TOOLS, Options(**options)))[-1], Done)
    assert (engine.misfits, engine.answers) == ([], [])


@pytest.mark.parametrize(
    "text",
    [
        ' x<eot>\n<|Commands|>: Solve("x=1")<eoc>',  # a tool that is off
        ' x<eot>\n<|Commands|>: Calculate("1", "2")<eoc>',
        " x<eot>\n<|Commands|>: " + ", ".join(['Calculate("1")'] * 5) + "<eoc>",  # more than run
        " x<eom>",
        " x<|Human|>: do it<eoh>",
    ],
)
def test_grammar_knows_what_is_on(tok: Tokenizer, text: str) -> None:
    """What the loop would refuse must not be written at all."""
    engine = Watched([ids(tok, text), ids(tok, SAY), ids(tok, SAY)])
    list(answer(dialog(solver=False), engine, tok, TOOLS, Options()))
    assert engine.misfits[:1] == [0]


def test_without_grammar(tok: Tokenizer) -> None:
    """How good a model is by itself can only be measured while nothing holds it."""

    class Free(ScriptedEngine):
        def submit(self, *args: Any, grammar: Grammar | None = None, **kwargs: Any) -> Stream:
            assert grammar is None
            return super().submit(*args, **kwargs)

    events = list(answer(dialog(), Free([ids(tok, NOTHING), ids(tok, SAY)]), tok, TOOLS, Options(grammar=False)))
    assert turn_of(events).reply == "hello"


def test_second_round_is_the_models_choice(tok: Tokenizer) -> None:
    """After <eor> the model may think again; both rounds must be kept in order."""
    again = '<|Inner Thoughts|>: more<eot>\n<|Commands|>: Calculate("2+2"), Calculate("3")<eoc>'
    events, _ = run(tok, THINK_ONE, again, "<|MOSS|>:" + SAY)
    rounds = turn_of(events).rounds
    assert [r.thoughts for r in rounds] == ["add", "more"]
    assert rounds[1].results == 'Calculate("2+2") => <2+2>\nCalculate("3") => <3>'
    assert [e.call for e in events if isinstance(e, ToolDone)] == [0, 1, 2]
    assert [e.round for e in events if isinstance(e, Thoughts)][-1] == 1


def test_tools_for_ever_stops_after_four_rounds(tok: Tokenizer) -> None:
    """A model that always wants another tool must be made to answer."""
    events, engine = run(tok, THINK_ONE, *["<|Inner Thoughts|>:" + THINK_ONE] * 3, SAY)
    assert len(turn_of(events).rounds) == 4 and turn_of(events).reply == "hello"
    assert engine.prompts[-1][-2:] == tok.opening("<|MOSS|>")
    assert len(calls) == 4


def test_no_command_goes_straight_to_the_reply(tok: Tokenizer) -> None:
    """`None` is not a thought to show, and there is nothing to choose after it."""
    events, engine = run(tok, NOTHING, SAY)
    assert turn_of(events) == Turn("hi", [Round()], "hello")
    assert said(events, Thoughts) == "" and [e.type for e in events][-1] == "done"
    assert engine.prompts[1][-2:] == tok.opening("<|MOSS|>")


def test_thought_that_begins_like_none_is_shown(tok: Tokenizer) -> None:
    """Holding back `None` must not swallow `Nonetheless` or `No`."""
    for thought in ("Nonetheless go", "No", "None of it"):
        events, _ = run(tok, f" {thought}<eot>\n<|Commands|>: None<eoc>", SAY)
        assert said(events, Thoughts) == thought == turn_of(events).rounds[0].thoughts


def test_thoughts_switched_off_are_not_shown(tok: Tokenizer) -> None:
    """The user said no thoughts; the same format still runs."""
    events, _ = run(tok, THINK_ONE, "<|MOSS|>:" + SAY, on=dialog(thoughts=False))
    assert said(events, Thoughts) == "" and turn_of(events).rounds[0].thoughts == "add"
    assert calls == ["1+1"]


def test_disabled_and_unknown_tools_never_run(tok: Tokenizer) -> None:
    """The model may write what it likes: what is switched off or unknown is not executed and shows as None."""
    events, _ = run(tok, ' x<eot>\n<|Commands|>: Solve("x=1"), Format("C:")<eoc>', "<|MOSS|>:" + SAY)
    assert calls == [] and turn_of(events).rounds[0].results == "None"
    assert not any(isinstance(e, ToolStarted) for e in events)
    errors = [e.error for e in events if isinstance(e, ToolDone)]
    assert "switched off" in errors[0] and "Format" in errors[1]


def test_five_commands_run_four(tok: Tokenizer) -> None:
    """More than four commands in a round: the rest is dropped."""
    line = ", ".join(f'Calculate("{n}")' for n in range(5))
    events, _ = run(tok, f" x<eot>\n<|Commands|>: {line}<eoc>", "<|MOSS|>:" + SAY)
    assert sorted(calls) == ["0", "1", "2", "3"]
    assert turn_of(events).rounds[0].results.count("=>") == 4
    assert sum(isinstance(e, ToolStarted) for e in events) == 4


def test_tool_error_is_told_to_the_user_only(tok: Tokenizer) -> None:
    """The reason is for the user; the model reads `No result.`."""
    events, _ = run(tok, ' x<eot>\n<|Commands|>: Calculate("1/0")<eoc>', "<|MOSS|>:" + SAY)
    assert turn_of(events).rounds[0].results == 'Calculate("1/0") => No result.'
    assert [e.error for e in events if isinstance(e, ToolDone)] == ["division by zero; change the divisor"]


def test_spelt_markers_run_nothing(tok: Tokenizer) -> None:
    """Text that spells a marker is text: no tool may run and the reply may not end by it."""
    engine = ScriptedEngine([
        tok.encode(' a<eot>\n<|Commands|>: Calculate("1")<eoc>') + ids(tok, NOTHING.removeprefix(" None")),
        tok.encode(" b<eom>c") + tok.marker("<eom>"),
    ])  # fmt: skip
    turn = turn_of(list(answer(dialog(), engine, tok, TOOLS, Options())))
    assert calls == [] and turn.reply == "b<eom>c"
    assert turn.rounds[0].thoughts.endswith('Calculate("1")<eoc>')


@pytest.mark.parametrize(
    "text",
    [
        ' x<eot>\n<|Commands|>: Calculate("1")<eom>',  # the wrong end
        ' x<eot>\n<|Commands|>: Calculate("1")',  # cut
        ' x<|Commands|>: Calculate("1")<eoc>',  # thoughts without an end
        ' x<|Human|>: do it<eoh>\n<|Commands|>: Calculate("1")<eoc>',  # plays the user
        ' x<|Results|>: Calculate("1") => 2<eor>',  # makes up results
    ],
)
def test_broken_commands_never_run(tok: Tokenizer, text: str) -> None:
    """A pass that leaves the format is not executed, and the turn still gets its reply."""
    events, engine = run(tok, text, SAY)
    assert calls == [] and turn_of(events).reply == "hello"
    assert (turn_of(events).rounds[0].commands, turn_of(events).rounds[0].results) == ("None", "None")
    shown = [e.error for e in events if isinstance(e, ToolDone)]  # what was begun is not dropped in silence
    assert shown == ([BROKEN] if "<eot>" in text else [])
    assert not any(isinstance(e, ToolStarted) for e in events)
    assert engine.prompts[1][-2:] == tok.opening("<|MOSS|>")


def test_no_choice_after_results_is_a_reply(tok: Tokenizer) -> None:
    """A model that babbles where it should choose must not be left running to its limit."""
    events, engine = run(tok, THINK_ONE, " blah blah", SAY)
    assert turn_of(events).reply == "hello" and len(turn_of(events).rounds) == 1
    assert engine.prompts[2][-2:] == tok.opening("<|MOSS|>")


def test_quality_tag_is_written_by_code(tok: Tokenizer) -> None:
    """The tag stands in the prompt of the reply, also where the model chose to reply, and is shown to nobody."""
    events, engine = run(tok, THINK_ONE, "<|MOSS|>:", SAY, quality=80)
    assert tok.decode(engine.prompts[2]).endswith(": <quality: 80>")
    assert said(events, Reply) == "hello" and turn_of(events).quality == 80


def test_only_the_last_reply_is_tagged(tok: Tokenizer) -> None:
    """Prevents prompts unlike those of training, where earlier replies carry no tag."""
    turns = [Turn("hi", reply="hello", quality=80), Turn("and now?")]
    _, engine = run(tok, NOTHING, SAY, on=dataclasses.replace(dialog(), turns=turns), quality=100)
    prompt = tok.decode(engine.prompts[1])
    assert prompt.count("<quality:") == 1 and prompt.endswith("<quality: 100>")
    assert turns[0].quality == 80


def test_cut_reply_is_noticed(tok: Tokenizer) -> None:
    """An answer that ran out of tokens must not pass for a whole one."""
    events, _ = run(tok, NOTHING, " hello hello hello", sampling=Sampling(max_tokens=10_000))
    done = events[-1]
    assert isinstance(done, Done) and done.finish == "length"
    assert "cut" in said(events, Notice)


def test_reply_that_plays_the_user_ends(tok: Tokenizer) -> None:
    """After its reply a model may invent the next question; it must not reach the user."""
    events, _ = run(tok, NOTHING, " hello<|Human|>: and then?<eoh>")
    assert said(events, Reply) == "hello" == turn_of(events).reply


def test_old_turns_are_left_out(tok: Tokenizer) -> None:
    """A long conversation loses its oldest whole turns, says so, and keeps the meta instruction."""
    long = dialog()
    long.turns[:0] = [Turn("old " * 40, [Round()], "x"), Turn("new", [Round()], "y")]
    size = len(render(dialog(), tok, until="reply")[0])
    events, engine = run(tok, NOTHING, SAY, on=long, max_length=4 * (size + 60) // 3)
    assert "oldest turn" in said(events, Notice)
    text = tok.decode(engine.prompts[0])
    assert "old" not in text and "new" in text and text.startswith("Be kind.")
    assert len(long.turns) == 3  # the caller's conversation is untouched


def test_an_empty_reply_is_told(tok: Tokenizer) -> None:
    """A model that ends its reply at once left the user before an empty line; one that was cut says that alone."""
    events, _ = run(tok, NOTHING, " <eom>")
    assert [e.type for e in events] == ["notice", "done"] and "gave no reply" in said(events, Notice)
    events, _ = run(tok, NOTHING, " ")
    assert "cut" in said(events, Notice) and "gave no reply" not in said(events, Notice)
    events, _ = run(tok, NOTHING, SAY)
    assert said(events, Notice) == ""


def test_question_that_never_fits(tok: Tokenizer) -> None:
    """One clear error instead of an exception through the terminal; nothing follows it."""
    events, engine = run(tok, max_length=40)
    assert [type(e) for e in events] == [Error] and engine.prompts == []


def test_huge_result_leaves_room(tok: Tokenizer) -> None:
    """A result of thousands of digits must be cut for the model, not for the user."""
    text = ' x<eot>\n<|Commands|>: Solve("long")<eoc>'
    events, engine = run(tok, text, "<|MOSS|>:" + SAY, on=dialog(solver=True), max_length=2000)
    assert next(e for e in events if isinstance(e, ToolDone)).result == "9" * 3000
    results = turn_of(events).rounds[0].results
    assert re.fullmatch(r'Solve\("long"\) =>\n9+…', results)
    left = 2000 - 500 - len(engine.prompts[0]) - len(ids(tok, text))
    assert 0.7 < len(tok.encode(results)) / (left / 3) <= 1  # the rest is for what may follow


def test_closed_engine_is_an_error_event(tok: Tokenizer) -> None:
    """An engine that is closed in the middle of an unnamed conversation ends the turn with `Error`, not a traceback."""
    with Engine(toy_model(vocab_size=tok.vocab_size, max_length=4000)) as engine:
        events = []
        for event in answer(dialog(), engine, tok, TOOLS, Options(Sampling(max_tokens=3000, seed=1))):
            events.append(event)
            engine.close()
    assert isinstance(events[-1], Error) and "closed" in events[-1].text


def test_closing_cancels(tok: Tokenizer) -> None:
    """Ctrl-C while the answer streams must stop the engine's work."""
    engine = ScriptedEngine([ids(tok, NOTHING), ids(tok, " hello there<eom>")])
    events = answer(dialog(), engine, tok, TOOLS, Options(conversation="a"))
    assert isinstance(next(events), Reply)
    events.close()  # type: ignore[attr-defined]
    assert engine.streams[-1]._cancelled


def test_cache_is_named_and_forgotten(tok: Tokenizer) -> None:
    """Both passes share the conversation's cache; without a name it is given back after the turn."""
    _, engine = run(tok, NOTHING, SAY, conversation="a")
    assert engine.conversations == ["a", "a"] and engine.forgotten == []
    _, engine = run(tok, NOTHING, SAY)
    assert engine.conversations[0] == engine.conversations[1] == engine.forgotten[0] is not None


def test_seeds_differ_by_pass_not_by_order(tok: Tokenizer) -> None:
    """A seeded turn is repeatable, and its passes do not draw the same numbers."""
    _, engine = run(tok, NOTHING, SAY, seed=3)
    assert [s.seed for s in engine.samplings] == [48, 49]


def test_events_are_json(tok: Tokenizer) -> None:
    """Events are the wire format: each has its type and plain values."""
    events, _ = run(tok, THINK_ONE, "<|MOSS|>:" + SAY)
    rows = {e.type: json.loads(json.dumps(e.to_json())) for e in events}
    assert rows["tool_done"].pop("seconds") >= 0
    assert rows["tool_done"] == {
        "type": "tool_done", "call": 0, "name": "Calculate", "ok": True, "result": "<1+1>", "error": "",
        "sources": [],
    }  # fmt: skip
    done = rows["done"]
    assert done["type"] == "done" and done["turn"]["rounds"][0]["thoughts"] == "add"
    assert done["usage"]["completion_tokens"] == len(ids(tok, THINK_ONE + "<|MOSS|>:" + SAY))
    assert 0 < done["timing"]["first_token"] <= done["timing"]["total"]


def test_sft_form_asks_for_a_reply_alone(tok: Tokenizer) -> None:
    """The released sft models know neither thoughts nor commands."""
    events, engine = run(tok, SAY, form="sft")
    assert tok.decode(engine.prompts[0], markers=True) == "Be kind.\n<|Human|>: hi<eoh>\n<|MOSS|>:"
    assert turn_of(events) == Turn("hi", [], "hello")


def test_base_form_is_plain_text(tok: Tokenizer) -> None:
    """A base model continues text; it ends at the end of a document and knows no markers."""
    engine = ScriptedEngine([[*tok.encode("\nhello"), tok.eos]])
    events = list(answer(dialog(), engine, tok, TOOLS, Options(form="base")))
    assert tok.decode(engine.prompts[0], markers=True) == "hi" and turn_of(events) == Turn("hi", [], "hello")


def test_released_vocabulary_has_one_round(tok: Tokenizer) -> None:
    """Where role markers are text the tool still runs, between <eot> and <eoc>, and the reply is asked for at once."""
    spec = json.loads(tok.to_json())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in ROLES]
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {f"unused{id}" if name in ROLES else name: id for name, id in vocab.items()}
    old = Tokenizer(Backend.from_str(json.dumps(spec)))
    assert not old.single_roles
    events, engine = run(old, THINK_ONE, SAY)
    want = Turn("hi", [Round("add", 'Calculate("1+1")', 'Calculate("1+1") => <1+1>')], "hello")
    assert turn_of(events) == want and calls == ["1+1"]
    assert engine.prompts[1][-len(old.opening("<|MOSS|>")) :] == old.opening("<|MOSS|>")


def test_bad_rounds() -> None:
    """More rounds than the format has would fail in the middle of a turn."""
    with pytest.raises(ValueError, match="max_rounds is 5"):
        Options(max_rounds=5)


class Script:
    """A grammar that allows nothing but the given ids, one after the other."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def start(self) -> Script:
        return Script(self.ids)

    def mask(self) -> torch.Tensor:
        mask = torch.zeros(self.ids[0] + 1, dtype=torch.bool)
        mask[self.ids[0]] = True
        return mask

    def advance(self, id: int) -> None:
        if id != self.ids[0]:
            raise ValueError(f"id {id} is not in the script")
        self.ids.pop(0)


class Led(Engine):
    """The real engine, whose model is made to write the given passes; keeps the prompts and the streams."""

    def __init__(self, tok: Tokenizer, max_length: int, **values: Any) -> None:
        super().__init__(toy_model(vocab_size=tok.vocab_size, max_length=max_length), **values)
        self.answers: list[list[int]] = []
        self.prompts: list[list[int]] = []
        self.streams: list[Stream] = []

    def submit(self, ids: Sequence[int], *args: Any, **kwargs: Any) -> Stream:
        self.prompts.append(list(ids))
        self.streams.append(super().submit(ids, *args, **kwargs | {"grammar": Script(self.answers.pop(0))}))
        return self.streams[-1]


def test_second_pass_reads_what_is_new(tok: Tokenizer) -> None:
    """Between the halves of a tool turn only the results may be read: neither the conversation again, nor what the
    model wrote itself. Where that was in tokens of its own choice, it is read again from the first of them on."""
    again, say = ids(tok, "<|Inner Thoughts|>:" + THINK_ONE), ids(tok, "<|MOSS|>:" + SAY)
    with (engine := Led(tok, 800, slots=2)):
        engine.answers = [ids(tok, THINK_ONE), again, say]
        turn = turn_of(list(answer(dialog(), engine, tok, TOOLS, Options())))
        assert len(turn.rounds) == 2
        (first, second, third), (_, after_one, after_two) = engine.prompts, engine.streams
        # The id that ends a pass is said, but not read.
        assert second[: after_one.reused + 1] == first + ids(tok, THINK_ONE)
        assert third[: after_two.reused + 1] == second + again
        assert tok.decode(third[after_two.reused + 1 :]) == '\n:\nCalculate("1+1") => <1+1>\n\n'

        letters = [id for letter in "add" for id in tok.encode(letter)]
        assert letters != tok.encode("add")
        engine.answers = [[*tok.encode(" "), *letters, *ids(tok, THINK_ONE.removeprefix(" add"))], say]
        assert turn_of(list(answer(dialog(), engine, tok, TOOLS, Options()))).rounds == turn.rounds[:1]
        assert engine.streams[-1].reused >= len(engine.prompts[-2])


def test_full_conversation_is_reused(tok: Tokenizer) -> None:
    """Trimmed to the limit, a full conversation began elsewhere in every pass and was read from the meta instruction
    on. The whole history is given each time, as by a caller that keeps nothing else."""
    full = Dialog("Be kind.", {}, [])
    passes = []  # of each with a notice in its turn: how much of its prompt was reused
    with (engine := Led(tok, 1000)):
        for number in range(40):
            full.turns.append(Turn(f"add {number}+1" + " hello" * (number % 4)))
            engine.answers = [ids(tok, NOTHING), ids(tok, SAY)]
            events = list(answer(full, engine, tok, TOOLS, Options(conversation="a")))
            full.turns[-1] = turn_of(events)
            for prompt, stream in zip(engine.prompts[-2:], engine.streams[-2:], strict=True):
                assert len(prompt) <= 750 and f"add {number}+1" in tok.decode(prompt)
                if "left out" in said(events, Notice):
                    passes.append(stream.reused / len(prompt))
    assert len(passes) >= 2 * 15
    assert sum(share > 0.9 for share in passes) >= 0.9 * len(passes)


def test_real_engine_reuses_the_cache(tok: Tokenizer) -> None:
    """With the real engine an untrained model babbles through the format: the turn ends, and turn two is cached."""
    with Engine(toy_model(vocab_size=tok.vocab_size, max_length=800)) as engine:
        options = Options(Sampling(seed=1, max_tokens=30), conversation="a", seed=5)
        first = turn_of(list(answer(dialog(), engine, tok, TOOLS, options)))
        following = dialog()
        following.turns[:0] = [first]
        done = list(answer(following, engine, tok, TOOLS, options))[-1]
        assert isinstance(done, Done)
        cut = len(render(Dialog("Be kind.", following.switches, [first]), tok, until="reply")[0])
        assert done.usage["prompt_tokens"] > done.usage["cached_tokens"] >= cut


def test_meta_instruction_and_switches_are_read_once(tok: Tokenizer) -> None:
    """Every new conversation would read them again; after a switch only what changed may be read, and back nothing."""
    lines = SWITCHES | {key: Switch(tool.switch, tool.api) for key, tool in TOOLS.items()}
    with Engine(toy_model(vocab_size=tok.vocab_size, max_length=800), slots=1) as engine:

        def ask(question: str, on: bool) -> tuple[int, list[int], int]:
            """How much of the prompt was cached, the prompt, and how much of it is the head."""
            asked = dialog(calculator=on)
            asked.turns[0].human = question
            events = answer(asked, engine, tok, TOOLS, Options(Sampling(max_tokens=4), conversation=question))
            done = list(events)[-1]
            assert isinstance(done, Done)
            prompt = render(asked, tok, until="thoughts", switches=lines)[0]
            return done.usage["cached_tokens"], prompt, len(tok.encode(instruction(asked, lines)))

        first, alike = ask("add 1", True), ask("hello", True)
        assert first[0] == 0
        assert alike[0] == common_prefix(first[1], alike[1]) >= alike[2]
        off = ask("there", False)
        assert off[0] == common_prefix(alike[1], off[1]) < off[2]
        again = ask("solve x", True)  # the only row holds the other switches by now
        assert again[0] == again[2]


def test_each_form_names_what_others_share(tok: Tokenizer) -> None:
    """A prefix that reaches into the question would keep what no other conversation can use."""
    for form, passes in (("plugin", [NOTHING, SAY]), ("sft", [SAY]), ("base", [" hello"])):
        engine = ScriptedEngine([ids(tok, text) for text in passes])
        list(answer(dialog(), engine, tok, TOOLS, Options(form=form)))  # type: ignore[arg-type]
        head = {"plugin": instruction(dialog()), "sft": "Be kind.\n", "base": ""}[form]
        assert set(engine.prefixes) == {len(tok.encode(head))}
        assert tok.decode(engine.prompts[0][: engine.prefixes[0]]) == head
