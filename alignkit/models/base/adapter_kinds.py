"""Kinds of adapters on disk, by their configuration: which are read, which can be merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkit.errors import ModelError

CONFIG = "adapter_config.json"
"""PEFT's name for the file that describes an adapter."""

KINDS = {"LORA": "lora", "IA3": "ia3", "PREFIX_TUNING": "prefix"}
"""PEFT's kinds of adapters that alignkit trains and reads -> their names in recipes."""

UNMERGEABLE = ("PREFIX_TUNING",)
"""Those of them that cannot be merged into the base's weights."""


def stored_config(folder: Path) -> dict[str, Any]:
    """The configuration of the adapter in a folder; empty if there is none."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def peft_kind(folder: Path) -> str:
    """PEFT's kind of the adapter in a folder; empty if its configuration does not say."""
    return str(stored_config(folder).get("peft_type", ""))


def require_mergeable(folder: Path) -> None:
    """Refuse an adapter that cannot be merged.

    Args:
        folder: PEFT adapter folder.

    Raises:
        ModelError: it is of a kind that cannot be merged.
    """
    if peft_kind(folder) in UNMERGEABLE:
        raise ModelError(
            f"{folder} is a prefix, which cannot be merged: no weight can hold keys and values "
            "that come before every row",
            hint="chat, generate, eval and label read it over its base, as PEFT does, and "
            "adapter.from continues its training; train with adapter.kind=lora for a whole model",
        )
