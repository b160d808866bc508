"""The device and the process group."""

from __future__ import annotations

import os
import platform
import resource
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

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
            kind, _, index = named.partition(":")
            hint = f"one of {', '.join(_DEVICES)}"
            if kind == "cuda" and index.isdigit():
                hint = f"set CUDA_VISIBLE_DEVICES={index}, and leave ALIGNKIT_DEVICE out"
            raise AlignkitError(f"ALIGNKIT_DEVICE names no device: {named!r}", hint=hint)
        return named
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe_hardware(processes: int = 1) -> HardwareFacts:
    """The machine as the planner sees it."""
    device = find_device()
    threads = torch.get_num_threads()
    if device != "cuda":
        memory = int(psutil.virtual_memory().available) // processes
        return HardwareFacts(device, processor_name(), memory, threads, processes)
    free, _ = torch.cuda.mem_get_info()
    return HardwareFacts(
        device,
        torch.cuda.get_device_name(),
        int(free),
        threads,
        processes,
        cards=torch.cuda.device_count(),
        multiplies_bfloat16=multiplies_bfloat16(),
    )


def multiplies_bfloat16() -> bool:
    """Whether the CUDA device multiplies bfloat16; torch says so too where it imitates it."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def tune_cuda(deterministic: bool) -> None:
    """Settings of torch for products and attention on CUDA.

    cuDNN's attention builds a plan for each new length, about a second each, and rows always have
    new lengths. Products in 16 bits add up in float32 throughout, as on every other device.

    Args:
        deterministic: take only kernels that add up in a fixed order.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


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


PATIENCE = timedelta(hours=12)
"""How long a process waits for the others."""


def build_accelerator(trackers: tuple[str, ...], folder: Path) -> Accelerator:
    """accelerate's view of device, processes and trackers.

    The scorer sets the precision: autocast inside its forward. A process that waits for another's
    rewards waits longer than the ten minutes after which NCCL would end it.
    """
    return Accelerator(
        cpu=find_device() == "cpu",
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
