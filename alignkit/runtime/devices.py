"""The device and the process group."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from alignkit.errors import AlignkitError
from alignkit.recipe.facts import HardwareFacts

_DEVICES = ("cpu", "cuda", "mps")


def find_device() -> str:
    """`cuda`, `mps` or `cpu`; `$ALIGNKIT_DEVICE` names one.

    Raises:
        AlignkitError: it names another.
    """
    named = os.environ.get("ALIGNKIT_DEVICE")
    if named:
        if named not in _DEVICES:
            raise AlignkitError(
                f"ALIGNKIT_DEVICE names no device: {named!r}", hint=f"one of {', '.join(_DEVICES)}"
            )
        return named
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe_hardware(processes: int = 1) -> HardwareFacts:
    """The machine as the planner sees it."""
    device = find_device()
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        name, memory = torch.cuda.get_device_name(), int(free)
    else:
        name, memory = processor_name(), int(psutil.virtual_memory().available) // processes
    return HardwareFacts(device, name, memory, torch.get_num_threads(), processes)


def processor_name() -> str:
    """What the system calls the CPU."""
    for line in _processor_facts().split("\n"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _processor_facts() -> str:
    """What Linux reports about its CPUs; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""


def peak_memory(device: str) -> int:
    """Largest number of bytes this process has held on the device so far."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would report the parent's peak, if higher
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def build_accelerator(trackers: tuple[str, ...], folder: Path) -> Accelerator:
    """accelerate's view of device, processes and trackers.

    The scorer sets the precision: autocast inside its forward.
    """
    return Accelerator(
        cpu=find_device() == "cpu",
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=str(folder),
    )
