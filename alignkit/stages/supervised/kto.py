"""KTO: how completions that are labelled good or bad move a language model.

The baseline is one number for a whole optimizer step, so it is measured before the step's losses
from completions of other rows under each row's prompt. If a step is one pass, a row's own and its
mismatched completion are branches of one document, whose prompt is read once; the gradient of the
second is zero. In several passes the mismatched ones are scored without gradients first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents
from alignkit.evaluation.columns import score_documents
from alignkit.evaluation.labelled import describe_labelled, say_labelled
from alignkit.models.adapters.switching import drops_out
from alignkit.models.kernels.copies import on_device
from alignkit.models.scoring.scorer import evaluating, sum_by_sequence
from alignkit.objectives.kto import kl_baseline, kto_loss
from alignkit.packed import PackedBatch, Role
from alignkit.recipe.stages.kto import KtoRecipe
from alignkit.runtime.processes import ProcessGroup
from alignkit.stages.running.hooks import LossSums, Measured, RowHooks, StepSums
from alignkit.stages.supervised.preference import LOGP_METRICS
from alignkit.stages.supervised.reference import Reference
from alignkit.stages.supervised.stage import SupervisedStage


def kto_hooks(recipe: KtoRecipe, rows: TokenDataset, reference: Reference | None) -> RowHooks:
    """Loss, baseline and evaluation of labelled completions.

    Args:
        recipe: with its defaults.
        rows: to learn from.
        reference: log-probs to compare with.
    """
    assert reference is not None  # the recipe's needs_reference
    objective = recipe.objective
    fields = objective.model_dump(exclude={"kind"})
    losses: Callable[..., torch.Tensor] = functools.partial(kto_loss, **fields)

    def measure(scorer: nn.Module, documents: Sequence[Document], alone: bool) -> Measured:
        left = None
        if alone and not drops_out(scorer):
            logps, ratios, mismatched = _both_ratios(scorer, documents, reference)
            left = functools.partial(finish, documents, logps, ratios)
        else:
            mismatched = _mismatched_ratios(scorer, documents, reference)
        sums = {
            "ratios": mismatched.detach().sum(),
            "rows": torch.tensor(float(len(documents))),
            "desirable": torch.tensor(float(sum(map(_is_desirable, documents)))),
        }
        return Measured(sums, left)

    def loss(scorer: nn.Module, documents: Sequence[Document], measured: StepSums) -> LossSums:
        return finish(documents, *_completion_ratios(scorer, documents, reference), measured)

    def finish(
        documents: Sequence[Document],
        logps: torch.Tensor,
        ratios: torch.Tensor,
        measured: StepSums,
    ) -> LossSums:
        desirable = torch.tensor([_is_desirable(d) for d in documents], device=ratios.device)
        baseline = torch.tensor(kl_baseline(measured["ratios"], measured["rows"]))
        per_row = losses(ratios, desirable, baseline.to(ratios.device))
        metrics = {}
        for name, side in (("chosen", desirable), ("rejected", ~desirable)):
            metrics[f"rewards/{name}"] = (objective.beta * ratios.detach() * side).sum()
            metrics[f"logps/{name}"] = (logps.detach() * side).sum()
        return LossSums(per_row.sum(), metrics)

    def evaluate(
        scorer: nn.Module, documents: Sequence[Document], max_tokens: int, processes: ProcessGroup
    ) -> dict[str, float]:
        score = functools.partial(_columns, reference=reference)
        columns = score_documents(score, scorer, documents, max_tokens, processes)
        return describe_labelled(columns, losses, objective.beta)

    return RowHooks(loss, [1] * len(rows), evaluate, say_labelled, measure, _finish)


def _finish(means: dict[str, float], measured: StepSums) -> dict[str, float]:
    """Means over all rows of the step -> means over the desirable and the undesirable ones.

    A side without rows in the step is not logged.
    """
    rows, good = measured["rows"], measured["desirable"]
    metrics = {"loss": means["loss"], "kl": kl_baseline(measured["ratios"], rows)}
    for name, count in (("chosen", good), ("rejected", rows - good)):
        if count:
            for metric in (f"rewards/{name}", f"logps/{name}"):
                metrics[metric] = means[metric] * rows / count
    if good and rows - good:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def _is_desirable(document: Document) -> bool:
    return document.branches[0].role is Role.CHOSEN


def _columns(
    scorer: nn.Module, documents: Sequence[Document], reference: Reference
) -> dict[str, torch.Tensor]:
    _, ratios = _completion_ratios(scorer, documents, reference)
    return {
        "ratio": ratios,
        "mismatched": _mismatched_ratios(scorer, documents, reference),
        "desirable": torch.tensor([float(_is_desirable(d)) for d in documents]),
    }


def _completion_ratios(
    scorer: nn.Module, documents: Sequence[Document], reference: Reference
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B]` log-probs of the rows' own completions, and their log-ratios."""
    own = [document.only(Role.CHOSEN, Role.REJECTED) for document in documents]
    batch = pack_documents(own)
    known = reference(scorer, batch)
    logps = _logprobs(scorer, batch)
    return logps, logps - known


def _both_ratios(
    scorer: nn.Module, documents: Sequence[Document], reference: Reference
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[B]` log-probs of the own completions, their log-ratios and those of the mismatched."""
    batch = pack_documents(documents)
    known = reference(scorer, batch)
    logps = _logprobs(scorer, batch)
    own, other = (
        on_device(np.flatnonzero(which), logps.device)
        for which in (
            batch.sequence_roles != Role.MISMATCHED,
            batch.sequence_roles == Role.MISMATCHED,
        )
    )
    ratios = logps - known
    return logps.index_select(0, own), ratios.index_select(0, own), ratios.index_select(0, other)


def _mismatched_ratios(
    scorer: nn.Module, documents: Sequence[Document], reference: Reference
) -> torch.Tensor:
    """`[B]` log-ratios of the mismatched completions; no gradient."""
    batch = pack_documents([document.only(Role.MISMATCHED) for document in documents])
    with evaluating(scorer):
        return _logprobs(scorer, batch) - reference(scorer, batch)


def _logprobs(scorer: nn.Module, batch: PackedBatch) -> torch.Tensor:
    scores: Any = scorer(batch)
    return sum_by_sequence(scores.logprobs, batch)


KTO = SupervisedStage(
    kto_hooks,
    {
        "kl": "baseline: mean log-ratio of completions of other prompts, at least 0, in nats",
        "rewards/chosen": "mean implicit reward of the step's desirable completions",
        "rewards/rejected": "mean implicit reward of the step's undesirable completions",
        "rewards/margins": "their difference, in steps with both",
        **LOGP_METRICS,
    },
)
