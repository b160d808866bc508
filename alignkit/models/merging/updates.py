"""A base's weights after adapters, layer by layer, in float32.

The arithmetic of a layer is PEFT's own, so every kind of adapter that PEFT can merge is merged
here: each layer gets its weights, is merged, and gives them back. Several adapters are combined as
changes of whole weights, Δ = merged - base: adding up factors instead would multiply one adapter's
A with another's B.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties

from alignkit.errors import ModelError
from alignkit.models.peft_parts import forget_merge, stored_name
from alignkit.models.quiet import quiet_transformers
from alignkit.models.weights.streaming import holding, replaced_weights

Method = Literal["linear", "ties", "dare_linear", "dare_ties"]

METHODS: tuple[Method, ...] = ("linear", "ties", "dare_linear", "dare_ties")
"""`linear` is Σ w Δ. TIES (https://arxiv.org/abs/2306.01708) keeps each Δ's largest entries and
the sign that prevails; DARE (https://arxiv.org/abs/2311.03099) drops entries at random and scales
up the others, with either rule for the sum."""


@dataclass(frozen=True)
class AdapterPart:
    """One of the adapters that are merged.

    Args:
        folder: PEFT adapter folder.
        weight: its Δ is multiplied by this.
    """

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Blend:
    """Adapters, and how they are combined into one change.

    Args:
        parts: at least one.
        method: one of `METHODS`; a single adapter is applied as it is.
        density: share of each Δ's entries that TIES and DARE keep, above 0 and at most 1.
    """

    parts: tuple[AdapterPart, ...]
    method: Method = "linear"
    density: float = 0.5


_Adapted = tuple[str, list[Any]]
"""Name of a layer in the model, and the adapters around it: one, or one for each parameter."""


class Updates:
    """Base weights after adapters, by name.

    Args:
        models: the base without storage under one adapter each; see `build_without_weights`.
        blend: the adapters, in the same order.
        base: gives a base weight by its name.

    Raises:
        ModelError: an adapter changes what cannot be combined.
    """

    def __init__(
        self,
        models: Sequence[Any],
        blend: Blend,
        base: Callable[[str], torch.Tensor],
    ) -> None:
        self._base, self._blend = base, blend
        self._layers: dict[str, list[_Adapted | None]] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        for position, model in enumerate(models):
            for name, module in model.named_modules():
                if isinstance(module, ModulesToSaveWrapper):
                    kept = module.modules_to_save["default"]
                    for key, weight in kept.named_parameters():
                        self._replace(f"{stored_name(name)}.{key}", weight)
                elif isinstance(module, BaseTunerLayer):
                    parts = self._layers.setdefault(stored_name(name), [None] * len(models))
                    # Wrappers around several parameters are nested: the outer one comes first.
                    parts[position] = parts[position] or (name, [])
                    parts[position][1].append(module)  # type: ignore[index]
            for name, value in replaced_weights(model).items():
                # Else merged with its layer, or what was there before a whole module was trained.
                if name.rpartition(".")[0] not in self._layers and name not in self._replaced:
                    self._replace(name, value)
        self._kept: tuple[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = ("", {})

    @property
    def plain(self) -> bool:
        """Whether it is one adapter as it was trained."""
        return len(self._blend.parts) == 1 and self._blend.parts[0].weight == 1.0

    @property
    def modules(self) -> int:
        """Number of changed layers."""
        replaced = {name.rpartition(".")[0] for name in self._replaced}
        return len(self._layers) + len(replaced)

    @property
    def changed(self) -> set[str]:
        """Names of the weights that may be changed."""
        names = set(self._replaced)
        for layer, parts in self._layers.items():
            for _, modules in filter(None, parts):
                own = modules[0].get_base_layer()._parameters.items()
                names |= {f"{layer}.{key}" for key, weight in own if weight is not None}
        return names

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight before and after, both float32.

        Args:
            name: one of `changed`.
        """
        if name in self._replaced:
            return self._base(name).float(), self._replaced[name]
        layer, _, key = name.rpartition(".")
        if self._kept[0] != layer:  # a layer's bias comes right after its weight
            self._kept = layer, self._merge(layer)
        return self._kept[1][key]

    def after(self, name: str) -> torch.Tensor:
        """Any weight, with the adapters' change if it has one."""
        return self.pair(name)[1] if name in self.changed else self._base(name)

    def release(self) -> None:
        """Forget the last layer."""
        self._kept = ("", {})

    def _replace(self, name: str, weight: torch.Tensor) -> None:
        if not self.plain:
            raise ModelError(
                f"{name} is trained as a whole by one of the adapters, which cannot be combined or "
                "weighted",
                hint="merge that adapter alone",
            )
        self._replaced[name] = weight.detach().float()

    def _merge(self, layer: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Name of each weight of a layer -> before and after."""
        parts = self._layers[layer]
        merged = [part and _merged(*part, self._base) for part in parts]
        before = next(filter(None, merged))[0]
        if self.plain:
            after = merged[0][1]  # type: ignore[index]
            return {key: (before[key], after[key]) for key in before}
        pairs = {}
        for key, weight in before.items():
            deltas = [
                torch.zeros_like(weight) if one is None else one[1][key] - weight for one in merged
            ]
            pairs[key] = weight, weight + self._combine(f"{layer}.{key}", deltas)
        return pairs

    def _combine(self, name: str, deltas: list[torch.Tensor]) -> torch.Tensor:
        method, density = self._blend.method, self._blend.density
        factors = torch.tensor([part.weight for part in self._blend.parts])
        if method == "linear":
            return task_arithmetic(deltas, factors)
        if method == "ties":
            return ties(deltas, factors, density)
        drop = dare_linear if method == "dare_linear" else dare_ties
        with torch.random.fork_rng(devices=[]):  # what is dropped depends only on the name
            torch.manual_seed(seed_of(name))
            return drop(deltas, factors, density)


def seed_of(name: str) -> int:
    """A seed that depends on a weight's name only, not on the order or the files of a merge."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


@torch.no_grad()
def _merged(
    name: str, modules: list[Any], base: Callable[[str], torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of one layer before and after its adapters."""

    def copied(weight: str) -> torch.Tensor:
        return base(weight).to(torch.float32, copy=True)  # merged in place, but mapped from a file

    layer = modules[0].get_base_layer()
    with holding(layer, name, copied), quiet_transformers():
        before = {key: w.detach().clone() for key, w in layer._parameters.items() if w is not None}
        try:
            for module in modules:
                module.merge(safe_merge=True)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            diverged = "NaN" in str(error)
            raise ModelError(
                f"{stored_name(name)} cannot be merged: {str(error) or type(error).__name__}",
                hint="training diverged; use an earlier checkpoint"
                if diverged
                else "PEFT cannot merge such a layer: use the adapter as it is",
            ) from error
        after = {key: w.detach() for key, w in layer._parameters.items() if w is not None}
    for module in modules:
        forget_merge(module)
    return before, after
