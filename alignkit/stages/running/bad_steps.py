"""Steps that cannot be taken, and losses that stand out."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from alignkit.errors import NotFiniteError, TrainingError

MOST_IN_A_ROW = 10
"""Skipped steps after which a run is stopped."""
MOST_SHARE = 0.01
"""Of the run's steps, but at least `MOST_IN_A_ROW` of them, may be skipped in all."""

WINDOW, FEWEST = 50, 20
"""Losses that the next is compared with: the most, and the fewest."""
SPREADS, LEAST = 10.0, 0.5
"""A loss stands out if it is this many median deviations above the median, and at least this much:
late in preference training losses are near zero, and so is their spread."""


@dataclass
class BadSteps:
    """Counts the steps whose loss or gradients are not finite, and decides what happens.

    Args:
        action: of the recipe.
        steps: of the whole run.
        skipped: so far, in all.
        in_a_row: skipped just before the next step.
    """

    action: Literal["stop", "skip"]
    steps: int
    skipped: int = 0
    in_a_row: int = 0

    def skip(self, error: NotFiniteError) -> None:
        """Count a bad step.

        Args:
            error: names the step and its rows.

        Raises:
            TrainingError: the run is to stop at bad steps, or has too many of them.
        """
        if self.action == "stop":
            raise error
        self.skipped += 1
        self.in_a_row += 1
        most = max(MOST_IN_A_ROW, int(MOST_SHARE * self.steps))
        if self.in_a_row > MOST_IN_A_ROW or self.skipped > most:
            row = self.in_a_row > MOST_IN_A_ROW
            count = f"{self.in_a_row} steps in a row" if row else f"{self.skipped} steps"
            raise TrainingError(
                f"{count} had no finite loss or gradient, more than the "
                f"{MOST_IN_A_ROW if row else most} that are skipped; the last: {error.message}",
                hint="lower training.learning_rate, or look at the rows of these steps",
            ) from error

    def passed(self) -> None:
        """Note a good step."""
        self.in_a_row = 0

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}


@dataclass
class Spikes:
    """Finds losses far above those before them.

    Args:
        losses: the last ones.
    """

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def look(self, loss: float) -> float | None:
        """The median of the losses before, if this one stands out.

        Args:
            loss: of a step, finite.
        """
        before = sorted(self.losses)
        self.losses.append(loss)
        if len(before) < FEWEST:
            return None
        median = statistics.median(before)
        spread = statistics.median(abs(value - median) for value in before)
        return median if loss - median > max(SPREADS * spread, LEAST) else None
