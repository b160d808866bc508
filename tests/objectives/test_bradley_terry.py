"""-log σ(r_w - r_l - m) + c (r_w + r_l)²."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.objectives.bradley_terry import bradley_terry_loss

LN2, LN3 = math.log(2), math.log(3)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_rewards(count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards of both answers, and margins from 0 to 2."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = 2 * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return chosen, rejected, 2 * torch.rand(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "center", "expected"),
    [
        # Equal rewards, no margin: σ(0) = 1/2, and nothing to centre around 0.
        (0.0, 0.0, 0.0, 0.01, LN2),
        # Equal rewards of 3: ln 2, and the centring is 0.01 · 6².
        (3.0, 3.0, 0.0, 0.01, LN2 + 0.36),
        # σ(ln 3) = 3/4.
        (LN3, 0.0, 0.0, 0.0, math.log(4 / 3)),
        # The wrong way round: σ(-ln 3) = 1/4.
        (0.0, LN3, 0.0, 0.0, math.log(4)),
        # A margin of ln 3 - ln 2 leaves σ(ln 2) = 2/3.
        (LN3, 0.0, LN3 - LN2, 0.0, math.log(3 / 2)),
        # Rewards 1 and -2: σ(3), TRL's centring with coefficient 0.1 adds 0.1 · (-1)².
        (1.0, -2.0, 0.0, 0.1, 0.0485873516 + 0.1),
    ],
)
def test_closed_form(
    chosen: float, rejected: float, margin: float, center: float, expected: float
) -> None:
    found = bradley_terry_loss(double(chosen), double(rejected), double(margin), center=center)
    assert found.tolist() == pytest.approx([expected], rel=1e-9)


def test_equals_the_equation_pair_by_pair() -> None:
    chosen, rejected, margins = random_rewards()
    expected = [
        -math.log(1 / (1 + math.exp(-(w - low - m)))) + 0.03 * (w + low) ** 2
        for w, low, m in zip(chosen.tolist(), rejected.tolist(), margins.tolist(), strict=True)
    ]
    found = bradley_terry_loss(chosen, rejected, margins, center=0.03)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_a_margin_is_a_handicap_of_the_chosen_answer() -> None:
    chosen, rejected, margins = random_rewards()
    found = bradley_terry_loss(chosen, rejected, margins, center=0.0)
    handicapped = bradley_terry_loss(
        chosen - margins, rejected, torch.zeros_like(margins), center=0.0
    )
    torch.testing.assert_close(found, handicapped, rtol=1e-12, atol=0)
    without = bradley_terry_loss(chosen, rejected, torch.zeros_like(margins), center=0.0)
    assert bool((found > without).all())


def test_swapping_the_answers_turns_the_sign_of_their_difference() -> None:
    # -log σ(-d) = -log σ(d) + d, and the centring does not change.
    chosen, rejected, _ = random_rewards()
    none = torch.zeros_like(chosen)
    found = bradley_terry_loss(rejected, chosen, none, center=0.03)
    expected = bradley_terry_loss(chosen, rejected, none, center=0.03) + chosen - rejected
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_without_centring_only_the_difference_counts() -> None:
    chosen, rejected, margins = random_rewards()
    found = bradley_terry_loss(chosen + 7, rejected + 7, margins, center=0.0)
    expected = bradley_terry_loss(chosen, rejected, margins, center=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_centring_moves_the_sum_and_not_the_difference() -> None:
    # Its gradient 2 c (r_w + r_l) is the same for both rewards.
    chosen, rejected, margins = (tensor.requires_grad_() for tensor in random_rewards())
    with_centring = bradley_terry_loss(chosen, rejected, margins, center=0.5).sum()
    without = bradley_terry_loss(chosen, rejected, margins, center=0.0).sum()
    of_chosen, of_rejected = torch.autograd.grad(with_centring - without, (chosen, rejected))
    expected = (chosen + rejected).detach()  # 2 · 0.5 · sum
    torch.testing.assert_close(of_chosen, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of_rejected, expected, rtol=1e-9, atol=1e-12)


def test_gradcheck_and_signs() -> None:
    chosen, rejected, margins = random_rewards(6)
    rewards = (chosen.requires_grad_(), rejected.requires_grad_())

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return bradley_terry_loss(chosen, rejected, margins, center=0.1)

    assert torch.autograd.gradcheck(loss, rewards)
    plain = bradley_terry_loss(chosen, rejected, margins, center=0.0).sum()
    of_chosen, of_rejected = torch.autograd.grad(plain, rewards)
    assert bool((of_chosen < 0).all())
    assert bool((of_rejected > 0).all())


def test_rewards_far_apart_stay_finite_in_float32() -> None:
    # -log σ(-1000) = 1000 where the probability itself is 0 in float32.
    chosen = torch.tensor([-500.0, 500.0], requires_grad=True)
    found = bradley_terry_loss(chosen, -chosen.detach(), torch.zeros(2), center=0.0)
    assert found.tolist() == [1000.0, 0.0]
    (gradient,) = torch.autograd.grad(found.sum(), chosen)
    assert gradient.tolist() == [-1.0, 0.0]
