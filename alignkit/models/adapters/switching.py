"""Several models over one base: named adapters, one of them active at a time.

PEFT's own way of switching, `set_adapter`, also changes which weights are trained, and a switch
between forward and backward gives zero gradients, or gradients of the wrong adapter, without an
error. Here a switch sets flags of the layers and nothing else, and layers that are recomputed in
the backward pass are recomputed under the adapter that ran forward.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alignkit.models.adapters.files import fitting, put_weights, read_adapter_config
from alignkit.models.adapters.patterns import require_quick_patterns
from alignkit.models.kernels.lora import use_fast_lora
from alignkit.models.peft_parts import active_adapter, adapter_layers, switched
from alignkit.models.quiet import quiet_transformers
from alignkit.models.scoring.scorer import Scores
from alignkit.packed import PackedBatch

POLICY = "default"
"""Adapter that is trained as the policy; the name PEFT gives to the first one."""


def use_adapter(model: nn.Module, name: str | None) -> contextlib.AbstractContextManager[None]:
    """Activate one adapter for the length of the block.

    Args:
        model: carries adapters; without any, nothing happens.
        name: of the adapter; None is the base alone.
    """
    return switched(adapter_layers(model), name)


@dataclass(frozen=True)
class Role:
    """A model in one of several roles: the scorer, and the adapter that is active in it.

    Args:
        scorer: may share its model with other roles.
        adapter: name of the adapter; None is the model without adapters, or one that has none.
    """

    scorer: Any
    adapter: str | None = None

    def __call__(self, batch: PackedBatch) -> Scores:
        """The scorer's results under this role's adapter."""
        with self.active():
            scores: Scores = self.scorer(batch)
            return scores

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Activate the role's adapter for the length of the block."""
        return use_adapter(self.scorer.model, self.adapter)


def recompute_as_run(model: nn.Module) -> Any:
    """`context_fn` of torch's checkpointing: recompute a layer under the adapter that ran it.

    Args:
        model: carries the adapters.

    Returns:
        A function that torch calls at each checkpointed forward pass.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), use_adapter(model, active_adapter(layers[0]))

    return contexts


def add_adapter(model: PeftModel, name: str, config: LoraConfig, seed: int) -> None:
    """Put another adapter on a PEFT model; it is not active and not trained yet.

    Args:
        model: carries at least one adapter.
        name: of the new one.
        config: its rank, targets and scale.
        seed: of its random half.
    """
    torch.manual_seed(seed)
    with quiet_transformers():
        model.add_adapter(name, config)
    use_fast_lora(model)


def add_stored_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Put an adapter from disk on a PEFT model, without the head that may be stored with it.

    Args:
        model: over the base that the adapter was trained on.
        name: its name in this model.
        folder: PEFT adapter folder.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    config = read_adapter_config(folder)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    config.lora_dropout = 0.0  # roles score in training mode
    require_quick_patterns(config, model.state_dict, folder)
    with fitting(folder):
        model.add_adapter(name, config)
    put_weights(model, folder, name)
    use_fast_lora(model)


def train_only(model: nn.Module, names: set[str]) -> None:
    """Set which adapters are trained; every other weight is frozen.

    Args:
        model: carries the adapters.
        names: of those that are trained.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for part in (getattr(module, kind, {}) for kind in module.adapter_layer_names):
                for name in names & set(part.keys()):
                    part[name].requires_grad_(True)


def remove_dropout(model: nn.Module) -> None:
    """Turn off a model's own dropout: with it, the ratio of two passes would not be 1.

    Args:
        model: changed in place.
    """
    for module, name in _dropouts(model):
        setattr(module, name, 0.0)


def recompute_layers(model: Any, **options: Any) -> None:
    """Let decoder layers compute their activations again in the backward pass.

    Args:
        model: of transformers, with or without adapters.
        **options: of torch's checkpointing.
    """
    # The state of the random numbers is a read of the device for each layer.
    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "preserve_rng_state": drops_out(model), **options}
    )


def drops_out(model: nn.Module) -> bool:
    """Whether anything in a model is dropped at random in training."""
    return any(getattr(module, name) > 0 for module, name in _dropouts(model))


def _dropouts(model: nn.Module) -> list[tuple[Any, str]]:
    """Modules and the names of their probabilities."""
    return [
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
        and ("drop" in name or (name == "p" and "Drop" in type(module).__name__))
    ]


def freeze_head_adapter(model: Any, name: str) -> None:
    """Freeze an adapter's part of the vocabulary head: a value model never uses it.

    Args:
        model: carries the adapter.
        name: of the adapter.
    """
    head: nn.Module = model.get_base_model().get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        for part, weight in head.named_parameters():
            if f".{name}." in part:
                weight.requires_grad_(False)
