"""RMSNorm on a processor, in blocks of rows that stay in its cache.

transformers writes it as a chain of element-wise operations, and autograd's chain backward is three
times as long. On a long row each link reads and writes the memory: the norms of a 135M model took
as long as its matrix products. Here a block of rows passes through the whole chain before the next
one. Forward the operations are the same, so no bit changes; backward is the closed form.

A norm is only taken over if its class gives the same bits on a probe: Gemma's do not. Devices other
than a processor keep the class's own forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from alignkit.models.precision import product_dtype

ELEMENTS = 1 << 18
"""Numbers of a block: one megabyte of float32, half of a core's second-level cache."""


class Norm(NamedTuple):
    """What a norm computes with.

    Args:
        weight: `[H]`.
        epsilon: added to the mean square.
        wide: dtype of the input.
        dtype: of the result.
    """

    weight: torch.Tensor
    epsilon: float
    wide: torch.dtype
    dtype: torch.dtype

    def empty(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Room for the results of `apply`, for `[N, H]` rows."""
        inverse = x.new_empty(len(x), 1, dtype=torch.float32)
        # A wide stream is kept as narrow as what is made of it: all norms' inputs together are as
        # large as the model, and only the direction of x is read again.
        kept = (
            x
            if self.dtype.itemsize >= self.wide.itemsize
            else x.new_empty(x.shape, dtype=self.dtype)
        )
        return x.new_empty(x.shape, dtype=self.dtype), kept, inverse

    def apply(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[n, H]` rows -> y, not rounded to `dtype` yet, and `[n, 1]` 1 / sqrt(mean(x²) + ε)."""
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * (wide * inverse).to(self.wide), inverse

    def slopes(
        self, kept: torch.Tensor, inverse: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `[n, H]` rows: dx in float32, and x̂ in the dtype of x."""
        normed = kept.float() * inverse
        slope = grad.to(torch.promote_types(self.wide, self.weight.dtype)) * self.weight
        slope = slope.to(self.wide).float()
        shared = (slope * normed).mean(-1, keepdim=True)
        return slope.addcmul_(normed, shared, value=-1).mul_(inverse), normed.to(self.wide)


class _RmsNorm(torch.autograd.Function):
    """y = w ∘ x̂ with x̂ = x / sqrt(mean(x²) + ε) (Zhang and Sennrich, arXiv:1910.07467).

    Backward, with g = w ∘ dy: dx = (g - x̂ · mean(g ∘ x̂)) / sqrt(mean(x²) + ε), dw = Σ dy ∘ x̂.
    Shapes: x `[N, H]`, w `[H]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype
    ) -> torch.Tensor:
        norm = Norm(weight, epsilon, x.dtype, dtype)
        y, kept, inverse = norm.empty(x)
        for rows in blocks(x):
            y[rows], inverse[rows] = norm.apply(x[rows])
            if kept is not x:
                kept[rows] = x[rows]
        ctx.save_for_backward(kept, weight, inverse)
        ctx.about = norm[1:]
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, weight, inverse = ctx.saved_tensors
        norm = Norm(weight, *ctx.about)
        grad_x = torch.empty_like(kept, dtype=norm.wide)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in blocks(kept):
            grad_x[rows], normed = norm.slopes(kept[rows], inverse[rows], grad[rows])
            if ctx.needs_input_grad[1]:
                grad_weight += (grad[rows] * normed).sum(0, dtype=torch.float32)
        needed = ctx.needs_input_grad[1]
        return grad_x, grad_weight.to(weight.dtype) if needed else None, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """w ∘ x / sqrt(mean(x²) + ε) over the last dimension, as Llama computes it.

    Args:
        x: `[..., H]`.
        weight: `[H]`.
        epsilon: added to the mean square.

    Returns:
        `[..., H]` in the wider dtype of both, x̂ rounded to that of `x` before; under autocast in
        its dtype, because products read it.
    """
    dtype = output_dtype(x, weight)
    y: torch.Tensor = _RmsNorm.apply(x.reshape(-1, x.shape[-1]), weight, epsilon, dtype)
    return y.view(x.shape)


def output_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Of a norm: the wider of both; under autocast its dtype."""
    return product_dtype(x, torch.promote_types(x.dtype, weight.dtype))


def use_cpu_norms(model: nn.Module) -> int:
    """Let the norms of a model compute in blocks of rows on a processor.

    Args:
        model: of transformers, with or without adapters.

    Returns:
        Number of norms that do.
    """
    norms = [module for module in model.modules() if is_rms_norm(module)]
    for norm in norms:
        norm.forward = functools.partial(_forward, norm)
    return len(norms)


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    if x.device.type != "cpu":
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    if is_small(x):
        y: torch.Tensor = type(module).forward(module, x)
        return y.to(output_dtype(x, module.weight))
    return rms_norm(x, module.weight, module.variance_epsilon)


def is_small(x: torch.Tensor) -> bool:
    """Whether blocks would not help, as for a sampled token."""
    return x.numel() <= ELEMENTS and not torch.is_grad_enabled()


def is_rms_norm(module: Any) -> bool:
    """Whether a module on a processor computes what `rms_norm` does."""
    weight, own = getattr(module, "weight", None), type(module).forward
    if not hasattr(module, "variance_epsilon") or not isinstance(weight, torch.Tensor):
        return False
    if (
        weight.ndim != 1
        or weight.device.type != "cpu"
        or len(inspect.signature(own).parameters) != 2
    ):
        return False
    # Where a class rounds only shows where the input is narrower than weights that are not 1.
    return all(_same_bits(module, dtype) for dtype in (weight.dtype, torch.bfloat16, torch.float32))


def _same_bits(module: Any, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    size, kind = len(module.weight), module.weight.dtype
    x = torch.randn(2, 3, size, generator=generator).to(dtype)
    weight = torch.randn(size, generator=generator).to(kind)
    with torch.no_grad():
        expected = functional_call(module, {"weight": weight}, (x,))
        found = rms_norm(x, weight, module.variance_epsilon)
    return found.dtype == expected.dtype and torch.equal(found, expected)


def blocks(x: torch.Tensor) -> Iterator[slice]:
    """Slices of `[N, H]` that cover its rows in order, each of a size that stays in cache."""
    step = max(1, ELEMENTS // x.shape[1])
    return (slice(start, start + step) for start in range(0, len(x), step))
