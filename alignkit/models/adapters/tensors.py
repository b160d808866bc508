"""The tensors in an adapter's file."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from peft.utils import load_peft_weights

from alignkit.errors import ModelError
from alignkit.models.base.files import reason


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder by their names in the file.

    Raises:
        ModelError: there is no such file, it is damaged, it is a pickle of anything but tensors, or
            it holds values that are not finite.
    """
    try:
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


def _pickle(folder: Path) -> ModelError:
    return ModelError(
        f"the adapter weights in {folder} are a pickle of more than named tensors, which may run "
        "code and is not read",
        hint="save the adapter again where you trust it: PEFT writes safetensors",
    )
