"""EVA: LoRA's A starts from the main directions of its layer's inputs (arXiv 2410.07170).

PEFT's `get_eva_state_dict` finds them pass by pass, and the ranks that follow from them; B is 0, so
nothing changes at first. Added here is what it lacks: packed rows, and an end to the passes.
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
"""PEFT's fast decomposition follows this many times the wanted directions."""

_COMPARED = 8
"""States of a layer's input that identify equal inputs: PEFT hashes them number by number."""


@dataclass(frozen=True)
class EvaStart:
    """Where LoRA's A starts, and how much was read to find it.

    Args:
        factors: name of each layer that has a rank -> A, `[r, I]` float32, rows of length 1.
        ranks: name of each layer -> its rank, 0 for one that is left alone.
        rows: documents that were read.
        read: tokens that were read.
        used: states that were looked at.
        unsettled: layers that were still looked at in the last pass; of several with the same
            input, one.
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
        The start, and how much was read to find it.

    Raises:
        ModelError: a layer is not called, or its input is not finite.
    """
    how = eva_of(spec)
    tau = torch.tensor(how.tau)
    number, seen = 0, dict.fromkeys(layers, -1)

    def forward(model: nn.Module, index: torch.Tensor) -> None:
        nonlocal number
        number = int(index)
        if number == len(passes) - 1:
            tau.fill_(-2.0)  # below any cosine: PEFT would start over without end
        scorer(passes[number])
        _refuse_uncalled([name for name in layers if seen[name] < 0])

    def places(index: torch.Tensor, config: LoraConfig) -> torch.Tensor:
        positions = scorer.places(passes[int(index)], targets=how.use_label_mask)
        return positions if max(seen.values()) >= 0 else positions[:_COMPARED]

    def states(inputs: Any, where: torch.Tensor, name: str) -> torch.Tensor:
        seen[name] = max(seen[name], number)
        x: torch.Tensor = inputs[0].reshape(-1, inputs[0].shape[-1])
        # The decomposition accumulates in float64, which MPS lacks.
        home = "cpu" if x.device.type == "mps" else x.device
        x = x.index_select(0, where.to(x.device)).to(home).float()
        if not bool(torch.isfinite(x).all()):
            raise ModelError(
                f"adapter.init = eva finds no directions: the input of {name} is not finite",
                hint="check the rows with `alignkit inspect` and the base with `alignkit generate`",
            )
        return x

    factors = get_eva_state_dict(
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
    ranks = {name: len(factors[name]) for name in layers} if moves_ranks(spec) else own
    read = passes[: max(seen.values()) + 1]
    return EvaStart(
        factors={n: factors[n][:r].float().cpu().contiguous() for n, r in ranks.items() if r},
        ranks=ranks,
        rows=sum(len(batch.rows) for batch in read),
        read=sum(batch.num_tokens for batch in read),
        used=sum(len(scorer.places(batch, targets=how.use_label_mask)) for batch in read),
        unsettled=tuple(n for n in layers if seen[n] == len(passes) - 1),
    )


def _refuse_uncalled(names: Sequence[str]) -> None:
    if names:
        raise ModelError(
            f"adapter.init = eva needs the inputs of layers, and {names[0]} is not called as a "
            "layer",
            hint="remove it from adapter.targets, or choose another adapter.init",
        )


def _config(layers: Mapping[str, Adaptable], spec: LoraSpec, tau: torch.Tensor) -> LoraConfig:
    """Of layers with the same input, PEFT uses the largest rank: one rank for all moves none."""
    moves, own = moves_ranks(spec), layer_ranks(layers, spec)
    return LoraConfig(
        r=spec.rank if moves else followed_directions(layers, spec),
        rank_pattern={re.escape(n): r for n, r in own.items()} if moves else {},
        target_modules=list(layers),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=eva_of(spec).rho, tau=tau),  # type: ignore[arg-type]  # can move
    )


def followed_directions(layers: Mapping[str, Adaptable], spec: LoraSpec) -> int:
    """How many directions of an input are followed: the highest rank that a layer can get.

    Args:
        layers: that the adapter changes.
        spec: with its ranks and `eva`.

    Raises:
        ModelError: the fast decomposition cannot follow that many in a layer, or its update cannot
            have that rank.
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
    """Ranks that give the adapter the most weights: the widest layers take all they may.

    Args:
        layers: that the adapter changes.
        spec: with its ranks and `eva`.
    """
    left, most = sum(layer_ranks(layers, spec).values()), followed_directions(layers, spec)
    ranks = {}
    for name in sorted(layers, key=lambda n: -(layers[n].in_features + layers[n].out_features)):
        ranks[name] = min(left, most)
        left -= ranks[name]
    return ranks


def with_ranks(model: nn.Module, spec: LoraSpec, ranks: Mapping[str, int]) -> LoraSpec:
    """The adapter with these ranks, each layer at the scale s that it has in the recipe.

    Args:
        model: with or without storage.
        spec: of the recipe.
        ranks: name of each layer with a rank -> that rank; other layers are left alone.
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
