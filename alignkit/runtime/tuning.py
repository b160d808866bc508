"""Settings that make a device fast, before anything is allocated on it."""

from __future__ import annotations

from alignkit.runtime.devices import find_device, tune_cuda
from alignkit.runtime.processor import tune_processor


def tune_device(*, deterministic: bool = False) -> None:
    """Settings for the device of this process, and for the CPU's share of the work.

    The allocator of a CPU is told to keep freed memory only where steps run on the CPU: elsewhere
    it would keep a whole base after it has moved to the device.

    Args:
        deterministic: on CUDA, take only kernels that add up in a fixed order.
    """
    device = find_device()
    if device == "cuda":
        tune_cuda(deterministic)
    tune_processor(keep_memory=device == "cpu")
