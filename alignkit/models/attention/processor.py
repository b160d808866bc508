"""Packed attention on a CPU: blocks of queries, and only the keys that a block sees.

The result of `attention.packed_attention` in one autograd function. Forward, torch's flash kernel
takes each block with the query heads that share a key head as rows of one product. Backward, that
kernel reaches a sixth of the machine's matrix rate, so the gradients are five matrix products:

    P = exp(s · Q Kᵀ - L),  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - δ),  dQ = s · dS K,  dK = s · dSᵀ Q

with L the log-sum-exp of a query's scores and δ = Σ_d dO ∘ O (Dao, FlashAttention-2,
arXiv:2307.08691). A bfloat16 product rounds its result, and a rounded score of 20 would move P by
6%. So L and δ travel inside the products, as extra columns of Q and dO that meet ones in K and V:
what is rounded is then log P itself, which moves P by P |log P| / 256 < 0.0015 at most. The parts
of a prompt's gradient that come from its branches are summed in float32 and rounded once.

Shapes: `D` head dimension; the others as in `blocks`.
"""

from __future__ import annotations

from typing import Any

import torch

from alignkit.models.attention import blocks as attention_blocks
from alignkit.models.attention.blocks import Group, Layout
from alignkit.models.kernels.blocks import buffers, row_blocks
from alignkit.packed import Segments

EXTRA = 32
"""Columns added to the head dimension; three are used, but the matrix unit takes 32 at once."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    about = (segments, sliding_window, query.shape[1], key.shape[1], query.dtype)
    tokens = (x[0].transpose(0, 1) for x in (query, key, value))
    layout = attention_blocks.layout(*about)
    output: torch.Tensor = _CpuAttention.apply(*tokens, layout, scale)  # type: ignore[no-untyped-call]
    return output[None]


class _CpuAttention(torch.autograd.Function):
    """`[T, H, D]`, `[T, K, D]`, `[T, K, D]` -> `[T, H, D]`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        scale: float,
    ) -> torch.Tensor:
        heads = key.shape[1]
        queries = layout.split_queries(_pick(query, layout.queries), heads)
        keys = layout.split_keys(_pick(key, layout.keys), heads)
        values = layout.split_keys(_pick(value, layout.keys), heads)
        outputs, sums = [], []
        for group, q, k, v in zip(layout.groups, queries, keys, values, strict=True):
            attended, total = _flash(q, k, v, attn_mask=group.mask, scale=scale)
            outputs.append(attended.flatten(0, 2))
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
        delta = _row_products(grad, output, wide)
        all_queries = _pick(_with_offset(query, normalizer / scale), layout.queries)
        all_slopes = _pick(_with_offset(grad, delta), layout.queries)
        all_slopes.index_fill_(0, layout.fillers, 0)  # no token, no gradient
        all_keys, all_values = (_pick(_with_ones(x), layout.keys) for x in (key, value))
        grad_queries = query.new_empty(len(layout.queries), width)
        grad_key, grad_value = (_KeyGradient(x, layout, wide) for x in (key, value))
        none = query.new_empty(())
        for group, q, slope, k, v, grad_q in zip(
            layout.groups,
            layout.split_queries(all_queries, heads),
            layout.split_queries(all_slopes, heads),
            layout.split_keys(all_keys, heads),
            layout.split_keys(all_values, heads),
            layout.split_queries(grad_queries, heads),
            strict=True,
        ):
            shape = (*q.shape[:3], k.shape[2])
            q, slope, k, v = (x.flatten(0, 1) for x in (q, slope, k, v))
            weights = torch.baddbmm(none, q, k.mT, beta=0, alpha=scale)
            weights.view(shape)[..., -group.edge.shape[-1] :].add_(group.edge)
            weights.exp_()
            inner = torch.bmm(slope, v.mT).mul_(weights)
            scaled = {"beta": 0, "alpha": scale}
            torch.baddbmm(none, inner, k[..., :width], **scaled, out=grad_q.flatten(0, 1))
            grad_value.add(torch.bmm(weights.mT, slope[..., :width]), group)
            grad_key.add(torch.baddbmm(none, inner.mT, q[..., :width], **scaled), group)
        grad_query = grad_queries.index_select(0, layout.homes).view(query.shape)
        return grad_query, grad_key.sum(), grad_value.sum(), None, None


class _KeyGradient:
    """Collects the gradient of keys or values.

    Args:
        x: `[T, K, D]` keys or values.
        layout: of the row.
        wide: dtype of sums.
    """

    def __init__(self, x: torch.Tensor, layout: Layout, wide: torch.dtype) -> None:
        self.layout, self.dtype = layout, x.dtype
        self.total = x.new_zeros(x.shape[1], x.shape[0], x.shape[2], dtype=wide)
        self.whole: list[torch.Tensor] = []

    def add(self, parts: torch.Tensor, group: Group) -> None:
        """Add the share of a group's queries, `[BK, m, D]`, to the tokens of its keys."""
        prefix = group.prefix.stop - group.prefix.start
        each = parts.unflatten(0, (len(group.own), -1))
        if prefix:
            self.total[:, group.prefix] += each[:, :, :prefix].sum(0, dtype=self.total.dtype)
        if group.whole:
            self.whole.append(parts.flatten(0, 1))
            return
        for (own, first), part in zip(group.own, each.unbind(0), strict=True):
            self.total[:, own] += part[:, first : first + own.stop - own.start]

    def sum(self) -> torch.Tensor:
        """`[T, K, D]` of all groups together."""
        if self.whole:
            rows = torch.cat([*self.whole, self.whole[0].new_zeros(1, self.total.shape[-1])])
            self.total += rows.index_select(0, self.layout.key_homes).view(self.total.shape)
        return self.total.transpose(0, 1).to(self.dtype)


def _row_products(a: torch.Tensor, b: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """`[T, H]` of `[T, H, D]`: Σ_d a ∘ b."""
    total = a.new_empty(a.shape[:2], dtype=wide)
    room = buffers(a, 2, wide)
    for rows in row_blocks(a):
        product, other = room[:, : rows.stop - rows.start]
        torch.sum(product.copy_(a[rows]).mul_(other.copy_(b[rows])), -1, out=total[rows])
    return total


def _pick(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of `[T, heads, ...]` viewed as `[T * heads, ...]`."""
    return x.flatten(0, 1).index_select(0, rows)


def _with_offset(x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """`[T, H, D + EXTRA]` rows whose product with `_with_ones` is smaller by `offset`, `[T, H]`.

    Three pieces of a narrow dtype hold a float32 number.
    """
    pieces, remaining = [], -offset
    for _ in range(3):
        pieces.append(remaining.to(x.dtype))
        remaining = remaining - pieces[-1].to(offset.dtype)
    rest = x.new_zeros(*x.shape[:2], EXTRA)
    rest[..., :3] = torch.stack(pieces, dim=-1)
    return torch.cat([x, rest], dim=-1)


def _with_ones(x: torch.Tensor) -> torch.Tensor:
    """`[T, K, D + EXTRA]` rows that count the offsets of `_with_offset` once."""
    rest = x.new_zeros(*x.shape[:2], EXTRA)
    rest[..., :3] = 1.0
    return torch.cat([x, rest], dim=-1)
