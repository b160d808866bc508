"""Refuse bases that a stage cannot use, by their configuration."""

from __future__ import annotations

from alignkit.errors import ModelError
from alignkit.models.base.loading import BaseModel, load_config


def require_language_model(base: BaseModel) -> None:
    """Refuse a reward model where a language model is wanted: it has no vocabulary head.

    Raises:
        ModelError: the configuration is that of a sequence classifier.
    """
    if is_classifier(base):
        raise ModelError(
            f"{base.location} is a reward model, not a language model",
            hint="name the model it was trained from; `alignkit eval` scores answers with it",
        )


def require_plain_weights(base: BaseModel) -> None:
    """Refuse a base whose files hold quantized weights: nothing trains or merges over those.

    Raises:
        ModelError: the configuration says so.
    """
    if base.gguf is None and getattr(load_config(base), "quantization_config", None):
        raise ModelError(
            f"the weights of {base.name} are quantized in its files",
            hint="name the model they were made from, and set model.quantization",
        )


def is_classifier(base: BaseModel) -> bool:
    """Whether the configuration is that of a sequence classifier."""
    architectures = getattr(load_config(base), "architectures", None) or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)
