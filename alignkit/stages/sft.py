"""Supervised fine-tuning: recipe -> plan -> rows -> model -> steps -> adapter and merged model."""

from __future__ import annotations

from torch import nn

from alignkit.objectives.cross_entropy import cross_entropy_loss
from alignkit.packed import PackedBatch
from alignkit.recipe.schema import Recipe
from alignkit.stages.outputs import RunSummary, finish_run
from alignkit.stages.prepare import load_rows
from alignkit.stages.session import RunOptions, Session
from alignkit.stages.steps import LossSums, Stage, run_steps


def run_sft(recipe: Recipe, options: RunOptions) -> RunSummary | None:
    """Run the stage from recipe to merged checkpoint.

    Args:
        recipe: an SFT recipe with its defaults.
        options: of the command line.

    Returns:
        What a person wants to know at the end; None on every process but the first.

    Raises:
        AlignkitError: anything the user can mend. A merge that fails leaves the adapter, whole,
            and no merged/.
    """
    session = Session(recipe, options)
    rows = load_rows(recipe)
    plan = session.plan(rows)
    stage = Stage(sft_loss, rows.train.num_trained.tolist())
    scorer = session.build_scorer(rows.base, plan)
    with session.running(rows, plan):
        run, first_step = session.start(rows, plan, stage, scorer)
        del scorer  # the run alone holds the weights, so that merging can let them go
        run_steps(run, first_step)
        return finish_run(session, run, rows)


def sft_loss(scorer: nn.Module, batch: PackedBatch) -> LossSums:
    """Summed negative log-likelihood of a micro-batch.

    Args:
        scorer: maps a batch to log-probs.
        batch: with `N` targets.

    Returns:
        The sum over its targets, and `accuracy`: how many were the likeliest token. The weight of
        an item is its number of targets.
    """
    scores = scorer(batch)
    losses = cross_entropy_loss(scores.logprobs)
    return LossSums(losses.sum(), {"accuracy": scores.correct.sum()})
