"""The licence of a model's weights, as far as its files state it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.repocard import metadata_load

from alignkit.models.base.known import KNOWN_MODELS, model_folder
from alignkit.models.base.loading import BaseModel


def licence_of(base: BaseModel) -> str | None:
    """Identifier such as `apache-2.0`; None if it is not stated.

    Args:
        base: its model card is read, or the table of models that alignkit fetches.
    """
    folder = Path(base.location)
    try:
        stated = (metadata_load(folder / "README.md") or {}).get("license")
    except Exception:  # no card, or none that can be read: yaml raises what its tags raise
        stated = None
    # It goes into another card: an identifier, never a heading, a link or a script.
    if isinstance(stated, str) and re.fullmatch(r"[\w.+-]{1,60}", stated):
        return stated
    for name, known in KNOWN_MODELS.items():
        if folder.is_dir() and folder.resolve() == model_folder(name).resolve():
            return known.licence.lower()
    return None
