"""Packed attention as one masked call: the yardstick of the fast paths, and their fallback."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from alignkit.models.attention import blocks as attention_blocks
from alignkit.models.attention.backend import has_flash
from alignkit.packed import Segments


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
    """One call of torch's attention for each segment, on every device.

    Args:
        query: as for `packed_attention`, like all others.
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
    by_start = {segment.start: number for number, segment in enumerate(segments)}
    # A CPU's kernels are generated and kept for each length, so few distinct lengths are used.
    rounding = attention_blocks.ROUNDING if query.device.type == "cpu" else 1
    masks = _masks(segments, sliding_window, query.device, rounding)
    if softcap is None and _needs_equal_heads(query, masks):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
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


def _needs_equal_heads(query: torch.Tensor, masks: Sequence[torch.Tensor | None]) -> bool:
    """Whether fewer key heads than query heads would leave only the math kernel.

    On CUDA it multiplies in float32 and keeps all weights for the backward pass. Flash attention
    takes fewer key heads, but no mask and no float32; the memory-efficient kernel takes both.
    """
    if query.device.type != "cuda":
        return False
    masked = any(mask is not None for mask in masks)
    return masked or query.dtype == torch.float32 or not has_flash(query.device)


@functools.lru_cache(maxsize=1)  # on a card they take memory that no plan counts
def _masks(
    segments: Segments, sliding_window: int | None, device: torch.device, rounding: int
) -> list[torch.Tensor | None]:
    """The mask of each segment: the same in every layer, so those of the last batch are kept."""
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
        filler: keys after the prefix that no query sees, `f`.
        sliding_window: see `packed_attention`.
        device: of the mask.

    Returns:
        `[n, p + f + n]`, True where a token is seen; None if a causal mask is enough.
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


def _append(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, rows)) if rows else x


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
    dropout: float,
) -> torch.Tensor:
    """The same in plain operations: not every device has a fused kernel that caps scores."""
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
