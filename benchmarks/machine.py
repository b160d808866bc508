"""The machine, as records name it."""

from __future__ import annotations


def describe_machine() -> str:
    """Processor or GPU, threads, and how fast it multiplies; imports torch when called.

    Drivers call it after their last block: a child's peak memory starts at its parent's.
    """
    from alignkit.runtime.devices import describe_hardware
    from alignkit.runtime.precision import describe_precision

    hardware = describe_hardware()
    return f"{hardware.name}, {hardware.cores} threads, {describe_precision(hardware.device)}"
