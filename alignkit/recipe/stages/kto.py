"""The recipe of preference optimization on labelled completions."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator

from alignkit.recipe.adapters import AdapterSpec
from alignkit.recipe.facts import DataFacts
from alignkit.recipe.objectives import KtoSpec
from alignkit.recipe.stages.base import (
    Rate,
    Rates,
    ReferenceSpec,
    SupervisedRecipe,
    refuse_continuing,
)
from alignkit.recipe.stages.dpo import DpoRecipe

_BALANCE = (1.0, 4.0 / 3.0)
"""Range of the ratio of weight × count, desirable to undesirable rows."""


class KtoRecipe(SupervisedRecipe):
    """Preference optimization on single completions labelled good or bad."""

    stage: Literal["kto"]
    """The training stage."""
    objective: KtoSpec = KtoSpec()
    """The loss."""
    reference: ReferenceSpec = ReferenceSpec()
    """The reference model."""

    @field_validator("adapter")
    @classmethod
    def _starts_at_its_reference(cls, value: AdapterSpec) -> AdapterSpec:
        refuse_continuing(value)
        return value

    definition: ClassVar[str] = "alignkit.stages.supervised.kto:KTO"
    row_kind = "labelled"
    rates: ClassVar[Rates] = {**DpoRecipe.rates, "full": Rate(1.0e-6, 5e-8, 1e-5)}
    hints = DpoRecipe.hints
    shares_prompts = True
    better: ClassVar[dict[str, str]] = {
        "loss": "lower",
        "rewards/accuracies": "higher",
        "rewards/margins": "higher",
        "auc": "higher",
    }

    @property
    def needs_reference(self) -> bool:
        """Always."""
        return True

    def warnings(self, data: DataFacts) -> list[str]:
        """Unbalanced labels, by section 4 of the KTO paper."""
        if not data.chosen or not data.rejected:
            side = "desirable" if data.chosen else "undesirable"
            return [f"all {data.rows} rows are {side}: there is nothing to tell apart"]
        objective = self.objective
        good = objective.desirable_weight * data.chosen
        bad = objective.undesirable_weight * data.rejected
        low, high = _BALANCE
        if low * 0.99 <= good / bad <= high * 1.01:
            return []
        wanted = objective.undesirable_weight * data.rejected / data.chosen
        return [
            f"desirable_weight × {data.chosen} desirable rows is {good / bad:.2f} times "
            f"undesirable_weight × {data.rejected} undesirable rows; the paper keeps this between "
            f"1 and 4/3: set objective.desirable_weight between {wanted:.3g} and "
            f"{wanted * 4 / 3:.3g}"
        ]
