"""The machine, as records name it."""

from __future__ import annotations


def describe_machine() -> str:
    """Processor or GPU, threads, and how it multiplies bfloat16; imports torch when called.

    Drivers call it after their last block: a child's peak memory starts at its parent's.
    """
    from alignkit.runtime.devices import describe_bf16, describe_hardware

    hardware = describe_hardware()
    return f"{hardware.name}, {hardware.cores} threads, bf16 {describe_bf16(hardware.device)}"
