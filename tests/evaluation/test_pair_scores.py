"""What is reported of pairs: means with ties, interval, spread, calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alignkit.evaluation.intervals import calibration_error, wilson_interval
from alignkit.evaluation.pairs import PairScores, describe_pairs, say_pairs

CHOSEN, REJECTED = [2.0, 1.0, 0.0, -1.0], [1.0, 1.0, 2.0, -4.0]
"""Ahead by 1, a tie, behind by 2, ahead by 3."""


def scores() -> PairScores:
    columns = (torch.tensor(values, requires_grad=True) for values in (CHOSEN, REJECTED))
    losses = torch.tensor([0.5, 0.7, 2.0, 0.1], requires_grad=True)
    metrics = {"logps/chosen": torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)}
    return PairScores(losses, *columns, metrics)


def test_sums_of_a_micro_batch_count_ties_half() -> None:
    found = scores().sums()
    assert {name: value.item() for name, value in found.items()} == {
        "rewards/chosen": 2.0,
        "rewards/rejected": 0.0,
        "rewards/margins": 1.0 + 0.0 - 2.0 + 3.0,
        "rewards/accuracies": 1.0 + 0.5 + 0.0 + 1.0,
        "logps/chosen": -10.0,
    }
    assert all(value.shape == () for value in found.values())
    assert not any(value.requires_grad for value in found.values())


def test_columns_keep_one_value_for_each_pair() -> None:
    found = scores().columns()
    assert list(found) == ["loss", "rewards/chosen", "rewards/rejected", "logps/chosen"]
    assert found["loss"].tolist() == pytest.approx([0.5, 0.7, 2.0, 0.1])
    assert found["rewards/chosen"].tolist() == CHOSEN
    assert found["rewards/rejected"].tolist() == REJECTED
    assert found["logps/chosen"].tolist() == [-1, -2, -3, -4]


def test_description_by_hand() -> None:
    # 2 right and a tie of 4: 2.5. All eight rewards have mean 2/8 and squares 4+1+0+1+1+1+4+16
    # = 28, so a variance of 28/8 - 1/16.
    columns = {name: value.detach().double().numpy() for name, value in scores().columns().items()}
    found = describe_pairs(columns)
    assert found.pop("loss") == pytest.approx(3.3 / 4, rel=1e-6)
    assert found.pop("logps/chosen") == -2.5
    assert found.pop("rewards/chosen") == 0.5
    assert found.pop("rewards/rejected") == 0.0
    assert found.pop("rewards/margins") == 0.5
    assert found.pop("rewards/accuracies") == 0.625
    low, high = wilson_interval(2.5, 4)
    assert found.pop("rewards/accuracies_low") == low < 0.625
    assert found.pop("rewards/accuracies_high") == high > 0.625
    assert found.pop("rewards/mean") == 0.25
    assert found.pop("rewards/std") == pytest.approx(math.sqrt(28 / 8 - 1 / 16), rel=1e-12)
    # In bins of their own: right at σ(1), a tie at ½ (no gap), wrong at σ(2), right at σ(3).
    sigma = [1 / (1 + math.exp(-margin)) for margin in (1, 2, 3)]
    gaps = (1 - sigma[0]) + sigma[1] + (1 - sigma[2])
    assert found.pop("calibration_error") == pytest.approx(gaps / 4, rel=1e-9)
    assert found.pop("pairs") == 4
    assert found == {}


def test_micro_batches_add_up_to_the_description() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = torch.from_numpy(rng.integers(0, 4, (2, 30)).astype(np.float64))
    whole = PairScores(torch.zeros(30), chosen, rejected, {})
    described = describe_pairs({name: value.numpy() for name, value in whole.columns().items()})
    sums = dict.fromkeys(whole.sums(), 0.0)
    for part in (slice(0, 7), slice(7, 30)):
        piece = PairScores(torch.zeros(30)[part], chosen[part], rejected[part], {})
        for name, value in piece.sums().items():
            sums[name] += float(value)
    for name, value in sums.items():
        assert value / 30 == pytest.approx(described[name], rel=1e-6), name
    assert int((chosen == rejected).sum()) > 2
    margins = (chosen - rejected).numpy()
    assert described["calibration_error"] == calibration_error(margins)


def test_swapping_the_answers_turns_accuracy_and_margin() -> None:
    chosen, rejected = np.array(CHOSEN), np.array(REJECTED)
    right = describe_pairs({"rewards/chosen": chosen, "rewards/rejected": rejected})
    wrong = describe_pairs({"rewards/chosen": rejected, "rewards/rejected": chosen})
    assert wrong["rewards/accuracies"] == pytest.approx(1 - right["rewards/accuracies"])
    assert wrong["rewards/accuracies_low"] == pytest.approx(1 - right["rewards/accuracies_high"])
    assert wrong["rewards/margins"] == -right["rewards/margins"]
    assert wrong["rewards/std"] == pytest.approx(right["rewards/std"])


def test_one_line_for_people() -> None:
    values = {
        "loss": 0.51234,
        "rewards/accuracies": 0.8,
        "rewards/accuracies_low": 0.4901625,
        "rewards/accuracies_high": 0.9433178,
        "rewards/margins": 1.25,
        "calibration_error": 0.0625,
    }
    assert say_pairs(values) == (
        "loss 0.5123  accuracy 80.0% (49.0% to 94.3%)  margin 1.250  calibration error 0.062"
    )
