"""Ctrl-C and SIGTERM end a run after its step."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

_STOPPING = (
    b"\nstopping after this step, with a checkpoint; press Ctrl-C once more to stop at once\n"
)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[bool]]:
    """A list that becomes non-empty at the first Ctrl-C; the second one interrupts at once."""
    stop: list[bool] = []
    before = {}

    def handle(number: int, frame: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(True)
        os.write(2, _STOPPING)  # not through a stream that this signal may have interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread
            before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
