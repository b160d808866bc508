"""The precision of a run where the recipe leaves it open: chosen once, before anything reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from alignkit.models.adapters.continued import started_adapter
from alignkit.models.adapters.finding import base_of_adapter
from alignkit.models.adapters.sizes import measure_model
from alignkit.models.attention.backend import planned_attention
from alignkit.models.base.loading import DTYPES, BaseModel, load_config
from alignkit.models.base.places import resolve
from alignkit.models.base.skeleton import build_skeleton
from alignkit.recipe.facts import HardwareFacts
from alignkit.recipe.planning.memory import ROOM, fits
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.rollouts import RolloutRecipe
from alignkit.runtime.devices import describe_hardware
from alignkit.runtime.precision import fastest, layer_speed, sampling_speed
from alignkit.runtime.processes import agree

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)

AUTO = "auto"


def with_precision(recipe: AnyRecipe, processes: int, stored: Recipe | None = None) -> AnyRecipe:
    """The recipe with the dtype that it is computed in.

    Args:
        recipe: with its defaults.
        processes: training processes; all of them choose alike.
        stored: recipe of the run that is resumed.

    Raises:
        ModelError: there is no such model.
    """
    spec = recipe.model
    if spec.dtype != AUTO:
        return recipe
    if stored is not None and stored.model.dtype != AUTO:
        chosen, reason = str(stored.model.dtype), "as the run was started"
    else:
        chosen, reason = agree(_choose(recipe, processes))
    return recipe.model_copy(update={"model": spec.computing_in(chosen, reason)})


def fastest_dtype(name: str) -> str:
    """The precision to read with on this machine; float32 only if the weights fit.

    Args:
        name: of any model.
    """
    config, hardware = load_config(_source(name, False)), describe_hardware()
    chosen = fastest(hardware.device, _shapes(config))[0]
    if chosen == "float32":
        weights = sum(weight.numel() for weight in build_skeleton(config).parameters())
        if 4 * weights > ROOM * hardware.memory:
            return "bfloat16"
    return chosen


def measured_hardware(recipe: Recipe, config: Any, processes: int) -> HardwareFacts:
    """The machine, how fast it multiplies in the recipe's precision, and how it attends.

    Args:
        recipe: with its dtype chosen.
        config: of the model.
        processes: training processes.
    """
    hardware, spec = describe_hardware(processes), recipe.model
    speed = layer_speed(hardware.device, _shapes(config), spec.dtype)
    sampling = 0.0
    if isinstance(recipe, RolloutRecipe):
        at_once = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt // processes
        sampling = sampling_speed(hardware.device, _shapes(config), spec.dtype, max(1, at_once))
    attention = f"padded rows, {spec.attention}"
    if spec.attention in ("auto", "packed"):
        attention = planned_attention(config, hardware.device, DTYPES[spec.dtype])
    return replace(hardware, speed=speed, sampling_speed=sampling, attention=attention)


def _choose(recipe: Recipe, processes: int) -> tuple[str, str]:
    spec, hardware = recipe.model, describe_hardware(processes)
    base = _source(spec.base, spec.trust_remote_code)
    chosen, reason = fastest(hardware.device, _shapes(load_config(base)))
    if chosen == "float32" and not _fits(recipe, chosen, base, hardware):
        return "bfloat16", f"float32 needs more than the {hardware.memory / 1e9:.1f} GB free here"
    return chosen, reason


def _fits(recipe: Recipe, dtype: str, base: BaseModel, hardware: HardwareFacts) -> bool:
    model = measure_model(
        load_config(base),
        started_adapter(recipe.adapter, base),
        trust_remote_code=recipe.model.trust_remote_code,
    )
    wide = recipe.model_copy(update={"model": recipe.model.computing_in(dtype, "")})
    return fits(wide, model, hardware)


def _source(name: str, trust_remote_code: bool) -> BaseModel:
    """A whole model, or the base of an adapter."""
    place = resolve(name, trust_remote_code=trust_remote_code)
    adapter = place.unmerged
    return place.whole() if adapter is None else base_of_adapter(adapter, None)


def _shapes(config: Any) -> list[tuple[int, int]]:
    """Inputs and outputs of a decoder layer's products."""
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    wide = int(getattr(text, "intermediate_size", 0) or 4 * hidden)
    return [(hidden, hidden), (hidden, wide), (wide, hidden)]
