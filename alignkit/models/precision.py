"""In which precision a forward pass computes: products narrow, what they are added to wide.

A narrow residual stream is rounded after each of its additions, twice a layer. Log-probs of a
400-token answer then move by more than a training step moves them. Kept in float32 it costs some
memory traffic and no product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def compute_context(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Matrix products in `dtype`, the residual stream in float32; nothing changes for float32.

    Args:
        model: of transformers; its weights may be stored in `dtype` or wider.
        dtype: compute precision.
    """
    if dtype == torch.float32:
        yield
        return
    embeddings = model.get_input_embeddings()
    # Autocast leaves additions alone: wide where the stream begins, wide to its end.
    hook = embeddings.register_forward_hook(lambda module, args, output: output.float())
    try:
        with torch.autocast(next(model.parameters()).device.type, dtype=dtype):
            yield
    finally:
        hook.remove()


def product_dtype(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype in which products are computed: autocast's within it.

    Args:
        x: says on which device.
        dtype: the one outside of autocast; None is that of `x`.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype if dtype is None else dtype
