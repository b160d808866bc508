"""Lengths of texts in a model's tokens."""

from __future__ import annotations

from collections.abc import Callable

from alignkit.models.base.loading import load_tokenizer
from alignkit.models.base.places import resolve


def token_counter(model: str) -> Callable[[str], int]:
    """Text -> its tokens, without those that a template adds.

    Args:
        model: a folder, a run, a file or a name.

    Raises:
        ModelError: there is no such model.
    """
    tokenizer = load_tokenizer(resolve(model).whole())
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
