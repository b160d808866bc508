"""The recipe of reward models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from alignkit.recipe.objectives import BradleyTerrySpec, RewardSpec
from alignkit.recipe.stages.base import PAIRS_BETTER, Rate, Rates, SupervisedRecipe


class RewardRecipe(SupervisedRecipe):
    """A reward model: one number per completion, learned from preference pairs."""

    stage: Literal["reward"]
    """The training stage."""
    objective: RewardSpec = Field(default=BradleyTerrySpec(), validate_default=True)
    """The loss."""

    definition: ClassVar[str] = "alignkit.stages.supervised.reward:REWARD"
    row_kind = "pairs"
    rates: ClassVar[Rates] = {
        "lora": Rate(1.0e-4, 1e-5, 1e-3),
        "ia3": Rate(3.0e-3, 3e-4, 3e-2),
        "full": Rate(1.0e-5, 1e-6, 1e-4),
    }
    scalar_head = True
    better = PAIRS_BETTER
    shares_prompts = True
