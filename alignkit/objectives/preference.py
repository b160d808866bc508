"""Losses over pairs of completions: DPO and its relatives. Pure functions, one loss per pair.

Notation: π is the policy, π_ref the reference; y_w the chosen completion, y_l the rejected one, x
their prompt; σ the logistic function. Log-probs of a completion are sums over its tokens, including
the end-of-turn token. `ratio` = log π(y|x) - log π_ref(y|x); `mean` = log π(y|x) / |y|.

Shapes: `B` pairs. Every loss is `[B]` float32 in nats unless its paper squares it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class PairLogprobs:
    """Log-probs of `B` pairs.

    Args:
        chosen: `[B]` log π(y_w|x), at most 0.
        rejected: `[B]` log π(y_l|x), at most 0.
        chosen_tokens: `[B]` tokens of y_w, at least 1.
        rejected_tokens: `[B]` tokens of y_l, at least 1.
        reference_chosen: `[B]` log π_ref(y_w|x); None for objectives without a reference.
        reference_rejected: `[B]` log π_ref(y_l|x); None as well.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    reference_chosen: torch.Tensor | None = None
    reference_rejected: torch.Tensor | None = None

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """`[B]` log π(y_w|x) / π_ref(y_w|x)."""
        assert self.reference_chosen is not None
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """`[B]` log π(y_l|x) / π_ref(y_l|x)."""
        assert self.reference_rejected is not None
        return self.rejected - self.reference_rejected

    @property
    def chosen_mean(self) -> torch.Tensor:
        """`[B]` log-prob per token of y_w."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> torch.Tensor:
        """`[B]` log-prob per token of y_l."""
        return self.rejected / self.rejected_tokens


def dpo_loss(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """Direct preference optimization, -log σ(β (ratio_w - ratio_l)).

    Eq. 7 of https://arxiv.org/abs/2305.18290.

    Args:
        pairs: with reference.
        beta: strength of the pull towards the reference, > 0; 0.1 in the paper.

    Returns:
        `[B]` losses; ln 2 = 0.6931 where policy and reference agree.
    """
    return -F.logsigmoid(beta * (pairs.chosen_ratio - pairs.rejected_ratio))


def ipo_loss(pairs: PairLogprobs, *, tau: float, per_token: bool = False) -> torch.Tensor:
    """Identity preference optimization, (ratio_w - ratio_l - 1 / (2 τ))².

    Eq. 17 of https://arxiv.org/abs/2310.12036.

    Args:
        pairs: with reference.
        tau: regularisation, > 0; the target margin is 1 / (2 τ) nats.
        per_token: first divide each ratio by its number of tokens, as TRL does; the paper
            does not.

    Returns:
        `[B]` losses in squared nats; 0 at the target margin.
    """
    chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
    if per_token:
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    return (chosen - rejected - 1.0 / (2.0 * tau)).square()


def cdpo_loss(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """Conservative DPO, -(1 - ε) log σ(β Δ) - ε log σ(-β Δ) with Δ = ratio_w - ratio_l.

    See https://ericmitchell.ai/cdpo.pdf: labels are wrong with probability ε.

    Args:
        pairs: with reference.
        beta: as for DPO, > 0.
        label_smoothing: ε, in [0, 0.5).

    Returns:
        `[B]` losses; minimal at Δ = log((1 - ε) / ε) / β.
    """
    scaled = beta * (pairs.chosen_ratio - pairs.rejected_ratio)
    kept = (1.0 - label_smoothing) * F.logsigmoid(scaled)
    return -kept - label_smoothing * F.logsigmoid(-scaled)


def robust_loss(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """Robust DPO, the unbiased estimate of the DPO loss under labels that flip with rate ε.

    (-(1 - ε) log σ(β Δ) + ε log σ(-β Δ)) / (1 - 2 ε), see https://arxiv.org/abs/2403.00409.

    Args:
        pairs: with reference.
        beta: as for DPO, > 0.
        label_smoothing: ε, in [0, 0.5).

    Returns:
        `[B]` losses; may be negative.
    """
    scaled = beta * (pairs.chosen_ratio - pairs.rejected_ratio)
    kept = (1.0 - label_smoothing) * F.logsigmoid(scaled)
    flipped = label_smoothing * F.logsigmoid(-scaled)
    return (flipped - kept) / (1.0 - 2.0 * label_smoothing)


def hinge_loss(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """Hinge on the normalised likelihood, max(0, 1 - β (ratio_w - ratio_l)).

    See RSO, https://arxiv.org/abs/2309.06657, after SLiC, https://arxiv.org/abs/2305.10425.

    Args:
        pairs: with reference.
        beta: inverse of the margin in nats, > 0.

    Returns:
        `[B]` losses, at least 0.
    """
    return torch.relu(1.0 - beta * (pairs.chosen_ratio - pairs.rejected_ratio))


def simpo_loss(pairs: PairLogprobs, *, beta: float, gamma: float) -> torch.Tensor:
    """SimPO, -log σ(β mean_w - β mean_l - γ); no reference.

    Eq. 6 of https://arxiv.org/abs/2405.14734.

    Args:
        pairs: no reference needed.
        beta: scale of the length-averaged log-probs, > 0; 2 to 10 in the paper.
        gamma: target margin, at least 0; half of β is usual.

    Returns:
        `[B]` losses.
    """
    return -F.logsigmoid(beta * (pairs.chosen_mean - pairs.rejected_mean) - gamma)


def orpo_loss(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """ORPO, -mean_w - λ log σ(logit_w - logit_l) with logit = mean - log(1 - exp(mean)).

    Eq. 6 and 7 of https://arxiv.org/abs/2403.07691; no reference.

    Args:
        pairs: no reference needed.
        beta: λ in the paper, the weight of the odds ratio, > 0; 0.1 there.

    Returns:
        `[B]` losses.
    """
    chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(odds)


def _log1mexp(value: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(value)) for value < 0, without cancellation on either side of -ln 2."""
    value = value.clamp(max=-1e-7)  # probability 1 would have infinite odds
    small = torch.log(-torch.expm1(value.clamp(min=-0.6931472)))
    large = torch.log1p(-torch.exp(value.clamp(max=-0.6931472)))
    return torch.where(value > -0.6931472, small, large)


def cpo_loss(pairs: PairLogprobs, *, beta: float, nll_weight: float) -> torch.Tensor:
    """CPO, -log σ(β (log π(y_w|x) - log π(y_l|x))) - α mean_w; no reference.

    See https://arxiv.org/abs/2401.08417. The paper writes the likelihood term as a sum over
    tokens; this is the mean over the chosen tokens, so that it does not grow with length.

    Args:
        pairs: no reference needed.
        beta: scale of the log-probs, > 0; 0.1 in the paper.
        nll_weight: α, at least 0; 1 in the paper.

    Returns:
        `[B]` losses.
    """
    preference = -F.logsigmoid(beta * (pairs.chosen - pairs.rejected))
    return preference - nll_weight * pairs.chosen_mean


def apo_zero_loss(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """APO-zero, 1 - σ(β ratio_w) + σ(β ratio_l): raises the chosen, lowers the rejected.

    Eq. 7 of https://arxiv.org/abs/2408.06266; for completions better than the model's own.

    Args:
        pairs: with reference.
        beta: as for DPO, > 0.

    Returns:
        `[B]` losses in [0, 2].
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down_loss(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """APO-down, σ(β ratio_w) + 1 - σ(β (ratio_w - ratio_l)): lowers both, the rejected more.

    Eq. 8 of https://arxiv.org/abs/2408.06266; for completions worse than the model's own.

    Args:
        pairs: with reference.
        beta: as for DPO, > 0.

    Returns:
        `[B]` losses in [0, 2].
    """
    chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def sppo_loss(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """SPPO with hard wins, (ratio_w - 1 / (2 β))² + (ratio_l + 1 / (2 β))².

    Eq. 4.7 of https://arxiv.org/abs/2405.00675, η = 1/β, with winning probabilities 1 and 0.

    Args:
        pairs: with reference.
        beta: 1/η, > 0; the target ratios are ±1 / (2 β) nats.

    Returns:
        `[B]` losses in squared nats.
    """
    goal = 0.5 / beta
    return (pairs.chosen_ratio - goal).square() + (pairs.rejected_ratio + goal).square()


def nca_loss(pairs: PairLogprobs, *, beta: float) -> torch.Tensor:
    """NCA for pairs, -log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l) with r = β ratio.

    See https://arxiv.org/abs/2402.05369; keeps the chosen completion from becoming less likely.

    Args:
        pairs: with reference.
        beta: as for DPO, > 0.

    Returns:
        `[B]` losses; 2 ln 2 where policy and reference agree.
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    pull = -F.logsigmoid(chosen)
    return pull - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def ratio_rewards(pairs: PairLogprobs, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Implicit rewards β · ratio of both completions, `[B]` each; τ replaces β for IPO."""
    return scale * pairs.chosen_ratio, scale * pairs.rejected_ratio


def mean_rewards(pairs: PairLogprobs, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Implicit rewards β · mean of both completions, for objectives that average over tokens."""
    return scale * pairs.chosen_mean, scale * pairs.rejected_mean


def sum_rewards(pairs: PairLogprobs, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Implicit rewards β · log π of both completions, for CPO."""
    return scale * pairs.chosen, scale * pairs.rejected


@dataclass(frozen=True)
class Objective:
    """One member of the family.

    Args:
        loss: of `PairLogprobs`; its keyword arguments are fields of the recipe's objective.
        rewards: implicit rewards, for metrics only.
    """

    loss: Callable[..., torch.Tensor]
    rewards: Callable[[PairLogprobs, float], tuple[torch.Tensor, torch.Tensor]]


PREFERENCE_OBJECTIVES = {
    "dpo": Objective(dpo_loss, ratio_rewards),
    "ipo": Objective(ipo_loss, ratio_rewards),
    "cdpo": Objective(cdpo_loss, ratio_rewards),
    "robust": Objective(robust_loss, ratio_rewards),
    "hinge": Objective(hinge_loss, ratio_rewards),
    "simpo": Objective(simpo_loss, mean_rewards),
    "orpo": Objective(orpo_loss, mean_rewards),
    "cpo": Objective(cpo_loss, sum_rewards),
    "apo_zero": Objective(apo_zero_loss, ratio_rewards),
    "apo_down": Objective(apo_down_loss, ratio_rewards),
    "sppo": Objective(sppo_loss, ratio_rewards),
    "nca": Objective(nca_loss, ratio_rewards),
}
"""Objective kind in the recipe -> its functions."""
