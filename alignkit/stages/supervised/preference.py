"""DPO and its relatives: how pairs move a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents
from alignkit.evaluation.pairs import PairScores
from alignkit.models.scoring.scorer import sum_by_sequence
from alignkit.objectives.preference import (
    PREFERENCE_OBJECTIVES,
    Objective,
    PairLogprobs,
    ratio_rewards,
    sum_rewards,
)
from alignkit.recipe.objectives import CustomPairSpec
from alignkit.recipe.stages.dpo import DpoRecipe
from alignkit.stages.running.hooks import RowHooks
from alignkit.stages.supervised.custom import PAIRS, custom_loss
from alignkit.stages.supervised.pairs import PAIR_METRICS, ScorePairs, pair_hooks, split_roles
from alignkit.stages.supervised.reference import Reference
from alignkit.stages.supervised.stage import SupervisedStage


def preference_hooks(
    recipe: DpoRecipe, rows: TokenDataset, reference: Reference | None
) -> RowHooks:
    """Loss and evaluation of pairs.

    Args:
        recipe: with its defaults.
        rows: to learn from.
        reference: log-probs to compare with; None for objectives without one.
    """
    spec = recipe.objective
    if isinstance(spec, CustomPairSpec):
        objective = Objective(
            custom_loss(spec, PAIRS), ratio_rewards if spec.reference else sum_rewards
        )
        loss = objective.loss
    else:
        objective = PREFERENCE_OBJECTIVES[spec.kind]
        loss = partial(objective.loss, **spec.model_dump(exclude={"kind"}))

    def rewards(pairs: PairLogprobs) -> tuple[torch.Tensor, torch.Tensor]:
        return objective.rewards(pairs, spec.scale)

    return pair_hooks(preference_scores(loss, rewards, reference), len(rows))


def preference_scores(
    loss: Callable[[PairLogprobs], torch.Tensor],
    rewards: Callable[[PairLogprobs], tuple[torch.Tensor, torch.Tensor]],
    reference: Reference | None,
) -> ScorePairs:
    """Forward pass and objective of pairs.

    Args:
        loss: log-probs of `B` pairs -> `[B]` losses.
        rewards: the same -> `[B]` implicit rewards of chosen and of rejected completions.
        reference: log-probs to compare with; None for objectives without one.

    Returns:
        A function from scorer and pairs to their losses, implicit rewards and `logps/chosen` and
        `logps/rejected`, the log-probs of whole completions.
    """

    def score(scorer: nn.Module, documents: Sequence[Document]) -> PairScores:
        batch = pack_documents(documents)
        known = split_roles(reference(scorer, batch), batch) if reference is not None else ()
        scores: Any = scorer(batch)
        chosen, rejected = split_roles(sum_by_sequence(scores.logprobs, batch), batch)
        ones = torch.ones_like(scores.logprobs)
        pairs = PairLogprobs(
            chosen, rejected, *split_roles(sum_by_sequence(ones, batch), batch), *known
        )
        metrics = {"logps/chosen": chosen, "logps/rejected": rejected}
        return PairScores(loss(pairs), *rewards(pairs), metrics)

    return score


LOGP_METRICS = {
    "logps/chosen": "mean log-prob of a whole chosen completion, in nats",
    "logps/rejected": "mean log-prob of a whole rejected completion, in nats",
}

DPO = SupervisedStage(preference_hooks, {**PAIR_METRICS, **LOGP_METRICS}, PAIRS)
