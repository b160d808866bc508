"""The fast LoRA matmul behind PEFT's own modules: y = x Wᵀ + s · (x Aᵀ) Bᵀ in one function.

PEFT computes the same with several autograd nodes: a float32 copy of the input, a cast back under
autocast, a scaled product and an addition, each with its own buffers. Here the input is kept once
and shared by the layers that read it, products are added in place, and the low-rank factors are
cast to the compute dtype for the product only, or once for all of a sampling. In bfloat16 PEFT adds
the update to an output that is rounded already, where small updates vanish; here the sum is rounded
once. Modules, parameter names and files stay PEFT's.

Layers with dropout, DoRA or several active adapters keep PEFT's code. A 4-bit weight is dense only
while it is multiplied, once in each direction.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from alignkit.models.products import add_product, product
from alignkit.models.quantized import dense_weight, is_quantized, weight_dtype


class _LoraProduct(torch.autograd.Function):
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ with W and b frozen.

    Shapes: x `[T, I]`, W `[O, I]`, A `[r, I]`, B `[O, r]`, y `[T, O]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        narrow_a: torch.Tensor,
        narrow_b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        y, low = _product(x, weight, bias, narrow_a, narrow_b, scale)
        ctx.save_for_backward(x, narrow_a, narrow_b, low)
        ctx.weight, ctx.scale = weight, scale  # frozen: no in-place change to guard against
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, narrow_a, narrow_b, low = ctx.saved_tensors
        grad_low = torch.mm(grad, narrow_b).mul_(ctx.scale)
        grad_a = torch.mm(grad_low.T, x).float()
        grad_b = torch.mm(grad.T, low).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = add_product(torch.mm(grad_low, narrow_a), grad, dense_weight(ctx.weight))
        return grad_x, None, None, grad_a, grad_b, None, None, None


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    narrow_a: torch.Tensor,
    narrow_b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y `[T, O]`, and s · x Aᵀ `[T, r]`."""
    low = torch.mm(x, narrow_a.T).mul_(scale)
    # The small term first, so that the sum is rounded once. Added to an xWᵀ that is already
    # rounded to bfloat16, an update below half a unit in its last place would vanish.
    y = add_product(torch.mm(low, narrow_b.T), x, dense_weight(weight).T)
    if bias is not None:
        y += bias
    return y, low


def use_fast_lora(model: nn.Module) -> int:
    """Let every eligible LoRA layer of a PEFT model compute with one function.

    Args:
        model: carries LoRA layers.

    Returns:
        Number of layers that do.
    """
    eligible = [module for module in model.modules() if _is_eligible(module)]
    for module in eligible:
        module.forward = functools.partial(_forward, module)
    return len(eligible)


@contextlib.contextmanager
def fixed_factors(model: nn.Module) -> Iterator[None]:
    """Cast the factors of each adapter once, at its first use within.

    Only where no weight changes meanwhile, as in sampling: a step on few tokens would spend a tenth
    of its time on casts. Elsewhere they are cast at every use, because a fused optimizer changes
    weights without raising the version by which a kept copy could be told.

    Args:
        model: carries LoRA layers.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.kept_factors = {}
    try:
        yield
    finally:
        for layer in layers:
            del layer.kept_factors


def _narrow(
    module: Any, name: str, factors: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """A and B of an adapter in the compute dtype."""
    kept = module.__dict__.get("kept_factors")
    if kept is None:
        return tuple(factor.detach().to(dtype) for factor in factors)
    if (name, dtype) not in kept:
        kept[name, dtype] = tuple(factor.detach().to(dtype) for factor in factors)
    found: tuple[torch.Tensor, ...] = kept[name, dtype]
    return found


def _is_eligible(module: nn.Module) -> bool:
    if not isinstance(module, LoraLayer) or not hasattr(module, "get_base_layer"):
        return False
    base = module.get_base_layer()
    plain = type(module) is LoraLinear and type(base) is nn.Linear
    if not plain and not (isinstance(base, nn.Linear) and is_quantized(base)):
        return False
    return not (
        base.weight.requires_grad
        or module.fan_in_fan_out
        or any(module.use_dora.values())
        or any(module.lora_bias.values())
        or any(not isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())
    )


def _forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The module's output; PEFT's own code where its state asks for more than one plain adapter."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if args or kwargs or module.merged or (len(names) != 1 and not module.disable_adapters):
        output: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
        return output
    base = module.get_base_layer()
    flat = x.to(weight_dtype(base.weight)).reshape(-1, x.shape[-1])
    if module.disable_adapters:
        # In the same steps as below: a fresh adapter must change no bit.
        plain = product(flat, dense_weight(base.weight).T)
        plain = plain if base.bias is None else plain + base.bias
        return plain.view(*x.shape[:-1], -1)
    name = names[0]
    factors, scale = (module.lora_A[name].weight, module.lora_B[name].weight), module.scaling[name]
    narrow = _narrow(module, name, factors, flat.dtype)
    if torch.is_grad_enabled():
        result = _LoraProduct.apply(flat, base.weight, base.bias, *factors, *narrow, scale)
    else:
        result, _ = _product(flat, base.weight, base.bias, *narrow, scale)
    return result.view(*x.shape[:-1], -1)
