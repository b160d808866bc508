"""DPO and its relatives: recipe -> pairs -> reference -> steps -> adapter and merged model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents
from alignkit.evaluation.pairs import PairScores
from alignkit.models.scoring.scorer import sum_by_sequence
from alignkit.objectives.preference import PREFERENCE_OBJECTIVES, PairLogprobs
from alignkit.recipe.stages.schema import DpoRecipe, needs_reference
from alignkit.stages.inputs.rows import load_rows
from alignkit.stages.running.finish import RunSummary, finish_run
from alignkit.stages.running.session import RunOptions, Session
from alignkit.stages.running.steps import run_steps
from alignkit.stages.supervised.pairs import ScorePairs, pair_stage, split_roles
from alignkit.stages.supervised.reference import Reference, build_reference


def run_preference(recipe: DpoRecipe, options: RunOptions) -> RunSummary | None:
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
        reference = None
        if needs_reference(recipe):
            reference, rows = build_reference(session, scorer, rows, plan)
        stage = pair_stage(preference_scores(recipe.objective, reference), len(rows.train))
        run, first_step = session.start(rows, plan, stage, scorer)
        del scorer  # the run alone holds the weights, so that merging can let them go
        run_steps(run, first_step)
        return finish_run(session, run, rows)


def preference_scores(objective: Any, reference: Reference | None) -> ScorePairs:
    """Forward pass and objective of pairs.

    Args:
        objective: a kind of the family with its own fields.
        reference: log-probs to compare with; None for kinds without.

    Returns:
        A function from scorer and pairs to their losses, implicit rewards and `logps/chosen` and
        `logps/rejected`, the log-probs of whole answers.
    """
    fields = objective.model_dump(exclude={"kind"})
    scale = fields.get("beta", fields.get("tau"))
    kind = PREFERENCE_OBJECTIVES[objective.kind]

    def score(scorer: nn.Module, documents: Sequence[Document]) -> PairScores:
        batch = pack_documents(documents)
        known = split_roles(reference(scorer, batch), batch) if reference is not None else ()
        scores: Any = scorer(batch)
        chosen, rejected = split_roles(sum_by_sequence(scores.logprobs, batch), batch)
        ones = torch.ones_like(scores.logprobs)
        pairs = PairLogprobs(
            chosen, rejected, *split_roles(sum_by_sequence(ones, batch), batch), *known
        )
        rewards = kind.rewards(pairs, scale)
        metrics = {"logps/chosen": chosen, "logps/rejected": rejected}
        return PairScores(kind.loss(pairs, **fields), *rewards, metrics)

    return score
