"""Kahneman-Tversky optimization: single completions labelled good or bad."""

from __future__ import annotations

import torch


def kto_loss(
    ratios: torch.Tensor,
    desirable: torch.Tensor,
    baseline: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """Loss of each completion, λ_y - v(x, y).

    Section 4 of https://arxiv.org/abs/2402.01306: λ_D (1 - σ(β (ratio - z))) for a desirable
    completion, λ_U (1 - σ(β (z - ratio))) for an undesirable one.

    Args:
        ratios: `[B]` log π(y|x) / π_ref(y|x).
        desirable: `[B]` bool.
        baseline: scalar z from `kl_baseline`, without gradient.
        beta: risk aversion, > 0; 0.1 in the paper.
        desirable_weight: λ_D, > 0.
        undesirable_weight: λ_U, > 0.

    Returns:
        `[B]` losses between 0 and the label's weight; half of it where policy and reference agree.
    """
    gain = beta * (ratios - baseline)
    good = desirable_weight * torch.sigmoid(-gain)
    bad = undesirable_weight * torch.sigmoid(gain)
    return torch.where(desirable, good, bad)


def kl_baseline(total_ratio: float, count: float) -> float:
    """The reference point z = max(0, mean ratio over mismatched completions).

    A biased, always non-negative estimate of KL(π ‖ π_ref), section 4 of
    https://arxiv.org/abs/2402.01306. The completions are those of other rows under this prompt.

    Args:
        total_ratio: sum of log π(y'|x) / π_ref(y'|x) over the whole optimizer step.
        count: completions in the sum, at least 1.

    Returns:
        z in nats; NaN stays NaN.
    """
    return max(total_ratio / count, 0.0)  # in this order: max(0.0, NaN) would be 0
