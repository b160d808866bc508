"""What PPO adds to a recipe: rollouts, the value model, the guard and the objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignkit.recipe.rewards import (
    ExactReward,
    FormatReward,
    FunctionReward,
    JsonReward,
    LengthReward,
    ModelReward,
    NumericReward,
    RegexReward,
    RewardSource,
    RewardSources,
    RuleReward,
    SentimentReward,
    UrlReward,
    reward_name,
)
from alignkit.recipe.section import Positive, PositiveInt, Section

__all__ = [
    "ExactReward",
    "FormatReward",
    "FunctionReward",
    "GuardSpec",
    "JsonReward",
    "LengthReward",
    "ModelReward",
    "NumericReward",
    "PpoSpec",
    "RegexReward",
    "RewardSource",
    "RewardSources",
    "RolloutSpec",
    "RuleReward",
    "SentimentReward",
    "UrlReward",
    "ValueSpec",
    "reward_name",
]


class PpoSpec(Section):
    """Proximal policy optimization (https://arxiv.org/abs/1707.06347) with a KL penalty."""

    kind: Literal["ppo"] = "ppo"
    """`ppo` is the only objective of this stage."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio of new to old probability counts only within 1 ± clip."""
    value_clip: Annotated[float, Field(gt=0.0)] | None = 0.2
    """A new value counts only within this distance of the old one; null does not clip."""
    value_weight: Positive = 0.1
    """Weight of the value loss beside the policy loss."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.05
    """Price of one nat of k1 = log π - log π_ref at a token, taken from its reward."""
    kl_target: Positive | None = None
    """KL of a whole response, in nats, that an adaptive coefficient aims at
    (https://arxiv.org/abs/1909.08593); null keeps kl_coef fixed."""
    kl_horizon: PositiveInt = 10000
    """Responses over which the adaptive coefficient follows; smaller is faster."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount of a reward one token later."""
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    """Mix of one-step (0) and whole-response (1) advantages (https://arxiv.org/abs/1506.02438)."""
    epochs: PositiveInt = 4
    """Passes over the responses of one step."""
    minibatches: PositiveInt = 1
    """Optimizer steps of one pass."""


class RolloutSpec(Section):
    """How responses are sampled."""

    prompts_per_step: PositiveInt = 32
    """Prompts of one step, over all processes together."""
    samples_per_prompt: PositiveInt = 1
    """Responses to each of them."""
    max_new_tokens: PositiveInt = 64
    """Tokens of a response at most, its end-of-turn token included."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in scoring alike."""
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] | None = 1.0
    """Taken from the reward of a response that was cut off; null takes nothing."""
    samples_every: PositiveInt = 10
    """Steps between samples of responses with their rewards in samples.jsonl."""


class ValueSpec(Section):
    """The value model, which predicts the reward still to come at each token."""

    kind: Literal["auto", "adapter", "head"] = "auto"
    """`adapter` has low-rank weights of its own over the same base; `head` is a linear layer on the
    policy's hidden states, which costs half the training passes and some quality. With all
    weights trained the value model is a second model, or such a head. `auto` is `adapter`."""
    init: Literal["auto", "reward", "fresh"] = "auto"
    """`reward` starts from the reward model's weights; `auto` does where there is one."""
    learning_rate: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Peak learning rate. Unset: three times that of the policy."""


class GuardSpec(Section):
    """What happens when the policy moves too far from the reference."""

    max_kl: Positive | None = None
    """KL of a whole response, in nats, from which the guard acts; null only reports."""
    action: Literal["stop", "raise_kl"] = "stop"
    """`stop` saves a checkpoint and ends the run; `raise_kl` multiplies kl_coef by 1.5."""
