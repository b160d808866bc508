"""The precision that suits a device."""

from __future__ import annotations

import torch

from alignkit.runtime.devices import multiplies_bfloat16
from alignkit.runtime.speeds import BUSY, Layers, kept, precision_speeds, reading_speed

GAIN = 1.2
"""bfloat16 rounds to 8 bits, so it has to be this much faster than float32 to be chosen."""

_USUAL = ((1024, 1024), (1024, 4096), (4096, 1024))
"""Layers of a small model."""


def fastest(device: str, layers: Layers) -> tuple[str, str]:
    """The precision to compute in, and why.

    bfloat16 on CUDA where the card multiplies it, else float16; elsewhere bfloat16 if it is faster
    than float32 by a fifth, else float32.

    Args:
        device: `cuda`, `mps` or `cpu`.
        layers: of the model.

    Returns:
        A name of a dtype and a half-sentence.
    """
    if device == "cuda":
        if multiplies_bfloat16():
            return "bfloat16", "the card multiplies it"
        return "float16", "the card does not multiply bfloat16"
    speeds = _speeds(device, layers)
    narrow, wide = speeds["bfloat16"], speeds["float32"]
    measured = f"bfloat16 {narrow / 1e9:,.0f} and float32 {wide / 1e9:,.0f} GFLOP/s measured here"
    measured += f" {BUSY}" * (BUSY in speeds)
    return ("bfloat16" if narrow >= GAIN * wide else "float32"), measured


def layer_speed(device: str, layers: Layers, dtype: str) -> float:
    """Operations a second in products of a model's layers; 0 where nothing is measured.

    Args:
        device: `cuda`, `mps` or `cpu`.
        layers: of the model.
        dtype: that it is computed in.
    """
    return 0.0 if device == "cuda" else _speeds(device, layers).get(dtype, 0.0)


def sampling_speed(device: str, layers: Layers, dtype: str, responses: int) -> float:
    """The same while responses are sampled, each token of which reads all weights.

    Args:
        device: `cuda`, `mps` or `cpu`.
        layers: of the model.
        dtype: that it is computed in.
        responses: at once.
    """
    if device == "cuda":
        return 0.0
    what = f"{_describe(device, layers)}, {responses} rows of {dtype}"
    measured = kept(
        what, lambda: {dtype: reading_speed(device, layers, getattr(torch, dtype), responses)}
    )
    return measured.get(dtype, 0.0)


def _speeds(device: str, layers: Layers) -> dict[str, float]:
    return kept(_describe(device, layers), lambda: precision_speeds(device, layers))


def _describe(device: str, layers: Layers) -> str:
    sizes = " ".join(f"{inputs}x{outputs}" for inputs, outputs in layers)
    return f"{device}, {torch.get_num_threads()} threads, {sizes}"


def describe_precision(device: str) -> str:
    """The precision that `auto` chooses for layers of usual sizes, and why, for a person."""
    return ": ".join(fastest(device, _USUAL))
