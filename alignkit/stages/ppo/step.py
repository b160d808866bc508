"""One PPO step: sample, score, estimate advantages, update."""

from __future__ import annotations

import time

import torch

from alignkit.objectives.kl import adapt_kl_coef, k1, k3
from alignkit.objectives.ppo import advantages, explained_variance, moments, token_rewards, whiten
from alignkit.runtime.processes import ProcessGroup
from alignkit.stages.ppo.update import Batch
from alignkit.stages.rollouts.judging import Rewards
from alignkit.stages.rollouts.passes import group_rollouts, split_minibatches
from alignkit.stages.rollouts.run import (
    TRAIN,
    RolloutRun,
    end_step,
    rollout_metrics,
    step_prompts,
)
from alignkit.stages.rollouts.sampling import Rollout
from alignkit.stages.rollouts.scoring import Scored, score_rollouts


def train_step(run: RolloutRun, step: int) -> dict[str, float]:
    """One step, from 0.

    Args:
        run: what to work with.
        step: of the run.

    Returns:
        Its metrics.

    Raises:
        RewardError: responses could not be scored; no weight has changed.
        TrainingError: a loss is not finite.
    """
    started = time.monotonic()
    plan, spec, seed = run.plan, run.recipe.objective, run.seed
    prompts = run.rows.train
    items = step_prompts(run, step)
    mine = items[run.processes.rank :: run.processes.world]
    rollouts = run.collect(prompts, mine, (seed, TRAIN, step))
    sampled = time.monotonic()
    rewards = run.score(rollouts)
    failed = run.look(rewards)
    passes = [
        [
            group_rollouts(rollouts, part, plan.microbatch_tokens)
            for part in split_minibatches(
                len(items), spec.minibatches, (seed, step, epoch), run.processes
            )
        ]
        for epoch in range(spec.epochs)
    ]
    first = [group for part in passes[0] for group in part]
    # With several minibatches, another process may step before this one's only group has its turn.
    keep = spec.minibatches == 1
    scored, outputs = score_rollouts(run.roles, rollouts, first, keep=keep)
    kl = k1(scored.policy, scored.reference) * scored.mask
    batch = _batch(run, rollouts, rewards, scored, kl)
    sums: dict[str, float] = {}
    for groups in passes:
        for name, value in run.updater.run(batch, groups, outputs, step).items():
            sums[name] = sums.get(name, 0.0) + value
        outputs = None  # the weights have changed
    distances = {
        "kl/k1": kl.sum(1),
        "kl/k3": (k3(scored.policy, scored.reference) * scored.mask).sum(1),
    }
    columns = _of_all_processes(
        run.processes, torch.stack([scored.values[batch.learned], batch.returns[batch.learned]], 1)
    )
    metrics = {
        **_update_metrics(sums, spec.value_weight),
        **rollout_metrics(run, rollouts, rewards, distances),
        "kl_coef": run.kl_coef,
        "explained_variance": explained_variance(*columns.unbind(1)),
        "sampling_seconds": sampled - started,
        **failed,
    }
    if spec.kl_target is not None:
        run.kl_coef = adapt_kl_coef(
            run.kl_coef,
            metrics["kl/k1"],
            target=spec.kl_target,
            responses=int(metrics["responses"]),
            horizon=spec.kl_horizon,
        )
    end_step(run, step, metrics, rollouts, rewards, distances["kl/k1"])
    return metrics


def _batch(
    run: RolloutRun,
    rollouts: list[Rollout],
    rewards: Rewards,
    scored: Scored,
    kl: torch.Tensor,
) -> Batch:
    """Responses with their advantages and returns, from rewards and `[B, T]` KL."""
    spec, mask = run.recipe.objective, scored.mask
    known = rewards.known[:, None] & mask
    earned = token_rewards(rewards.total.nan_to_num(0.0), kl, mask, kl_coef=run.kl_coef)
    raw, returns = advantages(
        earned, scored.values, mask, gamma=spec.gamma, gae_lambda=spec.gae_lambda
    )
    totals = run.processes.reduce(moments(raw, known))
    return Batch(rollouts, scored, whiten(raw, known, totals), returns, known)


def _update_metrics(sums: dict[str, float], value_weight: float) -> dict[str, float]:
    tokens, updates = max(sums["tokens"], 1.0), sums["updates"]
    policy, value = sums["policy_loss"] / tokens, sums["value_loss"] / tokens
    return {
        "loss": policy + value_weight * value,
        "policy_loss": policy,
        "value_loss": value,
        "grad_norm": sums["grad_norm"] / updates,
        "value_grad_norm": sums["value_grad_norm"] / updates,
        "clip_fraction": sums["clip_fraction"] / tokens,
        "approx_kl": sums["approx_kl"] / tokens,
    }


def _of_all_processes(processes: ProcessGroup, rows: torch.Tensor) -> torch.Tensor:
    """`[N, C]` rows of all processes, in the order of the processes."""
    if processes.world == 1:
        return rows
    counts = torch.zeros(processes.world, dtype=torch.float64)
    counts[processes.rank] = len(rows)
    ends = processes.reduce(counts).cumsum(0).long().tolist()
    whole = torch.zeros(ends[-1], rows.shape[1], dtype=torch.float64)
    whole[ends[processes.rank] - len(rows) : ends[processes.rank]] = rows.double()
    return processes.reduce(whole)
