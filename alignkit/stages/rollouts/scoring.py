"""Passes of policy, reference and value model over sampled responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from alignkit.data.packing import pack_documents, split_documents
from alignkit.models.scoring.scorer import sum_by_sequence
from alignkit.packed import PackedBatch
from alignkit.stages.rollouts.roles import Roles
from alignkit.stages.rollouts.sampling import Rollout, response_rows


@dataclass(frozen=True)
class Scored:
    """Log-probs and values of all responses of this process, `[B, T]` float32 each.

    Args:
        policy: log-probs under the policy that sampled, from the pass that training repeats.
        reference: the same under the reference; the policy's own if nothing asks for it.
        values: predictions of the value model; 0 without one.
        mask: response tokens.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor


Outputs = tuple[torch.Tensor, torch.Tensor | None]
"""`[N]` log-probs, and `[N]` values if the policy carries the head."""


def forward_policy(roles: Roles, batch: PackedBatch) -> Outputs:
    """`[N]` log-probs of a batch, and `[N]` values if the policy carries the head."""
    scores: Any = roles.policy(batch)
    if isinstance(scores, tuple):
        return scores[0].logprobs, scores[1]
    return scores.logprobs, None


def score_rollouts(
    roles: Roles,
    rollouts: Sequence[Rollout],
    groups: Sequence[Sequence[int]],
    *,
    keep: bool = False,
) -> tuple[Scored, Outputs | None]:
    """Policy, reference and value passes.

    Args:
        roles: who scores.
        rollouts: of this process; empty if a short step leaves it no prompts.
        groups: rollouts of each pass; the same as in training, so that the ratio starts at 1.
        keep: also return the policy's outputs; only for passes before the first optimizer step.

    Returns:
        Log-probs and values, without gradients. And with `keep` and a single pass, the policy's
        outputs with their graph: the first update would compute them again.
    """
    keep = keep and len(groups) == 1
    if not rollouts:
        nothing = torch.zeros(0, 1)
        return Scored(nothing, nothing, nothing, nothing.bool()), None
    lengths = [[len(c.ids) for c in rollout.sampled] for rollout in rollouts]
    rows: dict[int, list[torch.Tensor]] = {}
    for group in groups:
        batch = pack_documents([rollouts[i].document for i in group])
        with torch.set_grad_enabled(keep):
            outputs = forward_policy(roles, batch)
        policy = outputs[0].detach()
        with torch.no_grad():
            reference = reference_logprobs(roles, batch, policy)
            values: Any = outputs[1] if roles.value is None else roles.value(batch)
        values = torch.zeros_like(policy) if values is None else values.detach().float()
        scores = (policy, reference, values)
        columns = torch.stack(scores).cpu()
        parts = iter(columns.split([n for i in group for n in lengths[i]], dim=1))
        for i in group:
            rows[i] = [next(parts) for _ in lengths[i]]
    ordered = [row for i in range(len(rollouts)) for row in rows[i]]
    padded = pad_sequence([row.T for row in ordered], batch_first=True)
    counts = torch.tensor([row.shape[1] for row in ordered])
    mask = torch.arange(padded.shape[1]) < counts[:, None]
    scored = Scored(padded[..., 0], padded[..., 1], padded[..., 2], mask)
    return scored, outputs if keep else None


def reference_logprobs(roles: Roles, batch: PackedBatch, policy: torch.Tensor) -> torch.Tensor:
    """`[N]` log-probs under the reference, without gradients; the policy's own without one.

    Args:
        roles: who scores.
        batch: what is scored.
        policy: `[N]` log-probs under the policy.
    """
    if roles.reference is None:
        return policy.detach()
    with torch.no_grad():
        scores: Any = roles.reference(batch)
    logprobs: torch.Tensor = scores.logprobs
    return logprobs


def mean_kl(roles: Roles, rollouts: Sequence[Rollout], max_tokens: int) -> torch.Tensor:
    """`[B]` k1 of whole responses, in nats.

    Args:
        roles: policy and reference.
        rollouts: at least one.
        max_tokens: tokens of one pass.
    """
    lengths = [rollout.document.num_tokens for rollout in rollouts]
    rows, kl = response_rows(rollouts), torch.zeros(sum(len(r.texts) for r in rollouts))
    if roles.reference is None:
        return kl
    for group in split_documents(lengths, max_tokens):
        batch = pack_documents([rollouts[i].document for i in group])
        with torch.no_grad():
            policy, _ = forward_policy(roles, batch)
            reference = reference_logprobs(roles, batch, policy)
            sums = sum_by_sequence(policy - reference, batch).float().cpu()
        kl[torch.from_numpy(np.concatenate([rows[i] for i in group]))] = sums
    return kl
