"""Preference rows: both forms read, broken ones named, and the layout in which replies share their prompt."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moss import attention, tokenizer
from moss.attention import packed_mask
from moss.chat import META_INSTRUCTION, SWITCHES, Dialog, Round, Turn
from moss.data import pairs, preferences
from moss.data.pairs import Groups, Preference, Reply, answered, encode, from_json, read, to_json
from moss.tokenizer import Tokenizer

PROMPTS = list(islice(preferences.prompts(3), 30))


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    told = (f"{each.history.turns[-1].human} {reply.text}" for each in PROMPTS for reply in each.replies)
    return tokenizer.train(told, vocab_size=500)


def texts(*turns: str) -> str:
    """A conversation as the files with `chosen` and `rejected` have it, the human first."""
    return "".join(f"\n\n{('Human', 'Assistant')[at % 2]}: {words}" for at, words in enumerate(turns))


# -- rows ------------------------------------------------------------------------------------------------------------


def test_our_rows_come_back_as_they_were() -> None:
    """Prevents a history, level, source or judge's knowledge lost on the way through a file."""
    used = Round("add", 'Calculate("1+1")', 'Calculate("1+1") => 2')
    switches = {key: key == "calculator" for key in ("thoughts", *SWITCHES)}
    history = Dialog("Be MOSS.", switches, [Turn("1+1?", [used], "2"), Turn("And?", [used])], {"x": [1]})
    whole = Preference(history, [Reply("3", "a", 40), Reply("", "b"), Reply("4")], [(0, 1), (2, 0)])
    assert from_json(json.loads(json.dumps(to_json(whole, "me")))) == whole
    for row in map(to_json, PROMPTS):
        assert to_json(from_json(json.loads(json.dumps(row)))) == row
    assert "MOSS" not in to_json(whole)["history"]["chat"]["turn_2"]
    assert to_json(whole, "me")["pairs"] == [[0, 1, "me", 0, False], [2, 0, "me", 0, False]]


def test_a_history_may_stand_in_any_format_and_ties_teach_nothing() -> None:
    """Prevents rows from elsewhere that need converting first, and ties taken for wins."""
    messages = [{"role": "system", "content": "Be MOSS."}, {"role": "user", "content": "Hi"}]
    replies = [{"text": "Hello"}, {"text": "Go away"}, {"text": "Hi"}]
    row = {"history": {"messages": messages}, "replies": replies, "pairs": [[0, 1], [0, 2, "judge", 1, True]]}
    found = from_json(row)
    assert found.history.turns == [Turn("Hi", [Round()])] and found.history.meta == "Be MOSS."
    assert found.replies == [Reply("Hello"), Reply("Go away"), Reply("Hi")]
    assert found.pairs == [(0, 1)]


def test_chosen_and_rejected_by_hand() -> None:
    """Prevents turns that are merged, cut off or given to the wrong speaker."""
    row = {
        "chosen": texts("Hi", "Hello.\n\nWhat is it?", "Say: \n\nHuman: is a word", "It is."),
        "rejected": texts("Hi", "Hello.\n\nWhat is it?", "Say: \n\nHuman: is a word", "No.\n\nAssistant, out."),
    }
    found = from_json(row)
    # the paragraph that begins with "Human:" is read as the same speaker's second part, which is what the file says
    assert found.history.turns == [Turn("Hi", reply="Hello.\n\nWhat is it?"), Turn("Say:\n\nis a word")]
    assert found.history.meta == META_INSTRUCTION and found.history.switches == {}
    assert [reply.text for reply in found.replies] == ["It is.", "No.\n\nAssistant, out."]
    assert found.pairs == [(0, 1)]


def test_speakers_who_go_on_and_histories_that_differ() -> None:
    """Prevents a reply judged under another question, and a reply cut in two by its own second paragraph."""
    went_on = {"chosen": texts("Hi", "Hello."), "rejected": texts("Hi", "Go") + "\n\nAssistant:  away."}
    found = from_json(went_on)
    assert [reply.text for reply in found.replies] == ["Hello.", "Go\n\naway."] and found.pairs == [(0, 1)]
    other = from_json({"chosen": texts("Hi", "Hello."), "rejected": texts("Hey", "Hello!")})
    assert other.history.turns == [Turn("Hi")] and [reply.text for reply in other.replies] == ["Hello."]
    assert other.pairs == []
    silent = from_json({"chosen": texts("Hi", ""), "rejected": texts("Hi", "What?")})
    assert [reply.text for reply in silent.replies] == ["", "What?"] and silent.pairs == [(0, 1)]


GOOD = {"messages": [{"role": "user", "content": "Hi"}]}
TWO = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": texts("Hi", "a")}, "chosen and rejected"),
        ([1], "chosen and rejected"),
        ({"chosen": texts("Hi", "a"), "rejected": 5}, "rejected must be text"),
        ({"chosen": "Hi there", "rejected": texts("Hi", "a")}, "chosen must begin with 'Human:'"),
        ({"chosen": texts("Hi"), "rejected": texts("Hi")}, "end with the turn of 'Assistant:'"),
        ({"history": GOOD, "replies": TWO, "pairs": [[0, 2]]}, r"\[0, 2\] must name two different places"),
        ({"history": GOOD, "replies": TWO, "pairs": [[1, 1]]}, r"\[1, 1\] must name two different places"),
        ({"history": GOOD, "replies": TWO, "pairs": [[-1, 0]]}, r"\[-1, 0\] must name two different places"),
        ({"history": GOOD, "replies": TWO, "pairs": [[0]]}, r"\[0\] must begin with two places"),
        ({"history": GOOD, "replies": TWO, "pairs": ["0,1"]}, "'0,1' must begin with two places"),
        ({"history": GOOD, "replies": TWO, "pairs": {}}, "must be lists"),
        ({"history": GOOD, "replies": ["a", "b"], "pairs": [[0, 1]]}, "reply 0 must be an object with a `text`"),
        ({"history": GOOD, "replies": [{"text": "a", "level": "x"}], "pairs": []}, "reply 0 has the level 'x'"),
        ({"history": {"turns": []}, "replies": TWO, "pairs": []}, "chat .*messages.*conversations"),
        (
            {"history": {"messages": [*GOOD["messages"], {"role": "assistant", "content": "Yo"}]}, "replies": TWO}
            | {"pairs": []},
            "the last turn of the history has a reply",
        ),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(row: Any, said: str, tmp_path: Path) -> None:
    """Prevents a traceback, or a row that is silently misread, from one bad line in a large file."""
    file = tmp_path / "pairs.jsonl"
    fine = json.dumps({"history": GOOD, "replies": TWO, "pairs": [[0, 1]]})
    file.write_text(f"{fine}\n\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:3: .*{said}"):
        list(read(file))


# -- ids -------------------------------------------------------------------------------------------------------------


def every_batch(groups: Groups, count: int) -> list[dict[str, np.ndarray]]:
    return [groups.batch(at, min(count, len(groups) - at)) for at in range(0, len(groups), count)]


def test_encode_ends_with_eom_and_knows_where_the_reply_begins(tok: Tokenizer) -> None:
    """Prevents a score read before the end, and a reply counted from the wrong token."""
    dialog = answered(PROMPTS[0].history, "Apples and pears.")
    ids, start = encode(dialog, tok)
    assert ids[-1] == tok.marker("<eom>")[0] and ids[start - 1] == tok.opening("<|MOSS|>")[-1]
    assert tok.decode(ids[start:-1]) == " Apples and pears."
    assert PROMPTS[0].history.turns[-1].reply == ""


def test_layout_by_hand(tok: Tokenizer) -> None:
    """Prevents positions that begin anew behind the prompt, learnt prompt tokens, and documents numbered alike."""
    history = Dialog("", {}, [Turn("a")])
    replies = [Reply("b"), Reply("ccc"), Reply("unused"), Reply("")]
    groups = Groups([Preference(history, replies, [(1, 0), (0, 3)])], tok, 80)
    prompt = encode(answered(history, ""), tok)[0][: encode(answered(history, ""), tok)[1]]
    own = [encode(answered(history, text), tok)[0][len(prompt) :] for text in ("b", "ccc", "")]
    batch = groups.batch(0, 1)
    shared = len(prompt) - 1
    ids, positions, mask, segments = [*prompt[:-1]], [*range(shared)], [0] * shared, [1] * shared
    last = []
    for reply in own:
        segments += [len(ids) + 1 + pairs.CONTINUES] * (len(reply) + 1)
        ids += [prompt[-1], *reply]
        positions += range(shared, shared + len(reply) + 1)
        mask += [0] + [1] * len(reply)
        last.append(len(ids) - 1)
    rest = 80 - len(ids)
    assert batch["ids"].tolist() == [ids + [tok.pad] * rest]
    assert batch["positions"].tolist() == [positions + [0] * rest]
    assert batch["mask"].tolist() == [mask + [0] * rest]
    assert batch["segments"].tolist() == [segments + [0] * rest]
    assert batch["last"].tolist() == [last] and batch["reply"].tolist() == [[0, 1, 2]]
    assert batch["pairs"].tolist() == [[0, 1, 0], [0, 0, 2]]
    assert groups.replies == [(0, 0), (0, 1), (0, 3)]
    assert groups.pairs.tolist() == [[1, 0], [0, 2]]
    assert groups.reply_lengths.tolist() == [len(reply) for reply in own]
    assert groups.fill == pytest.approx(len(ids) / 80)


def test_a_reply_sees_what_it_would_see_alone(tok: Tokenizer) -> None:
    """Prevents replies that see one another or another prompt, and a prompt that sees its replies: what each token
    attends to, put together, is its conversation as `encode` gives it, at positions 0, 1, 2…"""
    assert pairs.CONTINUES == attention.CONTINUES
    groups = Groups(PROMPTS, tok, 1400)
    seen = 0
    for batch in every_batch(groups, 4):
        visible = packed_mask(torch.from_numpy(batch["segments"]))[:, 0].numpy()
        for line, (last, numbers) in enumerate(zip(batch["last"], batch["reply"], strict=True)):
            for place, number in zip(last[last >= 0], numbers[numbers >= 0], strict=True):
                prompt, which = groups.replies[number]
                preference = groups.preferences[prompt]
                ids, start = encode(answered(preference.history, preference.replies[which].text), tok)
                path = np.flatnonzero(visible[line, place])
                assert batch["ids"][line, path].tolist() == ids
                assert batch["positions"][line, path].tolist() == list(range(len(ids)))
                assert batch["mask"][line, path].tolist() == [0] * start + [1] * (len(ids) - start)
                for at, token in enumerate(path):
                    assert np.array_equal(np.flatnonzero(visible[line, token]), path[: at + 1])
                seen += 1
    assert seen == 6 * len(PROMPTS) == len(groups.replies)


def test_each_pair_once_an_epoch_and_in_one_row(tok: Tokenizer) -> None:
    """Prevents pairs lost, doubled or turned round on the way into batches, and a prompt spread over two steps."""
    groups = Groups(PROMPTS, tok, 1400, seed=5)
    assert len(groups) < len(PROMPTS)  # so that rows hold several prompts
    found = []
    for batch in every_batch(groups, 3):
        row, winner, loser = batch["pairs"].T
        found += list(zip(batch["reply"][row, winner], batch["reply"][row, loser], strict=True))
        for numbers in batch["reply"]:
            held = [groups.replies[number][0] for number in numbers if number >= 0]
            assert all(held.count(prompt) == 6 for prompt in held)
    assert sorted(found) == sorted(map(tuple, groups.pairs.tolist())) and len(found) == 15 * len(PROMPTS)
    for winner, loser in groups.pairs:
        (prompt, a), (same, b) = groups.replies[winner], groups.replies[loser]
        replies = groups.preferences[prompt].replies
        assert prompt == same and (replies[a].level or 0) > (replies[b].level or 0)


def test_a_position_is_all_there_is_to_know(tok: Tokenizer) -> None:
    """Prevents a resumed run from seeing other rows than an unbroken one, also across the end of an epoch."""
    unbroken, resumed = Groups(PROMPTS, tok, 1400, seed=5), Groups(PROMPTS, tok, 1400, seed=5)
    seen = [unbroken.batch(at, 4) for at in range(0, 3 * len(unbroken), 4)]
    again = resumed.batch(4 * (len(seen) - 1), 4)
    assert all(np.array_equal(seen[-1][name], again[name]) for name in again)
    assert not np.array_equal(unbroken.batch(0, 4)["ids"], unbroken.batch(len(unbroken), 4)["ids"])


def test_what_is_left_out_is_counted(tok: Tokenizer) -> None:
    """Prevents silent loss of rows, pairs that teach nothing, and replies computed that are in no pair."""
    history = Dialog("", {}, [Turn("a")])
    same = Preference(history, [Reply("b"), Reply("b"), Reply("c")], [(0, 1), (0, 2)])
    untold = Preference(history, [Reply("b"), Reply("b")], [(0, 1)])
    none = Preference(history, [Reply("b"), Reply("c")], [])
    long = Preference(history, [Reply("b"), Reply("c " * 500)], [(0, 1)])
    groups = Groups([same, untold, none, long], tok, 100)
    assert groups.dropped == {"no pair": 2, "too long": 1}
    assert groups.preferences == [same] and groups.replies == [(0, 0), (0, 2)] and groups.pairs.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="1 rows have no pair, and of 1 the replies do not fit --length 100"):
        Groups([none, long], tok, 100)
    with pytest.raises(ValueError, match="the data hold no row"):
        Groups([], tok, 100)


def test_the_record_tells_other_data_apart(tok: Tokenizer) -> None:
    """Prevents a run that goes on with other pairs, other replies or other borders than it began with."""
    first = PROMPTS[0]
    turned = Preference(first.history, first.replies, [(b, a) for a, b in first.pairs])
    fewer = Preference(first.history, first.replies, first.pairs[:-1])
    records = [Groups([each], tok, 1000).record() for each in (first, turned, fewer, PROMPTS[1])]
    assert len({record["sha256"] for record in records}) == 4
    assert records[0] == Groups([first], tok, 1000, seed=9).record()
    assert {name: records[0][name] for name in ("rows", "replies", "pairs", "packed")} == {
        "rows": 1, "replies": 6, "pairs": 15, "packed": 1,
    }  # fmt: skip


def test_real_pairs_are_read() -> None:
    """Prevents a reader that only knows what its author made up: every row of the real file has one pair, two of them
    only because a speaker who goes on is one turn."""
    if "MOSS_TEST_DATA" not in os.environ:
        pytest.skip("set MOSS_TEST_DATA to the folder with real data")
    found = list(read(Path(os.environ["MOSS_TEST_DATA"]) / "hh_harmless_pairs.jsonl"))
    assert len(found) == 1525 and all(each.pairs == [(0, 1)] for each in found)
    assert sum(not each.replies[0].text for each in found) == 3
    assert max(len(each.history.turns) for each in found) > 4
    assert all(
        turn.human and (turn.reply or turn is each.history.turns[-1]) for each in found for turn in each.history.turns
    )
