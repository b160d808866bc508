"""Reward models: a scalar head that puts the chosen completion of a pair ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents
from alignkit.evaluation.pairs import PairScores
from alignkit.models.kernels.copies import on_device
from alignkit.models.rewards.head import RewardStatistics
from alignkit.objectives.bradley_terry import bradley_terry_loss
from alignkit.recipe.objectives import CustomSpec
from alignkit.recipe.stages.reward import RewardRecipe
from alignkit.runtime.processes import process_group
from alignkit.stages.inputs.rows import Rows
from alignkit.stages.running.hooks import RowHooks
from alignkit.stages.running.steps import Run
from alignkit.stages.supervised.custom import REWARDS, custom_loss
from alignkit.stages.supervised.pairs import PAIR_METRICS, ScorePairs, pair_hooks, split_roles
from alignkit.stages.supervised.reference import Reference
from alignkit.stages.supervised.stage import SupervisedStage

MEASURED_PAIRS = 256
"""Training pairs whose rewards are measured if none are held out."""


def reward_hooks(recipe: RewardRecipe, rows: TokenDataset, reference: Reference | None) -> RowHooks:
    """Loss and evaluation of pairs.

    Args:
        recipe: with its defaults.
        rows: to learn from.
        reference: not used.
    """
    objective = recipe.objective
    if isinstance(objective, CustomSpec):
        return pair_hooks(reward_scores(custom_loss(objective, REWARDS)), len(rows))
    return pair_hooks(
        reward_scores(partial(bradley_terry_loss, center=objective.center)), len(rows)
    )


def reward_scores(
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> ScorePairs:
    """Forward pass and loss of pairs.

    Args:
        loss: `[B]` rewards of chosen and of rejected completions, and margins -> `[B]` losses.
    """

    def score(scorer: nn.Module, documents: Sequence[Document]) -> PairScores:
        batch = pack_documents(documents)
        rewards: torch.Tensor = scorer(batch)
        chosen, rejected = split_roles(rewards, batch)
        margins = on_device(batch.margins.astype(np.float32), rewards.device)
        return PairScores(loss(chosen, rejected, margins), chosen, rejected, {})

    return score


def completion_rewards(scorer: nn.Module, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """`reward` of each single completion, read at its last trained token.

    Args:
        scorer: of a reward model.
        documents: rows of one completion each.
    """
    ended = [_end_at_completion(document) for document in documents]
    return {"reward": scorer(pack_documents(ended))}


def _end_at_completion(document: Document) -> Document:
    """The document without what a template writes after its completion."""
    branch = document.branches[0]
    end = int(np.flatnonzero(branch.trained)[-1]) + 1
    cut = replace(branch, ids=branch.ids[:end], trained=branch.trained[:end])
    return replace(document, branches=(cut,))


def _measure_statistics(run: Run, rows: Rows) -> RewardStatistics:
    """Rewards of the held-out pairs, or of some training pairs, after the last step."""
    measured = rows.held_out
    if measured is None:
        measured = rows.train.subset(np.arange(min(MEASURED_PAIRS, len(rows.train))))
    values = run.hooks.evaluate(
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


REWARD = SupervisedStage(reward_hooks, PAIR_METRICS, REWARDS, _measure_statistics)
