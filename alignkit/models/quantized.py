"""Frozen weights in 4 bits: NF4 through bitsandbytes, dequantized where they are multiplied.

A layer's weight is dense only during its own product. On a processor bitsandbytes repacks a layer
for inference as soon as it runs in evaluation mode, and the repacked layer has no gradient: that
repacking is turned off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

try:
    import bitsandbytes.functional as bitsandbytes
except ImportError:  # an extra: only quantized bases need it
    bitsandbytes = None


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer holds its weight in 4 bits."""
    return getattr(layer.weight, "quant_state", None) is not None


def dense_weight(weight: Any) -> torch.Tensor:
    """`[O, I]` the weight of a linear layer as it is multiplied.

    Args:
        weight: a plain weight, returned as it is, or a 4-bit one.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight  # type: ignore[no-any-return]
    dense: torch.Tensor = bitsandbytes.dequantize_4bit(weight.data, state)
    return dense


def weight_dtype(weight: Any) -> torch.dtype:
    """Precision in which a layer's weight is multiplied."""
    state = getattr(weight, "quant_state", None)
    dtype: torch.dtype = weight.dtype if state is None else state.dtype
    return dtype


def keep_trainable(model: nn.Module) -> None:
    """Keep every 4-bit layer in the layout that has a gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
