"""Blocks of rows that stay in a CPU's cache, and the buffers that pass through them.

A chain of element-wise operations over a long row reads and writes the memory at each step. Here a
block of rows passes through the whole chain before the next one, in the same few buffers: fresh
ones would push the block out of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

ELEMENTS = 1 << 18
"""Numbers in a block: one megabyte of float32, half of a core's second-level cache."""


def row_blocks(x: torch.Tensor) -> Iterator[slice]:
    """Slices of `[N, ...]` that cover its rows in order, each of a size that stays in cache."""
    step = _rows(x)
    return (slice(start, min(start + step, len(x))) for start in range(0, len(x), step))


def buffers(x: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """`[count, n, ...]` room for what is computed from a block of `[N, ...]`, at most n rows."""
    return x.new_empty(count, min(_rows(x), len(x)), *x.shape[1:], dtype=dtype)


def _rows(x: torch.Tensor) -> int:
    return max(1, ELEMENTS // max(1, x[:1].numel()))
