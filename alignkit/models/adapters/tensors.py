"""The tensors in an adapter's file."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from peft.utils import WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError, safe_open

from alignkit.errors import ModelError
from alignkit.models.base.files import reason
from alignkit.models.peft_parts import get_pattern_key


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder by their names in the file.

    Raises:
        ModelError: there is no such file, it is damaged, it is a pickle of anything but tensors, or
            it holds values that are not finite.
    """
    try:
        if not any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_NAME)):
            raise FileNotFoundError(f"there is no {WEIGHTS}")  # PEFT would ask the hub for it
        stored: dict[str, torch.Tensor] = load_peft_weights(str(folder), device="cpu")
    except UnpicklingError as error:
        raise _pickle(folder) from error
    except Exception as error:  # a damaged file may end in any error
        raise ModelError(
            f"the adapter weights in {folder} cannot be read: {reason(error)}",
            hint="copy the folder again, or train again; the file may be cut off",
        ) from error
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(weight, torch.Tensor)
        for name, weight in stored.items()
    ):
        raise _pickle(folder)
    for name, weight in stored.items():
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(
                f"the adapter in {folder} holds values that are not finite, in {name}",
                hint="training diverged; use an earlier checkpoint",
            )
    # Beside a whole embedding PEFT writes copies of it under its own names.
    own = {name: name.replace(".modules_to_save.", ".") for name in stored}
    copies = {n for n in stored if own[n] != n and own[n] in stored}
    return {n: w for n, w in stored.items() if n not in copies or not w.equal(stored[own[n]])}


def require_stored_ranks(config: Any, folder: Path) -> None:
    """Refuse a configuration with larger ranks than its weights: they are built before those are
    read.

    Args:
        config: PEFT's, with patterns that are quick to match.
        folder: of the adapter.

    Raises:
        ModelError: the header of its file has a smaller rank for a layer.
    """
    patterns = getattr(config, "rank_pattern", None)
    patterns = patterns if isinstance(patterns, dict) else {}
    for name, held in _stored_ranks(folder / WEIGHTS).items():
        key = get_pattern_key(list(patterns), name)
        rank = patterns.get(key, getattr(config, "r", 0))
        if isinstance(rank, int | float) and rank > held:
            what = f"rank_pattern.{key}" if key in patterns else "r"
            raise ModelError(
                f"{folder}/adapter_config.json says {what} = {rank}, but its weights are of rank "
                f"{held}, in {name}",
                hint="copy the folder again, with the configuration that belongs to its weights",
            )


def _stored_ranks(file: Path) -> dict[str, int]:
    """Name of each layer in the file of a LoRA adapter -> its rank, or that of all its experts."""
    ranks = {}
    try:
        with safe_open(file, "pt") as stored:
            for key in list(stored.keys()):
                name, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
                shape = stored.get_slice(key).get_shape() if found else []
                if shape:
                    ranks[name] = int(shape[0])
    except (OSError, SafetensorError):  # `read_weights` says what is wrong
        return {}
    return ranks


def _pickle(folder: Path) -> ModelError:
    return ModelError(
        f"the adapter weights in {folder} are a pickle of more than named tensors, which may run "
        "code and is not read",
        hint="save the adapter again where you trust it: PEFT writes safetensors",
    )
