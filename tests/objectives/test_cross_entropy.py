"""-log p of each trained token."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.objectives.cross_entropy import cross_entropy_loss


@pytest.mark.parametrize("probability", [1.0, 0.5, 0.125, 1e-6])
def test_closed_form(probability: float) -> None:
    # p = 1/2 costs ln 2 = 0.6931 nats, p = 1/8 three times as much, p = 1 nothing.
    found = cross_entropy_loss(torch.tensor([math.log(probability)], dtype=torch.float64))
    assert found.tolist() == pytest.approx([-math.log(probability)], rel=1e-12)


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary() -> None:
    logits = torch.zeros(4, 32, dtype=torch.float64)
    logprobs = torch.log_softmax(logits, -1)[:, 7]
    assert cross_entropy_loss(logprobs).tolist() == pytest.approx([math.log(32)] * 4, rel=1e-12)


def test_equals_torchs_own_cross_entropy_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 11, (20,), generator=generator)
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(cross_entropy_loss(logprobs), expected, rtol=1e-12, atol=0)


def test_one_loss_a_token_in_order() -> None:
    logprobs = -torch.arange(5, dtype=torch.float64)
    assert cross_entropy_loss(logprobs).tolist() == [0, 1, 2, 3, 4]
    assert cross_entropy_loss(torch.zeros(0)).shape == (0,)


def test_gradcheck() -> None:
    logprobs = -torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logprobs.requires_grad_()
    assert torch.autograd.gradcheck(cross_entropy_loss, (logprobs,))
    cross_entropy_loss(logprobs).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0] * 6
