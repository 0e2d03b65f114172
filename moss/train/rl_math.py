"""The maths of the preference stages: pure functions on tensors, without models, files or randomness.

What    Bradley-Terry (equation 1 of the paper), DPO, the estimates of KL, GAE, whitening, PPO's two clipped losses, and
        the six buckets of preference-aware training.
Why     A slip in one of these trains on, silently; apart from the plumbing each can be worked out by hand in a test.
How     advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
        loss, figures = clipped_policy_loss(logp, old_logp, advantages, clip=0.2)

Losses are sums, as everywhere in `moss/train`: the loop divides by the count of the whole step. Figures are sums over
the same count. Everything computes in the dtype of its arguments, float64 included.
Letters in shapes: N learnt tokens or pairs, B replies, T tokens of a reply.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = (0, 20, 40, 60, 80, 100)  # what the buckets are called in the quality tag, from the lowest scores up
TINY = 1e-8  # keeps whitening finite where all values are one


# ---------------------------------------------------------------- preferences


def bradley_terry(winner: Tensor, loser: Tensor) -> Tensor:
    """Equation 1: sum of -log sigmoid(winner - loser) over pairs of scores, (N,) each -> ().

    The paper's expectation is this sum divided by N.
    """
    return -F.logsigmoid(winner - loser).sum()


def dpo(
    policy_winner: Tensor, policy_loser: Tensor, ref_winner: Tensor, ref_loser: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation (arXiv 2305.18290, equation 7), summed over pairs, and its figures.

    The arguments (N,) are log-probabilities of whole replies, summed over their tokens. A reply's implicit reward is
    beta (policy - reference), the margin that of the winner less that of the loser; the loss is Bradley-Terry of these
    rewards. Figures, sums over pairs: `margin`, `accuracy` (margins above 0; one of exactly 0 counts half),
    `winner_reward`, `loser_reward`.
    """
    winner, loser = beta * (policy_winner - ref_winner), beta * (policy_loser - ref_loser)
    margin = (winner - loser).detach()
    figures = {
        "margin": margin.sum(),
        "accuracy": ((1 + margin.sign()) / 2).sum(),
        "winner_reward": winner.detach().sum(),
        "loser_reward": loser.detach().sum(),
    }
    return bradley_terry(winner, loser), figures


# ---------------------------------------------------------------- KL


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log(policy / reference) of tokens that the policy drew: its mean is KL(policy, reference). Any shape.

    Unbiased, but single values, and the mean of a few, may be negative (Schulman 2020, "Approximating KL divergence").
    This is the term that equation 2 takes off the reward.
    """
    return logp - ref_logp


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """r - 1 - log r with r = reference / policy: unbiased for the same KL, never negative, less noisy. Any shape."""
    log_ratio = ref_logp - logp
    return log_ratio.expm1() - log_ratio


# ---------------------------------------------------------------- advantages


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1 or True, same shape -> (). What stands elsewhere, nan included, does not count."""
    if not mask.any():
        raise ValueError("the mask is 0 everywhere: there is nothing to take a mean of")
    return x[mask.bool()].mean()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x with variance 1 and, unless `shift_mean` is False, mean 0 where mask is 1; 0 elsewhere. Same shape.

    The variance is that of the population (divided by N, not N - 1), so that a single value is 0 and not nan.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * (variance + TINY).rsqrt()
    return torch.where(mask.bool(), white if shift_mean else white + mean, 0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), (B, T) each: generalised advantage estimation (arXiv 1506.02438, equation 16).

    rewards, values (B, T): what token t earned, and what the critic expected before it was drawn. With
    delta_t = r_t + gamma V_{t+1} - V_t the advantage is A_t = delta_t + gamma lam A_{t+1}, and the return A_t + V_t.
    Behind its last token a reply earns nothing more (V = A = 0). Places where mask (B, T) is 0 are left out as though
    the reply did not have them; there both results are 0.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(rewards)
    next_value, carried = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(here, delta + gamma * lam * carried, carried)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, carried, 0)
    return advantages, torch.where(mask, advantages + values, 0)


# ---------------------------------------------------------------- PPO


def clipped_policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) as a loss, summed over tokens (N,), and its figures.

    With ratio = exp(logp - old_logp): -min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A). Figures, sums over tokens:
    `clipped` (where the clamp decides, so that no gradient flows), `ratio`, `drift` (k3 of old against new policy).
    """
    ratio = (logp - old_logp).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    figures = {
        "clipped": (held > free).sum().to(ratio.dtype),
        "ratio": ratio.detach().sum(),
        "drift": kl_k3(old_logp, logp.detach()).sum(),
    }
    return torch.maximum(free, held).sum(), figures


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the critic, (N,) each -> (), clipped as in PPO's reference code, and its figures.

    1/2 max((V - R)^2, (clamp(V, old - clip, old + clip) - R)^2): what moves further than `clip` from the old value
    towards the return earns no more. Figures, sums over tokens: `value_error` (squared error, unclipped),
    `value_clipped` (where the clamp decides).
    """
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    free, held = (values - returns) ** 2, (near - returns) ** 2
    figures = {"value_error": free.detach().sum(), "value_clipped": (held > free).sum().to(values.dtype)}
    return torch.maximum(free, held).sum() / 2, figures


# ---------------------------------------------------------------- buckets of preference-aware training


def bucket_edges(scores: np.ndarray, buckets: int = len(LEVELS)) -> np.ndarray:
    """The inner edges, (buckets - 1,) float64, of buckets of equal width between the 1st and 99th percentile of scores.

    Percentiles interpolate between neighbours, as numpy's default does. ValueError where scores (N,) are empty, not
    finite, or so alike that the buckets would have no width.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not scores.size:
        raise ValueError("there are no scores to make buckets of")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite: the preference model is damaged, or diverged when it was trained")
    low, high = np.percentile(scores, (1, 99))
    edges = np.linspace(low, high, buckets + 1)[1:-1]
    if not (np.diff(edges) > 0).all():
        raise ValueError(
            f"the scores lie between {low:g} and {high:g}, too close together for {buckets} buckets: the preference"
            " model does not tell these replies apart; train it longer, or on other pairs"
        )
    return edges


def bucket(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bucket, 0 to len(edges), of each score (N,); one on an edge belongs to the bucket above it.

    Scores below the 1st percentile are in the first bucket, above the 99th in the last. `LEVELS[bucket]` is the tag.
    """
    return np.searchsorted(np.asarray(edges), np.asarray(scores, dtype=np.float64), side="right")
