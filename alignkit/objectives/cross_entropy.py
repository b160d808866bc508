"""Negative log-likelihood of the trained tokens."""

from __future__ import annotations

import torch


def cross_entropy_loss(logprobs: torch.Tensor) -> torch.Tensor:
    """Loss of each token, -log p(token | tokens before it).

    The loop divides the sum by the number of trained tokens of the whole optimizer step, so the
    loss of a step is (1/N) Σ -log p_i for any split into micro-batches.

    Args:
        logprobs: `[N]` log-probs of the trained tokens, natural logarithm, at most 0.

    Returns:
        `[N]` losses in nats, at least 0.

    Example:
        A token predicted with probability 0.5 costs 0.6931 nats.
    """
    return -logprobs
