"""A chat as text. Its template is a program of the model's makers: it gets so much and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignkit.errors import ModelError
from alignkit.limits import TimeUp, memory_limit, time_limit

SECONDS = 10.0
"""Time for one chat."""
MEMORY = 1 << 30
"""Bytes that one chat may take besides what the process holds."""


LONGEST, GROWTH = 1_000_000, 16
"""Characters that a template may write of its own, and for each character of the chat."""


class RenderingError(ModelError):
    """A chat template refuses the turns, fails on them, or passes a limit."""

    def __init__(self, reason: str, *, hint: str = "") -> None:
        super().__init__(f"the chat template refuses the conversation: {reason}", hint=hint)


def render_chat(
    tokenizer: Any, turns: Sequence[dict[str, Any]], *, seconds: float = SECONDS, **options: Any
) -> str:
    """The text that a tokenizer's chat template makes of turns.

    Args:
        tokenizer: with its template.
        turns: with `role` and `content`.
        seconds: limit.
        **options: of transformers' `apply_chat_template`.

    Raises:
        RenderingError: the template raises an error, or takes longer or more memory than it may;
            only the limits have a hint.
    """
    try:
        with memory_limit(MEMORY), time_limit(seconds):
            text = str(tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
            given = len(repr(turns)) + len(repr(options))
        if len(text) <= LONGEST + GROWTH * given:
            return text
        reason = f"it makes {len(text):,} characters of a chat of {given:,}"
    except TimeUp:
        reason = f"it takes more than {seconds:g} seconds for one chat"
    except MemoryError:
        reason = f"it takes more than {MEMORY / 1e9:.1f} GB of memory for one chat"
    except Exception as error:  # a template may raise anything
        raise RenderingError(str(error)) from error
    hint = "its loops or repeated texts are too long: choose another with model.chat_template"
    raise RenderingError(reason, hint=hint)
