"""The gated product of a feed-forward layer, without what it can compute again.

y = σ(g) ∘ u (Shazeer, arXiv:2002.05202), with g = x W_gateᵀ and u = x W_upᵀ. Autograd keeps g, σ(g)
and u for the backward pass, and y for the product that reads it: together half of what a layer
keeps. Here g and u are kept. The operations are those of transformers, so no bit changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from alignkit.models.kernels.blocks import row_blocks
from alignkit.models.kernels.remade import can_be_remade

Activation = Callable[[torch.Tensor], torch.Tensor]


class _GatedProduct(torch.autograd.Function):
    """y = σ(g) ∘ u; backward dg = σ'(g) ∘ u ∘ dy, du = σ(g) ∘ dy. All `[..., I]`."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _product(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for g, u, dy, dg, du in _blocks(gate, up, grad, grad_gate, grad_up):
            with torch.enable_grad():
                g = g.detach().requires_grad_()
                activated = ctx.activation(g)
            torch.mul(dy, activated.detach(), out=du)
            (slope,) = torch.autograd.grad(activated, g, dy * u)
            dg.copy_(slope)
        return grad_gate, grad_up, None


def _product(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    y = torch.empty_like(gate)
    for g, u, block in _blocks(gate, up, y):
        torch.mul(activation(g), u, out=block)
    return y


def _blocks(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The tensors in blocks of rows on a CPU, each as one block elsewhere."""
    if tensors[0].device.type != "cpu":
        return [tensors]
    flat = [x.view(-1, x.shape[-1]) for x in tensors]
    return [tuple(x[rows] for x in flat) for rows in row_blocks(flat[0])]


def use_gated_products(model: nn.Module) -> int:
    """Let the feed-forward layers of a model keep two tensors instead of four.

    A layer is changed only if its class computes `down(σ(gate(x)) ∘ up(x))`, which is tried.

    Args:
        model: of transformers, with or without adapters.

    Returns:
        Number of layers that do.
    """
    layers = [module for module in model.modules() if _is_gated(module)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    return len(layers)


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    y: torch.Tensor = _GatedProduct.apply(gate, up, layer.act_fn)  # type: ignore[no-untyped-call]
    make = functools.partial(_product, activation=layer.act_fn)
    return layer.down_proj(can_be_remade(y, (gate, up), make))  # type: ignore[no-any-return]


def _is_gated(module: Any) -> bool:
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return False
    own = type(module).forward
    if len(inspect.signature(own).parameters) != 2 or any(module.act_fn.parameters()):
        return False
    x, activation = torch.linspace(-4, 4, 16), module.act_fn
    parts = SimpleNamespace(
        gate_proj=lambda x: 1.5 * x, up_proj=torch.sin, down_proj=torch.cos, act_fn=activation
    )
    try:
        found = own(parts, x)
    except AttributeError:  # it uses something else as well
        return False
    return torch.equal(found, torch.cos(activation(1.5 * x) * torch.sin(x)))
