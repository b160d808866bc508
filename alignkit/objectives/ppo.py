"""Proximal policy optimization on sampled responses, https://arxiv.org/abs/1707.06347.

Rewards, advantages and losses of a language policy as in "The N+ implementation details of RLHF
with PPO" (https://arxiv.org/abs/2403.17031). Every function works on a batch of whole responses.

Shapes: `B` responses, `T` tokens of the longest; `mask` `[B, T]` is True at response tokens, which
are at the left of each row and include the end-of-turn token.
"""

from __future__ import annotations

import torch

RATIO_LIMIT = 20.0
"""Largest |log ratio| that is exponentiated: e^20 is clipped anyway and still finite."""


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, *, kl_coef: float
) -> torch.Tensor:
    """r_t = -β · kl_t, plus the response's score at its last token.

    Args:
        scores: `[B]` reward of each response.
        kl: `[B, T]` k1 of each token, in nats.
        mask: `[B, T]` response tokens; at least one per row.
        kl_coef: β, at least 0.

    Returns:
        `[B, T]` rewards, 0 outside the mask.
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    last = mask.long().sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.to(kl.dtype)[:, None])


def advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimates (https://arxiv.org/abs/1506.02438).

    A_t = δ_t + γ λ A_{t+1} with δ_t = r_t + γ V_{t+1} - V_t, and A = V = 0 after the last token.

    Args:
        rewards: `[B, T]` of each token.
        values: `[B, T]` V_t, the prediction before token t is chosen.
        mask: `[B, T]` response tokens.
        gamma: discount, in (0, 1].
        gae_lambda: λ, in [0, 1].

    Returns:
        Advantages and returns A_t + V_t, both `[B, T]`, 0 outside the mask.
    """
    zeros = torch.zeros_like(rewards[:, 0])
    values = torch.where(mask, values, torch.zeros_like(values))
    estimates = []
    following, value = zeros, zeros
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * gae_lambda * following, zeros)
        value = values[:, t]
        estimates.append(following)
    advantage = torch.stack(estimates[::-1], dim=1)
    return advantage, torch.where(mask, advantage + values, torch.zeros_like(values))


def moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares of the masked entries; those of several processes can be added.

    Args:
        values: `[B, T]`.
        mask: `[B, T]` entries that count.

    Returns:
        `[3]` float64.
    """
    picked = values[mask].double()
    count = torch.tensor(float(len(picked)), dtype=torch.float64, device=values.device)
    return torch.stack([count, picked.sum(), picked.square().sum()])


def whiten(values: torch.Tensor, mask: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """(x - mean) / std over all masked entries together.

    Args:
        values: `[B, T]`.
        mask: `[B, T]` entries that count; the others become 0.
        totals: `[3]` from `moments`, summed over all processes.

    Returns:
        `[B, T]` with masked mean 0 and population variance 1, or all 0 where nothing varies.
    """
    count, total, squares = totals.tolist()
    mean = total / max(count, 1.0)
    variance = max(squares / max(count, 1.0) - mean * mean, 0.0)
    whitened = (values - mean) / (variance**0.5 + 1e-8)
    return torch.where(mask, whitened, torch.zeros_like(values))


def log_ratio(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """log π_new - log π_old of each token, clamped to ±20.

    Args:
        new: log-probs under the trained policy, any shape.
        old: log-probs under the policy that sampled.
    """
    return (new - old).clamp(-RATIO_LIMIT, RATIO_LIMIT)


def policy_losses(
    new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, *, clip: float
) -> torch.Tensor:
    """-min(ρ A, clip(ρ, 1 ± ε) A) with ρ = π_new / π_old, equation 7.

    Args:
        new: log-probs of the sampled tokens, any shape, differentiable.
        old: the same under the policy that sampled.
        advantage: A of each token.
        clip: ε, in (0, 1).

    Returns:
        The loss of each token.
    """
    ratio = log_ratio(new, old).exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def value_losses(
    new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, *, clip: float | None
) -> torch.Tensor:
    """max((V - R)², (clip(V, V_old ± ε) - R)²) / 2.

    Args:
        new: values of the trained model, any shape, differentiable.
        old: values at the time of sampling.
        returns: R, advantages + old values.
        clip: ε, above 0; None for the plain squared error.

    Returns:
        The loss of each token.
    """
    losses = (new - returns).square()
    if clip is not None:
        clipped = old + (new - old).clamp(-clip, clip)
        losses = torch.maximum(losses, (clipped - returns).square())
    return losses / 2


def clip_fraction(new: torch.Tensor, old: torch.Tensor, *, clip: float) -> torch.Tensor:
    """1 where the ratio is outside 1 ± clip, else 0.

    Args:
        new: log-probs under the trained policy, any shape.
        old: log-probs under the policy that sampled.
        clip: ε.
    """
    return ((log_ratio(new, old).exp() - 1.0).abs() > clip).to(new.dtype)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 is perfect, 0 is as good as a constant, negative is worse.

    Args:
        values: `[N]` predictions.
        returns: `[N]` observed returns.

    Returns:
        The fraction; NaN if the returns do not vary.
    """
    spread = returns.var(correction=0)
    if spread <= 0:
        return float("nan")
    return float(1.0 - (returns - values).var(correction=0) / spread)
