"""How well a model tells completions labelled good from those labelled bad."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from alignkit.evaluation.columns import Columns
from alignkit.evaluation.intervals import wilson_interval
from alignkit.objectives.kto import kl_baseline


def describe_labelled(
    columns: Columns,
    objective: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    beta: float,
) -> dict[str, float]:
    """Loss and rewards of labelled rows, with the baseline of all of them together.

    Args:
        columns: `ratio` log π(y|x) / π_ref(y|x) of each row's completion, `mismatched` the same for
            the completion of another row, `desirable` 1 or 0.
        objective: `(ratios, desirable, baseline) -> losses`.
        beta: scale of the rewards.

    Returns:
        `loss`; `kl`, the baseline; `rewards/chosen` and `rewards/rejected`, means over desirable
        and undesirable completions; `rewards/margins`; `rewards/accuracies` with its 95% interval,
        the share of completions on the right side of the baseline, ties half; `auc`, the
        probability that a desirable completion has the higher reward; `rows` counted.
    """
    ratios, desirable = columns["ratio"], columns["desirable"] > 0.5
    baseline = kl_baseline(float(columns["mismatched"].sum()), len(ratios))
    losses = objective(
        torch.from_numpy(ratios), torch.from_numpy(desirable), torch.tensor(baseline)
    )
    rewards = beta * ratios
    good, bad = rewards[desirable], rewards[~desirable]
    side = np.where(desirable, ratios - baseline, baseline - ratios)
    right = float((side > 0).sum() + 0.5 * (side == 0).sum())
    low, high = wilson_interval(right, len(rewards))
    values = {
        "loss": float(losses.mean()),
        "kl": baseline,
        "rewards/accuracies": right / len(rewards),
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
        "rows": float(len(rewards)),
    }
    if len(good) and len(bad):
        values["rewards/chosen"] = float(good.mean())
        values["rewards/rejected"] = float(bad.mean())
        values["rewards/margins"] = float(good.mean() - bad.mean())
        values["auc"] = float((good[:, None] > bad).mean() + 0.5 * (good[:, None] == bad).mean())
    return values


def say_labelled(values: dict[str, float]) -> str:
    """Held-out values of labelled rows in one line."""
    parts = [
        f"loss {values['loss']:.4f}  accuracy {values['rewards/accuracies']:.1%} "
        f"({values['rewards/accuracies_low']:.1%} to {values['rewards/accuracies_high']:.1%})"
    ]
    if "auc" in values:
        parts.append(f"AUC {values['auc']:.3f}  margin {values['rewards/margins']:.3f}")
    return "  ".join([*parts, f"KL {values['kl']:.3f}"])
