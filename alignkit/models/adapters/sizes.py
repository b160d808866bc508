"""Sizes of a model, read from its configuration without loading a weight."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from alignkit.models.adapters.attach import adapted_skeleton, peft_config, trainable_report
from alignkit.models.adapters.eva import costliest_ranks, followed_directions, with_ranks
from alignkit.models.adapters.prefix import count_weights, prefix_config
from alignkit.models.adapters.stacks import stacked_weights
from alignkit.models.adapters.targets import (
    adapted_layers,
    frozen_weights,
    require_free_vocabulary,
    vocabulary_ends,
)
from alignkit.models.base.skeleton import build_skeleton
from alignkit.recipe.adapters import (
    AnyAdapter,
    AnySpec,
    FullSpec,
    LoraSpec,
    PrefixSpec,
    moves_ranks,
)
from alignkit.recipe.facts import ModelFacts


def measure_model(
    config: PreTrainedConfig,
    adapter: AnySpec,
    *,
    trust_remote_code: bool = False,
    scalar_head: bool = False,
    new_tokens: int = 0,
) -> ModelFacts:
    """Sizes that the planner needs, and a check of the adapter's targets.

    Args:
        config: a transformers configuration.
        adapter: what is trained.
        trust_remote_code: build a model whose code is not in transformers.
        scalar_head: a reward model's head is trained instead of the vocabulary head.
        new_tokens: added to the vocabulary; an adapter trains their rows.

    Returns:
        The facts; `trainable` counts weights that the adapter would train. If the rows decide its
        ranks, the widest layers count with the most they may take.

    Raises:
        ModelError: not a causal language model, or a target that matches nothing.
    """
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    total = sum(parameter.numel() for parameter in model.parameters())
    weights = dict(model.named_parameters())
    experts = {name for name, one in stacked_weights(model).items() if one.stacked}
    changed: set[str] = set()
    if isinstance(adapter, LoraSpec):
        changed = experts & adapted_layers(model, adapter).keys()
    if isinstance(adapter, FullSpec):
        frozen = frozen_weights(weights, adapter)
        trainable = sum(w.numel() for name, w in weights.items() if name not in frozen)
    else:
        frozen = set(weights)
        trainable = 0
        if new_tokens and not isinstance(adapter, PrefixSpec):
            require_free_vocabulary(model, adapter)
            ends = {id(m.weight): m.weight for m in vocabulary_ends(model).values()}
            trainable += new_tokens * sum(weight.shape[1] for weight in ends.values())
        trainable += _trainable(model, adapter, scalar_head)
    text = config.get_text_config()
    if scalar_head:
        head: Any = model.get_output_embeddings()
        own = head is not None and head.weight is not model.get_input_embeddings().weight
        trainable += int(text.hidden_size)
        if own and any(w is head.weight for n, w in weights.items() if n not in frozen):
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
        prefix=adapter.tokens if isinstance(adapter, PrefixSpec) else 0,
        at_most=moves_ranks(adapter),
        experts=sum(weights[name].numel() for name in experts),
        changed_experts=sum(weights[name].numel() for name in changed),
    )


def _trainable(model: PreTrainedModel, spec: AnyAdapter, scalar_head: bool) -> int:
    """Number of adapter weights that are trained: none on a reward model's vocabulary head.

    PEFT puts its adapter on the model, which has no storage, and its weights are counted.
    """
    if isinstance(spec, PrefixSpec):
        return count_weights(prefix_config(model, spec))
    peft_config(model, spec)  # the start may need twice the rank
    if isinstance(spec, LoraSpec) and spec.init != "default":
        if spec.init == "eva":
            followed_directions(adapted_layers(model, spec), spec)
        if moves_ranks(spec):
            spec = with_ranks(model, spec, costliest_ranks(adapted_layers(model, spec), spec))
        # What a start adds to the rank is not trained.
        spec = spec.model_copy(update={"init": "default"})
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    trained = trainable_report(adapted_skeleton(model, spec)).trainable
    module: nn.Module
    for module in model.modules():
        if scalar_head and isinstance(module, BaseTunerLayer) and module.get_base_layer() is head:
            trained -= sum(w.numel() for w in module.parameters() if w.requires_grad)
    return trained
