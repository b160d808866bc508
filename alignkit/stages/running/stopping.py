"""Ctrl-C and SIGTERM end a run after its step."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

from alignkit.errors import Interrupted

_STOPPING: dict[int, bytes] = {
    signal.SIGINT: b"\nstopping after this step, with a checkpoint; press Ctrl-C once more to stop "
    b"at once\n",
    signal.SIGTERM: b"\nSIGTERM: stopping after this step, with a checkpoint\n",
}


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """The signals so far. A Ctrl-C after the first signal interrupts at once; SIGTERM never does: a
    scheduler sends it to the launcher and to its processes, and follows with SIGKILL."""
    stop: list[int] = []
    before = {}

    def handle(number: int, frame: Any) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop:
            os.write(2, _STOPPING[number])  # not through a stream that this signal may interrupt
        stop.append(number)

    for number in _STOPPING:
        with contextlib.suppress(ValueError):  # not in the main thread
            before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(done: int, steps: int, signals: list[int]) -> Interrupted:
    """The error of a run that was stopped.

    Args:
        done: steps, all saved.
        steps: of the plan.
        signals: that this process has got; none if another one has.
    """
    return Interrupted(
        f"stopped after step {done} of {steps}; a checkpoint was saved",
        hint="continue with --resume",
        exit_code=128 + (signals or [signal.SIGINT])[0],
    )
