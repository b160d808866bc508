"""λ_y - v(x, y) of single labelled answers, and its baseline."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.objectives.kto import kl_baseline, kto_loss

WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.75}


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_rows(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Ratios of about ±10 nats and labels, about half of them good."""
    generator = torch.Generator().manual_seed(0)
    ratios = 10 * torch.randn(count, generator=generator, dtype=torch.float64)
    return ratios, torch.rand(count, generator=generator) < 0.5


def test_closed_form() -> None:
    # β = 0.5, z = 1 and ratio = 1 + 2 ln 2: gain ln 2, σ = 2/3. Desirable 1.5 · (1 - 2/3) = 0.5,
    # undesirable 0.75 · (1 - σ(-ln 2)) = 0.75 · 2/3 = 0.5.
    ratios = double(1 + 2 * math.log(2), 1 + 2 * math.log(2))
    labels = torch.tensor([True, False])
    found = kto_loss(ratios, labels, double(1.0)[0], beta=0.5, **WEIGHTS)
    assert found.tolist() == pytest.approx([0.5, 0.5], rel=1e-12)


def test_the_number_of_trl() -> None:
    # TRL: 1 - σ(β (ratio - kl)) and 1 - σ(β (kl - ratio)); ratio 2, kl 0.5, β 0.1: gain 0.15,
    # σ(0.15) = 0.537429845.
    found = kto_loss(
        double(2.0, 2.0),
        torch.tensor([True, False]),
        double(0.5)[0],
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    assert found.tolist() == pytest.approx([0.462570155, 0.537429845], abs=1e-8)


def test_equals_the_equation_row_by_row() -> None:
    ratios, labels = random_rows()
    beta, baseline, expected = 0.2, 0.7, []
    for ratio, good in zip(ratios.tolist(), labels.tolist(), strict=True):
        weight = 1.5 if good else 0.75
        gain = beta * (ratio - baseline) if good else beta * (baseline - ratio)
        expected.append(weight - weight * (1 / (1 + math.exp(-gain))))
    found = kto_loss(ratios, labels, double(baseline)[0], beta=beta, **WEIGHTS)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert 5 < int(labels.sum()) < 35  # both kinds were compared


@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_half_of_the_weight_at_the_baseline(baseline: float) -> None:
    ratios = double(baseline, baseline)
    labels = torch.tensor([True, False])
    found = kto_loss(ratios, labels, double(baseline)[0], beta=0.1, **WEIGHTS)
    assert found.tolist() == [0.75, 0.375]


def test_a_loss_lies_between_nothing_and_the_weight() -> None:
    ratios = double(1e4, -1e4, 1e4, -1e4)
    labels = torch.tensor([True, True, False, False])
    found = kto_loss(ratios, labels, double(0.0)[0], beta=0.1, **WEIGHTS)
    assert found.tolist() == pytest.approx([0.0, 1.5, 0.75, 0.0], abs=1e-12)


def test_the_two_labels_mirror_each_other() -> None:
    # σ(g) + σ(-g) = 1: with weights 1 the losses of the same answer under both labels add up to 1;
    # and reflecting the ratio about the baseline is the same as the other label.
    ratios, labels = random_rows()
    baseline = double(0.7)[0]
    ones = {"beta": 0.2, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    found = kto_loss(ratios, labels, baseline, **ones)
    other = kto_loss(ratios, ~labels, baseline, **ones)
    torch.testing.assert_close(found + other, torch.ones_like(ratios), rtol=1e-12, atol=0)
    reflected = kto_loss(2 * baseline - ratios, labels, baseline, **ones)
    torch.testing.assert_close(reflected, other, rtol=1e-9, atol=1e-12)


def test_weights_scale_their_own_label_only() -> None:
    ratios, labels = random_rows()
    baseline = double(0.0)[0]
    plain = kto_loss(
        ratios, labels, baseline, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
    )
    found = kto_loss(
        ratios, labels, baseline, beta=0.1, desirable_weight=4.0, undesirable_weight=3.0
    )
    factors = torch.where(labels, 4.0, 3.0).double()
    torch.testing.assert_close(found, factors * plain, rtol=1e-12, atol=0)


def test_gradcheck_and_signs() -> None:
    # At the baseline the slope is ∓ λ β / 4.
    ratios, labels = random_rows(8)
    baseline = double(0.7)[0]
    ratios.requires_grad_()

    def loss(ratios: torch.Tensor) -> torch.Tensor:
        return kto_loss(ratios, labels, baseline, beta=0.2, **WEIGHTS)

    assert torch.autograd.gradcheck(loss, (ratios,))
    (gradient,) = torch.autograd.grad(loss(ratios).sum(), ratios)
    assert bool((gradient[labels] < 0).all())
    assert bool((gradient[~labels] > 0).all())
    assert 0 < int(labels.sum()) < 8
    level = torch.full_like(ratios, 0.7).requires_grad_()
    (slope,) = torch.autograd.grad(loss(level).sum(), level)
    expected = [-1.5 * 0.2 / 4 if good else 0.75 * 0.2 / 4 for good in labels.tolist()]
    assert slope.tolist() == pytest.approx(expected, rel=1e-9)


def test_float32_stays_float32() -> None:
    ratios, labels = random_rows()
    found = kto_loss(ratios.float(), labels, torch.tensor(0.7), beta=0.2, **WEIGHTS)
    expected = kto_loss(ratios, labels, double(0.7)[0], beta=0.2, **WEIGHTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("total", "count", "expected"), [(6.0, 4.0, 1.5), (-6.0, 4.0, 0.0), (0.0, 4.0, 0.0)]
)
def test_the_baseline_is_a_mean_and_never_negative(
    total: float, count: float, expected: float
) -> None:
    assert kl_baseline(total, count) == expected


def test_a_broken_baseline_is_not_taken_for_zero() -> None:
    assert math.isnan(kl_baseline(math.nan, 4.0))
