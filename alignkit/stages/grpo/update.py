"""The loss of one pass over groups of responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from alignkit.data.packing import pack_documents
from alignkit.models.kernels.copies import on_device
from alignkit.objectives.group_relative import (
    clipped_losses,
    sequence_log_ratio,
    stopped_weight_losses,
    token_weights,
)
from alignkit.objectives.kl import k3
from alignkit.objectives.ppo import log_ratio
from alignkit.packed import PackedBatch
from alignkit.recipe.stages.grpo import GrpoSpec
from alignkit.stages.rollouts.passes import Stepper
from alignkit.stages.rollouts.roles import Roles
from alignkit.stages.rollouts.sampling import Rollout, response_rows
from alignkit.stages.rollouts.scoring import Outputs, Scored, forward_policy
from alignkit.stages.running.loop import require_finite

SUMS = ("loss", "clip_low", "clip_high", "approx_kl", "tokens")
"""What a pass adds up: the loss, weighted as it is minimized; tokens whose ratio is below and above
its bounds; k3 to the policy that sampled; tokens."""


@dataclass(frozen=True)
class Groups:
    """What a step learns from, in this process; `S` responses.

    Args:
        rollouts: groups with their responses.
        advantages: `[S]`.
        counts: `[S]` whether a response counts.
        scored: log-probs at the time of sampling; None if they are those of the only update.
        longest: tokens at which a response is cut off.
        kl_coef: price of KL in this step.
    """

    rollouts: Sequence[Rollout]
    advantages: torch.Tensor
    counts: torch.Tensor
    scored: Scored | None
    longest: int
    kl_coef: float


@dataclass(frozen=True)
class Minibatch:
    """The groups of one optimizer step.

    Args:
        passes: rollouts of each forward and backward pass of this process.
        tokens: that count, over all processes; those of groups without a gradient among them.
        responses: that count, likewise.
    """

    passes: Sequence[Sequence[int]]
    tokens: float
    responses: float


@dataclass(frozen=True)
class GroupUpdater:
    """Learns from groups.

    Args:
        roles: policy and reference.
        spec: of the objective, with every key of its kind.
        stepper: takes optimizer steps from gradients.
    """

    roles: Roles
    spec: GrpoSpec
    stepper: Stepper

    def run(
        self,
        groups: Groups,
        minibatches: Sequence[Minibatch],
        outputs: Outputs | None,
        step: int,
    ) -> dict[str, float]:
        """One pass over the responses.

        Args:
            groups: what to learn from.
            minibatches: in their order.
            outputs: of the policy in the only pass, if it has run already.
            step: of the run, for messages.

        Returns:
            Sums over all processes, named as in `SUMS`, `updates` and gradient norms.

        Raises:
            NotFiniteError: a loss or a gradient is not finite; this step has not been taken.
        """

        def loss(sums: Sequence[float]) -> float:
            require_finite(
                sums[0],
                f"the loss of step {step + 1} is {sums[0]}",
                "lower training.learning_rate, or set training.on_bad_step=skip",
            )
            return sums[0]

        totals: dict[str, float] = {}
        for part in minibatches:
            backward = partial(self.backward, groups, part, outputs=outputs)
            summed, norms = self.stepper.take(part.passes, backward, len(SUMS), loss, step)
            values = dict(zip(SUMS, summed, strict=True)) | norms | {"updates": 1.0}
            totals = {name: totals.get(name, 0.0) + value for name, value in values.items()}
        return totals

    def backward(
        self,
        groups: Groups,
        minibatch: Minibatch,
        group: Sequence[int],
        outputs: Outputs | None = None,
    ) -> torch.Tensor:
        """Add the gradients of one pass; a prompt is read once for its group.

        Args:
            groups: what to learn from.
            minibatch: that the pass belongs to.
            group: rollouts of the pass.
            outputs: of the policy, if it has run already.

        Returns:
            `[5]` float64 sums, as named in `SUMS`.
        """
        spec = self.spec
        packed = pack_documents([groups.rollouts[i].document for i in group])
        new, _ = forward_policy(self.roles, packed) if outputs is None else outputs
        own = response_rows(groups.rollouts)
        rows = np.concatenate([own[i] for i in group])
        old = new.detach()
        if groups.scored is not None:
            old = on_device(_flat(groups.scored.policy, groups, rows), new.device)
        ratios = log_ratio(new, old)
        if spec.ratio == "sequence":
            ratios = self._sequence_ratios(new, old, packed)
        advantage, weight = self._per_token(groups, minibatch, rows, packed, new)
        losses = self._losses(new, ratios, advantage)
        if spec.kl == "loss" and groups.kl_coef:
            assert groups.scored is not None  # whatever asks for the KL is scored before
            reference = on_device(_flat(groups.scored.reference, groups, rows), new.device)
            losses = losses + groups.kl_coef * k3(new, reference)
        loss = (losses * weight).sum()
        (loss * self.stepper.scale.value).backward()
        with torch.no_grad():
            outside = [side.sum().to(loss.dtype) for side in self._outside(ratios)]
            tokens = loss.new_tensor(float(len(new)))
            sums = torch.stack([loss, *outside, k3(old, new).sum(), tokens])
            return sums.cpu().double()

    def _losses(
        self, new: torch.Tensor, ratios: torch.Tensor, advantage: torch.Tensor
    ) -> torch.Tensor:
        """`[N]` of each token, as the objective's keys say."""
        low, high = self.spec.clip or (None, None)
        if self.spec.ratio == "stopped":
            most = math.inf if high is None else high
            return stopped_weight_losses(new, ratios, advantage, high=most)
        return clipped_losses(ratios, advantage, low=low, high=high, dual=self.spec.dual_clip)

    def _outside(self, ratios: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N]` whether a ratio is below, and above, its bounds."""
        low, high = self.spec.clip or (None, None)
        ratio, never = ratios.exp(), torch.zeros_like(ratios, dtype=torch.bool)
        most = high if high is None or self.spec.ratio == "stopped" else 1.0 + high
        below = never if low is None else ratio < 1.0 - low
        return below, never if most is None else ratio > most

    def _sequence_ratios(
        self, new: torch.Tensor, old: torch.Tensor, packed: PackedBatch
    ) -> torch.Tensor:
        owners = on_device(packed.target_sequences, new.device)
        lengths = on_device(_lengths(packed), new.device)
        mean = self.spec.loss != "sequence_sum"
        return sequence_log_ratio(new, old, owners, lengths, mean=mean)

    def _per_token(
        self,
        groups: Groups,
        minibatch: Minibatch,
        rows: np.ndarray,
        packed: PackedBatch,
        new: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N]` advantage of each token, and what its loss counts."""
        spec, lengths = self.spec, torch.from_numpy(_lengths(packed))
        kind: Any = spec.loss
        weights = token_weights(
            lengths,
            kind,
            tokens=minibatch.tokens,
            responses=minibatch.responses,
            longest=groups.longest,
        )
        if spec.loss == "sequence_sum" and spec.ratio == "sequence":
            weights = weights / lengths.double()  # one loss for a response, not one for each token
        picked = torch.from_numpy(rows)
        weights = weights * groups.counts[picked]
        values = torch.stack([groups.advantages[picked].double(), weights])
        wide = values[:, torch.from_numpy(packed.target_sequences)].to(new.dtype)
        advantage, weight = on_device(wide.numpy(), new.device).unbind(0)
        return advantage, weight


def _lengths(packed: PackedBatch) -> np.ndarray:
    """`[S]` tokens of each response."""
    return np.bincount(packed.target_sequences, minlength=packed.num_sequences)


def _flat(values: torch.Tensor, groups: Groups, rows: np.ndarray) -> np.ndarray:
    """`[N]` of some responses' tokens, in the order of a packed batch of them."""
    assert groups.scored is not None
    picked = torch.from_numpy(rows)
    flat: np.ndarray = values[picked][groups.scored.mask[picked]].numpy()
    return flat
