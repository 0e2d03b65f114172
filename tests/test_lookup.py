"""Prompt lookup: what is guessed, when it pauses, and that it never changes an answer."""

from __future__ import annotations

import random

import pytest
import torch

from moss.engine import Engine, Sampling, Stream, engine, lookup
from moss.engine.lookup import DRAFT, LONGEST, PAUSE, TRIALS, Account, Lookup
from moss.model import Decoder
from tests.fakes import toy_model

VOCAB = 97


def test_drafts_follow_the_last_occurrence() -> None:
    """The id after an n-gram is the draft; an n-gram that ends the text has nothing after it yet."""
    drafts = Lookup()
    assert drafts.propose([1, 2, 3, 4, 5], 9) == []
    assert drafts.propose([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert drafts.propose([1, 2, 3, 4, 5, 1, 2, 3, 8, 1, 2, 3], 9)[:4] == [8, 1, 2, 3]  # the later one
    assert drafts.propose([1, 2], 9) == []


def test_repetition_is_continued() -> None:
    """Text of period two: the draft goes on beyond the end of what is known, at its full length and no longer."""
    assert Lookup().propose([6, 7, 6, 7, 6, 7], 99) == ([6, 7] * DRAFT)[:DRAFT]
    assert Lookup().propose([6, 7, 6, 7, 6, 7], 0) == []


def test_pauses_where_it_loses() -> None:
    """Passes that cost three steps and bring one token must stop, twice as long each time, and resume once they win."""
    drafts, text = Lookup(), [6, 7, 6, 7, 6, 7]
    drafts.stepped(1.0)

    def pause(accepted: int) -> int:
        for _ in range(TRIALS):
            assert drafts.propose(text, 9)
            drafts.passed(accepted, 3.0)
        steps = 0
        while drafts.account.waits():
            steps += 1
        return steps

    assert [pause(0) for _ in range(3)] == [PAUSE, 2 * PAUSE, 4 * PAUSE]
    assert [pause(0) for _ in range(7)][-2:] == [LONGEST, LONGEST]
    assert [pause(DRAFT) for _ in range(3)] == [0, 0, 0]


def test_the_next_request_knows_what_the_last_one_learnt() -> None:
    """Every pass of every turn paid for a trial of its own before it saw again that drafts lose."""
    account, text = Account(), [6, 7, 6, 7, 6, 7]
    tried = []
    for _ in range(30):  # answers of ten steps
        drafts = Lookup(account)
        tried.append(0)
        for _ in range(10):
            if not account.waits() and drafts.propose(text, 9):
                drafts.passed(0, 3.0)
                tried[-1] += 1
            else:
                drafts.stepped(1.0)
    assert (
        sum(tried) == 3 * TRIALS + 1 and PAUSE == 64
    )  # once without a step to compare; pauses of 64 and of 128 steps, in 300 steps


def test_a_step_is_measured_before_drafts_are_judged() -> None:
    """A request that copied from its first token on knew no cost of a step, and gave up whatever it gained."""
    drafts = Lookup()
    for _ in range(TRIALS):
        assert drafts.propose([6, 7, 6, 7, 6, 7], 9)
        drafts.passed(DRAFT, 2.0)
    assert not drafts.propose([6, 7, 6, 7, 6, 7], 9)
    drafts.stepped(1.0)
    assert drafts.propose([6, 7, 6, 7, 6, 7], 9)


def test_goes_on_where_it_wins() -> None:
    """Passes that cost two steps and bring three tokens are worth it for ever."""
    drafts = Lookup()
    drafts.stepped(1.0)
    for _ in range(50):
        assert drafts.propose([6, 7, 6, 7, 6, 7], 9)
        drafts.passed(2, 2.0)


def copying(seed: int) -> list[int]:
    """A prompt with pieces that return, as results of tools do in answers."""
    rng = random.Random(seed)
    piece = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
    noise = [rng.randrange(VOCAB) for _ in range(rng.randrange(0, 40))]
    return [*noise, *piece * rng.randrange(1, 6), *noise[: rng.randrange(0, 5)]]


def settings(seed: int) -> Sampling:
    """Greedy mostly; drawn and penalized as well, because a draft may change neither."""
    rng = random.Random(seed)
    return Sampling(
        temperature=rng.choice([0, 0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 0.7, 1.1]),  # below 1 makes the toy repeat itself
        max_tokens=rng.randrange(1, 60),
        stop_ids=frozenset({rng.randrange(VOCAB)}),
        seed=seed,
    )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.repeated
def test_same_answer_with_and_without(repeats: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft kept one token too far, a stale key or a random number used twice would change the answer."""
    monkeypatch.setattr(lookup, "TRIALS", 10**9)  # never pause: all of it is to be tested
    model = toy_model(max_length=120)
    drafted = accepted = 0
    with (
        Engine(model, slots=1, lookup=False, deterministic=deterministic) as plain,
        Engine(model, slots=1, deterministic=deterministic, lookup=True) as guessing,
    ):
        for seed in range(4 * repeats):
            want = plain.submit(copying(seed), settings(seed), conversation=seed % 3)
            got = guessing.submit(copying(seed), settings(seed), conversation=seed % 3)
            tokens = [[(token.id, token.logprob) for token in stream] for stream in (want, got)]
            assert [id for id, _ in tokens[0]] == [id for id, _ in tokens[1]], seed
            assert [p for _, p in tokens[1]] == pytest.approx(
                [p for _, p in tokens[0]], abs=0 if deterministic else 1e-4
            )
            assert want.finish == got.finish and want.drafted == 0
            drafted, accepted = drafted + got.drafted, accepted + got.accepted
    assert 0 < accepted < drafted


class Parrot(torch.nn.Module):
    """A runner that says again what followed the last id at its first place, and counts its passes."""

    def __init__(self, model: Decoder, text: list[int]) -> None:
        super().__init__()
        self.model, self.text, self.passes = model, text, 0

    def hidden(self, ids: torch.Tensor, **rest: object) -> torch.Tensor:
        self.passes += 1
        return ids[..., None].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        following = [self.text[self.text.index(int(id)) + 1] for id in hidden[:, 0]]
        return 10 * torch.nn.functional.one_hot(torch.tensor(following), VOCAB).float()


def test_requests_of_an_engine_share_their_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of a few words never end the trials that each of them begins anew."""
    accounts: list[Account] = []
    monkeypatch.setattr(engine, "Lookup", lambda account: accounts.append(account) or Lookup(account))
    with Engine(toy_model(), slots=1, lookup=True) as shared:
        for _ in range(2):
            list(shared.submit([1, 2, 3] * 5, Sampling(temperature=0, max_tokens=4)))
    assert accounts[0] is accounts[1] and accounts[0].step > 0


def test_copying_takes_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty tokens that stand in the prompt must come in passes of eight; in company each step is of one token."""
    monkeypatch.setattr(lookup, "TRIALS", 10**9)
    text = list(range(60))
    with Engine(toy_model(), slots=2, lookup=True) as engine:
        engine.runner = parrot = Parrot(engine.model, text)
        greedy = Sampling(temperature=0, max_tokens=40)
        stream = engine.submit([*text, 3, 4, 5], greedy)
        assert [token.id for token in stream] == list(range(6, 46))
        assert parrot.passes == 1 + 5 and stream.accepted == stream.drafted == 34
        streams: list[Stream] = [engine.submit([*text, 3, 4, 5], greedy) for _ in range(2)]
        assert [[token.id for token in stream] for stream in streams] == [list(range(6, 46))] * 2


def test_small_models_do_not_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the bundled model is over before a guess is worth its search."""
    for smallest, looks in ((1, True), (1 << 40, False)):
        monkeypatch.setattr(engine, "LOOKUP_BYTES", smallest)
        with Engine(toy_model()) as one:
            assert one.lookup == looks
