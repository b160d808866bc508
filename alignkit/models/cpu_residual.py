"""A residual addition and the norm after it in one pass over the stream, on a processor.

The stream is float32 around narrow products. Apart, the addition widens its branch into a copy,
writes the sum, and the norm reads it again; backward as much once more. Together, a block of rows
is added and normed while it is in cache.

A decoder layer is taken over if it is wired as Llama's is: its own forward and the one below give
the same on a copy whose parts are stubs. Layers that recompute their activations keep their code.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from alignkit.models.cpu_norm import Norm, blocks, is_rms_norm, is_small, output_dtype

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""Children of a layer with one norm before each branch."""


class _AddNorm(torch.autograd.Function):
    """h = x + b and y = norm(h), for x and b `[N, H]`; see `cpu_norm` for the norm.

    Backward: dx = db = dh + the norm's slope at h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        stream: torch.Tensor,
        branch: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norm = Norm(weight, epsilon, stream.dtype, dtype)
        total = torch.empty_like(stream)
        y, kept, inverse = norm.empty(total)
        for rows in blocks(stream):
            added = stream[rows] + branch[rows]
            total[rows] = added
            y[rows], inverse[rows] = norm.apply(added)
            if kept is not total:
                kept[rows] = added
        ctx.save_for_backward(kept, weight, inverse)
        ctx.about, ctx.narrow = norm[1:], branch.dtype
        return total, y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_y: torch.Tensor) -> tuple[Any, ...]:
        kept, weight, inverse = ctx.saved_tensors
        norm = Norm(weight, *ctx.about)
        grad_stream, grad_branch = (
            torch.empty_like(kept, dtype=dtype) for dtype in (norm.wide, ctx.narrow)
        )
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in blocks(kept):
            slope, normed = norm.slopes(kept[rows], inverse[rows], grad_y[rows])
            slope += grad[rows]
            grad_stream[rows] = slope
            grad_branch[rows] = slope
            if ctx.needs_input_grad[2]:
                grad_weight += (grad_y[rows] * normed).sum(0, dtype=torch.float32)
        needed = ctx.needs_input_grad[2]
        return (
            grad_stream,
            grad_branch,
            grad_weight.to(weight.dtype) if needed else None,
            None,
            None,
        )


def add_norm(
    stream: torch.Tensor, branch: torch.Tensor, norm: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both the sum and its norm.

    Args:
        stream: `[B, T, H]`, at least as wide a dtype as `branch`.
        branch: `[B, T, H]`.
        norm: any module; an RMS norm on a processor is computed with the sum.

    Returns:
        `[B, T, H]` of the dtype of `stream`, and what `norm` makes of it.
    """
    wide = torch.promote_types(stream.dtype, branch.dtype) == stream.dtype
    if not wide or is_small(stream) or not getattr(norm, "in_blocks", False):
        total = stream + branch
        return total, norm(total)
    flat = (x.reshape(-1, x.shape[-1]) for x in (stream, branch))
    about = norm.weight, norm.variance_epsilon, output_dtype(stream, norm.weight)
    total, y = _AddNorm.apply(*flat, *about)
    return total.view(stream.shape), y.view(stream.shape)


def use_cpu_residuals(model: nn.Module) -> int:
    """Let the decoder layers of a model add and norm in one pass on a processor.

    Args:
        model: of transformers, with or without adapters.

    Returns:
        Number of layers that do.
    """
    layers = [module for module in model.modules() if _is_eligible(module)]
    for layer in layers:
        layer.post_attention_layernorm.in_blocks = True
        layer.forward = functools.partial(_forward, layer)
    return len(layers)


def _forward(layer: Any, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
    recomputes = getattr(layer, "gradient_checkpointing", False) and layer.training
    if args or recomputes or hidden_states.device.type != "cpu":
        return type(layer).forward(layer, hidden_states, *args, **options)
    normed = layer.input_layernorm(hidden_states)
    branch, _ = layer.self_attn(hidden_states=normed, **options)
    stream, normed = add_norm(hidden_states, branch, layer.post_attention_layernorm)
    return stream + layer.mlp(normed)


def _is_eligible(module: Any) -> bool:
    names = {name for name, _ in module.named_children()}
    return names == PARTS and is_rms_norm(module.post_attention_layernorm) and _is_wired(module)


class _Stub(nn.Module):
    """x -> a x² + 1, and what it was called with."""

    def __init__(self, slope: float, pair: bool) -> None:
        super().__init__()
        self.slope, self.pair, self.calls = slope, pair, []

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
        self.calls.append(options)
        y = self.slope * hidden_states.square() + 1.0
        return (y, None) if self.pair else y


def _is_wired(layer: Any) -> bool:
    """Whether a layer's own forward does with its parts what `_forward` does."""
    slopes = {name: 0.5 + 0.25 * number for number, name in enumerate(sorted(PARTS))}
    names = ("attention_mask", "position_ids", "past_key_values", "use_cache", "segments")
    options = {name: object() for name in (*names, "position_embeddings")}
    twin, found = copy.copy(layer), []
    x = torch.linspace(-1.0, 1.0, 12).view(1, 3, 4)
    for forward in (type(layer).forward, _forward):
        stubs = {name: _Stub(slope, name == "self_attn") for name, slope in slopes.items()}
        twin.__dict__["_modules"] = stubs
        try:
            y = forward(twin, x, **options)
        except (TypeError, ValueError, AttributeError, RuntimeError):
            return False
        found.append((y, [stubs[name].calls for name in slopes]))
    (own, calls), (ours, our_calls) = found
    return isinstance(own, torch.Tensor) and torch.equal(own, ours) and calls == our_calls
