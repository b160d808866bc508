"""What a stage brings to the loop: its loss, its weights and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from alignkit.data.documents import Document
from alignkit.errors import TrainingError
from alignkit.runtime.processes import ProcessGroup

StepSums = dict[str, float]
"""Sums over a whole optimizer step that a loss needs before any of its micro-batches."""


@dataclass(frozen=True)
class LossSums:
    """What a stage computes from one micro-batch.

    Args:
        loss: scalar tensor, the sum of the losses; divided by the step's weight later.
        metrics: name -> scalar tensor, a sum that is divided by the same weight.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What a stage measures from one micro-batch before the step's losses.

    Args:
        sums: name -> scalar tensor, added up over the step and all processes.
        loss: what is left of the micro-batch's loss once they are known; None if nothing was
            scored for it.
    """

    sums: dict[str, torch.Tensor]
    loss: Callable[[StepSums], LossSums] | None = None


@dataclass(frozen=True)
class RowHooks:
    """What a stage that learns from rows brings to each step.

    Args:
        loss: forward pass and objective of one micro-batch, with the sums of `measure`.
        weights: weight of each training item; the step's loss is the sum of its losses over the
            sum of its weights.
        evaluate: values of held-out rows: scorer, rows, token budget and processes.
        say: these values in one line.
        measure: of one micro-batch, before the step's first loss, with gradients only if it is the
            process's whole step, as the last argument says; None if the loss needs nothing.
        finish: the step's means and what was measured -> the metrics that are logged; None logs
            the means.
    """

    loss: Callable[[nn.Module, Sequence[Document], StepSums], LossSums]
    weights: Sequence[int]
    evaluate: Callable[[nn.Module, Sequence[Document], int, ProcessGroup], dict[str, float]]
    say: Callable[[dict[str, float]], str]
    measure: Callable[[nn.Module, Sequence[Document], bool], Measured] | None = None
    finish: Callable[[dict[str, float], StepSums], dict[str, float]] | None = None


@dataclass(frozen=True)
class StageHooks:
    """What a stage does at each place of the loop.

    Args:
        dry_run: before the first step of this process: finds what would fail later.
        train: one step, from 0, with its random numbers seeded and its learning rates set; returns
            the metrics `loss`, `tokens` and others.
        evaluate: held-out values after this many steps, and one line about them; None without
            held-out rows.
        save: a checkpoint after this many steps.
        rows: `file:line` of the first rows of a step, from 0.
        halt: an error that ends the run after this step, or None.
    """

    dry_run: Callable[[], None]
    train: Callable[[int], dict[str, float]]
    evaluate: Callable[[int], tuple[dict[str, float], str] | None]
    save: Callable[[int], None]
    rows: Callable[[int], Sequence[str]]
    halt: Callable[[], TrainingError | None] = lambda: None
