"""The fast LoRA matmul behind PEFT's own modules: y = x Wᵀ + s · (x Aᵀ) Bᵀ in one function.

PEFT computes the same with several autograd nodes: a float32 copy of the input, a cast back under
autocast, a scaled product and an addition, each with its own buffers. Here the input is kept once
and shared by the layers that read it, products are added in place, and the low-rank factors are
cast to the compute dtype for the product only, or once for a whole sampling. In bfloat16 PEFT adds
the update to an output that is rounded already, where small updates vanish; here the sum is rounded
once. Modules, parameter names and files stay PEFT's.

Layers with dropout, DoRA or several active adapters keep PEFT's code. A quantized weight is dense
only while it is multiplied, once in each direction.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from alignkit.models.kernels.factors import Factors, Frozen, group_of, scaled_rows
from alignkit.models.kernels.quantized import dense_weight, is_quantized, weight_dtype
from alignkit.models.kernels.remade import Remade, how_made

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names in transformers' models of layers that read the same input."""


class _LoraProduct(torch.autograd.Function):
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ of each layer that reads x, with W and b frozen.

    Shapes: x `[T, I]`, W `[O, I]`, A `[r, I]`, B `[O, r]`, y `[T, O]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: Sequence[Frozen],
        narrow: Factors,
        made: Remade | None,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        outputs, low = _products(x, layers, narrow)
        sources, ctx.make = made or ((x,), None)
        ctx.save_for_backward(low, narrow.a, *narrow.b, *sources)
        ctx.layers = layers  # frozen: no in-place change to guard against
        ctx.dtype = x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        low, narrow_a, *others = ctx.saved_tensors
        narrow_b, sources = others[: len(grads)], others[len(grads) :]
        x = sources[0] if ctx.make is None else ctx.make(*sources).to(ctx.dtype).view(len(low), -1)
        ranks = [layer.rank for layer in ctx.layers]
        grad_low = _products_beside(grads, narrow_b, ranks)
        by_rank = _factor_gradient(grad_low, x)
        grad_a = scaled_rows(by_rank, [layer.scale for layer in ctx.layers], ranks).split(ranks)
        grad_b = _gradients_of_b(low, grads, ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_low, narrow_a)
            for grad, layer in zip(grads, ctx.layers, strict=True):
                grad_x.addmm_(grad, dense_weight(layer.base))
        return grad_x, None, None, None, *itertools.chain(*zip(grad_a, grad_b, strict=True))


def _products_beside(
    grads: Sequence[torch.Tensor], narrow_b: Sequence[torch.Tensor], ranks: Sequence[int]
) -> torch.Tensor:
    """`[T, Σr]` dy B of each layer, one beside the other."""
    if grads[0].device.type == "cpu":
        return torch.cat([grad @ b for grad, b in zip(grads, narrow_b, strict=True)], dim=1)
    beside = grads[0].new_empty(len(grads[0]), sum(ranks))
    for grad, b, part in zip(grads, narrow_b, beside.split(list(ranks), dim=1), strict=True):
        torch.mm(grad, b, out=part)
    return beside


def _factor_gradient(grad_low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`[Σr, I]` float32 (dy B)ᵀ x."""
    # On a CPU transposed in memory first: the product gains more time than the copy takes.
    across = grad_low.T.contiguous() if x.device.type == "cpu" else grad_low.T
    return torch.mm(across, x).float()


def _gradients_of_b(
    low: torch.Tensor, grads: Sequence[torch.Tensor], ranks: Sequence[int]
) -> list[torch.Tensor]:
    """`[O, r]` float32 dyᵀ (s x Aᵀ) of each layer."""
    if low.device.type == "cpu":
        parts = low.T.contiguous().split(list(ranks))
        return [torch.mm(part, grad).T.float() for part, grad in zip(parts, grads, strict=True)]
    # In the layout of B: autograd would copy another one.
    parts = low.split(list(ranks), dim=1)
    return [torch.mm(grad.T, part).float() for part, grad in zip(parts, grads, strict=True)]


def _products(
    x: torch.Tensor, layers: Sequence[Frozen], narrow: Factors
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """y `[T, O]` of each layer, and all s · x Aᵀ, `[T, Σr]`."""
    low, outputs = torch.mm(x, narrow.a.T), []
    parts = low.split([layer.rank for layer in layers], dim=1)
    for layer, part, b in zip(layers, parts, narrow.b, strict=True):
        # The small term first, so that the sum is rounded once. Added to an xWᵀ that is already
        # rounded to bfloat16, an update below half a unit in its last place would vanish.
        y = torch.mm(part, b.T).addmm_(x, dense_weight(layer.base).T)
        if layer.base.bias is not None:
            y += layer.base.bias
        outputs.append(y)
    return outputs, low


def use_fast_lora(model: nn.Module) -> int:
    """Let every eligible LoRA layer of a PEFT model compute with one function.

    Args:
        model: carries LoRA layers.

    Returns:
        Number of layers that do.
    """
    eligible: list[Any] = [module for module in model.modules() if _is_eligible(module)]
    for module in eligible:
        module.readers = Readers([module])
        module.forward = functools.partial(_forward, module)
    among = set(eligible)
    for parent in model.modules():
        for names in TOGETHER:
            siblings = [getattr(parent, name, None) for name in names]
            readers = Readers([module for module in siblings if module in among])
            for module in readers.layers:
                module.readers = readers
    return len(eligible)


class Readers:
    """Layers of one parent that read the same input: the first that is called computes for all.

    A(x) of all is one product then, and so are the gradients of all A; the gradients of x are added
    up as they are computed. A layer that is called with another input computes alone. Weights must
    not change between the calls of one pass.

    Args:
        layers: in the order in which their parent calls them.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.input: torch.Tensor | None = None
        self.how = ("", False)
        self.outputs: dict[int, torch.Tensor] = {}

    def alike(self, first: Any, name: str) -> list[Any]:
        """`first`, and the layers in the same state, for which it computes too."""
        if first is not self.layers[0]:
            return [first]
        dtype = weight_dtype(first.get_base_layer())
        return [layer for layer in self.layers if layer is first or _computes(layer, name, dtype)]

    def give(
        self, layers: Sequence[Any], name: str, x: torch.Tensor, outputs: Sequence[torch.Tensor]
    ) -> None:
        """Keep outputs until their layers are called."""
        self.outputs = {id(layer): y for layer, y in zip(layers, outputs, strict=True)}
        self.input = x if self.outputs else None
        self.how = name, torch.is_grad_enabled()

    def take(self, layer: Any, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """A layer's kept output, given out once; None if there is none."""
        if x is not self.input or (name, torch.is_grad_enabled()) != self.how:
            return None
        output = self.outputs.pop(id(layer), None)
        if not self.outputs:
            self.input = None
        return output


def _computes(layer: Any, name: str, dtype: torch.dtype) -> bool:
    return (
        not layer.merged
        and not layer.disable_adapters
        and [other for other in layer.active_adapters if other in layer.lora_A] == [name]
        and weight_dtype(layer.get_base_layer()) == dtype
    )


def _is_eligible(module: nn.Module) -> bool:
    kind: type = type(module)
    if not isinstance(module, LoraLayer) or not hasattr(module, "get_base_layer"):
        return False
    base = module.get_base_layer()
    plain = kind is LoraLinear and type(base) is nn.Linear
    if not plain and not (isinstance(base, nn.Linear) and is_quantized(base)):
        return False
    return not (
        base.weight.requires_grad
        or module.fan_in_fan_out
        or any(module.use_dora.values())
        or getattr(module, "lora_variant", None)  # further kinds that compute something else
        or any(module.lora_bias.values())
        or any(not isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())
    )


def _forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The module's output; PEFT's own code if its state needs more than one plain adapter."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if args or kwargs or module.merged or (len(names) != 1 and not module.disable_adapters):
        output: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
        return output
    readers: Readers = module.readers
    ready = None if module.disable_adapters else readers.take(module, names[0], x)
    if ready is not None:
        return ready
    base = module.get_base_layer()
    flat = x.to(weight_dtype(base)).reshape(-1, x.shape[-1])
    if module.disable_adapters:
        # In the same steps as below: a fresh adapter must change no bit.
        plain = _frozen_product(flat, dense_weight(base))
        plain = plain if base.bias is None else plain + base.bias
        return plain.view(*x.shape[:-1], -1)
    name = names[0]
    layers, frozen, factors = group_of(module, name, flat.dtype)
    outputs: Sequence[torch.Tensor]
    if torch.is_grad_enabled():
        pairs = ((layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in layers)
        weights = itertools.chain(*pairs)
        outputs = _LoraProduct.apply(flat, frozen, factors, how_made(x), *weights)  # type: ignore[no-untyped-call]
    else:
        outputs, _ = _products(flat, frozen, factors)
    first, *others = (y.view(*x.shape[:-1], -1) for y in outputs)
    if module is readers.layers[0]:
        readers.give(layers[1:], name, x, others)
    return first


def _frozen_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ in the bits that it has beside a B of zeros.

    cuBLAS may take another kernel for a product that is added to something.
    """
    if x.device.type != "cuda":
        return torch.mm(x, weight.T)
    return x.new_zeros(len(x), len(weight)).addmm_(x, weight.T)
