"""Negative log-likelihood in which likely tokens count less (focal loss, arXiv 1708.02002).

objective: {kind: custom, file: sft.py, name: loss, parameters: {gamma: 2.0}}
"""

import torch


def loss(logprobs: torch.Tensor, gamma: float) -> torch.Tensor:
    """`[N]` losses of `[N]` log-probs of trained tokens, in nats.

    alignkit averages them over all trained tokens of the optimizer step. With gamma = 0 this is
    alignkit's own `cross_entropy`.
    """
    return -((1 - logprobs.exp()) ** gamma) * logprobs
