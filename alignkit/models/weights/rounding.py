"""Rounding float32 weights to 16 bits without losing small updates.

A bf16 weight has 8 bits of precision. Rounding to the nearest value drops every update smaller
than half a step, always in the same direction: back to the base. Stochastic rounding goes up or
down with probability proportional to the distance, so its expectation is the exact weight; the
errors of a layer's many weights are independent and average out in its output, while the update
adds up.
"""

from __future__ import annotations

import torch

_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def round_stochastically(
    exact: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Weights in `dtype` whose expectation is `exact`.

    Args:
        exact: float32 weights of any shape.
        dtype: bfloat16, float16 or float32.
        generator: on the weights' device; the same state gives the same weights.

    Returns:
        Each weight is one of its two neighbours in `dtype`; values that `dtype` holds exactly stay.
        float16 values below its normal range are rounded to the nearest.

    Example:
        1.001 lies between the bf16 neighbours 1.0 and 1.0078125: it becomes 1.0078125 in 12.8% of
        draws.
    """
    dropped = _DROPPED_BITS.get(dtype)
    if dropped is None:
        return exact.to(dtype)
    bits = exact.contiguous().view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 2**dropped, generator=generator)
    # The sign has its own bit, so adding to the rest moves away from zero on both sides.
    moved = ((bits + noise) & ~(2**dropped - 1)).view(torch.float32)
    return torch.where(exact.isfinite(), moved, exact).to(dtype)
