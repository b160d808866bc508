"""Choose the scorer: the packed one if it agrees with the model's own forward, else the padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from alignkit.errors import ModelError
from alignkit.models.attention.packed import noting_layers
from alignkit.models.heap import is_device_fault
from alignkit.models.scoring.padded import PaddedScorer
from alignkit.models.scoring.scorer import Scorer, TokenScorer, causal_model
from alignkit.packed import PackedBatch, Segment

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest accepted difference of a log-prob, in nats. In bfloat16 two correct attention kernels
differ by up to 0.1 on random tokens, whose log-probs are near -15; a wrong mask, scale or cap
moves them by whole nats."""

MEAN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""The same for the mean absolute difference."""


def scorer_factory(
    model: Any, dtype: torch.dtype, attention: str, say: Callable[[str], None]
) -> Callable[..., Scorer]:
    """The kind of scorer that the recipe asks for, checked once for any number of them.

    Args:
        model: causal language model, adapters attached.
        dtype: compute precision.
        attention: `auto`, `packed`, or an implementation of transformers for padded batches.
        say: called with one sentence if the packed path cannot be used.

    Returns:
        A function from a head (or None) and a scorer's options to the scorer.

    Raises:
        ModelError: `packed` was requested and does not agree with the model.
    """
    if attention not in ("auto", "packed"):
        return partial(PaddedScorer, model, dtype, attention=attention)
    fault = packed_fault(model, dtype)
    if fault is None:
        return partial(TokenScorer, model, dtype)
    if attention == "packed":
        raise ModelError(
            f"packed rows do not reproduce this model: {fault}",
            hint="set model.attention to auto to train on padded rows instead",
        )
    say(f"packed rows do not reproduce this model ({fault}): training on padded rows, slower")
    return partial(PaddedScorer, model, dtype)


def build_scorer(
    model: Any,
    dtype: torch.dtype,
    attention: str,
    say: Callable[[str], None],
    head: nn.Linear | None = None,
) -> Scorer:
    """One scorer of the kind that the recipe asks for.

    Args:
        model: causal language model, adapters attached.
        dtype: compute precision.
        attention: see `scorer_factory`.
        say: called with one sentence if the packed path cannot be used.
        head: scalar head of a reward model; None scores tokens.

    Returns:
        A `TokenScorer`, or a `PaddedScorer` if requested or necessary.

    Raises:
        ModelError: `packed` was requested and does not agree with the model.
    """
    return scorer_factory(model, dtype, attention, say)(head)


def packed_fault(model: Any, dtype: torch.dtype) -> str | None:
    """What is wrong with packed rows for this model; None if they agree with its own forward.

    Raises:
        ModelError: a weight is not finite, and so is what the model says.
    """
    inner = causal_model(model)
    batch = probe_batch(int(inner.config.get_text_config().vocab_size))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = PaddedScorer(model, dtype)(batch).logprobs
            packed = TokenScorer(model, dtype)
            with torch.enable_grad(), noting_layers() as reached:  # the layers that training uses
                actual = packed(batch).logprobs.detach()
            others = batch.target_sequences > 0
            apart = packed(_with_other_start(batch)).logprobs[others]
    except (NotImplementedError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if is_device_fault(error):  # padded rows would meet it too
            raise
        return str(error).split("\n")[0][:200]
    finally:
        model.train(was_training)
    fault = _difference(inner, dtype, expected, actual, (apart, actual[others]), len(reached))
    if fault is not None:
        _require_finite(inner)
    if fault is not None and not bool(expected.isfinite().all()):
        raise ModelError(
            f"the model's log-probs of a short text are not finite in {str(dtype)[6:]}",
            hint="a value in its config.json may be wrong; in float16 large activations overflow: "
            "bfloat16 and float32 do not",
        )
    return fault


def _difference(
    inner: Any,
    dtype: torch.dtype,
    expected: torch.Tensor,
    actual: torch.Tensor,
    apart: tuple[torch.Tensor, torch.Tensor],
    reached: int,
) -> str | None:
    """Why packed log-probs are not the model's own; None if they are."""
    # Barely trained weights would hide this in the numbers.
    layers = int(inner.config.get_text_config().num_hidden_layers)
    if reached < layers:
        return f"{layers - reached} of {layers} layers mix tokens in a way of their own"
    # Experts that get another number of tokens may round otherwise; a leak moves whole nats.
    experts = any(name.endswith("experts") for name, _ in inner.named_modules())
    room = TOLERANCE[dtype] if experts else 1e-3
    if not torch.allclose(*apart, rtol=0.0, atol=room):
        return "tokens of one document reach another"
    difference = (actual - expected).abs()
    worst, mean = float(difference.max()), float(difference.mean())
    if not worst <= TOLERANCE[dtype] or not mean <= MEAN_TOLERANCE[dtype]:
        return f"log-probs differ by up to {worst:.3g} nats, {mean:.3g} on average"
    return None


def _require_finite(model: nn.Module) -> None:
    """Name the weight that makes a model's own log-probs not finite, if it is one."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise ModelError(
                f"the model's {name.replace('.base_layer', '')} holds values that are not finite",
                hint="copy the model again, or name an earlier one: nothing can be trained on it",
            )


def _with_other_start(batch: PackedBatch) -> PackedBatch:
    """The batch with other tokens in its first document."""
    ids = batch.input_ids.copy()
    first = slice(0, batch.segments[0].length)
    ids[first] = ids[first][::-1]
    return dataclasses.replace(batch, input_ids=ids)


def probe_batch(vocabulary: int) -> PackedBatch:
    """A small fixed batch with two plain sequences and one document with two branches.

    Args:
        vocabulary: token ids are drawn from below it.
    """
    rng = np.random.default_rng(0)
    lengths, ids, positions = (19, 7, 5, 6, 4), [], []
    # Two documents of one segment; then a prompt of 5 with branches of 6 and 4 tokens.
    starts = np.concatenate([[0], np.cumsum(lengths)])
    offsets = (0, 0, 0, 5, 5)
    for length, offset in zip(lengths, offsets, strict=True):
        ids.append(rng.integers(0, vocabulary, length))
        positions.append(offset + np.arange(length))
    segments = [Segment(int(starts[n]), lengths[n]) for n in range(3)]
    segments += [Segment(int(starts[n]), lengths[n], int(starts[2]), 5) for n in (3, 4)]
    rows, targets, sequences = [], [], []
    flat = np.concatenate(ids).astype(np.int64)
    for sequence, number in enumerate((0, 1, 3, 4)):
        begin, end = int(starts[number]), int(starts[number + 1])
        first = begin + 1 if number < 2 else begin
        predictors = np.arange(first, end) - 1
        if number > 2:
            predictors[0] = int(starts[3]) - 1
        rows.append(predictors)
        targets.append(flat[first:end])
        sequences.append(np.full(end - first, sequence))
    return PackedBatch(
        input_ids=flat,
        position_ids=np.concatenate(positions).astype(np.int64),
        segments=tuple(segments),
        target_rows=np.concatenate(rows).astype(np.int64),
        target_ids=np.concatenate(targets).astype(np.int64),
        target_sequences=np.concatenate(sequences).astype(np.int64),
        sequence_ends=np.asarray([int(starts[n + 1]) - 1 for n in (0, 1, 3, 4)], np.int64),
        sequence_documents=np.asarray([0, 1, 2, 2], np.int64),
        sequence_roles=np.zeros(4, np.int64),
        sequence_references=np.full(4, np.nan),
        margins=np.zeros(3),
        rows=(0, 1, 2),
    )
