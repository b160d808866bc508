"""RMSNorm on the device: one kernel forward and one backward, as torch has them for CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from standin.counts import counts
from standin.tensor import OnDevice, numbers_of


def fused_norm(x: Tensor, shape: list[int], weight: Tensor, epsilon: float) -> Any:
    """`(y, 1 / sqrt(mean(x²) + ε))`, in place of `aten._fused_rms_norm`."""
    assert x.dtype == weight.dtype, "the fused kernel takes one precision"
    return _Norm.apply(x, weight, list(shape), epsilon)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, shape: list[int], epsilon: float
    ) -> tuple[Tensor, Tensor]:
        counts.launches["norm forward"] += 1
        ctx.save_for_backward(x, weight)
        ctx.about = shape, epsilon
        numbers = [numbers_of(t).detach() for t in (x, weight)]
        inverse = (numbers[0].square().mean(-1, keepdim=True) + epsilon).rsqrt()
        y = OnDevice(torch.ops.aten.rms_norm(numbers[0], shape, numbers[1], epsilon))
        return y, OnDevice(inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        counts.launches["norm backward"] += 1
        shape, epsilon = ctx.about
        with torch.enable_grad():
            leaves = [numbers_of(t).detach().requires_grad_() for t in ctx.saved_tensors]
            y = torch.ops.aten.rms_norm(leaves[0], shape, leaves[1], epsilon)
            found = torch.autograd.grad(y, leaves, numbers_of(grads[0]).to(y.dtype))
        return *map(OnDevice, found), None, None
