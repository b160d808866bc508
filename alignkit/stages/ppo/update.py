"""The optimizer steps of one PPO step: several passes over one batch of responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignkit.data.packing import pack_documents
from alignkit.models.kernels.copies import on_device
from alignkit.objectives.kl import k3
from alignkit.objectives.ppo import clip_fraction, policy_losses, value_losses
from alignkit.recipe.stages.ppo import PpoSpec
from alignkit.stages.rollouts.passes import Stepper
from alignkit.stages.rollouts.roles import Roles
from alignkit.stages.rollouts.sampling import Rollout, response_rows
from alignkit.stages.rollouts.scoring import Outputs, Scored, forward_policy
from alignkit.stages.running.loop import require_finite


@dataclass(frozen=True)
class Batch:
    """What a PPO step learns from, in this process.

    Args:
        rollouts: prompts with their responses.
        scored: log-probs and values at the time of sampling.
        advantages: `[B, T]` whitened.
        returns: `[B, T]`.
        learned: `[B, T]` bool, tokens that are learned from: those of responses with a reward.
    """

    rollouts: Sequence[Rollout]
    scored: Scored
    advantages: torch.Tensor
    returns: torch.Tensor
    learned: torch.Tensor

    def flat(self, values: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """`[N]` of some responses' tokens, in the order of a packed batch of them."""
        picked = torch.from_numpy(rows)
        return values[picked][self.scored.mask[picked]]


@dataclass(frozen=True)
class Updater:
    """Takes the optimizer steps.

    Args:
        roles: policy and value model.
        spec: of the objective.
        stepper: takes them from the gradients.
    """

    roles: Roles
    spec: PpoSpec
    stepper: Stepper

    def run(
        self,
        batch: Batch,
        groups: list[list[list[int]]],
        outputs: Outputs | None = None,
        step: int = 0,
    ) -> dict[str, float]:
        """One pass over the responses.

        Args:
            batch: what to learn from.
            groups: of each minibatch, the rollouts of each forward and backward pass.
            outputs: of the policy in the only pass, if it has run already.
            step: of the run, for messages.

        Returns:
            Sums over the tokens of all processes: `policy_loss`, `value_loss`, `clip_fraction`,
            `approx_kl`; their number `tokens`; the `updates` that were made, and their gradient
            norms.

        Raises:
            NotFiniteError: a loss or a gradient is not finite; this step has not been taken.
        """
        rows = response_rows(batch.rollouts)
        totals: dict[str, float] = {}
        for minibatch in groups:
            mine = sum(int(batch.learned[rows[i]].sum()) for group in minibatch for i in group)
            count = float(self.stepper.processes.reduce(torch.tensor(mine, dtype=torch.float64)))
            if count == 0:  # a short step has fewer prompts than minibatches
                continue

            def backward(group: Sequence[int], tokens: float = count) -> torch.Tensor:
                own = np.concatenate([rows[i] for i in group])
                return self.backward(batch, group, own, tokens, outputs)

            def loss(sums: Sequence[float], tokens: float = count) -> float:
                return self.loss(sums[0] / tokens, sums[1] / tokens, step)

            summed, norms = self.stepper.take(minibatch, backward, 4, loss, step)
            names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
            values = (
                dict(zip(names, summed, strict=True)) | norms | {"tokens": count, "updates": 1.0}
            )
            totals = {name: totals.get(name, 0.0) + value for name, value in values.items()}
        return totals

    def loss(self, policy: float, value: float, step: int) -> float:
        """The loss of a step from its two parts.

        Args:
            policy: mean over tokens.
            value: mean over tokens.
            step: of the run, for messages.

        Raises:
            NotFiniteError: it is not finite.
        """
        require_finite(
            policy + value,
            f"a loss of step {step + 1} is not finite: {policy:.3g} of the policy, "
            f"{value:.3g} of the value model",
            "lower training.learning_rate or value.learning_rate, or set training.on_bad_step=skip",
        )
        return policy + self.spec.value_weight * value

    def backward(
        self,
        batch: Batch,
        group: Sequence[int],
        rows: np.ndarray,
        tokens: float,
        outputs: Outputs | None = None,
    ) -> torch.Tensor:
        """Add the gradients of one pass.

        Args:
            batch: what to learn from.
            group: rollouts of the pass.
            rows: of their responses among all of this process.
            tokens: of the whole minibatch; the losses are divided by it.
            outputs: of the policy, if it has run already.

        Returns:
            `[4]` float64 sums: policy loss, value loss, clipped tokens, KL to the sampler.
        """
        spec, roles, divisor = self.spec, self.roles, tokens / self.stepper.scale.value
        packed = pack_documents([batch.rollouts[i].document for i in group])
        new, joint = forward_policy(roles, packed) if outputs is None else outputs
        device = new.device
        scored = batch.scored
        known = (scored.policy, batch.advantages, scored.values, batch.returns)
        columns = torch.stack([batch.flat(v, rows) for v in (*known, batch.learned.float())])
        old, advantage, old_values, returns, counts = on_device(columns.numpy(), device).unbind(0)
        policy = (policy_losses(new, old, advantage, clip=spec.clip) * counts).sum()

        def value_loss(values: torch.Tensor) -> torch.Tensor:
            losses = value_losses(values, old_values, returns, clip=spec.value_clip)
            return (losses * counts).sum()

        if joint is not None:
            value = value_loss(joint)
            ((policy + spec.value_weight * value) / divisor).backward()
        else:
            (policy / divisor).backward()
            value_model: Any = roles.value
            value = value_loss(value_model(packed))
            (spec.value_weight * value / divisor).backward()
        with torch.no_grad():
            clipped = (clip_fraction(new, old, clip=spec.clip) * counts).sum()
            moved = (k3(old, new) * counts).sum()
            return torch.stack([policy, value, clipped, moved]).cpu().double()
