"""How far one model is from another, on real rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.packed import IntArray

POSITIONS = 256
"""Positions on which logits are compared."""


@dataclass(frozen=True)
class Closeness:
    """Two models on the same positions.

    Args:
        max_logit_difference: largest |difference| between logits.
        mean_kl: KL(first ‖ second) in nats per token.
        same_top_token: share of positions with the same likeliest token.
        positions: tokens compared.
    """

    max_logit_difference: float
    mean_kl: float
    same_top_token: float
    positions: int

    def line(self) -> str:
        """In a sentence."""
        return (
            f"on {self.positions} tokens: largest logit difference "
            f"{self.max_logit_difference:.3g}, KL {self.mean_kl:.2g} nats/token, same top token "
            f"{self.same_top_token:.1%}"
        )


def first_tokens(rows: Sequence[IntArray], longest: int) -> list[torch.Tensor]:
    """The start of up to eight rows, `POSITIONS` tokens in all.

    Args:
        rows: token ids.
        longest: tokens of one row.
    """
    each = min(longest, max(2, POSITIONS // max(1, min(8, len(rows)))))
    found = [torch.as_tensor(row[:each], dtype=torch.long) for row in rows[:8] if len(row)]
    if not found:
        raise ValueError("there are no rows to compare on")
    return found


@torch.no_grad()
def logits_on(model: Any, samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[N, V]` float32 logits at every position of the samples."""
    device = next(model.parameters()).device
    found = [
        model(input_ids=ids[None].to(device), use_cache=False).logits[0].float().cpu()
        for ids in samples
    ]
    return torch.cat(found)


def closeness(exact: torch.Tensor, other: torch.Tensor) -> Closeness:
    """Compare logits `[N, V]` of two models at the same positions."""
    p, q = torch.log_softmax(exact, -1), torch.log_softmax(other, -1)
    return Closeness(
        max_logit_difference=float((other - exact).abs().max()),
        mean_kl=float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0.0)),
        same_top_token=float((other.argmax(-1) == exact.argmax(-1)).float().mean()),
        positions=len(exact),
    )
