"""One token for each row of logits, by inverting its cumulative distribution."""

from __future__ import annotations

import torch

SUMMED = 256
"""Probabilities in one block of a sum."""


def draw_tokens(
    logits: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token per row by inverting its cumulative distribution.

    Args:
        logits: `[B, V]` float32.
        uniform: `[B]` random numbers in [0, 1), in the dtype of sums.

    Returns:
        `[B]` ids, `[B]` float32 log-probs and `[B]` entropies in nats.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    probs = logprobs.exp()
    ids = _inverse(probs, uniform)
    # A probability that is 0 in float32 has a finite log here, and adds nothing.
    entropy = -(probs * logprobs.clamp(min=-1e4)).sum(-1)
    return ids, logprobs.gather(1, ids[:, None])[:, 0], entropy


def _inverse(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """`[B]` first ids up to which the sum of `[B, V]` probabilities exceeds `uniform`.

    First among sums of blocks, then inside one block, in the dtype of `uniform`: a float64 sum over
    a whole vocabulary writes and reads four times what the probabilities themselves take.
    """
    count = probs.shape[1]
    full = count // SUMMED * SUMMED
    blocks = [probs[:, :full].unflatten(1, (-1, SUMMED)).sum(-1)]
    if full < count:
        blocks.append(probs[:, full:].sum(-1, keepdim=True))
    sums = _running_sums(torch.cat(blocks, dim=1).to(uniform.dtype))
    # Rounding may leave the sum below 1, and a token of probability 0 must never be drawn.
    threshold = uniform[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, threshold, right=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    columns = block * SUMMED + torch.arange(SUMMED, device=probs.device)
    inside = probs.gather(1, columns.clamp(max=count - 1)).to(uniform.dtype)
    inside = inside.masked_fill(columns >= count, 0.0)
    reached = before + _running_sums(inside)
    # A block's sum is rounded: the threshold may lie beyond its last token with any probability.
    offset = torch.minimum(
        torch.searchsorted(reached, threshold, right=True),
        (inside > 0).long().mul(torch.arange(SUMMED, device=probs.device)).amax(1, keepdim=True),
    )
    return (block * SUMMED + offset)[:, 0]


def _running_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums along each row so far."""
    if x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return x @ x.new_ones(x.shape[1], x.shape[1]).triu()  # its cumsum has no fixed order
    return x.cumsum(1)
