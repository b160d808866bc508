"""The undocumented parts of PEFT that alignkit uses, in one place; contract tests check them.

PEFT has no public way to change the active adapter of a layer for one pass: `set_adapter` and
`enable_adapters` also change which weights are trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from peft.tuners import PrefixEncoder
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS,
)
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

__all__ = [
    "IA3_FEEDFORWARD",
    "IA3_TARGETS",
    "active_adapter",
    "active_prefix",
    "adapter_layers",
    "convert_peft_config_for_transformers",
    "forget_merge",
    "get_eva_state_dict",
    "get_pattern_key",
    "is_of_adapter",
    "make_switchable",
    "stored_name",
    "switched",
]

_WRAPPERS = (".base_layer", ".original_module", ".token_adapter")
"""What PEFT puts into the names of the weights it wraps."""


def adapter_layers(model: nn.Module) -> list[Any]:
    """All modules that an adapter put into a model and that can be turned off."""
    kinds = (BaseTunerLayer, ModulesToSaveWrapper, PrefixEncoder)
    return [module for module in model.modules() if isinstance(module, kinds)]


def make_switchable(model: nn.Module) -> None:
    """Give prefixes the flags that other adapters have: PEFT cannot turn a prefix off."""
    for module in model.modules():
        if isinstance(module, PrefixEncoder):
            encoder: Any = module
            encoder._disable_adapters, encoder._active_adapter = False, ["default"]


@contextlib.contextmanager
def switched(layers: Sequence[Any], name: str | None) -> Iterator[None]:
    """Activate one adapter in some layers for the length of the block; nothing else changes.

    Args:
        layers: from `adapter_layers`.
        name: of the adapter; None is the base alone.
    """
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def active_adapter(layer: BaseTunerLayer) -> str | None:
    """Name of the adapter that is active in a layer; None if it is turned off."""
    if layer.disable_adapters:
        return None
    name: str = layer.active_adapters[0]
    return name


def active_prefix(model: Any) -> Any:
    """The module that gives a PEFT model's prefix; None if there is none or it is turned off."""
    encoders = getattr(model, "prompt_encoder", None)
    if encoders is None:
        return None
    encoder = encoders[model.active_adapter]
    return None if encoder._disable_adapters else encoder


def forget_merge(layer: Any) -> None:
    """Mark a merged layer as not merged; restoring its weights is up to the caller."""
    layer.merged_adapters = []
    if hasattr(layer, "_caches"):  # of LoRA, such as DoRA's norms
        layer._caches.clear()


def stored_name(name: str) -> str:
    """Name of a weight or module in the base's files, whatever PEFT wrapped around it."""
    name = name.removeprefix("base_model.model.")
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def is_of_adapter(path: str) -> bool:
    """Whether a module belongs to an adapter: PEFT ends its path with the adapter's name."""
    return path.endswith(".default") or ".default." in path
