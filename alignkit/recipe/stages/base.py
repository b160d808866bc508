"""What the recipes of all stages have in common, and what each tells other rooms about itself.

The traits below the keys are all that planning, reading, checking and running ask of a stage: none
of them knows a stage by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

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
from alignkit.recipe.facts import DataFacts, ModelFacts
from alignkit.recipe.model import ModelSpec
from alignkit.recipe.rewards import RewardSource
from alignkit.recipe.rows import DataSpec
from alignkit.recipe.section import Section
from alignkit.recipe.training import LoopSpec, TrainingSpec


class ReferenceSpec(Section):
    """The model that the policy is compared with: the one that training starts from."""

    kind: Literal["auto", "adapter_off", "frozen_copy", "cached"] = "auto"
    """`adapter_off` turns a LoRA adapter off for one more pass a step; `cached` scores every row
    once before training and keeps the log-probs on disk for later runs; `frozen_copy` holds a
    second model. `auto` chooses, and the plan says what and why; in bfloat16 a cached value carries
    rounding of its own."""


@dataclass(frozen=True)
class Rate:
    """Peak learning rates of one stage with one kind of adapter.

    Args:
        default: where the recipe names none.
        low: least usual one.
        high: largest usual one.
    """

    default: float
    low: float
    high: float


Rates = dict[str, Rate]
"""Kind of adapter -> its rates; a prefix through a network is a `projection`."""


@dataclass(frozen=True)
class FurtherMemory:
    """Bytes that a stage takes beside the trained model.

    Args:
        models: weights of further models.
        training_state: gradients and moments of further trained weights.
        workspace: of a pass.
    """

    models: int = 0
    training_state: int = 0
    workspace: int = 0


@dataclass(frozen=True)
class MemoryTerms:
    """What the bytes of further models follow from.

    Args:
        model: widths.
        wide: bytes of a computed number.
        weights: bytes of the trained model's weights.
        per_weight: bytes of a trained weight's gradient and moments.
        reward_models: loaded beside the policy's base.
    """

    model: ModelFacts
    wide: int
    weights: int
    per_weight: float
    reward_models: int


class Recipe(Section):
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
    training: LoopSpec = LoopSpec()
    """The optimizer and the loop around it."""
    merge: bool = True
    """Write `merged/`, a checkpoint that plain transformers loads, and verify it. Never with a
    prefix, which no weight can hold."""

    definition: ClassVar[str]
    """`module:name` of the stage's definition, which is imported only to run it."""
    row_kind: ClassVar[Literal["answers", "pairs", "labelled", "prompts"]] = "answers"
    """What a row of the data is."""
    rates: ClassVar[Rates]
    """Learning rates for each kind of adapter that the stage takes."""
    scalar_head: ClassVar[bool] = False
    """Whether the model gives one number for an answer, and no text."""
    shares_prompts: ClassVar[bool] = False
    """Whether rows have several branches behind one prompt."""
    uses_margins: ClassVar[bool] = True
    """Whether a pair's own margin counts; where not, rows that have one are reported."""
    examples_key: ClassVar[str] = "training.batch_size"
    """Key that says how many rows a step reads."""
    repeats_rows: ClassVar[bool] = False
    """Whether many passes over the rows are usual."""
    held_out_shows: ClassVar[str] = "overfitting"
    """What held-out rows would show."""
    processor_tokens: ClassVar[int] = 4096
    """Largest token budget on a processor. Beyond it, DPO was no faster and took 3 GB more."""
    hints: ClassVar[dict[str, str]] = {}
    """Key -> what to do where its value breaks a rule; before the hints of all stages."""
    counterparts: ClassVar[dict[str, str]] = {}
    """Key that only other stages have -> what this one has in its place."""

    @property
    def examples_per_step(self) -> int:
        """Rows that one step reads, over all processes together."""
        raise NotImplementedError

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares with a reference model."""
        return False

    @property
    def reward_sources(self) -> tuple[RewardSource, ...]:
        """What responses are worth, where the stage samples any."""
        return ()

    @property
    def peak_rates(self) -> dict[str, float]:
        """Name of each trained part -> its peak learning rate; the first is the model's own."""
        assert self.training.learning_rate is not None  # with_defaults
        return {"model": self.training.learning_rate}

    def further_memory(self, terms: MemoryTerms) -> FurtherMemory:
        """What the stage takes beside the trained model and its reference."""
        return FurtherMemory()

    def warnings(self, data: DataFacts) -> list[str]:
        """What is unusual about the stage's own keys, one sentence each."""
        return []

    def with_defaults(self) -> Self:
        """The recipe with every default that depends on another key filled in.

        `training.learning_rate` is set, and `merge` is off where there is nothing to merge.
        """
        changes: dict[str, Any] = {"adapter": spelled_out(self.adapter)}
        if self.training.learning_rate is None:
            rate = self.rates[rate_key(self.adapter)].default
            changes["training"] = self.training.model_copy(update={"learning_rate": rate})
        if not is_mergeable(self.adapter):
            changes["merge"] = False
        return self.model_copy(update=changes)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, ready for YAML or JSON."""
        return self.model_dump(mode="json")

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
        if rate_key(value) not in cls.rates:
            stage = info.data.get("stage", "")
            kinds = ", or ".join(kind for kind in ("lora", "full") if kind in cls.rates)
            raise ValueError(f"has kind = {value.kind}, which {stage} does not train: use {kinds}")
        check_adapter(value, quantization, adds_tokens=adds_tokens)
        return value


class SupervisedRecipe(Recipe):
    """What the recipes of stages that learn from rows have in common."""

    training: TrainingSpec = TrainingSpec()
    """The optimizer step and the loop around it."""

    @property
    def examples_per_step(self) -> int:
        """Rows that one step reads, over all processes together."""
        return self.training.batch_size


def refuse_continuing(adapter: Any) -> None:
    """Where the reference is the base with adapters off, the policy must start there.

    Args:
        adapter: of the recipe; None where it is wrong itself.

    Raises:
        ValueError: it would start elsewhere.
    """
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
