"""A stage that learns from rows: the body that all of them share, around their hooks.

recipe -> rows -> plan -> model -> (reference) -> steps -> adapter and merged model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.models.base.loading import BaseModel
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.stages.base import Recipe
from alignkit.runtime.processes import SINGLE
from alignkit.stages.inputs.rows import Rows, load_rows, plan_run
from alignkit.stages.running.finish import RunSummary, finish_run
from alignkit.stages.running.hooks import RowHooks
from alignkit.stages.running.session import RunOptions, Session
from alignkit.stages.running.steps import Run, run_steps
from alignkit.stages.supervised.custom import CustomShape, check_custom
from alignkit.stages.supervised.reference import Reference, build_reference


@dataclass(frozen=True)
class SupervisedStage:
    """A `StageDef` for rows.

    Args:
        hooks: recipe, rows and reference log-probs -> loss, weights and evaluation.
        metrics: name of each metric of its own -> what it means.
        custom: what a user's loss looks like; None if the stage takes none.
        finish: what else is kept with the model after the last step.
    """

    hooks: Callable[[Any, TokenDataset, Reference | None], RowHooks]
    metrics: Mapping[str, str] = field(default_factory=dict)
    custom: CustomShape | None = None
    finish: Callable[[Run, Rows], Any] = lambda run, rows: None

    def prepare(self, recipe: Recipe, base: BaseModel, processes: int) -> tuple[Rows, Plan]:
        """Rows and plan, without weights; see `StageDef.prepare`."""
        rows = load_rows(recipe, base)
        return rows, plan_run(recipe, rows, processes)

    def run(self, recipe: Recipe, options: RunOptions) -> RunSummary | None:
        """Train, from rows to merged checkpoint; see `StageDef.run`.

        Raises:
            AlignkitError: anything the user can fix. A merge that fails leaves the adapter, whole,
                and no merged/.
        """
        check_custom(recipe.objective, self.custom)
        session = Session(recipe, options)
        with session.running() as base:
            rows = load_rows(recipe, base)
            plan = session.plan(rows)
            scorer = session.build_scorer(rows, plan)
            session.begin(rows, plan)
            reference = None
            if recipe.needs_reference:
                reference, rows = build_reference(session, scorer, rows, plan)
            hooks = self.hooks(recipe, rows.train, reference)
            run, first_step = session.start(rows, plan, hooks, scorer)
            del scorer  # the run alone holds the weights, so that merging can release them
            run_steps(run, first_step)
            statistics = self.finish(run, rows)
            del hooks, reference  # a reference may be a second model
            return finish_run(session, run, rows, statistics)

    def evaluate(
        self,
        recipe: Recipe,
        scorer: nn.Module,
        rows: TokenDataset,
        reference: Reference | None,
        max_tokens: int,
    ) -> dict[str, float]:
        """Values of held-out rows; see `StageDef.evaluate`."""
        return self.hooks(recipe, rows, reference).evaluate(scorer, rows, max_tokens, SINGLE)
