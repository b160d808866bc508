"""Advantages and losses of GRPO's family, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.objectives.group_relative import (
    EPSILON,
    batch_spread,
    clipped_losses,
    differs,
    group_advantages,
    group_spread,
    overlong_penalty,
    sequence_log_ratio,
    stopped_weight_losses,
    token_weights,
)


def double(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Advantages


def test_rewards_are_compared_and_not_their_spread() -> None:
    third = [0.1 + 0.2, 0.3, 0.3]  # 0.30000000000000004 is another number
    rewards = double([0.3, 0.3, 0.3], third, [1.0, 0.0, 1.0])
    assert differs(rewards).tolist() == [False, True, True]
    assert not differs(torch.full((1, 3), 0.1)).item()
    assert float(torch.full((1, 3), 0.1).std()) >= 0.0


def test_four_advantages() -> None:
    # Mean 2 and deviations -1, -1, 2: the variance with n - 1 = 2 is 3.
    rewards = double([1.0, 1.0, 4.0])
    assert group_advantages(rewards, "centered").tolist() == [[-1.0, -1.0, 2.0]]
    assert group_advantages(rewards, "batch_std").tolist() == [[-1.0, -1.0, 2.0]]
    scale = math.sqrt(3.0) + EPSILON
    found = group_advantages(rewards, "group_std")[0].tolist()
    assert found == pytest.approx([-1 / scale, -1 / scale, 2 / scale])
    # The others' means: 2.5, 2.5 and 1.
    assert group_advantages(rewards, "leave_one_out")[0].tolist() == pytest.approx(
        [-1.5, -1.5, 3.0]
    )


def test_a_response_without_a_reward_counts_in_nothing() -> None:
    none = math.nan
    # As if the group were 1, 1, 4; then one that cannot differ, and one without any reward.
    rewards = double([1.0, none, 1.0, 4.0], [none, none, 3.0, none], [none, none, none, none])
    assert differs(rewards).tolist() == [True, False, False]
    scale = math.sqrt(3.0) + EPSILON
    whole = group_advantages(rewards, "group_std")
    assert whole[0].tolist() == pytest.approx([-1 / scale, 0.0, -1 / scale, 2 / scale])
    assert whole[1:].tolist() == [[0.0] * 4] * 2
    alone = group_advantages(rewards, "leave_one_out")
    assert alone[0].tolist() == pytest.approx([-1.5, 0.0, -1.5, 3.0])
    assert group_spread(rewards).tolist() == pytest.approx([math.sqrt(3.0), 0.0, 0.0])


def test_the_spread_of_a_whole_step() -> None:
    # Two groups of two, centred: -1, 1 and -3, 3. The mean square is 5.
    assert batch_spread(4.0, 20.0) == pytest.approx(math.sqrt(5.0) + EPSILON)
    assert batch_spread(0.0, 0.0) == EPSILON


def test_the_soft_penalty_grows_over_its_buffer() -> None:
    # 20 tokens at most, the last 4 of them dearer and dearer.
    found = overlong_penalty(torch.tensor([1, 16, 17, 18, 20]), 20, 4)
    assert found.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]


# Losses


def test_clipping_bounds_each_side_on_its_own() -> None:
    ratios = double(0.5, 0.5, 1.5, 1.5).log()
    advantage = double(2.0, -2.0, 2.0, -2.0)
    # Down to 0.8 where A < 0, up to 1.28 where A > 0.
    found = clipped_losses(ratios, advantage, low=0.2, high=0.28)
    assert found.tolist() == pytest.approx([-1.0, 1.6, -2.56, 3.0])
    assert clipped_losses(ratios, advantage, low=None, high=None).tolist() == pytest.approx(
        [-1.0, 1.0, -3.0, 3.0]
    )
    assert clipped_losses(ratios, advantage, low=None, high=0.1).tolist() == pytest.approx(
        [-1.0, 1.0, -2.2, 3.0]
    )


def test_the_second_bound_is_for_negative_advantages() -> None:
    ratios, advantage = double(10.0, 10.0).log(), double(-2.0, 2.0)
    found = clipped_losses(ratios, advantage, low=0.2, high=0.2, dual=3.0)
    assert found.tolist() == pytest.approx([6.0, -2.4])


def test_a_stopped_weight_stops_no_gradient() -> None:
    new = double(math.log(0.9), math.log(0.2)).requires_grad_()
    ratios = double(math.log(9.0), math.log(2.0))
    loss = stopped_weight_losses(new, ratios, double(1.0, -1.0), high=5.0)
    assert loss.tolist() == pytest.approx([-5 * math.log(0.9), 2 * math.log(0.2)])
    loss.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-5.0, 2.0])


def test_one_ratio_for_a_response() -> None:
    new, old = double(-1.0, -2.0, -4.0), double(-1.5, -1.0, -3.0)
    owners, lengths = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    mean = sequence_log_ratio(new, old, owners, lengths, mean=True)
    assert mean.tolist() == pytest.approx([-0.25, -0.25, -1.0])
    total = sequence_log_ratio(new, old, owners, lengths, mean=False)
    assert total.tolist() == pytest.approx([-0.5, -0.5, -1.0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token_mean", [1 / 12, 1 / 12]),
        ("sequence_mean", [1 / 8, 1 / 24]),
        ("sequence_sum", [1 / 4, 1 / 4]),
        ("constant", [1 / 40, 1 / 40]),
    ],
)
def test_what_a_token_counts(kind: str, expected: list[float]) -> None:
    # Responses of 2 and 6 tokens, of 4 with 12 tokens in the step, cut off at 10.
    found = token_weights(
        torch.tensor([2, 6]),
        kind,
        tokens=12.0,
        responses=4.0,
        longest=10,  # type: ignore[arg-type]
    )
    assert found.tolist() == pytest.approx(expected)
