"""Any recipe -> its stage."""

from __future__ import annotations

from pathlib import Path

from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.stages.base import Recipe
from alignkit.runtime.devices import find_device
from alignkit.runtime.optim import require_optimizer
from alignkit.runtime.processes import world_size
from alignkit.runtime.tuning import tune_device
from alignkit.stages.inputs.base import start_model
from alignkit.stages.inputs.precision import with_precision
from alignkit.stages.inputs.rows import AnyRows
from alignkit.stages.running.definition import definition_of
from alignkit.stages.running.finish import RunSummary
from alignkit.stages.running.record import read_record
from alignkit.stages.running.session import RunOptions


def plan_stage(recipe: Recipe, processes: int) -> tuple[AnyRows, Plan]:
    """Rows and plan of any recipe, without weights.

    Args:
        recipe: with its defaults.
        processes: training processes.

    Raises:
        AlignkitError: anything the user can fix.
    """
    require_optimizer(recipe.training.optimizer, find_device())
    tune_device(deterministic=recipe.training.deterministic)
    base = start_model(recipe.model, merge=False)
    return definition_of(recipe).prepare(with_precision(recipe, processes), base, processes)


def run_stage(recipe: Recipe, options: RunOptions) -> RunSummary | None:
    """Run a recipe from rows to merged checkpoint.

    Args:
        recipe: with its defaults.
        options: of the command line.

    Returns:
        What a person wants to know at the end; None on every process but the first.

    Raises:
        AlignkitError: anything the user can fix.
    """
    require_optimizer(recipe.training.optimizer, find_device())
    tune_device(deterministic=recipe.training.deterministic)
    before = read_record(Path(recipe.output)) if options.resume else None
    chosen = with_precision(recipe, world_size(), None if before is None else before.recipe)
    return definition_of(recipe).run(chosen, options)
