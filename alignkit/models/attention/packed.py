"""Attention over packed rows: each segment sees itself causally, and all of its prefix.

Registered with transformers' `AttentionInterface`, so it works under any model that uses it. The
segments travel as a keyword argument through the model's forward. No padding, no T×T mask: a
segment without a window or a prefix runs the causal kernel, which skips half of the work. A
processor has a path of its own, `cpu_attention`, for all but capped scores, dropout and values of
another width.

Shapes: `B` = 1 packed row, `H` query heads, `K` key heads, `T` tokens, `D` head dimension.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from alignkit.models.attention.packed import blocks as attention_blocks
from alignkit.models.attention.packed import processor as cpu_attention
from alignkit.models.attention.prefix_rows import drop_before, longer_segments, put_before
from alignkit.models.kernels.precision import product_dtype
from alignkit.packed import Segment

PACKED = "alignkit_packed"

Segments = tuple[Segment, ...]

_listeners: list[set[int]] = []


@contextlib.contextmanager
def noting_layers() -> Iterator[set[int]]:
    """Identities of the layers whose attention is packed, as long as the block lasts."""
    reached: set[int] = set()
    _listeners.append(reached)
    try:
        yield reached
    finally:
        _listeners.remove(reached)


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments | None = None,
    prefix_states: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attention output of every segment.

    Args:
        module: the attention layer; its place among the layers picks those of the prefix.
        query: `[1, H, T, D]`.
        key: `[1, K, T, D]`, H a multiple of K.
        value: `[1, K, T, D]`.
        attention_mask: must be None; the segments say who sees whom.
        segments: cover `0..T-1` in order.
        prefix_states: `[L, 2, K, P, D]` trained keys and values of each layer, which stand before
            every document; None without.
        scaling: factor on the scores; None is 1 / sqrt(D).
        dropout: probability on the attention weights.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        options: further arguments of transformers; those that would change the result raise.

    Returns:
        `([1, T, H, D], None)`.

    Raises:
        NotImplementedError: the model asks for something that packed rows do not have; the
            start-up check turns it into the padded path.
    """
    if segments is None or attention_mask is not None:
        raise NotImplementedError("packed attention needs segments and no mask")
    for name in ("s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise NotImplementedError(f"packed attention does not know {name}")
    for reached in _listeners:
        reached.add(id(module))
    # Rotated queries and keys may come wider than values.
    query, key, value = (x.to(product_dtype(x)) for x in (query, key, value))
    seen = segments
    if prefix_states is not None:
        keys, values = prefix_states[module.layer_idx]
        rows, seen = keys.shape[1], longer_segments(segments, keys.shape[1])
        query = put_before(query, None, segments, rows)
        key, value = (put_before(x, p, segments, rows) for x, p in ((key, keys), (value, values)))
    if _fits_processor(query, value, dropout, softcap):
        output = cpu_attention.cpu_attention(
            query, key, value, seen, scaling=scaling, sliding_window=sliding_window
        )
    else:
        output = plain_attention(
            query,
            key,
            value,
            seen,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            softcap=softcap,
        )
    return output if prefix_states is None else drop_before(output, segments, rows), None


def _fits_processor(
    query: torch.Tensor, value: torch.Tensor, dropout: float, softcap: float | None
) -> bool:
    same_width = query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and same_width and dropout == 0.0 and softcap is None


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """One call of torch's attention for each segment: every device, and the yardstick on this one.

    Args:
        query: as for `packed_attention`, and so on.
        key: keys.
        value: values.
        segments: who sees whom.
        scaling: factor on the scores.
        dropout: probability on the weights.
        sliding_window: tokens that a token sees.
        softcap: cap of the scores.

    Returns:
        `[1, T, H, D]`.
    """
    lengths = [segment.length for segment in segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    by_start = {segment.start: number for number, segment in enumerate(segments)}
    # A processor's kernels are generated and kept for each length: few distinct ones reach them.
    rounding = attention_blocks.ROUNDING if query.device.type == "cpu" else 1
    masks = _masks(segments, sliding_window, query.device, rounding)
    outputs = []
    for number, segment in enumerate(segments):
        # Rows appended to a causal segment change nothing before them.
        extra = -segment.length % rounding
        filler = -segment.prefix_length % rounding
        q, k, v = (_append(x[number], extra) for x in (queries, keys, values))
        if segment.prefix_length:
            prefix = by_start[segment.prefix_start]
            k = torch.cat([_append(keys[prefix], filler), k], dim=2)
            v = torch.cat([_append(values[prefix], filler), v], dim=2)
        mask = masks[number]
        if softcap is None:
            output = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        else:
            output = _softcapped(q, k, v, mask, scaling, softcap, dropout)
        outputs.append(output[:, :, : segment.length])
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _append(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, rows)) if rows else x


@functools.lru_cache(maxsize=4)
def _masks(
    segments: Segments, sliding_window: int | None, device: torch.device, rounding: int
) -> list[torch.Tensor | None]:
    """The mask of each segment: the same in every layer, so those of the last batches are kept."""
    return [
        segment_mask(
            segment.length + -segment.length % rounding,
            segment.prefix_length,
            -segment.prefix_length % rounding,
            sliding_window,
            device,
        )
        for segment in segments
    ]


def segment_mask(
    own: int, prefix: int, filler: int, sliding_window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Who sees whom within a segment and its prefix.

    Args:
        own: tokens of the segment, appended rows included, `n`.
        prefix: tokens of its prefix, `p`.
        filler: keys after the prefix that nobody sees, `f`.
        sliding_window: see `packed_attention`.
        device: of the mask.

    Returns:
        `[n, p + f + n]`, True where a token is seen; None where the causal rule says it all.
    """
    windowed = sliding_window is not None and prefix + own > sliding_window
    if not prefix and not windowed:
        return None
    queries = torch.arange(prefix, prefix + own, device=device)
    unseen = torch.full((filler,), prefix + own, device=device)
    keys = torch.cat([torch.arange(prefix, device=device), unseen, queries])
    mask = keys <= queries[:, None]
    if windowed:
        assert sliding_window is not None
        mask &= queries[:, None] - keys < sliding_window
    return mask


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
    dropout: float,
) -> torch.Tensor:
    """The same in plain operations: no fused kernel on every device caps scores."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ value


AttentionInterface.register(PACKED, packed_attention)
