"""The precision of a forward pass: narrow products, added to a wide residual stream.

A narrow residual stream is rounded after each of its additions, twice a layer. Log-probs of a
400-token completion then move by more than a training step moves them. Kept in float32 it costs
some memory traffic and no product.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def compute_context(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Matrix products in `dtype`, the residual stream in float32; nothing changes for float32.

    Args:
        model: of transformers; its weights may be stored in `dtype` or wider.
        dtype: compute precision.
    """
    if dtype == torch.float32:
        yield
        return
    embeddings = model.get_input_embeddings()
    # Autocast leaves additions alone: wide where the stream begins, wide to its end.
    hook = embeddings.register_forward_hook(lambda module, args, output: output.float())
    try:
        with torch.autocast(next(model.parameters()).device.type, dtype=dtype):
            yield
    finally:
        hook.remove()


def widen_layer_norms(model: nn.Module) -> int:
    """Let LayerNorms with narrow weights read a float32 stream, on every device.

    Each computes what its class does, y = w ∘ (x - mean(x)) / sqrt(var(x) + ε) + b (Ba et al.,
    arXiv:1607.06450), in the wider dtype of x and w. Autocast does so on a GPU; on a CPU torch
    refuses the mixture.

    Args:
        model: of transformers, with or without adapters.

    Returns:
        Number of norms that do.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    for norm in norms:
        norm.forward = functools.partial(_in_wider_dtype, norm)  # type: ignore[method-assign]
    return len(norms)


def _in_wider_dtype(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """The norm of x `[..., H]`, in the same shape."""
    weights = [weight for weight in (norm.weight, norm.bias) if weight is not None]
    dtype = functools.reduce(torch.promote_types, (weight.dtype for weight in weights), x.dtype)
    output: torch.Tensor = type(norm).forward(_Widened(norm, dtype), x.to(dtype))
    return output


class _Widened:
    """A norm whose weights are wider, as the forward of its class sees it.

    Args:
        norm: a LayerNorm, with weights or without.
        dtype: of the weights.
    """

    def __init__(self, norm: Any, dtype: torch.dtype) -> None:
        self.norm = norm
        self.weight, self.bias = (p if p is None else p.to(dtype) for p in (norm.weight, norm.bias))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.norm, name)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype of sums that a float32 one would round too much, such as a sequence's log-prob: float64
    where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def product_dtype(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype in which products are computed: autocast's dtype if that is on.

    Args:
        x: a tensor on their device.
        dtype: the one without autocast; None is that of `x`.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype if dtype is None else dtype
