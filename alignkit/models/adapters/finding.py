"""Where an adapter is, and the base that it belongs to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from alignkit.errors import ModelError
from alignkit.models.adapters.files import (
    read_adapter_config,
    require_base,
    trained_over,
)
from alignkit.models.base.loading import BaseModel, find_base


def adapter_in(name: str) -> Path | None:
    """The adapter folder that `name` is or holds; None if there is none."""
    folder = Path(name).expanduser()
    for candidate in (folder, folder / "adapter"):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    return None


def base_of_adapter(adapter: Path, base: str | None, *, any_base: bool = False) -> BaseModel:
    """The base an adapter belongs to.

    Args:
        adapter: PEFT adapter folder.
        base: what the user names instead; None takes what the adapter records.
        any_base: accept other weights than those that it was trained over.

    Raises:
        ModelError: neither says it, it does not exist, or holds other weights.
    """
    recorded = read_adapter_config(adapter).base_model_name_or_path
    name = base or recorded
    if not name:
        raise ModelError(f"{adapter} does not say which base it belongs to", hint="add --base")
    try:
        found = find_base(name)
    except ModelError as error:
        hint = error.hint if base else f"the adapter records {name!r}; name the base with --base"
        raise ModelError(error.message, hint=hint) from None
    if not any_base:
        require_base(adapter, found)
    over = trained_over(adapter)
    return found if over is None else replace(found, changes=over.changes)
