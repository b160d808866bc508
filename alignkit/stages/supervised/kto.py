"""KTO: recipe -> labelled answers -> reference and baseline -> steps -> adapter and merged model.

The baseline is one number for a whole optimizer step, so it is measured before the step's losses:
a pass without gradients scores the answers of other rows under each row's prompt. As a branch of
the training pass they would cost a backward pass that is always zero; where the reference is scored
beforehand, both answers are branches of one document.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents
from alignkit.evaluation.columns import score_documents
from alignkit.evaluation.labelled import describe_labelled, say_labelled
from alignkit.models.scoring.scorer import evaluating, sum_by_sequence
from alignkit.objectives.kto import kl_baseline, kto_loss
from alignkit.packed import PackedBatch, Role
from alignkit.recipe.objectives import KtoSpec
from alignkit.recipe.stages.schema import KtoRecipe
from alignkit.runtime.processes import ProcessGroup
from alignkit.stages.inputs.rows import load_rows
from alignkit.stages.running.finish import RunSummary, finish_run
from alignkit.stages.running.session import RunOptions, Session
from alignkit.stages.running.stage import LossSums, Measured, Stage
from alignkit.stages.running.steps import run_steps
from alignkit.stages.supervised.reference import Reference, build_reference


def run_kto(recipe: KtoRecipe, options: RunOptions) -> RunSummary | None:
    """Run the stage from recipe to merged checkpoint; see `run_sft`.

    Args:
        recipe: with its defaults.
        options: of the command line.
    """
    session = Session(recipe, options)
    with session.running() as base:
        rows = load_rows(recipe, base)
        plan = session.plan(rows)
        scorer = session.build_scorer(rows, plan)
        session.begin(rows, plan)
        reference, rows = build_reference(session, scorer, rows, plan)
        stage = kto_stage(recipe.objective, reference, len(rows.train))
        run, first_step = session.start(rows, plan, stage, scorer)
        del scorer  # the run alone holds the weights, so that merging can let them go
        run_steps(run, first_step)
        return finish_run(session, run, rows)


def kto_stage(objective: KtoSpec, reference: Reference, num_items: int) -> Stage:
    """The parts of the stage.

    Args:
        objective: its weights.
        reference: log-probs to compare with.
        num_items: training rows.
    """
    fields = objective.model_dump(exclude={"kind"})
    losses = functools.partial(kto_loss, **fields)

    def measure(scorer: nn.Module, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
        ratios = _mismatched_ratios(scorer, documents, reference)
        return {
            "ratios": ratios.sum(),
            "rows": torch.tensor(float(len(documents))),
            "desirable": torch.tensor(float(sum(map(_is_desirable, documents)))),
        }

    def loss(scorer: nn.Module, documents: Sequence[Document], measured: Measured) -> LossSums:
        logps, ratios = _answer_ratios(scorer, documents, reference)
        desirable = torch.tensor([_is_desirable(d) for d in documents], device=ratios.device)
        baseline = torch.tensor(kl_baseline(measured["ratios"], measured["rows"]))
        found = losses(ratios, desirable, baseline.to(ratios.device))
        metrics = {}
        for name, side in (("chosen", desirable), ("rejected", ~desirable)):
            metrics[f"rewards/{name}"] = (objective.beta * ratios.detach() * side).sum()
            metrics[f"logps/{name}"] = (logps.detach() * side).sum()
        return LossSums(found.sum(), metrics)

    def evaluate(
        scorer: nn.Module, documents: Sequence[Document], budget: int, processes: ProcessGroup
    ) -> dict[str, float]:
        score = functools.partial(_columns, reference=reference)
        columns = score_documents(score, scorer, documents, budget, processes)
        return describe_labelled(columns, losses, objective.beta)

    return Stage(loss, [1] * num_items, evaluate, say_labelled, measure, _finish)


def _finish(means: dict[str, float], measured: Measured) -> dict[str, float]:
    """Means over all rows of the step -> means over the desirable and the undesirable ones.

    A side that the step has no row of is not logged.
    """
    rows, good = measured["rows"], measured["desirable"]
    found = {"loss": means["loss"], "kl": kl_baseline(measured["ratios"], rows)}
    for name, count in (("chosen", good), ("rejected", rows - good)):
        if count:
            for metric in (f"rewards/{name}", f"logps/{name}"):
                found[metric] = means[metric] * rows / count
    if good and rows - good:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def _is_desirable(document: Document) -> bool:
    return document.branches[0].role is Role.CHOSEN


def _columns(
    scorer: nn.Module, documents: Sequence[Document], reference: Reference
) -> dict[str, torch.Tensor]:
    _, ratios = _answer_ratios(scorer, documents, reference)
    return {
        "ratio": ratios,
        "mismatched": _mismatched_ratios(scorer, documents, reference),
        "desirable": torch.tensor([float(_is_desirable(d)) for d in documents]),
    }


def _answer_ratios(
    scorer: nn.Module, documents: Sequence[Document], reference: Reference
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B]` log-probs of the rows' own answers, and their log-ratios."""
    own = [document.only(Role.CHOSEN, Role.REJECTED) for document in documents]
    batch = pack_documents(own)
    known = reference(scorer, batch)
    logps = _logprobs(scorer, batch)
    return logps, logps - known


def _mismatched_ratios(
    scorer: nn.Module, documents: Sequence[Document], reference: Reference
) -> torch.Tensor:
    """`[B]` log-ratios of the mismatched answers; no gradient."""
    batch = pack_documents([document.only(Role.MISMATCHED) for document in documents])
    with evaluating(scorer):
        return _logprobs(scorer, batch) - reference(scorer, batch)


def _logprobs(scorer: nn.Module, batch: PackedBatch) -> torch.Tensor:
    scores: Any = scorer(batch)
    return sum_by_sequence(scores.logprobs, batch)
