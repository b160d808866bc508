"""Matrix products with frozen weights at the rate that the machine has.

For some heights of a bfloat16 product torch's library on processors (oneDNN 3) keeps to one core:
768 rows onto 576 columns ran at half the rate of 512 rows. Such products are computed in blocks of
rows; every entry is the same sum.
"""

from __future__ import annotations

import torch

ROWS = 512
"""Rows of a block; from 384 on every measured product used both cores."""

NARROW = range(257, 1025)
"""Columns of a result for which heights between `ROWS` and `TALL` were slow: 576 and 896 were, 192,
1,536 and 4,864 were not."""

TALL = 1536
"""From here on the library used all cores."""

FEW_CORES = 4
"""More have not been measured: the library decides alone."""


def add_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`total + x @ weight`, in place.

    Args:
        total: `[T, O]`.
        x: `[T, I]`.
        weight: `[I, O]`, of the dtype of `x`.

    Returns:
        `total`.
    """
    for rows in row_blocks(total):
        total[rows].addmm_(x[rows], weight)
    return total


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight` in the blocks of `add_product`: the same bits as adding it to zeros.

    Args:
        x: `[T, I]`.
        weight: `[I, O]`, of the dtype of `x`.

    Returns:
        `[T, O]`.
    """
    blocks = row_blocks(x.new_empty(len(x), weight.shape[1]))
    if len(blocks) == 1:
        return torch.mm(x, weight)
    return torch.cat([torch.mm(x[rows], weight) for rows in blocks])


def row_blocks(total: torch.Tensor) -> list[slice]:
    """Rows of a result that are computed together.

    Args:
        total: `[T, O]`.

    Returns:
        Slices that cover `0..T-1` in order; one where blocks would not help.
    """
    height, width = total.shape
    narrow = total.device.type == "cpu" and total.dtype == torch.bfloat16 and width in NARROW
    if not (narrow and ROWS < height < TALL and 1 < torch.get_num_threads() <= FEW_CORES):
        return [slice(0, height)]
    count = -(-height // ROWS)
    step = -(-height // count)
    step += -step % 32
    return [slice(start, min(start + step, height)) for start in range(0, height, step)]
