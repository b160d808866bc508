"""GRPO's checks before its first step, and what its first groups show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from alignkit.errors import TrainingError
from alignkit.objectives.group_relative import differs
from alignkit.stages.grpo.update import Groups, Minibatch
from alignkit.stages.rollouts import check
from alignkit.stages.rollouts.judging import Rewards, joined_rewards
from alignkit.stages.rollouts.run import RolloutRun
from alignkit.stages.rollouts.sampling import Rollout
from alignkit.stages.rollouts.scoring import Scored

MOST = 16
"""Groups of a pilot whose first ones earn all the same, at least those of a step."""

SHOWN = 3
"""Responses that are printed."""

WIDTH = 160
"""Characters of each."""


def dry_run(run: RolloutRun, first_step: int) -> None:
    """The checks of `rollouts.check.dry_run`; before the first step also what the groups show.

    Args:
        run: what is checked.
        first_step: steps already done.

    Raises:
        TrainingError: a check fails; or no group can teach anything.
    """
    rollouts, rewards, seconds = check.dry_run(run, first_step, _backward, "the policy gets")
    if first_step == 0:
        _say_price(run, rollouts, seconds)
        if not _differing(run, rollouts, rewards):
            rollouts, rewards = _with_more(run, rollouts, rewards)
        _look(run, rollouts, rewards.total.view(len(rollouts), -1))
        if len(rewards.parts) > 1:
            _say_parts(run, rewards)
        if not _differing(run, rollouts, rewards):
            run.look(rewards)
            _refuse(run, rollouts, rewards.total)


def _differing(run: RolloutRun, rollouts: Sequence[Rollout], rewards: Rewards) -> int:
    """Groups whose rewards differ, in any process: all of them must decide alike."""
    found = differs(rewards.total.view(len(rollouts), -1)).sum()
    return int(run.processes.reduce(found.double()))


def _with_more(
    run: RolloutRun, rollouts: list[Rollout], rewards: Rewards
) -> tuple[list[Rollout], Rewards]:
    """The pilot with as many groups as a step has, at least `MOST`: hard prompts differ seldom."""
    prompts = run.rows.train
    items = list(range(len(rollouts), min(len(prompts), max(MOST, run.plan.batch_size))))
    if not items:
        return rollouts, rewards
    run.progress.say(
        f"pilot: {len(rollouts)} groups earn all the same; asking {len(items)} more prompts"
    )
    more = run.collect(prompts, items, (run.seed, check.DRY_RUN))
    return [*rollouts, *more], joined_rewards([rewards, run.score(more)])


def _say_price(run: RolloutRun, rollouts: Sequence[Rollout], seconds: float) -> None:
    """What sampling costs, as these few groups did."""
    tokens = sum(len(c.ids) for rollout in rollouts for c in rollout.sampled)
    steps = run.recipe.rollout.prompts_per_step / run.processes.world / len(rollouts)
    run.progress.say(
        f"pilot: {tokens:,} tokens in {seconds:.1f} seconds; a step samples some "
        f"{tokens * steps:,.0f} in {seconds * steps:.0f} seconds, and then learns from them"
    )


def _say_parts(run: RolloutRun, rewards: Rewards) -> None:
    """The spread of each source, before its weight."""
    for name, values in rewards.parts.items():
        known = values[~torch.isnan(values)].double()
        if not len(known):
            run.progress.say(f"pilot: reward {name} applies to no response")
            continue
        run.progress.say(
            f"pilot: reward {name} {known.min():.3g} to {known.max():.3g}, {known.mean():.3g} on "
            f"average with a standard deviation of {known.std(correction=0):.3g}"
        )


def _look(run: RolloutRun, rollouts: Sequence[Rollout], rewards: torch.Tensor) -> None:
    """Say what a few groups earn."""
    known = rewards[~torch.isnan(rewards)]
    earned = "no rewards"
    if len(known):
        earned = f"rewards {known.min():.3g} to {known.max():.3g}, {known.mean():.3g} on average"
    cut = sum(c.finish == "length" for r in rollouts for c in r.sampled)
    constant, count = int((~differs(rewards)).sum()), rewards.numel()
    spec = run.recipe.rollout
    run.progress.say(
        f"pilot: {len(rollouts)} groups of {spec.samples_per_prompt}: {cut} of {count} responses "
        f"cut off at {spec.max_new_tokens} tokens, {constant} groups earn all the same; {earned}"
    )
    for rollout, earned in list(zip(rollouts, rewards.tolist(), strict=True))[:SHOWN]:
        shown = rollout.prompt.shown
        last = shown if isinstance(shown, str) else str(shown[-1].get("content", ""))
        asked, text = (" ".join(t.split()) for t in (last, rollout.texts[0]))
        run.progress.say(f"pilot: {earned[0]:.3g} for {text[:WIDTH]!r} to {asked[-WIDTH:]!r}")


def _refuse(run: RolloutRun, rollouts: Sequence[Rollout], earned: torch.Tensor) -> NoReturn:
    """End a run that would learn nothing."""
    spec, mean = run.recipe.rollout, float(earned.nanmean())
    if all(c.finish == "length" for rollout in rollouts for c in rollout.sampled):
        raise TrainingError(
            f"all {len(earned)} responses of the pilot are cut off at {spec.max_new_tokens} "
            "tokens, and earn the same",
            hint="raise rollout.max_new_tokens",
        )
    raise TrainingError(
        f"the {spec.samples_per_prompt} responses to each of {len(rollouts)} prompts earn all "
        f"the same ({mean:.3g} on average): nothing can be learned from them",
        hint="use easier prompts, a reward with more steps, rollout.temperature=1 or more "
        "rollout.samples_per_prompt",
    )


def _backward(
    run: RolloutRun, rollouts: Sequence[Rollout], scored: Scored, groups: list[list[int]]
) -> None:
    responses = len(scored.policy)
    ones = torch.ones(responses, dtype=torch.float64)
    batch = Groups(
        rollouts,
        advantages=ones,
        counts=ones,
        scored=scored,
        longest=run.recipe.rollout.max_new_tokens,
        kl_coef=run.kl_coef,
    )
    whole = Minibatch(groups, float(scored.mask.sum()), float(responses))
    for group in groups:
        run.updater.backward(batch, whole, group)
