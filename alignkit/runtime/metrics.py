"""metrics.jsonl: one JSON object a step, flushed as it is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends steps to a metrics file.

    Args:
        path: of the file.
        resume_step: keep what an interrupted run wrote up to this step and drop what came after;
            None starts a new file.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        kept = []
        if resume_step is not None and path.is_file():
            kept = [m for m in read_metrics(path) if m["step"] <= resume_step]
        self.file = path.open("w", encoding="utf-8")
        for metrics in kept:
            self._write(metrics)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one object.

        Args:
            step: optimizer steps done; 0 is before the first.
            values: metric name -> value; a value that is not finite becomes null.
        """
        self._write({"step": step, **values})

    def _write(self, values: dict[str, Any]) -> None:
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self.file.write(json.dumps(plain) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; a line torn by a kill is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
