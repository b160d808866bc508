"""What a model whose modules were given another forward still promises."""

from __future__ import annotations

import copy
from typing import Any

import torch


def assert_copies_and_gradients(fast: Any, plain: Any, ids: torch.Tensor) -> None:
    """A copy computes with its own weights, and gradients are those of the plain model.

    Args:
        fast: with other forwards.
        plain: the same model without.
        ids: `[1, T]` tokens.
    """
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(fast(ids).logits, plain(ids).logits)  # the copy has its own weights
    assert not torch.equal(twin(ids).logits, plain(ids).logits)
    for model in (fast, plain):
        model(ids).logits.square().mean().backward()
    gradients = zip(fast.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7) for a, b in gradients)
