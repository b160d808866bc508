"""Packed attention on a GPU: one call of flash attention for a whole row, branches included.

A segment is one sequence of the kernel: its queries are its own tokens, its keys those of its
prefix followed by its own. The kernel aligns a causal mask at the lower right, so that a query sees
all of the prefix and its own past, which is what a segment means; no mask is made. Keys and values
of a prefix are copied for each of its branches, of key heads only.

Shapes: `T` tokens, `S` segments, `M` keys with copies, `H` query heads, `K` key heads, `D` head
dimension.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignkit.models.kernels.copies import on_device
from alignkit.packed import IntArray, Segments

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None  # type: ignore[assignment]

Kernel = Callable[..., Any]


@functools.cache
def torch_kernel() -> Kernel | None:
    """torch's `varlen_attn`, if it takes windows and fewer key heads than query heads."""
    if varlen_attn is None:
        return None
    taken = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= taken.keys() else None


@dataclass(frozen=True)
class Sequences:
    """Where the kernel finds its sequences.

    Args:
        query_ends: `[S + 1]` ends of the segments among the queries, 0 first.
        key_ends: `[S + 1]` ends of each prefix and segment among the keys, 0 first.
        longest_query: tokens of the longest segment.
        longest_key: tokens of the longest segment with its prefix.
        keys: `[M]` token of each key; empty if no segment has a prefix, and keys stay where they
            are.
        own: `[T]` a token's place among the keys, as one of its segment's own.
        copies: the first, second, … copy of every prefix: places among the keys, and their tokens.
            No token is twice in one of them.
    """

    query_ends: IntArray
    key_ends: IntArray
    longest_query: int
    longest_key: int
    keys: IntArray
    own: IntArray
    copies: tuple[tuple[IntArray, IntArray], ...]


def find_sequences(segments: Segments) -> Sequences:
    """The kernel's sequences of a packed row.

    Args:
        segments: cover `0..T-1` in order.
    """
    lengths = np.array([s.length for s in segments])
    prefixes = np.array([s.prefix_length for s in segments])
    ends = [np.concatenate([[0], np.cumsum(x)]) for x in (lengths, lengths + prefixes)]
    longest = int(lengths.max()), int((lengths + prefixes).max())
    if not prefixes.any():
        nothing = np.empty(0, np.int64)
        return Sequences(ends[0], ends[1], *longest, nothing, nothing, ())
    keys, own = [], []
    copies: list[tuple[list[IntArray], list[IntArray]]] = []
    made: dict[int, int] = {}
    for segment, first in zip(segments, ends[1], strict=False):
        before = np.arange(segment.prefix_length)
        tokens = segment.prefix_start + before
        keys += [tokens, np.arange(segment.start, segment.start + segment.length)]
        own.append(first + segment.prefix_length + np.arange(segment.length))
        if not segment.prefix_length:
            continue
        number = made.setdefault(segment.prefix_start, 0)
        made[segment.prefix_start] += 1
        if number == len(copies):
            copies.append(([], []))
        copies[number][0].append(first + before)
        copies[number][1].append(tokens)
    joined = tuple((np.concatenate(places), np.concatenate(of)) for places, of in copies)
    return Sequences(ends[0], ends[1], *longest, np.concatenate(keys), np.concatenate(own), joined)


@dataclass(frozen=True)
class _Located:
    """`Sequences` as tensors, copied to the device once for a row and read by every layer."""

    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest: tuple[int, int]
    keys: torch.Tensor
    own: torch.Tensor
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]


_latest: list[tuple[Segments, torch.device, _Located]] = []
"""Of the last two rows: all layers of a pass read the same, and another model may take turns."""


def _located(segments: Segments, device: torch.device) -> _Located:
    for known, where, made in _latest:
        if known is segments and where == device:
            return made
    found = find_sequences(segments)
    arrays = [found.query_ends, found.key_ends, found.keys, found.own]
    arrays += [array for pair in found.copies for array in pair]
    flat = on_device(np.concatenate(arrays), device)
    parts = iter(flat.split([len(array) for array in arrays]))
    ends = next(parts).int(), next(parts).int()
    longest = found.longest_query, found.longest_key
    keys, own = next(parts), next(parts)
    copies = tuple((next(parts), next(parts)) for _ in found.copies)
    made = _Located(*ends, longest, keys, own, copies)
    _latest[:] = [(segments, device, made), *_latest[:1]]
    return made


class _Copied(torch.autograd.Function):
    """`[T, K, D]` keys or values -> `[M, K, D]`, a prefix before each of its branches.

    Backward, the gradients of the copies are added up in float32 and rounded once. One copy of each
    prefix is added at a time: no two additions meet in one place, and their order is fixed.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, where: _Located) -> torch.Tensor:
        ctx.where = where
        return x.index_select(0, where.keys)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.index_select(0, ctx.where.own).to(wide)
        for places, tokens in ctx.where.copies:
            total.index_add_(0, tokens, grad.index_select(0, places).to(wide))
        return total.to(grad.dtype), None


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Attention output of every segment; see `packed_attention`.

    Args:
        query: `[1, H, T, D]`.
        key: `[1, K, T, D]`.
        value: `[1, K, T, D]`.
        segments: cover `0..T-1` in order.
        scaling: factor on the scores; None is 1 / sqrt(D).
        sliding_window: tokens that a token sees, itself included; None is all before it.
        kernel: computes what torch's `varlen_attn` does; None is that.

    Returns:
        `[1, T, H, D]`.
    """
    kernel = kernel or torch_kernel()
    assert kernel is not None, "chosen where torch has no such kernel"
    where = _located(segments, query.device)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if len(where.keys):
        key, value = (
            _Copied.apply(x, where)  # type: ignore[no-untyped-call]
            for x in (key, value)
        )
    output = kernel(
        query,
        key,
        value,
        where.query_ends,
        where.key_ends,
        *where.longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None]
