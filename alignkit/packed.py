"""PackedBatch: the one type that crosses rooms. Data makes it, models read it, stages pass it on.

The tokens of many documents form one row without padding. A *document* is a prompt followed by
one or more *branches* (completions); a branch sees the prompt and itself, never a sibling. A
*sequence* is one branch together with its prompt; a *target* says which hidden state predicts
which token of which sequence.

Shapes: `T` tokens in the row, `K` attention segments, `N` targets, `S` sequences, `D` documents.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Role(enum.IntEnum):
    """The part that a branch plays in its objective."""

    CHOSEN = 0
    """The better completion of a pair, or one labelled as desirable."""
    REJECTED = 1
    """The worse completion of a pair, or one labelled as undesirable."""
    MISMATCHED = 2
    """A completion of another prompt, for KTO's baseline."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens that sees itself causally and all of one earlier run, its prefix.

    Args:
        start: first token of the run in the packed row.
        length: tokens in the run, at least 1.
        prefix_start: first token of the prefix; unused if `prefix_length` is 0.
        prefix_length: tokens of the prefix; 0 for a run that sees only itself.
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


Segments = tuple[Segment, ...]
"""Runs that cover a packed row in order, without gap or overlap."""


@dataclass(frozen=True)
class PackedBatch:
    """The documents of one forward pass.

    Args:
        input_ids: `[T]` token ids.
        position_ids: `[T]` position of each token within its own sequence; branches of one
            document all continue from the end of its prompt.
        segments: `K` attention runs that cover the row in order, without gap or overlap.
        target_rows: `[N]` index in `0..T-1` of the hidden state that predicts the target.
        target_ids: `[N]` the predicted token id.
        target_sequences: `[N]` index in `0..S-1` of the sequence the target belongs to.
        sequence_ends: `[S]` index of the last token of each sequence.
        sequence_documents: `[S]` index of the document each sequence belongs to.
        sequence_roles: `[S]` the `Role` of each sequence.
        sequence_references: `[S]` float64, log-prob of each sequence's targets under the reference
            model if it is known beforehand, else NaN.
        margins: `[D]` float64, how much better the chosen completion is; 0 if the data do not say.
        rows: data row of each document, for messages to the user.
    """

    input_ids: IntArray
    position_ids: IntArray
    segments: tuple[Segment, ...]
    target_rows: IntArray
    target_ids: IntArray
    target_sequences: IntArray
    sequence_ends: IntArray
    sequence_documents: IntArray
    sequence_roles: IntArray
    sequence_references: npt.NDArray[np.float64]
    margins: npt.NDArray[np.float64]
    rows: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens the model reads: `T`."""
        return len(self.input_ids)

    @property
    def num_sequences(self) -> int:
        """Branches in the batch: `S`."""
        return len(self.sequence_ends)
