"""The settings of a GGUF file: sizes, attention, rotary embedding; settings without a key are
refused.

Readers of the format hard-wire some facts of each architecture. A model that differs there would
load and compute something else, so it is an error here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from alignkit.errors import ModelError
from alignkit.models.export.gguf_names import Family, family_of
from alignkit.models.transformers_parts import ROPE_INIT_FUNCTIONS

SWA_PERIOD = {"gemma2": 2, "gemma3": 6}
"""One layer in this many attends to everything, unless the file says otherwise."""

WIDE_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Readers take a model with this many layers for the 27B one, which scales attention differently.
"""

Value = int | float | str


@dataclass
class Settings:
    """What is written besides the tensors.

    Args:
        values: key without the architecture's name -> value; ints are unsigned.
        rope_factors: `[D/2]` what the rotary frequencies are divided by; None if they stay.
        notes: sentences the user must know.
    """

    values: dict[str, Value]
    rope_factors: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)


def settings_of(config: PreTrainedConfig) -> Settings:
    """The settings of a model.

    Args:
        config: its transformers configuration.

    Raises:
        ModelError: something in it has no place in the format.
    """
    family = family_of(config)
    _refuse_unknown(config, family)
    width = head_width(config)
    values: dict[str, Value] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "vocab_size": config.vocab_size,
    }
    settings = Settings(values)
    _add_rope(settings, config, family)
    _add_window(settings, config, family)
    if family.architecture == "gemma2":
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            values[name] = float(getattr(config, name))
    return settings


def head_width(config: PreTrainedConfig) -> int:
    """D, the width of one attention head."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _refuse(what: str, value: Any, rule: str) -> None:
    raise ModelError(
        f"{what} = {value!r} cannot be exported to GGUF: readers of the format expect {rule}",
        hint="serve the folder itself, for example with `vllm serve`",
    )


def _refuse_unknown(config: PreTrainedConfig, family: Family) -> None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        _refuse("hidden_act", activation, f"{family.activation} for {family.title}")
    partial = getattr(config, "partial_rotary_factor", None) or 1.0
    if partial != 1.0:
        _refuse("partial_rotary_factor", partial, "1.0")
    if family.plus_one and not config.tie_word_embeddings:
        _refuse("tie_word_embeddings", False, f"True for {family.title}")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None:
        wide = config.num_hidden_layers == WIDE_LAYERS.get(family.architecture)
        expected = config.hidden_size // config.num_attention_heads if wide else head_width(config)
        if scalar != expected:
            _refuse("query_pre_attn_scalar", scalar, f"{expected} for this size")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = getattr(config, name, None)
        if cap is None and family.architecture == "gemma2":
            _refuse(name, cap, "a number for Gemma 2")
        if cap is not None and family.architecture != "gemma2":
            _refuse(name, cap, f"none for {family.title}")
    if getattr(config, "use_bidirectional_attention", None):
        _refuse("use_bidirectional_attention", True, "False")


def _add_rope(settings: Settings, config: PreTrainedConfig, family: Family) -> None:
    rope = dict(config.rope_parameters)
    if "full_attention" in rope:
        local = rope["sliding_attention"]
        rope = dict(rope["full_attention"])
        if local.get("rope_type", "default") != "default":
            _refuse("rope_type of the sliding layers", local["rope_type"], "default")
        settings.values["rope.freq_base_swa"] = float(local["rope_theta"])
    values, kind = settings.values, rope.get("rope_type", "default")
    values["rope.freq_base"] = float(rope["rope_theta"])
    known = {"rope_type", "rope_theta", "type"}
    if kind == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(rope["factor"])
        known |= {"factor"}
    elif kind == "yarn":
        known |= {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        values["rope.scaling.type"] = "yarn"
        values["rope.scaling.factor"] = float(rope["factor"])
        values["rope.scaling.original_context_length"] = int(original)
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                values[f"rope.scaling.yarn_{name}"] = float(rope[name])
    elif kind == "llama3" and family.architecture == "llama":
        known |= {"factor", "low_freq_factor", "high_freq_factor"}
        known |= {"original_max_position_embeddings"}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        steps = torch.arange(0, head_width(config), 2).float() / head_width(config)
        settings.rope_factors = (rope["rope_theta"] ** -steps) / scaled
    elif kind != "default":
        _refuse("rope_type", kind, "default, linear, yarn or, for Llama, llama3")
    extra = {name: value for name, value in rope.items() if name not in known and value is not None}
    extra = {name: value for name, value in extra.items() if (name, value) != _WHOLE_HEAD}
    for name, value in extra.items():
        _refuse(f"rope_parameters.{name}", value, f"nothing of that name with {kind}")


_WHOLE_HEAD = ("partial_rotary_factor", 1.0)


def _add_window(settings: Settings, config: PreTrainedConfig, family: Family) -> None:
    window: Any = getattr(config, "sliding_window", None)
    layers = list(getattr(config, "layer_types", None) or [])
    slides = [kind == "sliding_attention" for kind in layers]
    if family.architecture in SWA_PERIOD:
        _add_period(settings, slides, int(window), family)
        return
    if family.title == "Mistral":
        slides = [bool(window)]
    if not any(slides) or window is None or window >= config.max_position_embeddings:
        return
    # Within its window such a model is an ordinary one.
    settings.values["context_length"] = int(window)
    settings.notes.append(
        f"readers of GGUF have no sliding window for {family.title}: the file's context is the "
        f"window, {window:,} tokens, instead of {config.max_position_embeddings:,}"
    )


def _add_period(settings: Settings, slides: list[bool], window: int, family: Family) -> None:
    """Gemma: runs of sliding layers, each followed by one that attends to everything."""
    usual = SWA_PERIOD[family.architecture]
    periods = [usual, *range(1, len(slides) + 2)]
    fits = (n for n in periods if slides == [layer % n < n - 1 for layer in range(len(slides))])
    period = next(fits, None)
    if period is None:
        _refuse("layer_types", "an irregular pattern", "full attention at a regular interval")
        return
    settings.values["attention.sliding_window"] = window
    if period != usual:
        settings.values["attention.sliding_window_pattern"] = period
        settings.notes.append(
            f"one layer in {period} attends to everything instead of one in {usual}: older readers "
            "of GGUF compute it wrongly"
        )
