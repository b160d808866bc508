"""A run on sampled responses: what its loop works with, and what each step measures and leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from alignkit.data.packing import step_items
from alignkit.data.prompts import PromptSet
from alignkit.runtime.processes import ProcessGroup
from alignkit.stages.inputs.rows import PromptRows
from alignkit.stages.rollouts.guard import GUARD_FACTOR, Guard
from alignkit.stages.rollouts.health import Health, distinct_pairs
from alignkit.stages.rollouts.judging import Judge, Rewards
from alignkit.stages.rollouts.samples import SamplesFile
from alignkit.stages.rollouts.sampling import Rollout, sample
from alignkit.stages.running.loop import NAMED, Loop

TRAIN, HELD_OUT = 11, 12
"""First numbers of the seeds of responses."""

TASK = "task/pass@"
"""How the metrics of a task begin."""

OF_SOURCES = {
    "reward/<name>": "mean score of one source where it applies, before its weight",
    "failed/<name>": "responses that a source could not score, if there are any",
    "unscored": "share of responses that no source applies to; nothing is learned from them",
    "logged/<name>": "what a reward function gave to log_metric, in the first process",
}
"""Metrics of the sources of rewards."""

SHOWN = 8
"""Responses of a step that samples.jsonl keeps."""


@dataclass(kw_only=True)
class RolloutRun(Loop):
    """Everything the loop of a stage on sampled responses works with.

    Args:
        recipe: with its defaults.
        rows: prompts.
        roles: who plays what.
        judge: scores responses.
        task: verifies held-out responses, apart from their reward; None without one.
        engine: samples responses.
        updater: takes optimizer steps.
        processes: this one, and sums over all of them.
        samples: samples.jsonl; None on every process but the first.
        health: watches the metrics.
        kl_coef: price of KL in the next step.
        drawn: prompts that steps have asked so far, where they ask as many as they need.
        began: the same before the last step.
        kl: KL of a response in the last step; empty before the first.
        last: metrics of the last step.
        scorer: of the policy, for writing the model.
    """

    recipe: Any
    rows: PromptRows
    roles: Any
    judge: Judge | Any
    task: Judge | None
    engine: Any
    updater: Any
    processes: ProcessGroup
    samples: SamplesFile | None
    health: Health
    kl_coef: float
    drawn: int = 0
    began: int = 0
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

    def keep_policy(self) -> RolloutRun:
        """The run with nothing but the policy's scorer, which `finish_run` writes."""
        self.scorer = self.roles.policy.scorer
        self.roles = self.judge = self.task = self.engine = self.updater = None
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

    def score(self, rollouts: Sequence[Rollout]) -> Rewards:
        """What some responses earn.

        Args:
            rollouts: of this process.

        Raises:
            RewardError: a source failed, here or in another process.
        """
        return self.judge(rollouts)

    def look(
        self, rewards: Rewards, judge: Judge | None = None, *, whole: bool = True
    ) -> dict[str, float]:
        """Tell which responses could not be scored, by all processes together.

        Args:
            rewards: of all responses of a step or an evaluation, of this process.
            judge: that gave them; None is that of the reward.
            whole: see `Judge.failed`.

        Returns:
            `failed/<name>` of each source that failed.

        Raises:
            RewardError: a source could score none of them, or none applies to any.
        """
        counts = (judge or self.judge).failed(rewards, whole=whole)
        failed = {name: count for name, count in counts.items() if count}
        for name, count in failed.items():
            own = rewards.failures.get(name, ())
            first = f"; the first is to {own[0].place}: {own[0].reason}" if own else ""
            self.progress.say(f"reward {name}: {count} responses could not be scored{first}")
        return {f"failed/{name}": float(count) for name, count in failed.items()}


def step_places(run: RolloutRun, step: int) -> list[str]:
    """`file:line` of a step's first prompts.

    Args:
        run: what to work with.
        step: from 0.
    """
    places = run.rows.train.places
    return [places[item] for item in step_prompts(run, step)[:NAMED]]


def step_prompts(run: RolloutRun, step: int) -> list[int]:
    """Prompts of a step, over all processes.

    Args:
        run: knows their number and order.
        step: from 0.
    """
    items: list[int] = step_items(step, len(run.rows.train), run.plan.batch_size, run.seed).tolist()
    return items


def rollout_metrics(
    run: RolloutRun,
    rollouts: Sequence[Rollout],
    rewards: Rewards,
    more: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Means over all responses of all processes.

    Args:
        run: knows the processes.
        rollouts: of this one.
        rewards: of their responses.
        more: name -> `[B]` further values of these.

    Returns:
        Means over the responses that have such a value: a source need not apply to all.
    """
    responses = [c for r in rollouts for c in r.sampled]
    reads = sum(r.document.num_tokens for r in rollouts)
    per_response = {
        "reward": rewards.plain,
        "score": rewards.total,
        "squares": rewards.plain.square(),
        **more,
        "response_length": torch.tensor([float(len(c.ids)) for c in responses]),
        "eos_rate": torch.tensor([float(c.finish == "stop") for c in responses]),
        "entropy": torch.tensor([c.entropy for c in responses]),
        **{f"reward/{name}": value for name, value in rewards.parts.items()},
    }
    sums = [value.double().nansum() for value in per_response.values()]
    known = [(~torch.isnan(value)).double().sum() for value in per_response.values()]
    counts = [torch.tensor(float(x), dtype=torch.float64) for x in (len(responses), reads)]
    *both, count, read = run.processes.reduce(torch.stack([*sums, *known, *counts])).tolist()
    pairs = zip(per_response, both[: len(sums)], both[len(sums) :], strict=True)
    named = {name: total / counted if counted else math.nan for name, total, counted in pairs}
    unscored = 1.0 - both[len(sums)] / max(count, 1.0)
    spread = max(named.pop("squares") - named["reward"] ** 2, 0.0) ** 0.5
    return {
        **named,
        "reward_std": spread,
        "unscored": unscored,
        # Of this process only: what a function logs is not alignkit's to average.
        **{f"logged/{name}": value for name, value in rewards.metrics.items()},
        # Of this process only: distinct pairs cannot be added up.
        "distinct_2": distinct_pairs([text for r in rollouts for text in r.texts]),
        "responses": count,
        "tokens": read,
    }


def end_step(
    run: RolloutRun,
    step: int,
    metrics: dict[str, float],
    rollouts: Sequence[Rollout],
    rewards: Rewards,
    kl: torch.Tensor,
) -> None:
    """The guard, the health lines and the samples.

    Args:
        run: what they are kept in.
        step: from 0.
        metrics: of the step.
        rollouts: of this process.
        rewards: of their responses.
        kl: `[B]` k1 of each response, in nats; 0 if nothing asks for it.
    """
    done, moved = step + 1, metrics.get("kl/k1")
    run.kl, run.last = [] if moved is None else [moved], metrics
    if moved is not None and run.recipe.guard.action == "raise_kl" and run.guard.exceeded(moved):
        run.kl_coef *= GUARD_FACTOR
        run.progress.say(f"guard: KL {moved:.3g}, kl_coef is now {run.kl_coef:.3g}")
    for line in run.health.look(metrics):
        run.progress.say(f"health: {line}")
    every = run.recipe.rollout.samples_every
    whole = done == 1 or done % every == 0 or done == run.plan.steps
    if run.samples is not None and (whole or rewards.notes):
        run.samples.write(done, rollouts, rewards, kl, rows="train", limit=SHOWN * whole)


def say_rewards(values: dict[str, float]) -> str:
    """Held-out values of a policy in one line.

    Args:
        values: of `evaluate_policy`.
    """
    low, high = values.get("reward_low", math.nan), values.get("reward_high", math.nan)
    kl = f"KL {values['kl/k1']:.2f}  " if "kl/k1" in values else ""
    line = (
        f"reward {values['reward']:.3f} ({low:.3f} to {high:.3f})  {kl}"
        f"length {values['response_length']:.1f}  finished {values['eos_rate']:.0%}"
    )
    if "reward_gain" in values:
        low, high = values["reward_gain_low"], values["reward_gain_high"]
        line += f"  gain {values['reward_gain']:+.3f} ({low:+.3f} to {high:+.3f})"
    return line + "".join(_say_task(values))


def _say_task(values: dict[str, float]) -> Iterator[str]:
    """pass@1 and pass@k with their intervals."""
    for name in (
        key for key in values if key.startswith(TASK) and key.rpartition("@")[2].isdigit()
    ):
        low, high = values[f"{name}_low"], values[f"{name}_high"]
        yield f"  {name.removeprefix('task/')} {values[name]:.1%} ({low:.1%} to {high:.1%})"
        if f"{name}_gain" in values:
            gain, low, high = (values[f"{name}_gain{end}"] * 100 for end in ("", "_low", "_high"))
            yield f" gain {gain:+.1f} points ({low:+.1f} to {high:+.1f})"
