"""How certain a measured share is, and how well confidence is calibrated."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_Z = 1.959963984540054
"""97.5% quantile of the normal distribution."""


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson, 1927).

    Args:
        successes: between 0 and `count`; a tie may count half.
        count: trials, at least 1.

    Returns:
        `(low, high)` in [0, 1].

    Example:
        8 of 10: 0.490 to 0.943.
    """
    share = successes / count
    shrink = 1.0 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / shrink
    half = _Z / shrink * (share * (1 - share) / count + _Z**2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration_error(margins: npt.NDArray[np.float64], bins: int = 10) -> float:
    """Expected calibration error of pairwise preferences (https://arxiv.org/abs/1706.04599).

    A margin m claims that the chosen completion is better with probability σ(m); the confidence of
    the claim is max(σ(m), 1 - σ(m)).

    Args:
        margins: `[n]` reward of the chosen minus reward of the rejected completion.
        bins: of equal width between confidence 0.5 and 1.

    Returns:
        Mean over bins, weighted by their pairs, of |share of right claims - mean confidence|.
    """
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    right = np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5))
    places = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    error = 0.0
    for place in range(bins):
        inside = places == place
        if inside.any():
            gap = abs(float(right[inside].mean() - confidence[inside].mean()))
            error += gap * float(inside.mean())
    return error


def mean_interval(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean with its 95% interval, from the standard error.

    Args:
        values: `[n]`, at least one.

    Returns:
        `(mean, low, high)`; for a single value low and high are NaN.

    Example:
        0, 1, 2: 1, -0.132 to 2.132.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = _Z * float(values.std(ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half
