"""Any recipe -> its stage."""

from __future__ import annotations

from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.stages.schema import DpoRecipe, KtoRecipe, PpoRecipe, Recipe, RewardRecipe
from alignkit.runtime.devices import find_device
from alignkit.runtime.optim import require_optimizer
from alignkit.stages.inputs.base import start_model
from alignkit.stages.inputs.rows import AnyRows, load_rows, plan_run
from alignkit.stages.ppo.stage import prepare_ppo, run_ppo
from alignkit.stages.running.finish import RunSummary
from alignkit.stages.running.session import RunOptions
from alignkit.stages.supervised.kto import run_kto
from alignkit.stages.supervised.preference import run_preference
from alignkit.stages.supervised.reward import run_reward
from alignkit.stages.supervised.sft import run_sft


def plan_stage(recipe: Recipe, processes: int) -> tuple[AnyRows, Plan]:
    """Rows and plan of any recipe, without weights.

    Args:
        recipe: with its defaults.
        processes: training processes.

    Raises:
        AlignkitError: anything the user can mend.
    """
    require_optimizer(recipe.training.optimizer, find_device())
    base = start_model(recipe.model, merge=False)
    if isinstance(recipe, PpoRecipe):
        made = prepare_ppo(recipe, base, processes)
        return made.rows, made.plan
    rows = load_rows(recipe, base)
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
