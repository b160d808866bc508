"""Rewards, advantages, whitening and losses of PPO: by hand, by naive loops, and what they imply.

Rows are ragged: what stands outside the mask is filled with NaN wherever the function must not
read it.
"""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.objectives.ppo import (
    RATIO_LIMIT,
    advantages,
    clip_fraction,
    explained_variance,
    log_ratio,
    moments,
    policy_losses,
    token_rewards,
    value_losses,
    whiten,
)

NAN = math.nan


def double(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def lengths_mask(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def random_batch(seed: int, rows: int = 6, width: int = 9) -> tuple[torch.Tensor, ...]:
    """Rewards, values and a ragged mask whose longest row is full."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0] = width
    mask = torch.arange(width) < lengths[:, None]
    rewards, values = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return rewards, values, mask


def outside(values: torch.Tensor, mask: torch.Tensor, filling: float) -> torch.Tensor:
    return torch.where(mask, values, torch.full_like(values, filling))


# Rewards


def test_the_score_lands_on_the_last_response_token() -> None:
    # β = 0.5: the first row pays 0.5, -1, 1.5 and earns 10 at its third token, the second pays 2
    # and earns -3 at its first and only token.
    kl = double([1.0, -2.0, 3.0], [4.0, NAN, NAN])
    found = token_rewards(double(10.0, -3.0), kl, lengths_mask(3, 1), kl_coef=0.5)
    assert found.tolist() == [[-0.5, 1.0, 8.5], [-5.0, 0.0, 0.0]]


def test_rewards_add_up_to_the_score_less_the_price_of_kl() -> None:
    kl, _, mask = random_batch(0)
    scores = torch.randn(len(kl), dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = token_rewards(scores, kl, mask, kl_coef=0.3)
    torch.testing.assert_close(found.sum(1), scores - 0.3 * (kl * mask).sum(1))
    free = token_rewards(scores, kl, mask, kl_coef=0.0)
    assert (free != 0).sum(1).tolist() == [1] * len(kl)


def test_float64_scores_join_float32_kl() -> None:
    found = token_rewards(double(1.0), torch.zeros(1, 2), lengths_mask(2), kl_coef=0.1)
    assert found.dtype == torch.float32


# Advantages


def test_advantages_by_hand() -> None:
    # γ = 0.9, λ = 0.5, γλ = 0.45; rewards 1, 2, 3 and values 0.5, 1, 2, cut after 3, 2, 1 tokens.
    # Three: δ = 1 + 0.9 - 0.5 = 1.4, 2 + 1.8 - 1 = 2.8, 3 - 2 = 1;
    #        A₃ = 1, A₂ = 2.8 + 0.45 = 3.25, A₁ = 1.4 + 0.45 · 3.25 = 2.8625.
    # Two: δ = 1.4, 2 - 1 = 1; A₂ = 1, A₁ = 1.85. One: A₁ = 1 - 0.5.
    mask = lengths_mask(3, 2, 1)
    rewards = outside(double([1.0, 2.0, 3.0]).repeat(3, 1), mask, NAN)
    values = outside(double([0.5, 1.0, 2.0]).repeat(3, 1), mask, NAN)
    found, returns = advantages(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    expected = double([2.8625, 3.25, 1.0], [1.85, 1.0, 0.0], [0.5, 0.0, 0.0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    behind = double([3.3625, 4.25, 3.0], [2.35, 2.0, 0.0], [1.0, 0.0, 0.0])
    torch.testing.assert_close(returns, behind, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.7, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_advantages_equal_the_sum_of_the_paper(seed: int, gamma: float, gae_lambda: float) -> None:
    # Equation 16: A_t = Σ_l (γλ)^l δ_{t+l}, row by row in plain Python.
    rewards, values, mask = random_batch(seed)
    found, returns = advantages(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    for row, length in enumerate(mask.sum(1).tolist()):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [
            sum((gamma * gae_lambda) ** (s - t) * deltas[s] for s in range(t, length))
            for t in range(length)
        ]
        assert found[row, :length].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        back = [a + b for a, b in zip(expected, v, strict=False)]
        assert returns[row, :length].tolist() == pytest.approx(back, rel=1e-9, abs=1e-12)
    assert bool((found[~mask] == 0).all())
    assert bool((returns[~mask] == 0).all())
    assert int((~mask).sum()) > 5


def test_lambda_one_gives_the_rewards_to_go_and_lambda_zero_one_step() -> None:
    rewards, values, mask = random_batch(1)
    _, returns = advantages(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_go)  # whatever the values say
    _, returns = advantages(rewards, values, mask, gamma=0.8, gae_lambda=0.0)
    following = torch.cat([(values * mask)[:, 1:], torch.zeros(len(values), 1)], 1)
    torch.testing.assert_close(returns, (rewards + 0.8 * following) * mask)


def test_a_perfect_value_model_leaves_no_advantage() -> None:
    rewards, _, mask = random_batch(2)
    values = (rewards * mask).flip(1).cumsum(1).flip(1)
    found, returns = advantages(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    assert float(found.abs().max()) < 1e-12
    torch.testing.assert_close(returns, values * mask)


def test_what_stands_outside_the_mask_does_not_matter() -> None:
    rewards, values, mask = random_batch(3)
    plain = advantages(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    total = moments(plain[0], mask)
    for filling in (NAN, 1e30):
        r, v = outside(rewards, mask, filling), outside(values, mask, filling)
        for found, expected in zip(
            advantages(r, v, mask, gamma=0.9, gae_lambda=0.5), plain, strict=True
        ):
            assert torch.equal(found, expected)
        dirty = outside(plain[0], mask, filling)
        assert torch.equal(moments(dirty, mask), total)
        assert torch.equal(whiten(dirty, mask, total), whiten(plain[0], mask, total))
        scores = values[:, 0]
        assert torch.equal(
            token_rewards(scores, r, mask, kl_coef=0.2),
            token_rewards(scores, rewards, mask, kl_coef=0.2),
        )


def test_more_columns_change_nothing() -> None:
    rewards, values, mask = random_batch(4)
    wide = [torch.nn.functional.pad(x, (0, 3), value=7.0) for x in (rewards, values)]
    wide_mask = torch.nn.functional.pad(mask, (0, 3))
    plain = advantages(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    found = advantages(*wide, wide_mask, gamma=0.9, gae_lambda=0.5)
    assert torch.equal(found[0][:, :-3], plain[0])
    assert torch.equal(found[1][:, :-3], plain[1])


# Whitening


def test_whitening_by_hand() -> None:
    # 1, 3 and 5 count: mean 3, population variance 8/3, so ±2 / sqrt(8/3) = ±1.2247449.
    mask = lengths_mask(2, 1)
    values = double([1.0, 3.0], [5.0, 100.0])
    totals = moments(values, mask)
    assert totals.tolist() == [3.0, 9.0, 35.0]
    found = whiten(values, mask, totals)
    expected = double([-(1.5**0.5), 0.0], [1.5**0.5, 0.0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_whitened_has_mean_0_and_variance_1_over_the_mask() -> None:
    values, _, mask = random_batch(5)
    found = whiten(3 + 7 * values, mask, moments(3 + 7 * values, mask))
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(found[mask].var(correction=0)) == pytest.approx(1, rel=1e-6)
    assert bool((found[~mask] == 0).all())
    torch.testing.assert_close(found, whiten(values, mask, moments(values, mask)))


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5])
def test_constants_become_zeros(value: float) -> None:
    mask = lengths_mask(4, 2, 7)
    values = torch.full(mask.shape, value)
    assert bool((whiten(values, mask, moments(values, mask)) == 0).all())
    single = lengths_mask(1)
    assert whiten(double([value]), single, moments(double([value]), single)).tolist() == [[0.0]]


def test_moments_of_two_halves_add_up() -> None:
    values, _, mask = random_batch(6)
    totals = moments(values[:2], mask[:2]) + moments(values[2:], mask[2:])
    torch.testing.assert_close(totals, moments(values, mask), rtol=1e-12, atol=1e-12)
    halves = torch.cat([whiten(values[:2], mask[:2], totals), whiten(values[2:], mask[2:], totals)])
    torch.testing.assert_close(halves, whiten(values, mask, moments(values, mask)))
    alone = whiten(values[:2], mask[:2], moments(values[:2], mask[:2]))
    assert not torch.allclose(alone, halves[:2], atol=1e-2)
    nothing = moments(values[:0], mask[:0])
    assert nothing.tolist() == [0.0, 0.0, 0.0]  # a process without responses
    assert whiten(values[:0], mask[:0], totals).shape == (0, values.shape[1])


def test_moments_of_float32_are_summed_in_float64() -> None:
    values = torch.full((1, 4096), 16777.217)
    values[0, 0] = 0.001
    found = moments(values, torch.ones_like(values, dtype=torch.bool))
    assert found.dtype == torch.float64
    assert found[1].item() == pytest.approx(values.double().sum().item(), rel=1e-14)


# Losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # ε = 0.2. Inside, the loss is -ρ A and its slope in log π is -ρ A too.
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        # Too far in the direction of the advantage: clipped, no gradient.
        (1.5, 2.0, -2.4, 0.0),
        (0.5, -2.0, 1.6, 0.0),
        # Too far in the other direction: the pessimistic bound keeps ρ A and its gradient.
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_policy_loss_on_both_sides(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    old = double(-1.7)
    new = (old + math.log(ratio)).requires_grad_()
    found = policy_losses(new, old, double(advantage), clip=0.2)
    assert found.tolist() == pytest.approx([loss], rel=1e-12, abs=1e-15)
    (gradient,) = torch.autograd.grad(found.sum(), new)
    assert gradient.tolist() == pytest.approx([slope], rel=1e-12, abs=1e-15)


def random_tokens(seed: int, count: int = 60) -> tuple[torch.Tensor, ...]:
    """New and old log-probs about 0.3 apart, and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    old, moved, advantage = torch.randn(3, count, generator=generator, dtype=torch.float64)
    old = -old.abs() - 1
    return old + 0.3 * moved, old, advantage


def test_policy_loss_equals_the_equation_token_by_token() -> None:
    new, old, advantage = random_tokens(0)
    expected = []
    for n, o, a in zip(new.tolist(), old.tolist(), advantage.tolist(), strict=True):
        ratio = math.exp(n) / math.exp(o)
        expected.append(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
    found = policy_losses(new, old, advantage, clip=0.2)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    outside = float(clip_fraction(new, old, clip=0.2).mean())
    assert 0.2 < outside < 0.8


def test_gradcheck_of_the_losses() -> None:
    new, old, advantage = random_tokens(1)
    ratio = (new - old).exp()
    kinks = torch.stack([(ratio - edge).abs() for edge in (0.8, 1.2)]).amin(0)
    away = kinks > 1e-3  # finite differences do not cross a kink
    new, old, advantage = new[away].requires_grad_(), old[away], advantage[away]
    assert len(new) > 50
    assert torch.autograd.gradcheck(lambda x: policy_losses(x, old, advantage, clip=0.2), (new,))
    for clip in (0.2, None):
        assert torch.autograd.gradcheck(
            lambda x, clip=clip: value_losses(x, old, advantage, clip=clip), (new,)
        )


def test_at_ratio_one_the_gradient_is_minus_the_advantage() -> None:
    _, old, advantage = random_tokens(2)
    new = old.clone().requires_grad_()
    policy_losses(new, old, advantage, clip=0.2).sum().backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -advantage, rtol=1e-12, atol=0)


def test_policy_gradient_of_a_three_armed_bandit() -> None:
    # J(θ) = Σ π_θ(a) R_a. The loss in expectation over the arms, at the sampling policy, falls
    # along -∇J, whatever baseline is taken off the rewards.
    theta, rewards = double(0.3, -0.7, 1.1), double(1.0, 4.0, -2.0)
    old = torch.log_softmax(theta, 0)

    def objective(at: torch.Tensor) -> float:
        return float((torch.softmax(at, 0) * rewards).sum())

    step, expected = 1e-5, []
    for arm in range(3):
        move = torch.zeros(3, dtype=torch.float64)
        move[arm] = step
        expected.append((objective(theta + move) - objective(theta - move)) / (2 * step))
    assert max(map(abs, expected)) > 0.1
    for baseline in (0.0, objective(theta), 5.0):
        leaf = theta.clone().requires_grad_()
        new = torch.log_softmax(leaf, 0)
        losses = policy_losses(new, old, rewards - baseline, clip=0.2)
        (gradient,) = torch.autograd.grad((old.exp() * losses).sum(), leaf)
        assert (-gradient).tolist() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_ratios_stay_finite() -> None:
    new, old = torch.tensor([0.0, -500.0, -1.0]), torch.tensor([-500.0, 0.0, -1.5])
    assert log_ratio(new, old).tolist() == [RATIO_LIMIT, -RATIO_LIMIT, 0.5]
    for sign in (1.0, -1.0):
        leaf = new.clone().requires_grad_()
        losses = policy_losses(leaf, old, torch.full((3,), sign), clip=0.2)
        losses.sum().backward()
        assert leaf.grad is not None
        assert bool(torch.isfinite(losses).all())
        assert bool(torch.isfinite(leaf.grad).all())


@pytest.mark.parametrize(
    ("new", "old", "returns", "loss", "slope"),
    [
        # ε = 0.5. Within it: (V - R)² / 2, slope V - R.
        (1.2, 1.0, 3.0, 1.62, -1.8),
        # Moved from 1 to 2 towards 3: the clipped value 1.5 is further off, 1.5² / 2, no gradient.
        (2.0, 1.0, 3.0, 1.125, 0.0),
        # Moved from 1 to 2 away from 0: the value itself is further off, 2² / 2.
        (2.0, 1.0, 0.0, 2.0, 2.0),
        # Downwards: from 1 to 0 towards -1, clipped at 0.5: 1.5² / 2.
        (0.0, 1.0, -1.0, 1.125, 0.0),
        (0.0, 1.0, 2.0, 2.0, -2.0),
    ],
)
def test_value_loss_clips(
    new: float, old: float, returns: float, loss: float, slope: float
) -> None:
    leaf = double(new).requires_grad_()
    found = value_losses(leaf, double(old), double(returns), clip=0.5)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert found.tolist() == pytest.approx([loss], rel=1e-12)
    assert gradient.tolist() == pytest.approx([slope], rel=1e-12, abs=1e-15)
    plain = value_losses(leaf, double(old), double(returns), clip=None)
    (gradient,) = torch.autograd.grad(plain.sum(), leaf)
    assert plain.tolist() == pytest.approx([(new - returns) ** 2 / 2], rel=1e-12)
    assert gradient.tolist() == pytest.approx([new - returns], rel=1e-12)


def test_clip_fraction() -> None:
    # Ratios 1/2, 0.81, 1, 1.19, 2: the two far ones, on both sides.
    new = double(*map(math.log, (0.5, 0.81, 1.0, 1.19, 2.0)))
    found = clip_fraction(new, torch.zeros_like(new), clip=0.2)
    assert found.tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert clip_fraction(new, torch.zeros_like(new), clip=0.6).tolist() == [0, 0, 0, 0, 1]
    assert found.dtype == torch.float64


def test_explained_variance() -> None:
    # Returns 1, 2, 3, 6: mean 3, variance 14/4. Residuals 0, 0, 0, 2 have variance 1 - 1/4 = 3/4.
    returns = double(1.0, 2.0, 3.0, 6.0)
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 5, returns) == pytest.approx(1.0)  # a shift explains all
    assert explained_variance(torch.full_like(returns, 9.0), returns) == 0.0
    assert explained_variance(double(1, 2, 3, 4), returns) == pytest.approx(1 - 0.75 / 3.5)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)  # 1 - 4
    assert math.isnan(explained_variance(returns, torch.full_like(returns, 2.0)))
