"""Weights outside linear layers that adapters change: experts in one stack, and their routers.

In transformers the experts of a layer are two parameters, `experts.gate_up_proj` `[E, 2 I, H]` and
`experts.down_proj` `[E, H, I]`, and the router is a separate module. PEFT adapts such parameters
by name; it also reads some names of older versions, such as `gate_proj`, as parts of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from alignkit.errors import ModelError
from alignkit.models.peft_parts import convert_peft_config_for_transformers
from alignkit.recipe.adapters import LoraSpec

ROUTING = ("gate", "router", "shared_expert_gate")
"""Names of the modules that decide how much of which expert a token gets."""


class Adaptable(NamedTuple):
    """What an adapter can change.

    Args:
        module: a linear layer, or what holds the parameter.
        in_features: width of its input.
        out_features: width of its output.
        parameter: its name in the module; empty for a linear layer.
        stacked: whether it is one of several in a stack.
    """

    module: Any
    in_features: int
    out_features: int
    parameter: str = ""
    stacked: bool = False


def linear_layers(model: nn.Module) -> dict[str, Adaptable]:
    """Name of each linear layer -> that layer."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layers[name] = Adaptable(module, module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # of GPT-2: a linear layer that is stored transposed
            layers[name] = Adaptable(module, module.nx, module.nf)
    return layers


def stacked_weights(model: nn.Module) -> dict[str, Adaptable]:
    """Name of each parameter that holds experts, or their router -> that parameter."""
    stacks = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last not in ("experts", *ROUTING) or isinstance(module, nn.Linear):
            continue
        for key, weight in module.named_parameters(recurse=False):
            if last == "experts" and weight.dim() == 3:
                outputs, inputs = weight.shape[1:]
                if getattr(module, "is_transposed", False):
                    outputs, inputs = inputs, outputs
                stacks[f"{name}.{key}"] = Adaptable(module, inputs, outputs, key, stacked=True)
            elif last != "experts" and key == "weight" and weight.dim() == 2:
                outputs, inputs = weight.shape
                stacks[f"{name}.{key}"] = Adaptable(module, inputs, outputs, key)
    return stacks if any(one.stacked for one in stacks.values()) else {}


def read_as_experts(model: nn.Module, name: str) -> bool:
    """Whether PEFT takes a target of this name for a part of the experts or of their router."""
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two that are stored as one
        return True
    return bool(config.target_parameters)


def has_experts(model: nn.Module) -> bool:
    """Whether a model holds experts, or PEFT reads its targets as if it did."""
    return bool(stacked_weights(model)) or read_as_experts(model, "down_proj")


def stack_names(stacks: Iterable[str]) -> list[str]:
    """Shortest names that identify these parameters, such as `experts.down_proj`."""
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in stacks))


def shortened(chosen: Collection[str], every: Iterable[str], parts: int) -> list[str]:
    """Names that stand for the chosen ones and no others, short where possible.

    Args:
        chosen: full names.
        every: all names there are.
        parts: of a name, counted from its end, that may stand for it.

    Returns:
        The ends that only chosen names have, and the full names of the others.
    """
    chosen = set(chosen)
    ends = {name: ".".join(name.split(".")[-parts:]) for name in chosen}
    shared = {".".join(name.split(".")[-parts:]) for name in set(every) - chosen}
    return sorted({name if end in shared else end for name, end in ends.items()})


def require_plain(layers: Mapping[str, Adaptable], spec: LoraSpec) -> None:
    """Refuse what PEFT cannot train on parameters.

    Args:
        layers: that the adapter changes.
        spec: of the recipe.

    Raises:
        ModelError: says what does not go together, and how to leave those parameters out.
    """
    names = [name for name, layer in layers.items() if layer.parameter]
    if not names:
        return
    odd = []
    if spec.dropout:
        odd.append(f"dropout = {spec.dropout}")
    if spec.dora:
        odd.append("dora = true")
    if spec.init != "default":
        odd.append(f"init = {spec.init}")
    if odd:
        linear = dict.fromkeys(n.rpartition(".")[2] for n, la in layers.items() if not la.parameter)
        without = f"adapter.targets: [{', '.join(linear)}]" if linear else "other adapter.targets"
        raise ModelError(
            f"adapter.{odd[0]} works with linear layers only, and {names[0]} is not one: PEFT "
            "changes experts and routers as plain weights",
            hint=f"remove adapter.{odd[0].split()[0]}, or leave them out: {without}",
        )
