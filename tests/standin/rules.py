"""What CUDA refuses, what it waits for and what it launches, told from one operator's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch.utils._pytree import tree_leaves

from standin.counts import counts, site

aten = torch.ops.aten
Operator = Any

_COPIES = {aten._to_copy.default, aten.copy_.default}
"""The only operators between host and device."""

_INDEXING = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor),
    *(aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default),
}
"""They copy indices from the host to the device by themselves."""

_HOST_SCALARS = {
    *(aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill_.Tensor, aten.where.self),
    *(aten.lerp.Tensor, aten._foreach_mul.Tensor, aten._foreach_mul_.Tensor),
    aten._foreach_div_.Tensor,
}
"""Not pointwise by their tag, and still fine with a scalar tensor of the host."""

_WAITING = {
    *(aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default),
    *(aten.nonzero.default, aten.masked_select.default, aten.bincount.default),
    *(aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default),
}
"""Their value, or the size of their result, is needed on the host."""

_NO_KERNEL = {
    *(aten.detach.default, aten.alias.default, aten.set_.source_Tensor),
    *(aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default),
    *(aten.new_empty.default, aten.new_empty_strided.default),
}


float64 = True
"""Whether the device has it."""


def too_wide(result: Any) -> str | None:
    """The error of a device without float64 where an operator leaves a tensor of it there."""
    if float64 or not any(getattr(x, "dtype", None) == torch.float64 for x in tree_leaves(result)):
        return None
    return f"Cannot convert to float64, which the device does not support, at {site()}"


def is_on_device(x: object) -> TypeGuard[torch.Tensor]:
    """Whether something is a tensor of the device; a library's own types are told so too."""
    return isinstance(x, torch.Tensor) and "numbers" in x.__dict__


def refusal(func: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The error of CUDA where tensors of host and device meet; None where they may.

    Args:
        func: an ATen operator.
        args: its arguments.
        kwargs: its named arguments.
    """
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    device = [x for x in tensors if is_on_device(x)]
    host = [x for x in tensors if not is_on_device(x)]
    if not device or not host or func in _COPIES:
        return None
    written = args[0] if func._schema.is_mutable else None
    if not any(written is x for x in host):
        if func in _INDEXING:
            host = [x for x in (args[0], *args[2:3]) if not is_on_device(x)]
        scalars = torch.Tag.pointwise in func.tags or func in _HOST_SCALARS | _INDEXING
        if scalars and all(x.dim() == 0 for x in host):
            return None
    here, there = ([tuple(x.shape) for x in side] for side in (device, host))
    return (
        f"Expected all tensors to be on the same device, at {site()}: "
        f"{func} with {here} on cuda:0 and {there} on cpu"
    )


def note(
    func: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any], from_device: bool, onto: bool
) -> None:
    """Count what an accepted operator launches and waits for.

    Args:
        func: an ATen operator.
        args: its arguments.
        kwargs: its named arguments.
        from_device: it reads tensors of the device.
        onto: its result is on the device.
    """
    reason = _why_waiting(func, args, kwargs, from_device, onto)
    if reason is not None:
        counts.wait(reason)
    if not func.is_view and func not in _NO_KERNEL:
        counts.launches[str(func)] += 1


def _why_waiting(
    func: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any], from_device: bool, onto: bool
) -> str | None:
    if func in _WAITING:
        return str(func)
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return str(func)
    if func is aten._to_copy.default and from_device != onto:
        blocking = not kwargs.get("non_blocking")
        return ("to the host" if from_device else "from the host") if blocking else None
    if func is aten.copy_.default and is_on_device(args[0]) != is_on_device(args[1]):
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return ("to the host" if is_on_device(args[1]) else "from the host") if blocking else None
    if func in _INDEXING:
        return _why_indexing_waits([x for x in args[1] if x is not None], args[2:3])
    return None


def _why_indexing_waits(indices: list[torch.Tensor], values: tuple[Any, ...]) -> str | None:
    """Masks are counted on the host, except where one number fills a mask."""
    masks = [x for x in indices if x.dtype == torch.bool]
    number = any(not is_on_device(x) for x in values)
    if masks and not (number and len(indices) == 1):
        return "boolean index"
    if not masks and (number or not all(map(is_on_device, indices))):
        return "index on the host"
    return None
