"""Log-probabilities of continuations under a model, with what prompts have in common read once.

    found = likelihoods(model, [Continuation(prompt, answer), …])     # one number each: the sum over the answer's ids

Questions of a benchmark open with the same examples, and the choices of a question follow the same words. The prompts
are sorted, and cut where neighbours part so that as few tokens as possible are computed; of each group the common
beginning is read once, and the rest in batches that attend to its keys and values. Two continuations of one token
after the same prompt are two entries of one row of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from moss.chat import Dialog, render
from moss.engine.cache import common_prefix
from moss.model import Decoder
from moss.tokenizer import Tokenizer

AT_ONCE = 4096  # places of a batch
LOGITS = 64  # MB of scores of the vocabulary at a time
APART = 64  # tokens that a group of its own must save


@dataclass(frozen=True)
class Continuation:
    """Ids and what is to follow them; both hold at least one id."""

    prompt: Sequence[int]
    answer: Sequence[int]


@torch.inference_mode()
def likelihoods(model: Decoder, asked: Sequence[Continuation]) -> list[float]:
    """The natural logarithm of each answer's probability after its prompt.

    A prompt that is too long for the model loses its oldest tokens. ValueError where an answer alone is too long, or
    prompt or answer are empty.
    """
    rows: dict[tuple[int, ...], list[int]] = {}  # what the model reads, and whose it is
    for number, each in enumerate(asked):
        rows.setdefault(_read(each, model.config.max_length), []).append(number)
    found = [0.0] * len(asked)
    for group in groups(sorted(rows)):
        spans = [[len(row) - len(asked[number].answer) for number in rows[row]] for row in group]
        prefix = min(common_prefix(group[0], group[-1]), min(map(min, spans)))
        shared = Shared(model, group[0][:prefix])
        for batch in _batches(group, prefix):
            _score(model, shared, [group[at] for at in batch], asked, rows, found)
    return found


def _read(each: Continuation, longest: int) -> tuple[int, ...]:
    """What the model reads to tell of a continuation: all but its last id, the oldest left out where there are more
    than it reads."""
    if not each.prompt or not each.answer:
        raise ValueError("a continuation needs at least one id of a prompt and one of an answer")
    if len(each.answer) > longest:
        raise ValueError(f"an answer of {len(each.answer)} tokens is longer than the model reads ({longest})")
    return tuple([*each.prompt, *each.answer][:-1][-longest:])


# ---------------------------------------------------------------- prompts


def after_text(text: str, answers: Sequence[str], tok: Tokenizer) -> list[Continuation]:
    """Each answer after the text; ids are those of both together, cut where those of the text alone end."""
    prompt = tok.encode(text)
    whole = [tok.encode(text + answer) for answer in answers]
    return [Continuation(ids[: len(prompt)], ids[len(prompt) :]) for ids in whole]


def after_dialog(
    dialog: Dialog, answers: Sequence[str], tok: Tokenizer, quality: int | None = None
) -> list[Continuation]:
    """Each answer as the last reply of a conversation, without the marker that ends it, after the tag that asks for
    `quality` where there is one."""
    last = replace(dialog.turns[-1], quality=quality)
    dialog = replace(dialog, turns=[*dialog.turns[:-1], last])
    prompt, _ = render(dialog, tok, until="reply")
    end, found = tok.marker("<eom>"), []
    for answer in answers:
        ids, _ = render(replace(dialog, turns=[*dialog.turns[:-1], replace(last, reply=answer)]), tok)
        stop = next(at for at in range(len(ids) - len(end), -1, -1) if ids[at : at + len(end)] == end)
        if ids[: len(prompt)] != prompt or stop <= len(prompt):
            raise ValueError(f"{answer!r} cannot follow the prompt: this tokenizer joins the two")
        found.append(Continuation(prompt, ids[len(prompt) : stop]))
    return found


# ---------------------------------------------------------------- groups


def groups(rows: Sequence[tuple[int, ...]]) -> list[Sequence[tuple[int, ...]]]:
    """Sorted rows, cut into neighbours that share a beginning where that saves tokens."""
    shared = [common_prefix(a, b) for a, b in pairwise(rows)]
    cut, found = [(0, len(rows))] if rows else [], list[tuple[int, int]]()
    while cut:
        first, last = cut.pop()
        between = shared[first : last - 1]
        weakest = min(between, default=0)
        parts = [first + at + 1 for at, each in enumerate(between) if each == weakest]
        bounds = list(zip([first, *parts], [*parts, last], strict=True)) if parts else []
        saved = sum((min(shared[a : b - 1]) - weakest) * (b - a - 1) for a, b in bounds if b - a > 1)
        if saved - weakest * (len(bounds) - 1) > APART * len(bounds):
            cut += reversed(bounds)
        else:
            found.append((first, last))
    return [rows[first:last] for first, last in found]


def _batches(group: Sequence[tuple[int, ...]], prefix: int) -> list[list[int]]:
    """Members of a group, those of like length together, in batches of about `AT_ONCE` places."""
    order = sorted(range(len(group)), key=lambda at: len(group[at]))
    found: list[list[int]] = []
    for at in order:
        if not found or (len(group[at]) - prefix) * (len(found[-1]) + 1) > AT_ONCE:
            found.append([])
        found[-1].append(at)
    return found


# ---------------------------------------------------------------- computing


class Shared:
    """The keys and values of ids that many rows begin with: a cache for rows that go on from there."""

    def __init__(self, model: Decoder, ids: Sequence[int]) -> None:
        self.length, self._reading = len(ids), True
        self._held: list[tuple[Tensor, Tensor]] = []
        if ids:
            device = model.embed.weight.device
            model.hidden(
                torch.tensor([ids], device=device), positions=torch.arange(len(ids), device=device)[None], cache=self
            )
        self._reading = False

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v (1, G, P, E) of the beginning; of rows (B, G, T, E) give them with it in front."""
        if self._reading:
            self._held.append((k, v))
            return k, v
        if not self.length:
            return k, v
        return tuple(
            torch.cat([own.expand(len(new), -1, -1, -1), new], dim=2) for own, new in zip(self._held[layer], (k, v))
        )  # type: ignore[return-value]

    def mask(self, length: int) -> Tensor | None:
        """All of the beginning, and of its own row what is not behind."""
        if self._reading or not self.length:
            return None
        columns = torch.arange(self.length + length)
        return (columns <= self.length + torch.arange(length)[:, None])[None, None].to(self._held[0][0].device)


def _score(
    model: Decoder,
    shared: Shared,
    batch: Sequence[tuple[int, ...]],
    asked: Sequence[Continuation],
    rows: dict[tuple[int, ...], list[int]],
    found: list[float],
) -> None:
    """Compute rows that begin with `shared`, and write down what is asked of them."""
    device, start = model.embed.weight.device, shared.length
    width = max(map(len, batch)) - start
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    wanted = list[tuple[int, int, int]]()  # (continuation, place in the batch, id that should follow)
    for number, row in enumerate(batch):
        ids[number, : len(row) - start] = torch.tensor(row[start:])
        for each in rows[row]:
            answer = asked[each].answer
            at = number * width + len(row) - start - len(answer)
            wanted += [(each, at + offset, id) for offset, id in enumerate(answer)]
    places = sorted({place for _, place, _ in wanted})
    where = {place: number for number, place in enumerate(places)}
    positions = torch.arange(start, start + width, device=device).expand(len(batch), -1)
    hidden = model.hidden(ids.to(device), positions=positions, cache=shared, places=torch.tensor(places, device=device))
    logs = torch.empty(len(wanted), dtype=torch.float64)
    index = torch.tensor([where[place] for _, place, _ in wanted])
    target = torch.tensor([id for _, _, id in wanted])
    step = max(1, LOGITS * 1_000_000 // (4 * model.config.vocab_size))
    for begin in range(0, len(places), step):
        scores = torch.log_softmax(model.logits(hidden[begin : begin + step]).float(), dim=-1).cpu()
        mine = (index >= begin) & (index < begin + step)
        logs[mine] = scores[index[mine] - begin, target[mine]].double()
    for (each, _, _), value in zip(wanted, logs.tolist(), strict=True):
        found[each] += value
