"""The machine, as records name it."""

from __future__ import annotations

import time
from typing import Any

_SIDE = 2048
"""Rows and columns of the matrices whose product is the machine's peak."""


def product_work() -> float:
    """Floating-point operations of the product that `product_seconds` times."""
    return 2.0 * _SIDE**3


def product_seconds(dtype: Any) -> float:
    """Seconds of one product of large matrices; the first also makes its kernel.

    Args:
        dtype: of torch, as in the run.
    """
    import torch

    one = torch.ones(_SIDE, _SIDE, dtype=dtype)
    started = time.perf_counter()
    (one @ one)[0, 0].item()
    return time.perf_counter() - started


def describe_machine() -> str:
    """Processor or GPU, threads, and how fast it multiplies; imports torch when called.

    Drivers call it after their last block: a child's peak memory starts at its parent's.
    """
    from alignkit.runtime.devices import describe_hardware
    from alignkit.runtime.precision import describe_precision

    hardware = describe_hardware()
    return f"{hardware.name}, {hardware.cores} threads, {describe_precision(hardware.device)}"
