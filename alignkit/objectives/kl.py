"""KL divergence of the policy from the reference, and its adaptive coefficient.

With d = log π(y_t | x, y_<t) - log π_ref(y_t | x, y_<t) at a sampled token, the estimators of
KL(π ‖ π_ref) are (http://joschu.net/blog/kl-approx.html)

    k1 = d                  unbiased, may be negative
    k3 = exp(-d) - 1 + d    unbiased, never negative
"""

from __future__ import annotations

import torch

CONTROLLER_CLIP = 0.2
"""Largest relative error to which the adaptive controller responds."""


def k1(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """d, the estimator that PPO subtracts from the reward.

    Args:
        policy: log-probs of the sampled tokens under the policy, any shape, at most 0.
        reference: the same under the reference.

    Returns:
        Nats for each token, positive or negative.
    """
    return policy - reference


def k3(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """exp(-d) - 1 + d.

    Args:
        policy: log-probs under the policy, any shape.
        reference: the same under the reference.

    Returns:
        Nats for each token, at least 0.
    """
    d = policy - reference
    return torch.expm1(-d) + d


def adapt_kl_coef(coef: float, kl: float, *, target: float, responses: int, horizon: int) -> float:
    """The next KL coefficient, β' = β · (1 + clip(KL / target - 1, ±0.2) · n / horizon).

    The controller of Ziegler et al. (https://arxiv.org/abs/1909.08593, section 2.2).

    Args:
        coef: β of this step, at least 0.
        kl: mean KL per response in this step, in nats: k1 summed over its tokens.
        target: in the same unit, above 0.
        responses: n, the number of responses in this step.
        horizon: number of responses over which the coefficient adapts.

    Returns:
        β of the next step.
    """
    error = min(max(kl / target - 1.0, -CONTROLLER_CLIP), CONTROLLER_CLIP)
    return coef * max(0.0, 1.0 + error * responses / horizon)
