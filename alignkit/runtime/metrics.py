"""metrics.jsonl: one JSON object per step, flushed as it is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from alignkit.files import write_text


class MetricsFile:
    """Appends steps to a metrics file.

    Args:
        path: of the file.
        resume_step: keep what an interrupted run wrote up to this step and drop what came after;
            None starts a new file.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        start_lines(path, resume_step)
        # Lines are flushed, not synced: every step would wait for the disk.
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one object.

        Args:
            step: optimizer steps done; 0 is before the first.
            values: metric name -> value; a value that is not finite becomes null.
        """
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in {"step": step, **values}.items()
        }
        self.file.write(json.dumps(plain) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def start_lines(path: Path, resume_step: int | None) -> None:
    """Start a file of JSON lines.

    Args:
        path: of the file.
        resume_step: what it holds up to this step stays; None leaves it empty.
    """
    kept = []
    if resume_step is not None and path.is_file():
        kept = [m for m in read_metrics(path) if m["step"] <= resume_step]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; a line cut short by a kill is left out."""
    objects = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return objects
