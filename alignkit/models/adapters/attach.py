"""Adapters over one base: attach, turn off, report."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.tuners import PrefixEncoder
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.adapters.prefix import prefix_config, prefix_shape, start_prefix
from alignkit.models.adapters.stacks import Adaptable, has_experts, shortened
from alignkit.models.adapters.starts import HELD, start_factors, with_frozen_half
from alignkit.models.adapters.targets import (
    adapted_layers,
    frozen_weights,
    ia3_names,
    patterned,
    require_free_vocabulary,
    saved_modules,
    vocabulary_ends,
)
from alignkit.models.kernels.lora import use_fast_lora
from alignkit.models.peft_parts import adapter_layers, make_switchable, stored_name, switched
from alignkit.models.quiet import quiet_transformers
from alignkit.recipe.adapters import AnyAdapter, AnySpec, FullSpec, Ia3Spec, LoraSpec, PrefixSpec


@dataclass(frozen=True)
class TrainableReport:
    """What is trained.

    Args:
        trainable: number of trained weights.
        total: number of all weights, shared ones once.
        modules: last part of an adapted module's name, with its input and output width -> how
            many there are.
    """

    trainable: int
    total: int
    modules: dict[tuple[str, int, int], int]

    def line(self) -> str:
        """The report in one sentence."""
        share = self.trainable / self.total
        shapes = [f"{n}×{name} {i}→{o}" for (name, i, o), n in self.modules.items()]
        where = ", ".join(shapes) or ("all of them" if self.trainable == self.total else "the rest")
        return f"trains {self.trainable:,} weights ({share:.2%}): {where}"


def peft_config(
    model: nn.Module,
    spec: AnyAdapter,
    task: str = "CAUSAL_LM",
    new_tokens: Sequence[int] = (),
) -> PeftConfig:
    """PEFT's configuration of an adapter.

    Args:
        model: with or without storage; its layers are what the targets name.
        spec: of the recipe.
        task: PEFT's name for the model's task.
        new_tokens: ids whose rows of embedding and output head are trained.

    Raises:
        ModelError: a target or a pattern matches nothing, a rank is above a layer's size, or the
            model has no place for a prefix.
    """
    if isinstance(spec, PrefixSpec):
        return prefix_config(model, spec, task)
    if isinstance(spec, LoraSpec):
        spec = with_frozen_half(spec)
    layers = adapted_layers(model, spec)
    if new_tokens:
        require_free_vocabulary(model, spec)
    if isinstance(spec, Ia3Spec):
        targets, feedforward = ia3_names(model, spec)
        return IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type=task)
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=spec.dropout,
        **_targets(model, spec, layers),
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        rank_pattern=_by_layer(patterned(layers, spec.rank_pattern, "rank_pattern")),
        alpha_pattern=_by_layer(patterned(layers, spec.alpha_pattern, "alpha_pattern")),
        modules_to_save=saved_modules(model, spec) or None,
        trainable_token_indices=_token_rows(model, new_tokens),
        task_type=task,
    )


def _targets(model: nn.Module, spec: LoraSpec, layers: Mapping[str, Adaptable]) -> dict[str, Any]:
    """Targets as PEFT wants them; in a model with experts it would widen regular expressions."""
    if not has_experts(model):
        return {
            "target_modules": spec.targets if isinstance(spec.targets, str) else [*spec.targets]
        }
    parameters = [name for name, layer in layers.items() if layer.parameter]
    modules = layers.keys() - set(parameters)
    return {
        "target_modules": shortened(modules, (n for n, _ in model.named_modules()), 1),
        "target_parameters": shortened(parameters, (n for n, _ in model.named_parameters()), 2)
        or None,
    }


def _by_layer(values: dict[str, Any]) -> dict[str, Any]:
    """Patterns that match one layer each: files are sorted, and the first match counts."""
    return {re.escape(name): value for name, value in values.items()}


def _token_rows(model: Any, ids: Sequence[int]) -> Any:
    """Where the rows of new tokens are, as PEFT wants it."""
    if not ids:
        return None
    ends = vocabulary_ends(model)
    if len({id(module.weight) for module in ends.values()}) == 1:
        return list(ids)  # PEFT finds both ends of a shared matrix
    return {name.rsplit(".", 1)[-1]: list(ids) for name in ends}


def attach_adapter(
    model: PreTrainedModel,
    spec: AnySpec,
    seed: int,
    new_tokens: Sequence[int] = (),
    initial: Callable[[str], torch.Tensor] | None = None,
) -> Any:
    """Make the model trainable the way the recipe says.

    Args:
        model: a frozen or plain causal language model.
        spec: an adapter, or all weights.
        seed: of the adapter's random half; the other half starts at zero.
        new_tokens: ids whose rows are trained too; full training trains them anyway.
        initial: what some starts are made from; see `start_factors` and `start_prefix`.

    Returns:
        A PEFT model whose adapter weights are float32, or the model itself with its weights
        trainable in float32, except those that stay frozen.
    """
    if isinstance(spec, FullSpec):
        model.float().requires_grad_(True)
        frozen = frozen_weights((name for name, _ in model.named_parameters()), spec)
        for name, weight in model.named_parameters():
            weight.requires_grad_(name not in frozen)
        return model
    config = peft_config(model, spec, new_tokens=new_tokens)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    with quiet_transformers():
        adapted = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:  # copies of whole modules come in the base's precision
            weight.data = weight.data.float()
    if isinstance(spec, PrefixSpec) and initial is not None:
        start_prefix(adapted, initial)
    if isinstance(spec, LoraSpec):
        start_factors(adapted, spec, seed, initial)
    use_fast_lora(adapted)
    make_switchable(adapted)
    return adapted


def adapted_skeleton(model: nn.Module, spec: AnyAdapter) -> Any:
    """A model without storage with a fresh adapter, which has none either.

    Args:
        model: on the meta device; changed in place.
        spec: an adapter.
    """
    config = peft_config(model, spec)
    with quiet_transformers(), torch.device("meta"):
        return get_peft_model(model.requires_grad_(False), config)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Turn adapters and gradients off for the length of the block.

    Only a flag of each layer is set, so the same weights stay trained. No graph can be made inside:
    one whose backward pass runs under other adapters would be silently wrong.

    Args:
        model: carries adapters somewhere inside.

    Raises:
        ModelError: it has no adapter to turn off.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ModelError("there is no adapter to turn off", hint="set reference.kind to cached")
    with switched(layers, None), torch.no_grad():
        yield


def _widths(module: Any) -> tuple[int, int]:
    shape = next(module.original_module.parameters()).shape
    return int(shape[-1]), int(shape[0])


def _own_name(name: str, module: Any) -> str:
    """Last part of a layer's name; for a parameter, its name after that of its module."""
    last = stored_name(name).rsplit(".", 1)[-1]
    parameter = getattr(module, "parameter_name", None)
    return f"{last}.{parameter}" if parameter else last


def trainable_report(model: nn.Module) -> TrainableReport:
    """How many weights are trained, and in which modules."""
    modules: dict[tuple[str, int, int], int] = {}
    key: tuple[str, int, int]
    module: nn.Module
    for name, module in model.named_modules():
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        if isinstance(module, TrainableTokensLayer):
            rows, width = module.weight.shape
            key = f"new rows of {name.rsplit('.', 2)[-2]}", width, rows
        elif isinstance(module, BaseTunerLayer) and trained:
            layer: Any = module
            key = _own_name(name, layer), layer.in_features, layer.out_features
        elif isinstance(module, ModulesToSaveWrapper):
            key = f"all of {name.rsplit('.', 1)[-1]}", *_widths(module)
        elif isinstance(module, PrefixEncoder):
            key = prefix_shape(module)
        else:
            continue
        modules[key] = modules.get(key, 0) + 1
    parameters = list(model.parameters())
    trained = sum(p.numel() - getattr(p, HELD, 0) for p in parameters if p.requires_grad)
    return TrainableReport(trained, sum(p.numel() for p in parameters), modules)
