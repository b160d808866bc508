"""The factor on losses in float16, whose smallest number is 6e-8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

FIRST, LARGEST = 2.0**12, 2.0**24
"""The factor at the start, and the most that it grows to."""
PATIENCE = 1000
"""Steps without an overflow after which the factor doubles."""


@dataclass
class LossScale:
    """Losses are multiplied by a power of two and gradients divided by it: no bit is lost, and
    small gradients do not vanish (Micikevicius et al., arXiv:1710.03740).

    Args:
        value: the factor; 1 where nothing is scaled.
        follows: whether it follows the gradients: halved when they overflow, doubled in time.
        good: steps since it last changed.
        overflows: steps so far that were skipped because gradients overflowed.
    """

    value: float = 1.0
    follows: bool = False
    good: int = 0
    overflows: int = 0

    @classmethod
    def of(cls, dtype: str, state: dict[str, Any]) -> LossScale:
        """The factor of a run in its precision.

        Args:
            dtype: `float16` scales, any other does not.
            state: of the checkpoint; {} without one.
        """
        follows = dtype == "float16"
        return cls(**{"value": FIRST if follows else 1.0, "follows": follows, **state})

    def divide(self, weights: Sequence[nn.Parameter]) -> None:
        """Divide the gradients of scaled losses by the factor.

        Args:
            weights: those without a gradient are left out.
        """
        if self.value == 1.0:
            return
        for weight in weights:
            if weight.grad is not None:
                weight.grad.mul_(1.0 / self.value)

    def overflowed(self) -> bool:
        """Note that gradients overflowed; False if a smaller factor could not help."""
        if not self.follows or self.value <= 1.0:
            return False
        self.value, self.good, self.overflows = self.value / 2, 0, self.overflows + 1
        return True

    def passed(self) -> None:
        """Note a step whose gradients were finite."""
        self.good += 1
        if self.follows and self.good >= PATIENCE and self.value < LARGEST:
            self.value, self.good = self.value * 2, 0

    @property
    def metrics(self) -> dict[str, float]:
        """What a step logs; nothing where nothing is scaled."""
        if not self.follows:
            return {}
        return {"loss_scale": self.value, "overflows": self.overflows}

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self) if self.follows else {}
