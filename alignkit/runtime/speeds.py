"""How fast this machine multiplies: measured once, because no flag of a CPU says it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from alignkit.errors import FileError
from alignkit.files import make_folder, read_json, write_text
from alignkit.recipe.assets import alignkit_home
from alignkit.runtime.devices import processor_name

Layers = Sequence[tuple[int, int]]
"""Inputs and outputs of each."""

PRECISIONS = ("float32", "bfloat16")
"""Those that are compared."""

_ROUNDS = 2
_SECONDS = 1.0
"""Longest round of the slower precision."""
_FIRST, _MOST = 6e7, 1.5e10
"""Floating-point operations of one layer's products."""
_SMALL = ((512, 512), (512, 1024))
"""Layers of the first products."""
_TOKENS = (32, 512)
_ALONE = 0.8
"""Share of its threads' time that a process gets on a processor of its own: 0.9, and 0.6 beside
one other."""
BUSY = "beside other work"
"""Marks what was measured while the processor had something else to do."""
_UNCACHED = 2**28
"""Bytes of weights that are read once for every sampled token."""
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA")
"""Variables that hide instructions from the libraries."""


def precision_speeds(device: str, layers: Layers) -> dict[str, float]:
    """Floating-point operations a second in products with frozen weights, forward and backward.

    Products grow as long as the slower precision needs no more than a second for the next ones: a
    CPU may need a hundred times as long for bfloat16. The precisions take turns, and the best round
    of each counts. The faster one is measured in full.

    Args:
        device: `cpu` or `mps`.
        layers: of the model.

    Returns:
        `float32` and `bfloat16` -> operations a second.
    """
    speeds = dict.fromkeys(PRECISIONS, float("inf"))
    for some, work in ((_SMALL, _FIRST), (layers, _FIRST), (layers, _MOST)):
        expected = sum(_work(*layer, _tokens(*layer, work)) for layer in some)
        if expected / min(speeds.values()) > _SECONDS:
            break
        rounds = [
            {name: _round(device, some, getattr(torch, name), work) for name in PRECISIONS}
            for _ in range(_ROUNDS + 1)  # the first one compiles kernels and fills caches
        ]
        speeds = {name: max(one[name] for one in rounds[1:]) for name in PRECISIONS}
    else:
        return speeds
    fast = max(speeds, key=lambda name: speeds[name])
    return {**speeds, fast: product_speed(device, layers, getattr(torch, fast))}


def product_speed(device: str, layers: Layers, dtype: torch.dtype) -> float:
    """The same of one precision that is known to be fast."""
    return max([_round(device, layers, dtype, _MOST) for _ in range(_ROUNDS + 1)][1:])


def reading_speed(device: str, layers: Layers, dtype: torch.dtype, rows: int) -> float:
    """The same of few rows with weights that no cache holds, forward only.

    Args:
        device: `cpu` or `mps`.
        layers: of the model.
        dtype: of the products.
        rows: of each.
    """
    size = sum(inputs * outputs for inputs, outputs in layers) * dtype.itemsize
    weights = [
        torch.ones(outputs, inputs, dtype=dtype, device=device)
        for _ in range(max(1, _UNCACHED // size))
        for inputs, outputs in layers
    ]
    states = {inputs: torch.ones(rows, inputs, dtype=dtype, device=device) for inputs, _ in layers}
    seconds = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        for weight in weights:
            last = F.linear(states[weight.shape[1]], weight)
        last.sum().item()
        seconds.append(time.perf_counter() - started)
    return 2.0 * rows * sum(weight.numel() for weight in weights) / min(seconds[1:])


def _tokens(inputs: int, outputs: int, work: float) -> int:
    fewest, most = _TOKENS
    return int(min(max(work / (4 * inputs * outputs), fewest), most))


def _work(inputs: int, outputs: int, tokens: int) -> float:
    return 4.0 * tokens * inputs * outputs


def _round(device: str, layers: Layers, dtype: torch.dtype, work: float) -> float:
    done = seconds = 0.0
    for inputs, outputs in layers:
        tokens = _tokens(inputs, outputs, work)
        rows = torch.ones(tokens, inputs, dtype=dtype, device=device)
        weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
        started = time.perf_counter()
        (F.linear(rows, weight) @ weight).sum().item()
        seconds += time.perf_counter() - started
        done += _work(inputs, outputs, tokens)
    return done / seconds


def kept(what: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What was measured before on this machine, with this version of torch; else measured now.

    Args:
        what: names the measurement.
        measure: name -> number.

    Returns:
        What it measured. While other work takes the processor it is not kept, and `BUSY` is in it.
    """
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    key = ", ".join((processor_name(), f"torch {torch.__version__}", *limits, what))
    path = alignkit_home() / "cache" / "speeds.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(FileError):
        known = read_json(path)
    speeds = known.get(key)
    if isinstance(speeds, dict) and all(_is_speed(speed) for speed in speeds.values()):
        return speeds
    before, speeds = _alone(), measure()
    if not before or not _alone():
        return {**speeds, BUSY: 1.0}
    with contextlib.suppress(FileError, OSError):
        make_folder(path.parent)
        write_text(path, json.dumps({**known, key: speeds}, indent=1))
    return speeds


def _alone() -> bool:
    """Whether nothing else takes this process's threads away from the processor."""
    wall, own = time.perf_counter(), time.process_time()
    product_speed("cpu", _SMALL, torch.float32)
    wall, own = time.perf_counter() - wall, time.process_time() - own
    return own >= _ALONE * wall * torch.get_num_threads()


def _is_speed(value: object) -> bool:
    """Whether a machine may have measured it."""
    return isinstance(value, float) and 0.0 < value < 1e17
