"""Frozen weights in 4 or 8 bits: NF4 and int8 of bitsandbytes, dequantized for each product.

A layer's weight is dense only during its own product. bitsandbytes' own products are not used. In
evaluation they round the activations to 8 bits too (LLM.int8()), or repack a 4-bit layer into a
layout without a gradient. What an adapter is trained over, what scores with adapters off and what
samples must be one and the same model, in both modes and in both directions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

try:
    import bitsandbytes
except ImportError:  # an extra: only quantized bases need it
    bitsandbytes = None

_KINDS = bitsandbytes and (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)

_INT8_STEPS = 127
"""Steps from zero to the largest weight of a row."""


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer holds its weight in 4 or 8 bits."""
    return bool(_KINDS) and isinstance(layer, _KINDS)


def dense_weight(layer: Any) -> torch.Tensor:
    """`[O, I]` the weight of a linear layer as it is multiplied.

    Args:
        layer: a plain layer, whose weight is returned as it is, or a quantized one.
    """
    weight = layer.weight
    if not is_quantized(layer):
        return weight  # type: ignore[no-any-return]
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        state = weight.quant_state
        if weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
            return exact_nf4(weight.data, state)
        dense: torch.Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, state)
        return dense
    scales = weight.SCB[:, None] / _INT8_STEPS
    if weight.device.type == "cuda":  # one kernel, which rounds once
        narrow = torch.empty(weight.shape, dtype=layer.compute_dtype, device=weight.device)
        return torch.mul(weight.data, scales, out=narrow)
    # Through float32: torch's mixed product takes four times as long on a CPU.
    wide: torch.Tensor = weight.data.float()
    return wide.mul_(scales).to(layer.compute_dtype)


def exact_nf4(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Weights of NF4, each its code times the scale of its block, rounded once.

    For rows that a block of 64 weights does not divide. There bitsandbytes' own kernel was exact on
    a CPU with AVX2 alone; on one with AVX-512 a tiny model's first losses were others, by 0.2% in
    sft and by 15% in reward.

    Args:
        packed: two codes a byte, the first in the upper half.
        state: of bitsandbytes: `code` `[16]`, scales of blocks in 8 bits, `shape` and `dtype`.
    """
    scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2)
    pairs = packed.flatten().to(torch.int32)
    codes = state.code[torch.stack([pairs >> 4, pairs & 15], 1)].flatten()
    wide = (scales + state.offset).repeat_interleave(state.blocksize)
    count = state.shape.numel()
    dense: torch.Tensor = (codes[:count] * wide[:count]).view(state.shape).to(state.dtype)
    return dense


def weight_dtype(layer: Any) -> torch.dtype:
    """Precision in which a layer's weight is multiplied."""
    dtype: torch.dtype = layer.compute_dtype if is_quantized(layer) else layer.weight.dtype
    return dtype


def multiply_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every quantized layer multiply with its dequantized weight.

    Args:
        model: as transformers loaded it.
        dtype: of the products.
    """
    layers: list[Any] = [module for module in model.modules() if is_quantized(module)]
    for layer in layers:
        layer.compute_dtype = dtype
        layer.forward = functools.partial(_forward, layer)


class _DenseProduct(torch.autograd.Function):
    """y = x Wᵀ of a frozen layer; W is dequantized once more for the gradient instead of kept.

    Shapes: x `[T, I]`, W `[O, I]`, y `[T, O]`.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        return torch.mm(x, dense_weight(layer).T)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.mm(grads[0], dense_weight(ctx.layer)), None


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    flat = x.to(layer.compute_dtype).reshape(-1, x.shape[-1])
    y = _DenseProduct.apply(flat, layer)  # type: ignore[no-untyped-call]
    y = y if layer.bias is None else y + layer.bias
    output: torch.Tensor = y.view(*x.shape[:-1], -1)
    return output
