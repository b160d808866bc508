"""Recipe + data sizes + model sizes + hardware -> a frozen Plan.

`alignkit plan` prints it; the run executes exactly it and stores it. A value far outside what is
published for the stage is a warning, never a silent change.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.recipe.facts import DataFacts, HardwareFacts, ModelFacts
from alignkit.recipe.memory import MemoryEstimate, estimate_memory
from alignkit.recipe.schema import LoraSpec, Recipe

_MICROBATCHES = (16384, 8192, 4096, 2048, 1024, 512)
_ROOM = 0.85
"""Share of the free memory that a plan may fill."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first step.

    Args:
        stage: of the recipe.
        steps: optimizer steps.
        steps_per_epoch: steps of one pass over the rows.
        warmup_steps: of them, with rising learning rate.
        batch_size: examples per step over all processes.
        microbatch_tokens: token budget of one forward and backward pass.
        microbatches: passes of an average step, over all processes.
        gradient_checkpointing: whether activations are recomputed.
        learning_rate: peak.
        tokens: tokens read over the whole run.
        trained_tokens: of these, the ones that carry loss.
        data: sizes of the rows.
        model: sizes of the model.
        hardware: the machine.
        memory: estimated peak of each process.
        warnings: what a careful practitioner would ask about.
    """

    stage: str
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    batch_size: int
    microbatch_tokens: int
    microbatches: int
    gradient_checkpointing: bool
    learning_rate: float
    tokens: int
    trained_tokens: int
    data: DataFacts
    model: ModelFacts
    hardware: HardwareFacts
    memory: MemoryEstimate
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return dataclasses.asdict(self)


def make_plan(recipe: Recipe, model: ModelFacts, data: DataFacts, hardware: HardwareFacts) -> Plan:
    """Decide everything that the recipe leaves open.

    Args:
        recipe: with its defaults filled in.
        model: sizes of the base and its adapter.
        data: sizes of the rows.
        hardware: the machine.

    Returns:
        The plan.

    Raises:
        AlignkitError: the recipe cannot be run as written.
    """
    training = recipe.training
    if training.batch_size < hardware.processes:
        raise AlignkitError(
            f"training.batch_size = {training.batch_size} is less than the "
            f"{hardware.processes} processes",
            hint="each process needs at least one example of every step",
        )
    if model.context and recipe.data.max_length > model.context:
        raise AlignkitError(
            f"data.max_length = {recipe.data.max_length} is longer than the model's context of "
            f"{model.context} tokens",
            hint=f"set data.max_length={model.context} or less",
        )
    steps_per_epoch = -(-data.rows // training.batch_size)
    steps = training.max_steps or max(1, math.ceil(training.epochs * steps_per_epoch))
    warmup = training.warmup * steps if training.warmup < 1 else training.warmup
    budget, checkpointing, memory = _fit_memory(recipe, model, data, hardware)
    share = steps / steps_per_epoch
    step_tokens = data.tokens / steps_per_epoch
    rate = training.learning_rate
    assert rate is not None  # with_defaults
    return Plan(
        stage=recipe.stage,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=min(round(warmup), steps - 1),
        batch_size=training.batch_size,
        microbatch_tokens=budget,
        microbatches=max(hardware.processes, math.ceil(step_tokens / budget)),
        gradient_checkpointing=checkpointing,
        learning_rate=rate,
        tokens=round(data.tokens * share),
        trained_tokens=round(data.trained_tokens * share),
        data=data,
        model=model,
        hardware=hardware,
        memory=memory,
        warnings=tuple(_warnings(recipe, model, data, hardware, steps, memory)),
    )


def _fit_memory(
    recipe: Recipe, model: ModelFacts, data: DataFacts, hardware: HardwareFacts
) -> tuple[int, bool, MemoryEstimate]:
    """Largest token budget that fits, without recomputation if possible."""
    training = recipe.training
    step_tokens = math.ceil(
        min(data.rows, training.batch_size) * data.tokens / data.rows / hardware.processes
    )
    wanted = training.gradient_checkpointing
    choices = [False, True] if wanted == "auto" else [wanted]
    if training.microbatch_tokens == "auto":
        # On a processor, budgets beyond 4096 tokens only cost memory.
        top = 4096 if hardware.device == "cpu" else _MICROBATCHES[0]
        budgets = [size for size in _MICROBATCHES if size <= top]
    else:
        budgets = [training.microbatch_tokens]
    last = None
    for checkpointing in choices:
        for budget in budgets:
            tokens = max(min(budget, round(1.25 * step_tokens)), data.longest)
            memory = estimate_memory(recipe, model, hardware, tokens, checkpointing)
            last = (budget, checkpointing, memory)
            if memory.peak <= _ROOM * hardware.memory:
                return last
    assert last is not None
    return last


def _warnings(
    recipe: Recipe,
    model: ModelFacts,
    data: DataFacts,
    hardware: HardwareFacts,
    steps: int,
    memory: MemoryEstimate,
) -> list[str]:
    training, found = recipe.training, []
    kind = recipe.adapter.kind
    low, high = {"lora": (1e-5, 1e-3), "full": (5e-7, 1e-4)}[kind]
    rate = training.learning_rate or 0.0
    if not low <= rate <= high:
        side = "above" if rate > high else "below"
        found.append(
            f"training.learning_rate = {rate:g} is {side} the usual {low:g} to {high:g} for "
            f"SFT with {'LoRA' if kind == 'lora' else 'full weights'}"
        )
    if isinstance(recipe.adapter, LoraSpec):
        ratio = recipe.adapter.alpha / recipe.adapter.rank
        if not 0.25 <= ratio <= 8:
            found.append(f"adapter.alpha / rank = {ratio:g} is outside the usual 0.25 to 8")
    if steps < 10:
        found.append(f"only {steps} optimizer steps: lower batch_size or raise epochs")
    epochs = steps * training.batch_size / data.rows
    if epochs > 10:
        found.append(f"{epochs:.0f} passes over {data.rows} rows: expect memorised answers")
    if data.overlap:
        found.append(
            f"{data.overlap} of {data.eval_rows} held-out rows also stand in the training rows: "
            "the held-out loss flatters"
        )
    if not data.eval_rows:
        found.append("no held-out rows: set data.eval or data.eval_fraction to see overfitting")
    if memory.peak > _ROOM * hardware.memory:
        found.append(
            f"about {memory.peak / 1e9:.1f} GB needed, {hardware.memory / 1e9:.1f} GB free: "
            "lower data.max_length or training.microbatch_tokens, or use LoRA"
        )
    return found
