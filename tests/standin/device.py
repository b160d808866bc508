"""The device as torch.cuda shows it, for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # before anything is patched: it looks at torch.cuda when it is imported
import torch.cuda.amp.common
from torch import Tensor

from standin import rules
from standin.attention import Attention
from standin.counts import counts
from standin.norm import fused_norm
from standin.tensor import Device, make_subclass

MEMORY = 80 * 10**9
"""Bytes, all of them free: nothing is allocated on the device."""


@contextlib.contextmanager
def device(capability: int = 80, *, wide: bool = True) -> Iterator[None]:
    """A CUDA device is there.

    Args:
        capability: of the device: 75, 80 or 90; decides which attention kernel it takes.
        wide: whether it has float64, as Apple's GPUs have not.
    """
    attention = Attention(capability)
    library = torch.library.Library("aten", "IMPL")
    for key in ("AutogradCUDA", "CUDA"):
        library.impl("scaled_dot_product_attention", attention, key)
        library.impl("_fused_rms_norm", fused_norm, key)
    lifted = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        stack.callback(library._destroy)
        for name, value in _torch_cuda(capability).items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        amp = torch.cuda.amp.common
        stack.enter_context(patch.object(amp, "amp_definitely_not_available", lambda: False))
        stack.enter_context(patch.object(Tensor, "_make_subclass", staticmethod(make_subclass)))
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is a copy
        stack.enter_context(patch.object(rules, "float64", wide))
        stack.enter_context(Device())
        yield


def _torch_cuda(capability: int) -> dict[str, Any]:
    """Functions of torch.cuda that would ask a driver."""
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name="stand-in",
        total_memory=MEMORY,
        multi_processor_count=108,
        warp_size=32,
        major=major,
        minor=minor,
    )
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "get_allocator_backend": "native",
        "get_device_name": properties.name,
        "get_device_capability": (major, minor),
        "get_device_properties": properties,
        "is_bf16_supported": capability >= 80,
        "mem_get_info": (MEMORY, MEMORY),
        "is_current_stream_capturing": False,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "get_rng_state": state,
        "get_rng_state_all": [state],
    }
    silent = {
        *("_lazy_init", "set_device", "empty_cache", "ipc_collect", "reset_peak_memory_stats"),
        *("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"),
    }
    return {
        **{name: _always(value) for name, value in answers.items()},
        **{name: _always(None) for name in silent},
        "synchronize": lambda *args: counts.wait("torch.cuda.synchronize"),
    }


def _always(value: Any) -> Any:
    return lambda *args, **kwargs: value
