"""What lies in memory while a base is loaded onto the stand-in."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes.functional
import torch
from safetensors.torch import load_file
from tiny import save_tiny

from alignkit.models.base.loading import load_model
from alignkit.models.base.places import resolve
from alignkit.models.kernels.quantized import dense_weight
from alignkit.models.kernels.requantized import through
from standin.device import device

LAYERS = 6


def check_load(folder: Path) -> dict[str, int]:
    """Bytes of 16-bit weights while a bfloat16 base of six layers is loaded in nf4.

    Args:
        folder: for the base.

    Returns:
        `stored` in linear layers; the `largest` of them; how many are `quantized`; the most that
        were `alive` whenever one was, on the host and on the device together; and how many `codes`
        of one differ when a merge quantizes it again.
    """
    save_tiny(folder / "deep", num_hidden_layers=LAYERS, dtype=torch.bfloat16)
    quantize, sizes, alive = bitsandbytes.functional.quantize_4bit, list[int](), list[int]()

    def watched(weight: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(weight.nbytes)
        alive.append(_alive())
        return quantize(weight, *args, **options)

    with device(), patch.object(bitsandbytes.functional, "quantize_4bit", watched):
        before = _alive()
        model = load_model(resolve(str(folder / "deep")).whole(), torch.bfloat16, "cuda", "nf4")
        layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
        stored = load_file(folder / "deep/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        with patch.object(bitsandbytes.functional, "quantize_4bit", _on_the_device):
            again = through(stored, "nf4", torch.bfloat16, torch.device("cuda"))
        codes = int((again != dense_weight(layer).cpu()).sum())
    kept = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    beside = sum({id(weight): weight.nbytes for weight in kept}.values())
    return {
        "stored": sum(sizes),
        "largest": max(sizes),
        "quantized": len(sizes),
        "alive": max(alive) - before - beside,
        "codes": codes,
    }


_quantize = bitsandbytes.functional.quantize_4bit


def _on_the_device(weight: torch.Tensor, *args: Any, **options: Any) -> Any:
    assert weight.is_cuda
    return _quantize(weight, *args, **options)


def _alive() -> int:
    """Bytes of 16-bit matrices that anything refers to; storage that is shared counts once."""
    kinds = (torch.bfloat16, torch.float16)
    storages: dict[int, int] = {}
    for x in gc.get_objects():
        if isinstance(x, torch.Tensor) and x.dtype in kinds and x.ndim == 2 and not x.is_meta:
            storages[x.data_ptr()] = max(x.nbytes, storages.get(x.data_ptr(), 0))
    return sum(storages.values())
