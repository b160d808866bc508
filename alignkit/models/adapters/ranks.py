"""Ranks that move between layers: how large each may become, and what that makes of a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import nn

from alignkit.models.adapters.stacks import Adaptable
from alignkit.models.adapters.targets import adapted_layers, layer_ranks, patterned
from alignkit.recipe.adapters import LoraSpec, eva_of


def largest_ranks(layers: Mapping[str, Adaptable], spec: LoraSpec) -> dict[str, int]:
    """Name of each layer -> `rho` times its rank, as far as its size allows.

    Args:
        layers: that the adapter changes.
        spec: with its ranks and `eva`.
    """
    rho = eva_of(spec).rho
    return {
        name: min(round(rank * rho), layers[name].in_features, layers[name].out_features)
        for name, rank in layer_ranks(layers, spec).items()
    }


def shared_ranks(
    explained: Mapping[str, torch.Tensor], largest: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Name of each layer -> its rank: the directions that explain most, of all layers together.

    Args:
        explained: name -> `[n]` share of its input's variance along each direction, 0 to 1,
            falling; `n` at least its largest rank.
        largest: name -> rank that it may have.
        budget: sum of the ranks, at most that of the largest.

    Returns:
        Ranks from 0 on; equal shares go to the layer that comes first.
    """
    names = list(largest)
    shares = torch.cat([explained[name][: largest[name]].double().cpu() for name in names])
    owners = torch.repeat_interleave(
        torch.arange(len(names)), torch.tensor([largest[name] for name in names])
    )
    best = shares.argsort(descending=True, stable=True)[:budget]
    counts = torch.bincount(owners[best], minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def costliest_ranks(layers: Mapping[str, Adaptable], spec: LoraSpec) -> dict[str, int]:
    """Ranks with which the adapter would have most weights: the widest layers take all they may.

    Args:
        layers: that the adapter changes.
        spec: with its ranks and `eva`.
    """
    left, most = sum(layer_ranks(layers, spec).values()), largest_ranks(layers, spec)
    found = {}
    for name in sorted(
        layers, key=lambda name: -(layers[name].in_features + layers[name].out_features)
    ):
        found[name] = min(left, most[name])
        left -= found[name]
    return found


def with_ranks(model: nn.Module, spec: LoraSpec, ranks: Mapping[str, int]) -> LoraSpec:
    """The adapter with these ranks, each layer at the scale s that it has in the recipe.

    Args:
        model: with or without storage.
        spec: of the recipe.
        ranks: name of each layer with a rank -> that; layers without one are left alone.
    """
    layers = adapted_layers(model, spec)
    own = layer_ranks(layers, spec)
    alphas = dict.fromkeys(layers, spec.alpha)
    alphas |= patterned(layers, spec.alpha_pattern, "alpha_pattern")
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for name, rank in ranks.items():
        if not rank:
            continue
        wider = rank / own[name]  # s is alpha / rank, or alpha / sqrt(rank)
        alpha = alphas[name] * (math.sqrt(wider) if spec.rslora else wider)
        if rank != spec.rank:
            rank_pattern[re.escape(name)] = rank
        if alpha != spec.alpha:
            alpha_pattern[re.escape(name)] = alpha
    kept = tuple(name for name in layers if ranks.get(name))
    changes = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    if len(kept) < len(layers):
        return spec.model_copy(update={**changes, "targets": kept})
    return spec.model_copy(update=changes)
