"""The one training loop: a plain function that a stage hands batches and a loss.

    state = run(model, batches, loss_fn, optimizer, schedule, steps=1000, state=State())

`batches(position)` gives the micro-batches of one step and the position after them; the position, an integer, is all
there is to say where the data stands. `loss_fn(net, batch)` gives a `Loss`: a sum and the count that it is a sum over.
A step's gradient is the sum over all its micro-batches divided by the whole count, so 1 x 8 rows and 8 x 1 row are one
step.

`net` is what computes. It is the model itself in float32; in bfloat16 it is a copy (`computing_copy`) whose weights
are refreshed from the model's after every update and whose gradients are added up in the model's float32, so that
every rounding is where this file puts it. Over several processes it is the model itself, sharded (`moss/dist.py`), or
with adapters again the copy, of which each has all: each rank computes its own rows of a step, and loss, count,
gradient, norm and every decision are those of all rows.
Nothing here draws a random number.

A step whose loss or gradient is not finite changes nothing but the counters, and the third in a row ends the run; a
gradient far above its running mean is passed over too, up to twice in a row, in case the landscape has truly changed.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moss import dist
from moss.log import RunLog, bar, note
from moss.optim import Optimizers

BAD_IN_A_ROW = 3  # steps without a finite loss and gradient after which a run ends
SPIKE = 10.0  # a gradient norm so many times its running mean is a spike
SPIKES_AFTER = 50  # updates before the running mean means anything
MEMORY = 0.95  # of the running mean of the gradient norm, per update

Micro = dict[str, Tensor]
Batches = Callable[[int], tuple[Sequence[Micro], int]]


class Loss(NamedTuple):
    """What a loss function gives for one micro-batch."""

    total: Tensor  # () the sum over `count` items, to be differentiated
    count: int
    figures: Mapping[str, Tensor] = {}  # sums over the same items, logged as means


LossFn = Callable[[Any, Micro], Loss]


@dataclass
class State:
    """Where a run stands; with weights, optimizer and random state all that is needed to go on exactly."""

    step: int = 0  # steps done
    position: int = 0  # where the data stands
    tokens: int = 0  # tokens seen, padding not counted
    learnt: int = 0  # of these, targets
    updates: int = 0  # steps that changed the weights
    bad: int = 0  # steps without a finite loss and gradient, in a row
    spikes: int = 0  # steps passed over for a gradient far above the mean, in a row
    norm: float = 0.0  # running mean of the gradient norm
    ended: str = ""  # why the stage ended before its last step

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> State:
        """The inverse of `to_json`; a missing part is named."""
        for name in cls().to_json():
            if name not in values:
                raise ValueError(f"the checkpoint's moss.json lacks loop.{name}; the run cannot go on exactly")
        return cls(**{name: values[name] for name in cls().to_json()})


class Stop:
    """SIGTERM and Ctrl-C while training: the step is finished and saved. Before that they end at once, SIGTERM with 0,
    for nothing is lost, but over several ranks, where `torchrun` ends all when one fails."""

    def __init__(self) -> None:
        self.asked = ""  # the name of the signal that asked for an end
        self._training = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def training(self) -> None:
        """From now on there is something to save."""
        self._training = True

    def _heard(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        # A second Ctrl-C ends at once; `torchrun` sends every rank a second one by itself.
        if number == signal.SIGINT and ((self.asked and dist.world() == 1) or not self._training):
            raise KeyboardInterrupt
        if not self._training:
            os.write(2, f"\n{name} before the first step: nothing has been trained yet, so nothing is lost\n".encode())
            raise SystemExit(0 if dist.world() == 1 else 128 + number)
        self.asked = name
        os.write(2, f"\n{name}: finishing this step, then saving (Ctrl-C to quit without saving)\n".encode())


@dataclass(frozen=True)
class Hooks:
    """What a run does besides stepping; each part may be left out."""

    save: Callable[[State], None] | None = None  # publish a checkpoint
    save_every: int = 0  # steps; 0: only when stopped and at the end
    validate: Callable[[Any], dict[str, float]] | None = None  # named figures of the model, before each save
    log: RunLog | None = None  # one line a step
    stop: Stop | None = None  # asks for an early end
    enough: Callable[[], str] | None = None  # asked after each step: why training should end here, or ""
    freeze: Callable[[int, int], None] | None = None  # (step, steps): takes the gradients of what is not to learn now
    title: str = "training"  # of the progress bar


def run(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    optimizer: Optimizers,
    schedule: Callable[[int], float],
    *,
    steps: int,
    state: State,
    net: nn.Module | None = None,
    clip: float = 1.0,
    hooks: Hooks = Hooks(),
) -> State:
    """Train from `state` up to `steps`, or until asked to stop; the last state is saved either way.

    `schedule(step)` is the factor on every group's learning rate. Over several ranks `batches` gives each its own rows,
    as many micro-batches to one as to another. Raises ValueError when the loss stays non-finite.
    """
    net = model if net is None else net
    saved = state.step
    with bar(hooks.title, state.step, steps) as shown:
        while state.step < steps and not state.ended and not asked(hooks.stop):
            began = time.perf_counter()
            micro, state.position = batches(state.position)
            freeze = partial(hooks.freeze, state.step, steps) if hooks.freeze else None
            loss, norm, learnt, figures = gradients(model, net, loss_fn, micro, freeze)
            factor = schedule(state.step)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            state.step += 1
            why_not = judge(state, loss, norm)
            if not why_not:
                update(model, net, optimizer, norm, clip)
            optimizer.zero_grad(set_to_none=True)
            tokens = round(dist.sums([sum(int((batch["segments"] > 0).sum()) for batch in micro)])[0])
            state.tokens, state.learnt = state.tokens + tokens, state.learnt + learnt
            seconds = time.perf_counter() - began
            record = {
                "step": state.step,
                "loss": finite(loss),
                "grad_norm": finite(norm),
                "lr": factor,
                "tokens": tokens,
                "learnt": learnt,
                "position": state.position,
                "tokens_per_s": round(tokens / seconds, 1),
                "seconds": round(seconds, 4),
                **{name: finite(value) for name, value in figures.items()},
            }
            if why_not:
                record["skipped"] = why_not
                note(f"step {state.step}: no update, {why_not}")
            if hooks.log:
                hooks.log.write(record)
            if state.bad >= BAD_IN_A_ROW:
                raise ValueError(
                    f"step {state.step} is the third in a row without a finite loss and gradient ({why_not}); "
                    "the last checkpoint stands: lower the learning rate or look at the data there"
                )
            shown.show(state.step, f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s")
            state.ended = dist.first(hooks.enough) if hooks.enough else ""
            last = state.step == steps or bool(state.ended)
            now = bool(hooks.save_every) and state.step % hooks.save_every == 0
            if hooks.validate and (last or now):
                _validate(net, state, hooks)
            if hooks.save and now and not last:
                saved = _save_or_go_on(state, hooks.save, saved)
    if hooks.save and saved != state.step:
        hooks.save(state)
    return state


def asked(stop: Stop | None) -> str:
    """The signal that asked any rank for an end, or ""; all ranks hear of it before the same step."""
    own = signal.Signals[stop.asked] if stop and stop.asked else 0
    number = dist.highest(own)
    if stop and number:
        stop.asked = signal.Signals(number).name
    return signal.Signals(number).name if number else ""


def gradients(
    model: nn.Module,
    net: nn.Module,
    loss_fn: LossFn,
    micro: Sequence[Micro],
    freeze: Callable[[], None] | None = None,
) -> tuple[float, float, int, dict[str, float]]:
    """(mean loss, gradient norm, count, mean figures) of one step; the mean's gradient is left in `.grad`, but for what
    `freeze` takes away.

    All of them are over all ranks; a loss function names the same figures for every batch.
    """
    total, count, figures = 0.0, 0, dict[str, float]()
    for batch in micro:
        loss = loss_fn(net, batch)
        if loss.count or dist.world() > 1:  # where weights are gathered, all ranks go through them together
            loss.total.backward()
            collect(model, net)
        total, count = total + float(loss.total.detach()), count + loss.count
        for name, value in loss.figures.items():
            figures[name] = figures.get(name, 0.0) + float(value)
    whole = dist.sums([total, count, *figures.values()])
    total, count, figures = whole[0], round(whole[1]), dict(zip(figures, whole[2:], strict=True))
    if not count:
        raise ValueError("a step has nothing to learn: every mask value is 0")
    dist.add_up(model)
    if freeze:
        freeze()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for grad in grads:
        grad /= count
    return total / count, dist.norm(grads), count, {name: value / count for name, value in figures.items()}


def judge(state: State, loss: float, norm: float) -> str:
    """Why this step must not change the weights, or ""; keeps the counters of `state`."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        state.bad += 1
        return f"loss {loss}, gradient norm {norm}"
    state.bad = 0
    if state.updates >= SPIKES_AFTER and norm > SPIKE * state.norm and state.spikes < BAD_IN_A_ROW - 1:
        state.spikes += 1
        return f"gradient norm {norm:.3g} is over {SPIKE:g} times its mean {state.norm:.3g}"
    state.spikes = 0
    state.updates += 1
    state.norm = norm if state.updates == 1 else MEMORY * state.norm + (1 - MEMORY) * norm
    return ""


def update(model: nn.Module, net: nn.Module, optimizer: Optimizers, norm: float, clip: float) -> None:
    """Clip to `clip` (0: do not), step, and bring the computing copy up to date."""
    if clip and norm > clip:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= clip / norm
    optimizer.step()
    refresh(model, net)


def computing_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself where `dtype` is its own, else a copy in `dtype` to compute with.

    Frozen parameters (the base under LoRA) are rounded to `dtype` in place and shared, as buffers are (a base of
    integers): nothing is ever added to them.
    """
    if all(parameter.dtype == dtype for parameter in model.parameters()):
        return model
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.data = parameter.data.to(dtype)
    shared = [*frozen, *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).to(dtype)


@torch.no_grad()
def refresh(model: nn.Module, net: nn.Module) -> None:
    """The model's weights, rounded, into its computing copy."""
    if net is not model:
        for mine, computing in zip(model.parameters(), net.parameters(), strict=True):
            if mine is not computing:
                computing.copy_(mine)


@torch.no_grad()
def collect(model: nn.Module, net: nn.Module) -> None:
    """Add the copy's gradients to the model's, in the model's dtype, and clear them."""
    if net is model:
        return
    for mine, computed in zip(model.parameters(), net.parameters(), strict=True):
        if computed.grad is None or computed is mine:
            continue
        if mine.grad is None:
            mine.grad = computed.grad.to(mine.dtype)
        else:
            mine.grad += computed.grad
        computed.grad = None


def finite(value: float) -> float | None:
    """The value, or None where it is none: JSON knows neither nan nor infinity."""
    return value if math.isfinite(value) else None


def _validate(net: nn.Module, state: State, hooks: Hooks) -> None:
    assert hooks.validate
    with torch.no_grad():
        figures = hooks.validate(net)
    note(f"step {state.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    if hooks.log:
        hooks.log.write({"step": state.step, "valid": figures})


def _save_or_go_on(state: State, save: Callable[[State], None], saved: int) -> int:
    """A checkpoint on the way: if the disk refuses it, the earlier ones stand and training goes on."""
    try:
        save(state)
    except OSError as error:
        note(f"step {state.step}: not saved, {error}; the last checkpoint is step {saved}")
        return saved
    return state.step
