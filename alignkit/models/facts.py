"""Sizes of a model, read from its configuration without loading a weight."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from alignkit.errors import ModelError
from alignkit.models.adapters import check_targets
from alignkit.models.loading import quiet_transformers
from alignkit.recipe.facts import ModelFacts
from alignkit.recipe.schema import FullSpec, LoraSpec


def build_skeleton(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The model without storage, on the meta device.

    Raises:
        ModelError: the configuration is of no causal language model.
    """
    try:
        with quiet_transformers(), torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError, ImportError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{config.model_type!r} is no causal language model: {first_line}",
            hint="alignkit trains decoder models that AutoModelForCausalLM loads",
        ) from error
    return model


def measure_model(
    config: Any,
    adapter: LoraSpec | FullSpec,
    *,
    trust_remote_code: bool = False,
    scalar_head: bool = False,
) -> ModelFacts:
    """Sizes that the planner needs, and a check of the adapter's targets.

    Args:
        config: a transformers configuration.
        adapter: what is trained.
        trust_remote_code: build a model whose code is not in transformers.
        scalar_head: a reward model's head is trained instead of the vocabulary head.

    Returns:
        The facts; `trainable` counts weights that the adapter would train.

    Raises:
        ModelError: no causal language model, or a target that matches nothing.
    """
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    total = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(adapter, LoraSpec):
        check_targets(model, adapter)
        trainable = sum(adapter.rank * (i + o) for i, o in _adapted(model, adapter, scalar_head))
    else:
        trainable = total
    text = config.get_text_config()
    if scalar_head:
        head: Any = model.get_output_embeddings()
        unused = head is not None and head.weight is not model.get_input_embeddings().weight
        trainable += int(text.hidden_size)
        if unused and not isinstance(adapter, LoraSpec):
            trainable -= int(head.weight.numel())
    heads = int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return ModelFacts(
        architecture=type(model).__name__,
        parameters=total,
        trainable=trainable,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        intermediate=int(getattr(text, "intermediate_size", 0) or 4 * text.hidden_size),
        attention_width=heads * head_dim,
        key_value_width=int(getattr(text, "num_key_value_heads", heads) or heads) * head_dim,
        vocabulary=int(text.vocab_size),
        context=int(getattr(text, "max_position_embeddings", 0) or 0),
    )


def _adapted(model: nn.Module, adapter: LoraSpec, scalar_head: bool) -> list[tuple[int, int]]:
    """Input and output width of every linear layer whose adapter is trained; a reward model's
    vocabulary head is not."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    shapes = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        targets = adapter.targets
        if targets == "all-linear":
            chosen = module is not head
        elif isinstance(targets, str):
            chosen = re.fullmatch(targets, name) is not None
        else:
            chosen = any(name == target or name.endswith(f".{target}") for target in targets)
        if chosen and not (scalar_head and module is head):
            shapes.append((module.in_features, module.out_features))
    return shapes
