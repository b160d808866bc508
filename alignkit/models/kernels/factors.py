"""The factors of LoRA layers as they are multiplied: looked up, scaled and cast, for one use or for
a whole step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


class Frozen(NamedTuple):
    """What a layer multiplies with besides its factors.

    Args:
        base: linear layer with its weight `[O, I]`, plain or quantized, and bias `[O]`.
        scale: s, of the update.
        rank: r, of the factors.
    """

    base: Any
    scale: float
    rank: int


class Factors(NamedTuple):
    """Factors in the compute dtype: all s A stacked, `[Σr, I]`, and each layer's B, `[O, r]`."""

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]


class Group(NamedTuple):
    """Layers that read the same input and are computed together, and what they multiply with."""

    layers: list[Any]
    frozen: list[Frozen]
    factors: Factors


@contextlib.contextmanager
def fixed_factors(model: nn.Module) -> Iterator[None]:
    """Cast each adapter's factors and look up its layers once, at its first use in the block.

    Only where no weight changes meanwhile, as in sampling and between two optimizer steps: a step
    on few tokens would spend a tenth of its time on casts, and half as much on looking layers up.
    Elsewhere factors are cast at every use, because a fused optimizer changes weights without
    raising the version that would show a kept copy to be stale.

    Args:
        model: carries LoRA layers.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kept = _Kept(layers)
    for layer in layers:
        layer.kept = kept
    try:
        yield
    finally:
        for layer in layers:
            del layer.kept


class _Kept:
    """Groups of layers that were looked up, and the factors of all layers, cast together.

    Args:
        layers: of the model.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.groups: dict[tuple[int, str, torch.dtype], Group] = {}
        self.narrow: dict[tuple[str, torch.dtype], dict[int, tuple[torch.Tensor, ...]]] = {}

    def group(self, first: Any, name: str, dtype: torch.dtype) -> Group:
        """See `group_of`."""
        key = id(first), name, dtype
        if key not in self.groups:
            if (name, dtype) not in self.narrow:
                among = [layer for layer in self.layers if name in layer.lora_A]
                narrow = _narrow_factors(among, name, dtype)
                self.narrow[name, dtype] = dict(zip(map(id, among), narrow, strict=True))
            layers = first.readers.alike(first, name)
            own = [self.narrow[name, dtype][id(layer)] for layer in layers]
            self.groups[key] = _joined(layers, name, own)
        return self.groups[key]


def group_of(first: Any, name: str, dtype: torch.dtype) -> Group:
    """What is computed when a layer is called under an adapter.

    Args:
        first: the layer; its readers name those that are computed with it.
        name: of the adapter.
        dtype: of the products.
    """
    kept: _Kept | None = first.__dict__.get("kept")
    if kept is not None:
        return kept.group(first, name, dtype)
    layers = first.readers.alike(first, name)
    return _joined(layers, name, _narrow_factors(layers, name, dtype))


def _joined(layers: list[Any], name: str, narrow: Sequence[tuple[torch.Tensor, ...]]) -> Group:
    every = [a for a, _ in narrow]
    a = torch.cat(every) if len(every) > 1 else every[0]
    frozen = [_frozen(layer, name) for layer in layers]
    return Group(layers, frozen, Factors(a, tuple(b for _, b in narrow)))


def _narrow_factors(
    layers: Sequence[Any], name: str, dtype: torch.dtype
) -> list[tuple[torch.Tensor, ...]]:
    """s A and B of each layer in the compute dtype, all of them in two operations.

    A is scaled, because it is small, and its product has a row for each token.
    """
    a = [layer.lora_A[name].weight.detach() for layer in layers]
    b = [layer.lora_B[name].weight.detach() for layer in layers]
    wide = [*torch._foreach_mul(a, [layer.scaling[name] for layer in layers]), *b]
    narrow = [torch.empty_like(x, dtype=dtype) for x in wide]
    torch._foreach_copy_(narrow, wide)
    return list(zip(narrow[: len(a)], narrow[len(a) :], strict=True))


def scaled_rows(x: torch.Tensor, scales: Sequence[float], ranks: Sequence[int]) -> torch.Tensor:
    """Rows of several layers, each times its layer's scale; in one product if they are the same.

    Args:
        x: `[Σr, I]`.
        scales: of the layers.
        ranks: rows of each.
    """
    if len(set(scales)) == 1:
        return x * scales[0]
    return torch.cat([part * s for part, s in zip(x.split(ranks), scales, strict=True)])


def _frozen(layer: Any, name: str) -> Frozen:
    return Frozen(layer.get_base_layer(), layer.scaling[name], layer.r[name])
