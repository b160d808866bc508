"""PPO's checks before its first step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from alignkit.stages.ppo.update import Batch
from alignkit.stages.rollouts import check
from alignkit.stages.rollouts.run import RolloutRun
from alignkit.stages.rollouts.sampling import Rollout
from alignkit.stages.rollouts.scoring import Scored


def dry_run(run: RolloutRun, first_step: int) -> None:
    """See `rollouts.check.dry_run`.

    Args:
        run: what is checked.
        first_step: steps already done.
    """
    check.dry_run(run, first_step, _backward, "the policy and the value model get")


def _backward(
    run: RolloutRun, rollouts: Sequence[Rollout], scored: Scored, groups: list[list[int]]
) -> None:
    ones = torch.ones_like(scored.policy) * scored.mask
    batch = Batch(rollouts, scored, ones, scored.values + ones, scored.mask)
    rows = np.split(np.arange(len(scored.policy)), len(rollouts))
    for group in groups:
        own = np.concatenate([rows[i] for i in group])
        run.updater.backward(batch, group, own, float(scored.mask.sum()))
