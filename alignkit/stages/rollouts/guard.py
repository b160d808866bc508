"""What happens when the policy has moved too far from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignkit.errors import TrainingError
from alignkit.recipe.rollouts import GuardSpec

GUARD_FACTOR = 1.5
"""Factor by which the guard raises the price of KL."""


@dataclass(frozen=True)
class Guard:
    """Acts when the policy has moved too far.

    Args:
        spec: limit and action.
    """

    spec: GuardSpec

    def verdict(self, kl: Sequence[float]) -> TrainingError | None:
        """The error that ends the run; None lets it go on.

        Args:
            kl: KL of a response in the last step, if there was one.
        """
        if self.spec.action != "stop" or not kl or not self.exceeded(kl[-1]):
            return None
        return TrainingError(
            f"the guard stopped the run: the KL of a response is {kl[-1]:.3g} nats, above "
            f"guard.max_kl = {self.spec.max_kl:g}; a checkpoint was saved",
            hint="start anew with a higher objective.kl_coef or a lower learning rate",
        )

    def exceeded(self, kl: float) -> bool:
        """Whether a KL is above the limit."""
        return self.spec.max_kl is not None and kl > self.spec.max_kl
