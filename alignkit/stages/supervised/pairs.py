"""Stages on preference pairs: how scored pairs become a loss and an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from alignkit.data.documents import Document
from alignkit.evaluation.columns import score_documents
from alignkit.evaluation.pairs import PairScores, describe_pairs, say_pairs
from alignkit.models.kernels.copies import on_device
from alignkit.packed import PackedBatch, Role
from alignkit.runtime.processes import ProcessGroup
from alignkit.stages.running.hooks import LossSums, RowHooks, StepSums

ScorePairs = Callable[[nn.Module, Sequence[Document]], PairScores]
"""Forward pass and objective of a few pairs."""

PAIR_METRICS = {
    "rewards/chosen": "mean reward of chosen completions",
    "rewards/rejected": "mean reward of rejected completions",
    "rewards/margins": "their mean difference",
    "rewards/accuracies": "share of pairs with the chosen completion ahead; ties count half",
}
"""What the metrics of pairs mean; with a language model the rewards are implicit."""


def pair_hooks(score: ScorePairs, num_items: int) -> RowHooks:
    """Hooks of a stage whose loss is the mean over the pairs of an optimizer step.

    Args:
        score: forward pass and objective.
        num_items: training pairs.
    """

    def loss(scorer: nn.Module, documents: Sequence[Document], measured: StepSums) -> LossSums:
        scores = score(scorer, documents)
        return LossSums(scores.losses.sum(), scores.sums())

    def evaluate(
        scorer: nn.Module, documents: Sequence[Document], max_tokens: int, processes: ProcessGroup
    ) -> dict[str, float]:
        def columns(scorer: nn.Module, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
            return score(scorer, documents).columns()

        return describe_pairs(score_documents(columns, scorer, documents, max_tokens, processes))

    return RowHooks(loss, [1] * num_items, evaluate, say_pairs)


def split_roles(values: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """`[S]` values of all sequences -> `[B]` of the chosen and `[B]` of the rejected ones."""
    chosen, rejected = (
        on_device(np.flatnonzero(batch.sequence_roles == role), values.device)
        for role in (Role.CHOSEN, Role.REJECTED)
    )
    return values.index_select(0, chosen), values.index_select(0, rejected)
