"""Forward passes of a model larger than memory: each weight is loaded only while it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig

from alignkit.models.heap import release_memory
from alignkit.models.peft_parts import is_of_adapter, stored_name
from alignkit.models.quiet import quiet_transformers
from alignkit.models.transformers_parts import no_init_weights


def build_without_weights(kind: Any, config: PreTrainedConfig, **options: Any) -> Any:
    """A model in float32 whose weights are all NaN and take no memory; buffers are real.

    Args:
        kind: a class of transformers with `from_config`.
        config: of the model.
        **options: for `from_config`.

    Returns:
        The model in evaluation mode. Computing with a weight that was not put in gives NaN.
    """
    with quiet_transformers(), init_empty_weights(include_buffers=False), no_init_weights():
        model = kind.from_config(config, dtype=torch.float32, **options)
    model.tie_weights()  # otherwise done where weights are drawn
    stand_ins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:  # tied weights stay tied
                module._parameters[name] = stand_ins.setdefault(id(weight), _stand_in(weight))
    return model.requires_grad_(False).eval()


def _stand_in(weight: torch.Tensor) -> nn.Parameter:
    nothing = torch.full((), torch.nan, dtype=torch.float32)
    return nn.Parameter(nothing.expand(weight.shape), requires_grad=False)


def is_stand_in(weight: torch.Tensor | None) -> bool:
    """Whether a weight takes no memory."""
    return weight is not None and weight.dim() > 0 and not any(weight.stride())


def make_room(model: Any, names: Iterable[str]) -> None:
    """Give some weights memory of their own, because an adapter's file may hold them.

    Args:
        model: from `build_without_weights`.
        names: of tensors of an adapter; those that are not weights of the model are skipped.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name in {stored_name(name) for name in names} & weights.keys():
        parent, _, key = name.rpartition(".")
        own = torch.full(weights[name].shape, torch.nan)
        model.get_submodule(parent)._parameters[key] = nn.Parameter(own, requires_grad=False)


def replaced_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name in the base's files -> value, for the base's weights that an adapter's file replaces.

    Args:
        model: with its adapter, after `make_room`; what no file has filled gives its memory back.
    """
    weights = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleDict | nn.ParameterDict) or is_of_adapter(path):
            continue
        for key, weight in list(module._parameters.items()):
            if weight is None or is_stand_in(weight):
                continue
            if weight.isnan().all():
                module._parameters[key] = _stand_in(weight)
            else:
                weights[stored_name(f"{path}.{key}")] = weight.detach()
    return weights


@contextlib.contextmanager
def holding(module: nn.Module, name: str, weight: Callable[[str], torch.Tensor]) -> Iterator[None]:
    """Load the weights of a module, in float32, for the length of the block.

    Args:
        module: of a model from `build_without_weights`, perhaps with adapters.
        name: of the module in that model.
        weight: gives a weight by its name in the base's files.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for path, part in module.named_modules(prefix=name):
            for key, stand_in in list(part._parameters.items()):
                if is_stand_in(stand_in):
                    loaded = weight(stored_name(f"{path}.{key}" if path else key)).float()
                    replaced.append((part, key, stand_in))
                    part._parameters[key] = nn.Parameter(loaded, requires_grad=False)
        yield
    finally:
        for part, key, stand_in in replaced:
            part._parameters[key] = stand_in


@contextlib.contextmanager
def streaming(model: Any, weight: Callable[[str], torch.Tensor]) -> Iterator[None]:
    """Let the model compute while it holds the weights of one decoder layer at a time.

    Args:
        model: from `build_without_weights`, perhaps with adapters, which stay in memory.
        weight: gives a weight by its name in the base's files, in any precision.
    """
    hooks = []
    for name, part in _parts(model):
        held = contextlib.ExitStack()

        def before(module: nn.Module, _: Any, name: str = name, held: Any = held) -> None:
            held.enter_context(holding(module, name, weight))

        def after(module: nn.Module, _: Any, __: Any, held: Any = held) -> None:
            held.close()
            release_memory()

        hooks += [
            part.register_forward_pre_hook(before),
            part.register_forward_hook(after, always_call=True),
        ]
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Decoder layers, and every other module that has weights of its own."""
    parts: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        own = any(is_stand_in(weight) for weight in module._parameters.values())
        if own or hasattr(module, "base_layer"):
            parts.append((name, module))
            return
        listed = isinstance(module, nn.ModuleList)
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if not listed:
                visit(path, child)
            elif any(is_stand_in(weight) for weight in child.parameters()):
                parts.append((path, child))

    visit("", model)
    return parts
