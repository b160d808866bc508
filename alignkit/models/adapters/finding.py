"""The base that an adapter belongs to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from alignkit.errors import ModelError
from alignkit.models.adapters.files import (
    read_adapter_config,
    require_base,
    trained_over,
)
from alignkit.models.base.loading import BaseModel
from alignkit.models.base.places import Place, resolve


def base_of(place: Place) -> BaseModel:
    """The whole model of a place; for an adapter that was not merged, its base.

    Raises:
        ModelError: there is no such model.
    """
    return place.whole() if place.unmerged is None else base_of_adapter(place.unmerged, None)


def tokenizer_of(adapter: Path, base: BaseModel) -> BaseModel:
    """Where an adapter's tokenizer is: in its own folder, or with its base."""
    own = (adapter / "tokenizer_config.json").is_file()
    return BaseModel(str(adapter)) if own else base


def base_of_adapter(adapter: Path, base: str | None, *, any_base: bool = False) -> BaseModel:
    """The base an adapter belongs to.

    Args:
        adapter: PEFT adapter folder.
        base: named by the user; None takes the one that the adapter records.
        any_base: accept weights other than those it was trained over.

    Raises:
        ModelError: no base is named, it does not exist, or it has other weights.
    """
    recorded = read_adapter_config(adapter).base_model_name_or_path
    name = base or recorded
    if not name:
        raise ModelError(
            f"{adapter} does not say which base it belongs to", hint="name the base with --base"
        )
    try:
        source = resolve(name).whole()
    except ModelError as error:
        hint = error.hint if base else f"the adapter records {name!r}; name the base with --base"
        raise ModelError(error.message, hint=hint) from None
    if not any_base:
        require_base(adapter, source)
    over = trained_over(adapter)
    return source if over is None else replace(source, changes=over.changes)
