"""The learning-rate schedule in closed form, and what weight decay touches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from alignkit.runtime.optim import build_optimizer, learning_rate_at, set_learning_rate


def rates(steps: int, warmup: int, schedule: str, peak: float = 1.0) -> list[float]:
    return [
        learning_rate_at(step, peak=peak, steps=steps, warmup_steps=warmup, schedule=schedule)
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        # (1 + cos(π s / 4)) / 2
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        # Warm-up of w steps: 1/(w+1), 2/(w+1), ...; the peak right after it.
        ("constant", 3, [0.25, 0.5, 0.75, 1]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("cosine", 2, [1 / 3, 2 / 3, 1, 0.5]),
    ],
)
def test_closed_form(schedule: str, warmup: int, expected: list[float]) -> None:
    assert rates(4, warmup, schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (100, 0), (100, 7), (100, 99)])
def test_every_step_moves_and_none_beyond_the_peak(schedule: str, steps: int, warmup: int) -> None:
    found = rates(steps, warmup, schedule, peak=3e-4)
    assert all(0 < rate <= 3e-4 for rate in found)
    assert found[warmup] == 3e-4
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


def test_vectors_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model.named_parameters(), 0.1, weight_decay=0.5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # No gradient: AdamW multiplies what decays by 1 - lr · wd = 0.95 and leaves the rest.
    for name, value in model.named_parameters():
        factor = 0.95 if value.ndim == 2 else 1.0
        torch.testing.assert_close(value, before[name] * factor, rtol=1e-6, atol=0)


def test_the_first_step_of_adam_in_closed_form() -> None:
    # m / (1 - β1) = g and v / (1 - β2) = g², so the weight moves by lr · g / (|g| + ε): by lr.
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model.named_parameters(), 0.1, 0.0)
    model.weight.grad = torch.tensor([[3.0, -0.01]])
    optimizer.step()
    moved = model.weight.detach() - before
    torch.testing.assert_close(moved, torch.tensor([[-0.1, 0.1]]), rtol=1e-5, atol=0)


def test_frozen_weights_stay_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    held = [
        p
        for group in build_optimizer(model.named_parameters(), 1e-3, 0.0).param_groups
        for p in group["params"]
    ]
    assert {id(p) for p in held} == {id(p) for p in model[1].parameters()}


def test_set_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2).named_parameters(), 1e-3, 0.1)
    set_learning_rate(optimizer, 5e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 5e-5]
