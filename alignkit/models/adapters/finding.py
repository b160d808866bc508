"""The base that an adapter belongs to."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from safetensors import safe_open

from alignkit.errors import ModelError
from alignkit.models.adapters.files import (
    WEIGHTS,
    read_adapter_config,
    require_base,
    trained_over,
)
from alignkit.models.adapters.targets import vocabulary_ends
from alignkit.models.base.changes import UNCHANGED
from alignkit.models.base.files import reading
from alignkit.models.base.loading import BaseModel, load_config
from alignkit.models.base.places import Place, resolve
from alignkit.models.base.skeleton import build_skeleton
from alignkit.models.peft_parts import stored_name
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
    if not name or not isinstance(name, str):
        raise ModelError(
            f"{adapter} does not say which base it belongs to", hint="name the base with --base"
        )
    if base is None:
        _announce(adapter, name)
    trust = trust_remote_code and base is not None
    try:
        source = resolve(name, trust_remote_code=trust).whole()
    except ModelError as error:
        hint = (
            error.hint if base else f"the adapter records {name[:200]!r}; name the base with --base"
        )
        raise ModelError(error.message, hint=hint) from None
    if not any_base:
        require_base(adapter, source)
    over = trained_over(adapter)
    changes = UNCHANGED if over is None else over.changes
    return replace(source, changes=replace(changes, rows=other_rows(adapter, source)))


@cache
def _announce(adapter: Path, name: str) -> None:
    """Say, once, which model an adapter's files make this process open."""
    print_line(f"{adapter} names its base: {' '.join(name.split())}", "note")


def other_rows(adapter: Path, base: BaseModel) -> int:
    """Rows of embedding and output head in an adapter's file; 0 if they are not there, or are as
    many as the base's.

    Raises:
        ModelError: one of the two has another number of rows, and the other is not in the file.
    """
    if not (adapter / WEIGHTS).is_file():
        return 0
    shapes = {}
    with reading(adapter, "the adapter weights"), safe_open(adapter / WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118  it is not a dictionary
            name = stored_name(key).replace(".modules_to_save", "")
            if name.endswith(".weight") and ".lora_" not in name:
                shapes[name] = tuple(file.get_slice(key).get_shape())
    if not shapes:
        return 0
    config = load_config(base)
    ends = vocabulary_ends(build_skeleton(config, trust_remote_code=base.trust_remote_code))
    found = {name: shapes.get(f"{name}.weight", (0,))[0] for name in ends}
    rows = int(max(found.values()))
    if rows in (0, config.get_text_config().vocab_size):
        return 0
    odd = [name for name, one in found.items() if one != rows]
    if odd:
        raise ModelError(
            f"the adapter in {adapter} was trained over a vocabulary of {rows} rows, and those of "
            f"{odd[0]} are not in its file",
            hint="save it with PEFT's save_embedding_layers=True, or merge it with PEFT",
        )
    return rows
