"""Wilson's interval of a share, and the calibration of pairwise confidence."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from alignkit.evaluation.intervals import calibration_error, wilson_interval

Z2 = 3.841458821  # 1.96², the 95% quantile of χ² with one degree of freedom
LN3 = math.log(3)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        # Around one half the centre is one half: 0.5 ± 1.96 / 2 / sqrt(n + 1.96²).
        (50, 100, 0.5 - 0.0961688, 0.5 + 0.0961688),
        # None or all: the far end is 1.96² / (n + 1.96²).
        (0, 10, 0.0, Z2 / (10 + Z2)),
        (10, 10, 10 / (10 + Z2), 1.0),
        (0, 1, 0.0, Z2 / (1 + Z2)),
        (0.5, 1, 0.5 - 0.4453792, 0.5 + 0.4453792),  # a tie
    ],
)
def test_known_intervals(successes: float, count: int, low: float, high: float) -> None:
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize("count", [1, 7, 40, 1000])
def test_each_end_is_a_share_that_the_normal_test_just_keeps(count: int) -> None:
    # Wilson's definition: (p̂ - p)² = z² p (1 - p) / n at both ends, z the 97.5% quantile.
    z = NormalDist().inv_cdf(0.975)
    for successes in {0, 1, count // 2, count - 1, count}:
        share = successes / count
        low, high = wilson_interval(successes, count)
        assert 0 <= low < high <= 1
        assert low - 1e-12 <= share <= high + 1e-12
        for end in (low, high):
            left = (share - end) ** 2
            assert left == pytest.approx(z**2 * end * (1 - end) / count, rel=1e-6, abs=1e-15)


def test_losses_mirror_wins() -> None:
    for successes in (0, 3, 5.5, 20):
        low, high = wilson_interval(successes, 20)
        assert wilson_interval(20 - successes, 20) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_it_holds_the_true_share_about_95_times_in_100() -> None:
    # Exactly, by the binomial probabilities, on average over the share.
    count, covered = 40, []
    for share in np.linspace(0.05, 0.95, 91).tolist():
        chance = 0.0
        for successes in range(count + 1):
            low, high = wilson_interval(successes, count)
            if low <= share <= high:
                ways = math.comb(count, successes)
                chance += ways * share**successes * (1 - share) ** (count - successes)
        covered.append(chance)
    assert 0.945 < np.mean(covered) < 0.96
    assert min(covered) > 0.9


def test_claims_that_come_true_as_often_as_they_say() -> None:
    # σ(ln k) = k / (k + 1): of k + 1 pairs k are right and one is wrong, for k = 2, 3, 4, 9.
    margins = np.array([m for k in (2, 3, 4, 9) for m in [math.log(k)] * k + [-math.log(k)]])
    assert calibration_error(margins) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ([-50.0, -60.0, -1e4], 1.0),  # sure and wrong; the last one overflows exp without abs
        ([50.0, 1e4], 0.0),  # sure and right
        ([0.0, 0.0], 0.0),  # a tie is half right, and claims one half
        ([LN3] * 5, 0.25),  # all right at 3/4
        ([-LN3] * 5, 0.75),  # all wrong at 3/4
        # Four at 3/4 all right: 1/4. Twelve at 9/10, half right: 4/10. Together (1 + 4.8) / 16.
        ([LN3] * 4 + [math.log(9)] * 6 + [-math.log(9)] * 6, 5.8 / 16),
    ],
)
def test_known_errors(margins: list[float], expected: float) -> None:
    assert calibration_error(np.array(margins)) == pytest.approx(expected, abs=1e-9)


def test_errors_cancel_within_a_bin_and_not_between_bins() -> None:
    # One pair right at 3/4 and one wrong at 0.6: gaps +1/4 and -0.6; in one bin they average.
    margins = np.array([LN3, -LN3 / 2.70951129135])  # ln 3 / 2.7095 = ln 1.5
    assert calibration_error(margins, bins=10) == pytest.approx((0.25 + 0.6) / 2, abs=1e-9)
    assert calibration_error(margins, bins=1) == pytest.approx(0.675 - 0.5, abs=1e-9)


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_equals_a_loop_over_bins(bins: int) -> None:
    margins = 2 * np.random.default_rng(0).standard_normal(300) + 0.5
    margins[:5] = 0.0
    expected = 0.0
    for place in range(bins):
        low, high = 0.5 + place / bins / 2, 0.5 + (place + 1) / bins / 2
        sure, right = [], []
        for margin in margins.tolist():
            claim = 1 / (1 + math.exp(-margin))
            confidence = max(claim, 1 - claim)
            if low <= confidence < high:
                sure.append(confidence)
                right.append(0.5 if margin == 0 else float(margin > 0))
        if sure:
            gap = abs(sum(right) / len(right) - sum(sure) / len(sure))
            expected += gap * len(sure) / len(margins)
    assert calibration_error(margins, bins) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.01


def test_claims_drawn_from_their_own_probabilities() -> None:
    # Right with probability σ(|m|): near 0 on many pairs, and not once the claims are doubled.
    rng = np.random.default_rng(1)
    size = rng.uniform(0, 4, 40_000)
    margins = np.where(rng.random(len(size)) < 1 / (1 + np.exp(-size)), size, -size)
    assert calibration_error(margins) < 0.01
    assert calibration_error(2 * margins) > 0.05
