"""How often a model prefers the chosen completion, by how much, and how certain that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from alignkit.evaluation.columns import Columns
from alignkit.evaluation.intervals import calibration_error, wilson_interval


@dataclass(frozen=True)
class PairScores:
    """What an objective computes for `B` pairs.

    Args:
        losses: `[B]`.
        chosen: `[B]` reward of the chosen completion, implicit or from a reward model.
        rejected: `[B]` reward of the rejected completion.
        metrics: name -> `[B]` further values whose means are logged.
    """

    losses: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    metrics: dict[str, torch.Tensor]

    def columns(self) -> dict[str, torch.Tensor]:
        """Name -> `[B]`, as `describe_pairs` reads them."""
        own = {
            "loss": self.losses,
            "rewards/chosen": self.chosen,
            "rewards/rejected": self.rejected,
        }
        return {**own, **self.metrics}

    def sums(self) -> dict[str, torch.Tensor]:
        """Name -> scalar sums over the pairs, under TRL's names.

        `rewards/accuracies` counts 1 if the chosen completion is ahead, 0.5 if both are equal.
        """
        chosen, rejected = self.chosen.detach(), self.rejected.detach()
        ahead = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": ahead,
            **self.metrics,
        }
        return {name: value.detach().sum() for name, value in values.items()}


def describe_pairs(columns: Columns) -> dict[str, float]:
    """Means, interval and calibration of measured pairs.

    Args:
        columns: `loss`, `rewards/chosen`, `rewards/rejected` and others, one value for each pair.

    Returns:
        The means; `rewards/margins`; `rewards/accuracies` (ties count half) with its 95% interval
        `_low` and `_high`; `rewards/mean` and `rewards/std` over all completions;
        `calibration_error`; `pairs` counted.
    """
    chosen, rejected = columns["rewards/chosen"], columns["rewards/rejected"]
    margins, both = chosen - rejected, np.concatenate([chosen, rejected])
    count = len(margins)
    right = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    low, high = wilson_interval(right, count)
    return {
        **{name: float(values.mean()) for name, values in columns.items()},
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": right / count,
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "rewards/mean": float(both.mean()),
        "rewards/std": float(both.std()),
        "calibration_error": calibration_error(margins),
        "pairs": float(count),
    }


def say_pairs(values: dict[str, float]) -> str:
    """Held-out values of pairs in one line."""
    return (
        f"loss {values['loss']:.4f}  accuracy {values['rewards/accuracies']:.1%} "
        f"({values['rewards/accuracies_low']:.1%} to {values['rewards/accuracies_high']:.1%})  "
        f"margin {values['rewards/margins']:.3f}  calibration error "
        f"{values['calibration_error']:.3f}"
    )
