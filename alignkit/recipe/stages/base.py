"""The base classes of the recipes of all stages.

Below the keys are the traits of a stage: all that planning, reading, checking and running need to
know about it. None of them knows a stage by name.
"""

from __future__ import annotations

import re
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
from alignkit.recipe.section import Folder, Section
from alignkit.recipe.training import LoopSpec, TrainingSpec


class ReferenceSpec(Section):
    """The reference model of the policy: the model that training starts from."""

    kind: Literal["auto", "adapter_off", "frozen_copy", "cached"] = "auto"
    """`adapter_off` disables the adapter for one more pass per step; `cached` scores every row once
    before training and keeps the log-probs on disk for later runs; `frozen_copy` holds a second
    model. `auto` chooses, and the plan says which and why; in bfloat16, cached values are rounded
    differently from the policy's."""


@dataclass(frozen=True)
class Rate:
    """Peak learning rates of one stage with one kind of adapter.

    Args:
        default: used if the recipe sets none.
        low: lowest usual rate.
        high: highest usual rate.
    """

    default: float
    low: float
    high: float

    def under(self, optimizer: str) -> Rate:
        """The rates with another optimizer than AdamW; none is above a half."""
        factors = _ON_ADAMW.get(optimizer, (1.0, 1.0, 1.0))
        rates = zip((self.default, self.low, self.high), factors, strict=True)
        return Rate(*(min(0.5, float(f"{rate * factor:.3g}")) for rate, factor in rates))


_LION, _ADAFACTOR = (0.2, 0.1, 1 / 3), (50.0, 10.0, 100.0)
_ON_ADAMW = {"lion": _LION, "lion_8bit": _LION, "adafactor": _ADAFACTOR}
"""Optimizer -> default, lowest and highest usual rate as multiples of AdamW's. Lion steps by signs,
and its paper takes a third to a tenth. A step of Adafactor is the rate times the root of the mean
square of the weight, about 0.02 in most layers of language models, but at least 0.001."""


PAIRS_BETTER = {
    "loss": "lower",
    "rewards/accuracies": "higher",
    "rewards/margins": "higher",
    "calibration_error": "lower",
}
"""Held-out metrics of pairs -> which is better."""

Rates = dict[str, Rate]
"""Kind of adapter -> its rates; a prefix with projection has the kind `projection`."""


@dataclass(frozen=True)
class FurtherMemory:
    """Bytes that a stage needs in addition to the trained model.

    Args:
        models: weights of additional models.
        training_state: gradients and moments of additional trained weights.
        workspace: temporary memory of a pass.
    """

    models: int = 0
    training_state: int = 0
    workspace: int = 0


@dataclass(frozen=True)
class MemoryTerms:
    """Inputs of `Recipe.further_memory`.

    Args:
        model: sizes of the model.
        wide: bytes per number in compute precision.
        weights: bytes of the trained model's weights.
        per_weight: bytes of a trained weight's gradient and moments.
        reward_models: number of separately loaded reward models.
    """

    model: ModelFacts
    wide: int
    weights: int
    per_weight: float
    reward_models: int


def metric_family(metric: str) -> str:
    """A held-out metric as `Recipe.better` names it: pass@1 and task/pass@8 are pass@k."""
    return re.sub(r"^(task/)?pass@\d+$", "pass@k", metric)


class Recipe(Section):
    """Base of the recipes of all stages."""

    stage: str
    """The training stage."""
    output: Folder
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
    """Write `merged/`, a checkpoint that plain transformers loads, and verify it. Not possible with
    a prefix."""

    definition: ClassVar[str]
    """`module:name` of the stage's definition, imported only to run it."""
    row_kind: ClassVar[Literal["answers", "pairs", "labelled", "prompts"]] = "answers"
    """Kind of the data rows."""
    rates: ClassVar[Rates]
    """Learning rates for each kind of adapter that the stage supports."""
    scalar_head: ClassVar[bool] = False
    """Whether the model outputs one number per completion instead of text."""
    shares_prompts: ClassVar[bool] = False
    """Whether rows have several branches with one prompt."""
    uses_margins: ClassVar[bool] = True
    """Whether the stage uses the margin of a pair; if not, rows that have one are reported."""
    examples_key: ClassVar[str] = "training.batch_size"
    """Key that sets the number of rows per step."""
    repeats_rows: ClassVar[bool] = False
    """Whether many passes over the rows are usual."""
    held_out_shows: ClassVar[str] = "overfitting"
    """What held-out rows would reveal."""
    processor_tokens: ClassVar[int] = 4096
    """Largest token budget on a CPU. Beyond it, DPO was no faster and needed 3 GB more."""
    hints: ClassVar[dict[str, str]] = {}
    """Key -> hint for a value that breaks a rule; takes precedence over the hints of all stages."""
    better: ClassVar[dict[str, str]] = {"loss": "lower"}
    """Held-out metric that `training.keep_best` may name -> whether lower or higher is better. The
    first is what `training.early_stop` watches if `keep_best` names none."""
    counterparts: ClassVar[dict[str, str]] = {}
    """Key that only other stages have -> hint that names its equivalent here."""

    @property
    def examples_per_step(self) -> int:
        """Rows per step, over all processes together."""
        raise NotImplementedError

    @property
    def needs_reference(self) -> bool:
        """Whether the objective uses a reference model."""
        return False

    @property
    def reward_sources(self) -> tuple[RewardSource, ...]:
        """Sources of the responses' rewards; empty for a stage that samples none."""
        return ()

    @property
    def task_source(self) -> RewardSource | None:
        """What verifies held-out responses, apart from their reward."""
        return None

    @property
    def usual_rate(self) -> Rate:
        """Usual learning rates of the kind of adapter and the optimizer."""
        return self.rates[rate_key(self.adapter)].under(self.training.optimizer)

    @property
    def peak_rates(self) -> dict[str, float]:
        """Trained part -> its peak learning rate; the first is the model's own."""
        assert self.training.learning_rate is not None  # with_defaults
        return {"model": self.training.learning_rate}

    def further_memory(self, terms: MemoryTerms) -> FurtherMemory:
        """Memory that the stage needs in addition to the trained model and its reference."""
        return FurtherMemory()

    def warnings(self, data: DataFacts) -> list[str]:
        """Unusual values of the stage's own keys, one sentence each."""
        return []

    def with_defaults(self) -> Self:
        """The recipe with every default filled in that depends on another key.

        Sets `training.learning_rate`, and turns `merge` off if the adapter cannot be merged.
        """
        changes: dict[str, Any] = {"adapter": spelled_out(self.adapter)}
        if self.training.learning_rate is None:
            rate = {"learning_rate": self.usual_rate.default}
            changes["training"] = self.training.model_copy(update=rate)
        if not is_mergeable(self.adapter):
            changes["merge"] = False
        return self.model_copy(update=changes)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, ready for YAML or JSON."""
        return self.model_dump(mode="json")

    @field_validator("training")
    @classmethod
    def _knows_the_best(cls, value: LoopSpec, info: ValidationInfo) -> LoopSpec:
        name, data = value.keep_best, info.data.get("data")
        watched = "keep_best" if name is not None else "early_stop"
        if name is not None and metric_family(name) not in cls.better:
            raise ValueError(
                f"has keep_best = {name}, no held-out metric of this stage that has a best: use "
                + " or ".join(cls.better)
            )
        if getattr(value, watched) and data and not (data.eval or data.eval_fraction):
            raise ValueError(
                f"has {watched}, which needs held-out rows: set data.eval or data.eval_fraction"
            )
        return value

    @field_validator("merge")
    @classmethod
    def _no_merge_of_a_prefix(cls, value: bool, info: ValidationInfo) -> bool:
        adapter = info.data.get("adapter")
        if value and adapter is not None and not is_mergeable(adapter):
            raise ValueError(
                f"must be false with adapter.kind = {adapter.kind}, which cannot be merged"
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
            kinds = " or ".join(kind for kind in ("lora", "full") if kind in cls.rates)
            raise ValueError(f"has kind = {value.kind}, which {stage} does not train: use {kinds}")
        check_adapter(value, quantization, adds_tokens=adds_tokens)
        return value


class SupervisedRecipe(Recipe):
    """Base of the recipes of stages that learn from rows."""

    training: TrainingSpec = TrainingSpec()
    """The optimizer step and the loop around it."""

    @property
    def examples_per_step(self) -> int:
        """Rows per step, over all processes together."""
        return self.training.batch_size


def refuse_continuing(adapter: Any) -> None:
    """Refuse an adapter with which training would not start at the reference, the bare base.

    Args:
        adapter: the recipe's; None if it is invalid.

    Raises:
        ValueError: training would start elsewhere.
    """
    if adapter is not None and continues(adapter):
        raise ValueError(
            "must not use `adapter.from`: the reference would be the bare base; "
            + (
                "set model.base to the run instead, which is merged first"
                if is_mergeable(adapter)
                else "a prefix cannot be merged, so train with kind: lora"
            )
        )
    if isinstance(adapter, LoraSpec) and adapter.init == "loftq":
        raise ValueError("must not use adapter.init = loftq: it does not start at the reference")
