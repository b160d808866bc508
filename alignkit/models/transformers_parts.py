"""The undocumented parts of transformers that alignkit uses, in one place; contract tests check
them."""

from __future__ import annotations

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.tokenization_utils_base import generate_merges

__all__ = [
    "ROPE_INIT_FUNCTIONS",
    "attention_of",
    "generate_merges",
    "get_keys_to_not_convert",
    "has_classifier",
    "has_language_model",
    "no_init_weights",
    "revert_weight_conversion",
]


def attention_of(config: PreTrainedConfig) -> str:
    """Name of a model's attention implementation, as `set_attn_implementation` takes it."""
    name: str = config._attn_implementation
    return name


def has_classifier(config: PreTrainedConfig) -> bool:
    """Whether transformers has a sequence classifier for an architecture."""
    return type(config) in AutoModelForSequenceClassification._model_mapping


def has_language_model(config: PreTrainedConfig) -> bool:
    """Whether transformers has a causal language model for an architecture."""
    return type(config) in AutoModelForCausalLM._model_mapping
