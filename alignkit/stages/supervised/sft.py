"""Supervised fine-tuning: recipe -> plan -> rows -> model -> steps -> adapter and merged model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents
from alignkit.evaluation.heldout import evaluate_heldout, say_heldout
from alignkit.objectives.cross_entropy import cross_entropy_loss
from alignkit.recipe.stages.schema import SftRecipe
from alignkit.stages.inputs.rows import load_rows
from alignkit.stages.running.finish import RunSummary, finish_run
from alignkit.stages.running.session import RunOptions, Session
from alignkit.stages.running.stage import LossSums, Measured, Stage
from alignkit.stages.running.steps import run_steps


def run_sft(recipe: SftRecipe, options: RunOptions) -> RunSummary | None:
    """Run the stage from recipe to merged checkpoint.

    Args:
        recipe: with its defaults.
        options: of the command line.

    Returns:
        What a person wants to know at the end; None on every process but the first.

    Raises:
        AlignkitError: anything the user can mend. A merge that fails leaves the adapter, whole,
            and no merged/.
    """
    session = Session(recipe, options)
    with session.running() as base:
        rows = load_rows(recipe, base)
        plan = session.plan(rows)
        stage = Stage(sft_loss, rows.train.num_trained.tolist(), evaluate_heldout, say_heldout)
        scorer = session.build_scorer(rows, plan)
        session.begin(rows, plan)
        run, first_step = session.start(rows, plan, stage, scorer)
        del scorer  # the run alone holds the weights, so that merging can let them go
        run_steps(run, first_step)
        return finish_run(session, run, rows)


def sft_loss(scorer: nn.Module, documents: Sequence[Document], measured: Measured) -> LossSums:
    """Summed negative log-likelihood of a micro-batch.

    Args:
        scorer: maps a batch to log-probs.
        documents: rows of one answer each, `N` trained tokens.
        measured: nothing.

    Returns:
        The sum over the trained tokens, and `accuracy`: how many were the likeliest token. The
        weight of an item is its number of trained tokens.
    """
    scores: Any = scorer(pack_documents(documents))
    losses = cross_entropy_loss(scores.logprobs)
    return LossSums(losses.sum(), {"accuracy": scores.correct.sum()})
