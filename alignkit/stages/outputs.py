"""What a run leaves behind: adapter/, merged/ and a summary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.data.dataset import TokenDataset
from alignkit.models.adapters import save_adapter
from alignkit.models.loading import stored_dtype
from alignkit.models.merging import MergeReport, merge_adapter, write_dense
from alignkit.models.scorer import causal_model
from alignkit.packed import IntArray
from alignkit.recipe.schema import FullSpec
from alignkit.runtime.devices import release_memory
from alignkit.runtime.metrics import read_metrics
from alignkit.stages.prepare import Rows
from alignkit.stages.session import Session
from alignkit.stages.steps import Run


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Args:
        output: run folder.
        steps: done in all.
        loss: of the last step.
        before: held-out values before training; empty without held-out rows.
        after: held-out values at the end.
        merge: of the merged model; None for full weights or `merge: false`.
    """

    output: str
    steps: int
    loss: float
    before: dict[str, float]
    after: dict[str, float]
    merge: MergeReport | None

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        return dataclasses.asdict(self)


def finish_run(session: Session, run: Run, rows: Rows) -> RunSummary | None:
    """Write adapter and merged model, verify them, and record the end.

    Args:
        session: of the run.
        run: after its last step; its weights are let go here.
        rows: the tokenizer, and real rows for the check.

    Returns:
        The summary; None on every process but the first.
    """
    accelerator = session.accelerator
    accelerator.wait_for_everyone()
    run.progress.close()
    folder = session.folder
    merge = None
    if folder is not None:
        model = accelerator.unwrap_model(run.scorer).model
        merge = _write_models(session, model, run, rows)
    accelerator.wait_for_everyone()
    if folder is None:
        return None
    if run.metrics is not None:
        run.metrics.close()
    summary = _summarise(folder.path, run.plan.steps, merge)
    folder.finish("finished", summary=summary.to_json())
    return summary


def _write_models(session: Session, model: Any, run: Run, rows: Rows) -> MergeReport | None:
    recipe, output = session.recipe, session.output
    stops = rows.train.report.stop_tokens
    if isinstance(recipe.adapter, FullSpec):
        dtype = stored_dtype(rows.base)
        session.say(f"writing all weights to {output / 'merged'}")
        write_dense(causal_model(model), rows.tokenizer, output / "merged", dtype, stops)
        return None
    save_adapter(model, output / "adapter", rows.base.name)
    rows.tokenizer.save_pretrained(output / "adapter")
    del model
    run.scorer = run.optimizer = None
    session.accelerator.free_memory()
    release_memory()
    if not recipe.merge:
        return None
    session.say("merging and checking against base + adapter")
    return merge_adapter(
        rows.base,
        output / "adapter",
        output / "merged",
        rows=check_rows(rows.held_out or rows.train),
        dtype=stored_dtype(rows.base),
        tokenizer=rows.tokenizer,
        stop_tokens=stops,
        overwrite=True,
    )


def check_rows(dataset: TokenDataset) -> Sequence[IntArray]:
    """Token ids of the first eight rows of a dataset."""
    picked = [dataset[item].branches[0].ids for item in range(min(8, len(dataset)))]
    return [np.asarray(ids, np.int64) for ids in picked]


def _summarise(output: Path, steps: int, merge: MergeReport | None) -> RunSummary:
    metrics = read_metrics(output / "metrics.jsonl")
    evaluations = [m for m in metrics if "eval/loss" in m]
    losses = [m["loss"] for m in metrics if "loss" in m]

    def values(found: dict[str, Any]) -> dict[str, float]:
        return {k.removeprefix("eval/"): v for k, v in found.items() if k.startswith("eval/")}

    return RunSummary(
        output=str(output),
        steps=steps,
        loss=losses[-1] if losses else float("nan"),
        before=values(evaluations[0]) if evaluations else {},
        after=values(evaluations[-1]) if evaluations else {},
        merge=merge,
    )
