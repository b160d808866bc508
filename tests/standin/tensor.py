"""Tensors of the device, and how an operator on them is run: checked, counted, computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.attention.varlen  # defines the operators
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from standin.counts import site
from standin.rules import Operator, aten, is_on_device, note, refusal, too_wide
from standin.varlen import varlen_backward, varlen_forward

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

_KERNELS: dict[Operator, Callable[..., Any]] = {
    aten.histc.default: lambda x, *bins: torch.histc(x.float(), *bins).to(x.dtype),
    aten.mm.dtype_out: lambda a, b, kind, *, out: torch.mm(a.to(kind), b.to(kind), out=out),
    aten.addmm.dtype_out: lambda c, a, b, kind, *, out: torch.addmm(
        c, a.to(kind), b.to(kind), out=out
    ),
    torch.ops.torch_attn._varlen_attn.default: varlen_forward,
    torch.ops.torch_attn._varlen_attn_backward.default: varlen_backward,
}
"""What CUDA has and the processor has not."""


class OnDevice(Tensor):
    """A tensor on cuda:0. `numbers`, a tensor of the processor, holds its values."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        return _wrap(cls, numbers)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnDevice({self.numbers!r})"

    # Told to torch as the parts of a wrapper, so that parameters can be swapped.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *about: Any) -> OnDevice:
        return OnDevice(inner["numbers"])

    @property
    def data(self) -> Tensor:
        return OnDevice(self.numbers)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not is_on_device(value):  # module.cpu()
            torch.utils.swap_tensors(self, torch.nn.Parameter(value, self.requires_grad))
            return
        Tensor.data.__set__(self, value)
        self.numbers = value.numbers

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Lets operators without a tensor of the device see it too: `torch.zeros(device="cuda")`."""

    def __torch_dispatch__(
        self, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operator, on the device that CUDA would leave it on.

    Args:
        func: an ATen operator, or one of a library.
        args: its arguments.
        kwargs: its named arguments.

    Raises:
        RuntimeError: as CUDA for tensors of both devices, or a generator of the other.
    """
    refused = refusal(func, args, kwargs)
    if refused is not None:
        raise RuntimeError(refused)
    reads = any(map(is_on_device, tree_leaves((args, kwargs))))
    named = kwargs.get("device")
    onto = reads if named is None else torch.device(named).type == "cuda"
    generator = kwargs.get("generator")
    if generator is not None and (generator.device.type == "cuda") != onto:
        raise RuntimeError(f"generator on {generator.device}, result elsewhere, at {site()}")
    if reads or onto:
        note(func, args, kwargs, reads, onto)
    inner = {name: value for name, value in kwargs.items() if not (onto and name == "pin_memory")}
    if named is not None and onto:
        inner["device"] = CPU
    result = _KERNELS.get(func, func)(*tree_map(numbers_of, args), **tree_map(numbers_of, inner))
    if not onto:
        return result
    refused = too_wide(result)
    if refused is not None:
        raise TypeError(refused)
    wrapped = tree_map(_onto_device, result)
    if args and is_on_device(args[0]) and type(args[0]) is not OnDevice:  # a library's own type
        return args[0] if func._schema.name.endswith("_") else wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def numbers_of(x: Any) -> Any:
    """The processor's tensor of a tensor of the device; anything else as it is."""
    return x.numbers if is_on_device(x) else x


def _onto_device(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, Tensor) and not is_on_device(x) else x


def _wrap(kind: type[Tensor], numbers: Tensor) -> Any:
    made = Tensor._make_wrapper_subclass(
        kind,
        numbers.shape,
        strides=numbers.stride(),
        storage_offset=numbers.storage_offset(),
        dtype=numbers.dtype,
        layout=numbers.layout,
        device=CUDA,
    )
    made.numbers = numbers
    return made


plain_subclass = Tensor._make_subclass
"""torch's own; it would forget the numbers."""


def make_subclass(
    kind: type[Tensor], data: Tensor, require_grad: bool = False, *rest: Any, **options: Any
) -> Any:
    """`Tensor._make_subclass`, which Parameter and bitsandbytes' Params4bit are made with.

    Args:
        kind: the type wanted; on the device, a type that is both this and `OnDevice`.
        data: the tensor to be of that type.
        require_grad: whether it is trained.
        *rest: of torch's own.
        **options: of torch's own.
    """
    if not is_on_device(data):
        return plain_subclass(kind, data, require_grad, *rest, **options)
    kind = kind if issubclass(kind, OnDevice) else _joined(kind)
    return _wrap(kind, data.numbers).requires_grad_(require_grad)


@functools.cache
def _joined(kind: type[Tensor]) -> type[Tensor]:
    def none(self: Tensor) -> None:
        raise AttributeError

    # Without `__tensor_flatten__` a module moves it through `.data`, and its own fields stay.
    fields = {"__module__": kind.__module__, "__tensor_flatten__": property(none)}
    return type(kind.__name__, (kind, OnDevice), fields)
