"""Held-out prompts under the policy: what its responses earn and solve, before and after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from alignkit.evaluation.intervals import mean_interval
from alignkit.stages.rollouts.judging import Rewards
from alignkit.stages.rollouts.run import HELD_OUT, TASK, RolloutRun, say_rewards
from alignkit.stages.rollouts.samples import read_values
from alignkit.stages.rollouts.sampling import Rollout
from alignkit.stages.rollouts.scoring import mean_kl

RIGHT = 1.0
"""Score from which a task's verifier counts a response as right."""

Array = npt.NDArray[np.float64]


def evaluate_policy(run: RolloutRun, step: int) -> tuple[dict[str, float], str] | None:
    """Reward of responses to the held-out prompts, and how often they solve the task.

    The random numbers are the same at every step, so that two evaluations differ by the policy.

    Args:
        run: what to measure.
        step: steps done.

    Returns:
        `reward` with its 95% interval, `kl/k1`, `response_length` and `eos_rate`; with a task its
        `task/pass@1`, and `task/pass@k` for k samples of a prompt; after training in one process
        also `reward_gain` and those of the task, the mean difference to the first evaluation prompt
        by prompt; and all of it in one line. None without held-out prompts.
    """
    held_out, processes = run.rows.held_out, run.processes
    if held_out is None:
        return None
    items = list(range(len(held_out)))[processes.rank :: processes.world]
    rollouts = run.collect(held_out, items, (run.seed, HELD_OUT))
    rewards = run.score(rollouts)
    failed = run.look(rewards)
    kl = mean_kl(run.roles, rollouts, run.plan.microbatch_tokens)
    verified = None if run.task is None else run.task(rollouts)
    solved = None
    if run.task is not None and verified is not None:
        failed |= run.look(verified, run.task)
        solved = verified.plain
        for number, note in verified.notes.items():
            rewards.notes.setdefault(number, {}).update(note)
    own = _by_prompt(run, rollouts, rewards, kl, solved)
    columns = torch.zeros(len(held_out), len(own), dtype=torch.float64)
    columns[items] = torch.tensor(np.stack(list(own.values()), 1))
    table: Array = processes.reduce(columns).numpy()
    found = dict(zip(own, table.T, strict=True))
    values = _with_interval("reward", found.pop("reward"))
    tasks = {name: found.pop(name) for name in list(found) if name.startswith(TASK)}
    values |= {name: float(column.mean()) for name, column in found.items()}
    if run.roles.reference is None:
        del values["kl/k1"]
    values["prompts"] = float(len(held_out))
    values |= failed
    for name, column in tasks.items():
        values |= _with_interval(name, column)
    if run.samples is not None:
        run.samples.write(step, rollouts, rewards, kl, rows="held_out", limit=None, task=solved)
        values |= _gains(run, step)
    return values, say_rewards(values)


def _by_prompt(
    run: RolloutRun,
    rollouts: Sequence[Rollout],
    rewards: Rewards,
    kl: torch.Tensor,
    solved: torch.Tensor | None,
) -> dict[str, Array]:
    """Name of each value -> its mean over the responses to each prompt."""
    samples = run.recipe.rollout.samples_per_prompt
    responses = [response for rollout in rollouts for response in rollout.sampled]
    single = {
        "reward": rewards.plain.numpy(),
        "kl/k1": kl.numpy(),
        "response_length": np.asarray([len(c.ids) for c in responses]),
        "eos_rate": np.asarray([c.finish == "stop" for c in responses]),
        "entropy": np.asarray([c.entropy for c in responses]),
    }
    means = {name: _mean(column, samples) for name, column in single.items()}
    return means if solved is None else means | _passed(solved.numpy(), samples)


def _passed(scores: npt.NDArray[np.float32], samples: int) -> dict[str, Array]:
    """`pass@k` of each prompt, with k = 1 and k = all of its samples; NaN is not verified."""
    unknown = np.isnan(scores)
    right = np.where(unknown, np.nan, scores >= RIGHT)
    passed = {f"{TASK}1": _mean(right, samples)}
    if samples == 1:
        return passed
    any_right = np.fmax.reduce(right.reshape(-1, samples), axis=1)  # NaN only where all are
    return passed | {f"{TASK}{samples}": any_right}


def _mean(column: npt.NDArray[np.generic], samples: int) -> Array:
    """Mean over each prompt's responses that have a value; NaN where none has."""
    grouped = column.astype(np.float64).reshape(-1, samples)
    known = (~np.isnan(grouped)).sum(1)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(grouped, 1) / known)


def _with_interval(name: str, column: Array) -> dict[str, float]:
    """Mean over the prompts, and its 95% interval."""
    means = mean_interval(column[~np.isnan(column)])
    return dict(zip((name, f"{name}_low", f"{name}_high"), means, strict=True))


def _gains(run: RolloutRun, step: int) -> dict[str, float]:
    """Differences to the first evaluation, prompt by prompt.

    Empty if several processes divide the prompts: the file holds only those of the first.
    """
    if step == 0 or run.samples is None or run.processes.world > 1:
        return {}
    samples, gains = run.recipe.rollout.samples_per_prompt, dict[str, float]()
    for key in ("reward",) if run.task is None else ("reward", "task"):
        # In the order of the prompts: their file may have moved since the run was started.
        before, after = (
            np.asarray(list(read_values(run.samples.path, at, "held_out", key).values()))
            for at in (0, step)
        )
        if before.shape != after.shape:
            return {}
        if key == "reward":
            gains |= _with_interval("reward_gain", _mean(after, samples) - _mean(before, samples))
            continue
        earlier = _passed(before, samples)
        for name, column in _passed(after, samples).items():
            gains |= _with_interval(f"{name}_gain", column - earlier[name])
    return gains
