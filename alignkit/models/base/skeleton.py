"""A base without storage: its shapes, and whether its files hold all of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.base.files import integer_weights, reading, reason, require_whole
from alignkit.models.base.loading import BaseModel, load_config, require_plausible
from alignkit.models.quiet import quiet_transformers
from alignkit.models.transformers_parts import has_language_model, revert_weight_conversion


def build_skeleton(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without storage, on the meta device.

    Raises:
        ModelError: the configuration is not that of a causal language model, or has a value that
            no such model can be built with.
    """
    try:
        with quiet_transformers(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a wrong type or number may end in any error
        if not has_language_model(config) and isinstance(
            error, ValueError | KeyError | ImportError
        ):
            raise ModelError(
                f"{config.model_type!r} is not a causal language model: {reason(error)}",
                hint="alignkit trains decoder models that AutoModelForCausalLM loads",
            ) from error
        values = {**config.to_dict(), **(getattr(config, "rope_parameters", None) or {})}
        keys = [
            k for k, v in values.items() if isinstance(error, KeyError) and [v] == [*error.args]
        ]
        what = f"it knows no {keys[0]} {values[keys[0]]!r}" if keys else reason(error)
        raise ModelError(
            f"{config.name_or_path or 'config.json'}: no {config.model_type!r} model can be built "
            f"as its configuration says: {what}",
            hint="correct config.json, or copy it again from where the model came from",
        ) from error
    return model


def require_complete(base: BaseModel) -> None:
    """Refuse a folder that does not hold all weights of its model, before any of them is read.

    transformers puts weights of the stored shapes, without storage, into the model, as it will put
    the real ones: by the same names, into the same stacks. A hub id, a GGUF file, quantized
    weights and a model with code of its own are checked when they are loaded.

    Raises:
        ModelError: a weight is missing, left over, of another shape or an integer; or a dropout is
            no probability.
    """
    if base.gguf is not None or base.trust_remote_code or base.unmerged is not None:
        return
    shapes = require_plausible(base)
    if not shapes:
        return
    config = load_config(BaseModel(base.location))
    if getattr(config, "quantization_config", None):
        return
    _require_real_weights(base)
    _require_probabilities(base, config)
    skeleton = build_skeleton(config)
    tied = skeleton.all_tied_weights_keys
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        with reading(base.name, "the weights"):
            model, found = type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict=weights,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except ModelError:  # of stacks that cannot be put together, without their names
        parts = revert_weight_conversion(skeleton, skeleton.state_dict())
        wanted = {name: tuple(part.shape) for name, part in parts.items() if name not in tied}
        found = {
            "missing_keys": wanted.keys() - shapes.keys(),
            "mismatched_keys": [
                (n, shapes[n], w) for n, w in wanted.items() if shapes.get(n, w) != w
            ],
        }
        require_whole(base.name, skeleton, found)
        raise
    require_whole(base.name, model, found)


def _require_real_weights(base: BaseModel) -> None:
    """Refuse integers: quantized weights whose scales the configuration does not tell."""
    names = integer_weights(Path(base.location))
    if names:
        raise ModelError(
            f"{names[0]} of {base.name} is stored as integers, but its config.json has no "
            "quantization_config that says what they mean",
            hint="name the model they were made from, and set model.quantization",
        )


def _require_probabilities(base: BaseModel, config: PreTrainedConfig) -> None:
    for key, value in config.get_text_config().to_dict().items():
        dropout = key.endswith(("dropout", "pdrop")) and isinstance(value, int | float)
        if dropout and not 0 <= value <= 1:
            raise ModelError(
                f"config.json of {base.name} says {key} = {value}, which must be 0 to 1",
                hint="correct config.json, or copy it again from where the model came from",
            )
