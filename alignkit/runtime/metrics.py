"""metrics.jsonl: one JSON object per step, flushed as it is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from alignkit.files import replace_file, write_text


class MetricsFile:
    """Appends steps to a metrics file.

    Args:
        path: of the file.
        resume_step: keep what an interrupted run wrote up to this step and drop what came after;
            None starts a new file.

    Attributes:
        damaged: lines of the interrupted run that cannot be read; see `start_lines`.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.damaged = start_lines(path, resume_step)
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


def start_lines(path: Path, resume_step: int | None) -> int:
    """Start a file of JSON lines.

    Args:
        path: of the file.
        resume_step: what it holds up to this step stays; None leaves it empty.

    Returns:
        The number of lines that cannot be read; they are moved to `NAME.damaged` beside the file.
    """
    kept: list[dict[str, Any]] = []
    damaged: list[bytes] = []
    if resume_step is not None and path.is_file():
        found, damaged = _lines(path)
        kept = [line for line in found if line["step"] <= resume_step]
    if damaged:
        with replace_file(_aside(path)) as written:
            before = _aside(path).read_bytes() if _aside(path).is_file() else b""
            written.write_bytes(before + b"".join(line + b"\n" for line in damaged))
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    return len(damaged)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; damaged ones, such as a torn last one, are left out."""
    return _lines(path)[0]


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged")


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The objects with a step, and the lines that are none; a torn last line is neither."""
    objects, damaged = [], []
    *lines, last = path.read_bytes().split(b"\n")
    for line in [*lines, last]:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            objects.append(values)
        elif line.strip() and line is not last:
            damaged.append(line)
    return objects, damaged
