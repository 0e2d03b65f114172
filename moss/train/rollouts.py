"""PPO's data: prompts, the replies that the present policy writes to them, and what each of their tokens was worth.

What    `Rollouts` is the `Data` of `moss train ppo`. A *block* is some replies, written when training enters it: our
        engine writes them on the weights that train, the preference model scores them, and a reply's reward is
        that score at its end less beta (log policy - log reference) at each token (equation 2 of the paper).
        Advantages are GAE over the critic's values, whitened over the block.
Why     What PPO silently goes wrong by is decided here: which weights write, what the old log-probabilities are, what
        a killed run remembers.
How     rollouts = Rollouts(fit(read(paths), tok, 512, 128), tok, net, reference=…, score=…, length=512, …)
        batch = rollouts.batch(position, 32)    # 32 replies in packed rows, with `TOKENS` beside the ids

Old log-probabilities and values come from a training forward over the same micro-batches as the first pass over the
block, never from the engine: at the first minibatch every ratio is 1, and at the first block every KL is 0. The
random numbers of a reply come from (seed, its number), and on a CPU the engine's scores of it do not depend on its
neighbours, so that a block is the same however it was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from moss import dist
from moss.chat import Dialog, TooLong, parse, render, trim
from moss.data import dialogs, pairs
from moss.data.pack import Rows, best_fit, lay
from moss.engine import Engine, Sampling
from moss.engine.step import Step, runner
from moss.log import note
from moss.lora import adapters, merge, merge_rows, view
from moss.model import Decoder
from moss.tokenizer import Tokenizer
from moss.train.loop import Micro
from moss.train.machine import to_device
from moss.train.rl_math import gae, kl_k1, whiten

PASSES = 1  # over each block; where training takes longer than writing, a second one costs more than it brings
GAMMA, LAMBDA = 1.0, 0.95  # a reply is one short episode: what is earned at its end counts in full
MISSING_END = 1.0  # taken off the score of a reply that never ends, as TRL's `missing_eos_penalty` does
SLOTS = 32  # replies that the engine writes at a time
SHAPES = 8  # numbers of packed rows that a batch may have: each is a shape to compile
FIGURES = ("reward", "objective", "kl", "length", "ended", "distinct", "slope")  # of a block, over its replies
TOKENS = ("old_log_probs", "old_values", "advantages", "returns")  # what each learnt token carries besides its id


class Nets(Protocol):
    """What trains, as rollouts see it (`ppo.ActorCritic`)."""

    policy: Decoder  # what writes

    def log_probs(self, batch: Micro) -> Tensor:
        """The policy's log-probability of each learnt token (N,), in the order of the flattened batch."""
        ...

    def values(self, batch: Micro) -> Tensor:
        """The critic's value of what stands before each learnt token (N,)."""
        ...


# ---------------------------------------------------------------- prompts


class Prompt(NamedTuple):
    """What the policy is asked: the ids up to `<|MOSS|>:`, and the conversation, whose last turn has no reply."""

    ids: list[int]
    dialog: Dialog


def read(paths: Iterable[Path]) -> Iterator[Dialog]:
    """Conversations without their last reply, from preference rows (each history once) or from conversations."""
    for path in paths:
        _, first = next(dialogs.read_rows(path), ("", None))
        if isinstance(first, dict) and ("history" in first or "chosen" in first):
            yield from (preference.history for preference in pairs.read(path))
            continue
        for dialog in dialogs.read(path):
            last = dialog.turns[-1]
            edges = {name: edge for name, edge in last.edges.items() if not name.startswith("reply.")}
            yield replace(dialog, turns=[*dialog.turns[:-1], replace(last, reply="", quality=None, edges=edges)])


def fit(asked: Iterable[Dialog], tok: Tokenizer, length: int, max_tokens: int) -> list[Prompt]:
    """Prompts that leave room for a reply: of longer ones the oldest turns go; if that is not enough, the prompt."""
    prompts, dropped = [], 0
    for dialog in asked:
        try:
            kept, _ = trim(dialog, tok, length - max_tokens, until="reply")
        except TooLong:
            dropped += 1
            continue
        prompts.append(Prompt(render(kept, tok, until="reply")[0], kept))
    if not prompts and dropped:
        raise ValueError(
            f"none of {dropped} prompts fits --length {length} less --max-tokens {max_tokens}; raise --length"
        )
    if not prompts:
        raise ValueError("there is no prompt to answer; give --data with at least one conversation")
    note(f"{len(prompts):,} prompts; {dropped:,} dropped, which do not fit --length {length} less a reply")
    return prompts


def readable(prompts: Sequence[Prompt], tok: Tokenizer, room: int, max_tokens: int) -> list[Prompt]:
    """Prompts whose last question leaves a reply room in what the preference model reads: `room` tokens of `tok`."""

    def fits(prompt: Prompt) -> bool:
        alone = replace(prompt.dialog, turns=prompt.dialog.turns[-1:])
        return len(render(alone, tok, until="reply")[0]) + max_tokens <= room

    found = [prompt for prompt in prompts if fits(prompt)]
    if len(found) < len(prompts):
        note(f"{len(prompts) - len(found):,} prompts dropped, since the preference model reads only {room} tokens")
    if not found:
        raise ValueError(
            f"the preference model reads {room} tokens, too few for any prompt and a reply of --max-tokens {max_tokens}"
        )
    return found


# ---------------------------------------------------------------- replies


def generate(policy: Decoder, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> list[list[int]]:
    """The reply to each prompt, with the id that ended it, written by the engine on the weights as they are now.

    The engine is made anew each time, since what it remembers is of the weights it began with: what it read of
    prompts, and copies of norms and biases. On a CPU a reply depends on its own prompt and seed alone: through
    kernels whose sums know no neighbours, or, where there are none, one reply at a time.
    """
    alive = view(policy, live=True)  # the same tensors, without blocks that were compiled for training
    on_cpu = next(alive.parameters()).device.type == "cpu"
    if adapters(alive):
        (merge if on_cpu else merge_rows)(alive)  # the kernels know no adapters
    exact = isinstance(runner(alive), Step)
    slots = SLOTS if exact or not on_cpu else 1
    with Engine(alive, slots=slots, queue=2 * len(prompts), deterministic=exact, lookup=False) as engine:
        streams = [engine.submit(ids, sampling) for ids, sampling in zip(prompts, samplings, strict=True)]
        return [[token.id for token in stream] for stream in streams]


def distinct(replies: Sequence[Sequence[int]]) -> float:
    """The share of different ones among all pairs of neighbouring ids, the start of a reply being one of them."""
    found = [pair for reply in replies for pair in zip([-1, *reply], reply)]
    return len(set(found)) / len(found)


def slope(lengths: np.ndarray, scores: np.ndarray) -> float:
    """What a token more brings: the slope of the line through (length, score) with the least squares; 0 if vertical."""
    spread = lengths - lengths.mean()
    square = float((spread**2).sum())
    return float((spread * scores).sum()) / square if square else 0.0


@dataclass(frozen=True)
class Block:
    """Prompts with the replies of one moment's policy, and all that training on them needs."""

    number: int
    rows: Rows  # each prompt with its reply, the reply learnt
    tokens: dict[str, np.ndarray]  # under the names of TOKENS: (ids of all rows,), 0 where nothing is learnt
    figures: dict[str, float]  # under the names of FIGURES


def earned(
    rows: Rows, scores: np.ndarray, log_probs: Tensor, ref_log_probs: Tensor, values: Tensor, beta: float
) -> tuple[dict[str, Tensor], np.ndarray]:
    """What each learnt token of `rows` was worth, under the names of `TOKENS`, and the KL of each reply.

    scores (R,) of the replies; the tensors (N,) are of all learnt tokens, reply after reply. Equation 2: a token's
    reward is -beta (log policy - log reference), the last one's has the score on top.
    """
    sizes = torch.from_numpy(np.add.reduceat(rows.mask.astype(np.int64), rows.starts[:-1]))
    mask = torch.arange(int(sizes.max())) < sizes[:, None]  # (R, T): a reply a line, from its left edge on

    def lines(flat: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=flat.dtype).masked_scatter(mask, flat)

    kl = lines(kl_k1(log_probs, ref_log_probs))
    rewards = -beta * kl
    rewards[torch.arange(len(sizes)), sizes - 1] += torch.from_numpy(scores).to(kl.dtype)
    advantages, returns = gae(rewards, lines(values), mask, GAMMA, LAMBDA)
    found = (log_probs, values, whiten(advantages, mask)[mask], returns[mask])
    return dict(zip(TOKENS, found, strict=True)), kl.sum(dim=1).double().numpy()


# ---------------------------------------------------------------- data


@dataclass
class Rollouts:
    """Replies as training data: position counts replies, and a batch of them is laid in packed rows.

    `replies` of them are a block, which is made when a position enters it, by the weights of that moment, and gone
    through `passes` times, in another order each time.
    """

    prompts: list[Prompt]
    tok: Tokenizer
    net: Nets  # what computes; the loop's `use` puts its copy in another dtype here
    reference: Callable[[Micro], Tensor]  # log-probabilities (N,) of the learnt tokens under the frozen first policy
    score: Callable[[list[Dialog]], np.ndarray]  # the preference model's score of each conversation's last reply
    length: int  # places in a packed row; prompt and reply together never take more
    replies: int  # in a block
    max_tokens: int  # of a reply
    beta: float = 0.02
    passes: int = PASSES
    seed: int = 0
    models: dict[str, str] = field(default_factory=dict)  # what tells the frozen models from others
    frozen: dict[str, nn.Module] = field(default_factory=dict)  # these models themselves, by name
    ending: Callable[[Sequence[dict[str, float]]], str] | None = None  # why to end, from the figures of all blocks
    history: list[dict[str, float]] = field(default_factory=list)
    block: Block | None = None

    def __len__(self) -> int:
        return len(self.prompts) * self.passes

    @property
    def fill(self) -> float:
        """The share of a row that a mean prompt takes with the longest reply; packing fills the rest."""
        return (sum(len(prompt.ids) for prompt in self.prompts) / len(self.prompts) + self.max_tokens) / self.length

    @property
    def period(self) -> int:
        """Positions of a block with all its passes: each time a new one is written."""
        return self.replies * self.passes

    @property
    def slots(self) -> int:
        """Replies that are written at a time, at most."""
        return min(SLOTS, self.replies)

    def record(self) -> dict[str, Any]:
        """The prompts, the shape of a block and the frozen models: a run goes on with the same ones only."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(np.array([len(prompt.ids), *prompt.ids]).tobytes())
        sizes = {"rows": len(self.prompts), "replies": self.replies, "passes": self.passes}
        return {"sha256": digest.hexdigest(), **sizes, **self.models}

    def use(self, net: Any) -> None:
        """Write and compute with this copy from now on."""
        self.net = net

    def stop_reason(self) -> str:
        """Why training should end here, or nothing."""
        return self.ending(self.history) if self.ending else ""

    def state_dict(self) -> dict[str, Any]:
        """The present block, so that a run goes on in its middle, and the figures of all."""
        held: dict[str, Any] = {"history": self.history}
        if self.block:
            rows = self.block.rows
            arrays = {"ids": rows.ids, "mask": rows.mask, "starts": rows.starts, **self.block.tokens}
            held |= {name: torch.from_numpy(array) for name, array in arrays.items()}
            held |= {"number": self.block.number, "figures": self.block.figures}
        return held

    def load_state_dict(self, held: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.history, self.block = list(held["history"]), None
        if "number" in held:
            rows = Rows(*(held[name].numpy() for name in ("ids", "mask", "starts")))
            self.block = Block(held["number"], rows, {name: held[name].numpy() for name in TOKENS}, held["figures"])

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """`count` replies in packed rows (…, length): as of `pack.Packed`, `TOKENS` beside them, and "block", FIGURES.

        There are as few rows as hold them, up to a multiple that keeps the number of shapes down to `SHAPES`.
        """
        number, at = divmod(position, self.period)
        number_of_pass, at = divmod(at, self.replies)
        if at + count > self.replies:
            raise ValueError(f"{count} replies from position {position} on cross the end of a pass over {self.replies}")
        if self.block is None or self.block.number != number:
            self.block = self._make(number, count)
            self.history.append(self.block.figures)
        block, order = self.block, np.arange(self.replies)
        if number_of_pass:
            order = np.random.default_rng([self.seed, number, number_of_pass]).permutation(self.replies)
        batch, index = self._lay(block.rows, order[at : at + count].tolist())
        for name, values in block.tokens.items():
            batch[name] = np.where(batch["mask"] == 1, values[index], 0)
        return batch | {"block": np.array([block.figures[name] for name in FIGURES])}

    def _lay(self, rows: Rows, members: list[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The named rows packed, and the place of each token among all ids of `rows`."""
        lengths = rows.lengths
        bins = best_fit(lengths, self.length, sorted(members, key=lambda member: -lengths[member]))
        bins += [[] for _ in range(-len(bins) % max(1, len(members) // SHAPES))]
        places = Rows(np.arange(len(rows.ids), dtype=np.int32), rows.mask, rows.starts)
        return lay(rows, bins, self.length, self.tok.pad), lay(places, bins, self.length)["ids"]

    def _make(self, number: int, count: int) -> Block:
        """Let the present policy answer the prompts of a block, and work out what each token was worth.

        Of several ranks each writes and scores a share; the block is the same on all of them.
        """
        first = number * self.replies
        mine = range(first + dist.rank(), first + self.replies, dist.world())
        asked = [self._prompt(item) for item in mine]
        policy = dist.whole(self.net.policy, everywhere=True)
        told = generate(policy, [prompt.ids for prompt in asked], [self._sampling(item) for item in mine])
        scored = self.score([self._answered(prompt, reply) for prompt, reply in zip(asked, told)])
        shares = dist.gathered([(p.ids, reply, float(score)) for p, reply, score in zip(asked, told, scored)])
        written = [shares[at % len(shares)][at // len(shares)] for at in range(self.replies)]
        ended = np.array([reply[-1] in self.tok.marker("<eom>") for _, reply, _ in written])
        scores = np.array([score for _, _, score in written]) - MISSING_END * ~ended
        if not np.isfinite(scores).all():
            raise ValueError("the preference model gave a score that is not finite: its weights are damaged")
        rows = Rows.of([(ids + reply, [0] * len(ids) + [1] * len(reply)) for ids, reply, _ in written])
        found, kl = earned(rows, scores, *self._compute(rows, count), self.beta)
        tokens = {name: np.zeros(len(rows.ids), dtype=value.numpy().dtype) for name, value in found.items()}
        for name, value in found.items():
            tokens[name][rows.mask == 1] = value.numpy()
        lengths = np.array([len(reply) for _, reply, _ in written], dtype=np.float64)
        means = (scores, scores - self.beta * kl, kl, lengths, ended)
        variety = distinct([reply for _, reply, _ in written])
        figures = [*(float(each.mean()) for each in means), variety, slope(lengths, scores)]
        return Block(number, rows, tokens, dict(zip(FIGURES, figures, strict=True)))

    def _compute(self, rows: Rows, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of policy and reference, and values, of all learnt tokens (N,), reply after reply.

        The forwards of policy and critic are those of training, gradients and layout included: compiled or not, their
        bits are those that the first pass will compute.
        """
        device = next(self.net.policy.parameters()).device
        parts: list[tuple[np.ndarray, Tensor, Tensor, Tensor]] = []
        for begin in range(0, len(rows), count)[dist.rank() :: dist.world()]:
            laid, index = self._lay(rows, list(range(begin, min(begin + count, len(rows)))))
            batch = to_device(laid, device)
            with torch.enable_grad():
                log_probs, values = self.net.log_probs(batch).detach(), self.net.values(batch).detach()
            with torch.no_grad():
                reference = self.reference(batch)
            parts.append((index[laid["mask"] == 1], log_probs.cpu(), reference.cpu(), values.cpu()))
        parts = [part for share in dist.gathered(parts) for part in share]
        order = torch.from_numpy(np.argsort(np.concatenate([places for places, *_ in parts])))
        log_probs, reference, values = (torch.cat(each)[order] for each in zip(*(part[1:] for part in parts)))
        return log_probs, reference, values

    def _prompt(self, item: int) -> Prompt:
        """The prompt of the reply with this number: epoch after epoch, each in an order of its own."""
        epoch, at = divmod(item, len(self.prompts))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
        return self.prompts[order[at]]

    def _sampling(self, item: int) -> Sampling:
        """Temperature 1 and nothing cut off: what is drawn is what the log-probabilities are of."""
        seed = int(np.random.SeedSequence([self.seed, item]).generate_state(1, np.uint64)[0])
        unknown = range(self.tok.vocab_size, self.net.policy.config.vocab_size)  # rows that fill up a table
        stops = self.tok.control_ids.union(unknown)
        return Sampling(temperature=1.0, max_tokens=self.max_tokens, stop_ids=stops, seed=seed)

    def _answered(self, prompt: Prompt, reply: Sequence[int]) -> Dialog:
        """The conversation with this reply in it, as text."""
        known = [id for id in reply if id < self.tok.vocab_size and id not in self.tok.control_ids]
        return pairs.answered(prompt.dialog, parse(known, self.tok, section="reply").reply)
