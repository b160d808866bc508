"""Refuse bases that a stage cannot use, by their configuration."""

from __future__ import annotations

from typing import Any

import numpy as np

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


def require_token_rows(config: Any, ids: Any, place: str) -> None:
    """Refuse tokens for which a model has no row: its tokenizer has more than its embedding.

    Args:
        config: of the model.
        ids: `[T]` ids of the tokens that it is to read.
        place: of the largest, for the message.

    Raises:
        ModelError: an id is beyond the embedding.
    """
    rows, largest = config.get_text_config().vocab_size, int(np.max(ids, initial=-1))
    if largest >= rows:
        raise ModelError(
            f"{place} has the token {largest}, but the model's embedding has only {rows} rows",
            hint="use the tokenizer that belongs to the model",
        )


def is_classifier(base: BaseModel) -> bool:
    """Whether the configuration is that of a sequence classifier."""
    architectures = getattr(load_config(base), "architectures", None) or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)
