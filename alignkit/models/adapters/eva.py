"""EVA: LoRA's A starts at the main directions of what its layer reads (arXiv 2410.07170).

PEFT's `get_eva_state_dict` finds them pass by pass, and the ranks that follow from them; B is 0, so
nothing changes at first. Here is what it lacks: packed rows, and an end of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from torch import nn

from alignkit.errors import ModelError
from alignkit.models.adapters.stacks import Adaptable
from alignkit.models.adapters.targets import adapted_layers, layer_ranks, patterned
from alignkit.models.peft_parts import get_eva_state_dict
from alignkit.models.scoring.scorer import Scorer
from alignkit.packed import PackedBatch
from alignkit.recipe.adapters import LoraSpec, eva_of, moves_ranks

WIDER = 2
"""PEFT's fast decomposition takes so many times the directions that are wanted."""

_COMPARED = 8
"""States of a layer's input by which equal inputs are told: PEFT hashes them number by number."""


@dataclass(frozen=True)
class EvaStart:
    """Where LoRA's A starts, and what that was found from.

    Args:
        factors: name of each layer that has a rank -> A, `[r, I]` float32, rows of length 1.
        ranks: name of each layer -> its rank, 0 for one that is left alone.
        rows: documents that were read.
        read: tokens that were read.
        used: states that were looked at.
        unsettled: layers that were still looked at in the last pass; one of those that read the
            same.
    """

    factors: dict[str, torch.Tensor]
    ranks: dict[str, int]
    rows: int
    read: int
    used: int
    unsettled: tuple[str, ...]


def find_start(
    scorer: Scorer, layers: Mapping[str, Adaptable], spec: LoraSpec, passes: Sequence[PackedBatch]
) -> EvaStart:
    """Main directions of the layers' inputs, and the ranks that follow from them.

    Args:
        scorer: around the bare base, no adapter attached.
        layers: that the adapter changes, by their names in the base.
        spec: with its ranks and `eva`.
        passes: rows of the run in its order, `WIDER * followed_directions` states or more in each;
            read until all layers have settled, the first once more if none are left.

    Returns:
        The start; what it was found from is decided by the passes.

    Raises:
        ModelError: a layer is not called, or what it reads is not finite.
    """
    how = eva_of(spec)
    tau = torch.tensor(how.tau)
    number, seen = 0, dict.fromkeys(layers, -1)

    def forward(model: nn.Module, index: torch.Tensor) -> None:
        nonlocal number
        number = int(index)
        if number == len(passes) - 1:
            tau.fill_(-2.0)  # below any cosine: PEFT would go round and round
        scorer(passes[number])
        _refuse_uncalled([name for name in layers if seen[name] < 0])

    def places(index: torch.Tensor, config: LoraConfig) -> torch.Tensor:
        found = scorer.places(passes[int(index)], targets=how.use_label_mask)
        return found if max(seen.values()) >= 0 else found[:_COMPARED]

    def states(inputs: Any, where: torch.Tensor, name: str) -> torch.Tensor:
        seen[name] = max(seen[name], number)
        x: torch.Tensor = inputs[0].reshape(-1, inputs[0].shape[-1])
        # The decomposition adds up in float64, which MPS has not.
        home = "cpu" if x.device.type == "mps" else x.device
        x = x.index_select(0, where.to(x.device)).to(home).float()
        if not bool(torch.isfinite(x).all()):
            raise ModelError(
                f"adapter.init = eva finds no directions: what {name} reads is not finite",
                hint="look at the rows with `alignkit inspect`, and at the base with `generate`",
            )
        return x

    found = get_eva_state_dict(
        scorer.causal,
        torch.arange(len(passes)),
        _config(layers, spec, tau),
        forward_fn=forward,
        prepare_model_inputs_fn=places,
        prepare_layer_inputs_fn=states,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    own = layer_ranks(layers, spec)
    ranks = {name: len(found[name]) for name in layers} if moves_ranks(spec) else own
    read = passes[: max(seen.values()) + 1]
    return EvaStart(
        factors={n: found[n][:r].float().cpu().contiguous() for n, r in ranks.items() if r},
        ranks=ranks,
        rows=sum(len(batch.rows) for batch in read),
        read=sum(batch.num_tokens for batch in read),
        used=sum(len(scorer.places(batch, targets=how.use_label_mask)) for batch in read),
        unsettled=tuple(n for n in layers if seen[n] == len(passes) - 1),
    )


def _refuse_uncalled(names: Sequence[str]) -> None:
    if names:
        raise ModelError(
            f"adapter.init = eva looks at what layers read, and {names[0]} is not called as a "
            "layer",
            hint="leave it out of adapter.targets, or take another adapter.init",
        )


def _config(layers: Mapping[str, Adaptable], spec: LoraSpec, tau: torch.Tensor) -> LoraConfig:
    """Of layers that read the same, PEFT goes by the largest rank: one for all moves none."""
    moves, own = moves_ranks(spec), layer_ranks(layers, spec)
    return LoraConfig(
        r=spec.rank if moves else followed_directions(layers, spec),
        rank_pattern={re.escape(n): r for n, r in own.items()} if moves else {},
        target_modules=list(layers),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=eva_of(spec).rho, tau=tau),  # type: ignore[arg-type]  # can move
    )


def followed_directions(layers: Mapping[str, Adaptable], spec: LoraSpec) -> int:
    """Directions of an input that are followed, which is as high as a rank may become.

    Args:
        layers: that the adapter changes.
        spec: with its ranks and `eva`.

    Raises:
        ModelError: the fast decomposition cannot follow so many in a layer, or its update cannot
            have such a rank.
    """
    rank, rho = max(layer_ranks(layers, spec).values()), eva_of(spec).rho
    most = round(rank * rho)
    name = min(layers, key=lambda n: min(layers[n].in_features // WIDER, layers[n].out_features))
    layer = layers[name]
    room = min(layer.in_features // WIDER, layer.out_features)
    if most > room:
        raise ModelError(
            f"adapter.init = eva follows {most} directions with a rank of {rank} and "
            f"eva.rho = {rho:g}, and {room} is the most for {name}: "
            f"{layer.in_features} × {layer.out_features}",
            hint="lower adapter.eva.rho or the rank" if rho > 1 else "lower the rank",
        )
    return most


def costliest_ranks(layers: Mapping[str, Adaptable], spec: LoraSpec) -> dict[str, int]:
    """Ranks with which the adapter would have most weights: the widest layers take all they may.

    Args:
        layers: that the adapter changes.
        spec: with its ranks and `eva`.
    """
    left, most = sum(layer_ranks(layers, spec).values()), followed_directions(layers, spec)
    found = {}
    for name in sorted(layers, key=lambda n: -(layers[n].in_features + layers[n].out_features)):
        found[name] = min(left, most)
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
    kept = tuple(name for name in layers if ranks.get(name))
    for name in kept:  # s is alpha / rank, or alpha / sqrt(rank)
        wider = ranks[name] / own[name]
        alphas[name] *= math.sqrt(wider) if spec.rslora else wider
    changes: dict[str, Any] = {
        "rank_pattern": {re.escape(n): ranks[n] for n in kept if ranks[n] != spec.rank},
        "alpha_pattern": {re.escape(n): alphas[n] for n in kept if alphas[n] != spec.alpha},
    }
    if len(kept) < len(layers):
        changes["targets"] = kept
    return spec.model_copy(update=changes)
