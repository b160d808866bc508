"""Reward models: recipe -> pairs -> scalar head -> steps -> adapter, head and classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents
from alignkit.evaluation.pairs import PairScores
from alignkit.models.rewards.head import RewardStatistics
from alignkit.objectives.bradley_terry import bradley_terry_loss
from alignkit.recipe.stages.schema import RewardRecipe
from alignkit.runtime.processes import process_group
from alignkit.stages.inputs.rows import Rows, load_rows
from alignkit.stages.running.finish import RunSummary, finish_run
from alignkit.stages.running.session import RunOptions, Session
from alignkit.stages.running.steps import Run, run_steps
from alignkit.stages.supervised.pairs import ScorePairs, pair_stage, split_roles

MEASURED_PAIRS = 256
"""Training pairs whose rewards are measured where none are held out."""


def run_reward(recipe: RewardRecipe, options: RunOptions) -> RunSummary | None:
    """Run the stage from recipe to reward model; see `run_sft`.

    Args:
        recipe: with its defaults.
        options: of the command line.
    """
    session = Session(recipe, options)
    with session.running() as base:
        rows = load_rows(recipe, base)
        plan = session.plan(rows)
        stage = pair_stage(reward_scores(recipe.objective.center), len(rows.train))
        scorer = session.build_scorer(rows, plan, scalar_head=True)
        session.begin(rows, plan)
        run, first_step = session.start(rows, plan, stage, scorer)
        del scorer  # the run alone holds the weights, so that merging can let them go
        run_steps(run, first_step)
        return finish_run(session, run, rows, _measure_statistics(run, rows))


def reward_scores(center: float) -> ScorePairs:
    """Forward pass and Bradley-Terry loss of pairs.

    Args:
        center: weight of the centring.
    """

    def score(scorer: nn.Module, documents: Sequence[Document]) -> PairScores:
        batch = pack_documents(documents)
        rewards: torch.Tensor = scorer(batch)
        chosen, rejected = split_roles(rewards, batch)
        margins = torch.from_numpy(batch.margins).float().to(rewards.device)
        losses = bradley_terry_loss(chosen, rejected, margins, center=center)
        return PairScores(losses, chosen, rejected, {})

    return score


def answer_rewards(scorer: nn.Module, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """`reward` of each single answer, read where its last trained token ends.

    Args:
        scorer: of a reward model.
        documents: rows of one answer each.
    """
    ended = [_end_at_answer(document) for document in documents]
    return {"reward": scorer(pack_documents(ended))}


def _end_at_answer(document: Document) -> Document:
    """The document without what a template writes after its answer."""
    branch = document.branches[0]
    end = int(np.flatnonzero(branch.trained)[-1]) + 1
    cut = replace(branch, ids=branch.ids[:end], trained=branch.trained[:end])
    return replace(document, branches=(cut,))


def _measure_statistics(run: Run, rows: Rows) -> RewardStatistics:
    """Rewards of the held-out pairs, or of some training pairs, after the last step."""
    measured = rows.held_out
    if measured is None:
        measured = rows.train.subset(np.arange(min(MEASURED_PAIRS, len(rows.train))))
    values = run.stage.evaluate(
        run.scorer, measured, run.plan.microbatch_tokens, process_group(run.accelerator)
    )
    return RewardStatistics(
        mean=values["rewards/mean"],
        std=values["rewards/std"],
        chosen=values["rewards/chosen"],
        rejected=values["rewards/rejected"],
        accuracy=values["rewards/accuracies"],
        pairs=int(values["pairs"]),
        rows="train" if rows.held_out is None else "held_out",
    )
