"""What makes steps on a CPU fast: the allocator, compiled kernels, the number of threads."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path

import torch

from alignkit.runtime.speeds import kept, product_speed

GAIN = 1.15
"""How much faster fewer threads have to be; all of them is what other programs use."""

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2

_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"

MAX_KERNELS = 256
"""Kernels that oneDNN keeps, about 3 MB each. Rows keep having new lengths, and at its own limit of
1,024 a run of 50 steps grew by 2.7 GB; one layer needs more than 64 at a time."""

_SHAPES = ((1024, 1024), (1024, 4096))
_SLOW = 0.8
"""Share of the highest clock or capacity below which a core is a slow one."""


def tune_processor(*, keep_memory: bool = True) -> bool:
    """Settings that make steps on a CPU faster and stop memory from growing.

    glibc is kept from returning every large block to the kernel and faulting it in again, and
    oneDNN from keeping a kernel for every shape that it ever met, unless the environment sets how
    many. Results are bit-identical. Must run before the first large allocation and product.

    The number of threads is set too, unless the environment does: the fastest of those in
    `thread_counts`, measured once for a machine.

    Args:
        keep_memory: whether freed memory stays with this process.

    Returns:
        Whether the C library accepted the settings.
    """
    os.environ.setdefault(_KERNELS, str(MAX_KERNELS))
    if not sys.platform.startswith("linux"):
        return False
    accepted = keep_memory and _keep_blocks()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(_best(thread_counts(os.sched_getaffinity(0))))
    return accepted


def _keep_blocks() -> bool:
    try:
        libc = ctypes.CDLL("libc.so.6")
        settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**28))
        return all(libc.mallopt(key, value) == 1 for key, value in settings)
    except (OSError, AttributeError):
        return False


def _best(counts: list[int]) -> int:
    """The fastest number of threads; the first one unless another is clearly faster."""
    if len(counts) == 1:
        return counts[0]
    speeds = kept(f"{counts} threads", lambda: {str(n): _speed(n) for n in counts})
    fastest = max(counts, key=lambda n: speeds[str(n)])
    return fastest if speeds[str(fastest)] > GAIN * speeds[str(counts[0])] else counts[0]


def thread_counts(allowed: set[int], system: Path = Path("/sys")) -> list[int]:
    """Numbers of threads worth trying, the largest first.

    All CPUs that this process may use, one of each core, and one of each fast core; none above the
    quota of the container.

    Args:
        allowed: CPUs of this process.
        system: where Linux describes its hardware.
    """
    cpus = system / "devices" / "system" / "cpu"
    cores = {_read(cpus / f"cpu{n}/topology/thread_siblings_list") or str(n): n for n in allowed}
    clocks = {n: _clock(cpus / f"cpu{n}") for n in cores.values()}
    fast = [n for n, clock in clocks.items() if clock >= _SLOW * max(clocks.values())]
    quota = _quota(system / "fs" / "cgroup" / "cpu.max")
    counts = {min(number, quota) for number in (len(allowed), len(cores), len(fast))}
    return sorted(counts, reverse=True)


def _speed(threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return product_speed("cpu", _SHAPES, torch.float32)
    finally:
        torch.set_num_threads(before)


def _clock(cpu: Path) -> float:
    """Highest clock of a CPU, or its capacity beside others; 0 if the system does not say."""
    for name in ("cpufreq/cpuinfo_max_freq", "cpu_capacity"):
        text = _read(cpu / name)
        if text.isdigit():
            return float(text)
    return 0.0


def _quota(path: Path) -> int:
    """CPUs' worth of time that a container gets."""
    allowance, _, period = _read(path).partition(" ")
    if not allowance.isdigit() or not period.isdigit():
        return 2**31
    return max(1, math.ceil(int(allowance) / int(period)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
