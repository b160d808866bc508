"""The recipe schema: written once, read as documentation, JSON schema and validation.

Every field's docstring is what `alignkit recipes explain` prints. Unknown keys are errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from alignkit.recipe.adapters import (
    AdapterSpec,
    LoraSpec,
    check_adapter,
    continues,
    is_mergeable,
    rate_key,
    spelled_out,
)
from alignkit.recipe.model import ModelSpec
from alignkit.recipe.objectives import (
    REFERENCE_FREE,
    BradleyTerrySpec,
    CrossEntropySpec,
    DpoSpec,
    KtoSpec,
    PreferenceSpec,
)
from alignkit.recipe.rows import DataSpec, SftDataSpec
from alignkit.recipe.section import Section
from alignkit.recipe.stages.ppo import GuardSpec, PpoSpec, RewardSources, RolloutSpec, ValueSpec
from alignkit.recipe.stages.rates import DEFAULT_LEARNING_RATE
from alignkit.recipe.training import LoopSpec, TrainingSpec


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
    """Write `merged/`, a checkpoint that plain transformers loads, and verify it. Never with a
    prefix, which no weight can hold."""

    @field_validator("merge")
    @classmethod
    def _no_merge_of_a_prefix(cls, value: bool, info: ValidationInfo) -> bool:
        adapter = info.data.get("adapter")
        if value and adapter is not None and not is_mergeable(adapter):
            raise ValueError(
                f"must be false with adapter.kind = {adapter.kind}, which no weight can hold"
            )
        return value

    @field_validator("adapter")
    @classmethod
    def _fits_the_rest(cls, value: AdapterSpec, info: ValidationInfo) -> AdapterSpec:
        model = info.data.get("model")
        quantization = None if model is None else model.quantization
        adds_tokens = model is not None and bool(model.add_tokens)
        check_adapter(value, info.data.get("stage", ""), quantization, adds_tokens=adds_tokens)
        return value


def _refuse_continuing(adapter: Any) -> None:
    """Where the reference is the base with adapters off, the policy must start there."""
    if adapter is not None and continues(adapter):
        raise ValueError(
            "is compared with a reference, which `adapter.from` would make the bare base: "
            + (
                "set model.base to the run instead, which is merged first"
                if is_mergeable(adapter)
                else "a prefix has no merge, so train with kind: lora"
            )
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


def with_defaults(recipe: Recipe) -> Recipe:
    """The recipe with every default that depends on another key filled in.

    Args:
        recipe: a validated recipe.

    Returns:
        The same recipe with `training.learning_rate` set, `reference` and `value.learning_rate`
        where there is one, and `merge` off where there is nothing to merge.
    """
    changes: dict[str, Any] = {"adapter": spelled_out(recipe.adapter)}
    if recipe.training.learning_rate is None:
        rate = DEFAULT_LEARNING_RATE[recipe.stage][rate_key(recipe.adapter)]
        changes["training"] = recipe.training.model_copy(update={"learning_rate": rate})
    if not is_mergeable(recipe.adapter):
        changes["merge"] = False
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
