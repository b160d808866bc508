"""GRPO and its family: advantages from the rewards of a group, and what is made of them.

A group is the responses to one prompt. GRPO: https://arxiv.org/abs/2402.03300, Dr. GRPO:
https://arxiv.org/abs/2503.20783, DAPO: https://arxiv.org/abs/2503.14476, RLOO:
https://arxiv.org/abs/2402.14740, GSPO: https://arxiv.org/abs/2507.18071, CISPO:
https://arxiv.org/abs/2506.13585, REINFORCE++: https://arxiv.org/abs/2501.03262.

Shapes: `P` prompts, `n` responses to each, `S = P n` responses, `N` tokens of all of them, one
response after another.
"""

from __future__ import annotations

from typing import Literal

import torch

from alignkit.objectives.ppo import RATIO_LIMIT

Advantage = Literal["centered", "group_std", "batch_std", "leave_one_out"]
Normalisation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]

EPSILON = 1e-4
"""Added to a standard deviation."""


def differs(rewards: torch.Tensor) -> torch.Tensor:
    """`[P]` whether a group's `[P, n]` rewards are not all the same number; NaN is no reward.

    Compared exactly: a standard deviation of equal numbers may be rounded to something above 0.
    """
    unknown, endless = torch.isnan(rewards), float("inf")
    low = rewards.masked_fill(unknown, endless).amin(1)
    return low < rewards.masked_fill(unknown, -endless).amax(1)


def group_spread(rewards: torch.Tensor) -> torch.Tensor:
    """`[P]` standard deviation of a group's `[P, n]` rewards, with the number of rewards - 1.

    NaN is no reward; a group with fewer than two has none to spread: 0.
    """
    known = ~torch.isnan(rewards)
    centered = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num(0.0)
    return (centered.square().sum(1) / (known.sum(1) - 1).clamp(min=1)).sqrt()


def group_advantages(rewards: torch.Tensor, kind: Advantage) -> torch.Tensor:
    """What each response earned beyond its group.

    With the group's mean μ and its standard deviation s (with n - 1): `centered` and `batch_std`
    A = r - μ; `group_std` A = (r - μ) / (s + 1e-4); `leave_one_out` A = r minus the mean of the
    others, n / (n - 1) · (r - μ). `batch_std` is divided by `batch_spread` afterwards.

    Args:
        rewards: `[P, n]`, n at least 2; NaN for a response without a reward, which counts in none
            of these.
        kind: one of the four.

    Returns:
        `[P, n]`, with mean 0 in each group; 0 for a response without a reward.
    """
    centered = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num(0.0)
    if kind == "group_std":
        return centered / (group_spread(rewards)[:, None] + EPSILON)
    if kind == "leave_one_out":
        count = (~torch.isnan(rewards)).sum(1, keepdim=True)
        return centered * (count / (count - 1).clamp(min=1))
    return centered


def batch_spread(count: float, squares: float) -> float:
    """sqrt(Σ A² / S) + 1e-4, the standard deviation of all advantages of a step, whose mean is 0.

    Args:
        count: S, over all processes.
        squares: Σ A², over all processes.
    """
    return float((squares / max(count, 1.0)) ** 0.5) + EPSILON


def overlong_penalty(lengths: torch.Tensor, longest: int, buffer: int) -> torch.Tensor:
    """DAPO's soft penalty, equation 13: 0 up to `longest - buffer` tokens, then falling to -1.

    Args:
        lengths: `[S]` tokens of the responses.
        longest: tokens at which a response is cut off.
        buffer: tokens over which the penalty grows, above 0.

    Returns:
        `[S]` in [-1, 0].
    """
    over = (lengths.double() - (longest - buffer)) / buffer
    return -over.clamp(0.0, 1.0)


def sequence_log_ratio(
    new: torch.Tensor, old: torch.Tensor, owners: torch.Tensor, lengths: torch.Tensor, *, mean: bool
) -> torch.Tensor:
    """Each token's response's log ratio: the mean over its tokens (GSPO) or their sum (RLOO).

    Args:
        new: `[N]` log-probs under the trained policy, differentiable.
        old: `[N]` under the policy that sampled.
        owners: `[N]` response of each token.
        lengths: `[S]` tokens of each response.
        mean: over the tokens, s = (Π ρ_t)^(1 / length).

    Returns:
        `[N]`, clamped to ±20.
    """
    sums = torch.zeros(len(lengths), dtype=new.dtype, device=new.device)
    sums = sums.index_add(0, owners, new - old)
    if mean:
        sums = sums / lengths.to(new.dtype)
    return sums.clamp(-RATIO_LIMIT, RATIO_LIMIT).index_select(0, owners)


def clipped_losses(
    log_ratios: torch.Tensor,
    advantage: torch.Tensor,
    *,
    low: float | None,
    high: float | None,
    dual: float | None = None,
) -> torch.Tensor:
    """-min(ρ A, clip(ρ, 1 - low, 1 + high) A); where A < 0 not above -dual · A.

    Asymmetric bounds are DAPO's, the second bound is that of https://arxiv.org/abs/1912.09729.

    Args:
        log_ratios: `[N]` log ρ of each token, its own or its response's, differentiable.
        advantage: `[N]` A of each token.
        low: ρ is not counted below 1 - low where A < 0; None has no bound.
        high: nor above 1 + high where A > 0.
        dual: c above 1; None has no second bound.

    Returns:
        `[N]` losses.
    """
    ratio = log_ratios.exp()
    clipped = (
        ratio.clamp(None if low is None else 1.0 - low, None if high is None else 1.0 + high)
        if low is not None or high is not None
        else ratio
    )
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    if dual is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, dual * advantage), gain)
    return -gain


def stopped_weight_losses(
    new: torch.Tensor, log_ratios: torch.Tensor, advantage: torch.Tensor, *, high: float
) -> torch.Tensor:
    """CISPO: -sg(min(ρ, high)) · A · log π. The bound stops a weight, and no token's gradient.

    Args:
        new: `[N]` log-probs under the trained policy, differentiable.
        log_ratios: `[N]` log ρ.
        advantage: `[N]` A.
        high: largest weight.
    """
    return -(log_ratios.exp().clamp(max=high).detach() * advantage * new)


def token_weights(
    lengths: torch.Tensor,
    kind: Normalisation,
    *,
    tokens: float,
    responses: float,
    longest: int,
) -> torch.Tensor:
    """`[S]` what the loss of each of a response's tokens counts; the losses are then added up.

    `token_mean` 1 / tokens; `sequence_mean` 1 / (responses · length); `sequence_sum`
    1 / responses; `constant` 1 / (responses · longest), so that long responses are not favoured
    (Dr. GRPO).

    Args:
        lengths: `[S]` tokens of the responses.
        kind: one of the four.
        tokens: of the optimizer step, over all processes.
        responses: of the optimizer step, over all processes.
        longest: tokens at which a response is cut off.
    """
    ones = torch.ones_like(lengths, dtype=torch.float64)
    if kind == "token_mean":
        return ones / tokens
    if kind == "constant":
        return ones / (responses * longest)
    if kind == "sequence_sum":
        return ones / responses
    return ones / (responses * lengths.double())
