"""Documents -> PackedBatch under a token budget, and the order in which documents come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignkit.data.documents import Document
from alignkit.packed import IntArray, PackedBatch, Segment


def step_items(step: int, num_items: int, batch_size: int, seed: int) -> IntArray:
    """Items of one optimizer step.

    The order is a permutation from (seed, epoch), so it does not depend on micro-batches,
    processes or interruptions. The last batch of an epoch is short rather than padded.

    Args:
        step: optimizer step, from 0.
        num_items: items in the dataset, `n`.
        batch_size: items per step.
        seed: of the run.

    Returns:
        Between 1 and `batch_size` indices in `0..n-1`.
    """
    steps_per_epoch = -(-num_items // batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    permutation = np.random.default_rng([seed, 3, epoch]).permutation(num_items)
    return permutation[position * batch_size : (position + 1) * batch_size].astype(np.int64)


def split_documents(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Documents of each micro-batch: first-fit decreasing under a token budget.

    Args:
        lengths: tokens of each document.
        budget: tokens of one micro-batch; a longer document stands alone.

    Returns:
        Groups of indices; every index in exactly one of them. Within a group the longest first.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for group, free in enumerate(room):
            if lengths[index] <= free:
                groups[group].append(index)
                room[group] -= lengths[index]
                break
        else:
            groups.append([index])
            room.append(budget - lengths[index])
    return groups


def pack_documents(documents: Sequence[Document]) -> PackedBatch:
    """One packed row.

    Args:
        documents: at least one, with at least one token each.

    Returns:
        The documents side by side, branches after their prompt. A document with one branch is one
        causal segment; several branches are a prompt segment and one segment per branch with the
        prompt as prefix.
    """
    ids, positions, segments = [], [], []
    rows, targets, sequences = [], [], []
    ends: list[int] = []
    owners: list[int] = []
    branches = [branch for document in documents for branch in document.branches]
    start = 0
    for number, document in enumerate(documents):
        prompt = len(document.prompt)
        ids.append(document.prompt)
        positions.append(np.arange(prompt))
        branch_start = start + prompt
        shared = len(document.branches) > 1 and prompt > 0
        if shared:
            segments.append(Segment(start, prompt))
        for branch in document.branches:
            length = len(branch.ids)
            if shared:
                segments.append(Segment(branch_start, length, start, prompt))
            elif len(document.branches) == 1:
                segments.append(Segment(start, prompt + length))
            else:
                segments.append(Segment(branch_start, length))
            trained = np.flatnonzero(branch.trained)
            predictors = branch_start + trained - 1
            if prompt:
                predictors[trained == 0] = start + prompt - 1
            rows.append(predictors)
            targets.append(branch.ids[trained])
            sequences.append(np.full(len(trained), len(ends)))
            ids.append(branch.ids)
            positions.append(prompt + np.arange(length))
            branch_start += length
            ends.append(branch_start - 1)
            owners.append(number)
        start = branch_start
    return PackedBatch(
        input_ids=np.concatenate(ids).astype(np.int64),
        position_ids=np.concatenate(positions).astype(np.int64),
        segments=tuple(segments),
        target_rows=np.concatenate(rows).astype(np.int64),
        target_ids=np.concatenate(targets).astype(np.int64),
        target_sequences=np.concatenate(sequences).astype(np.int64),
        sequence_ends=np.asarray(ends, np.int64),
        sequence_documents=np.asarray(owners, np.int64),
        sequence_roles=np.asarray([branch.role for branch in branches], np.int64),
        sequence_references=np.asarray([branch.reference for branch in branches], np.float64),
        margins=np.asarray([document.margin for document in documents], np.float64),
        rows=tuple(document.row for document in documents),
    )
