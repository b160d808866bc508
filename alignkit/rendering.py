"""A chat as text. Its template is a program of the model's makers: it gets so much and no more."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from alignkit.errors import ModelError

SECONDS = 10.0
"""Time for one chat."""
MEMORY = 1 << 30
"""Bytes that one chat may take besides what the process holds."""


class RenderingError(ModelError):
    """A chat template refuses the turns, fails on them, or passes a limit."""

    def __init__(self, reason: str, *, hint: str = "") -> None:
        super().__init__(f"the chat template refuses the conversation: {reason}", hint=hint)


class _Late(BaseException):
    """Raised in the middle of a template, which cannot catch it."""


def render_chat(
    tokenizer: Any, turns: Sequence[dict[str, Any]], *, seconds: float = SECONDS, **options: Any
) -> str:
    """The text that a tokenizer's chat template makes of turns.

    Args:
        tokenizer: with its template.
        turns: with `role` and `content`.
        seconds: limit. It holds in the main thread, where a signal can end the template.
        **options: of transformers' `apply_chat_template`.

    Raises:
        RenderingError: the template raises an error, or takes longer or more memory than it may;
            only the limits have a hint.
    """
    try:
        with _memory(MEMORY), _time(seconds):
            return str(tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
    except _Late:
        reason = f"it takes more than {seconds:g} seconds for one chat"
    except MemoryError:
        reason = f"it takes more than {MEMORY / 1e9:.1f} GB of memory for one chat"
    except Exception as error:  # a template may raise anything
        raise RenderingError(str(error)) from error
    hint = "its loops or repeated texts are too long: choose another with model.chat_template"
    raise RenderingError(reason, hint=hint)


@contextlib.contextmanager
def _time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory(size: int) -> Iterator[None]:
    """A limit on addresses; none where the system does not say how many are in use."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as sizes:
            pages = int(sizes.read().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + size
    if 0 <= soft <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
