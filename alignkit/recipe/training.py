"""The `training` section of a recipe: the optimizer and the loop around it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from alignkit.recipe.section import PositiveInt, Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

_OF_SCHEDULE = {"decay": ("wsd", 0.2), "min_rate": ("cosine_min", 0.1)}
"""Key -> the only schedule that has it, and its value there if it is not set."""

_BETAS = {"lion": (0.9, 0.99), "lion_8bit": (0.9, 0.99), "adafactor": None}
"""Optimizer -> its betas; the others are AdamW, with 0.9 and 0.999."""


class LoopSpec(Section):
    """The optimizer and the loop around it."""

    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Passes over the training rows; a fraction ends partway through the last pass."""
    max_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Optimizer steps of the run; overrides `epochs`."""
    microbatch_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    """Tokens of one forward and backward pass; changes speed and memory, never the result."""
    learning_rate: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Peak learning rate. Unset: the stage's default, for LoRA, IA3 and full weights in turn:
    sft 2e-4, 3e-3 and 2e-5, reward 1e-4, 3e-3 and 1e-5, dpo 2e-5, 5e-4 and 5e-7, kto 2e-5, 5e-4
    and 1e-6; ppo 2e-5 and 1e-6 (no IA3). For a prefix 3e-2 in sft, 3e-3 in dpo and kto; with
    its projection 5e-4 and 1e-4. With lion a fifth of these, with adafactor 50 times."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "cosine_min"] = "cosine"
    """Shape after warm-up; cosine and linear end at zero. `wsd` stays at the peak and falls to zero
    at the end (https://arxiv.org/abs/2404.06395); `cosine_min` ends at a share of the peak."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(None, validate_default=True)
    """Of wsd: share of the steps, at the end, over which the rate falls. Unset: 0.2."""
    min_rate: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(None, validate_default=True)
    """Of cosine_min: share of the peak at which it ends. Unset: 0.1."""
    warmup: Annotated[float, Field(ge=0.0, le=1e9)] = 0.03
    """Warm-up: below 1 a share of the steps, from 1 a number of steps."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Decoupled weight decay; not applied to biases and norms."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Gradient norm above which gradients are clipped; null never clips."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradients are not finite stops the run, or is skipped: no weight moves
    (in ppo by the rest of its updates), and `skipped_steps` counts it. More than 10 in a row, or in
    all more than 1% of the steps and more than 10, stop the run all the same."""
    optimizer: Literal[
        "adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "lion", "lion_8bit"
    ] = "adamw"
    """AdamW with epsilon 1e-8 (1e-5 in ppo). `adamw_8bit` keeps its two moments in 8 bits each
    (https://arxiv.org/abs/2110.02861), except those of weights with fewer than 4,096 elements;
    `paged_adamw_8bit` also moves them to main memory when the GPU is full, on CUDA only.
    `adafactor` is torch's (https://arxiv.org/abs/1804.04235): it keeps a row and a column of each
    weight, and its rate is relative to the weight's own size. `lion` and `lion_8bit` keep one
    moment and step by its sign (https://arxiv.org/abs/2302.06675)."""
    betas: tuple[Beta, Beta] | None = Field(None, validate_default=True)
    """Decay of the moments. Unset: 0.9 and 0.999, of lion 0.9 and 0.99. Adafactor has none."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations to save memory; `auto` does so only if they would not fit."""
    deterministic: bool = False
    """On CUDA, take only kernels that add up in a fixed order, more slowly: runs can then end with
    the same bytes; not yet tried on a card. A processor always adds in one order."""
    log_every: PositiveInt = 1
    """Steps between progress lines. metrics.jsonl gets every step."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; also run before the first and after the last step."""
    save_every: PositiveInt = 50
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """Checkpoints to keep."""
    keep_best: Annotated[str, Field(min_length=1)] | None = None
    """A held-out metric without `eval/`, such as loss or accuracy. The checkpoint of its best
    evaluation is kept besides the newest ones, and adapter/ and merged/ are made of it. Needs
    held-out rows and eval_every; the evaluation before the first step does not count."""
    early_stop: PositiveInt | None = None
    """End the run after this many evaluations in a row without a better value of the metric of
    keep_best, else of the held-out loss (reward in ppo and grpo)."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers in addition to metrics.jsonl, through accelerate."""

    @field_validator("decay", "min_rate")
    @classmethod
    def _of_the_schedule(cls, value: float | None, info: ValidationInfo) -> float | None:
        owner, usual = _OF_SCHEDULE[info.field_name or ""]
        schedule = info.data.get("schedule", owner)
        if value is not None and schedule != owner:
            raise ValueError(f"is a key of schedule = {owner}, not of {schedule}: remove it")
        return usual if value is None and schedule == owner else value

    @field_validator("betas")
    @classmethod
    def _of_the_optimizer(cls, value: Any, info: ValidationInfo) -> Any:
        usual = _BETAS.get(info.data.get("optimizer", ""), (0.9, 0.999))
        if value is not None and usual is None:
            raise ValueError("is no key of optimizer = adafactor: remove it")
        return usual if value is None else value

    @field_validator("keep_best", "early_stop")
    @classmethod
    def _evaluated(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("eval_every", 1) is None:
            raise ValueError("needs evaluations during the run: set training.eval_every")
        return value


class TrainingSpec(LoopSpec):
    """The optimizer step and the loop around it."""

    batch_size: PositiveInt = 16
    """Examples per optimizer step, over all processes together."""
