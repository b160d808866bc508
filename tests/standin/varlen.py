"""What the varlen flash kernel computes, on the processor: one sequence after another, in float32.

Stands for `torch.ops.torch_attn._varlen_attn` and its backward, which exist for CUDA only. Where
the kernel would read wrong memory, an assertion fails.

Shapes: `q` `[T, H, D]`, `k` and `v` `[M, K, D]`, where K divides H; ends `[S + 1]` int32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from standin.counts import counts


@dataclass(frozen=True)
class Sequences:
    """Where the sequences stand in the rows, and what of the keys they see.

    Args:
        ends_q: ends among the queries, 0 first.
        ends_k: ends among the keys, 0 first.
        longest_q: queries of the longest sequence.
        longest_k: keys of the longest sequence.
        causal: a query sees nothing behind itself; the last query stands at the last key.
        scale: of the scores; None for D^-0.5.
        window: keys seen to the left and to the right; -1 for all.
    """

    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int
    causal: bool
    scale: float | None
    window: Sequence[int] | None


@dataclass(frozen=True)
class Part:
    """One sequence: its rows, its `[H, n, D]` float32 queries, keys and values, its scores."""

    rows: slice
    keys: slice
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    scale: float


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
    enable_gqa: bool = False,
    *unsupported: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[T, H, D]`, log-sum-exp `[H, T]` of the scores, and the random state of dropout."""
    assert not any(unsupported), "page tables and splits are not in the stand-in"
    assert enable_gqa or q.shape[1] == k.shape[1], "fewer key heads without enable_gqa"
    counts.attention["varlen"] += 1
    where = Sequences(ends_q, ends_k, longest_q, longest_k, is_causal, scale, window_size)
    output, sums = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    for part in _parts(q, k, v, where):
        output[part.rows] = (part.scores.softmax(-1) @ part.v).transpose(0, 1).to(q.dtype)
        sums[:, part.rows] = part.scores.logsumexp(-1)
    return output, sums, torch.zeros(2, dtype=torch.uint64)


def varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    sums: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values, from the gradient of the output."""
    where = Sequences(ends_q, ends_k, longest_q, longest_k, is_causal, scale, window_size)
    grads = [torch.zeros(x.shape) for x in (q, k, v)]
    for part in _parts(q, k, v, where):
        g, out = (x[part.rows].float().transpose(0, 1) for x in (grad, output))
        weights = (part.scores - sums[:, part.rows, None]).exp()
        slope = weights * (g @ part.v.mT - (g * out).sum(-1, keepdim=True)) * part.scale
        grads[0][part.rows] = (slope @ part.k).transpose(0, 1)
        for total, repeated in ((grads[1], slope.mT @ part.q), (grads[2], weights.mT @ g)):
            total[part.keys] = repeated.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)
    return tuple(x.to(q.dtype) for x in grads)


def _parts(q: Tensor, k: Tensor, v: Tensor, where: Sequences) -> Iterator[Part]:
    ends = [where.ends_q.tolist(), where.ends_k.tolist()]
    assert where.ends_q.dtype == where.ends_k.dtype == torch.int32, "ends must be int32"
    assert q.dtype == k.dtype == v.dtype, "one precision"
    assert q.dtype in (torch.float16, torch.bfloat16), "flash takes 16 bits"
    assert q.shape[-1] % 8 == 0, "head dimension in steps of 8"
    assert ends[0][-1] == len(q), "queries do not end with the row"
    assert ends[1][-1] == len(k) == len(v), "keys do not end with the row"
    lengths = [[end - start for start, end in itertools.pairwise(x)] for x in ends]
    assert [where.longest_q, where.longest_k] == [max(x) for x in lengths], "longest sequence"
    scale = q.shape[-1] ** -0.5 if where.scale is None else where.scale
    groups = q.shape[1] // k.shape[1]
    for number in range(len(lengths[0])):
        rows, keys = (slice(x[number], x[number + 1]) for x in ends)
        query = q[rows].float().transpose(0, 1)
        key, value = (
            x[keys].float().transpose(0, 1).repeat_interleave(groups, dim=0) for x in (k, v)
        )
        seen = _seen(query.shape[1], key.shape[1], where)
        scores = (scale * query @ key.mT).masked_fill(~seen, float("-inf"))
        yield Part(rows, keys, query, key, value, scores, scale)


def _seen(queries: int, keys: int, where: Sequences) -> Tensor:
    """`[queries, keys]` bool; both end together, at the lower right."""
    left, right = where.window or (-1, -1)
    right = 0 if where.causal else right
    place = torch.arange(keys - queries, keys)[:, None]
    other = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if right >= 0:
        seen &= other <= place + right
    if left >= 0:
        seen &= other >= place - left
    return seen
