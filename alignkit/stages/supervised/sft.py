"""Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents
from alignkit.evaluation.heldout import evaluate_heldout, say_heldout
from alignkit.objectives.cross_entropy import cross_entropy_loss
from alignkit.recipe.objectives import CustomSpec
from alignkit.recipe.stages.sft import SftRecipe
from alignkit.stages.running.hooks import LossSums, RowHooks, StepSums
from alignkit.stages.supervised.custom import TOKENS, custom_loss
from alignkit.stages.supervised.reference import Reference
from alignkit.stages.supervised.stage import SupervisedStage


def sft_hooks(recipe: SftRecipe, rows: TokenDataset, reference: Reference | None) -> RowHooks:
    """Loss and evaluation; the weight of a row is its number of trained tokens.

    Args:
        recipe: with its defaults.
        rows: to learn from.
        reference: not used.
    """
    objective = recipe.objective
    losses = (
        custom_loss(objective, TOKENS) if isinstance(objective, CustomSpec) else cross_entropy_loss
    )
    return RowHooks(token_loss(losses), rows.num_trained.tolist(), evaluate_heldout, say_heldout)


def token_loss(
    losses: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[nn.Module, Sequence[Document], StepSums], LossSums]:
    """The loss of a micro-batch, from that of its trained tokens.

    Args:
        losses: `[N]` log-probs -> `[N]` losses.

    Returns:
        A function that returns the sum over the trained tokens, and `accuracy`: how many of them
        were the likeliest token.
    """

    def loss(scorer: nn.Module, documents: Sequence[Document], measured: StepSums) -> LossSums:
        scores: Any = scorer(pack_documents(documents))
        return LossSums(losses(scores.logprobs).sum(), {"accuracy": scores.correct.sum()})

    return loss


SFT = SupervisedStage(
    sft_hooks,
    {"accuracy": "share of the trained tokens that were the likeliest token"},
    TOKENS,
)
