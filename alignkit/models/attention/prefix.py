"""A trained prefix in use: keys and values in each layer that come before those of every row."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from alignkit.errors import ModelError
from alignkit.models.peft_parts import active_prefix

SLIDING = "sliding_attention"
"""transformers' name for layers with a sliding window."""


def prefix_length(model: Any) -> int:
    """Tokens of context that a prefix takes, `P`; 0 if there is none, or it is turned off."""
    encoder = active_prefix(model)
    return 0 if encoder is None else int(encoder.embedding.num_embeddings)


def prefix_states(model: Any) -> torch.Tensor | None:
    """Keys and values of the active prefix.

    Args:
        model: with or without adapters.

    Returns:
        `[L, 2, K, P, D]` float32, keys before values; None if there is no prefix, or it is
        turned off.
    """
    encoder = active_prefix(model)
    if encoder is None:
        return None
    config = model.active_peft_config
    heads = config.num_attention_heads
    tokens = torch.arange(config.num_virtual_tokens, device=encoder.embedding.weight.device)
    flat: torch.Tensor = encoder(tokens)
    states: torch.Tensor = flat.unflatten(1, (config.num_layers, 2, heads, -1))
    return states.permute(1, 2, 3, 0, 4)


def has_window(config: PreTrainedConfig) -> bool:
    """Whether a layer has a sliding window.

    Padding between a prefix and a row's own tokens would push the prefix out of the window, so
    only prompts of one length may be continued together.

    Args:
        config: of a transformers model.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [SLIDING]
    return bool(getattr(text, "sliding_window", None)) and SLIDING in kinds


def with_cached_prefix(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a pass over padded rows, with the prefix as PEFT gives it to the model.

    Args:
        model: with or without adapters.
        inputs: `input_ids` `[B, T]`, `attention_mask` `[B, T]` and so on; without positions.

    Returns:
        The inputs themselves if there is no prefix. A cache serves one pass only.

    Raises:
        ModelError: activations are recomputed; transformers drops caches then.
    """
    if active_prefix(model) is None:
        return inputs
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise ModelError(
            "a prefix over padded rows is a cache, which does not work with gradient checkpointing",
            hint="set training.gradient_checkpointing=false, or model.attention=auto",
        )
    mask = inputs["attention_mask"]
    seen = mask.new_ones(len(mask), prefix_length(model))
    cache = model.get_prompt(len(mask))
    return {**inputs, "attention_mask": torch.cat([seen, mask], dim=1), "past_key_values": cache}
