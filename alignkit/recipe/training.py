"""The `training` section of a recipe: the optimizer and the loop around it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignkit.recipe.section import PositiveInt, Section


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
    its projection 5e-4 and 1e-4."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up; cosine and linear end at zero."""
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
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW with betas 0.9 and 0.999 and epsilon 1e-8 (1e-5 in ppo). `adamw_8bit` keeps its two
    moments in 8 bits each (https://arxiv.org/abs/2110.02861), except those of weights with fewer
    than 4,096 elements; `paged_adamw_8bit` also moves them to main memory when the GPU is full, on
    CUDA only."""
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
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers in addition to metrics.jsonl, through accelerate."""


class TrainingSpec(LoopSpec):
    """The optimizer step and the loop around it."""

    batch_size: PositiveInt = 16
    """Examples per optimizer step, over all processes together."""
