"""Held-out prompts under the policy: what its responses earn, before and after."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from alignkit.evaluation.intervals import mean_interval
from alignkit.stages.rollouts.run import HELD_OUT, RolloutRun, say_rewards
from alignkit.stages.rollouts.samples import read_rewards
from alignkit.stages.rollouts.scoring import mean_kl


def evaluate_policy(run: RolloutRun, step: int) -> tuple[dict[str, float], str] | None:
    """Reward of responses to the held-out prompts.

    The random numbers are the same at every step, so that two evaluations differ by the policy.

    Args:
        run: what to measure.
        step: steps done.

    Returns:
        `reward` with its 95% interval, `kl/k1`, `response_length` and `eos_rate`; after training
        in one process also `reward_gain`, the mean difference to the first evaluation prompt by
        prompt; and all of it in one line. None without held-out prompts.
    """
    held_out, processes = run.rows.held_out, run.processes
    if held_out is None:
        return None
    items = list(range(len(held_out)))[processes.rank :: processes.world]
    rollouts = run.collect(held_out, items, (run.seed, HELD_OUT))
    rewards = run.judge(rollouts)
    kl = mean_kl(run.roles, rollouts, run.plan.microbatch_tokens)
    samples = run.recipe.rollout.samples_per_prompt
    columns = torch.zeros(len(held_out), 5, dtype=torch.float64)
    for number, (item, rollout) in enumerate(zip(items, rollouts, strict=True)):
        own = slice(number * samples, (number + 1) * samples)
        responses = rollout.sampled
        columns[item] = torch.tensor(
            [
                rewards.plain[own].mean(),
                kl[own].mean(),
                np.mean([len(c.ids) for c in responses]),
                np.mean([c.finish == "stop" for c in responses]),
                np.mean([c.entropy for c in responses]),
            ],
            dtype=torch.float64,
        )
    table: npt.NDArray[np.float64] = processes.reduce(columns).numpy()
    mean, low, high = mean_interval(table[:, 0])
    values = {"reward": mean, "reward_low": low, "reward_high": high}
    names = ("kl/k1", "response_length", "eos_rate", "entropy")
    values |= dict(zip(names, table[:, 1:].mean(0).tolist(), strict=True))
    if run.roles.reference is None:
        del values["kl/k1"]
    values["prompts"] = float(len(held_out))
    if run.samples is not None:
        run.samples.write(step, rollouts, rewards, kl, rows="held_out", limit=None)
        values |= _gain(run, step)
    return values, say_rewards(values)


def _gain(run: RolloutRun, step: int) -> dict[str, float]:
    """Difference to the first evaluation, prompt by prompt.

    Empty if several processes divide the prompts: the file holds only those of the first.
    """
    if step == 0 or run.samples is None or run.processes.world > 1:
        return {}
    # In the order of the prompts: their file may have moved since the run was started.
    before, after = (
        [np.mean(rewards) for rewards in read_rewards(run.samples.path, at, "held_out").values()]
        for at in (0, step)
    )
    if len(before) != len(after):
        return {}
    differences = np.asarray(after) - np.asarray(before)
    mean, low, high = mean_interval(differences)
    return {"reward_gain": mean, "reward_gain_low": low, "reward_gain_high": high}
