"""GRPO: what it brings to the stage on sampled responses."""

from __future__ import annotations

from alignkit.stages.grpo.check import dry_run
from alignkit.stages.grpo.step import step_places, train_step
from alignkit.stages.grpo.update import GroupUpdater
from alignkit.stages.rollouts.run import OF_SOURCES
from alignkit.stages.rollouts.stage import RolloutStage

METRICS = {
    "reward": "mean reward of a response, without penalties",
    "score": "the same with the penalty for a missing end: what advantages are made of",
    "reward_std": "standard deviation of the rewards over all responses",
    "group_std": "mean of the groups' own standard deviations",
    "frac_reward_zero_std": "share of groups whose responses all earn the same; they teach nothing",
    "groups": "groups that were sampled in the step, over all processes",
    "resampled": "how often the step asked further prompts",
    "kl/k1": "mean of log π - log π_ref, summed over a response, in nats; if anything asks for it",
    "kl/k3": "the same divergence by an estimator that is never negative",
    "clip_ratio/low_mean": "share of tokens whose ratio is below its bound",
    "clip_ratio/high_mean": "share of tokens whose ratio is above its bound",
    "clip_ratio/region_mean": "both together",
    "approx_kl": "k3 between the policy that sampled and the one that is trained",
    "sampling_seconds": "the part of the step's time spent on sampling",
    "responses": "responses of the step, over all processes",
    **OF_SOURCES,
    "entropy": "mean entropy of a sampled token's distribution, in nats",
    "response_length": "tokens of a response, its end included",
    "eos_rate": "share of responses that ended on their own",
    "distinct_2": "share of different word pairs among the first process's responses",
}


def describe_step(metrics: dict[str, float]) -> str:
    """Reward, groups and lengths, for the progress line.

    Args:
        metrics: of the step.
    """
    kl = f"KL {metrics['kl/k1']:.2f}  " if "kl/k1" in metrics else ""
    return (
        f"reward {metrics['reward']:+.3f}  {kl}"
        f"all the same {metrics['frac_reward_zero_std']:.0%}  "
        f"length {metrics['response_length']:.1f}  finished {metrics['eos_rate']:.0%}"
    )


GRPO = RolloutStage(METRICS, GroupUpdater, dry_run, train_step, step_places, describe_step)
