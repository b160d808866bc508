"""RMSNorm in one pass: on a CPU in blocks of rows that stay in its cache, on CUDA torch's kernel.

transformers writes it as a chain of element-wise operations, and autograd's chain backward is three
times as long: on a CPU the norms of a 135M model took as long as its matrix products. There the
operations forward are the same, so no bit changes; backward is the closed form.

A norm is replaced only if its class gives the same bits on a probe: Gemma's does not. Other devices
keep the class's own forward.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from alignkit.models.kernels.blocks import ELEMENTS, buffers, row_blocks
from alignkit.models.kernels.precision import product_dtype
from alignkit.models.kernels.remade import can_be_remade


class _RmsNorm(torch.autograd.Function):
    """y = w ∘ x̂ with x̂ = x / sqrt(mean(x²) + ε) (Zhang and Sennrich, arXiv:1910.07467).

    Backward, with g = w ∘ dy: dx = (g - x̂ · mean(g ∘ x̂)) / sqrt(mean(x²) + ε), dw = Σ dy ∘ x̂.
    Shapes: x `[N, H]`, w `[H]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.new_empty(x.shape, dtype=dtype)
        inverse = x.new_empty(len(x), 1, dtype=torch.float32)
        # A wide input is kept as narrow as the output. Backward needs only its direction, and the
        # inputs of all norms take a tenth of a step's memory.
        narrow = dtype.itemsize < x.dtype.itemsize
        kept = torch.empty_like(y) if narrow else x
        (room,) = buffers(x, 1, torch.float32)
        for rows in row_blocks(x):
            wide, scale, normed = x[rows].float(), inverse[rows], room[: rows.stop - rows.start]
            torch.mul(wide, wide, out=normed)
            torch.mean(normed, -1, keepdim=True, out=scale).add_(epsilon).rsqrt_()
            torch.mul(wide, scale, out=normed)
            y[rows] = _weighted(normed, x.dtype, weight)
            if narrow:
                kept[rows] = wide
        ctx.save_for_backward(kept, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        ctx.dtype = x.dtype
        return y, inverse

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        kept, weight, inverse = ctx.saved_tensors
        factor = weight.to(torch.promote_types(ctx.dtype, weight.dtype))
        grad_x = torch.empty_like(kept, dtype=ctx.dtype)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        room = buffers(kept, 3, torch.float32)
        for rows in row_blocks(kept):
            normed, slope, product = room[:, : rows.stop - rows.start]
            normed.copy_(kept[rows]).mul_(inverse[rows])
            if ctx.needs_input_grad[1]:
                grad_weight += (grad[rows] * normed.to(ctx.dtype)).sum(0, dtype=torch.float32)
            slope.copy_(grad[rows]).mul_(factor)
            shared = torch.mul(slope, normed, out=product).mean(-1, keepdim=True)
            slope.addcmul_(normed, shared, value=-1)
            torch.mul(slope, inverse[rows], out=grad_x[rows])
        needed = ctx.needs_input_grad[1]
        return grad_x, grad_weight.to(weight.dtype) if needed else None, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """w ∘ x / sqrt(mean(x²) + ε) over the last dimension, as Llama computes it.

    Args:
        x: `[..., H]`.
        weight: `[H]`.
        epsilon: added to the mean square.

    Returns:
        `[..., H]` in the wider dtype of both, x̂ first rounded to that of `x`; under autocast in its
        dtype, because products read it.
    """
    dtype = _output_dtype(x, weight)
    flat = x.reshape(-1, x.shape[-1])
    y, inverse = _RmsNorm.apply(flat, weight, epsilon, dtype)  # type: ignore[no-untyped-call]
    y = y.view(x.shape)
    if dtype.itemsize < x.dtype.itemsize:  # what is kept of x does not give the same bits
        return y  # type: ignore[no-any-return]
    return can_be_remade(y, (flat, weight, inverse), functools.partial(_normed, dtype=dtype))


def _normed(
    x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The output once more."""
    y = x.new_empty(x.shape, dtype=dtype)
    for rows in row_blocks(x):
        y[rows] = _weighted(x[rows].float() * inverse[rows], x.dtype, weight)
    return y


def _weighted(normed: torch.Tensor, dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    """w ∘ x̂, with x̂ rounded to the input's dtype: nothing changes if that is float32."""
    factor = weight.to(torch.promote_types(dtype, weight.dtype))
    return normed.to(dtype).to(factor.dtype).mul_(factor)


def _output_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    return product_dtype(x, torch.promote_types(x.dtype, weight.dtype))


def use_fast_norms(model: nn.Module) -> int:
    """Let the norms of a model compute in one pass.

    Args:
        model: of transformers, with or without adapters.

    Returns:
        Number of norms that do.
    """
    norms = [module for module in model.modules() if _is_rms_norm(module)]
    for norm in norms:
        norm.forward = functools.partial(_forward, norm)
    return len(norms)


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cuda":
        return _fused(module, x)
    if x.device.type != "cpu":
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    if x.numel() <= ELEMENTS and not torch.is_grad_enabled():  # as for a sampled token
        y: torch.Tensor = type(module).forward(module, x)
        return y.to(_output_dtype(x, module.weight))
    return rms_norm(x, module.weight, module.variance_epsilon)


def _fused(module: Any, x: torch.Tensor) -> torch.Tensor:
    """One kernel in each direction, where the class's own chain has a dozen."""
    weight = module.weight.to(torch.promote_types(x.dtype, module.weight.dtype))
    y = F.rms_norm(x.to(weight.dtype), weight.shape, weight, module.variance_epsilon)
    return y.to(_output_dtype(x, module.weight))


def _is_rms_norm(module: Any) -> bool:
    weight, own = getattr(module, "weight", None), type(module).forward
    if not hasattr(module, "variance_epsilon") or not isinstance(weight, torch.Tensor):
        return False
    if weight.ndim != 1 or len(inspect.signature(own).parameters) != 2:
        return False
    if weight.device.type not in ("cpu", "cuda"):
        return False
    # Where a class rounds shows only if the input is narrower than weights that are not 1.
    return all(_same_bits(module, dtype) for dtype in (weight.dtype, torch.bfloat16, torch.float32))


def _same_bits(module: Any, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    size, kind = len(module.weight), module.weight.dtype
    x = torch.randn(2, 3, size, generator=generator).to(dtype)
    weight = torch.randn(size, generator=generator).to(kind)
    with torch.no_grad():
        expected = functional_call(module, {"weight": weight}, (x,))
        actual = rms_norm(x, weight, module.variance_epsilon)
    return actual.dtype == expected.dtype and torch.equal(actual, expected)
