"""One value for each held-out document, whichever process computed it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from alignkit.data.documents import Document
from alignkit.data.packing import split_documents
from alignkit.models.scoring.scorer import evaluating
from alignkit.runtime.processes import SINGLE, ProcessGroup

MAX_TOKENS = 2048
"""Tokens of one pass without gradients, if no plan sets them. Fixed, so that stored numbers do not
depend on a run's micro-batches."""

_BLOCK = 512
"""Documents that are packed together."""

Columns = dict[str, npt.NDArray[np.float64]]


def score_documents(
    score: Callable[[nn.Module, Sequence[Document]], dict[str, torch.Tensor]],
    scorer: nn.Module,
    documents: Sequence[Document],
    max_tokens: int,
    processes: ProcessGroup = SINGLE,
) -> Columns:
    """Score every document without gradients.

    Args:
        score: forward pass of a few documents -> name -> one value for each of them.
        scorer: its training mode is restored afterwards.
        documents: `n` rows, at least one.
        max_tokens: tokens of one forward pass.
        processes: this one, and how to sum over all.

    Returns:
        Name -> `[n]` values, the same on every process.
    """
    mine = list(range(processes.rank, len(documents), processes.world))
    scored = mine or [0]  # a process without documents must still take part in every sum
    columns: dict[str, torch.Tensor] = {}
    with evaluating(scorer):
        for items in _groups(scored, documents, max_tokens):
            for name, values in score(scorer, [documents[item] for item in items]).items():
                column = columns.setdefault(name, torch.zeros(len(documents), dtype=torch.float64))
                if mine:
                    column[items] = values.detach().cpu().double()
    return {name: processes.reduce(columns[name]).cpu().numpy() for name in sorted(columns)}


def _groups(
    items: Sequence[int], documents: Sequence[Document], max_tokens: int
) -> Iterator[list[int]]:
    """Items of each forward pass; searched block by block, so that many rows stay cheap."""
    for start in range(0, len(items), _BLOCK):
        block = items[start : start + _BLOCK]
        lengths = [documents[item].num_tokens for item in block]
        for group in split_documents(lengths, max_tokens):
            yield [block[position] for position in group]
