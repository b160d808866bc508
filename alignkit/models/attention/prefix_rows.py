"""Packed rows with a trained prefix: the same keys and values before every document.

Each document gets as many rows in front as the prefix has, which hold its keys and values; a
branch's prompt is then longer by that much. Attention treats them like any other packed rows,
sliding windows included. The queries of the new rows are zeros whose output is dropped.

Shapes: `T` tokens, `P` rows of the prefix, `R` documents, `N` heads, `D` head dimension.
"""

from __future__ import annotations

import functools
from itertools import chain

import torch

from alignkit.packed import Segment, Segments


@functools.lru_cache(maxsize=4)
def longer_segments(segments: Segments, rows: int) -> Segments:
    """The segments with `rows` more before each document.

    Args:
        segments: cover `0..T-1` in order. One without a prefix of its own starts a document.
        rows: `P`, at least 1.

    Returns:
        Segments that cover `0..T+RP-1` in order. The same in every layer, so the last are kept.
    """
    longer: list[Segment] = []
    starts: dict[int, int] = {}
    end = 0
    for segment in segments:
        starts[segment.start] = end
        if segment.prefix_length:
            before = starts[segment.prefix_start], rows + segment.prefix_length
            longer.append(Segment(end, segment.length, *before))
        else:
            longer.append(Segment(end, rows + segment.length))
        end += longer[-1].length
    return tuple(longer)


def put_before(
    x: torch.Tensor, prefix: torch.Tensor | None, segments: Segments, rows: int
) -> torch.Tensor:
    """Queries, keys or values with those of the prefix before each document.

    Args:
        x: `[1, N, T, D]`.
        prefix: `[N, P, D]`; None puts zeros there.
        segments: of the `T` tokens.
        rows: `P`.

    Returns:
        `[1, N, T + RP, D]`, in memory token by token as the model's projections write it.
    """
    tokens = x[0].transpose(0, 1)
    own = tokens.split([segment.length for segment in segments])
    if prefix is None:
        first = tokens.new_zeros(rows, *tokens.shape[1:])
    else:
        first = prefix.transpose(0, 1).to(x.dtype)
    documents = sum(segment.prefix_length == 0 for segment in segments)
    # Backward this is one sum over all documents, rounded once.
    copies = iter(first.expand(documents, -1, -1, -1).unbind())
    parts = (
        (part,) if segment.prefix_length else (next(copies), part)
        for segment, part in zip(segments, own, strict=True)
    )
    return torch.cat([*chain.from_iterable(parts)]).transpose(0, 1)[None]


def drop_before(x: torch.Tensor, segments: Segments, rows: int) -> torch.Tensor:
    """The output of attention without the rows of the prefix.

    Args:
        x: `[1, T + RP, N, D]`.
        segments: of the `T` tokens.
        rows: `P`.

    Returns:
        `[1, T, N, D]`.
    """
    lengths = ((s.length,) if s.prefix_length else (rows, s.length) for s in segments)
    parts = iter(x.split([*chain.from_iterable(lengths)], dim=1))
    own = []
    for segment in segments:
        if not segment.prefix_length:
            next(parts)
        own.append(next(parts))
    return torch.cat(own, dim=1)
