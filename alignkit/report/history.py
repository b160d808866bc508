"""metrics.jsonl -> series of numbers over the steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alignkit.runtime.metrics import read_metrics

MOST_POINTS = 400
"""Of a curve: more than a screen shows."""


@dataclass
class Series:
    """Values of one metric.

    Args:
        steps: of the values, rising.
        values: all finite.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """The earliest value."""
        return self.values[0]

    @property
    def last(self) -> float:
        """The latest value."""
        return self.values[-1]

    def thinned(self, most: int = MOST_POINTS) -> Series:
        """The series with at most so many points: of each stretch its lowest and highest value.

        Args:
            most: points, even.
        """
        count = len(self.steps)
        if count <= most:
            return self
        kept: set[int] = {0, count - 1}
        bounds = [round(k * count / (most // 2)) for k in range(most // 2 + 1)]
        for begin, end in itertools.pairwise(bounds):
            stretch = range(begin, end)
            kept |= {min(stretch, key=self.values.__getitem__)}
            kept |= {max(stretch, key=self.values.__getitem__)}
        places = sorted(kept)
        return Series([self.steps[n] for n in places], [self.values[n] for n in places])


History = Mapping[str, Series]
"""Metric -> its series; a metric that never has a finite value is absent."""


def read_history(run: Path) -> History:
    """The series of a run; empty if it has not logged anything.

    Args:
        run: its folder.
    """
    path = run / "metrics.jsonl"
    return history_of(read_metrics(path) if path.is_file() else [])


def history_of(lines: Iterable[Mapping[str, object]]) -> History:
    """The series of lines as `read_metrics` gives them.

    Args:
        lines: of which a later one with the same step replaces the earlier.
    """
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        step = line["step"]
        assert isinstance(step, int)
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, {})[step] = float(value)
    return {
        name: Series(sorted(points), [points[step] for step in sorted(points)])
        for name, points in found.items()
    }
