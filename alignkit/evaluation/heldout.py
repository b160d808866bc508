"""Held-out loss, perplexity and token accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents
from alignkit.evaluation.columns import score_documents
from alignkit.models.scoring.scorer import sum_by_sequence
from alignkit.objectives.cross_entropy import cross_entropy_loss
from alignkit.runtime.processes import SINGLE, ProcessGroup


def evaluate_heldout(
    scorer: nn.Module,
    documents: Sequence[Document],
    max_tokens: int,
    processes: ProcessGroup = SINGLE,
) -> dict[str, float]:
    """Mean loss over all trained tokens of the documents.

    Args:
        scorer: scores packed batches; its training mode is restored afterwards.
        documents: held-out rows of one completion each.
        max_tokens: tokens of one forward pass.
        processes: this one, and how to sum over all.

    Returns:
        `loss` in nats per token, `perplexity` = exp(loss), `accuracy` = share of tokens that are
        the likeliest ones, `tokens` counted.
    """
    columns = score_documents(_score, scorer, documents, max_tokens, processes)
    tokens = float(columns["tokens"].sum())
    loss = float(columns["loss"].sum()) / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": float(columns["correct"].sum()) / tokens,
        "tokens": int(tokens),
    }


def _score(scorer: nn.Module, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    batch = pack_documents(documents)
    scores: Any = scorer(batch)
    losses = cross_entropy_loss(scores.logprobs)
    return {
        "loss": sum_by_sequence(losses, batch),
        "correct": sum_by_sequence(scores.correct, batch),
        "tokens": sum_by_sequence(torch.ones_like(losses), batch),
    }


def say_heldout(values: dict[str, float]) -> str:
    """Held-out values of completions in one line."""
    return (
        f"loss {values['loss']:.4f}  perplexity {values['perplexity']:.2f}  "
        f"token accuracy {values['accuracy']:.1%}"
    )
