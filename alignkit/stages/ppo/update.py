"""The optimizer steps of one PPO step: several passes over one batch of responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from alignkit.data.packing import pack_documents, split_documents
from alignkit.models.kernels.copies import on_device
from alignkit.models.kernels.factors import fixed_factors
from alignkit.objectives.kl import k3
from alignkit.objectives.ppo import clip_fraction, policy_losses, value_losses
from alignkit.recipe.stages.ppo import PpoSpec
from alignkit.runtime.loss_scale import LossScale
from alignkit.runtime.optim import Optimizers, TrainedPart, step_parts
from alignkit.runtime.processes import ProcessGroup
from alignkit.stages.ppo.roles import Roles
from alignkit.stages.ppo.scoring import Outputs, Scored, forward_policy
from alignkit.stages.rollouts.sampling import Rollout, response_rows
from alignkit.stages.running.loop import require_finite


@dataclass(frozen=True)
class Batch:
    """What a PPO step learns from, in this process.

    Args:
        rollouts: prompts with their responses.
        scored: log-probs and values at the time of sampling.
        advantages: `[B, T]` whitened.
        returns: `[B, T]`.
    """

    rollouts: Sequence[Rollout]
    scored: Scored
    advantages: torch.Tensor
    returns: torch.Tensor

    def flat(self, values: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """`[N]` of some responses' tokens, in the order of a packed batch of them."""
        picked = torch.from_numpy(rows)
        return values[picked][self.scored.mask[picked]]


def split_minibatches(
    count: int, minibatches: int, seed: Sequence[int], processes: ProcessGroup
) -> list[list[int]]:
    """This process's rollouts in each optimizer step of one pass.

    Args:
        count: prompts of the step over all processes, which take them in turn.
        minibatches: optimizer steps; each has its part of the prompts of all processes.
        seed: of the order; with one minibatch the rollouts keep theirs.
        processes: this one, and sums over all of them.
    """
    order = np.arange(count)
    if minibatches > 1:
        order = np.random.default_rng(list(seed)).permutation(count)
    parts = (np.sort(part) for part in np.array_split(order, minibatches))
    return [
        (part[part % processes.world == processes.rank] // processes.world).tolist()
        for part in parts
    ]


def group_rollouts(
    rollouts: Sequence[Rollout], chosen: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Rollouts of each forward and backward pass.

    Args:
        rollouts: of this process.
        chosen: those of the minibatch.
        max_tokens: tokens of a pass.
    """
    lengths = [rollouts[i].document.num_tokens for i in chosen]
    return [[chosen[i] for i in group] for group in split_documents(lengths, max_tokens)]


def trained_parts(optimizers: Optimizers) -> list[TrainedPart]:
    """Policy and value model, each with its optimizer."""
    return [
        TrainedPart(name, [p for group in part.param_groups for p in group["params"]], part)
        for name, part in optimizers.parts.items()
    ]


@dataclass(frozen=True)
class Updater:
    """Takes the optimizer steps.

    Args:
        roles: policy and value model.
        optimizers: `policy` and `value`, stored as one.
        spec: of the objective.
        max_grad_norm: for each of the two; None never clips.
        max_tokens: tokens of one pass.
        processes: this one, and sums over all of them.
        scale: factor on the losses.
    """

    roles: Roles
    optimizers: Optimizers
    spec: PpoSpec
    max_grad_norm: float | None
    max_tokens: int
    processes: ProcessGroup
    scale: LossScale

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
            mine = sum(int(batch.scored.mask[rows[i]].sum()) for group in minibatch for i in group)
            count = self.processes.reduce(torch.tensor([float(mine)], dtype=torch.float64)).item()
            if count == 0:  # a short step has fewer prompts than minibatches
                continue
            sums = torch.zeros(4, dtype=torch.float64)
            with fixed_factors(self.roles.trained):
                for group in minibatch:
                    own = np.concatenate([rows[i] for i in group])
                    sums += self.backward(batch, group, own, count, outputs)
            summed = self.processes.reduce(sums).tolist()
            policy, value = summed[0] / count, summed[1] / count
            require_finite(
                policy + value,
                f"a loss of step {step + 1} is not finite: {policy:.3g} of the policy, "
                f"{value:.3g} of the value model",
                "lower training.learning_rate or value.learning_rate, or set "
                "training.on_bad_step=skip",
            )
            parts = trained_parts(self.optimizers)
            for part in parts:
                sum_gradients(part.weights, self.processes)
            loss = policy + self.spec.value_weight * value
            norms = step_parts(parts, step, loss, limit=self.max_grad_norm, scale=self.scale)
            names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
            values = (
                dict(zip(names, summed, strict=True)) | norms | {"tokens": count, "updates": 1.0}
            )
            totals = {name: totals.get(name, 0.0) + value for name, value in values.items()}
        return totals

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
        spec, roles, divisor = self.spec, self.roles, tokens / self.scale.value
        packed = pack_documents([batch.rollouts[i].document for i in group])
        new, joint = forward_policy(roles, packed) if outputs is None else outputs
        device = new.device
        scored = batch.scored
        known = (scored.policy, batch.advantages, scored.values, batch.returns)
        columns = torch.stack([batch.flat(values, rows) for values in known])
        old, advantage, old_values, returns = on_device(columns.numpy(), device).unbind(0)
        policy = policy_losses(new, old, advantage, clip=spec.clip).sum()

        def value_loss(values: torch.Tensor) -> torch.Tensor:
            return value_losses(values, old_values, returns, clip=spec.value_clip).sum()

        if joint is not None:
            value = value_loss(joint)
            ((policy + spec.value_weight * value) / divisor).backward()
        else:
            (policy / divisor).backward()
            value_model: Any = roles.value
            value = value_loss(value_model(packed))
            (spec.value_weight * value / divisor).backward()
        with torch.no_grad():
            clipped = clip_fraction(new, old, clip=spec.clip).sum()
            moved = k3(old, new).sum()
            return torch.stack([policy, value, clipped, moved]).cpu().double()


def sum_gradients(weights: Sequence[nn.Parameter], processes: ProcessGroup) -> None:
    """Add up the gradients of all processes, so that each takes the same step.

    Args:
        weights: the same in every process.
        processes: this one, and sums over all of them.
    """
    if processes.world == 1:
        return
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights]
    )
    summed = processes.reduce(flat).to(flat.device)
    for weight, part in zip(weights, summed.split([p.numel() for p in weights]), strict=True):
        weight.grad = part.view_as(weight).to(weight.dtype)
