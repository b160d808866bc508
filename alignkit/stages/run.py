"""Any recipe -> its stage."""

from __future__ import annotations

from alignkit.recipe.plan import Plan
from alignkit.recipe.schema import DpoRecipe, KtoRecipe, PpoRecipe, Recipe, RewardRecipe
from alignkit.runtime.devices import find_device
from alignkit.runtime.optim import require_optimizer
from alignkit.stages.kto import run_kto
from alignkit.stages.outputs import RunSummary
from alignkit.stages.ppo import prepare_ppo, run_ppo
from alignkit.stages.preference import run_preference
from alignkit.stages.prepare import AnyRows, load_rows, plan_run
from alignkit.stages.reward import run_reward
from alignkit.stages.session import RunOptions
from alignkit.stages.sft import run_sft


def plan_stage(recipe: Recipe, processes: int) -> tuple[AnyRows, Plan]:
    """Rows and plan of any recipe, without weights.

    Args:
        recipe: with its defaults.
        processes: training processes.

    Raises:
        AlignkitError: anything the user can mend.
    """
    require_optimizer(recipe.training.optimizer, find_device())
    if isinstance(recipe, PpoRecipe):
        made = prepare_ppo(recipe, processes)
        return made.rows, made.plan
    rows = load_rows(recipe)
    return rows, plan_run(recipe, rows, processes)


def run_stage(recipe: Recipe, options: RunOptions) -> RunSummary | None:
    """Run a recipe from rows to merged checkpoint.

    Args:
        recipe: with its defaults.
        options: of the command line.

    Returns:
        What a person wants to know at the end; None on every process but the first.

    Raises:
        AlignkitError: anything the user can mend.
    """
    require_optimizer(recipe.training.optimizer, find_device())
    if isinstance(recipe, RewardRecipe):
        return run_reward(recipe, options)
    if isinstance(recipe, DpoRecipe):
        return run_preference(recipe, options)
    if isinstance(recipe, KtoRecipe):
        return run_kto(recipe, options)
    if isinstance(recipe, PpoRecipe):
        return run_ppo(recipe, options)
    return run_sft(recipe, options)
