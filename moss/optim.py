"""Optimizers and learning-rate schedules, shared by all training stages.

What    `make_optimizer` groups a decoder's parameters: the matrices of the blocks go to PyTorch's own Muon (or to
        AdamW with weight decay), embeddings, head, norms and biases to AdamW. `rate` is a pure function from a
        step to the share of the full learning rate.
Why     Muon learns small models in about half the steps, but is made for matrices between hidden states only.
How     optimizer = make_optimizer(model, lr=3e-3, matrix_lr=0.02, weight_decay=0.1, muon=True)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate("linear", step, total=1000, warmup=50)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim._muon import _adjust_lr

from moss.dist import is_sharded, joined, local, spread

BETAS = (0.9, 0.95)
SCHEDULES = ("linear", "cosine", "constant")
LINEAR_FALL = 0.5  # share of the steps, at the end, over which `linear` falls
COSINE_FLOOR = 0.1  # share of the full rate at which `cosine` ends
MUON_LR = 0.02  # Muon's steps have a fixed size, so one value serves every width


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which orthogonalises in bfloat16, on whatever hardware and however many ranks there are: in
    float32 where bfloat16 is slow, and of a sharded matrix the whole, for a step is of the matrix and not of its parts.
    Every rank orthogonalises every matrix."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step, of this rank's rows."""
        for group in self.param_groups:
            matrices, grads, buffers = list[Tensor](), list[Tensor](), list[Tensor]()
            self._init_group(group, matrices, grads, buffers)
            for matrix, grad, buffer in zip(matrices, grads, buffers, strict=True):
                rows, slope, held = local(matrix), local(grad), local(buffer)
                held.lerp_(slope, 1 - group["momentum"])
                update = slope.lerp(held, group["momentum"]) if group["nesterov"] else held
                exact = torch.bfloat16 if has_bfloat16(rows.device) else torch.float32
                update = joined(update.to(exact), matrix)
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rows.mul_(1 - group["lr"] * group["weight_decay"])
                mine = spread(update).to_local() if is_sharded(matrix) else update
                rows.add_(mine, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], matrix.shape))


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix (R, C) with its singular values near 1 (0.7 to 1.2), by the Newton-Schulz iteration of Muon
    (kellerjordan.github.io/posts/muon), in its own dtype."""
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has hardware for bfloat16: elsewhere it is slower than float32, on a CPU fifty times."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))


class Optimizers:
    """Optimizers over different parameters that step, save and load as one. `param_groups` are the parts' own."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts; changing one changes it in its part."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One step of every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parts."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of each part, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, for the same model and settings."""
        saved = state_dict.get("parts", [])
        if len(saved) != len(self.parts):
            raise ValueError(
                f"the optimizer state has {len(saved)} parts, this run has {len(self.parts)}: was it saved with"
                " another choice of muon?"
            )
        for part, state in zip(self.parts, saved, strict=True):
            part.load_state_dict(state)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (matrices of the blocks, embedding and head, norms and biases)."""
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif "blocks." in name:
            matrices.append(parameter)
        else:
            tables.append(parameter)
    return matrices, tables, vectors


def make_optimizer(
    model: nn.Module, *, lr: float, matrix_lr: float | None = None, weight_decay: float, muon: bool
) -> Optimizers:
    """One optimizer over all trainable parameters, each group with its full rate in `initial_lr`.

    lr is for embeddings, head, norms and biases; matrix_lr for the matrices of the blocks (None: `MUON_LR` with
    muon, else lr). Weight decay touches the matrices alone: decaying an embedding would shrink rare tokens.
    """
    for name, value in {"lr": lr, "matrix_lr": matrix_lr, "weight_decay": weight_decay}.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, it must be a number from 0 up")
    matrices, tables, vectors = split_parameters(model)
    if not matrices and not tables and not vectors:
        raise ValueError("the model has no trainable parameter: unfreeze some before making an optimizer")
    rate = matrix_lr if matrix_lr is not None else (MUON_LR if muon else lr)
    decayed = [{"params": matrices, "lr": rate, "weight_decay": weight_decay}] if matrices else []
    plain = [{"params": group, "lr": lr, "weight_decay": 0.0} for group in (tables, vectors) if group]
    parts: list[Optimizer] = [Muon(decayed)] if muon and decayed else []
    rest = plain if muon else decayed + plain
    if rest:
        # One kernel for all tensors: on a CPU too, where a step of a small model is mostly overhead.
        parts.append(AdamW(rest, betas=BETAS, fused=_can_fuse(matrices + tables + vectors)))
    return Optimizers(parts)


def _can_fuse(parameters: Iterable[Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and torch.is_floating_point(p) for p in parameters)


# ---------------------------------------------------------------- schedules


def rate(schedule: str, step: int, total: int, warmup: int = 0) -> float:
    """Share of the full rate at `step` (the first is 0): linear warm-up that reaches 1 at its last step, then

    `linear`: flat, and over the second half of all steps linear to zero at `total` (arXiv 2405.18392);
    `cosine`: half a wave from 1 down to a tenth at `total`, as in the paper (3e-5 to 3e-6);
    `constant`: flat.
    """
    if total < 1 or not 0 <= warmup <= total or step < 0:
        raise ValueError(f"schedule: needs step >= 0 and 0 <= warmup <= total, got {step=}, {warmup=}, {total=}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}, it must be one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return min(1.0, max(0.0, (total - step) / (LINEAR_FALL * total)))
    done = min(1.0, (step - warmup) / max(total - warmup, 1))
    return COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * done)) / 2
