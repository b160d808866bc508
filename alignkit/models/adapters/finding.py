"""The base that an adapter belongs to."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from alignkit.errors import ModelError
from alignkit.models.adapters.files import (
    read_adapter_config,
    require_base,
    trained_over,
)
from alignkit.models.base.loading import BaseModel
from alignkit.models.base.places import Place, resolve
from alignkit.terminal import print_line


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


def base_of_adapter(
    adapter: Path,
    base: str | None,
    *,
    any_base: bool = False,
    trust_remote_code: bool = False,
) -> BaseModel:
    """The base an adapter belongs to.

    Args:
        adapter: PEFT adapter folder.
        base: named by the user; None takes the one that the adapter records, which is printed
            before it is opened.
        any_base: accept weights other than those it was trained over.
        trust_remote_code: run code that comes with a base named by the user; that of a base which
            only the adapter names is never run.

    Raises:
        ModelError: no base is named, it does not exist, or it has other weights.
    """
    name = base or read_adapter_config(adapter).base_model_name_or_path
    if not name:
        raise ModelError(
            f"{adapter} does not say which base it belongs to", hint="name the base with --base"
        )
    if base is None:
        _announce(adapter, name)
    trust = trust_remote_code and base is not None
    try:
        source = resolve(name, trust_remote_code=trust).whole()
    except ModelError as error:
        hint = error.hint if base else f"the adapter records {name!r}; name the base with --base"
        raise ModelError(error.message, hint=hint) from None
    if not any_base:
        require_base(adapter, source)
    over = trained_over(adapter)
    return source if over is None else replace(source, changes=over.changes)


@cache
def _announce(adapter: Path, name: str) -> None:
    """Say, once, which model an adapter's files make this process open."""
    print_line(f"{adapter} names its base: {name}", "note")
