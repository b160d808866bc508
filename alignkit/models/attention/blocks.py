"""Packed rows in blocks: which queries see which keys, and where their rows are.

A block is some queries of one segment with only the keys that they see. Its rows are filled up to a
multiple of `ROUNDING`; blocks of one shape form a group that one batched product computes, so that
many short segments cost few calls.

Shapes: `T` tokens, `H` query heads, `K` key heads, `G = H / K`; `R` rows of a block's tokens with
fillers, `n = G * R` query rows of one key head, `m` keys, `B` blocks of a group.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from alignkit.packed import Segment, Segments

ROUNDING = 32
"""Rows of a segment are filled up to a multiple of it: the kernels are generated and kept for each
length, at several megabytes apiece. Divides `BLOCK`."""

BLOCK = 192
"""Queries of a block; measured on two cores: no difference from 128 to 512."""

TOGETHER = 1 << 21
"""Weights `B K n m` of the blocks in one product, unless a single block has more."""


@dataclass(frozen=True)
class Block:
    """Queries of one segment and the keys they see.

    Args:
        prefix: tokens of the prefix that are among the keys.
        own: the segment's own tokens that are.
        first: index of the first of these among the keys.
        whole: the segment has no other block.
        mask: `[n, m]`, 0 where a key is seen and -inf elsewhere; `n = G * R` query rows of one key
            head and `m` keys, fillers included.
        edge: `[n, w]`, the same for the last `w` keys; all others are seen.
        queries: `[Kn]` rows of a `[T * H, ...]` tensor.
        empty: `[Kn]` True where a query row is a filler.
        keys: `[Km]` rows of a `[T * K, ...]` tensor.
    """

    prefix: slice
    own: slice
    first: int
    whole: bool
    mask: torch.Tensor
    edge: torch.Tensor
    queries: torch.Tensor
    empty: torch.Tensor
    keys: torch.Tensor

    @property
    def kind(self) -> tuple[int | bool, ...]:
        """Blocks of equal kind are computed together."""
        return *self.mask.shape, self.edge.shape[1], self.whole, self.prefix.start, self.prefix.stop


@dataclass(frozen=True)
class Group:
    """`B` blocks of one kind.

    Args:
        own: of each block, the segment's own tokens among its keys, and the index of the first.
        prefix: tokens of the prefix that are among the keys of each.
        whole: each is a segment.
        mask: `[B, 1, n, m]` of the blocks.
        edge: `[B, 1, n, w]` of the blocks.
    """

    own: tuple[tuple[slice, int], ...]
    prefix: slice
    whole: bool
    mask: torch.Tensor
    edge: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """Where the rows of all blocks come from. A row is one head of one token.

    Args:
        groups: of all blocks.
        queries: `[ΣBKn]` rows of a `[T * H, ...]` tensor: of each group `[B, K, n]`, together.
        fillers: entries of `queries` that hold no token.
        homes: `[T * H]` entry of `queries` that holds a row, the inverse of `queries`.
        keys: `[ΣBKm]` rows of a `[T * K, ...]` tensor: of each group `[B, K, m]`.
        key_homes: `[K * T]` each token's entry, as one of its segment's own, in the joined `keys`
            of whole groups; one past the end if the segment has several blocks.
    """

    groups: tuple[Group, ...]
    queries: torch.Tensor
    fillers: torch.Tensor
    homes: torch.Tensor
    keys: torch.Tensor
    key_homes: torch.Tensor

    def split_queries(self, x: torch.Tensor, heads: int) -> list[torch.Tensor]:
        """Rows of all groups `[ΣBKn, ...]` -> those of each group, `[B, K, n, ...]`."""
        return self._split(x, heads, -2)

    def split_keys(self, x: torch.Tensor, heads: int) -> list[torch.Tensor]:
        """Rows of all groups `[ΣBKm, ...]` -> those of each group, `[B, K, m, ...]`."""
        return self._split(x, heads, -1)

    def _split(self, x: torch.Tensor, heads: int, axis: int) -> list[torch.Tensor]:
        shapes = [(len(group.own), heads, group.mask.shape[axis]) for group in self.groups]
        parts = x.split([math.prod(shape) for shape in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


@functools.lru_cache(maxsize=4)
def layout(
    segments: Segments,
    sliding_window: int | None,
    query_heads: int,
    key_heads: int,
    dtype: torch.dtype,
) -> Layout:
    """Blocks of a packed row. The same in every layer, so those of the last batches are kept.

    Args:
        segments: cover `0..T-1` in order.
        sliding_window: tokens that a token sees, itself included; None is all before it.
        query_heads: `H`.
        key_heads: `K`.
        dtype: of the masks.

    Returns:
        Its blocks, those of one shape together.
    """
    about = (sliding_window, query_heads, key_heads, dtype)
    alike: dict[tuple[int | bool, ...], list[Block]] = {}
    for segment in segments:
        for first in range(0, segment.length, BLOCK):
            block = _block(segment, first, *about)
            alike.setdefault(block.kind, []).append(block)
    groups, ordered = [], []
    for (rows, columns, *_), blocks in alike.items():
        count = max(1, TOGETHER // (key_heads * rows * columns))
        for start in range(0, len(blocks), count):
            part = blocks[start : start + count]
            ordered += part
            masks, edges = _stack([b.mask for b in part]), _stack([b.edge for b in part])
            own = tuple((block.own, block.first) for block in part)
            groups.append(Group(own, part[0].prefix, part[0].whole, masks, edges))
    picked, empty = torch.cat([b.queries for b in ordered]), torch.cat([b.empty for b in ordered])
    held = (~empty).nonzero()[:, 0]
    homes = torch.empty(len(held), dtype=torch.int64)
    homes[picked[held]] = held
    tokens = sum(segment.length for segment in segments)
    return Layout(
        groups=tuple(groups),
        queries=picked,
        fillers=empty.nonzero()[:, 0],
        homes=homes,
        keys=torch.cat([b.keys for b in ordered]),
        key_homes=_key_homes([block for block in ordered if block.whole], key_heads, tokens),
    )


def _stack(masks: list[torch.Tensor]) -> torch.Tensor:
    """`[B, 1, n, m]`; the mask of a single long block is not copied."""
    return masks[0][None, None] if len(masks) == 1 else torch.stack(masks)[:, None]


def _key_homes(blocks: list[Block], heads: int, tokens: int) -> torch.Tensor:
    """`[K * T]` of `Layout`, for its whole blocks."""
    homes = torch.full((heads, tokens), sum(len(block.keys) for block in blocks))
    start = 0
    for block in blocks:
        own = block.first + torch.arange(block.own.stop - block.own.start)
        columns = block.mask.shape[1]
        homes[:, block.own] = start + torch.arange(heads)[:, None] * columns + own
        start += len(block.keys)
    return homes.flatten()


def _filled(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens padded with repetitions of the last one, and where the padding is."""
    steps = torch.arange(len(tokens) + -len(tokens) % ROUNDING)
    return tokens[steps.clamp(max=len(tokens) - 1)], steps >= len(tokens)


def _block(
    segment: Segment,
    first: int,
    sliding_window: int | None,
    query_heads: int,
    key_heads: int,
    dtype: torch.dtype,
) -> Block:
    """The block of a segment's queries from `first` on."""
    groups, by_head = query_heads // key_heads, torch.arange(key_heads)[:, None]
    count = min(BLOCK, segment.length - first)
    prefix = segment.prefix_length
    oldest = 0 if sliding_window is None else max(0, prefix + first - sliding_window + 1)
    before = slice(segment.prefix_start + min(oldest, prefix), segment.prefix_start + prefix)
    own = slice(segment.start + max(0, oldest - prefix), segment.start + first + count)
    # Fillers come after all keys, so that short prefixes need none of their own.
    parts = ((before, -segment.prefix_start), (own, prefix - segment.start))
    tokens, filler = _filled(torch.cat([torch.arange(x.start, x.stop) for x, _ in parts]))
    nowhere = torch.full((int(filler.sum()),), torch.iinfo(torch.int64).max)
    where = torch.cat([*(torch.arange(x.start, x.stop) + shift for x, shift in parts), nowhere])
    asking = torch.arange(prefix + first, prefix + first + count + -count % ROUNDING)[:, None]
    seen = where <= asking
    if sliding_window is not None:
        seen &= asking - where < sliding_window
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    mask = mask.repeat_interleave(groups, 0)
    cut = sliding_window is not None and prefix + first + count > sliding_window
    # What all queries of the block see: the keys before its first one.
    far = 0 if cut else len(where) - len(nowhere) - count
    asked, empty = _filled(torch.arange(segment.start + first, segment.start + first + count))
    rows = (asked[:, None] * query_heads + torch.arange(groups)).flatten()
    return Block(
        prefix=before,
        own=own,
        first=before.stop - before.start,
        whole=segment.length <= BLOCK,
        mask=mask,
        edge=mask[:, far:].contiguous(),
        queries=(rows + by_head * groups).flatten(),
        empty=empty.repeat_interleave(groups).repeat(key_heads),
        keys=(tokens * key_heads + by_head).flatten(),
    )
