"""The recipe schema: written once, read as documentation, JSON schema and validation.

Every field's docstring is what `alignkit recipes explain` prints. Unknown keys are errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from alignkit.recipe.objectives import (
    REFERENCE_FREE,
    BradleyTerrySpec,
    CrossEntropySpec,
    DpoSpec,
    KtoSpec,
    PreferenceSpec,
)
from alignkit.recipe.rows import DataSpec, SftDataSpec
from alignkit.recipe.section import PositiveInt, Section


class ModelSpec(Section):
    """The model to start from."""

    base: Annotated[str, Field(min_length=1)]
    """Hub id, folder, `.gguf` file, run folder (its `merged/`) or a name `alignkit fetch` knows."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute precision. Trainable weights and loss arithmetic are float32 in every case."""
    quantization: Literal["none", "nf4"] = "none"
    """Storage of the frozen base weights: `nf4` keeps them in 4 bits with double quantization
    (QLoRA, https://arxiv.org/abs/2305.14314) and merges into the original weights."""
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` packs rows without padding and checks itself against the model's own attention at
    the start; `packed` insists on it; the others are padded batches through transformers."""
    chat_template: str | None = None
    """A template file or a shipped name; null keeps the model's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""


class LoraSpec(Section):
    """Low-rank adapters, W + (alpha / rank) · B A (https://arxiv.org/abs/2106.09685)."""

    kind: Literal["lora"] = "lora"
    """`lora` trains low-rank adapters over a frozen base."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Inner dimension of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, a list of module names such as `[q_proj, v_proj]`, or a regular expression."""


class FullSpec(Section):
    """All weights are trained."""

    kind: Literal["full"]
    """`full` trains every weight: about 16 bytes a parameter instead of 2."""


AdapterSpec = Annotated[LoraSpec | FullSpec, Field(discriminator="kind")]


class ReferenceSpec(Section):
    """The model that the policy is compared with: the one that training starts from."""

    kind: Literal["auto", "adapter_off", "frozen_copy", "cached"] = "auto"
    """`adapter_off` turns a LoRA adapter off for one more pass a step; `cached` scores every row
    once before training and keeps the log-probs on disk for later runs; `frozen_copy` holds a
    second model. `auto` chooses, and the plan says what and why; in bfloat16 a cached value carries
    rounding of its own."""


class TrainingSpec(Section):
    """The optimizer step and the loop around it."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows; a fraction stops early in the last pass."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; overrides `epochs`."""
    batch_size: PositiveInt = 16
    """Examples per optimizer step, over all processes together."""
    microbatch_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    """Tokens of one forward and backward pass; changes speed and memory, never the result."""
    learning_rate: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Peak learning rate. Unset: that of the stage, for LoRA and full weights in turn:
    sft 2e-4 and 2e-5, reward 1e-4 and 1e-5, dpo 2e-5 and 5e-7, kto 2e-5 and 1e-6."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up; cosine and linear end at zero."""
    warmup: Annotated[float, Field(ge=0.0)] = 0.03
    """Warm-up: a share of the steps below 1, a number of steps from 1."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay; not applied to biases and norms."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Gradient norm above which gradients are scaled down; null never clips."""
    optimizer: Literal["adamw"] = "adamw"
    """AdamW with betas 0.9 and 0.999 and epsilon 1e-8."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations to save memory; `auto` only when they would not fit."""
    log_every: PositiveInt = 1
    """Steps between progress lines. metrics.jsonl gets every step."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; before the first and after the last step in every case."""
    save_every: PositiveInt = 50
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """Checkpoints to keep."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers beside metrics.jsonl, through accelerate."""


class BaseRecipe(Section):
    """What the recipes of all stages have in common."""

    stage: str
    """The training stage."""
    output: Annotated[str, Field(min_length=1)]
    """Run folder: metrics, checkpoints, adapter/ and merged/."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of data order, adapter initialisation and dropout."""
    model: ModelSpec
    """The model to start from."""
    adapter: AdapterSpec = LoraSpec()
    """What is trained: a LoRA adapter or all weights."""
    data: DataSpec
    """Rows to train on and rows to hold out."""
    objective: Section
    """The loss."""
    training: TrainingSpec = TrainingSpec()
    """The optimizer step and the loop around it."""
    merge: bool = True
    """Write `merged/`, a checkpoint that plain transformers loads, and verify it."""

    @field_validator("adapter")
    @classmethod
    def _frozen_if_quantized(cls, value: AdapterSpec, info: ValidationInfo) -> AdapterSpec:
        model = info.data.get("model")
        if isinstance(value, FullSpec) and model is not None and model.quantization != "none":
            raise ValueError(
                f"trains all weights, and model.quantization = {model.quantization} freezes them"
            )
        return value


class SftRecipe(BaseRecipe):
    """Supervised fine-tuning with prompt-masked loss."""

    stage: Literal["sft"]
    """The training stage."""
    data: SftDataSpec
    """Rows to train on and rows to hold out."""
    objective: CrossEntropySpec = CrossEntropySpec()
    """The loss."""


class RewardRecipe(BaseRecipe):
    """A reward model: one number for each answer, learned from preference pairs."""

    stage: Literal["reward"]
    """The training stage."""
    objective: BradleyTerrySpec = BradleyTerrySpec()
    """The loss."""


class DpoRecipe(BaseRecipe):
    """Preference optimization on pairs: DPO and its relatives."""

    stage: Literal["dpo"]
    """The training stage."""
    objective: PreferenceSpec = DpoSpec(kind="dpo")
    """The loss; each kind has its own fields."""
    reference: ReferenceSpec | None = None
    """The model to compare with; none for `simpo`, `orpo` and `cpo`."""

    @field_validator("reference")
    @classmethod
    def _no_reference_without_use(
        cls, value: ReferenceSpec | None, info: ValidationInfo
    ) -> ReferenceSpec | None:
        objective = info.data.get("objective")
        if value is not None and objective is not None and objective.kind in REFERENCE_FREE:
            raise ValueError(f"has no use: `{objective.kind}` compares with no reference model")
        return value


class KtoRecipe(BaseRecipe):
    """Preference optimization on single answers labelled good or bad."""

    stage: Literal["kto"]
    """The training stage."""
    objective: KtoSpec = KtoSpec()
    """The loss."""
    reference: ReferenceSpec = ReferenceSpec()
    """The model to compare with."""


Recipe = SftRecipe | RewardRecipe | DpoRecipe | KtoRecipe
"""Any recipe; `stage` says which."""

STAGES: dict[str, type[Recipe]] = {
    "sft": SftRecipe,
    "reward": RewardRecipe,
    "dpo": DpoRecipe,
    "kto": KtoRecipe,
}

DEFAULT_KINDS = {
    "adapter": dict.fromkeys(STAGES, "lora"),
    "objective": {
        "sft": "cross_entropy",
        "reward": "bradley_terry",
        "dpo": "dpo",
        "kto": "kto",
    },
}
"""Section -> stage -> kind of a section that names none."""

DEFAULT_LEARNING_RATE = {
    "sft": {"lora": 2.0e-4, "full": 2.0e-5},
    "reward": {"lora": 1.0e-4, "full": 1.0e-5},
    "dpo": {"lora": 2.0e-5, "full": 5.0e-7},
    "kto": {"lora": 2.0e-5, "full": 1.0e-6},
}
"""Stage -> adapter -> peak learning rate. Preference losses move all answers of a kind at once, so
they take far smaller steps than imitation."""


def with_defaults(recipe: Recipe) -> Recipe:
    """The recipe with every default that depends on another key filled in.

    Args:
        recipe: a validated recipe.

    Returns:
        The same recipe with `training.learning_rate` set, and `reference` where there is one.
    """
    changes: dict[str, Any] = {}
    if recipe.training.learning_rate is None:
        rate = DEFAULT_LEARNING_RATE[recipe.stage][recipe.adapter.kind]
        changes["training"] = recipe.training.model_copy(update={"learning_rate": rate})
    if needs_reference(recipe) and getattr(recipe, "reference", None) is None:
        changes["reference"] = ReferenceSpec()
    return recipe.model_copy(update=changes)


def needs_reference(recipe: Recipe) -> bool:
    """Whether the recipe's objective compares with a reference model."""
    if isinstance(recipe, DpoRecipe):
        return recipe.objective.kind not in REFERENCE_FREE
    return isinstance(recipe, KtoRecipe)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, ready for YAML or JSON."""
    return recipe.model_dump(mode="json")
