"""Memory that runs out, and freed memory that goes back to the system: work layer by layer leaves
holes of every size."""

from __future__ import annotations

import ctypes
import sys

import torch


def release_memory() -> None:
    """Give freed memory back to the system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            return


_RAN_OUT = (
    "not enough memory",
    "can't allocate memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What libraries say in errors without a type of their own."""

_DEVICE_FAULTS = ("CUDA error", "same device", "device-side assert")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _RAN_OUT)


def is_device_fault(error: BaseException) -> bool:
    """Whether an error tells of the device or of where tensors are, not of what was computed."""
    if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_FAULTS)
