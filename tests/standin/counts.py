"""What a GPU would have been asked to do."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import alignkit

_PACKAGE = str(Path(alignkit.__file__).parent) + os.sep


class Counts:
    """Events since the last `reset`.

    Attributes:
        launches: kernels by operator; copies between host and device are among them, views and
            uninitialised memory are not.
        syncs: times the host waits for the device, by `reason, file:line` of alignkit.
        attention: calls of attention by the kernel that torch would take.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()

    def reset(self) -> None:
        for counter in (self.launches, self.syncs, self.attention):
            counter.clear()

    def wait(self, reason: str) -> None:
        """One more synchronisation, where alignkit stands now."""
        self.syncs[f"{reason}, {site()}"] += 1


counts = Counts()
"""Those of this process: the device is one, and autograd's threads share it."""


def site() -> str:
    """`file:line` of the innermost frame of alignkit, relative to the package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            return f"{name.removeprefix(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside alignkit"
