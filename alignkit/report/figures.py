"""Which curves of a run are drawn, and what a healthy one looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignkit.report.history import History


@dataclass(frozen=True)
class Figure:
    """Curves that are drawn together.

    Args:
        title: of the figure.
        metrics: that are drawn, those that there are.
        healthy: what a good one looks like, in a sentence.
        log: a logarithmic scale.
    """

    title: str
    metrics: tuple[str, ...]
    healthy: str
    log: bool = False


FIGURES = (
    Figure(
        "Loss",
        ("loss", "eval/loss"),
        "Falls, with scatter from step to step. The held-out loss falls with it; where it turns "
        "up while the other falls, the run learns its rows by heart. In ppo and grpo it says "
        "little.",
    ),
    Figure(
        "Accuracy",
        ("accuracy", "eval/accuracy", "rewards/accuracies", "eval/rewards/accuracies"),
        "Rises. Of tokens: the share that was the likeliest. Of pairs: the share with the chosen "
        "answer ahead, 0.5 without any knowledge.",
    ),
    Figure(
        "Reward",
        ("reward", "eval/reward", "score"),
        "Rises. A reward that rises while a task's pass@1 falls is being exploited.",
    ),
    Figure(
        "Task",
        ("eval/task/pass@1",),
        "Rises: held-out responses that the task finds right.",
    ),
    Figure(
        "Rewards of chosen and rejected answers",
        ("rewards/chosen", "rewards/rejected", "rewards/margins", "eval/rewards/margins"),
        "Chosen above rejected after some steps, the margin growing from 0. Both falling is usual "
        "for dpo, the chosen one less.",
    ),
    Figure(
        "Log-probs of answers",
        ("logps/chosen", "logps/rejected", "eval/logps/chosen", "eval/logps/rejected"),
        "That of the chosen falls less than that of the rejected, or rises.",
    ),
    Figure(
        "Distance from the reference",
        ("kl/k1", "kl/k3", "kl", "eval/kl/k1", "eval/kl"),
        "Near 0 at first, then small, in nats a response. Tens of nats: the model has left what "
        "the reference would say.",
    ),
    Figure(
        "Length of responses",
        ("response_length", "eval/response_length"),
        "Steady, or moving where the task asks for it; at the limit, responses are cut.",
    ),
    Figure(
        "Responses that end, tokens that are clipped",
        ("eos_rate", "eval/eos_rate", "clip_fraction", "frac_reward_zero_std"),
        "Most responses end by themselves; less than 0.3 of the tokens are clipped; groups that "
        "all earn the same teach nothing.",
    ),
    Figure(
        "Entropy",
        ("entropy", "eval/entropy"),
        "Above 0.1 nats a token: below it all responses are alike.",
    ),
    Figure(
        "Value model",
        ("value_loss", "explained_variance"),
        "The loss falls, and the explained variance is above 0.",
    ),
    Figure(
        "Gradient norm",
        ("grad_norm", "value_grad_norm"),
        "Of one order of magnitude over the run, without single spikes far above.",
        log=True,
    ),
    Figure("Learning rate", ("learning_rate", "value_learning_rate"), "The schedule's."),
    Figure(
        "Tokens a second",
        ("tokens_per_second",),
        "Steady from the third step on.",
    ),
)
"""In the order of the page."""


def drawn(history: History) -> list[tuple[Figure, Sequence[str]]]:
    """The figures for which there is at least one curve or value, and the metrics of each.

    Args:
        history: of a run.
    """
    found = [(one, [name for name in one.metrics if name in history]) for one in FIGURES]
    return [(one, names) for one, names in found if names]
