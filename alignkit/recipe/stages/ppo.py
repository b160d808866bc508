"""The recipe of proximal policy optimization."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator

from alignkit.recipe.adapters import AdapterSpec, has_adapter
from alignkit.recipe.facts import DataFacts
from alignkit.recipe.rollouts import GuardSpec
from alignkit.recipe.section import Positive, PositiveInt, Section
from alignkit.recipe.stages.base import (
    FurtherMemory,
    MemoryTerms,
    Rate,
    Rates,
    refuse_continuing,
)
from alignkit.recipe.stages.rollouts import SAMPLING_TOKENS, RolloutRecipe, ValueSpec


class PpoSpec(Section):
    """Proximal policy optimization (https://arxiv.org/abs/1707.06347) with a KL penalty."""

    kind: Literal["ppo"] = "ppo"
    """`ppo` is the only objective of this stage."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio of new to old probability is clipped to 1 ± clip."""
    value_clip: Annotated[float, Field(gt=0.0)] | None = 0.2
    """A new value is clipped to this distance from the old one; null does not clip."""
    value_weight: Positive = 0.1
    """Weight of the value loss relative to the policy loss."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.05
    """Penalty per nat of k1 = log π - log π_ref at a token, subtracted from its reward."""
    kl_target: Positive | None = None
    """Target KL per response, in nats, for an adaptive coefficient
    (https://arxiv.org/abs/1909.08593); null keeps kl_coef fixed."""
    kl_horizon: PositiveInt = 10000
    """Responses over which the adaptive coefficient changes; smaller is faster."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount per token."""
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    """Mix of one-step (0) and whole-response (1) advantages (https://arxiv.org/abs/1506.02438)."""
    epochs: PositiveInt = 4
    """Passes over the responses of each step."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass."""


class PpoRecipe(RolloutRecipe):
    """Reinforcement learning from rewards: policy, reference, reward and value over one base."""

    stage: Literal["ppo"]
    """The training stage."""
    objective: PpoSpec = PpoSpec()
    """The loss."""
    value: ValueSpec = ValueSpec()
    """The value model."""
    guard: GuardSpec = GuardSpec()
    """What happens when the policy moves too far from the reference."""

    @field_validator("adapter")
    @classmethod
    def _starts_at_the_reference(cls, value: AdapterSpec) -> AdapterSpec:
        refuse_continuing(value)
        return value

    @property
    def value_model(self) -> ValueSpec:
        """The recipe's."""
        return self.value

    @property
    def trained_reads(self) -> int:
        """Every pass reads them with the policy, and with the value model if it is another one."""
        return self.objective.epochs * (1 if self.value.kind == "head" else 2)

    definition: ClassVar[str] = "alignkit.stages.ppo.stage:PPO"
    rates: ClassVar[Rates] = {
        "lora": Rate(2.0e-5, 1e-6, 5e-4),
        "full": Rate(1.0e-6, 5e-8, 1e-5),
    }
    processor_tokens = 8192
    """Each token is read about twelve times; fewer and larger passes made that 8% faster, and the
    policy reads each token once less if a step is one pass."""
    hints: ClassVar[dict[str, str]] = {
        **RolloutRecipe.hints,
        "objective.clip": "0.2 is the value of the PPO paper",
        "objective.kl_coef": "0.01 to 0.1 is usual; larger holds the policy closer to the "
        "reference",
        "objective.kl_target": "3 to 10 nats a response is usual; null keeps kl_coef fixed",
        "objective.gae_lambda": "0.95 is usual; 1 uses the reward of the whole response",
        "objective.minibatches": "1 to 4 is usual",
        "value": "as in {kind: adapter, init: reward}",
        "value.learning_rate": "unset, it is three times the policy's",
    }

    @property
    def peak_rates(self) -> dict[str, float]:
        """Peak learning rates of policy and value model."""
        assert self.value.learning_rate is not None  # with_defaults
        return {"policy": super().peak_rates["model"], "value": self.value.learning_rate}

    def with_defaults(self) -> Self:
        """The recipe with its defaults; the value model learns three times as fast."""
        filled = super().with_defaults()
        if filled.value.learning_rate is not None:
            return filled
        assert filled.training.learning_rate is not None
        rate = 3.0 * filled.training.learning_rate
        return filled.model_copy(
            update={"value": filled.value.model_copy(update={"learning_rate": rate})}
        )

    def further_memory(self, terms: MemoryTerms) -> FurtherMemory:
        """Memory of reference, value model and reward models, and of sampled keys and values."""
        model, own_value = terms.model, self.value.kind != "head"
        models = terms.reward_models * model.parameters * terms.wide
        state = 0
        if has_adapter(self.adapter):
            # The value adapter is trained as well; a reward adapter over the same base is not.
            models += model.trainable * 4
            state = round(model.trainable * (4 + terms.per_weight)) if own_value else 0
        else:
            models += model.parameters * 4  # the reference, stored like the policy
            state = round(terms.weights + model.parameters * terms.per_weight) if own_value else 0
        sampling = SAMPLING_TOKENS * 2 * model.layers * model.key_value_width * terms.wide
        return FurtherMemory(models, state, sampling)

    def warnings(self, data: DataFacts) -> list[str]:
        """Too many updates per batch, and a policy without a KL penalty."""
        warnings, objective = [], self.objective
        updates = objective.epochs * objective.minibatches
        if updates > 16:
            warnings.append(
                f"{updates} updates on each batch of responses: beyond 16 the policy usually "
                "leaves the clipping range"
            )
        if objective.kl_coef == 0 and objective.kl_target is not None:
            warnings.append("objective.kl_target does nothing while kl_coef starts at 0")
        elif objective.kl_coef == 0:
            warnings.append("objective.kl_coef = 0: nothing keeps the policy near the reference")
        return warnings
