"""Reward modelling: the probability that one completion is preferred to another."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bradley_terry_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor, *, center: float
) -> torch.Tensor:
    """Loss of each pair, -log σ(r_w - r_l - m) + c (r_w + r_l)².

    Bradley and Terry (1952); the margin follows Llama 2 (https://arxiv.org/abs/2307.09288,
    eq. 2), the centring https://arxiv.org/abs/2312.09244: it fixes the constant that the first
    term leaves free.

    Args:
        chosen: `[B]` rewards r_w.
        rejected: `[B]` rewards r_l.
        margins: `[B]` margins m; 0 for rows without one.
        center: c, at least 0; 0 leaves the mean reward free.

    Returns:
        `[B]` losses in nats.

    Example:
        Equal rewards without a margin: ln 2 = 0.6931 plus the centring.
    """
    preference = -F.logsigmoid(chosen - rejected - margins)
    return preference + center * (chosen + rejected).square()
