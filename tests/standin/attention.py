"""`scaled_dot_product_attention` on the device: the processor's numbers, and the kernel's name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from standin.counts import counts, site
from standin.tensor import OnDevice, numbers_of

_CUDNN_FIRST = (90, 100)
"""Compute capabilities at which torch asks cuDNN before flash."""


def kernel_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, capability: int
) -> str:
    """`flash`, `efficient`, `cudnn` or `math`: what torch 2.13 takes (sdp_utils.cpp).

    Args:
        query: `[B, H, q, D]`.
        key: `[B, K, k, D]`.
        value: `[B, K, k, E]`.
        mask: None, or what broadcasts to `[B, H, q, k]`.
        causal: a mask that is aligned at the upper left.
        capability: of the device: 75, 80, 90.
    """
    width = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    low = half if capability >= 80 else query.dtype == torch.float16
    rows = [query, key, value, *([] if mask is None else [mask])]
    dense = all(x.stride(-1) == 1 for x in rows)
    square = query.shape[2] == key.shape[2] or not causal
    flash = capability >= 80 and low and mask is None and square and value.shape[-1] == width <= 256
    steps = 8 if half else 4
    efficient = (
        (low or query.dtype == torch.float32)
        and query.shape[1] == key.shape[1]
        and width % steps == value.shape[-1] % steps == 0
    )
    cudnn = capability in _CUDNN_FIRST and low and width <= 128 and width % 8 == 0
    order = {"cudnn": cudnn, "flash": flash, "efficient": efficient}
    return next((name for name, fits in order.items() if fits and dense), "math")


class Attention:
    """Takes the operator's place on the device.

    Args:
        capability: of the device, such as 80.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        given = [x for x in (query, key, value, attn_mask) if x is not None]
        if len({x.device for x in given}) > 1:
            raise RuntimeError(f"attention over tensors of two devices, at {site()}")
        if len({x.dtype for x in given[:3]}) > 1:
            raise RuntimeError(f"attention over two precisions, at {site()}")
        if dropout_p:
            raise RuntimeError("dropout of attention is not in the stand-in")
        kind = kernel_of(query, key, value, attn_mask, is_causal, self.capability)
        counts.attention[kind] += 1
        how = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return _Attention.apply(query, key, value, attn_mask, how)


class _Attention(torch.autograd.Function):
    """One launch forward and one backward, whatever the processor does for it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, ctx.how = args
        ctx.save_for_backward(*tensors)
        counts.launches["attention forward"] += 1
        numbers = [x if x is None else numbers_of(x).detach() for x in tensors]
        return OnDevice(scaled_dot_product_attention(*numbers, **ctx.how))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *rows, mask = ctx.saved_tensors
        counts.launches["attention backward"] += 1
        with torch.enable_grad():
            leaves = [numbers_of(x).detach().requires_grad_() for x in rows]
            output = scaled_dot_product_attention(*leaves, numbers_of(mask), **ctx.how)
            found = torch.autograd.grad(output, leaves, numbers_of(grads[0]).to(output.dtype))
        return *map(OnDevice, found), None, None
