"""Base weights as a quantized run used them: quantized and dequantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.kernels.quantized import dense_weight
from alignkit.models.transformers_parts import get_keys_to_not_convert

try:
    import bitsandbytes
except ImportError:  # an extra: only quantized bases need it
    bitsandbytes = None


def as_trained(
    skeleton: PreTrainedModel,
    weight: Callable[[str], torch.Tensor],
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[str], torch.Tensor]:
    """Weights of the base that the adapters were trained over.

    Args:
        skeleton: the model without storage; says which layers are quantized.
        weight: gives a stored weight by its name.
        kind: `nf4` or `int8`; `none` keeps the stored weights.
        dtype: compute precision of the run.
        device: where the weights are quantized; ties and means round differently elsewhere.

    Returns:
        A function like `weight`.
    """
    if kind == "none":
        return weight
    names = quantized_names(skeleton)

    def trained(name: str) -> torch.Tensor:
        stored = weight(name)
        return through(stored, kind, dtype, device) if name in names else stored

    return trained


def quantized_names(skeleton: PreTrainedModel) -> set[str]:
    """Names of the weights that transformers quantizes: those of linear layers, except the head."""
    kept = set(get_keys_to_not_convert(skeleton))
    return {
        f"{name}.weight"
        for name, module in skeleton.named_modules()
        if type(module) is nn.Linear and name not in kept
    }


def through(
    weight: torch.Tensor, kind: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`[O, I]` a weight after quantization and back on `device`, in `dtype`, where it was."""
    if bitsandbytes is None:
        raise ModelError(
            "the adapter was trained over a quantized base, which needs bitsandbytes",
            hint="pip install 'alignkit[quantization]'",
        )
    narrow, sizes = weight.to(device, dtype).contiguous(), weight.shape[::-1]
    layer: Any
    if kind == "nf4":
        layer = bitsandbytes.nn.Linear4bit(*sizes, bias=False, device="meta")
        packed = bitsandbytes.nn.Params4bit(
            narrow, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
    elif kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(*sizes, bias=False, device="meta")
        packed = bitsandbytes.nn.Int8Params(narrow, requires_grad=False, has_fp16_weights=False)
    else:
        raise ModelError(
            f"the adapter was trained over weights in {kind!r}, which are not known here",
            hint="known are nf4 and int8",
        )
    layer.weight, layer.compute_dtype = packed.to(device), dtype
    return dense_weight(layer).to(weight.device)
