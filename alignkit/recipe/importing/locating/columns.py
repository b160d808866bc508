"""The columns of the rows that a foreign file names, as far as the standard library reads them."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path

from alignkit.recipe.importing.fields import Foreign
from alignkit.recipe.importing.sources import find
from alignkit.recipe.reading.yaml_values import LARGEST


def first_keys(foreign: Foreign) -> set[str] | None:
    """Keys of the first row of the first source.

    Args:
        foreign: whose sources have been read.

    Returns:
        The keys; None if they are not known: rows of the hub, of Parquet, or that are not here.
    """
    source = next(iter(foreign.sources["train"]), {})
    path = find(foreign, str(source.get("path", "")))
    if path is None or not path.is_file():
        return None
    try:
        return _keys(_start(path), path.suffixes)
    except (OSError, EOFError, ValueError, RecursionError, csv.Error):
        return None


def _start(path: Path) -> str:
    """The first characters of a text."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig") as text:
            return text.read(LARGEST)
    with path.open(encoding="utf-8-sig") as text:
        return text.read(LARGEST)


def _keys(text: str, ends: list[str]) -> set[str] | None:
    """Keys of the first row in a text.

    Raises:
        ValueError: it does not start with a row.
    """
    if ".csv" in ends:
        return set(next(csv.reader(text.splitlines()), []))
    if not {".json", ".jsonl"} & set(ends):
        return None
    start = re.match(r"\s*(?:\[\s*)?", text)
    row, _ = json.JSONDecoder().raw_decode(text, start.end() if start else 0)
    return set(row) if isinstance(row, dict) else None
