"""Stochastic rounding: one of the two neighbours, and the exact value in expectation."""

from __future__ import annotations

import pytest
import torch

from alignkit.models.weights.rounding import round_stochastically

HALF = [torch.bfloat16, torch.float16]


def draw(exact: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    rounded = round_stochastically(exact, dtype, torch.Generator().manual_seed(seed))
    assert rounded.dtype == dtype
    assert rounded.shape == exact.shape
    return rounded.float()


def test_closed_form() -> None:
    # bf16 has the neighbours 1 and 1 + 2^-7 around 1.001; p(up) = 0.001 / 2^-7 = 0.128.
    found = draw(torch.full((200_000,), 1.001), torch.bfloat16)
    assert set(found.tolist()) == {1.0, 1.0078125}
    share = float((found > 1).float().mean())
    # Standard error of the share: sqrt(p (1 - p) / n) = 0.00075.
    assert share == pytest.approx(0.128, abs=0.004)


@pytest.mark.parametrize("dtype", HALF)
def test_neighbours_and_expectation(dtype: torch.dtype) -> None:
    exact = torch.randn(300, generator=torch.Generator().manual_seed(1))
    draws = torch.stack([draw(exact, dtype, seed) for seed in range(400)])
    nearest = exact.to(dtype).float()
    step = exact.abs() * (2**-7 if dtype == torch.bfloat16 else 2**-10)  # at most one step
    assert ((draws - exact).abs() <= step).all()
    assert (draws == nearest).any()
    assert (draws != nearest).any()
    # A draw deviates by at most half a step, so the mean of 400 by a fortieth: 5 of them.
    assert ((draws.mean(0) - exact).abs() <= step / 40 * 5).all()


@pytest.mark.parametrize("dtype", HALF)
def test_values_that_fit_stay(dtype: torch.dtype) -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 0.0078125, 96.0, float("inf"), float("-inf")])
    assert torch.equal(draw(exact, dtype), exact)
    assert draw(torch.tensor([float("nan")]), dtype).isnan().all()


def test_float32_is_exact() -> None:
    exact = torch.randn(100)
    assert torch.equal(draw(exact, torch.float32), exact)


@pytest.mark.parametrize("dtype", HALF)
def test_the_seed_decides(dtype: torch.dtype) -> None:
    exact = torch.randn(1000)
    assert torch.equal(draw(exact, dtype, 1), draw(exact, dtype, 1))
    assert not torch.equal(draw(exact, dtype, 1), draw(exact, dtype, 2))


@pytest.mark.parametrize("dtype", HALF)
def test_layouts_that_are_not_contiguous(dtype: torch.dtype) -> None:
    exact = torch.randn(20, 30)
    assert torch.equal(draw(exact.T, dtype), draw(exact.T.contiguous(), dtype))
