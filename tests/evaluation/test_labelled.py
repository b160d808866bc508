"""What is reported of labelled rows: the baseline of all of them, accuracy, AUC."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from alignkit.evaluation.intervals import wilson_interval
from alignkit.evaluation.labelled import describe_labelled, say_labelled
from alignkit.objectives.kto import kto_loss

BETA = 0.5
OBJECTIVE = functools.partial(kto_loss, beta=BETA, desirable_weight=1.5, undesirable_weight=0.75)


def columns(ratio: list[float], mismatched: list[float], desirable: list[int]) -> Any:
    named = {"ratio": ratio, "mismatched": mismatched, "desirable": desirable}
    return {name: np.array(values, np.float64) for name, values in named.items()}


def sigma(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_description_by_hand() -> None:
    # Baseline (0 + 2 + 3 - 1) / 4 = 1. Good at 3 (right) and 1 (on it, a half), bad at 2 (wrong)
    # and -1 (right): 2.5 of 4. Good over bad: 3 > 2, 3 > -1, 1 < 2, 1 > -1: 3 of 4.
    found = describe_labelled(columns([3, 1, 2, -1], [0, 2, 3, -1], [1, 1, 0, 0]), OBJECTIVE, BETA)
    losses = [1.5 * sigma(-1), 1.5 / 2, 0.75 * sigma(0.5), 0.75 * sigma(-1)]
    low, high = wilson_interval(2.5, 4)
    assert found == {
        "loss": pytest.approx(sum(losses) / 4, rel=1e-9),
        "kl": 1.0,
        "rewards/chosen": 1.0,
        "rewards/rejected": 0.25,
        "rewards/margins": 0.75,
        "rewards/accuracies": 0.625,
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "auc": 0.75,
        "rows": 4.0,
    }


def test_the_baseline_is_never_negative() -> None:
    # Mean -2, so z = 0: a good answer at -1 is on the wrong side, though above -2.
    found = describe_labelled(columns([-1, 1], [-3, -1], [1, 1]), OBJECTIVE, BETA)
    assert found["kl"] == 0.0
    assert found["rewards/accuracies"] == 0.5
    assert found["loss"] == pytest.approx(1.5 * (sigma(0.5) + sigma(-0.5)) / 2, rel=1e-9)


def test_a_broken_baseline_is_not_taken_for_zero() -> None:
    found = describe_labelled(columns([1, 2], [math.nan, 1], [1, 0]), OBJECTIVE, BETA)
    assert math.isnan(found["kl"])
    assert math.isnan(found["loss"])


@pytest.mark.parametrize("label", [0, 1])
def test_one_label_alone_has_no_margin(label: int) -> None:
    found = describe_labelled(columns([2, -1, 4], [1, 1, 1], [label] * 3), OBJECTIVE, BETA)
    right = 2 if label else 1
    assert found["rewards/accuracies"] == pytest.approx(right / 3)
    assert set(found) == {
        *("loss", "kl", "rows", "rewards/accuracies"),
        *("rewards/accuracies_low", "rewards/accuracies_high"),
    }
    assert "AUC" not in say_labelled(found)


def test_auc_counts_pairs_of_a_good_and_a_bad_answer() -> None:
    rng = np.random.default_rng(0)
    ratios = rng.integers(-3, 4, 60).astype(float).tolist()  # with many ties
    labels = (rng.random(60) < 0.4).astype(int).tolist()
    good = [ratio for ratio, label in zip(ratios, labels, strict=True) if label]
    bad = [ratio for ratio, label in zip(ratios, labels, strict=True) if not label]
    wins = sum(1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad)
    found = describe_labelled(columns(ratios, [0.0] * 60, labels), OBJECTIVE, BETA)
    assert found["auc"] == pytest.approx(wins / len(good) / len(bad), rel=1e-12)
    other = [1 - label for label in labels]
    turned = describe_labelled(columns(ratios, [0.0] * 60, other), OBJECTIVE, BETA)
    assert turned["auc"] == pytest.approx(1 - found["auc"], rel=1e-12)
    assert turned["rewards/accuracies"] == pytest.approx(1 - found["rewards/accuracies"])
    moved = columns([7 + 2 * ratio for ratio in ratios], [0.0] * 60, labels)
    assert describe_labelled(moved, OBJECTIVE, BETA)["auc"] == pytest.approx(found["auc"])


def test_auc_at_its_ends() -> None:
    right = columns([3, 2, 1, 0], [0] * 4, [1, 1, 0, 0])
    wrong = columns([3, 2, 1, 0], [0] * 4, [0, 0, 1, 1])
    level = columns([1, 1, 1, 1], [0] * 4, [1, 0, 1, 0])
    found = [describe_labelled(given, OBJECTIVE, BETA)["auc"] for given in (right, wrong, level)]
    assert found == [1.0, 0.0, 0.5]


def test_one_line_for_people() -> None:
    values = {
        "loss": 0.5,
        "kl": 0.125,
        "rewards/accuracies": 0.8,
        "rewards/accuracies_low": 0.4901625,
        "rewards/accuracies_high": 0.9433178,
        "rewards/margins": 1.5,
        "auc": 0.75,
    }
    assert say_labelled(values) == (
        "loss 0.5000  accuracy 80.0% (49.0% to 94.3%)  AUC 0.750  margin 1.500  KL 0.125"
    )
