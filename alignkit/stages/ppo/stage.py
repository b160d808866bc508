"""PPO: what it brings to the stage on sampled responses."""

from __future__ import annotations

from alignkit.stages.ppo.check import dry_run
from alignkit.stages.ppo.step import train_step
from alignkit.stages.ppo.update import Updater
from alignkit.stages.rollouts.run import OF_SOURCES, step_places
from alignkit.stages.rollouts.stage import RolloutStage

METRICS = {
    "reward": "mean reward of a response, without the penalty for a missing end",
    "score": "the same with the penalty: what the policy learns from",
    "reward_std": "its standard deviation over responses",
    "kl/k1": "mean of log π - log π_ref, summed over a response, in nats",
    "kl/k3": "the same divergence by an estimator that is never negative",
    "kl_coef": "price of a nat of k1 at a token",
    "value_learning_rate": "of the value model in this step",
    "value_grad_norm": "norm of the value model's gradient before clipping",
    "sampling_seconds": "the part of the step's time spent on sampling",
    "responses": "responses of the step, over all processes",
    **OF_SOURCES,
    "policy_loss": "clipped policy loss, mean over tokens and passes",
    "value_loss": "clipped squared error of the values, mean over tokens and passes",
    "clip_fraction": "share of tokens whose ratio left the clipping range",
    "approx_kl": "k3 between the policy that sampled and the one that is trained",
    "explained_variance": "share of the returns' variance that the values predict",
    "entropy": "mean entropy of a sampled token's distribution, in nats",
    "response_length": "tokens of a response, its end included",
    "eos_rate": "share of responses that ended on their own",
    "distinct_2": "share of different word pairs among the first process's responses",
}


def describe_step(metrics: dict[str, float]) -> str:
    """Reward, KL and the health of the update, for the progress line.

    Args:
        metrics: of the step.
    """
    return (
        f"reward {metrics['reward']:+.3f}  KL {metrics['kl/k1']:.2f}  "
        f"clipped {metrics['clip_fraction']:.1%}  value fit {metrics['explained_variance']:.2f}  "
        f"length {metrics['response_length']:.1f}"
    )


PPO = RolloutStage(METRICS, Updater, dry_run, train_step, step_places, describe_step)
