"""Which precision this machine multiplies fastest: measured, because no flag of a CPU says it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from alignkit.errors import FileError
from alignkit.files import make_folder, read_json, write_text
from alignkit.recipe.assets import alignkit_home
from alignkit.runtime.devices import processor_name

PRECISIONS = ("float32", "bfloat16")
"""Those that are compared."""
GAIN = 1.2
"""bfloat16 rounds to 8 bits, so it has to be this much faster than float32 to be chosen."""

_ROUNDS = 2
_SECONDS = 1.0
"""Longest round of the slower precision."""
_FIRST, _MOST = 6e7, 1.5e10
"""Floating-point operations of one layer's products."""
_SMALL = ((512, 512), (512, 1024))
"""Layers of the first products."""
_TOKENS = (32, 512)

_USUAL = ((1024, 1024), (1024, 4096), (4096, 1024))
"""Inputs and outputs of the layers of a small model."""

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA")
"""Variables that hide instructions from the libraries."""


def product_speeds(device: str, shapes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Floating-point operations a second in products with frozen weights, forward and backward.

    Products grow as long as the slower precision needs no more than a second for the next ones: a
    CPU may need a hundred times as long for bfloat16. The precisions take turns, and the best round
    of each counts.

    Args:
        device: `cpu` or `mps`.
        shapes: inputs and outputs of the layers.

    Returns:
        `float32` and `bfloat16` -> operations a second.
    """
    speeds = dict.fromkeys(PRECISIONS, float("inf"))
    for layers, work in ((_SMALL, _FIRST), (shapes, _FIRST), (shapes, _MOST)):
        products = [Product(*layer, work) for layer in layers]
        expected = sum(product.work for product in products) / min(speeds.values())
        if expected > _SECONDS:
            break
        rounds = [
            {name: _speed(device, products, getattr(torch, name)) for name in PRECISIONS}
            for _ in range(_ROUNDS + 1)  # the first one compiles kernels and fills caches
        ]
        speeds = {name: max(one[name] for one in rounds[1:]) for name in PRECISIONS}
    return speeds


class Product:
    """Rows through one layer and back.

    Args:
        inputs: width of the rows.
        outputs: width of the result.
        most: floating-point operations that it should take at most.
    """

    def __init__(self, inputs: int, outputs: int, most: float) -> None:
        self.inputs, self.outputs = inputs, outputs
        fewest, usual = _TOKENS
        self.tokens = int(min(max(most / (4 * inputs * outputs), fewest), usual))
        self.work = 4.0 * self.tokens * inputs * outputs

    def seconds(self, device: str, dtype: torch.dtype) -> float:
        """How long it takes."""
        rows = torch.ones(self.tokens, self.inputs, dtype=dtype, device=device)
        weight = torch.ones(self.outputs, self.inputs, dtype=dtype, device=device)
        started = time.perf_counter()
        (F.linear(rows, weight) @ weight).sum().item()
        return time.perf_counter() - started


def _speed(device: str, products: Sequence[Product], dtype: torch.dtype) -> float:
    work = sum(product.work for product in products)
    return work / sum(product.seconds(device, dtype) for product in products)


def kept_speeds(device: str, shapes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """`product_speeds`, measured once for a machine, its threads and this version of torch.

    Args:
        device: `cpu` or `mps`.
        shapes: inputs and outputs of the layers.
    """
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    threads = f"{torch.get_num_threads()} threads"
    sizes = " ".join(f"{a}x{b}" for a, b in shapes)
    torch_version = f"torch {torch.__version__}"
    key = ", ".join((device, processor_name(), threads, torch_version, *limits, sizes))
    path = alignkit_home() / "cache" / "speeds.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(FileError):
        known = read_json(path)
    kept = known.get(key)
    if isinstance(kept, dict) and all(isinstance(kept.get(name), float) for name in PRECISIONS):
        return kept
    speeds = product_speeds(device, shapes)
    with contextlib.suppress(FileError):
        make_folder(path.parent)
        write_text(path, json.dumps({**known, key: speeds}, indent=1))
    return speeds


def fastest(device: str, shapes: Sequence[tuple[int, int]]) -> tuple[str, str]:
    """The precision to compute in, and why.

    bfloat16 on CUDA where the card multiplies it, else float16; elsewhere bfloat16 if it is faster
    than float32 by a fifth, else float32.

    Args:
        device: `cuda`, `mps` or `cpu`.
        shapes: inputs and outputs of the model's layers.

    Returns:
        A name of a dtype and a half-sentence.
    """
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the card multiplies it"
        return "float16", "the card does not multiply bfloat16"
    speeds = kept_speeds(device, shapes)
    narrow, wide = speeds["bfloat16"], speeds["float32"]
    measured = f"bfloat16 {narrow / 1e9:,.0f} and float32 {wide / 1e9:,.0f} GFLOP/s measured here"
    return ("bfloat16" if narrow >= GAIN * wide else "float32"), measured


def describe_precision(device: str) -> str:
    """The precision that `auto` chooses for layers of usual sizes, and why, for a person."""
    return ": ".join(fastest(device, _USUAL))
