"""The `objective` section of a recipe: each kind has its own fields and only those."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from alignkit.recipe.section import Positive, Section

Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]


class CrossEntropySpec(Section):
    """Negative log-likelihood, averaged over all trained tokens of the optimizer step."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    """`cross_entropy`: the objective of supervised fine-tuning."""


class BradleyTerrySpec(Section):
    """-log σ(r_chosen - r_rejected - margin), plus centring."""

    kind: Literal["bradley_terry"] = "bradley_terry"
    """`bradley_terry`: the objective of reward models."""
    center: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of (r_chosen + r_rejected)², which keeps the mean reward near 0; 0 turns it off."""


class CustomSpec(Section):
    """Your own loss: a pure function in a Python file that the recipe names."""

    kind: Literal["custom"]
    """`custom`: your own function, checked on a few made-up items before any row is read."""
    file: Annotated[str, Field(min_length=1)]
    """A Python file. It is executed; its hash is kept in run.json."""
    name: str = "loss"
    """The function in the file."""
    parameters: dict[str, float] = Field(default_factory=dict)
    """Numbers passed to it as keyword arguments, as in {beta: 0.1}."""

    @field_validator("file")
    @classmethod
    def _python(cls, value: str) -> str:
        if not value.endswith(".py"):
            raise ValueError("must be a Python file, as in my_loss.py")
        return value


class PairSpec(Section):
    """What the members of the DPO family have in common."""

    kind: str
    """The member of the family."""
    beta: Positive = 0.1
    """As for `dpo`."""

    needs_reference: ClassVar[bool] = True
    """Whether the objective uses a reference model."""

    @property
    def scale(self) -> float:
        """Factor of log-ratios or log-probs in implicit rewards."""
        return self.beta


class CustomPairSpec(CustomSpec):
    """Your own loss over pairs."""

    reference: bool = True
    """Whether the loss uses a reference model."""
    scale: Positive = 1.0
    """Factor of log-ratios or log-probs in implicit rewards; for metrics only."""

    @property
    def needs_reference(self) -> bool:
        """Whether the function uses a reference model."""
        return self.reference


class DpoSpec(PairSpec):
    """Direct preference optimization (https://arxiv.org/abs/2305.18290)."""

    kind: Literal["dpo"]
    """`dpo`: -log σ(β · difference of the log-ratios)."""
    beta: Positive = 0.1
    """Pull towards the reference; smaller lets the policy move further away."""


class IpoSpec(Section):
    """Identity preference optimization (https://arxiv.org/abs/2310.12036)."""

    kind: Literal["ipo"]
    """`ipo`: squared distance of the log-ratio difference from 1 / (2 τ)."""
    tau: Positive = 0.1
    """Regularisation: the target margin is 1 / (2 τ) nats."""
    per_token: bool = False
    """Average the log-ratios over tokens, as TRL does; the paper sums them."""

    needs_reference: ClassVar[bool] = True
    """IPO uses a reference model."""

    @property
    def scale(self) -> float:
        """Factor of log-ratios in implicit rewards: τ."""
        return self.tau


class CdpoSpec(PairSpec):
    """Conservative DPO (https://ericmitchell.ai/cdpo.pdf): labels may be wrong."""

    kind: Literal["cdpo"]
    """`cdpo`: DPO with smoothed labels."""
    label_smoothing: Smoothing = 0.1
    """Share of pairs whose labels are assumed to be swapped."""


class RobustSpec(PairSpec):
    """Robust DPO (https://arxiv.org/abs/2403.00409): unbiased under swapped labels."""

    kind: Literal["robust"]
    """`robust`: DPO corrected for a known rate of swapped labels."""
    label_smoothing: Smoothing = 0.1
    """Rate of swapped labels."""


class HingeSpec(PairSpec):
    """Hinge on the log-ratio difference (https://arxiv.org/abs/2309.06657)."""

    kind: Literal["hinge"]
    """`hinge`: max(0, 1 - β · difference)."""
    beta: Positive = 0.1
    """Inverse of the margin in nats."""


class SimpoSpec(PairSpec):
    """SimPO (https://arxiv.org/abs/2405.14734): length-averaged, without a reference."""

    kind: Literal["simpo"]
    """`simpo`: -log σ(β · difference of mean log-probs - γ)."""
    beta: Positive = 2.0
    """Scale of the mean log-probs."""
    gamma: Annotated[float, Field(ge=0.0)] = 1.0
    """Target margin; about half of beta is usual."""

    needs_reference = False


class OrpoSpec(PairSpec):
    """ORPO (https://arxiv.org/abs/2403.07691): likelihood and odds ratio, without a reference."""

    kind: Literal["orpo"]
    """`orpo`: negative log-likelihood of the chosen completion plus β · odds ratio loss."""
    beta: Positive = 0.1
    """Weight of the odds ratio; λ in the paper."""

    needs_reference = False


class CpoSpec(PairSpec):
    """CPO (https://arxiv.org/abs/2401.08417): DPO without a reference, plus likelihood."""

    kind: Literal["cpo"]
    """`cpo`: -log σ(β · difference of log-probs) plus the NLL of the chosen completion."""
    beta: Positive = 0.1
    """Scale of the log-probs."""
    nll_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the chosen completion's mean negative log-likelihood."""

    needs_reference = False


class ApoZeroSpec(PairSpec):
    """APO-zero (https://arxiv.org/abs/2408.06266), for completions better than the model's own."""

    kind: Literal["apo_zero"]
    """`apo_zero`: raises chosen completions, lowers rejected ones."""
    beta: Positive = 0.1
    """As for `dpo`."""


class ApoDownSpec(PairSpec):
    """APO-down (https://arxiv.org/abs/2408.06266), for completions worse than the model's own."""

    kind: Literal["apo_down"]
    """`apo_down`: lowers both completions, the rejected one more."""
    beta: Positive = 0.1
    """As for `dpo`."""


class SppoSpec(PairSpec):
    """Self-play preference optimization (https://arxiv.org/abs/2405.00675), hard wins."""

    kind: Literal["sppo"]
    """`sppo`: squared distance of the log-ratios from ±1 / (2 β)."""
    beta: Positive = 0.001
    """Inverse of the paper's η = 1000; the target ratios are ±1 / (2 β) nats."""


class NcaSpec(PairSpec):
    """Noise contrastive alignment (https://arxiv.org/abs/2402.05369)."""

    kind: Literal["nca"]
    """`nca`: like DPO, but keeps the chosen completion from becoming less likely."""
    beta: Positive = 0.1
    """As for `dpo`."""


TokenSpec = Annotated[CrossEntropySpec | CustomSpec, Field(discriminator="kind")]
RewardSpec = Annotated[BradleyTerrySpec | CustomSpec, Field(discriminator="kind")]
PreferenceSpec = Annotated[
    DpoSpec
    | IpoSpec
    | CdpoSpec
    | RobustSpec
    | HingeSpec
    | SimpoSpec
    | OrpoSpec
    | CpoSpec
    | ApoZeroSpec
    | ApoDownSpec
    | SppoSpec
    | NcaSpec
    | CustomPairSpec,
    Field(discriminator="kind"),
]


class KtoSpec(Section):
    """Kahneman-Tversky optimization (https://arxiv.org/abs/2402.01306)."""

    kind: Literal["kto"] = "kto"
    """`kto` is the only objective for labelled completions."""
    beta: Positive = 0.1
    """Pull towards the reference; smaller lets the policy move further away."""
    desirable_weight: Positive = 1.0
    """Weight of desirable completions. The paper keeps the ratio of weight × number of desirable to
    that of undesirable completions between 1 and 4/3."""
    undesirable_weight: Positive = 1.0
    """Weight of undesirable completions."""

    @property
    def scale(self) -> float:
        """Factor of log-ratios in implicit rewards."""
        return self.beta
