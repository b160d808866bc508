"""Attention over a key-value cache that is allocated once, for generation.

transformers' dynamic cache copies everything at each new token, and its attention repeats the keys
for every query head that shares them. Here new keys are written in place, and the query heads that
share a key head are rows of one product.

Shapes: `B` rows, `H` query heads, `K` key heads, `G = H / K`, `q` new tokens, `n` tokens in all,
`D` head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignkit.models.loading import quiet_transformers

CACHED = "alignkit_cached"


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in a buffer with room for the whole response.

    Args:
        room: tokens that fit.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values; all of them so far, `[B, K, n, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self.keys = key_states.new_empty(rows, heads, self.room, width)
            self.values = value_states.new_empty(rows, heads, self.room, value_states.shape[3])
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens written so far."""
        return self.length

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows only."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def new_cache(layers: int, room: int) -> Cache:
    """An empty cache.

    Args:
        layers: decoder layers.
        room: tokens that fit into each row.
    """
    return Cache(layers=[GrowingLayer(room) for _ in range(layers)])


def keep_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Keep these rows of every layer."""
    for layer in cache.layers:
        layer.keep(rows)


def cached_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attention output of the new tokens.

    Args:
        module: the attention layer; not read.
        query: `[B, H, q, D]`.
        key: `[B, K, n, D]`.
        value: `[B, K, n, D]`.
        attention_mask: `[B, 1, q, n]` True where a token is seen; None: everything up to itself.
        scaling: factor on the scores; None is 1 / sqrt(D).
        softcap: scores become `softcap * tanh(scores / softcap)`.
        options: further arguments of transformers; the mask holds sliding windows.

    Returns:
        `([B, q, H, D], None)`.

    Raises:
        NotImplementedError: the model asks for sinks or position biases.
    """
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"cached attention does not know {name}")
    heads, new = query.shape[1], query.shape[2]
    groups = heads // key.shape[1]
    mask = attention_mask
    if mask is None and new > 1:
        mask = torch.ones(new, key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - new)[None, None]
    folded = query.unflatten(1, (-1, groups)).flatten(2, 3)
    if mask is not None and groups > 1:
        mask = mask[..., None, :, :].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    if softcap is None:
        output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = torch.tanh(folded @ key.mT * (scale / softcap)).float() * softcap
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        output = torch.softmax(scores, dim=-1).to(value.dtype) @ value
    return output.unflatten(2, (groups, new)).flatten(1, 2).transpose(1, 2), None


@contextlib.contextmanager
def cached_forward(inner: Any) -> Iterator[None]:
    """The model attends over a cache for the length of the block.

    Args:
        inner: transformers model; its attention is put back afterwards.
    """
    config = inner.config.get_text_config()
    before = config._attn_implementation
    with quiet_transformers():
        inner.set_attn_implementation(CACHED)
    try:
        yield
    finally:
        with quiet_transformers():
            inner.set_attn_implementation(before)


AttentionInterface.register(CACHED, cached_attention)
AttentionMaskInterface.register(CACHED, sdpa_mask)
