"""What a tokenizer's files may hold that no row can be read with."""

from __future__ import annotations

from functools import cache
from typing import Any

from alignkit.terminal import print_line


def require_template(template: Any) -> None:
    """Refuse a chat template that is none; of several one must be the default."""
    if isinstance(template, dict) and "default" not in template:
        raise ValueError(f"of its chat templates ({', '.join(template)}) none is the default")
    if not isinstance(template, str | dict | None):
        raise ValueError(f"chat_template must be text, got {template!r}")


def always_cut_alike(tokenizer: Any, name: str) -> None:
    """Switch off BPE dropout, which cuts the same text at random, and say so once.

    Args:
        tokenizer: of transformers, changed.
        name: of its model.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        _announce(name, model.dropout)
        model.dropout = None


@cache
def _announce(name: str, dropout: float) -> None:
    print_line(
        f"the tokenizer of {name!r} cuts text at random (BPE dropout {dropout:g}); it is "
        "switched off, so that a text always has the same tokens",
        "note",
    )
