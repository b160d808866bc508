"""The recipe schema: written once, read as documentation, JSON schema and validation.

Every field's docstring is what `alignkit recipes explain` prints. Unknown keys are errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from alignkit.recipe.adapters import (
    AdapterSpec,
    Ia3Spec,
    LoraSpec,
    check_adapter,
    continues,
    spelled_out,
)
from alignkit.recipe.objectives import (
    REFERENCE_FREE,
    BradleyTerrySpec,
    CrossEntropySpec,
    DpoSpec,
    KtoSpec,
    PreferenceSpec,
)
from alignkit.recipe.ppo import GuardSpec, PpoSpec, RewardSources, RolloutSpec, ValueSpec
from alignkit.recipe.rope import RopeSpec
from alignkit.recipe.rows import DataSpec, SftDataSpec
from alignkit.recipe.section import Section
from alignkit.recipe.training import LoopSpec, TrainingSpec


class ModelSpec(Section):
    """The model to start from."""

    base: Annotated[str, Field(min_length=1)]
    """Hub id, folder, `.gguf` file, run folder (its `merged/`) or a name `alignkit fetch` knows."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute precision. Trainable weights and loss arithmetic are float32 in every case."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Storage of the frozen base weights: `nf4` keeps them in 4 bits with double quantization
    (QLoRA, https://arxiv.org/abs/2305.14314), `int8` in 8 bits with one scale a row. Products are
    computed in `dtype`; merging goes onto the original weights where the adapter is as good."""
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` packs rows without padding and checks itself against the model's own attention at
    the start; `packed` insists on it; the others are padded batches through transformers."""
    chat_template: str | None = None
    """A template file or a shipped name; null keeps the model's own."""
    rope_scaling: RopeSpec | None = None
    """Longer context, as in {kind: yarn, factor: 4}; written into the merged configuration."""
    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that become one token each. Their rows of embedding and output head start as the mean
    of the pieces they were cut into, are trained, and are saved with the adapter."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""


class ReferenceSpec(Section):
    """The model that the policy is compared with: the one that training starts from."""

    kind: Literal["auto", "adapter_off", "frozen_copy", "cached"] = "auto"
    """`adapter_off` turns a LoRA adapter off for one more pass a step; `cached` scores every row
    once before training and keeps the log-probs on disk for later runs; `frozen_copy` holds a
    second model. `auto` chooses, and the plan says what and why; in bfloat16 a cached value carries
    rounding of its own."""


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
    """What is trained: an adapter or all weights."""
    data: DataSpec
    """Rows to train on and rows to hold out."""
    objective: Section
    """The loss."""
    training: LoopSpec = TrainingSpec()
    """The optimizer step and the loop around it."""
    merge: bool = True
    """Write `merged/`, a checkpoint that plain transformers loads, and verify it."""

    @field_validator("adapter")
    @classmethod
    def _frozen_if_quantized(cls, value: AdapterSpec, info: ValidationInfo) -> AdapterSpec:
        model = info.data.get("model")
        if model is not None:
            check_adapter(value, model.quantization, adds_tokens=bool(model.add_tokens))
        return value


def _refuse_continuing(adapter: Any) -> None:
    """Where the reference is the base with adapters off, the policy must start there."""
    if adapter is not None and continues(adapter):
        raise ValueError(
            "is compared with a reference, which `adapter.from` would make the bare base: set "
            "model.base to the run instead, which is merged first"
        )
    if isinstance(adapter, LoraSpec) and adapter.init == "loftq":
        raise ValueError("is compared with a reference, from which adapter.init = loftq starts off")


class SftRecipe(BaseRecipe):
    """Supervised fine-tuning with prompt-masked loss."""

    stage: Literal["sft"]
    """The training stage."""
    training: TrainingSpec = TrainingSpec()
    """The optimizer step and the loop around it."""
    data: SftDataSpec
    """Rows to train on and rows to hold out."""
    objective: CrossEntropySpec = CrossEntropySpec()
    """The loss."""


class RewardRecipe(BaseRecipe):
    """A reward model: one number for each answer, learned from preference pairs."""

    stage: Literal["reward"]
    """The training stage."""
    training: TrainingSpec = TrainingSpec()
    """The optimizer step and the loop around it."""
    objective: BradleyTerrySpec = BradleyTerrySpec()
    """The loss."""


class DpoRecipe(BaseRecipe):
    """Preference optimization on pairs: DPO and its relatives."""

    stage: Literal["dpo"]
    """The training stage."""
    training: TrainingSpec = TrainingSpec()
    """The optimizer step and the loop around it."""
    objective: PreferenceSpec = Field(default=DpoSpec(kind="dpo"), validate_default=True)
    """The loss; each kind has its own fields."""
    reference: ReferenceSpec | None = None
    """The model to compare with; none for `simpo`, `orpo` and `cpo`."""

    @field_validator("objective")
    @classmethod
    def _starts_at_its_reference(
        cls, value: PreferenceSpec, info: ValidationInfo
    ) -> PreferenceSpec:
        if value.kind not in REFERENCE_FREE:
            _refuse_continuing(info.data.get("adapter"))
        return value

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
    training: TrainingSpec = TrainingSpec()
    """The optimizer step and the loop around it."""
    objective: KtoSpec = KtoSpec()
    """The loss."""
    reference: ReferenceSpec = ReferenceSpec()
    """The model to compare with."""

    @field_validator("adapter")
    @classmethod
    def _starts_at_its_reference(cls, value: AdapterSpec) -> AdapterSpec:
        _refuse_continuing(value)
        return value


class PpoRecipe(BaseRecipe):
    """Reinforcement learning from a reward: policy, reference, reward and value over one base."""

    stage: Literal["ppo"]
    """The training stage."""
    objective: PpoSpec = PpoSpec()
    """The loss."""
    reward: RewardSources
    """What responses are worth: a reward model, a Python function, a server, a rule, or a list of
    these whose weighted scores are added up."""
    rollout: RolloutSpec = RolloutSpec()
    """How responses are sampled."""
    value: ValueSpec = ValueSpec()
    """The value model."""
    guard: GuardSpec = GuardSpec()
    """What happens when the policy moves too far from the reference."""
    training: LoopSpec = LoopSpec(save_every=10)
    """The optimizer and the loop around it; a step is one batch of prompts."""

    @field_validator("model")
    @classmethod
    def _no_float16(cls, value: ModelSpec) -> ModelSpec:
        if value.add_tokens:
            raise ValueError("has add_tokens, which ppo cannot train: add them in the sft before")
        if value.dtype == "float16":
            raise ValueError("has dtype = float16, whose loss scaling ppo has not: use bfloat16")
        return value

    @field_validator("rollout")
    @classmethod
    def _enough_prompts(cls, value: RolloutSpec, info: ValidationInfo) -> RolloutSpec:
        objective = info.data.get("objective")
        if objective is not None and objective.minibatches > value.prompts_per_step:
            raise ValueError(
                f"has prompts_per_step = {value.prompts_per_step}, fewer than "
                f"objective.minibatches = {objective.minibatches}"
            )
        return value

    @field_validator("adapter")
    @classmethod
    def _no_dropout(cls, value: AdapterSpec) -> AdapterSpec:
        if isinstance(value, Ia3Spec):
            raise ValueError("has kind = ia3, which ppo does not train: use lora, or full")
        _refuse_continuing(value)
        if isinstance(value, LoraSpec) and value.init not in ("default", "eva"):
            raise ValueError(f"has init = {value.init}, which ppo does not take: use default, eva")
        if isinstance(value, LoraSpec) and value.modules_to_save:
            raise ValueError("has modules_to_save, which ppo does not train: use full")
        if isinstance(value, LoraSpec) and value.dropout > 0:
            raise ValueError(
                f"has dropout = {value.dropout:g}: the policy that samples and the policy that is "
                "trained would differ; ppo needs 0"
            )
        return value


Recipe = SftRecipe | RewardRecipe | DpoRecipe | KtoRecipe | PpoRecipe
"""Any recipe; `stage` says which."""

STAGES: dict[str, type[Recipe]] = {
    "sft": SftRecipe,
    "reward": RewardRecipe,
    "dpo": DpoRecipe,
    "kto": KtoRecipe,
    "ppo": PpoRecipe,
}

DEFAULT_KINDS = {
    "adapter": dict.fromkeys(STAGES, "lora"),
    "objective": {
        "sft": "cross_entropy",
        "reward": "bradley_terry",
        "dpo": "dpo",
        "kto": "kto",
        "ppo": "ppo",
    },
}
"""Section -> stage -> kind of a section that names none."""

DEFAULT_LEARNING_RATE = {
    "sft": {"lora": 2.0e-4, "ia3": 3.0e-3, "full": 2.0e-5},
    "reward": {"lora": 1.0e-4, "ia3": 3.0e-3, "full": 1.0e-5},
    "dpo": {"lora": 2.0e-5, "ia3": 5.0e-4, "full": 5.0e-7},
    "kto": {"lora": 2.0e-5, "ia3": 5.0e-4, "full": 1.0e-6},
    "ppo": {"lora": 2.0e-5, "full": 1.0e-6},
}
"""Stage -> adapter -> peak learning rate. Preference losses move all answers of a kind at once, so
they take far smaller steps than imitation."""


def with_defaults(recipe: Recipe) -> Recipe:
    """The recipe with every default that depends on another key filled in.

    Args:
        recipe: a validated recipe.

    Returns:
        The same recipe with `training.learning_rate` set, and `reference` and
        `value.learning_rate` where there is one.
    """
    changes: dict[str, Any] = {"adapter": spelled_out(recipe.adapter)}
    if recipe.training.learning_rate is None:
        rate = DEFAULT_LEARNING_RATE[recipe.stage][recipe.adapter.kind]
        changes["training"] = recipe.training.model_copy(update={"learning_rate": rate})
    if needs_reference(recipe) and getattr(recipe, "reference", None) is None:
        changes["reference"] = ReferenceSpec()
    if isinstance(recipe, PpoRecipe) and recipe.value.learning_rate is None:
        policy = changes.get("training", recipe.training).learning_rate
        changes["value"] = recipe.value.model_copy(update={"learning_rate": 3.0 * policy})
    return recipe.model_copy(update=changes)


def examples_per_step(recipe: Recipe) -> int:
    """Rows that one step reads, over all processes together."""
    if isinstance(recipe, PpoRecipe):
        return recipe.rollout.prompts_per_step
    return recipe.training.batch_size


def needs_reference(recipe: Recipe) -> bool:
    """Whether the recipe's objective compares with a reference model."""
    if isinstance(recipe, DpoRecipe):
        return recipe.objective.kind not in REFERENCE_FREE
    return isinstance(recipe, KtoRecipe)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, ready for YAML or JSON."""
    return recipe.model_dump(mode="json")
