"""The recipe of preference optimization on pairs."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from alignkit.recipe.objectives import DpoSpec, PreferenceSpec
from alignkit.recipe.stages.base import (
    PAIRS_BETTER,
    Rate,
    Rates,
    ReferenceSpec,
    SupervisedRecipe,
    refuse_continuing,
)


class DpoRecipe(SupervisedRecipe):
    """Preference optimization on pairs: DPO and its relatives."""

    stage: Literal["dpo"]
    """The training stage."""
    objective: PreferenceSpec = Field(default=DpoSpec(kind="dpo"), validate_default=True)
    """The loss; each kind has its own fields."""
    reference: ReferenceSpec | None = None
    """The reference model; not used by `simpo`, `orpo` and `cpo`."""

    @field_validator("objective")
    @classmethod
    def _starts_at_its_reference(
        cls, value: PreferenceSpec, info: ValidationInfo
    ) -> PreferenceSpec:
        if value.needs_reference:
            refuse_continuing(info.data.get("adapter"))
        return value

    @field_validator("reference")
    @classmethod
    def _no_reference_without_use(
        cls, value: ReferenceSpec | None, info: ValidationInfo
    ) -> ReferenceSpec | None:
        objective = info.data.get("objective")
        if value is not None and objective is not None and not objective.needs_reference:
            raise ValueError(f"is not used: `{objective.kind}` has no reference model")
        return value

    definition: ClassVar[str] = "alignkit.stages.supervised.preference:DPO"
    row_kind = "pairs"
    rates: ClassVar[Rates] = {
        "lora": Rate(2.0e-5, 1e-6, 5e-4),
        "ia3": Rate(5.0e-4, 1e-5, 1e-2),
        "prefix": Rate(3.0e-3, 1e-4, 5e-2),
        "projection": Rate(1.0e-4, 1e-6, 1e-3),
        "full": Rate(5.0e-7, 5e-8, 1e-5),
    }
    """Preference losses shift all similar completions at once: far lower rates than in SFT."""
    hints: ClassVar[dict[str, str]] = {
        "objective.beta": "0.1 is the value of the DPO paper; smaller lets the policy move further "
        "from the reference",
        "objective.tau": "the target margin is 1 / (2 tau) nats; 0.01 to 1 is usual",
        "objective.label_smoothing": "the share of wrong labels; 0.1 is usual",
        "reference": "remove the key, or choose an objective with a reference, such as dpo",
    }
    shares_prompts = True
    better = PAIRS_BETTER
    uses_margins = False

    @property
    def needs_reference(self) -> bool:
        """Whether the kind of objective uses a reference model."""
        return self.objective.needs_reference

    def with_defaults(self) -> Self:
        """The recipe with its defaults, including the reference if the objective uses one."""
        filled = super().with_defaults()
        if filled.needs_reference and filled.reference is None:
            return filled.model_copy(update={"reference": ReferenceSpec()})
        return filled
