"""What a run leaves behind: adapter/, merged/ and a summary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from alignkit.data.tokenize import answer_ends
from alignkit.errors import RoundingError
from alignkit.models.adapters.files import TrainedOver, save_adapter
from alignkit.models.base.identity import weights_fingerprint
from alignkit.models.base.loading import stored_dtype
from alignkit.models.base.transformers4 import add_older_names
from alignkit.models.heap import release_memory
from alignkit.models.merging.merge import merge_adapter, write_dense
from alignkit.models.merging.report import MergeReport
from alignkit.models.rewards.classifier import ClassifierReport, merge_reward, write_reward
from alignkit.models.rewards.head import RewardStatistics
from alignkit.models.scoring.scorer import causal_model
from alignkit.models.weights.writing import replace_model
from alignkit.recipe.adapters import FullSpec, is_mergeable
from alignkit.recipe.planning.plan import Plan
from alignkit.runtime.metrics import MetricsFile, read_metrics
from alignkit.runtime.progress import StepProgress
from alignkit.stages.inputs.rows import AnyRows
from alignkit.stages.running.best import Best
from alignkit.stages.running.card import write_card
from alignkit.stages.running.session import Session


class FinishedRun(Protocol):
    """What a run of any stage shows after its last step."""

    plan: Plan
    metrics: MetricsFile | None
    progress: StepProgress
    best: Best
    scorer: Any

    @property
    def written_head(self) -> Any:
        """The scalar head of the written model, or None."""

    @property
    def say(self) -> Callable[[dict[str, float]], str]:
        """Held-out values in one line."""

    def release(self) -> None:
        """Let go of all weights, so that a merge has their memory."""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Args:
        output: run folder.
        steps: done in total.
        loss: of the last step.
        before: held-out values before training; empty without held-out rows.
        after: held-out values of the written model.
        merge: of the merged model; None for a language model's full weights or `merge: false`.
        held_out: before and after in one line; empty without held-out rows.
        skipped_steps: steps without a finite loss or gradient, of which no weight has moved.
        best: metric, step and value of the evaluation whose weights were written, and the last
            value; None if those of the last step were.
        ended_early: why the run ended before its last step; empty if it did not.
    """

    output: str
    steps: int
    loss: float
    before: dict[str, float]
    after: dict[str, float]
    merge: MergeReport | ClassifierReport | None
    held_out: str = ""
    skipped_steps: int = 0
    best: dict[str, Any] | None = None
    ended_early: str = ""

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        return dataclasses.asdict(self)


def finish_run(
    session: Session, run: FinishedRun, rows: AnyRows, statistics: RewardStatistics | None = None
) -> RunSummary | None:
    """Write adapter and merged model, verify them, and record the end.

    Args:
        session: of the run.
        run: after its last step; its weights are released here.
        rows: the tokenizer, and real rows for the check.
        statistics: of a reward model, stored with it.

    Returns:
        The summary; None on every process but the first.
    """
    accelerator = session.accelerator
    accelerator.wait_for_everyone()
    run.progress.close()
    folder = session.folder
    merge = None
    if folder is not None:
        merge = _write_models(session, run, rows, statistics)
    else:
        run.release()
    # The wrapper of several processes goes before their group: as its last owner it would wait,
    # holding the interpreter, for a thread of the group that waits for the interpreter.
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    if folder is None:
        return None
    if run.metrics is not None:
        run.metrics.close()
    summary = _summarise(folder.path, run, merge)
    whole = (folder.path / "merged").is_dir()
    if whole or not is_mergeable(session.recipe.adapter):
        write_card(
            folder.path / ("merged" if whole else "adapter"),
            rows.base,
            recipe=session.recipe,
            before=summary.before,
            after=summary.after,
            report=merge,
            classifier=session.recipe.scalar_head,
        )
    folder.finish("finished", summary=summary.to_json())
    return summary


def _write_models(
    session: Session, run: FinishedRun, rows: AnyRows, statistics: RewardStatistics | None
) -> MergeReport | ClassifierReport | None:
    recipe, output = session.recipe, session.output
    scorer = session.accelerator.unwrap_model(run.scorer)
    model, head = scorer.model, run.written_head
    settings: dict[str, Any] = {
        "rows": rows.checks,
        "dtype": stored_dtype(rows.base),
        "stop_tokens": rows.stop_tokens
        if recipe.scalar_head
        else answer_ends(rows.tokenizer, rows.stop_tokens),
    }
    if isinstance(recipe.adapter, FullSpec):
        session.say(f"writing all weights to {output / 'merged'}")
        written = _write_full(model, head, rows, output / "merged", settings, statistics)
        run.release()
        return written
    _write_adapter(session, model, head, rows, statistics)
    del scorer, model
    run.release()
    session.accelerator.free_memory()
    release_memory()
    if not is_mergeable(recipe.adapter):
        session.say(
            f"the prefix is in {output / 'adapter'}; there is no merged/, because no weight can "
            "hold it: alignkit and PEFT read it together with its base"
        )
    if not recipe.merge:
        return None
    session.say("merging and checking against base + adapter")
    merge = merge_adapter if head is None else merge_reward
    folders = rows.base, output / "adapter", output / "merged"
    settings |= {"tokenizer": rows.tokenizer, "overwrite": True}
    try:
        report = merge(*folders, **settings)
    except RoundingError as error:
        if settings["dtype"] == torch.float32:
            raise
        # Nobody asked for narrow weights: a finished run must leave a faithful model.
        session.say(f"{error.message}: merging into float32 weights instead")
        report = merge(*folders, **{**settings, "dtype": torch.float32})
    if report.quantized is not None:
        session.say(report.quantized.line())
    return report


def _write_adapter(
    session: Session, model: Any, head: Any, rows: AnyRows, statistics: RewardStatistics | None
) -> None:
    """The adapter's folder as PEFT reads it, and what it was trained over."""
    spec, name = session.recipe.model, rows.base.name
    over = TrainedOver(
        name,
        weights_fingerprint(rows.base),
        spec.quantization,
        spec.dtype,
        None if spec.rope_scaling is None else spec.rope_scaling.model_dump(),
        spec.add_tokens,
        getattr(session.recipe.adapter, "init", "default"),
        session.accelerator.device.type,
    )
    with replace_model(session.output / "adapter") as adapter:
        save_adapter(model, adapter, name, head, trained_over=over)
        rows.tokenizer.save_pretrained(adapter)
        add_older_names(adapter)
        if statistics is not None:
            statistics.save(adapter)


def _write_full(
    model: Any,
    head: Any,
    rows: AnyRows,
    folder: Path,
    settings: dict[str, Any],
    statistics: RewardStatistics | None,
) -> ClassifierReport | None:
    if head is None:
        stops = settings["stop_tokens"]
        write_dense(causal_model(model), rows.tokenizer, folder, settings["dtype"], stops)
        return None
    report = write_reward(model, head, rows.tokenizer, folder, **settings)
    if statistics is not None:
        statistics.save(folder)
    return report


def _summarise(
    output: Path, run: FinishedRun, merge: MergeReport | ClassifierReport | None
) -> RunSummary:
    metrics = read_metrics(output / "metrics.jsonl")
    evaluations = [m for m in metrics if any(key.startswith("eval/") for key in m)]
    steps = [m for m in metrics if m.get("loss") is not None]

    def values(line: dict[str, Any]) -> dict[str, float]:
        return {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")}

    best, say = run.best, run.say
    written = [m for m in evaluations if m["step"] == best.held] or evaluations
    before = values(evaluations[0]) if evaluations else {}
    after = values(written[-1]) if written else {}
    early = best.ending(run.plan.steps)
    return RunSummary(
        output=str(output),
        steps=best.seen if early else run.plan.steps,
        loss=steps[-1]["loss"] if steps else float("nan"),
        before=before,
        after=after,
        merge=merge,
        skipped_steps=max((m.get("skipped_steps", 0) for m in metrics), default=0),
        held_out=f"before: {say(before)}\nafter:  {say(after)}" if evaluations else "",
        best=best.to_json(),
        ended_early=early,
    )
