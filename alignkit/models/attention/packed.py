"""Attention over packed rows: each segment sees itself causally, and all of its prefix.

Registered with transformers' `AttentionInterface`, so it works under any model that uses it. The
segments travel as a keyword argument through the model's forward. No padding, no T×T mask.
`choose_backend` says which kernels compute it.

Shapes: `B` = 1 packed row, `H` query heads, `K` key heads, `T` tokens, `D` head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface

from alignkit.models.attention import processor, varlen
from alignkit.models.attention.backend import choose_backend
from alignkit.models.attention.plain import plain_attention
from alignkit.models.attention.prefix_rows import drop_before, longer_segments, put_before
from alignkit.models.kernels.precision import product_dtype
from alignkit.packed import Segments

PACKED = "alignkit_packed"


_listeners: list[set[int]] = []


@contextlib.contextmanager
def noting_layers() -> Iterator[set[int]]:
    """Ids of the layers whose attention runs packed within the block."""
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
        attention_mask: must be None; the segments define who sees whom.
        segments: cover `0..T-1` in order.
        prefix_states: `[L, 2, K, P, D]` trained keys and values of each layer, which come before
            those of every document; None without a prefix.
        scaling: factor on the scores; None is 1 / sqrt(D).
        dropout: probability on the attention weights.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        options: further arguments of transformers; those that would change the result raise.

    Returns:
        `([1, T, H, D], None)`.

    Raises:
        NotImplementedError: the model needs something that packed rows do not support; the
            start-up check then chooses the padded path.
    """
    if segments is None or attention_mask is not None:
        raise NotImplementedError("packed attention needs segments and no mask")
    for name in ("s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise NotImplementedError(f"packed attention does not support {name}")
    for reached in _listeners:
        reached.add(id(module))
    # Rotated queries and keys may have a wider dtype than values.
    query, key, value = (x.to(product_dtype(x)) for x in (query, key, value))
    seen = segments
    if prefix_states is not None:
        keys, values = prefix_states[module.layer_idx]
        rows, seen = keys.shape[1], longer_segments(segments, keys.shape[1])
        query = put_before(query, None, segments, rows)
        key, value = (put_before(x, p, segments, rows) for x, p in ((key, keys), (value, values)))
    backend = choose_backend(
        query.device,
        query.dtype,
        query.shape[-1],
        value.shape[-1],
        dropout=dropout,
        softcap=softcap,
    )
    how: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window}
    if backend == "processor":
        output = processor.cpu_attention(query, key, value, seen, **how)
    elif backend == "varlen":
        output = varlen.varlen_attention(query, key, value, seen, **how)
    else:
        output = plain_attention(query, key, value, seen, **how, dropout=dropout, softcap=softcap)
    return output if prefix_states is None else drop_before(output, segments, rows), None


AttentionInterface.register(PACKED, packed_attention)
