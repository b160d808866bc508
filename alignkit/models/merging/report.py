"""What a merge did, in numbers and sentences, and how far it may be off."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from alignkit.errors import RoundingError

MAX_KL = (1e-3, 1e-2)
"""Nats per token that rounding may move the merged model away from base + adapter: below the first
it always may, above the second never."""

MAX_KL_SHARE = 0.05
"""In between, as a share of the distance between base + adapter and the base."""

MAX_LOSS = 0.02
"""Nats per token that the loss may rise by rounding."""


@dataclass(frozen=True)
class Drift:
    """How an adapter that was trained over quantized weights performs over the original ones.

    Args:
        what: name of the value that is compared.
        trained: the value over the weights it was trained over, which are the dequantized ones.
        original: over the original weights; neither is rounded.
        distance: between the two models' outputs, and its unit, in words.
        limit: how far the value may be off.
        exceeds: whether it is.
    """

    what: str
    trained: float
    original: float
    distance: str
    limit: float
    exceeds: bool


@dataclass(frozen=True)
class QuantizedReport:
    """How an adapter that was trained over quantized weights was merged.

    Args:
        kind: of quantization.
        onto: the weights that were merged onto, `original` or `dequantized`.
        drift: between the two.
    """

    kind: str
    onto: str
    drift: Drift

    def line(self) -> str:
        """The report in a sentence."""
        drift = self.drift
        return (
            f"trained over {self.kind} weights: {drift.what} {drift.trained:.4f} there, "
            f"{drift.original:.4f} over the original weights ({drift.distance}); merged onto the "
            f"{self.onto} ones"
        )


@dataclass(frozen=True)
class MergeReport:
    """What the merge did and how faithful it is.

    Args:
        output: the merged folder.
        dtype: of the written weights.
        modules: adapted layers.
        survived: projection of the rounded update onto the exact one; 1.0 is all of it.
        rounding_error: norm of what rounding changed, relative to the norm of the update.
        max_logit_difference: largest |difference| to base + adapter, both in float32 arithmetic.
        mean_kl: KL(base + adapter ‖ merged) in nats per token.
        mean_kl_to_base: KL(base + adapter ‖ base): how far training moved the model.
        same_top_token: share of positions with the same likeliest token.
        positions: tokens compared.
        loss: of base + adapter, nats per token.
        merged_loss: the same for the merged model.
        quantized: for an adapter that was trained over quantized weights.
        notes: what else the user must know, in sentences.
    """

    output: str
    dtype: str
    modules: int
    survived: float
    rounding_error: float
    max_logit_difference: float
    mean_kl: float
    mean_kl_to_base: float
    same_top_token: float
    positions: int
    loss: float
    merged_loss: float
    quantized: QuantizedReport | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The report in sentences."""
        return [
            f"merged {self.modules} layers into {self.output} ({self.dtype})",
            f"against base + adapter on {self.positions} tokens: largest logit difference "
            f"{self.max_logit_difference:.3g}, KL {self.mean_kl:.2g} nats/token "
            f"(training moved it by {self.mean_kl_to_base:.2g}), loss {self.loss:.4f} → "
            f"{self.merged_loss:.4f}, same top token {self.same_top_token:.1%}",
            f"{self.survived:.1%} of the update survived rounding to {self.dtype}, under random "
            f"noise of {self.rounding_error:.0%} of the update's size that averages out",
            *([self.quantized.line()] if self.quantized else []),
            *self.notes,
        ]


def require_faithful(report: MergeReport) -> None:
    """Refuse a merge that lost too much.

    Raises:
        RoundingError: it did; wider weights help.
    """
    low, high = MAX_KL
    limit = min(high, max(low, MAX_KL_SHARE * report.mean_kl_to_base))
    worse = report.merged_loss - report.loss
    # Written so that NaN fails too.
    if report.mean_kl <= limit and report.survived > 0.5 and not worse > MAX_LOSS:
        return
    raise RoundingError(
        f"the merged model is not faithful to base + adapter: KL {report.mean_kl:.2g} nats/token "
        f"is more than {limit:.2g}, loss rose by {worse:.2g} ({MAX_LOSS:g} is allowed), or less "
        f"than half of the update survived rounding to {report.dtype}: {report.survived:.1%}",
        hint="merge into wider weights with --dtype float32; nothing was written",
    )
