"""Inputs of products that are made again for the backward pass instead of being kept.

What is cheap to make from tensors that are kept anyway says so: a norm's output from its input, a
gated product from its two factors. A product that needs such an input backward then keeps nothing
of its own. The same operations in the same order make it again, so no bit changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Remade(NamedTuple):
    """How a tensor is made.

    Args:
        sources: what it is made from.
        make: the tensor, from its sources.
    """

    sources: tuple[torch.Tensor, ...]
    make: Callable[..., torch.Tensor]


def can_be_remade(
    x: torch.Tensor, sources: tuple[torch.Tensor, ...], make: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """`x`, which says how it is made.

    Args:
        x: as `make` gives it.
        sources: kept for the backward pass by what made `x`.
        make: must keep no tensor itself.
    """
    x.__dict__["remade"] = Remade(sources, make)
    return x


def how_made(x: torch.Tensor) -> Remade | None:
    """How a tensor is made again; None if it does not say."""
    made: Remade | None = x.__dict__.get("remade")
    return made
