"""Held-out loss, perplexity and token accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from alignkit.data.dataset import Document
from alignkit.data.packing import pack_documents, split_documents
from alignkit.objectives.cross_entropy import cross_entropy_loss


def evaluate_heldout(
    scorer: nn.Module,
    documents: Sequence[Document],
    budget: int,
    *,
    shard: tuple[int, int] = (0, 1),
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """Mean loss over all trained tokens of the documents.

    Args:
        scorer: scores packed batches; its training mode is put back afterwards.
        documents: held-out rows.
        budget: tokens of one forward pass.
        shard: `(rank, processes)`; each process takes its share.
        reduce: sums a tensor over the processes.

    Returns:
        `loss` in nats per token, `perplexity` = exp(loss), `accuracy` = share of tokens that are
        the likeliest, `tokens` counted.
    """
    rank, world = shard
    mine = [documents[i] for i in range(rank, len(documents), world)]
    sums = torch.zeros(3, dtype=torch.float64)
    was_training = scorer.training
    scorer.eval()
    with torch.no_grad():
        for group in split_documents([document.num_tokens for document in mine], budget):
            scores: Any = scorer(pack_documents([mine[i] for i in group]))
            losses = cross_entropy_loss(scores.logprobs).double().sum().cpu()
            counts = [losses, scores.correct.sum().cpu(), len(scores.logprobs)]
            sums += torch.tensor([float(count) for count in counts], dtype=torch.float64)
    scorer.train(was_training)
    total, correct, tokens = (float(value) for value in reduce(sums))
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": correct / tokens,
        "tokens": int(tokens),
    }
