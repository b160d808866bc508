"""Which responses each optimizer step and each pass reads, and whose weights it moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from alignkit.data.packing import split_documents
from alignkit.models.kernels.factors import fixed_factors
from alignkit.runtime.loss_scale import LossScale
from alignkit.runtime.optim import Optimizers, TrainedPart, step_parts
from alignkit.runtime.processes import ProcessGroup
from alignkit.stages.rollouts.sampling import Rollout


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
    """Policy, and value model if there is one, each with its optimizer."""
    return [
        TrainedPart(name, [p for group in part.param_groups for p in group["params"]], part)
        for name, part in optimizers.parts.items()
    ]


@dataclass(frozen=True)
class Stepper:
    """Takes optimizer steps from the gradients of several passes.

    Args:
        trained: all trained weights.
        optimizers: of these, stored as one.
        max_grad_norm: for each of them; None never clips.
        processes: this one, and sums over all of them.
        scale: factor on the losses.
    """

    trained: nn.Module
    optimizers: Optimizers
    max_grad_norm: float | None
    processes: ProcessGroup
    scale: LossScale

    def take(
        self,
        groups: Sequence[Sequence[int]],
        backward: Callable[[Sequence[int]], torch.Tensor],
        width: int,
        loss: Callable[[list[float]], float],
        step: int,
    ) -> tuple[list[float], dict[str, float]]:
        """One optimizer step.

        Args:
            groups: rollouts of each pass of this process.
            backward: adds a pass's gradients, and gives `[width]` float64 sums.
            width: number of sums.
            loss: of the sums of all processes; raises if it is not finite.
            step: of the run, for messages.

        Returns:
            The sums of all processes, and norms before clipping.
        """
        sums = torch.zeros(width, dtype=torch.float64)
        with fixed_factors(self.trained):
            for group in groups:
                sums += backward(group)
        summed: list[float] = self.processes.reduce(sums).tolist()
        value = loss(summed)
        parts = trained_parts(self.optimizers)
        for part in parts:
            sum_gradients(part.weights, self.processes)
        return summed, step_parts(parts, step, value, limit=self.max_grad_norm, scale=self.scale)


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
