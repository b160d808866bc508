"""k1 and k3 against the exact divergence, and the controller of its price."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.objectives.kl import adapt_kl_coef, k1, k3

LN2 = math.log(2)


def distributions(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of policy and reference over a vocabulary of five."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 5, generator=generator, dtype=torch.float64)
    policy, reference = torch.log_softmax(logits, -1)
    return policy, reference


@pytest.mark.parametrize(
    ("difference", "first", "third"),
    [
        (0.0, 0.0, 0.0),
        # d = ln 2: 1/2 - 1 + ln 2 = 0.1931472.
        (LN2, LN2, LN2 - 0.5),
        # d = -ln 2: 2 - 1 - ln 2 = 0.3068528.
        (-LN2, -LN2, 1 - LN2),
        # d = 1e-9: exp(-d) - 1 + d = d² / 2 to first order; never below 0.
        (1e-9, 1e-9, 0.0),
    ],
)
def test_closed_form(difference: float, first: float, third: float) -> None:
    policy = torch.tensor([-3.0 + difference, difference], dtype=torch.float64)
    reference = torch.tensor([-3.0, 0.0], dtype=torch.float64)
    assert k1(policy, reference).tolist() == pytest.approx([first] * 2, rel=1e-6, abs=1e-12)
    assert k3(policy, reference).tolist() == pytest.approx([third] * 2, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_mean_of_k1_and_of_k3_is_the_divergence(seed: int) -> None:
    # By enumeration: E[d] = Σ p ln(p / q), and E[exp(-d) - 1] = Σ p (q / p) - 1 = 0.
    policy, reference = distributions(seed)
    probs = policy.exp()
    exact = sum(
        p * math.log(p / q) for p, q in zip(probs.tolist(), reference.exp().tolist(), strict=True)
    )
    assert exact > 0.05
    assert float((probs * k1(policy, reference)).sum()) == pytest.approx(exact, rel=1e-12)
    assert float((probs * k3(policy, reference)).sum()) == pytest.approx(exact, rel=1e-12)
    assert bool((k3(policy, reference) >= 0).all())
    assert bool((k1(policy, reference) < 0).any())


def test_k3_varies_less_than_k1_where_the_two_are_near() -> None:
    policy, reference = distributions()
    near = torch.log_softmax(policy + 0.1 * reference, -1)
    probs, spreads = near.exp(), []
    for found in (k1(near, policy), k3(near, policy)):
        mean = (probs * found).sum()
        spreads.append(float((probs * (found - mean).square()).sum()))
    assert spreads[1] < spreads[0] / 10


def test_k3_is_never_negative_in_float32() -> None:
    # exp(-d) - 1 + d would cancel to ±6e-8 near 0; expm1 does not.
    d = torch.linspace(-1e-3, 1e-3, 2001)
    zero = torch.zeros_like(d)
    found = k3(d, zero)
    assert bool((found >= 0).all())
    assert found[0].item() == pytest.approx(5e-7, rel=0.1)


def test_estimators_keep_shape_and_swap() -> None:
    # k1 turns its sign when the two are swapped, k3 sees the other direction.
    policy, reference = (x.view(1, 5) for x in distributions())
    assert k1(policy, reference).shape == k3(policy, reference).shape == (1, 5)
    assert torch.equal(k1(policy, reference), -k1(reference, policy))
    assert not torch.allclose(k3(policy, reference), k3(reference, policy))


@pytest.mark.parametrize(
    ("kl", "responses", "expected"),
    [
        (6.0, 100, 0.1),  # on target
        (6.6, 100, 0.1 * 1.01),  # a tenth above: 0.1 · 100 / 1000
        (5.4, 100, 0.1 * 0.99),
        (7.2, 50, 0.1 * 1.01),  # just at the clip, half the responses
        (60.0, 100, 0.1 * 1.02),  # clipped at +0.2
        (0.0, 100, 0.1 * 0.98),  # clipped at -0.2
        (-3.0, 100, 0.1 * 0.98),  # an estimate may be negative
        (60.0, 1000, 0.1 * 1.2),  # a whole horizon
        (0.0, 10_000, 0.0),  # ten horizons: 1 - 2 would turn the price's sign
    ],
)
def test_controller(kl: float, responses: int, expected: float) -> None:
    found = adapt_kl_coef(0.1, kl, target=6.0, responses=responses, horizon=1000)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_controller_finds_the_price_of_its_target() -> None:
    # A policy whose KL is 0.6 / β: the target of 6 has the price 0.1, from above and from below.
    for coef in (1.0, 0.01):
        for _ in range(400):
            coef = adapt_kl_coef(coef, 0.6 / coef, target=6.0, responses=64, horizon=512)
        assert coef == pytest.approx(0.1, rel=1e-3)
