"""One PPO step: sample, score, estimate advantages, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from alignkit.data.packing import step_items
from alignkit.data.prompts import PromptSet
from alignkit.objectives.kl import adapt_kl_coef, k1, k3
from alignkit.objectives.ppo import advantages, explained_variance, moments, token_rewards, whiten
from alignkit.recipe.stages.ppo import PpoRecipe
from alignkit.runtime.processes import ProcessGroup
from alignkit.stages.inputs.rows import PromptRows
from alignkit.stages.ppo.scoring import Scored, score_rollouts
from alignkit.stages.ppo.update import Batch, group_rollouts, split_minibatches
from alignkit.stages.rollouts.guard import GUARD_FACTOR, Guard
from alignkit.stages.rollouts.health import Health, distinct_pairs
from alignkit.stages.rollouts.judging import Rewards
from alignkit.stages.rollouts.samples import SamplesFile
from alignkit.stages.rollouts.sampling import Rollout, sample
from alignkit.stages.running.loop import NAMED, Loop

TRAIN, HELD_OUT = 11, 12
"""First numbers of the seeds of responses."""

SHOWN = 8
"""Responses of a step that samples.jsonl keeps."""


@dataclass(kw_only=True)
class PpoRun(Loop):
    """Everything the loop of PPO works with.

    Args:
        recipe: with its defaults.
        rows: prompts.
        roles: who plays what.
        judge: scores responses.
        engine: samples responses.
        updater: takes optimizer steps.
        processes: this one, and sums over all of them.
        samples: samples.jsonl; None on every process but the first.
        health: watches the metrics.
        kl_coef: price of KL in the next step.
        kl: KL of a response in the last step; empty before the first.
        last: metrics of the last step.
        scorer: of the policy, for writing the model.
    """

    recipe: PpoRecipe
    rows: PromptRows
    roles: Any
    judge: Any
    engine: Any
    updater: Any
    processes: ProcessGroup
    samples: SamplesFile | None
    health: Health
    kl_coef: float
    kl: list[float] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)
    scorer: Any = None

    @property
    def guard(self) -> Guard:
        """Of the recipe."""
        return Guard(self.recipe.guard)

    @property
    def written_head(self) -> None:
        """None: a policy is a language model, even if it carries the value head."""
        return None

    @property
    def say(self) -> Callable[[dict[str, float]], str]:
        """Held-out values in one line."""
        return say_rewards

    def keep_policy(self) -> PpoRun:
        """The run with nothing but the policy's scorer, which `finish_run` writes."""
        self.scorer = self.roles.policy.scorer
        self.roles = self.judge = self.engine = self.updater = None
        self.parts = ()
        return self

    def release(self) -> None:
        """Let go of the policy too."""
        self.scorer = None

    def collect(
        self, prompts: PromptSet, items: Sequence[int], seed: tuple[int, ...]
    ) -> list[Rollout]:
        """Responses of the policy to some prompts.

        Args:
            prompts: all of them.
            items: which ones.
            seed: of the responses.
        """
        samples = self.recipe.rollout.samples_per_prompt
        with self.roles.policy.active():
            return sample(
                prompts, items, self.engine, self.rows.tokenizer, samples=samples, seed=seed
            )


def train_step(run: PpoRun, step: int) -> dict[str, float]:
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
    items = _items(run, step)
    mine = items[run.processes.rank :: run.processes.world]
    rollouts = run.collect(prompts, mine, (seed, TRAIN, step))
    sampled = time.monotonic()
    rewards = run.judge(rollouts)
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
    earned = token_rewards(rewards.total, kl, scored.mask, kl_coef=run.kl_coef)
    raw, returns = advantages(
        earned, scored.values, scored.mask, gamma=spec.gamma, gae_lambda=spec.gae_lambda
    )
    totals = run.processes.reduce(moments(raw, scored.mask))
    batch = Batch(rollouts, scored, whiten(raw, scored.mask, totals), returns)
    sums: dict[str, float] = {}
    for groups in passes:
        for name, value in run.updater.run(batch, groups, outputs, step).items():
            sums[name] = sums.get(name, 0.0) + value
        outputs = None  # the weights have changed
    metrics = {
        **_update_metrics(sums, spec.value_weight),
        **_rollout_metrics(run, rollouts, rewards, scored, kl, returns),
        "sampling_seconds": sampled - started,
    }
    _after(run, step, metrics, rollouts, rewards, kl.sum(1))
    return metrics


def step_places(run: PpoRun, step: int) -> list[str]:
    """`file:line` of a step's first prompts.

    Args:
        run: what to work with.
        step: from 0.
    """
    places = run.rows.train.places
    return [places[item] for item in _items(run, step)[:NAMED]]


def _items(run: PpoRun, step: int) -> list[int]:
    items: list[int] = step_items(step, len(run.rows.train), run.plan.batch_size, run.seed).tolist()
    return items


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


def _rollout_metrics(
    run: PpoRun,
    rollouts: Sequence[Rollout],
    rewards: Rewards,
    scored: Scored,
    kl: torch.Tensor,
    returns: torch.Tensor,
) -> dict[str, float]:
    """Means over all responses of all processes."""
    mask, responses = scored.mask, [c for r in rollouts for c in r.sampled]
    reads = sum(r.document.num_tokens for r in rollouts)
    per_response = {
        "reward": rewards.plain,
        "score": rewards.total,
        "squares": rewards.plain.square(),
        "kl/k1": kl.sum(1),
        "kl/k3": (k3(scored.policy, scored.reference) * mask).sum(1),
        "response_length": mask.sum(1),
        "eos_rate": torch.tensor([float(c.finish == "stop") for c in responses]),
        "entropy": torch.tensor([c.entropy for c in responses]),
        **{f"reward/{name}": value for name, value in rewards.parts.items()},
    }
    sums = [value.double().sum() for value in per_response.values()]
    counts = [torch.tensor(float(x), dtype=torch.float64) for x in (len(responses), reads)]
    totals = run.processes.reduce(torch.stack([*sums, *counts])).tolist()
    columns = _of_all_processes(run.processes, torch.stack([scored.values[mask], returns[mask]], 1))
    *means, count, read = totals
    named = {name: total / count for name, total in zip(per_response, means, strict=True)}
    spread = max(named.pop("squares") - named["reward"] ** 2, 0.0) ** 0.5
    return {
        **named,
        "reward_std": spread,
        "kl_coef": run.kl_coef,
        "explained_variance": explained_variance(*columns.unbind(1)),
        # Of this process only: distinct pairs cannot be added up.
        "distinct_2": distinct_pairs([text for r in rollouts for text in r.texts]),
        "responses": count,
        "tokens": read,
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


def _after(
    run: PpoRun,
    step: int,
    metrics: dict[str, float],
    rollouts: Sequence[Rollout],
    rewards: Rewards,
    kl: torch.Tensor,
) -> None:
    """The price of KL in the next step, the health lines and the samples."""
    spec, done = run.recipe.objective, step + 1
    run.kl, run.last = [metrics["kl/k1"]], metrics
    if spec.kl_target is not None:
        run.kl_coef = adapt_kl_coef(
            run.kl_coef,
            metrics["kl/k1"],
            target=spec.kl_target,
            responses=int(metrics["responses"]),
            horizon=spec.kl_horizon,
        )
    if run.recipe.guard.action == "raise_kl" and run.guard.exceeded(metrics["kl/k1"]):
        run.kl_coef *= GUARD_FACTOR
        run.progress.say(f"guard: KL {metrics['kl/k1']:.3g}, kl_coef is now {run.kl_coef:.3g}")
    for line in run.health.look(metrics):
        run.progress.say(f"health: {line}")
    every = run.recipe.rollout.samples_every
    if run.samples is not None and (done == 1 or done % every == 0 or done == run.plan.steps):
        run.samples.write(done, rollouts, rewards, kl, rows="train", limit=SHOWN)


def say_rewards(values: dict[str, float]) -> str:
    """Held-out values of a policy in one line.

    Args:
        values: of `evaluate_policy`.
    """
    low, high = values.get("reward_low", math.nan), values.get("reward_high", math.nan)
    line = (
        f"reward {values['reward']:.3f} ({low:.3f} to {high:.3f})  KL {values['kl/k1']:.2f}  "
        f"length {values['response_length']:.1f}  finished {values['eos_rate']:.0%}"
    )
    if "reward_gain" in values:
        low, high = values["reward_gain_low"], values["reward_gain_high"]
        line += f"  gain {values['reward_gain']:+.3f} ({low:+.3f} to {high:+.3f})"
    return line
