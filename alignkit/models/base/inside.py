"""A model folder uses its own files only.

A folder that came from elsewhere would otherwise choose which files of this machine are read, and
copied into what is made from it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from alignkit.errors import ModelError

_INDEX = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"
"""Where transformers looks for further chat templates."""


def require_inside(root: Path, folders: Collection[Path]) -> None:
    """Refuse folders whose files lie elsewhere, or whose index names files elsewhere.

    Args:
        root: that the user named: it may be a link itself, what is in it must be in it. A snapshot
            in the hub's cache links to the blobs beside it.
        folders: those of `root`, itself included, that hold a model or an adapter.

    Raises:
        ModelError: a file is a link that leaves `root`, is no regular file, or an index names a
            file of another folder.
    """
    allowed = _repository(root.resolve())
    for folder in folders:
        for entry in [*folder.iterdir(), *(folder / _TEMPLATES).glob("*")]:
            _require_own(entry, root, allowed)
        for name in _indexed(folder / _INDEX):
            if not isinstance(name, str) or Path(name).name != name:
                raise ModelError(
                    f"{folder / _INDEX} names a file of another folder: {name!r}",
                    hint="put the file into the folder, and its own name into the index",
                )
    if folders and root not in folders:
        for entry in root.iterdir():
            if not entry.is_dir():  # of a run's other folders nothing is read
                _require_own(entry, root, allowed)


def _require_own(entry: Path, root: Path, allowed: Path) -> None:
    try:
        target = entry.resolve()
    except RuntimeError:  # a link in a circle
        target = Path("/")
    if not target.is_relative_to(allowed):
        raise ModelError(
            f"{entry} is a link that leaves {root}: to {target}",
            hint="put the file itself there, or name the folder that it is in",
        )
    if not entry.is_file() and not entry.is_dir():
        raise ModelError(f"{entry} is not a file", hint="remove it from the folder")


def _repository(root: Path) -> Path:
    """What the links of a folder may point into."""
    cached = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    return root.parent.parent if cached else root


def _indexed(index: Path) -> list[Any]:
    """The files that an index names; a damaged one is reported where the weights are read."""
    try:
        return list(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
