"""The maths of the preference stages, on numbers worked out by hand and against slow independent forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moss.train.loss import log_probs_at
from moss.train.rl_math import (
    LEVELS,
    bradley_terry,
    bucket,
    bucket_edges,
    clipped_policy_loss,
    clipped_value_loss,
    dpo,
    gae,
    kl_k1,
    kl_k3,
    masked_mean,
    whiten,
)

LN2, LN3 = math.log(2), math.log(3)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: Tensor | float, *want: float) -> None:
    torch.testing.assert_close(torch.as_tensor(got).flatten(), f64(*want), rtol=1e-12, atol=1e-12)


def test_bradley_terry_by_hand() -> None:
    """Prevents a wrong sign or a mean in place of the sum: sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2."""
    # -ln(3/4) - ln(1/2) = ln 4 - ln 3 + ln 2 = 3 ln 2 - ln 3
    close(bradley_terry(f64(LN3, 1.0), f64(0.0, 1.0)), 3 * LN2 - LN3)
    winner = f64(LN3).requires_grad_()
    bradley_terry(winner, f64(0.0)).backward()
    assert winner.grad is not None
    close(winner.grad, -0.25)  # -(1 - sigmoid(ln 3)) = -(1 - 3/4)


def test_bradley_terry_of_scores_far_apart_is_finite() -> None:
    """Prevents log(sigmoid(-1000)) = -inf: the loss of a pair that is badly wrong grows as the difference does."""
    close(bradley_terry(f64(-500.0, 500.0), f64(500.0, -500.0)), 1000.0)


def test_dpo_by_hand() -> None:
    """Prevents a swapped reference or a forgotten beta."""
    # beta 1/2; first pair: winner's reward (-1 + 3)/2 = 1, loser's (-4 + 4)/2 = 0, margin 1, loss ln(1 + e^-1);
    # second: winner's (-2 + 2)/2 = 0, loser's (-2 + 2)/2 = 0, margin 0, loss ln 2, accuracy a half.
    loss, figures = dpo(f64(-1.0, -2.0), f64(-4.0, -2.0), f64(-3.0, -2.0), f64(-4.0, -2.0), beta=0.5)
    close(loss, math.log(1 + math.exp(-1)) + LN2)
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(
        {"margin": 1.0, "accuracy": 1.5, "winner_reward": 1.0, "loser_reward": 0.0}
    )


def test_kl_estimates_by_hand() -> None:
    """Prevents policy and reference in each other's place, and a k3 below 0."""
    # reference twice as likely: k1 = -ln 2, k3 = 2 - 1 - ln 2; reference half as likely: k1 = ln 2, k3 = 1/2 - 1 + ln 2
    logp, ref = f64(-2.0, -1.0, -3.0), f64(-2.0 + LN2, -1.0 - LN2, -3.0)
    close(kl_k1(logp, ref), -LN2, LN2, 0.0)
    close(kl_k3(logp, ref), 1 - LN2, LN2 - 0.5, 0.0)


def test_both_kl_estimates_are_unbiased() -> None:
    """Prevents an estimate of another divergence: the expectation over the policy is KL, summed without sampling."""
    policy, ref = f64(0.5, 0.3, 0.2).log(), f64(0.2, 0.2, 0.6).log()
    kl = float((policy.exp() * (policy - ref)).sum())
    assert float((policy.exp() * kl_k1(policy, ref)).sum()) == pytest.approx(kl, rel=1e-12)
    assert float((policy.exp() * kl_k3(policy, ref)).sum()) == pytest.approx(kl, rel=1e-12)


def test_gae_by_hand() -> None:
    """Prevents an off-by-one in the values, and a reply that earns from its neighbour's or its padding's values."""
    # gamma 1/2, lambda 1/2. Reply one: r = 1, 0, 2; V = 1, 2, 4.
    # delta_3 = 2 + 0 - 4 = -2; delta_2 = 0 + 4/2 - 2 = 0; delta_1 = 1 + 2/2 - 1 = 1
    # A_3 = -2; A_2 = 0 + (-2)/4 = -1/2; A_1 = 1 + (-1/2)/4 = 7/8; returns A + V: 15/8, 3/2, 2
    # Reply two: one token, r = 3, V = 1: A = 2, return 3; what stands in its padding must not matter.
    rewards = torch.stack([f64(1.0, 0.0, 2.0), f64(3.0, 9.0, math.nan)])
    values = torch.stack([f64(1.0, 2.0, 4.0), f64(1.0, math.nan, 7.0)])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    close(advantages, 7 / 8, -1 / 2, -2.0, 2.0, 0.0, 0.0)
    close(returns, 15 / 8, 3 / 2, 2.0, 3.0, 0.0, 0.0)


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The double sum of the paper: A_t = sum over l of (gamma lam)^l delta_{t+l}."""
    values = [*values, 0.0]
    delta = [reward + gamma * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(len(delta) - t)) for t in range(len(delta))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.99, 1.0)])
def test_gae_equals_the_slow_form(gamma: float, lam: float) -> None:
    """Prevents a recursion that is right on three tokens only, or wrong where places in the middle are masked."""
    rng = np.random.default_rng(0)
    mask = rng.random((7, 12)) < 0.7
    mask[0], mask[1] = True, False
    rewards, values = rng.normal(size=(2, 7, 12))
    advantages, returns = gae(*(torch.from_numpy(x) for x in (rewards, values, mask)), gamma=gamma, lam=lam)
    for row in range(7):
        at = np.flatnonzero(mask[row])
        want = slow_gae(list(rewards[row, at]), list(values[row, at]), gamma, lam)
        close(advantages[row, at], *want)
        close(returns[row, at], *(np.array(want) + values[row, at]))
        assert not advantages[row, ~mask[row]].any() and not returns[row, ~mask[row]].any()


def test_with_lambda_one_the_return_is_what_was_earned() -> None:
    """Prevents a return that keeps a part of the critic's guess where it should keep none."""
    _, returns = gae(f64(1.0, 2.0, 3.0)[None], f64(5.0, -7.0, 11.0)[None], torch.ones(1, 3), gamma=1.0, lam=1.0)
    close(returns, 6.0, 5.0, 3.0)


def test_whitening_by_hand() -> None:
    """Prevents padding in the mean, and a sample variance in place of the population's."""
    # 1, 3 with mean 2 and variance 1 -> -1, 1 (but for TINY); not shifted: 1, 3; the 100 is masked
    white = whiten(f64(1.0, 100.0, 3.0), torch.tensor([1, 0, 1]))
    torch.testing.assert_close(white, f64(-1.0, 0.0, 1.0), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        whiten(f64(1.0, math.nan, 3.0), torch.tensor([1, 0, 1]), shift_mean=False),
        f64(1.0, 0.0, 3.0),
        rtol=1e-7,
        atol=0,
    )
    close(whiten(f64(5.0, 5.0), torch.ones(2)), 0.0, 0.0)  # all alike: no advantage, and no nan
    close(whiten(f64(5.0), torch.ones(1)), 0.0)


def test_masked_mean_by_hand() -> None:
    """Prevents a division by the length; and a mean of nothing is an error, not nan."""
    close(masked_mean(f64(1.0, math.nan, 4.0), torch.tensor([True, False, True])), 2.5)
    with pytest.raises(ValueError, match="nothing"):
        masked_mean(f64(1.0), torch.tensor([False]))


def test_clipped_policy_loss_by_hand() -> None:
    """Prevents a max where a min belongs: the four cases of PPO's figure 1, clip 0.2."""
    # ratio 3/2, A  2: -min(3, 2.4) = -2.4, clamped, no gradient
    # ratio 3/2, A -2: -min(-3, -2.4) = 3, free: a bad token that has become likelier is always pulled back
    # ratio 1/2, A  2: -min(1, 1.6) = -1, free
    # ratio 1/2, A -2: -min(-1, -1.6) = 1.6, clamped
    # ratio 1,   A  1: -1, free
    ratios = f64(1.5, 1.5, 0.5, 0.5, 1.0)
    logp = (ratios.log() - 1).requires_grad_()
    loss, figures = clipped_policy_loss(logp, torch.full_like(ratios, -1.0), f64(2.0, -2.0, 2.0, -2.0, 1.0), clip=0.2)
    close(loss.detach(), -2.4 + 3 - 1 + 1.6 - 1)
    assert float(figures["clipped"]) == 2 and float(figures["ratio"]) == pytest.approx(5.0)
    # k3 of (old || new) = ratio - 1 - ln ratio
    assert float(figures["drift"]) == pytest.approx(float((ratios - 1 - ratios.log()).sum()))
    loss.backward()
    assert logp.grad is not None
    close(logp.grad, 0.0, 3.0, -1.0, 0.0, -1.0)  # -A ratio where free


def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient() -> None:
    """Prevents a first step that is clipped, or scaled, although old and new policy are the same."""
    logp = f64(-1.0, -2.0).requires_grad_()
    loss, figures = clipped_policy_loss(logp, logp.detach(), f64(3.0, -4.0))
    loss.backward()
    close(loss.detach(), 1.0)
    assert logp.grad is not None
    close(logp.grad, -3.0, 4.0)
    assert float(figures["clipped"]) == 0 == float(figures["drift"])


def test_clipped_value_loss_by_hand() -> None:
    """Prevents a min where a max belongs."""
    # V 1, old 0, R 2, clip 0.2: near 0.2, errors 1 and 3.24 -> 3.24, clamped: no gradient
    # V 0.1, old 0, R 2: near 0.1, errors 3.61 both -> 3.61, gradient
    # V -1, old 0, R 2: near -0.2, errors 9 and 4.84 -> 9, free
    values = f64(1.0, 0.1, -1.0).requires_grad_()
    loss, figures = clipped_value_loss(values, torch.zeros(3, dtype=torch.float64), torch.full((3,), 2.0).double())
    close(loss.detach(), (3.24 + 3.61 + 9) / 2)
    assert float(figures["value_error"]) == pytest.approx(1 + 3.61 + 9) and float(figures["value_clipped"]) == 1
    loss.backward()
    assert values.grad is not None
    close(values.grad, 0.0, -1.9, -3.0)


def test_bucket_edges_by_hand() -> None:
    """Prevents buckets of equal count, edges at the extremes, and an edge score in the lower bucket."""
    # 0, 1 … 100: the 1st percentile is 1, the 99th 99, so the width is 98/6 and the edges 1 + k 98/6
    scores = np.arange(101.0)
    edges = bucket_edges(scores)
    assert edges == pytest.approx([1 + k * 98 / 6 for k in range(1, 6)])
    found = bucket(scores, edges)
    # 1 + 98/6 = 17.33, 33.67, 50, 66.33, 82.67: 0..17, 18..33, 34..49, 50..66, 67..82, 83..100
    assert np.bincount(found).tolist() == [18, 16, 16, 17, 16, 18]
    assert found[50] == 3  # exactly on the third edge: above it
    assert bucket(np.array([-1e9, 1e9]), edges).tolist() == [0, 5]
    assert [LEVELS[k] for k in bucket(np.array([0.0, 20.0, 40.0, 60.0, 80.0, 100.0]), edges)] == list(LEVELS)


def test_an_outlier_does_not_squeeze_the_buckets() -> None:
    """Prevents edges between minimum and maximum: one wild score would put all others into one bucket."""
    scores = np.append(np.linspace(0, 1, 999), 1e6)
    assert bucket_edges(scores)[-1] < 1
    assert len(set(bucket(scores, bucket_edges(scores)).tolist())) == 6


@pytest.mark.parametrize(
    ("scores", "said"),
    [([], "no scores"), ([1.0, math.nan], "not finite"), ([2.0] * 50, "too close"), ([math.inf, 1.0], "not finite")],
)
def test_scores_without_buckets_are_refused(scores: list[float], said: str) -> None:
    """Prevents tags that mean nothing, given in silence."""
    with pytest.raises(ValueError, match=said):
        bucket_edges(np.array(scores))


@pytest.mark.parametrize("biased", [True, False])
def test_log_probs_are_the_plain_formula(biased: bool) -> None:
    """Prevents any slip in the hand-written gradient: values and all gradients equal PyTorch's in float64."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((20, 6), (11, 6), (11,))]
    hidden, weight, bias = (part.requires_grad_() for part in parts)
    use_bias = bias if biased else None
    places, targets = torch.tensor([3, 0, 17, 5, 8, 19, 4]), torch.tensor([1, 10, 0, 4, 4, 2, 9])
    slope = torch.randn(7, generator=generator, dtype=torch.float64)
    plain = F.linear(hidden[places], weight, use_bias).log_softmax(1).gather(1, targets[:, None])[:, 0]
    ours = log_probs_at(hidden, places, weight, use_bias, targets, chunk=3)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    wanted = [hidden, weight] + ([bias] if biased else [])
    for mine, theirs in zip(torch.autograd.grad(ours @ slope, wanted), torch.autograd.grad(plain @ slope, wanted)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_log_probs_with_a_frozen_head_give_the_hidden_states_their_gradient() -> None:
    """Prevents a gradient that is lost, or worked out in vain, where LoRA freezes the table."""
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64)
    places, targets = torch.tensor([4, 1]), torch.tensor([8, 0])
    log_probs_at(hidden, places, weight, None, targets, chunk=1).sum().backward()
    mine = hidden.grad
    (theirs,) = torch.autograd.grad(
        F.linear(hidden[places], weight).log_softmax(1).gather(1, targets[:, None]).sum(), hidden
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert not torch.equal(theirs, torch.zeros_like(theirs))


def test_log_probs_of_bfloat16_are_float32() -> None:
    """Prevents log-probabilities with three digits: a ratio of two such is noise."""
    hidden, weight = torch.randn(3, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    got = log_probs_at(hidden, torch.arange(3), weight, None, torch.tensor([1, 2, 3]))
    want = F.linear(hidden, weight).float().log_softmax(1).gather(1, torch.tensor([[1], [2], [3]]))[:, 0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_log_probs_of_nothing_are_nothing() -> None:
    """Prevents a crash in a micro-batch that holds no reply."""
    hidden = torch.randn(3, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    got = log_probs_at(hidden, none, torch.randn(50, 8), None, none)
    got.sum().backward()
    assert got.shape == (0,) and hidden.grad is not None and not hidden.grad.any()
