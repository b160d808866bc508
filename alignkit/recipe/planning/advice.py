"""Warnings about a plan. They never change it."""

from __future__ import annotations

from alignkit.recipe.adapters import LoraSpec, rate_key
from alignkit.recipe.facts import DataFacts, HardwareFacts
from alignkit.recipe.planning.memory import ROOM, MemoryEstimate
from alignkit.recipe.stages.base import Recipe, metric_family

_KINDS = {
    "lora": "LoRA",
    "ia3": "IA3",
    "prefix": "a prefix",
    "projection": "a projected prefix",
    "full": "full weights",
}
"""Rate key of an adapter -> its name in sentences."""


def describe_training(recipe: Recipe, decay_steps: int) -> tuple[str, ...]:
    """What is worth knowing of the schedule and of the end of a run, one line each.

    Args:
        recipe: with its defaults filled in.
        decay_steps: of wsd, counted.
    """
    training, lines = recipe.training, []
    if training.schedule == "wsd":
        lines.append(f"schedule: at the peak until the last {decay_steps} steps, then to zero")
    if training.min_rate is not None:
        lines.append(f"schedule: cosine, to {training.min_rate:g} of the peak")
    metric = training.keep_best or next(iter(recipe.better))
    better = f"{metric}, {recipe.better.get(metric_family(metric))} is better"
    if training.keep_best:
        lines.append(f"best: adapter/ and merged/ are of the evaluation with the best {better}")
    if training.early_stop:
        lines.append(
            f"the run may end early: after {training.early_stop} evaluations in a row without a "
            f"better value ({better})"
        )
    return tuple(lines)


def find_warnings(
    recipe: Recipe, data: DataFacts, hardware: HardwareFacts, steps: int, memory: MemoryEstimate
) -> list[str]:
    """Everything unusual about a run, one sentence each.

    Args:
        recipe: with its defaults filled in.
        data: sizes of the rows.
        hardware: the machine.
        steps: optimizer steps.
        memory: the estimate.
    """
    training, warnings = recipe.training, []
    kind = rate_key(recipe.adapter)
    usual, rate = recipe.usual_rate, training.learning_rate or 0.0
    if not usual.low <= rate <= usual.high:
        side = "above" if rate > usual.high else "below"
        other = "" if "adamw" in training.optimizer else f" and {training.optimizer}"
        warnings.append(
            f"training.learning_rate = {rate:g} is {side} the usual {usual.low:g} to "
            f"{usual.high:g} for {recipe.stage} with {_KINDS[kind]}{other}"
        )
    if isinstance(recipe.adapter, LoraSpec):
        spec = recipe.adapter
        root = "sqrt(rank)" if spec.rslora else "rank"
        ratio = spec.alpha / (spec.rank**0.5 if spec.rslora else spec.rank)
        if not 0.25 <= ratio <= 8:
            warnings.append(f"adapter.alpha / {root} = {ratio:g} is outside the usual 0.25 to 8")
    if training.warmup >= steps > 1:
        warnings.append(
            f"training.warmup = {training.warmup:g} steps, but the run has {steps}: the learning "
            "rate reaches its peak only at the end"
        )
    if steps < 10:
        key = recipe.examples_key.rpartition(".")[2]
        way = "raise max_steps" if training.max_steps else f"lower {key} or raise epochs"
        warnings.append(f"only {steps} optimizer steps: {way}")
    epochs = steps * recipe.examples_per_step / data.rows
    if epochs > 10 and not recipe.repeats_rows:
        warnings.append(f"{epochs:.0f} passes over {data.rows} rows: expect memorised completions")
    if data.overlap:
        warnings.append(
            f"{data.overlap} of {data.eval_rows} held-out rows are also in the training rows: "
            "the held-out loss will look too good"
        )
    if not data.eval_rows:
        warnings.append(
            f"no held-out rows: set data.eval or data.eval_fraction to see {recipe.held_out_shows}"
        )
    if memory.peak > ROOM * hardware.memory:
        warnings.append(
            f"about {memory.peak / 1e9:.1f} GB needed, {hardware.memory / 1e9:.1f} GB free: "
            "lower data.max_length or training.microbatch_tokens, or use LoRA"
        )
    return warnings + _of_cards(recipe, hardware) + recipe.warnings(data)


def _of_cards(recipe: Recipe, hardware: HardwareFacts) -> list[str]:
    """What a GPU could do better."""
    warnings, dtype = [], recipe.model.dtype
    if hardware.cards > hardware.processes:
        warnings.append(
            f"{hardware.cards - hardware.processes} of {hardware.cards} GPUs stay idle: use "
            f"--processes {hardware.cards}, or CUDA_VISIBLE_DEVICES to name one"
        )
    if dtype == "bfloat16" and not hardware.multiplies_bfloat16:
        warnings.append(
            f"{hardware.name} imitates bfloat16, slowly: leave model.dtype at auto, or set float16"
        )
    if dtype == "float32" and hardware.device == "cuda":
        warnings.append(
            "float32 products keep all bits on a GPU (no TF32) and take many times as long as "
            "those in 16 bits: leave model.dtype at auto"
        )
    return warnings
