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
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignkit.models.quiet import quiet_transformers
from alignkit.models.transformers_parts import attention_of

CACHED = "alignkit_cached"

ROUNDING = 32
"""Keys are read up to a multiple of it: kernels are generated and kept for each length."""


def round_up(length: int) -> int:
    """The next multiple of `ROUNDING`."""
    return length + -length % ROUNDING


class Store:
    """The memory of all layers in one piece, and where its next token goes.

    Buffers made one by one between the temporaries of a forward pass leave holes that a
    CPU's heap never fills again: two gigabytes for each batch of a 135M model.

    Args:
        layers: number of layers.
        room: tokens that fit.

    Attributes:
        length: tokens written so far.
        place: `[1]` the same on the device, once there is one.
    """

    def __init__(self, layers: int, room: int) -> None:
        self.layers, self.room = layers, round_up(room)
        self.buffer: torch.Tensor | None = None
        self.length, self.place = 0, torch.empty(0, dtype=torch.int64)

    def reserve(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, Any]:
        """Room for the keys and values of one layer, `[B, K, room, D]` each.

        Args:
            layer: its index.
            key: `[B, K, q, D]` first keys.
            value: first values.
        """
        rows, heads, _, width = key.shape
        shape = (self.layers, 2, rows, heads, self.room, width)
        if self.buffer is None:
            self.buffer = key.new_zeros(shape)
            self.place = torch.zeros(1, dtype=torch.int64, device=key.device)
        if self.buffer.shape == shape and value.shape == key.shape:
            return self.buffer[layer, 0], self.buffer[layer, 1]
        wide = [x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in (key, value)]
        return wide[0], wide[1]


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in a buffer with room for the whole response.

    Args:
        store: provides the memory.
        layer: index of this layer.
    """

    def __init__(self, store: Store, layer: int) -> None:
        super().__init__()
        self.store, self.layer = store, layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values; return all so far, `[B, K, n, D]` with `n` rounded up."""
        key_states = key_states.to(value_states.dtype)  # after rotation some models' keys are wider
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self.store.reserve(self.layer, key_states, value_states)
        start, end = self.store.length, self.store.length + key_states.shape[2]
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            if end - start == 1:
                kept.index_copy_(2, self.store.place, new)
            else:
                kept[:, :, start:end] = new
        return self.keys[:, :, : round_up(end)], self.values[:, :, : round_up(end)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that attention will see, those not written yet included, and their offset."""
        return round_up(self.store.length + query_length), 0

    def get_seq_length(self) -> int:
        """Tokens written so far."""
        return self.store.length


class GrowingCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers. What a single token reads and writes lies in place: only every
    `ROUNDING` tokens do its shapes change, and no number of the host is in its operations.

    Args:
        layers: decoder layers.
        room: tokens that fit into each row.
    """

    def __init__(self, layers: int, room: int) -> None:
        self.store = Store(layers, room)
        super().__init__(layers=[GrowingLayer(self.store, layer) for layer in range(layers)])

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Where the next token goes, on the device once there is something before it."""
        return self.store.place if self.store.length else 0

    def fill(self, states: torch.Tensor, rows: int) -> None:
        """Write the same keys and values at the front of every row.

        Args:
            states: `[L, 2, K, P, D]` of each layer, in the compute dtype.
            rows: `B`.
        """
        for layer, both in enumerate(states):
            key, value = both[:, None].expand(-1, rows, -1, -1, -1)
            self.update(key, value, layer)
        self.advance(states.shape[3])

    def spread(self, rows: torch.Tensor, room: int) -> GrowingCache:
        """A cache with more room, in which each row is a copy of one of these.

        Args:
            rows: `[B]` which one.
            room: tokens that fit.
        """
        wide = GrowingCache(len(self.layers), room)
        for layer, (kept, new) in enumerate(zip(self.layers, wide.layers, strict=True)):
            key, value = (x[rows, :, : self.store.length] for x in (kept.keys, kept.values))
            new.lazy_initialization(key, value)
            new.keys, new.values = wide.store.reserve(layer, key, value)
            new.keys[:, :, : self.store.length] = key
            new.values[:, :, : self.store.length] = value
        wide.advance(self.store.length)
        return wide

    def advance(self, tokens: int) -> None:
        """Go on behind the tokens that every layer has written."""
        self.store.length += tokens
        self.store.place.add_(tokens)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows of every layer."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.store.buffer = None


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
        attention_mask: `[B, 1, q, n]` 0 where a token is seen and -inf elsewhere.
        scaling: factor on the scores; None is 1 / sqrt(D).
        softcap: scores become `softcap * tanh(scores / softcap)`.
        options: further arguments of transformers; the mask holds sliding windows.

    Returns:
        `([B, q, H, D], None)`.

    Raises:
        NotImplementedError: the model asks for sinks or position biases, or gives no mask.
    """
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"cached attention does not support {name}")
    heads, new = query.shape[1], query.shape[2]
    groups = heads // key.shape[1]
    mask = attention_mask
    if mask is None:
        raise NotImplementedError("cached attention needs a mask: keys beyond the last are empty")
    folded = query.unflatten(1, (-1, groups)).flatten(2, 3)
    mask = mask.to(folded.dtype)
    if groups > 1:
        mask = mask[..., None, :, :].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    if softcap is None:
        output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = torch.tanh(folded @ key.mT * (scale / softcap)).float() * softcap
        # Finite: padding on the left sees nothing at all, and must not become NaN.
        scores = scores.masked_fill(mask < 0, torch.finfo(scores.dtype).min)
        output = torch.softmax(scores, dim=-1).to(value.dtype) @ value
    return output.unflatten(2, (groups, new)).flatten(1, 2).transpose(1, 2), None


def whole_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """What is added to the scores, built even if every row is full and a causal flag would do.

    Numbers, not booleans: torch would convert those once more in every layer.
    """
    seen = sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})
    if seen is None:
        return None
    added = torch.zeros(seen.shape, dtype=options.get("dtype", torch.float32), device=seen.device)
    return added.masked_fill_(~seen, float("-inf"))


@contextlib.contextmanager
def cached_forward(inner: PreTrainedModel) -> Iterator[None]:
    """Let the model attend over a cache within the block.

    Args:
        inner: transformers model; its attention is restored afterwards.
    """
    config = inner.config.get_text_config()
    before = attention_of(config)
    with quiet_transformers():
        inner.set_attn_implementation(CACHED)
    try:
        yield
    finally:
        with quiet_transformers():
            inner.set_attn_implementation(before)


AttentionInterface.register(CACHED, cached_attention)
AttentionMaskInterface.register(CACHED, whole_mask)
