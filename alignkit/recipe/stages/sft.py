"""The recipe of supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from alignkit.recipe.objectives import CrossEntropySpec, TokenSpec
from alignkit.recipe.rows import SftDataSpec
from alignkit.recipe.stages.base import Rate, Rates, SupervisedRecipe


class SftRecipe(SupervisedRecipe):
    """Supervised fine-tuning with prompt-masked loss."""

    stage: Literal["sft"]
    """The training stage."""
    data: SftDataSpec
    """Rows to train on and rows to hold out."""
    objective: TokenSpec = Field(default=CrossEntropySpec(), validate_default=True)
    """The loss."""

    definition: ClassVar[str] = "alignkit.stages.supervised.sft:SFT"
    rates: ClassVar[Rates] = {
        "lora": Rate(2.0e-4, 1e-5, 1e-3),
        "ia3": Rate(3.0e-3, 3e-4, 3e-2),
        "prefix": Rate(3.0e-2, 1e-3, 2e-1),
        "projection": Rate(5.0e-4, 1e-5, 3e-3),
        "full": Rate(2.0e-5, 5e-7, 1e-4),
    }
    better: ClassVar[dict[str, str]] = {
        "loss": "lower",
        "perplexity": "lower",
        "accuracy": "higher",
    }
