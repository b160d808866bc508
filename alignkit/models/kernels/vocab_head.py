"""Hidden states -> log-probs at the targets, in chunks of tokens.

Only scored positions are projected to the vocabulary, and never more than a chunk of them at a
time. Log-sum-exp runs in float32. With a frozen head the gradient with respect to the hidden
state, W^T (onehot - p), does not depend on the loss: it is computed together with the log-prob,
kept as one vector per target, and only scaled in the backward pass. A trained head recomputes its
logits there instead.

Shapes: `N` targets, `H` hidden size, `V` vocabulary, `C` tokens of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from alignkit.models.kernels.precision import product_dtype
from alignkit.recipe.facts import logits_bytes


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the projection.

    Args:
        scale: logits are multiplied by it first.
        softcap: then become `softcap * tanh(logits / softcap)`; None changes nothing.
        temperature: divides the result, above 0; not 1 if sampling used another.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class TokenScores:
    """Scores of the targets of one batch.

    Args:
        logprobs: `[N]` float32, natural logarithm, at most 0.
        correct: `[N]` bool, the target is the likeliest token.
    """

    logprobs: torch.Tensor
    correct: torch.Tensor


def logit_transform(config: PreTrainedConfig) -> LogitTransform:
    """The transform that a model's configuration names, as far as alignkit knows the names.

    The start-up check of the scorer compares the outcome with the model's own logits, so a name
    that is missing here costs speed, never correctness.

    Args:
        config: a transformers text configuration.
    """
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        multiplies = config.model_type.startswith("hyperclovax")
        scale = float(config.logits_scaling) if multiplies else 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(scale, None if softcap is None else float(softcap))


def score_targets(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, transform: LogitTransform
) -> TokenScores:
    """Log-probs of the targets, log p(target | hidden) = z_target - logsumexp(z).

    Args:
        hidden: `[N, H]` final hidden states that predict the targets.
        head: the output projection; a plain linear layer takes the chunked path, any other module
            (an adapter on the head, a quantized one) is called as it is.
        targets: `[N]` token ids.
        transform: from the hidden projection to the model's logits.

    Returns:
        Log-probs, differentiable with respect to `hidden` and the head's weights.
    """
    if type(head) is not nn.Linear:
        return _score_with_module(hidden, head, targets, transform)
    weight = head.weight
    logprobs, correct = _ChunkedLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden.to(product_dtype(hidden)), weight, head.bias, targets, transform
    )
    return TokenScores(logprobs, correct)


def next_logits(hidden: torch.Tensor, head: nn.Module, transform: LogitTransform) -> torch.Tensor:
    """Logits of the next token, as sampling needs them.

    Args:
        hidden: `[B, H]` final hidden states, contiguous: otherwise torch repeats the whole head for
            each row.
        head: the output projection.
        transform: from the projection to the model's logits, the temperature included.

    Returns:
        `[B, V]` float32.
    """
    logits: torch.Tensor = head(hidden).float()
    if transform.scale != 1.0:  # skipping this saves a pass per token
        logits = logits * transform.scale
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    return logits if transform.temperature == 1.0 else logits / transform.temperature


def _score_with_module(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, transform: LogitTransform
) -> TokenScores:
    logprobs, correct = [], []
    out_features = getattr(head, "out_features", 32768)
    chunk = _chunk_tokens(out_features, hidden.device)
    for rows, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = next_logits(rows, head, transform)
        picked = logits.gather(1, ids[:, None])[:, 0]
        logprobs.append(picked - logits.logsumexp(1))
        correct.append(picked.detach() >= logits.detach().amax(1))
    return TokenScores(torch.cat(logprobs), torch.cat(correct))


def _chunk_tokens(vocabulary: int, device: torch.device) -> int:
    return max(16, logits_bytes(device.type) // (4 * vocabulary))


class _ChunkedLogProbs(torch.autograd.Function):
    """See the module's docstring. Autograd gives no gradient to `correct`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        # requires_grad of the inputs survives inside forward; grad mode does not.
        unit = torch.empty_like(hidden) if hidden.requires_grad and not head_trains else None
        matrix = weight.to(hidden.dtype)
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        chunk = _chunk_tokens(len(weight), hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            ids = targets[rows, None]
            logits, slope = _logits(hidden[rows], matrix, bias, ids, transform)
            peak = logits.amax(1, keepdim=True)
            picked = logits.gather(1, ids)
            weights = logits.sub_(peak).exp_()
            total = weights.sum(1, keepdim=True)
            logprobs[rows] = (picked - peak - total.log())[:, 0]
            correct[rows] = (picked >= peak)[:, 0]
            if unit is not None:
                delta = _slope_times(weights, total, ids, slope, transform, hidden.dtype)
                unit[rows] = delta @ matrix
        ctx.mark_non_differentiable(correct)
        ctx.transform = transform
        if unit is not None:
            ctx.save_for_backward(unit)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.unit = unit is not None
        return logprobs, correct

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        if ctx.unit:
            (unit,) = ctx.saved_tensors
            return (unit * grad[:, None]).to(unit.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        chunk = _chunk_tokens(len(weight), hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            ids = targets[rows, None]
            logits, slope = _logits(hidden[rows], matrix, bias, ids, ctx.transform)
            weights = logits.sub_(logits.amax(1, keepdim=True)).exp_()
            total = weights.sum(1, keepdim=True)
            delta = _slope_times(weights, total, ids, slope, ctx.transform, torch.float32)
            delta.mul_(grad[rows, None])
            if grad_bias is not None:
                grad_bias += delta.sum(0)
            narrow = delta.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = narrow @ matrix
            grad_weight += narrow.T @ hidden[rows]
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _logits(
    hidden: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    transform: LogitTransform,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`[C, V]` float32 logits, and the slope of the softcap if there is one."""
    logits = _projection(hidden, matrix, ids)
    if bias is not None:
        logits += bias
    scale, slope = transform.scale, None
    if transform.softcap is not None:
        capped = torch.tanh(logits * (scale / transform.softcap))
        slope = 1.0 - capped.square()
        logits, scale = capped, transform.softcap
    scale /= transform.temperature
    if scale != 1.0:
        logits *= scale
    return logits, slope


def _projection(hidden: torch.Tensor, matrix: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`[C, V]` float32 products of states and rows of the head, those of the targets exact.

    A narrow product rounds its result: a logit of 20 by up to 0.06 in bfloat16, more than all the
    layers below. So the product starts at minus the target's logit. What is rounded is the distance
    to the target then, small for every token that matters to the sum.
    """
    if hidden.dtype.itemsize > 2:
        return (hidden @ matrix.T).float()
    exact = (hidden.float() * matrix[ids[:, 0]].float()).sum(1, keepdim=True)
    start = exact.to(hidden.dtype)
    distances = torch.addmm((-start).expand(-1, len(matrix)), hidden, matrix.T)
    logits = torch.add(distances, start.float())
    return logits.scatter_(1, ids, exact)


def _slope_times(
    weights: torch.Tensor,
    total: torch.Tensor,
    ids: torch.Tensor,
    slope: torch.Tensor | None,
    transform: LogitTransform,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient of the log-prob with respect to the raw projection.

    (onehot - p) · slope · scale / temperature. Consumes `weights`, the `[C, V]` exponentials whose
    rows sum to `total`.
    """
    delta = weights.mul_(-1.0 / total)
    delta.scatter_add_(1, ids, torch.ones_like(ids, dtype=delta.dtype))
    if slope is not None:
        delta.mul_(slope)
    factor = transform.scale / transform.temperature
    if factor != 1.0:
        delta.mul_(factor)
    return delta.to(dtype)
