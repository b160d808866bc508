"""GRPO's checks before its first step, and what its first groups show."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignkit.errors import TrainingError
from alignkit.objectives.group_relative import differs
from alignkit.stages.grpo.update import Groups, Minibatch
from alignkit.stages.rollouts import check
from alignkit.stages.rollouts.run import RolloutRun
from alignkit.stages.rollouts.sampling import Rollout
from alignkit.stages.rollouts.scoring import Scored

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
    rollouts, rewards = check.dry_run(run, first_step, _backward, "the policy gets")
    if first_step == 0:
        _look(run, rollouts, rewards.total.view(len(rollouts), -1))


def _look(run: RolloutRun, rollouts: Sequence[Rollout], rewards: torch.Tensor) -> None:
    """Say what a few groups earn, and refuse a run that would learn nothing."""
    known = rewards[~torch.isnan(rewards)]
    cut = sum(c.finish == "length" for r in rollouts for c in r.sampled)
    constant, count = int((~differs(rewards)).sum()), rewards.numel()
    spec = run.recipe.rollout
    run.progress.say(
        f"pilot: {len(rollouts)} groups of {spec.samples_per_prompt}: {cut} of {count} responses "
        f"cut off at {spec.max_new_tokens} tokens, {constant} groups earn all the same; rewards "
        f"{known.min():.3g} to {known.max():.3g}, {known.mean():.3g} on average"
    )
    for rollout, earned in list(zip(rollouts, rewards.tolist(), strict=True))[:SHOWN]:
        asked, text = (" ".join(t.split()) for t in (str(rollout.prompt.shown), rollout.texts[0]))
        run.progress.say(f"pilot: {earned[0]:.3g} for {text[:WIDTH]!r} to {asked[-WIDTH:]!r}")
    if cut == count and constant == len(rollouts):
        raise TrainingError(
            f"all {count} responses of the pilot are cut off at {spec.max_new_tokens} tokens, and "
            "earn the same",
            hint="raise rollout.max_new_tokens",
        )
    if constant == len(rollouts):
        raise TrainingError(
            f"the {spec.samples_per_prompt} responses to each of {len(rollouts)} prompts earn all "
            f"the same ({known.mean():.3g} on average): nothing can be learned from them",
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
