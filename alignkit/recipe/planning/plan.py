"""Recipe + data sizes + model sizes + hardware -> a frozen Plan.

`alignkit plan` prints it; the run stores it and executes exactly it. A value far outside the
published range of the stage is a warning, never a silent change.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.recipe.adapters import has_adapter
from alignkit.recipe.facts import DataFacts, HardwareFacts, ModelFacts
from alignkit.recipe.planning.advice import describe_training, find_warnings
from alignkit.recipe.planning.duration import estimate_seconds
from alignkit.recipe.planning.memory import ROOM, MemoryEstimate, estimate_memory
from alignkit.recipe.stages.base import Recipe

_MICROBATCHES = (16384, 8192, 4096, 2048, 1024, 512)
_SCORE_ONCE = 1.5
"""Passes over the rows above which a float32 reference is scored once and cached."""


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first step.

    Args:
        stage: the recipe's stage.
        steps: optimizer steps.
        steps_per_epoch: steps of one pass over the rows.
        warmup_steps: of the steps, the ones with a rising learning rate.
        batch_size: examples per step, over all processes.
        microbatch_tokens: token budget of one forward and backward pass.
        microbatches: passes of an average step, over all processes.
        gradient_checkpointing: whether activations are recomputed.
        learning_rate: the peak.
        tokens: tokens read over the whole run.
        trained_tokens: of these, the ones that carry loss.
        data: sizes of the rows.
        model: sizes of the model.
        hardware: the machine.
        memory: estimated peak per process.
        reference: `adapter_off`, `frozen_copy` or `cached`; None without a reference model.
        reference_reason: why it was chosen.
        warnings: unusual settings, one sentence each.
        roles: the model in each role of PPO and what it costs; empty for other stages.
        schedule: shape of all learning rates after warm-up.
        peak_rates: trained part -> its peak learning rate; `learning_rate` is the first.
        dtype: compute precision.
        dtype_reason: why it was chosen.
        decay_steps: of wsd, the last ones, over which the rate falls to zero.
        min_rate: of cosine_min, the share of the peak at which it ends.
        training: what is worth knowing of the schedule and of the run's end, one line each.
        seconds: that all steps and evaluations will take; None if nothing is known.
        reward_models: that are loaded in addition to the base.
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
    reference: str | None
    reference_reason: str
    warnings: tuple[str, ...]
    roles: tuple[str, ...] = ()
    schedule: str = "cosine"
    peak_rates: dict[str, float] = field(default_factory=dict)
    dtype: str = ""
    dtype_reason: str = ""
    seconds: float | None = None
    reward_models: int = 0
    decay_steps: int = 0
    min_rate: float = 0.0
    training: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What a person sees when the run starts."""
        model, most = self.model, "at most " if self.model.at_most else ""
        on_cpu = self.hardware.device == "cpu"
        threads = f" on {self.hardware.cores} threads" if on_cpu else ""
        lines = [
            f"plan: {self.steps} steps of {self.batch_size} examples, {most}"
            f"{model.trainable / 1e6:.1f} of {model.parameters / 1e6:.1f} M weights trained, about "
            f"{self.memory.peak / 1e9:.1f} GB{' and ' * bool(self.time)}{self.time}",
            f"precision: {self.dtype}{threads}, {self.dtype_reason}",
        ]
        if self.reference is not None:
            lines.append(f"reference: {self.reference.replace('_', ' ')}, {self.reference_reason}")
        return [*lines, *self.training, *self.roles]

    @property
    def time(self) -> str:
        """How long the steps and evaluations take, in words; empty if nothing is known."""
        if self.seconds is None:
            return ""
        minutes = round(self.seconds / 60)
        if not minutes:
            return "less than a minute"
        most = "at most " if self.hardware.sampling_speed else ""  # a response may end early
        return f"{most}{minutes} minute{'s' * (minutes > 1)}"

    @property
    def fits(self) -> bool:
        """Whether its memory is there, with some room left."""
        return self.memory.peak <= ROOM * self.hardware.memory

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return dataclasses.asdict(self)


def make_plan(
    recipe: Recipe,
    model: ModelFacts,
    data: DataFacts,
    hardware: HardwareFacts,
    *,
    reward_models: int = 0,
    roles: tuple[str, ...] = (),
) -> Plan:
    """Decide everything that the recipe leaves open.

    Args:
        recipe: with its defaults filled in.
        model: sizes of the base and its adapter.
        data: sizes of the rows.
        hardware: the machine.
        reward_models: number of separately loaded reward models.
        roles: the model in each role of PPO.

    Returns:
        The plan.

    Raises:
        AlignkitError: the recipe cannot be run as written.
    """
    training, batch_size = recipe.training, recipe.examples_per_step
    require_examples(recipe, hardware.processes)
    room = model.context - model.prefix
    if model.context and recipe.data.max_length > room:
        before = f" after a prefix of {model.prefix}" if model.prefix else ""
        raise AlignkitError(
            f"data.max_length = {recipe.data.max_length} is longer than the model's context of "
            f"{model.context} tokens{before}",
            hint=f"set data.max_length={room} or less",
        )
    steps_per_epoch = -(-data.rows // batch_size)
    steps = training.max_steps or max(1, math.ceil(training.epochs * steps_per_epoch))
    warmup = training.warmup * steps if training.warmup < 1 else training.warmup
    warmup_steps = min(round(warmup), steps - 1)
    decay = count_decay(training.decay, steps, warmup_steps)
    reference, reason = _choose_reference(recipe, steps / steps_per_epoch)
    budget, checkpointing, memory = _fit_memory(
        recipe, model, data, hardware, reference, reward_models
    )
    share, step_tokens = steps / steps_per_epoch, data.tokens / steps_per_epoch
    rates = recipe.peak_rates
    return Plan(
        stage=recipe.stage,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        microbatch_tokens=budget,
        microbatches=max(hardware.processes, math.ceil(step_tokens / budget)),
        gradient_checkpointing=checkpointing,
        learning_rate=next(iter(rates.values())),
        peak_rates=rates,
        tokens=round(data.tokens * share),
        trained_tokens=round(data.trained_tokens * share),
        data=data,
        model=model,
        hardware=hardware,
        memory=memory,
        reference=reference,
        reference_reason=reason,
        warnings=tuple(find_warnings(recipe, data, hardware, steps, memory)),
        roles=roles,
        schedule=training.schedule,
        decay_steps=decay,
        min_rate=training.min_rate or 0.0,
        training=describe_training(recipe, decay),
        dtype=recipe.model.dtype,
        dtype_reason=recipe.model.dtype_reason,
        seconds=estimate_seconds(recipe, model, data, hardware, steps, checkpointing, reference),
        reward_models=reward_models,
    )


def count_decay(share: float | None, steps: int, warmup_steps: int) -> int:
    """Steps over which wsd decays: a share of all, none of them of the warm-up, but at least one.

    Args:
        share: of the recipe; None for another schedule.
        steps: of the whole run.
        warmup_steps: of these.

    Returns:
        Their number; 0 for another schedule.
    """
    return 0 if share is None else max(1, min(round(share * steps), steps - warmup_steps))


def require_examples(recipe: Recipe, processes: int) -> None:
    """Refuse more processes than a step has examples.

    Raises:
        AlignkitError: a process would have nothing to do.
    """
    if recipe.examples_per_step < processes:
        raise AlignkitError(
            f"{recipe.examples_key} = {recipe.examples_per_step} is less than the {processes} "
            "processes",
            hint=f"each process needs an example: set it to {processes} or more",
        )


def _choose_reference(recipe: Recipe, passes: float) -> tuple[str | None, str]:
    """The kind of the reference, and why it was chosen."""
    spec = getattr(recipe, "reference", None)
    if not recipe.needs_reference or spec is None:
        return None, ""
    adapted = has_adapter(recipe.adapter)
    if spec.kind == "adapter_off" and not adapted:
        raise AlignkitError(
            "reference.kind = adapter_off, but there is no adapter: all weights are trained",
            hint="set reference.kind to cached or frozen_copy",
        )
    if spec.kind != "auto":
        return spec.kind, "as the recipe says"
    if not adapted:
        return "cached", "all weights are trained: no second model is kept in memory"
    if recipe.model.dtype != "float32":
        return "adapter_off", f"it rounds to {recipe.model.dtype} like the policy"
    if passes > _SCORE_ONCE:
        return "cached", f"each row is read {passes:.1f} times and scored once"
    return "adapter_off", "each row is read about once: caching would save nothing"


def _fit_memory(
    recipe: Recipe,
    model: ModelFacts,
    data: DataFacts,
    hardware: HardwareFacts,
    reference: str | None,
    reward_models: int,
) -> tuple[int, bool, MemoryEstimate]:
    """The largest token budget that fits, without recomputation if possible."""
    training = recipe.training
    wanted = training.gradient_checkpointing
    choices = [False, True] if wanted == "auto" else [wanted]
    if training.microbatch_tokens == "auto":
        top = recipe.processor_tokens
        budgets = [n for n in _MICROBATCHES if n <= top or hardware.device != "cpu"]
    else:
        budgets = [training.microbatch_tokens]
    last = None
    for checkpointing in choices:
        for budget in budgets:
            tokens = max(min(budget, data.step), data.longest)
            documents = math.ceil(tokens * data.rows / data.tokens)
            memory = estimate_memory(
                recipe, model, hardware, tokens, checkpointing, reference, reward_models, documents
            )
            last = (budget, checkpointing, memory)
            if memory.peak <= ROOM * hardware.memory:
                return last
    assert last is not None
    return last
