"""The interface of a stage, for everything that runs stages."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any, Protocol

from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.errors import AlignkitError
from alignkit.models.base.loading import BaseModel
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.stages.base import Recipe
from alignkit.stages.inputs.rows import AnyRows
from alignkit.stages.running.finish import RunSummary
from alignkit.stages.running.session import RunOptions


class StageDef(Protocol):
    """A stage: a recipe class names an object like this, which is imported only to run it."""

    @property
    def metrics(self) -> Mapping[str, str]:
        """Name of each metric of the stage's own -> what it means."""

    def prepare(self, recipe: Any, base: BaseModel, processes: int) -> tuple[AnyRows, Plan]:
        """Rows and plan, without weights.

        Args:
            recipe: with its defaults, its dtype chosen.
            base: the model that the recipe starts from; an adapter in it may not be merged yet.
            processes: training processes.
        """

    def run(self, recipe: Any, options: RunOptions) -> RunSummary | None:
        """Train, from rows to merged checkpoint.

        Args:
            recipe: with its defaults, its dtype chosen.
            options: of the command line.

        Returns:
            What a person wants to know at the end; None on every process but the first.
        """

    def evaluate(
        self, recipe: Any, scorer: nn.Module, rows: TokenDataset, reference: Any, max_tokens: int
    ) -> dict[str, float]:
        """Values of held-out rows of the stage's own kind.

        Args:
            recipe: of the run.
            scorer: of its model.
            rows: to measure on.
            reference: log-probs to compare with; None if the recipe needs none.
            max_tokens: tokens of one pass.
        """


def definition_of(recipe: Recipe) -> StageDef:
    """The definition that a recipe's class names.

    Raises:
        AlignkitError: it cannot be imported.
    """
    try:
        definition: StageDef = EntryPoint(recipe.stage, recipe.definition, "").load()
    except (ImportError, AttributeError) as error:
        raise AlignkitError(
            f"stage {recipe.stage} cannot be loaded: {error}",
            hint=f"its definition is {recipe.definition}; reinstall the package it comes from",
        ) from error
    return definition
