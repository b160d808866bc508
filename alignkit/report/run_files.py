"""Reads the files of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkit.errors import RunError


def read_about(folder: Path) -> dict[str, Any]:
    """run.json of a run folder.

    Raises:
        RunError: it is missing or cannot be read.
    """
    try:
        about: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"{folder} is not a run folder: run.json cannot be read ({error})",
            hint="start anew with --overwrite, or choose another output",
        ) from None
    return about


def read_plan(folder: Path) -> dict[str, Any]:
    """plan.json of a run folder as plain values."""
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return plan
