"""One GRPO step: sample groups, judge them, and learn from those whose rewards differ."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from alignkit.data.packing import epoch_order
from alignkit.objectives.group_relative import (
    batch_spread,
    differs,
    group_advantages,
    group_spread,
    overlong_penalty,
)
from alignkit.objectives.kl import k1, k3
from alignkit.recipe.stages.grpo import GrpoRecipe
from alignkit.stages.grpo.update import Groups, Minibatch
from alignkit.stages.rollouts.judging import Rewards, joined_rewards
from alignkit.stages.rollouts.passes import group_rollouts
from alignkit.stages.rollouts.run import TRAIN, RolloutRun, end_step, rollout_metrics
from alignkit.stages.rollouts.sampling import Rollout
from alignkit.stages.rollouts.scoring import Outputs, Scored, score_rollouts
from alignkit.stages.running.loop import NAMED

BUFFER = 5
"""The soft penalty for long responses grows over the last fifth of the tokens they may have."""


@dataclass
class Asked:
    """What a step has sampled, in this process.

    Args:
        rollouts: groups, in the order in which they were asked.
        rewards: `[P, n]` of their responses, penalties included; NaN for one without a reward.
        counted: `[P, n]` whether a response is learned from.
        judged: the same responses' rewards by source.
        tries: how often further prompts were asked.
        failed: responses that sources could not score, as metrics.
    """

    rollouts: list[Rollout]
    rewards: torch.Tensor
    counted: torch.Tensor
    judged: Rewards
    tries: int
    failed: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> list[int]:
        """Groups whose rewards differ."""
        places: list[int] = differs(self.rewards).nonzero()[:, 0].tolist()
        return places


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
    spec = run.recipe.objective
    asked, sampling = _ask(run, step)
    chosen = asked.chosen
    rollouts = [asked.rollouts[i] for i in chosen]
    passes = [_minibatches(run, asked, step, epoch) for epoch in range(spec.epochs)]
    scored, outputs = _score(run, rollouts, passes[0])
    distances = _distances(scored)
    groups = _groups(run, asked, rollouts, scored, distances)
    sums: dict[str, float] = {}
    for minibatches in passes:
        for name, value in run.updater.run(groups, minibatches, outputs, step).items():
            sums[name] = sums.get(name, 0.0) + value
        outputs = None  # the weights have changed
    metrics = {
        **_update_metrics(sums),
        **rollout_metrics(run, asked.rollouts, asked.judged, {}),
        **_group_metrics(run, asked, distances),
        "sampling_seconds": sampling,
        **asked.failed,
    }
    kl = torch.zeros_like(asked.rewards)
    if distances:
        kl[chosen] = distances["kl/k1"].view(len(chosen), kl.shape[1])
    end_step(run, step, metrics, asked.rollouts, asked.judged, kl.flatten())
    return metrics


def step_places(run: RolloutRun, step: int) -> list[str]:
    """`file:line` of the first prompts that the last step asked.

    Args:
        run: what to work with.
        step: not used: steps ask as many prompts as they need.
    """
    places = run.rows.train.places
    return [places[item] for item in stream(run, run.began, NAMED)]


def stream(run: RolloutRun, first: int, count: int) -> list[int]:
    """Prompts in the order of the run: each epoch in an order of its own, none left out.

    Args:
        run: knows their number and the seed.
        first: prompts that were asked before.
        count: how many follow.
    """
    size = len(run.rows.train)
    epochs = range(first // size, (first + count) // size + 1)
    order = np.concatenate([epoch_order(epoch, size, run.seed) for epoch in epochs])
    begin = first % size
    items: list[int] = order[begin : begin + count].tolist()
    return items


def _ask(run: RolloutRun, step: int) -> tuple[Asked, float]:
    """Sample and judge groups until enough of them differ or the tries are spent; seconds."""
    recipe: GrpoRecipe = run.recipe
    wanted, tries = recipe.rollout.prompts_per_step, recipe.objective.resample or 0
    seconds, parts, missing, drawn = 0.0, list[tuple[list[Rollout], Rewards]](), wanted, run.drawn
    run.began = drawn
    for number in range(1 + tries):
        items = stream(run, drawn, missing)
        drawn += len(items)
        started = time.monotonic()
        mine = items[run.processes.rank :: run.processes.world]
        rollouts = run.collect(run.rows.train, mine, (run.seed, TRAIN, step, number))
        seconds += time.monotonic() - started
        parts.append((rollouts, run.score(rollouts)))
        asked = _joined(recipe, parts, number)
        found = torch.tensor(float(len(asked.chosen)), dtype=torch.float64)
        missing = wanted - int(run.processes.reduce(found))
        if missing <= 0:
            break
    asked.failed = run.look(asked.judged)
    run.drawn = drawn
    return asked, seconds


def _joined(
    recipe: GrpoRecipe, parts: Sequence[tuple[list[Rollout], Rewards]], tries: int
) -> Asked:
    together = joined_rewards([rewards for _, rewards in parts])
    rollouts = [rollout for some, _ in parts for rollout in some]
    total, spec = together.total, recipe.rollout
    if recipe.objective.overlong == "penalize":
        lengths = torch.tensor([len(c.ids) for r in rollouts for c in r.sampled])
        longest = spec.max_new_tokens
        total = total + overlong_penalty(lengths, longest, max(1, longest // BUFFER)).float()
    shape = len(rollouts), spec.samples_per_prompt
    counted = together.known
    if recipe.objective.overlong == "mask":
        ended = [c.finish == "stop" for r in rollouts for c in r.sampled]
        counted = counted & torch.tensor(ended, dtype=torch.bool)
    return Asked(rollouts, total.view(shape), counted.view(shape), together, tries)


def _minibatches(run: RolloutRun, asked: Asked, step: int, epoch: int) -> list[Minibatch]:
    """The optimizer steps of one pass over the groups; those without a gradient are left out.

    Responses of groups without a gradient count in the averages, unless others were asked in their
    place.
    """
    spec, budget = run.recipe.objective, run.plan.microbatch_tokens
    order = np.arange(len(asked.rollouts))
    if spec.minibatches > 1:
        order = np.random.default_rng([run.seed, step, epoch]).permutation(order)
    place = {group: number for number, group in enumerate(asked.chosen)}
    rollouts = [asked.rollouts[group] for group in place]
    passes, sums = [], []
    for part in np.array_split(order, spec.minibatches):
        learned = [place[group] for group in np.sort(part).tolist() if group in place]
        passes.append(group_rollouts(rollouts, learned, budget))
        counted = [asked.chosen[i] for i in learned] if spec.resample else part.tolist()
        lengths = [
            len(response.ids)
            for group in counted
            for response, counts in zip(
                asked.rollouts[group].sampled, asked.counted[group].tolist(), strict=True
            )
            if counts
        ]
        sums.append([float(sum(lengths)), float(len(lengths)), float(len(learned))])
    totals = run.processes.reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
    return [
        Minibatch(own, max(tokens, 1.0), max(responses, 1.0))
        for own, (tokens, responses, learned) in zip(passes, totals, strict=True)
        if learned
    ]


def _score(
    run: RolloutRun, rollouts: Sequence[Rollout], minibatches: Sequence[Minibatch]
) -> tuple[Scored | None, Outputs | None]:
    """Log-probs at the time of sampling, where more than one update or the reward needs them."""
    spec = run.recipe.objective
    if spec.epochs * spec.minibatches == 1 and not run.recipe.measures_kl:
        return None, None
    first = [group for part in minibatches for group in part.passes]
    return score_rollouts(run.roles, rollouts, first, keep=spec.minibatches == 1)


def _distances(scored: Scored | None) -> dict[str, torch.Tensor]:
    """`[S]` KL of each response by both estimators; empty where nothing was scored."""
    if scored is None:
        return {}
    mask = scored.mask
    return {
        "kl/k1": (k1(scored.policy, scored.reference) * mask).sum(1),
        "kl/k3": (k3(scored.policy, scored.reference) * mask).sum(1),
    }


def _groups(
    run: RolloutRun,
    asked: Asked,
    rollouts: list[Rollout],
    scored: Scored | None,
    distances: dict[str, torch.Tensor],
) -> Groups:
    """The groups that differ, with their advantages."""
    recipe: GrpoRecipe = run.recipe
    spec, kind = recipe.objective, recipe.objective.advantage
    assert kind is not None  # with_defaults
    earned = asked.rewards[asked.chosen]
    if spec.kl == "reward" and spec.kl_coef and distances:
        earned = earned - run.kl_coef * distances["kl/k1"].view_as(earned)
    advantages = group_advantages(earned.double(), kind)
    if kind == "batch_std":
        whole = earned if spec.resample else asked.rewards
        every = float((~torch.isnan(whole)).sum())
        sums = torch.tensor([every, float(advantages.square().sum())], dtype=torch.float64)
        advantages = advantages / batch_spread(*run.processes.reduce(sums).tolist())
    return Groups(
        rollouts,
        advantages.flatten(),
        asked.counted[asked.chosen].double().flatten(),
        scored,
        longest=recipe.rollout.max_new_tokens,
        kl_coef=run.kl_coef,
    )


def _update_metrics(sums: dict[str, float]) -> dict[str, float]:
    if not sums:  # no group differs
        return {"loss": 0.0, "grad_norm": 0.0}
    tokens, updates = max(sums["tokens"], 1.0), sums["updates"]
    low, high = sums["clip_low"] / tokens, sums["clip_high"] / tokens
    return {
        "loss": sums["loss"] / updates,
        "grad_norm": sums["grad_norm"] / updates,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "approx_kl": sums["approx_kl"] / tokens,
    }


def _group_metrics(
    run: RolloutRun, asked: Asked, distances: dict[str, torch.Tensor]
) -> dict[str, float]:
    """What became of the groups, over all processes."""
    rewards = asked.rewards.double()
    kl = [values.double().sum() for values in distances.values()]
    counts = [len(rewards), len(rewards) - len(asked.chosen)]
    sums = torch.stack(
        [
            *(torch.tensor(float(n), dtype=torch.float64) for n in counts),
            group_spread(rewards).sum(),
            torch.tensor(float(len(next(iter(distances.values()), []))), dtype=torch.float64),
            *kl,
        ]
    )
    groups, constant, spread, scored, *moved = run.processes.reduce(sums).tolist()
    return {
        "groups": groups,
        "frac_reward_zero_std": constant / max(groups, 1.0),
        "group_std": spread / max(groups, 1.0),
        "resampled": float(asked.tries),
        **{
            name: value / max(scored, 1.0)
            for name, value in zip(distances, moved, strict=True)
            if run.recipe.measures_kl
        },
    }
