"""How a run on responses is doing, in plain words: each metric with its usual band.

Bands are those that published runs report; they are questions to ask, not laws. What leaving one
means stands beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Band:
    """The usual range of a metric.

    Args:
        metric: its name.
        label: what a person calls it.
        low: lower end; None is open.
        high: upper end; None is open.
        below: what it means to be below.
        above: what it means to be above.
        patience: steps outside before it is reported; early steps are rough for some metrics.
    """

    metric: str
    label: str
    low: float | None
    high: float | None
    below: str = ""
    above: str = ""
    patience: int = 1


BANDS = (
    Band(
        "kl/k1",
        "KL of a response",
        -0.5,
        20.0,
        "below zero on average: the policy samples what it scores as unlikely; check the "
        "temperature and the stop tokens",
        "far from the reference: raise objective.kl_coef or lower training.learning_rate",
    ),
    Band(
        "clip_fraction",
        "clip fraction",
        None,
        0.3,
        above="updates are too large: lower training.learning_rate or objective.epochs",
        patience=2,
    ),
    Band(
        "clip_ratio/region_mean",
        "share of clipped tokens",
        None,
        0.3,
        above="updates are too large: lower training.learning_rate or objective.epochs",
        patience=2,
    ),
    Band(
        "frac_reward_zero_std",
        "groups that earn all the same",
        None,
        0.8,
        above="little is learned from a step: other prompts, objective.resample, or a reward with "
        "steps in between",
        patience=3,
    ),
    Band(
        "unscored",
        "responses without a reward",
        None,
        0.2,
        above="nothing is learned from them: see the lines about failures, and samples.jsonl",
        patience=2,
    ),
    Band(
        "explained_variance",
        "explained variance",
        0.0,
        None,
        "the value model predicts worse than a constant: raise value.learning_rate, or give it "
        "more steps",
        patience=5,
    ),
    Band(
        "response_length",
        "response length",
        2.0,
        None,
        "responses have all but vanished: reward longer ones, or raise objective.kl_coef",
        patience=2,
    ),
    Band(
        "eos_rate",
        "share of finished responses",
        0.05,
        None,
        "hardly any response ends by itself: raise rollout.max_new_tokens, or "
        "rollout.missing_eos_penalty",
        patience=5,
    ),
    Band(
        "reward_std",
        "spread of the rewards",
        1e-6,
        None,
        "all responses earn the same: nothing can be learned from them",
        patience=2,
    ),
    Band(
        "distinct_2",
        "distinct word pairs",
        0.2,
        None,
        "responses repeat themselves, the mark of a collapsing policy: raise objective.kl_coef",
        patience=2,
    ),
    Band(
        "entropy",
        "entropy of a token",
        0.1,
        None,
        "the policy has nearly stopped exploring: raise objective.kl_coef",
        patience=2,
    ),
)


class Health:
    """Watches the bands over the steps of a run.

    Args:
        outside: steps that each metric was outside its band before a resume.
    """

    def __init__(self, outside: dict[str, int] | None = None) -> None:
        self.outside = dict(outside or {})

    def look(self, metrics: dict[str, float]) -> list[str]:
        """What is worth reporting after a step: a metric that has left its band, or come back.

        Args:
            metrics: of the step.
        """
        lines = []
        for band in BANDS:
            value = metrics.get(band.metric, math.nan)
            if not math.isfinite(value):
                continue
            fault = _fault(band, value)
            steps = self.outside.get(band.metric, 0)
            if fault is not None:
                self.outside[band.metric] = steps + 1
                if steps + 1 == band.patience:
                    lines.append(f"{band.label} {value:.3g} {fault}")
            elif steps:
                self.outside[band.metric] = 0
                if steps >= band.patience:
                    lines.append(f"{band.label} {value:.3g} is back in its usual range")
        return lines

    def summary(self, metrics: dict[str, float]) -> str:
        """One line about the last step: every metric with its verdict."""
        parts = []
        for band in BANDS:
            value = metrics.get(band.metric, math.nan)
            if math.isfinite(value):
                parts.append(
                    f"{band.label} {value:.3g}{'' if _fault(band, value) is None else ' (!)'}"
                )
        return ", ".join(parts)


def _fault(band: Band, value: float) -> str | None:
    if not math.isfinite(value):
        return None
    if band.low is not None and value < band.low:
        return f"is below the usual {band.low:g}: {band.below}"
    if band.high is not None and value > band.high:
        return f"is above the usual {band.high:g}: {band.above}"
    return None


def distinct_pairs(texts: Sequence[str]) -> float:
    """Share of different word pairs among all of them, over all texts together (distinct-2,
    https://arxiv.org/abs/1510.03055).

    Args:
        texts: responses.

    Returns:
        In (0, 1]; NaN if no text has two words.
    """
    pairs = [
        pair for text in texts for words in [text.split()] for pair in itertools.pairwise(words)
    ]
    return len(set(pairs)) / len(pairs) if pairs else math.nan
