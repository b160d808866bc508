"""Pipeline -> its stages, one after another: what is done is skipped, what was stopped is resumed.

A stage is done if its run finished, from the same inputs that it would have now: see
`fingerprints`. It is started with a record in pipeline.json, so a kill at any moment leaves either
the record of a run that can be resumed, or the mark of the older run that it was to replace.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from alignkit.errors import AlignkitError, Interrupted, RecipeError, RunError
from alignkit.models.heap import release_memory
from alignkit.pipelines.state import PipelineState, Record
from alignkit.pipelines.steps import RUNNERS, StageOutput
from alignkit.recipe.reading.pipeline import Pipeline, Step
from alignkit.stages.inputs.fingerprints import describe_changes
from alignkit.stages.running.session import RunOptions
from alignkit.terminal import print_line


@dataclass
class Result:
    """What happened to a stage.

    Args:
        name: of the stage in the pipeline.
        stage: `sft`, `reward`, …: the recipe's stage, or the kind of the step.
        output: the folder that it writes.
        status: `done`, `resumed`, `skipped`, `failed`, `interrupted` or `not run`.
        seconds: that it took this time.
        numbers: its results, those of an earlier run if it was skipped.
    """

    name: str
    stage: str
    output: str
    status: str = "not run"
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)


class PipelineRun:
    """A pipeline whose folder this process owns until `run` returns.

    Args:
        pipeline: validated.
        options: `overwrite` replaces runs that the pipeline did not make, and changed ones outside
            its folder; `resume` is not used.

    Raises:
        AlignkitError: a stage could not run, or would replace a run that is not the pipeline's;
            nothing has been run.
    """

    def __init__(self, pipeline: Pipeline, options: RunOptions) -> None:
        self.pipeline, self.options = pipeline, options
        _raise_all([_problem(RUNNERS[step.kind].check, step) for step in pipeline.steps])
        self.results = [
            Result(step.name, getattr(step.settings, "stage", step.kind), step.output)
            for step in pipeline.steps
        ]
        folder = Path(pipeline.output)
        self.state = PipelineState(folder, pipeline.path, overwrite=options.overwrite)
        if not options.overwrite:
            try:
                _raise_all([_problem(self._check_known, step) for step in pipeline.steps])
            except RecipeError:
                self.state.close()
                raise

    def run(self) -> None:
        """Run every stage that is not done; `results` show how far it came.

        Raises:
            AlignkitError: a stage failed; the later ones have not run.
            Interrupted: the user pressed Ctrl-C, or a scheduler sent SIGTERM.
        """
        try:
            for number, (step, result) in enumerate(
                zip(self.pipeline.steps, self.results, strict=True), start=1
            ):
                head = f"[{number}/{len(self.results)}] {step.name}: {step.output}"
                self._say(head)
                started = time.monotonic()
                try:
                    self._run_step(step, result)
                except (Interrupted, KeyboardInterrupt) as error:
                    result.status = "interrupted"
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    hint = "run the same command again to resume"
                    code = error.exit_code
                    raise Interrupted(error.message, hint=hint, exit_code=code) from None
                except BaseException:
                    result.status = "failed"
                    raise
                finally:
                    result.seconds = time.monotonic() - started
        finally:
            self.state.close()

    def _run_step(self, step: Step, result: Result) -> None:
        runner, settings = RUNNERS[step.kind], step.settle()
        inputs, output = runner.inputs(settings), runner.look(settings)
        record = self._record(step)
        action, why = self._decide(step, record, output, inputs)
        if action == "skip" and output is not None and record is not None:
            self._say("nothing has changed", "skipped")
            if record.status != "finished":  # killed after the run and before this was written
                mark, numbers = output.mark, output.numbers
                record = replace(record, status="finished", mark=mark, numbers=numbers)
                self.state.write(step.name, record)
            result.status, result.numbers = "skipped", record.numbers
            return
        if action == "replace":
            print_line(f"{step.output}: {why}", "replaced")  # --quiet does not hide it
        elif why:
            self._say(why, "note")
        if action == "resume" and record is not None:
            record = replace(record, status="running", mark="")
        else:
            older = output.mark if output is not None else ""
            record = Record(step.output, inputs, replaces=older)
        self.state.write(step.name, record)
        started = time.monotonic()
        options = replace(
            self.options,
            resume=action == "resume",
            overwrite=action == "replace",
            reads=step.document.files,
        )
        status, numbers, mark = "failed", {}, ""
        try:
            numbers = runner.run(settings, options)
            output = runner.look(settings)
            status, mark = "finished", "" if output is None else output.mark
        except (Interrupted, KeyboardInterrupt):
            status = "interrupted"
            raise
        finally:
            seconds = round(record.seconds + time.monotonic() - started, 3)
            ended = replace(record, status=status, seconds=seconds, mark=mark, numbers=numbers)
            self.state.write(step.name, ended)
            _release()
        result.status = "resumed" if action == "resume" else "done"
        result.numbers = numbers

    def _decide(
        self, step: Step, record: Record | None, output: StageOutput | None, inputs: dict[str, str]
    ) -> tuple[str, str]:
        """`run`, `replace`, `resume` or `skip`, and why."""
        if output is None:
            gone = record is not None and record.status == "finished"
            return "run", "its output is gone: it runs again" if gone else ""
        if record is None or (record.mark and record.mark != output.mark):
            if not self.options.overwrite:
                raise _foreign(step)
            return "replace", "holds a run that this pipeline did not make"
        changes = describe_changes(record.inputs, inputs)
        if changes:
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            why = f"{'; '.join(changes[:3])}{more}"
        elif output.mark == record.replaces:
            why = "it was to be replaced when the pipeline was stopped"
        elif output.status == "finished":
            return "skip", ""
        elif output.resumable:
            return "resume", ""
        else:
            why = "its run cannot be resumed"
        inside = Path(step.output).resolve().is_relative_to(Path(self.pipeline.output).resolve())
        if not (inside or self.options.overwrite):
            raise RunError(
                f"{step.output} holds an older run of stage {step.name}: {why}",
                hint="it is outside the pipeline's folder: add --overwrite to replace it",
            )
        return "replace", why

    def _record(self, step: Step) -> Record | None:
        record = self.state.records.get(step.name)
        return record if record is not None and record.output == step.output else None

    def _check_known(self, step: Step) -> None:
        output, record = RUNNERS[step.kind].look(step.settings), self._record(step)
        if output is not None and (record is None or (record.mark and record.mark != output.mark)):
            raise _foreign(step)

    def _say(self, text: str, label: str = "") -> None:
        if not self.options.quiet:
            print_line(text, label)


def _foreign(step: Step) -> RunError:
    return RunError(
        f"{step.output} holds a run that this pipeline did not make",
        hint="add --overwrite to replace it, or choose another output for the pipeline",
    )


def _problem(check: Callable[[Step], None], step: Step) -> AlignkitError | None:
    try:
        check(step)
    except AlignkitError as error:
        return error
    return None


def _raise_all(problems: list[AlignkitError | None]) -> None:
    errors = [problem for problem in problems if problem is not None]
    if errors:
        raise RecipeError(errors)


def _release() -> None:
    """Leave nothing of a stage for the next one: memory, its peak, accelerate's precision."""
    gc.collect()
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: the peak starts again at what is held now
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    AcceleratorState._reset_state()
