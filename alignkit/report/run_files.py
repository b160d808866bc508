"""Reads the files of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkit.errors import FileError, RunError
from alignkit.files import read_json


def read_about(folder: Path) -> dict[str, Any]:
    """run.json of a run folder.

    Raises:
        RunError: it is missing or cannot be read.
    """
    try:
        return read_json(folder / "run.json")
    except FileError as error:
        raise RunError(
            f"{folder} is not a run folder: {error.message}",
            hint="start anew with --overwrite, or choose another output",
        ) from None
