"""How long a run will take, from how fast this machine multiplies."""

from __future__ import annotations

from alignkit.recipe.adapters import has_adapter
from alignkit.recipe.facts import DataFacts, HardwareFacts, ModelFacts
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.rollouts import RolloutRecipe

SHARE = 0.6
"""Share of the measured speed that is reached: 72 of 120 GFLOP/s in SFT and DPO of 135M weights."""


def estimate_seconds(
    recipe: Recipe,
    model: ModelFacts,
    data: DataFacts,
    hardware: HardwareFacts,
    steps: int,
    checkpointing: bool,
    reference: str | None,
) -> float | None:
    """Seconds of all steps and evaluations; None where nothing is known.

    Args:
        recipe: gives adapter and kind of the rows.
        model: its sizes.
        data: sizes of the rows.
        hardware: its speed in the run's precision.
        steps: of the run.
        checkpointing: whether activations are computed twice.
        reference: kind of the reference; None without one.
    """
    if not hardware.speed or model.experts:
        return None
    evaluations = 1 + max(1, steps // (recipe.training.eval_every or steps))
    if isinstance(recipe, RolloutRecipe):
        return _rollout_seconds(recipe, model, data, hardware, steps, checkpointing, evaluations)
    work = step_work(recipe, model, data, steps, checkpointing, reference)
    models = 1 + (reference is not None)
    work += 2.0 * data.eval_tokens * _decoder(model) * models * evaluations
    return work / (SHARE * hardware.speed * hardware.processes)


def step_work(
    recipe: Recipe,
    model: ModelFacts,
    data: DataFacts,
    steps: int,
    checkpointing: bool,
    reference: str | None,
) -> float:
    """Floating-point operations of all steps: 2 for a weight and a token in each direction.

    Products with the decoder's weights count for every token, those with the vocabulary head for
    the scored ones; attention and the adapter do not count.

    Args:
        recipe: gives adapter and head.
        model: its sizes.
        data: sizes of the rows.
        steps: of the run.
        checkpointing: whether activations are computed twice.
        reference: kind of the reference; None without one.
    """
    passes = steps * recipe.examples_per_step / data.rows
    decoder, head = _decoder(model), 0 if recipe.scalar_head else model.vocabulary * model.hidden
    backward = 2 if has_adapter(recipe.adapter) else 4
    trained = data.tokens * decoder * (2 + backward + 2 * checkpointing)
    trained += data.trained_tokens * head * (2 + backward)
    scored = 0.0
    if reference is not None:
        read = 2.0 * (data.tokens * decoder + data.trained_tokens * head)
        scored = read * (min(passes, 1.0) if reference == "cached" else passes)
    return passes * trained + scored


def _rollout_seconds(
    recipe: RolloutRecipe,
    model: ModelFacts,
    data: DataFacts,
    hardware: HardwareFacts,
    steps: int,
    checkpointing: bool,
    evaluations: int,
) -> float | None:
    """With responses of full length. Sampling reads few rows at a time, at a speed of its own."""
    if not hardware.sampling_speed:
        return None
    decoder, head = _decoder(model), model.vocabulary * model.hidden
    backward = 2 if has_adapter(recipe.adapter) else 4
    reads = recipe.scored_reads * 2 + recipe.trained_reads * (2 + backward + 2 * checkpointing)
    prompts = data.tokens - data.trained_tokens
    passes = steps * recipe.examples_per_step / data.rows
    read = passes * (reads * (data.tokens * decoder + data.trained_tokens * head))
    read += passes * 2 * prompts * decoder
    new = recipe.rollout.max_new_tokens * data.eval_rows
    read += evaluations * 2 * recipe.scored_reads * (data.eval_tokens + new) * decoder
    sampled = 2.0 * (decoder + head) * (passes * data.trained_tokens + evaluations * new)
    speed, sampling = SHARE * hardware.speed, SHARE * hardware.sampling_speed
    return (read / speed + sampled / sampling) / hardware.processes


def _decoder(model: ModelFacts) -> int:
    """Weights of the decoder's products."""
    return model.layers * (
        2 * model.hidden * (model.attention_width + model.key_value_width)
        + 3 * model.hidden * model.intermediate
    )
