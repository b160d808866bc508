"""The base class of the recipes of stages that sample responses."""

from __future__ import annotations

from typing import ClassVar

from alignkit.recipe.rewards import ModelReward, RewardSource, RewardSources
from alignkit.recipe.rollouts import ROLLOUT_HINTS, RolloutSpec
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.training import LoopSpec


class RolloutRecipe(Recipe):
    """Reinforcement learning from rewards."""

    reward: RewardSources
    """Source of rewards: a reward model, a Python function, a server, a rule, or a list of these
    whose weighted scores are added up."""
    rollout: RolloutSpec = RolloutSpec()
    """How responses are sampled."""
    training: LoopSpec = LoopSpec(save_every=10)
    """The optimizer and the loop around it; a step is one batch of prompts."""

    row_kind = "prompts"
    examples_key = "rollout.prompts_per_step"
    repeats_rows = True
    held_out_shows = "the reward before and after"
    counterparts: ClassVar[dict[str, str]] = {
        "batch_size": "did you mean rollout.prompts_per_step?",
        "training.batch_size": "did you mean rollout.prompts_per_step?",
        "beta": "did you mean objective.kl_coef?",
        "objective.beta": "did you mean objective.kl_coef?",
        "reference": "the reference of ppo is the model that training starts from; remove the key",
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
    def scored_reads(self) -> int:
        """How often they are read without gradients: by the reference and reward models."""
        return 1 + sum(isinstance(source, ModelReward) for source in self.reward)

    @property
    def reward_sources(self) -> tuple[RewardSource, ...]:
        """Sources of the responses' rewards."""
        return self.reward
