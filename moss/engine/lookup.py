"""Speculative decoding by prompt lookup: guess that what followed these words last time follows them again.

Answers copy a lot: results of tools, quotes, names, code. Where the last few ids have stood before, in the prompt
or in the answer, the ids that came after them are a draft that costs nothing. The engine reads the whole draft in
one pass and keeps it as far as the model would have said the same (Saxena 2023, "Prompt Lookup Decoding"; Leviathan
et al. 2023, arXiv 2211.17192). Every token is still chosen from the model's own scores with the request's own random
numbers, so a draft changes the speed of an answer and nothing else, as long as a token's scores do not depend on its
company: in our kernels and with `deterministic` they do not; elsewhere a near tie may fall the other way.

A pass over a draft costs more than a step, so the engine keeps account of what both cost and what drafts bring, and
pauses where they do not bring GAIN times their cost: for all its requests, twice as long each time, half as long
after one that did.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # ids that must have stood together before
DRAFT = 7  # ids guessed at once: with the id before them a pass of eight
TRIALS = 3  # drafts that are tried before they are judged
PAUSE, LONGEST = 64, 4096  # steps without drafts after a first loss, and at most
MEMORY = 0.8  # share of the past in the running means
GAIN = 1.2  # times what it costs a draft must bring: clocks are not exact


class Account:
    """What drafts cost and bring: one for all requests of an engine, so that only its first ones pay for the trials."""

    def __init__(self) -> None:
        self.trials = 0
        self.step = self.draft = self.gain = 0.0  # running means: seconds a step and a pass, tokens a pass
        self.wait, self.pause = 0, PAUSE  # steps until drafts are tried again; how long the next pause is

    def waits(self) -> bool:
        """Whether the next step is one of a pause; asked once a step. A pause costs nothing else."""
        if self.wait == 0:
            return False
        self.wait -= 1
        return True


class Lookup:
    """The drafts of one request; it keeps the account that it is given, or one of its own."""

    def __init__(self, account: Account | None = None) -> None:
        self.account = Account() if account is None else account
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> where the id after its last occurrence stands
        self._known = NGRAM  # n-grams that end before this place are known

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` ids that may follow `ids`, prompt and answer so far; none where nothing is known or it loses."""
        for place in range(self._known, len(ids)):
            self._follows[tuple(ids[place - NGRAM : place])] = place
        self._known = max(self._known, len(ids))
        start = self._follows.get(tuple(ids[-NGRAM:]))
        if start is None or (self.account.trials >= TRIALS and self.account.step == 0):  # then see what a step costs
            return []
        period = len(ids) - start  # text that repeats itself goes on repeating itself
        return [ids[start + i % period] for i in range(min(most, DRAFT))]

    def stepped(self, seconds: float) -> None:
        """A plain step of one token took so long."""
        self.account.step = _mean(self.account.step, seconds)

    def passed(self, accepted: int, seconds: float) -> None:
        """A pass over a draft took so long and brought `accepted` of its ids, and one more token."""
        account = self.account
        account.trials += 1
        account.draft, account.gain = _mean(account.draft, seconds), _mean(account.gain, accepted + 1)
        if account.trials < TRIALS or account.step == 0:
            return
        if account.gain * account.step < GAIN * account.draft:
            account.wait, account.pause = account.pause, min(2 * account.pause, LONGEST)
            account.trials, account.gain = 0, 0.0  # by then other things may be said
        else:
            account.pause = max(PAUSE, account.pause // 2)


def _mean(mean: float, value: float) -> float:
    return value if mean == 0 else MEMORY * mean + (1 - MEMORY) * value
