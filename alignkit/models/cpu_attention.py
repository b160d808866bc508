"""Packed attention on a processor: blocks of queries, and only the keys that a block sees.

The result of `attention.packed_attention` in one autograd function. Forward, torch's flash kernel
takes each block with the query heads that share a key head as rows of one product. Backward, that
kernel reaches a sixth of the machine's matrix rate, so the gradients are five matrix products:

    P = exp(s · Q Kᵀ - L),  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - δ),  dQ = s · dS K,  dK = s · dSᵀ Q

with L the log-sum-exp of a query's scores and δ = Σ_d dO ∘ O (Dao, FlashAttention-2,
arXiv:2307.08691). A bfloat16 product rounds its result, and a rounded score of 20 would move P by
6%. So L and δ travel inside the products, as extra columns of Q and dO that meet ones in K and V:
what is rounded is then log P itself, which moves P by P |log P| / 256 < 0.0015 at most. The parts
of a prompt's gradient that come from its branches are summed in float32 and rounded once.

Shapes: `T` tokens, `H` query heads, `K` key heads, `G = H / K`, `D` head dimension. Rows of a
segment are filled up to a multiple of `ROUNDING`; `R` counts rows with these fillers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.packed import Segment

ROUNDING = 32
"""Rows of a segment are filled up to a multiple of it: the kernels are generated and kept for each
length, at several megabytes apiece. Divides `BLOCK`."""

BLOCK = 192
"""Queries of a block; measured on two cores, flat from 128 to 512."""

EXTRA = 32
"""Columns beside the head dimension, of which four are used: the matrix unit takes 32 at once."""

FAR = 3e4
"""Taken from the products of filler keys: their weight is exp(-s · FAR) = 0."""

Segments = tuple[Segment, ...]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class _Block:
    """Queries of one segment and the keys they see.

    Args:
        queries: number of query rows of one key head, fillers included, `n = G * R`.
        keys: number of keys, fillers included, `m`.
        prefix: tokens of the prefix that are among the keys.
        own: the segment's own tokens that are.
        mask: `[n, m]`, 0 where a key is seen and -inf elsewhere.
        edge: `[n, w]`, the same of the last `w` keys; all others are seen or fillers.
    """

    queries: int
    keys: int
    prefix: slice
    own: slice
    mask: torch.Tensor
    edge: torch.Tensor


@dataclass(frozen=True)
class _Layout:
    """Where the rows of all blocks come from. A row is one head of one token.

    Args:
        blocks: in order.
        queries: `[ΣKn]` rows of a `[T * H, ...]` tensor: of each block `[K, n]`, together.
        fillers: those entries of `queries` that stand for no token.
        homes: `[T * H]` entry of `queries` that holds a row, the inverse of `queries`.
        keys: `[ΣKm]` rows of a `[T * K, ...]` tensor: of each block `[K, m]`.
        far: those entries of `keys` that stand for no token.
    """

    blocks: tuple[_Block, ...]
    queries: torch.Tensor
    fillers: torch.Tensor
    homes: torch.Tensor
    keys: torch.Tensor
    far: torch.Tensor

    def split_queries(self, x: torch.Tensor, heads: int) -> list[torch.Tensor]:
        """Rows of all blocks `[ΣKn, ...]` -> those of each block, `[K, n, ...]`."""
        parts = x.split([heads * block.queries for block in self.blocks])
        return [part.unflatten(0, (heads, -1)) for part in parts]

    def split_keys(self, x: torch.Tensor, heads: int) -> list[torch.Tensor]:
        """Rows of all blocks `[ΣKm, ...]` -> those of each block, `[K, m, ...]`."""
        parts = x.split([heads * block.keys for block in self.blocks])
        return [part.unflatten(0, (heads, -1)) for part in parts]


def cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention output of every segment; see `packed_attention`.

    Args:
        query: `[1, H, T, D]`.
        key: `[1, K, T, D]`.
        value: `[1, K, T, D]`.
        segments: cover `0..T-1` in order.
        scaling: factor on the scores; None is 1 / sqrt(D).
        sliding_window: tokens that a token sees, itself included; None is all before it.

    Returns:
        `[1, T, H, D]`.
    """
    if torch.is_autocast_enabled("cpu"):  # rotated queries and keys may come wider than values
        narrow = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(narrow) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    about = (segments, sliding_window, query.shape[1], key.shape[1], query.dtype)
    tokens = (x[0].transpose(0, 1) for x in (query, key, value))
    output: torch.Tensor = _CpuAttention.apply(*tokens, _layout(*about), scale)
    return output[None]


class _CpuAttention(torch.autograd.Function):
    """`[T, H, D]`, `[T, K, D]`, `[T, K, D]` -> `[T, H, D]`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: _Layout,
        scale: float,
    ) -> torch.Tensor:
        heads = key.shape[1]
        queries = layout.split_queries(_pick(query, layout.queries), heads)
        keys = layout.split_keys(_pick(key, layout.keys), heads)
        values = layout.split_keys(_pick(value, layout.keys), heads)
        outputs, sums = [], []
        for block, q, k, v in zip(layout.blocks, queries, keys, values, strict=True):
            found, total = _flash(q[None], k[None], v[None], attn_mask=block.mask, scale=scale)
            outputs.append(found[0].flatten(0, 1))
            sums.append(total.flatten())
        output = torch.cat(outputs).index_select(0, layout.homes).view(query.shape)
        normalizer = torch.cat(sums).index_select(0, layout.homes).view(query.shape[:2])
        ctx.save_for_backward(query, key, value, output, normalizer)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, output, normalizer = ctx.saved_tensors
        layout, scale, (heads, width) = ctx.layout, ctx.scale, key.shape[1:]
        wide = torch.promote_types(query.dtype, torch.float32)
        delta = torch.linalg.vecdot(grad.to(wide), output.to(wide))
        all_queries = _pick(_with_offset(query, normalizer / scale), layout.queries)
        all_slopes = _pick(_with_offset(grad, delta), layout.queries)
        all_slopes.index_fill_(0, layout.fillers, 0)  # no token, no gradient
        all_keys = _pick(_with_ones(key), layout.keys)
        all_keys[layout.far, -1] = -FAR
        all_values = _pick(_with_ones(value), layout.keys)
        grad_queries = query.new_empty(len(layout.queries), width)
        grad_key, grad_value = (torch.zeros(heads, len(key), width, dtype=wide) for _ in range(2))
        none = query.new_empty(())
        for block, q, slope, k, v, grad_q in zip(
            layout.blocks,
            layout.split_queries(all_queries, heads),
            layout.split_queries(all_slopes, heads),
            layout.split_keys(all_keys, heads),
            layout.split_keys(all_values, heads),
            layout.split_queries(grad_queries, heads),
            strict=True,
        ):
            weights = torch.baddbmm(none, q, k.mT, beta=0, alpha=scale)
            weights[..., block.keys - block.edge.shape[1] :].add_(block.edge)
            weights.exp_()
            inner = torch.bmm(slope, v.mT).mul_(weights)
            torch.bmm(inner, k[..., :width], out=grad_q)
            _add_keys(grad_value, weights.mT @ slope[..., :width], block)
            _add_keys(grad_key, inner.mT @ q[..., :width], block)
        grad_query = grad_queries.index_select(0, layout.homes).view(query.shape).mul_(scale)
        grad_key = grad_key.mul_(scale).transpose(0, 1).to(key.dtype)
        return grad_query, grad_key, grad_value.transpose(0, 1).to(value.dtype), None, None


def _pick(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of `[T, heads, ...]` taken as `[T * heads, ...]`."""
    return x.flatten(0, 1).index_select(0, rows)


def _with_offset(x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """`[T, H, D + EXTRA]` rows whose product with `_with_ones` is less by `offset`, `[T, H]`.

    Three pieces of a narrow dtype hold a float32 number.
    """
    pieces, remaining = [], -offset
    for _ in range(3):
        pieces.append(remaining.to(x.dtype))
        remaining = remaining - pieces[-1].to(offset.dtype)
    rest = x.new_zeros(*x.shape[:2], EXTRA)
    rest[..., :3] = torch.stack(pieces, dim=-1)
    rest[..., -1] = 1.0
    return torch.cat([x, rest], dim=-1)


def _with_ones(x: torch.Tensor) -> torch.Tensor:
    """`[T, K, D + EXTRA]` rows that take the offsets of `_with_offset` once."""
    rest = x.new_zeros(*x.shape[:2], EXTRA)
    rest[..., :3] = 1.0
    return torch.cat([x, rest], dim=-1)


def _add_keys(total: torch.Tensor, part: torch.Tensor, block: _Block) -> None:
    """Add `[K, m, D]` of a block's keys to the tokens that they came from, `[K, T, D]`."""
    prefix = block.prefix.stop - block.prefix.start
    own = block.own.stop - block.own.start
    if prefix:
        total[:, block.prefix] += part[:, :prefix]
    room = prefix + -prefix % ROUNDING
    total[:, block.own] += part[:, room : room + own]


@functools.lru_cache(maxsize=4)
def _layout(
    segments: Segments,
    sliding_window: int | None,
    query_heads: int,
    key_heads: int,
    dtype: torch.dtype,
) -> _Layout:
    """The same in every layer, so those of the last batches are kept."""
    groups = query_heads // key_heads
    by_head = torch.arange(key_heads)[:, None]
    blocks, queries, fillers, keys, far = [], [], [], [], []
    for segment in segments:
        for first in range(0, segment.length, BLOCK):
            count = min(BLOCK, segment.length - first)
            tokens, filler = _filled(segment.start + first, count)
            rows = tokens[:, None] * query_heads + torch.arange(groups)
            queries.append((rows.flatten() + by_head * groups).flatten())
            fillers.append(filler.repeat_interleave(groups).repeat(key_heads))
            block, tokens, filler = _block(segment, first, count, sliding_window, groups, dtype)
            blocks.append(block)
            keys.append((tokens * key_heads + by_head).flatten())
            far.append(filler.repeat(key_heads))
    picked, empty = torch.cat(queries), torch.cat(fillers)
    held = (~empty).nonzero()[:, 0]
    homes = torch.empty(len(held), dtype=torch.int64)
    homes[picked[held]] = held
    nowhere = (x.nonzero()[:, 0] for x in (empty, torch.cat(far)))
    return _Layout(tuple(blocks), picked, next(nowhere), homes, torch.cat(keys), next(nowhere))


def _filled(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens from `start` on, filled up with repetitions of the last, and which ones these are."""
    steps = torch.arange(count + -count % ROUNDING)
    return start + steps.clamp(max=count - 1), steps >= count


def _block(
    segment: Segment,
    first: int,
    count: int,
    sliding_window: int | None,
    groups: int,
    dtype: torch.dtype,
) -> tuple[_Block, torch.Tensor, torch.Tensor]:
    """The block of a segment's queries from `first` on, its keys' tokens and their fillers."""
    prefix = segment.prefix_length
    oldest = 0 if sliding_window is None else max(0, prefix + first - sliding_window + 1)
    before = slice(segment.prefix_start + min(oldest, prefix), segment.prefix_start + prefix)
    own = slice(segment.start + max(0, oldest - prefix), segment.start + first + count)
    tokens, positions, fillers = [], [], []
    for part, shift in ((before, -segment.prefix_start), (own, prefix - segment.start)):
        if part.stop > part.start:
            held, filler = _filled(part.start, part.stop - part.start)
            tokens.append(held)
            positions.append((held + shift).masked_fill(filler, torch.iinfo(torch.int64).max))
            fillers.append(filler)
    where = torch.cat(positions)
    asking = torch.arange(prefix + first, prefix + first + count + -count % ROUNDING)[:, None]
    seen = where <= asking
    if sliding_window is not None:
        seen &= asking - where < sliding_window
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    mask = mask.repeat_interleave(groups, 0)
    cut = sliding_window is not None and prefix + first + count > sliding_window
    edge = mask if cut else mask[:, -len(asking) :].contiguous()
    block = _Block(len(mask), len(where), before, own, mask, edge)
    return block, torch.cat(tokens), torch.cat(fillers)
