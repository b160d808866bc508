"""How far apart two models are on real rows: logits, KL and loss at the ends of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.packed import IntArray

CHECK_TOKENS = 256
"""Positions on which logits are compared."""

_READ = 512
"""Most tokens of a row that are read; the last of them, where completions are, are compared."""

_ROWS = 8


@dataclass(frozen=True)
class Sample:
    """A row, and the part of it that is compared.

    Args:
        ids: `[T]` token ids that are read.
        first: position from which logits are compared.
    """

    ids: torch.Tensor
    first: int


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
        """The differences in a sentence."""
        return (
            f"on {self.positions} tokens: largest logit difference "
            f"{self.max_logit_difference:.3g}, KL {self.mean_kl:.2g} nats/token, same top token "
            f"{self.same_top_token:.1%}"
        )


def take_samples(rows: Sequence[IntArray], longest: int = _READ) -> list[Sample]:
    """Up to eight rows with `CHECK_TOKENS` compared positions in all.

    Args:
        rows: token ids of real rows.
        longest: most tokens of a row that are read.
    """
    samples: list[Sample] = []
    left = CHECK_TOKENS
    each = max(2, CHECK_TOKENS // max(1, min(_ROWS, len(rows))))
    for row in rows:
        ids = torch.as_tensor(row[: min(longest, _READ)], dtype=torch.long)
        compared = min(len(ids), each, left)
        if compared:
            samples.append(Sample(ids, len(ids) - compared))
            left -= compared
    return samples


@torch.no_grad()
def read_logits(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """`[N, V]` float32 logits at the compared positions.

    One pass for all rows, padded on the left so that these come last: a model that is
    streamed from its files is read once.
    """
    device = next(model.parameters()).device
    longest = max(len(one.ids) for one in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(samples):
        ids[row, longest - len(one.ids) :] = one.ids
        mask[row, longest - len(one.ids) :] = 1
    kept = [len(one.ids) - one.first for one in samples]
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(device),
        use_cache=False,
        logits_to_keep=max(kept),
    ).logits
    return torch.cat([row[-count:].float().cpu() for row, count in zip(logits, kept, strict=True)])


def closeness(exact: torch.Tensor, other: torch.Tensor) -> Closeness:
    """Compare logits `[N, V]` of two models at the same positions."""
    return Closeness(
        max_logit_difference=float((other - exact).abs().max()),
        mean_kl=mean_kl(exact, other),
        same_top_token=float((other.argmax(-1) == exact.argmax(-1)).float().mean()),
        positions=len(exact),
    )


def mean_kl(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over positions of KL(exact ‖ other) in nats; both `[N, V]` logits."""
    p, q = torch.log_softmax(exact, -1), torch.log_softmax(other, -1)
    return float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0.0))


def mean_loss(logits: torch.Tensor, samples: Sequence[Sample]) -> float:
    """Mean negative log-likelihood in nats of the tokens that follow compared positions."""
    scores, start = [], 0
    for one in samples:
        targets = one.ids[one.first + 1 :]
        own = torch.log_softmax(logits[start : start + len(targets)], -1)
        scores.append(-own.gather(1, targets[:, None])[:, 0])
        start += len(one.ids) - one.first
    every = torch.cat(scores) if scores else torch.zeros(0)
    return float(every.mean()) if every.numel() else float("nan")
