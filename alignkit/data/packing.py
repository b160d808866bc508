"""Documents -> PackedBatch under a token budget, and the order in which documents come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alignkit.data.documents import Branch, Document, common_start
from alignkit.packed import IntArray, PackedBatch, Segment

MIN_COMMON = 16
"""First tokens that prompts must share before a longer shared start is looked for."""

MIN_SAVED = 1 / 8
"""Share of their documents' tokens that a shared start must save. Attention to a prefix needs a
mask, which costs a little; most shared starts save much more than this, or nothing."""

LOOKAHEAD = 1000
"""Steps that are searched for the largest one."""

NOTHING = slice(0, 0)
"""No prefix."""


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
    order = epoch_order(epoch, num_items, seed)
    return order[position * batch_size : (position + 1) * batch_size]


def epoch_order(epoch: int, num_items: int, seed: int) -> IntArray:
    """`[n]` all items in the order of one epoch.

    Args:
        epoch: from 0.
        num_items: items in the dataset, `n`.
        seed: of the run.
    """
    return np.random.default_rng([seed, 3, epoch]).permutation(num_items).astype(np.int64)


def largest_share(
    lengths: IntArray, batch_size: int, seed: int, processes: int, steps: int | None
) -> int:
    """Most tokens that one process reads in one of the first steps.

    Args:
        lengths: `[n]` tokens of each item.
        batch_size: items per step, over all processes.
        seed: of the run.
        processes: that share a step.
        steps: of the run, if it is known; none after the first epoch are looked at.
    """
    ordered = lengths[epoch_order(0, len(lengths), seed)]
    end = min(LOOKAHEAD, steps or LOOKAHEAD) * batch_size
    starts = range(0, min(len(ordered), end), batch_size)
    shares = (
        ordered[start : start + batch_size][rank::processes]
        for start in starts
        for rank in range(processes)
    )
    return max(int(share.sum()) for share in shares)


def split_documents(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Documents of each micro-batch: first-fit decreasing under a token budget.

    Args:
        lengths: tokens of each document.
        max_tokens: tokens of one micro-batch; a longer document gets one of its own.

    Returns:
        Groups of indices, every index in exactly one of them, the longest first within a group.
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
            room.append(max_tokens - lengths[index])
    return groups


def common_starts(documents: Sequence[Document]) -> list[tuple[list[int], int]]:
    """Prompts that begin alike, where computing their start once is worth a prefix.

    Args:
        documents: of one packed row.

    Returns:
        Indices of documents and how many first tokens of their prompts are the same; no document
        twice. Only documents with one branch: several branches have their prompt as prefix.
        An adapter's dropout is drawn once for what is shared.
    """
    alike: dict[bytes, list[int]] = {}
    for index, document in enumerate(documents):
        if len(document.branches) == 1 and len(document.prompt) >= MIN_COMMON:
            alike.setdefault(document.prompt[:MIN_COMMON].tobytes(), []).append(index)
    shared = []
    for members in alike.values():
        length = common_start([documents[index].prompt for index in members])
        tokens = sum(documents[index].num_tokens for index in members)
        if length * (len(members) - 1) >= MIN_SAVED * tokens:
            shared.append((members, length))
    return shared


def pack_documents(documents: Sequence[Document]) -> PackedBatch:
    """One packed row.

    Args:
        documents: at least one, with at least one token each.

    Returns:
        The documents side by side, after the starts that some of their prompts share. Several
        branches follow their prompt and have it as prefix. A document with one branch is one
        causal run; its prefix is the shared start of its prompt, if it has one.
    """
    row = _Row()
    starts = {
        index: prefix
        for members, length in common_starts(documents)
        for prefix in [row.add(documents[members[0]].prompt[:length])]
        for index in members
    }
    sequences: list[_Sequence] = []
    for number, document in enumerate(documents):
        prefix = starts.get(number, NOTHING)
        if len(document.branches) > 1 and len(document.prompt):
            prefix = row.add(document.prompt)
        rest = document.prompt[_length(prefix) :]
        for branch in document.branches:
            own = row.add(np.concatenate([rest, branch.ids]), prefix)
            start = own.stop - len(branch.ids)
            sequences.append(_Sequence(branch, number, prefix, own.start, start))
    branches = [sequence.branch for sequence in sequences]
    return PackedBatch(
        input_ids=np.concatenate(row.ids).astype(np.int64),
        position_ids=np.concatenate(row.positions).astype(np.int64),
        segments=tuple(row.segments),
        target_rows=np.concatenate([s.predictors() for s in sequences]).astype(np.int64),
        target_ids=np.concatenate([b.ids[b.trained] for b in branches]).astype(np.int64),
        target_sequences=np.repeat(np.arange(len(branches)), [b.trained.sum() for b in branches]),
        sequence_ends=np.asarray([sequence.stop - 1 for sequence in sequences], np.int64),
        sequence_documents=np.asarray([sequence.document for sequence in sequences], np.int64),
        sequence_roles=np.asarray([branch.role for branch in branches], np.int64),
        sequence_references=np.asarray([branch.reference for branch in branches], np.float64),
        margins=np.asarray([document.margin for document in documents], np.float64),
        rows=tuple(document.row for document in documents),
    )


@dataclass
class _Row:
    """A row that grows by runs of tokens.

    Args:
        ids: of each run.
        positions: of each run.
        segments: the runs.
        length: tokens so far.
    """

    ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    positions: list[IntArray] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    length: int = 0

    def add(self, ids: npt.NDArray[np.int32], prefix: slice = NOTHING) -> slice:
        """Append a run after a prefix that the row holds, and return where it is."""
        seen = _length(prefix)
        self.ids.append(ids)
        self.positions.append(seen + np.arange(len(ids)))
        self.segments.append(Segment(self.length, len(ids), prefix.start, seen))
        self.length += len(ids)
        return slice(self.length - len(ids), self.length)


@dataclass(frozen=True)
class _Sequence:
    """Where one branch is in the row.

    Args:
        branch: the branch.
        document: index of its document.
        prefix: earlier tokens that its run sees.
        first: first token of its run, which begins with the part of the prompt outside the prefix.
        start: first token of the branch.
    """

    branch: Branch
    document: int
    prefix: slice
    first: int
    start: int

    @property
    def stop(self) -> int:
        """One after its last token."""
        return self.start + len(self.branch.ids)

    def predictors(self) -> IntArray:
        """Row of the state that predicts each target: the token before it in reading order."""
        rows = self.start + np.flatnonzero(self.branch.trained) - 1
        if self.start == self.first and self.prefix.stop:
            rows[rows < self.first] = self.prefix.stop - 1
        return rows


def _length(prefix: slice) -> int:
    return int(prefix.stop - prefix.start)
