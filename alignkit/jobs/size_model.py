"""What a model needs, from its configuration alone."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from alignkit.errors import ModelError
from alignkit.models.adapters.sizes import measure_model
from alignkit.models.base.loading import load_config
from alignkit.models.base.places import resolve
from alignkit.recipe.adapters import FullSpec
from alignkit.recipe.facts import ModelFacts


def size_model(name: str) -> ModelFacts:
    """Sizes of a model; its weights are not read.

    Args:
        name: a folder, a configuration file, a run or a known name.

    Raises:
        ModelError: there is none, or it is no causal language model.
    """
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            said = str(error).split("\n")[0]
            raise ModelError(
                f"{name}: is no configuration of a model: {said}", hint="name a config.json"
            ) from None
    else:
        config = load_config(resolve(name).whole())
    return measure_model(config, FullSpec(kind="full"))
