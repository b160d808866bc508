"""The base class of the recipes of stages that sample responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from alignkit.recipe.adapters import AdapterSpec, LoraSpec
from alignkit.recipe.model import ModelSpec
from alignkit.recipe.rewards import ModelReward, RewardSource, RewardSources
from alignkit.recipe.rollouts import ROLLOUT_HINTS, RolloutSpec
from alignkit.recipe.section import Section
from alignkit.recipe.stages.base import Recipe, metric_family
from alignkit.recipe.training import LoopSpec

SAMPLING_TOKENS = 16384
"""Tokens sampled at once: prompts plus space for responses."""


class ValueSpec(Section):
    """The value model, which predicts the remaining reward at each token."""

    kind: Literal["auto", "adapter", "head"] = "auto"
    """`adapter` is a separate LoRA adapter over the same base; `head` is a linear layer on the
    policy's hidden states, which needs half the training passes but costs some quality. With full
    weights the value model is a second model, or such a head. `auto` is `adapter`."""
    init: Literal["auto", "reward", "fresh"] = "auto"
    """`reward` starts from the reward model's weights; so does `auto` if there is one."""
    learning_rate: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Peak learning rate. Unset: three times the policy's."""


class RolloutRecipe(Recipe):
    """Reinforcement learning from rewards."""

    reward: RewardSources
    """Source of rewards: a reward model, a Python function, a server, a rule, or a list of these
    whose weighted scores are added up."""
    task: RewardSource | None = Field(None, validate_default=True)
    """What verifies the responses to held-out prompts, apart from their reward: a source as in
    `reward`, but no model. A response is right from a score of 1; pass@1 and pass@k are measured
    before step 1, every eval_every and at the end."""
    rollout: RolloutSpec = Field(RolloutSpec(), validate_default=True)
    """How responses are sampled."""
    training: LoopSpec = LoopSpec(save_every=10)
    """The optimizer and the loop around it; a step is one batch of prompts."""

    @field_validator("model")
    @classmethod
    def _no_new_tokens(cls, value: ModelSpec, info: ValidationInfo) -> ModelSpec:
        if value.add_tokens:
            stage = info.data.get("stage", "")
            raise ValueError(f"has add_tokens, which {stage} cannot train: add them in sft first")
        return value

    @field_validator("adapter")
    @classmethod
    def _one_policy(cls, value: AdapterSpec, info: ValidationInfo) -> AdapterSpec:
        stage = info.data.get("stage", "")
        if isinstance(value, LoraSpec) and value.init not in ("default", "eva"):
            raise ValueError(
                f"has init = {value.init}, not supported by {stage}: use default or eva"
            )
        if isinstance(value, LoraSpec) and value.modules_to_save:
            raise ValueError(f"has modules_to_save, which {stage} does not train: use kind: full")
        if isinstance(value, LoraSpec) and value.dropout > 0:
            raise ValueError(
                f"has dropout = {value.dropout:g}: the policy that samples and the policy that is "
                f"trained would differ; {stage} needs 0"
            )
        return value

    @field_validator("reward")
    @classmethod
    def _names_differ(cls, value: RewardSources) -> RewardSources:
        names = [source.name for source in value if source.name is not None]
        for name in names:
            if names.count(name) > 1 or name == "task":
                what = ", which is that of the task" if name == "task" else " twice"
                raise ValueError(f"has the name {name}{what}")
        return value

    @field_validator("task")
    @classmethod
    def _verifies(cls, value: RewardSource | None, info: ValidationInfo) -> RewardSource | None:
        if isinstance(value, ModelReward):
            raise ValueError(
                "names a reward model, which verifies nothing: name a rule or a function"
            )
        if value is not None and (value.weight != 1.0 or value.name is not None):
            raise ValueError("has a weight or a name, which mean nothing here: remove them")
        data, training = info.data.get("data"), info.data.get("training")
        best = None if training is None else training.keep_best
        if value is None and best is not None and metric_family(best) == "pass@k":
            raise ValueError(f"training.keep_best = {best} needs a task to measure it: set task")
        if value is not None and data is not None and not (data.eval or data.eval_fraction):
            raise ValueError("needs held-out prompts: set data.eval or data.eval_fraction")
        return value

    @field_validator("rollout")
    @classmethod
    def _enough_prompts(cls, value: RolloutSpec, info: ValidationInfo) -> RolloutSpec:
        objective: Any = info.data.get("objective")
        if objective is not None and objective.minibatches > value.prompts_per_step:
            raise ValueError(
                f"has prompts_per_step = {value.prompts_per_step}, fewer than "
                f"objective.minibatches = {objective.minibatches}"
            )
        return value

    row_kind = "prompts"
    examples_key = "rollout.prompts_per_step"
    repeats_rows = True
    held_out_shows = "the reward before and after"
    better: ClassVar[dict[str, str]] = {"reward": "higher", "pass@k": "higher"}
    counterparts: ClassVar[dict[str, str]] = {
        "batch_size": "did you mean rollout.prompts_per_step?",
        "training.batch_size": "did you mean rollout.prompts_per_step?",
        "beta": "did you mean objective.kl_coef?",
        "objective.beta": "did you mean objective.kl_coef?",
        **dict.fromkeys(("eval_task", "verifier"), "did you mean task?"),
        "reference": "the reference is the model that training starts from; remove the key",
    }
    hints: ClassVar[dict[str, str]] = ROLLOUT_HINTS

    @property
    def examples_per_step(self) -> int:
        """Prompts per step, over all processes together."""
        return self.rollout.prompts_per_step

    @property
    def trained_reads(self) -> int:
        """How often a step's tokens are read forward and backward."""
        raise NotImplementedError

    @property
    def value_model(self) -> ValueSpec | None:
        """The value model; None for a stage without one."""
        return None

    @property
    def measures_kl(self) -> bool:
        """Whether responses are scored under the reference too."""
        return True

    @property
    def scored_reads(self) -> int:
        """How often they are read without gradients: by the reference and reward models."""
        models = sum(isinstance(source, ModelReward) for source in self.reward)
        return self.measures_kl + models

    @property
    def reward_sources(self) -> tuple[RewardSource, ...]:
        """Sources of the responses' rewards."""
        return self.reward

    @property
    def task_source(self) -> RewardSource | None:
        """What verifies held-out responses."""
        return self.task
