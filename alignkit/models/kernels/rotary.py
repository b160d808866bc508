"""Rotary position embedding on a processor, in blocks of tokens that stay in its cache.

transformers writes it as a chain of element-wise operations over all queries and keys, twice as
wide under autocast as what attention reads. Here a block of tokens passes through the whole chain
in the width of the angles and is rounded once, to what attention reads; backward is the transposed
rotation.

An attention layer calls a function of its module. It is given a copy of its own forward that calls
the one below instead, if both give the same bits on a probe; nothing else in the process changes.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import nn

from alignkit.models.kernels.blocks import buffers, row_blocks
from alignkit.models.kernels.precision import product_dtype

NAME = "apply_rotary_pos_emb"
"""What the modules of transformers call theirs."""


class _Rotation(torch.autograd.Function):
    """y = x ∘ cos + (-x₂, x₁) ∘ sin for the halves x = (x₁, x₂) (Su et al., arXiv:2104.09864).

    Shapes: x `[N, H, D]`, cos and signed = (-sin₁, sin₂) `[N, D]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, signed)
        ctx.dtype = x.dtype
        return _turn(x, cos, signed, dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        cos, signed = ctx.saved_tensors
        back = signed.roll(signed.shape[-1] // 2, dims=-1)
        return _turn(grad, cos, back, ctx.dtype), None, None, None


def _turn(
    x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x ∘ cos + (x₂, x₁) ∘ signed."""
    y = x.new_empty(x.shape, dtype=dtype)
    half = x.shape[-1] // 2
    room = buffers(x, 2, cos.dtype)
    for rows in row_blocks(x):
        turned, crossed = room[:, : rows.stop - rows.start]
        turned.copy_(x[rows])
        angles = signed[rows, None]
        torch.mul(turned[..., half:], angles[..., :half], out=crossed[..., :half])
        torch.mul(turned[..., :half], angles[..., half:], out=crossed[..., half:])
        y[rows] = turned.mul_(cos[rows, None]).add_(crossed)
    return y


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys turned by their positions, as Llama does.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, K, T, D]`.
        cos: `[B, T, D]` or `[1, T, D]`, at least as wide a dtype as queries and keys.
        sin: the same.

    Returns:
        Both in the dtype of the angles; under autocast in its dtype, because products read them.
    """
    count, half = len(query), sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    cosines, sines = (x.expand(count, -1, -1).flatten(0, 1) for x in (cos, signed))
    turn = _Rotation.apply if torch.is_grad_enabled() else _turn
    outputs = []
    for x in (query, key):
        tokens = x.transpose(1, 2)  # as the projection wrote them
        turned = turn(tokens.flatten(0, 1), cosines, sines, product_dtype(cos))
        outputs.append(turned.view(tokens.shape).transpose(1, 2))
    return outputs[0], outputs[1]


def use_cpu_rotation(model: nn.Module) -> int:
    """Let the attention layers of a model turn queries and keys in blocks on a processor.

    Args:
        model: of transformers, with or without adapters.

    Returns:
        Number of layers that do.
    """
    layers = [module for module in model.modules() if _is_eligible(module)]
    for layer in layers:
        layer.forward = types.MethodType(_with_rotation(type(layer).forward), layer)
    return len(layers)


@functools.cache
def _with_rotation(forward: Any) -> Any:
    """A copy of an attention layer's forward that calls `_chosen` with its module's function."""
    own = forward.__globals__[NAME]
    names = {**forward.__globals__, NAME: functools.partial(_chosen, own)}
    copy = types.FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _chosen(own: Any, query: Any, key: Any, cos: Any, sin: Any, *args: Any, **options: Any) -> Any:
    """`rotate` where it computes what the module's `own` function does, and faster."""
    whole = cos.ndim == 3 and cos.shape[-1] == query.shape[-1]  # some turn a part of each head
    wide = cos.dtype.itemsize >= max(4, query.dtype.itemsize)
    if args or options or query.device.type != "cpu" or not (whole and wide):
        return own(query, key, cos, sin, *args, **options)
    return rotate(query, key, cos, sin)


def _is_eligible(module: Any) -> bool:
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or inspect.unwrap(forward) is not forward:
        return False
    if NAME not in forward.__code__.co_names or not hasattr(module, "head_dim"):
        return False
    weights = next(module.parameters(), None)
    own = forward.__globals__.get(NAME)
    on_cpu = weights is not None and weights.device.type == "cpu"
    return callable(own) and on_cpu and _same_bits(own, int(module.head_dim))


@functools.cache
def _same_bits(own: Any, width: int) -> bool:
    if width % 2:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, n, 3, width, generator=generator) for n in (4, 2))
    cos, sin = (torch.randn(2, 3, width, generator=generator) for _ in range(2))
    with torch.no_grad():
        try:
            expected = own(query, key, cos, sin)
        except (TypeError, RuntimeError, ValueError):
            return False  # other angles than these
        found = rotate(query, key, cos, sin)
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
