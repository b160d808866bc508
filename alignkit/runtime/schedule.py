"""The learning rate of each step."""

from __future__ import annotations

import math


def learning_rate_at(
    step: int,
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    schedule: str,
    decay_steps: int = 0,
    min_rate: float = 0.0,
) -> float:
    """Learning rate of one step.

    With n steps of which w warm up, and p = (s - w) / (n - w) at step s:

    - `constant`: peak
    - `linear`: peak · (1 - p)
    - `cosine`: peak · (1 + cos πp) / 2
    - `cosine_min`: peak · (m + (1 - m) (1 + cos πp) / 2), m being `min_rate`
    - `wsd`: peak · min(1, (n - s) / d), d being `decay_steps`: the peak until n - d, then
      straight to zero (https://arxiv.org/abs/2404.06395, which falls exponentially)

    Args:
        step: from 0.
        peak: reached right after warm-up.
        steps: of the whole run.
        warmup_steps: linear rise over this many steps; the first step already moves.
        schedule: `cosine`, `linear`, `constant`, `wsd` or `cosine_min`.
        decay_steps: of wsd; at most the steps after warm-up.
        min_rate: of cosine_min, as a share of the peak.

    Returns:
        A rate above 0 and at most `peak`.

    Example:
        Over 4 steps without warm-up, in shares of the peak: cosine 1, 0.854, 0.5, 0.146; wsd with
        2 steps of decay 1, 1, 1, 0.5.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "wsd":
        return peak * min(1.0, (steps - step) / decay_steps)
    share = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "cosine_min":
        return peak * (min_rate + (1 - min_rate) * 0.5 * (1 + math.cos(math.pi * share)))
    if schedule == "linear":
        return peak * (1 - share)
    return peak
