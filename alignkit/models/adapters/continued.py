"""Continue training an adapter: where it is, and its shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkit.errors import ModelError
from alignkit.models.adapters.files import (
    read_adapter_config,
    require_base,
    trained_over,
)
from alignkit.models.adapters.finding import other_rows
from alignkit.models.adapters.patterns import require_quick_patterns
from alignkit.models.adapters.tensors import require_stored_ranks
from alignkit.models.base.adapter_kinds import KINDS
from alignkit.models.base.loading import BaseModel, load_config
from alignkit.models.base.places import resolve
from alignkit.models.base.skeleton import build_skeleton
from alignkit.recipe.adapters import AnySpec, FullSpec, continues

_LORA = {
    "rank": "r",
    "alpha": "lora_alpha",
    "targets": "target_modules",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
}
_IA3 = {"targets": "target_modules", "feedforward": "feedforward_modules"}
_PREFIX = {"tokens": "num_virtual_tokens", "projection": "prefix_projection"}
_NAMES = {"lora": _LORA, "ia3": _IA3, "prefix": _PREFIX}
"""Kind -> key of a recipe -> PEFT's name."""

_UNKNOWN = (
    "lora_bias",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "exclude_modules",
    "alora_invocation_tokens",
)
"""Options of PEFT that a recipe cannot express."""


def started_adapter(spec: AnySpec, base: BaseModel) -> AnySpec:
    """The recipe's adapter, with the shape of the one that training continues from.

    Args:
        spec: of the recipe.
        base: of the recipe; must be the one that the adapter was trained over.

    Returns:
        The spec itself if it names no adapter.

    Raises:
        ModelError: there is no such adapter, it is of another kind or base, or the recipe asks for
            another shape.
    """
    folder = adapter_folder(spec)
    if folder is None or isinstance(spec, FullSpec):
        return spec
    _require_same_base(folder, base)
    config = read_adapter_config(folder)
    trust = base.trust_remote_code
    require_quick_patterns(
        config,
        lambda: build_skeleton(load_config(base), trust_remote_code=trust).state_dict(),
        folder,
    )
    require_stored_ranks(config, folder)
    kind = KINDS[str(getattr(config.peft_type, "value", config.peft_type))]
    if kind != spec.kind:
        raise ModelError(
            f"adapter.kind = {spec.kind}, but {folder} is of kind {kind}",
            hint=f"set adapter.kind={kind}",
        )
    _require_known_options(config, folder)
    stored = {key: _plain(key, getattr(config, name)) for key, name in _NAMES[kind].items()}
    if getattr(config, "target_parameters", None):  # a recipe has one list for both
        stored["targets"] = _plain("targets", {*stored["targets"], *config.target_parameters})
    for key in spec.model_fields_set & stored.keys():
        own = _plain(key, getattr(spec, key))
        # A run's own recipe.yaml has the defaults written out.
        default = type(spec).model_fields[key].get_default(call_default_factory=True)
        if own not in (stored[key], _plain(key, default)):
            raise ModelError(
                f"adapter.{key} = {own}, but the adapter in {folder} has {stored[key]}",
                hint=f"remove adapter.{key}: it comes with the adapter",
            )
    return spec.model_copy(update=stored)


def _require_same_base(folder: Path, base: BaseModel) -> None:
    """Refuse a base other than the one that the adapter was trained over."""
    require_base(folder, base)
    over = trained_over(folder)
    if over is not None and over.changes != base.changes:
        raise ModelError(
            f"{folder} was trained with another model.rope_scaling or model.add_tokens",
            hint="copy both from the recipe of the run it comes from",
        )
    rows = other_rows(folder, base)
    if rows:
        raise ModelError(
            f"{folder} was trained over a vocabulary of {rows} rows, unlike that of {base.name}",
            hint=f"run `alignkit merge-lora {folder} --output FOLDER`, name the result as "
            "model.base, and train a fresh adapter over it",
        )


def _require_known_options(config: Any, folder: Path) -> None:
    """Refuse what a recipe cannot express."""
    odd = [name for name in _UNKNOWN if getattr(config, name, None)]
    if getattr(config, "bias", "none") != "none":
        odd.append("bias")
    if trained_over(folder) is None and getattr(config, "trainable_token_indices", None):
        odd.append("trainable_token_indices")
    if odd:
        raise ModelError(
            f"{folder} uses PEFT's {odd[0]}, which alignkit does not train",
            hint="merge it and train a fresh adapter over the result",
        )


def adapter_folder(spec: AnySpec) -> Path | None:
    """Folder of the adapter that training continues from; None for a fresh one.

    Raises:
        ModelError: the folder holds no adapter.
    """
    name = continues(spec)
    if name is None:
        return None
    folder = resolve(name).adapter
    if folder is None:
        raise ModelError(
            f"adapter.from = {name!r} holds no adapter: there is no adapter_config.json",
            hint="name a run folder, its adapter/, or a folder written by PEFT",
        )
    return folder


def _plain(key: str, value: Any) -> Any:
    """A value of PEFT's configuration as a recipe holds it."""
    if key == "modules_to_save":
        return tuple(sorted(set(value or ()) - {"score"}))
    if isinstance(value, set | list | tuple):
        return tuple(sorted(value))
    return float(value) if key == "alpha" else value
