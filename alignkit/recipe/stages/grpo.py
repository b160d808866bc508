"""The recipe of group-relative policy optimization: no value model, but groups of responses."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from alignkit.recipe.adapters import continues, has_adapter
from alignkit.recipe.facts import DataFacts
from alignkit.recipe.rollouts import GuardSpec, RolloutSpec
from alignkit.recipe.section import PositiveInt, Section
from alignkit.recipe.stages.base import FurtherMemory, MemoryTerms, Rate, Rates
from alignkit.recipe.stages.rollouts import SAMPLING_TOKENS, RolloutRecipe

Kind = Literal["grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo", "reinforce_pp"]
Advantage = Literal["centered", "group_std", "batch_std", "leave_one_out"]
Loss = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]
Ratio = Literal["token", "sequence", "stopped"]
Bound = Annotated[float, Field(gt=0.0)] | None

GRPO: dict[str, Any] = {
    "advantage": "group_std",
    "loss": "token_mean",
    "clip": (0.2, 0.2),
    "ratio": "token",
    "kl_coef": 0.0,
    "kl": "loss",
    "overlong": "none",
    "resample": 0,
}
"""Defaults of `grpo`."""

KINDS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage": "centered", "loss": "constant"},
    "dapo": {"clip": (0.2, 0.28), "overlong": "penalize", "resample": 4},
    "rloo": {
        "advantage": "leave_one_out",
        "loss": "sequence_sum",
        "ratio": "sequence",
        "kl_coef": 0.05,
        "kl": "reward",
    },
    "gspo": {"loss": "sequence_mean", "clip": (3e-4, 4e-4), "ratio": "sequence"},
    "cispo": {"clip": (None, 5.0), "ratio": "stopped"},
    "reinforce_pp": {"advantage": "batch_std", "kl_coef": 0.01},
}
"""Kind -> where its defaults differ from those of `grpo`."""

PAPERS: dict[str, str] = {
    "grpo": "https://arxiv.org/abs/2402.03300",
    "dr_grpo": "https://arxiv.org/abs/2503.20783",
    "dapo": "https://arxiv.org/abs/2503.14476",
    "rloo": "https://arxiv.org/abs/2402.14740",
    "gspo": "https://arxiv.org/abs/2507.18071",
    "cispo": "https://arxiv.org/abs/2506.13585",
    "reinforce_pp": "https://arxiv.org/abs/2501.03262",
}


class GrpoSpec(Section):
    """Group-relative policy optimization and its relatives: a kind is a set of defaults.

    A key that is not set has the value of its kind; the resolved recipe shows all of them.
    """

    kind: Kind = "grpo"
    """`grpo`, `dr_grpo`, `dapo`, `rloo`, `gspo`, `cispo` or `reinforce_pp`."""
    advantage: Advantage | None = None
    """`centered` reward minus the group's mean; `group_std` divided by the group's standard
    deviation; `batch_std` by that of the whole step; `leave_one_out` minus the mean of the
    others."""
    loss: Loss | None = None
    """What the losses of tokens are averaged over: `token_mean` all tokens of the step;
    `sequence_mean` each response, then all; `sequence_sum` all responses, each the sum of its
    tokens; `constant` responses times max_new_tokens."""
    clip: tuple[Bound, Bound] | None = None
    """The ratio is clipped to 1 - low and 1 + high; null on a side does not clip. With
    `ratio: stopped`, high is the largest weight itself."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Where the advantage A is negative the loss is at most -dual_clip * A
    (https://arxiv.org/abs/1912.09729); null has no such bound."""
    ratio: Ratio | None = None
    """`token` each token's own; `sequence` one of the whole response, the mean of its tokens' log
    ratios, or their sum with `loss: sequence_sum`; `stopped` a weight without gradient."""
    kl_coef: Annotated[float, Field(ge=0.0)] | None = None
    """Price of KL to the model that training starts from; 0 never computes it."""
    kl: Literal["loss", "reward"] | None = None
    """`loss` adds k3 of each token; `reward` subtracts k1 of the response from what it earns."""
    overlong: Literal["none", "mask", "penalize"] | None = None
    """Responses that are cut off: `mask` learns nothing from them; `penalize` takes up to 1 from
    the reward of those that end in the last fifth of max_new_tokens or not at all."""
    resample: Annotated[int, Field(ge=0, le=64)] | None = None
    """How often a step asks further prompts in place of those whose responses all earn the same."""
    epochs: PositiveInt = 1
    """Passes over the responses of each step; 1 is on-policy."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass."""

    @field_validator("clip")
    @classmethod
    def _low_below_one(
        cls, value: tuple[float | None, float | None] | None
    ) -> tuple[float | None, float | None] | None:
        if value is not None and value[0] is not None and value[0] >= 1.0:
            raise ValueError(f"has low = {value[0]:g}: below 1 - low = 0 there is no ratio")
        return value

    def spelled_out(self) -> Self:
        """The section with every key of its kind."""
        defaults = {**GRPO, **KINDS[self.kind]}
        unset = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.model_copy(update=unset)


class GroupRolloutSpec(RolloutSpec):
    """How responses are sampled."""

    prompts_per_step: PositiveInt = 8
    """Prompts per step, over all processes together."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Responses per prompt: the size of a group."""
    max_new_tokens: PositiveInt = 256
    """Longest response in tokens, including its end-of-turn token."""
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] | None = None
    """Subtracted from the reward of a response that was cut off; null for no penalty."""


class GrpoRecipe(RolloutRecipe):
    """Reinforcement learning from rewards, each response measured against its group."""

    stage: Literal["grpo"]
    """The training stage."""
    objective: GrpoSpec = GrpoSpec()
    """The loss."""
    rollout: GroupRolloutSpec = Field(GroupRolloutSpec(), validate_default=True)
    """How responses are sampled."""
    guard: GuardSpec = GuardSpec()
    """What happens when the policy moves too far from the reference."""

    @field_validator("objective")
    @classmethod
    def _reference_is_the_start(cls, value: GrpoSpec, info: ValidationInfo) -> GrpoSpec:
        adapter = info.data.get("adapter")
        if adapter is not None and continues(adapter) and value.spelled_out().kl_coef:
            raise ValueError(
                "has kl_coef above 0 with `adapter.from`: the reference would be the bare base; "
                "set kl_coef: 0, or model.base to the run, which is merged first"
            )
        return value

    @field_validator("guard")
    @classmethod
    def _guard_can_act(cls, value: GuardSpec, info: ValidationInfo) -> GuardSpec:
        adapter, objective = info.data.get("adapter"), info.data.get("objective")
        if value.max_kl is not None and adapter is not None and continues(adapter):
            raise ValueError(
                "has max_kl with `adapter.from`: the distance would be that to the bare base; "
                "remove it, or set model.base to the run, which is merged first"
            )
        priced = objective is None or objective.spelled_out().kl_coef
        if value.action == "raise_kl" and not priced:
            raise ValueError(
                "has action = raise_kl, but objective.kl_coef is 0 and stays 0: set it above 0, or "
                "action: stop"
            )
        return value

    definition: ClassVar[str] = "alignkit.stages.grpo.stage:GRPO"
    rates: ClassVar[Rates] = {
        "lora": Rate(1.0e-5, 1e-6, 1e-3),
        "full": Rate(1.0e-6, 5e-8, 1e-5),
    }
    processor_tokens = 8192
    hints: ClassVar[dict[str, str]] = {
        **RolloutRecipe.hints,
        "rollout.samples_per_prompt": "the size of a group, at least 2; 8 to 16 is usual",
        "objective.clip": "as in [0.2, 0.28]; null on a side does not clip",
        "objective.kl_coef": "0 is usual; 0.001 to 0.05 holds the policy near its start",
        "objective.resample": "0 asks no further prompts; dapo's 4 is usual",
        "objective.epochs": "1 is usual: on-policy",
        "objective.advantage": "group_std is GRPO's, centered that of Dr. GRPO",
    }
    counterparts: ClassVar[dict[str, str]] = {
        **RolloutRecipe.counterparts,
        "value": "grpo has no value model; remove the key",
        **dict.fromkeys(
            ("num_generations", "rollout.num_generations", "rollout.group_size"),
            "did you mean rollout.samples_per_prompt?",
        ),
        "rollout.max_completion_length": "did you mean rollout.max_new_tokens?",
        "objective.loss_type": "did you mean objective.loss, or objective.kind?",
        "objective.scale_rewards": "did you mean objective.advantage?",
        "objective.epsilon": "did you mean objective.clip, as in [0.2, 0.28]?",
        "objective.num_iterations": "did you mean objective.epochs?",
    }

    @property
    def trained_reads(self) -> int:
        """Every pass reads them with the policy."""
        return self.objective.epochs

    @property
    def measures_kl(self) -> bool:
        """Whether anything asks for the distance to the reference."""
        return bool(self.objective.spelled_out().kl_coef) or self.guard.max_kl is not None

    @property
    def peak_rates(self) -> dict[str, float]:
        """Peak learning rate of the policy."""
        return {"policy": super().peak_rates["model"]}

    def with_defaults(self) -> Self:
        """The recipe with its defaults, those of the objective's kind among them."""
        filled = super().with_defaults()
        return filled.model_copy(update={"objective": filled.objective.spelled_out()})

    def further_memory(self, terms: MemoryTerms) -> FurtherMemory:
        """Memory of reference and reward models, and of sampled keys and values."""
        model = terms.model
        models = terms.reward_models * model.parameters * terms.wide
        if not has_adapter(self.adapter) and self.measures_kl:
            models += model.parameters * 4  # the reference, stored like the policy
        sampling = SAMPLING_TOKENS * 2 * model.layers * model.key_value_width * terms.wide
        return FurtherMemory(models, 0, sampling)

    def warnings(self, data: DataFacts) -> list[str]:
        """Many updates of one batch, and groups that are small."""
        warnings, objective = [], self.objective
        updates = objective.epochs * objective.minibatches
        if updates > 4:
            warnings.append(
                f"{updates} updates on each batch of responses: group-relative training is usually "
                "on-policy, with 1"
            )
        if self.rollout.samples_per_prompt < 4:
            warnings.append(
                f"groups of {self.rollout.samples_per_prompt}: their mean says little; 8 is usual"
            )
        return warnings
