"""Where LoRA's factors start if not at random: from the weights they adapt, or from given values.

PiSSA and OLoRA start with a part of the weight itself, s B₀ A₀, and subtract it from the base: the
sum is unchanged. Here the base stays whole, because with adapters off it is the reference, and the
start is subtracted by a second, frozen half of the same factors: A = [A₀; A₀], B = [B₀, -B₀].
The saved adapter is ordinary LoRA of twice the rank over the ordinary base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from alignkit.errors import ModelError
from alignkit.models.kernels.quantized import dense_weight, is_quantized
from alignkit.recipe.adapters import LoraSpec, takes_from_base

_SPARE = 16
"""Directions beyond the rank that the fast decomposition follows: the last ones are inexact."""

HELD = "held_rows"
"""Attribute of a factor: how many of its weights stay fixed."""


def with_frozen_half(spec: LoraSpec) -> LoraSpec:
    """Twice the rank at the same scale s: alpha / rank, or alpha / sqrt(rank)."""
    if not takes_from_base(spec):
        return spec
    wider = math.sqrt(2.0) if spec.rslora else 2.0
    patterned = {name: alpha * wider for name, alpha in spec.alpha_pattern.items()}
    ranks = {name: 2 * rank for name, rank in spec.rank_pattern.items()}
    changes = {"rank": 2 * spec.rank, "alpha": wider * spec.alpha}
    return spec.model_copy(update={**changes, "rank_pattern": ranks, "alpha_pattern": patterned})


@torch.no_grad()
def start_factors(
    model: nn.Module,
    spec: LoraSpec,
    seed: int,
    initial: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Give the factors of a fresh adapter their start values.

    Args:
        model: carries the adapter, with ranks of `with_frozen_half`.
        spec: of the recipe.
        seed: of PiSSA's fast decomposition.
        initial: what the start is made from, by the name of a layer's weight: for LoftQ the
            unquantized weight, for EVA the factor A.

    Raises:
        ModelError: LoftQ over a base that is not quantized, or EVA without factors.
    """
    if spec.init == "default":
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
            continue
        base = layer.get_base_layer()
        rank, scale = layer.r["default"], layer.scaling["default"]
        a, b = _weight(layer.lora_A["default"]), _weight(layer.lora_B["default"])
        stored = name.removeprefix("base_model.model.") + ".weight"
        if spec.init == "eva":
            if initial is None:
                raise ModelError(
                    "adapter.init = eva needs the rows of a run, and there are none here",
                    hint="remove adapter.init",
                )
            a.copy_(initial(stored))  # B stays 0
            continue
        weight = dense_weight(base).float()
        weight = weight.T if isinstance(base, Conv1D) else weight  # Conv1D is stored transposed
        if spec.init == "loftq":
            if initial is None or not is_quantized(base):
                raise ModelError(
                    "adapter.init = loftq makes up for what quantization loses, but the base is "
                    "not quantized",
                    hint="set model.quantization=nf4, or remove adapter.init",
                )
            lost = initial(stored).to(weight.device).float() - weight
            first, second = _largest(lost, rank, scale, "pissa", seed)
            a.copy_(first)
            b.copy_(second)
            continue
        half = rank // 2
        first, second = _largest(weight, half, scale, spec.init, seed)
        a.copy_(torch.cat([first, first]))
        b.copy_(torch.cat([second, -second], dim=1))
        _hold(a, (slice(half, None), slice(None)))
        _hold(b, (slice(None), slice(half, None)))


def _weight(factor: Any) -> nn.Parameter:
    weight: nn.Parameter = factor.weight
    return weight


def _largest(
    weight: torch.Tensor, rank: int, scale: float, kind: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[r, I]` and B `[O, r]` with s B A a part of the weight `[O, I]`.

    OLoRA takes the first rows of its QR decomposition (https://arxiv.org/abs/2406.01775); PiSSA
    the largest singular values, half of each on either side (https://arxiv.org/abs/2404.02948).
    """
    if kind == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if kind == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wider = min(rank + _SPARE, *weight.shape)
            u, s, right = torch.svd_lowrank(weight, wider, niter=int(kind.rpartition("_")[2]))
            u, s, v = u[:, :rank], s[:rank], right.T[:rank]
    root = (s / scale).sqrt()
    return root[:, None] * v, u * root


def _hold(weight: Any, where: tuple[slice, slice]) -> None:
    """Keep a part of a factor fixed: it gets no gradient."""

    def masked(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[where] = 0.0
        return gradient

    weight.register_hook(masked)
    setattr(weight, HELD, weight[where].numel())
    weight.no_decay = True  # it would shrink the frozen half
