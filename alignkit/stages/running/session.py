"""A training session: who may write, what it prints first, where it continues, how it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from alignkit.data.report import describe_rows
from alignkit.errors import FileError, Interrupted
from alignkit.models.adapters.attach import attach_adapter, trainable_report
from alignkit.models.adapters.continued import adapter_folder
from alignkit.models.adapters.files import has_head, put_weights
from alignkit.models.adapters.switching import recompute_layers
from alignkit.models.base.loading import DTYPES, BaseModel, load_model, token_rows
from alignkit.models.rewards.head import freeze_unused_head, new_head, read_head
from alignkit.models.scoring.selfcheck import build_scorer
from alignkit.recipe.adapters import FullSpec, b_rate
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.stages.base import Recipe
from alignkit.runtime.checkpoint import find_checkpoint, load_checkpoint
from alignkit.runtime.devices import build_accelerator
from alignkit.runtime.loss_scale import LossScale
from alignkit.runtime.metrics import MetricsFile
from alignkit.runtime.optim import TrainedPart, build_optimizer
from alignkit.runtime.processes import process_group
from alignkit.runtime.progress import StepProgress
from alignkit.stages.inputs.base import start_model
from alignkit.stages.inputs.rows import AnyRows, Rows, keep_plan, plan_run
from alignkit.stages.running.adapter_start import find_adapter_start
from alignkit.stages.running.bad_steps import BadSteps
from alignkit.stages.running.batches import Batches
from alignkit.stages.running.best import Best
from alignkit.stages.running.hooks import RowHooks
from alignkit.stages.running.loop import Loop
from alignkit.stages.running.memory import SMALLER, within_memory
from alignkit.stages.running.record import describe_inputs, read_record, require_same_inputs
from alignkit.stages.running.run_folder import RunFolder, check_output, own_folder
from alignkit.stages.running.steps import Run
from alignkit.terminal import print_line


@dataclass(frozen=True)
class RunOptions:
    """What the command line sets besides the recipe.

    Args:
        resume: continue from the newest whole checkpoint.
        overwrite: replace what the run folder holds.
        quiet: print no progress.
        command: as typed, for run.json.
        reads: the recipe's own files, which are not deleted.
    """

    resume: bool = False
    overwrite: bool = False
    quiet: bool = False
    command: str = ""
    reads: tuple[Path, ...] = ()


class Session:
    """One run of one stage in this process.

    Args:
        recipe: with its defaults.
        options: of the command line.

    Raises:
        RunError: the run folder cannot be used; nothing has been written.
    """

    def __init__(self, recipe: Recipe, options: RunOptions) -> None:
        self.recipe, self.options = recipe, options
        self.output: Path = check_output(
            recipe, resume=options.resume, overwrite=options.overwrite, reads=options.reads
        )
        self.before = read_record(self.output) if options.resume else None
        trackers = recipe.training.trackers
        self.accelerator: Accelerator = build_accelerator(trackers, self.output)
        self.leads = bool(self.accelerator.is_main_process)
        self.quiet = options.quiet or not self.leads
        self.folder: RunFolder | None = None
        self.about: dict[str, Any] = {}  # for run.json, collected before the first step
        for sentence in self.before.warnings() if self.before is not None else ():
            self.say(sentence, "warning")

    def say(self, text: str, label: str = "") -> None:
        """Print one line for the user."""
        if not self.quiet:
            print_line(text, label)

    def say_damaged(self, name: str, lines: int) -> None:
        """Warn of lines in a file of the run that cannot be read."""
        if lines:
            self.say(f"damaged lines of {name} moved to {name}.damaged: {lines}", "warning")

    def plan(self, rows: Rows) -> Plan:
        """The plan of this run; a resumed run keeps its micro-batches."""
        return self.announce(plan_run(self.recipe, rows, self.accelerator.num_processes), rows)

    def announce(self, plan: Plan, rows: AnyRows) -> Plan:
        """Print what was read and planned.

        Args:
            plan: as made now.
            rows: their reports are shown.

        Returns:
            The plan; a resumed run keeps the micro-batches it was started with.
        """
        if self.before is not None and self.before.plan:
            plan = keep_plan(plan, self.before.plan)
        for name, dataset in (("train", rows.train), ("held out", rows.held_out)):
            if dataset is not None:
                head, *notes = describe_rows(name, dataset.report)
                self.say(head)
                for note in notes:
                    self.say(note, "note")
        for line in plan.lines():
            self.say(line)
        for warning in plan.warnings:
            self.say(warning, "warning")
        return plan

    @property
    def weights_dtype(self) -> torch.dtype:
        """Dtype of the weights: float32 if they are trained, else the recipe's."""
        full = isinstance(self.recipe.adapter, FullSpec)
        return torch.float32 if full else DTYPES[self.recipe.model.dtype]

    def build_scorer(self, rows: Rows, plan: Plan) -> nn.Module:
        """Weights, adapter and checked scorer, in training mode.

        Args:
            rows: say where the weights are; an adapter may start from what they hold.
            plan: whether activations are recomputed.
        """
        spec, base, scalar_head = self.recipe.model, rows.base, self.recipe.scalar_head
        device = self.accelerator.device
        with within_memory("the model", hint=SMALLER):
            model = load_model(base, self.weights_dtype, device, spec.quantization)
        added = token_rows(base)[0] if spec.add_tokens else []
        before = adapter_folder(self.recipe.adapter)
        started, given = find_adapter_start(self, model, rows, plan)
        model = attach_adapter(model, started, self.recipe.seed, added, given)
        head = new_head(model, self.recipe.seed) if scalar_head else None
        if before is not None:
            put_weights(model, before)
            if head is not None and has_head(before):
                head.load_state_dict(read_head(before).state_dict())
        if scalar_head:
            freeze_unused_head(model)
        with within_memory("the model with its adapter", hint=SMALLER):
            scorer = build_scorer(model, DTYPES[spec.dtype], spec.attention, self.say, head)
        self.about["attention"] = scorer.attention
        if plan.gradient_checkpointing:
            recompute_layers(model)
            if hasattr(model, "enable_input_require_grads"):
                model.enable_input_require_grads()
        self.say(trainable_report(scorer).line())
        return scorer.train()

    @contextlib.contextmanager
    def running(self) -> Iterator[BaseModel]:
        """Own the run folder, from before weights are read; record how the run ends.

        Yields:
            The model that the recipe starts from.

        Raises:
            RunError: another process owns the folder.
        """
        try:
            self.folder = own_folder(self.output, self.leads, process_group(self.accelerator))
            yield start_model(self.recipe.model)
        except BaseException as error:
            if self.folder is not None:
                status = "interrupted" if isinstance(error, Interrupted) else "failed"
                with contextlib.suppress(OSError, FileError):  # the disk is full: `error` says so
                    self.folder.finish(status)
            raise
        finally:
            if self.accelerator.num_processes > 1:
                time.sleep(0.1)  # the group's thread needs the interpreter to end its last work
            self.accelerator.end_training()
            if self.folder is not None:
                self.folder.close()

    def begin(self, rows: AnyRows, plan: Plan) -> None:
        """Write the run's files into the folder, now that its weights could be loaded.

        Args:
            rows: of the run.
            plan: what is going to be executed.

        Raises:
            RunError: a resumed run was started with other weights or rows.
        """
        about = describe_inputs(self.recipe, rows) | {"command": self.options.command}
        if self.before is not None:
            stored = self.before.about
            require_same_inputs(about, stored)
            self.about = {k: stored[k] for k in ("start",) if k in stored} | self.about
        if self.folder is not None:
            about, overwrite = about | self.about, self.options.overwrite
            self.folder.describe(self.recipe, plan, about, overwrite=overwrite)

    def start(self, rows: Rows, plan: Plan, hooks: RowHooks, scorer: nn.Module) -> tuple[Run, int]:
        """The loop's state, from scratch or from the newest whole checkpoint.

        Returns:
            The run and the number of steps already done.
        """
        training = self.recipe.training
        optimizer = build_optimizer(
            scorer.named_parameters(),
            plan.learning_rate,
            training.weight_decay,
            kind=training.optimizer,
            betas=training.betas,
            b_rate=b_rate(self.recipe.adapter),
        )
        first_step, state = self.restore(scorer, optimizer)
        placed = [True, False]  # the optimizer's state is where its weights are
        scorer, optimizer = self.accelerator.prepare(scorer, optimizer, device_placement=placed)
        weights = [weight for weight in scorer.parameters() if weight.requires_grad]
        loop = self.loop(plan, first_step, [TrainedPart("model", weights, optimizer)], state)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = Batches(rows.train, hooks.weights, plan, self.recipe.seed, rank, world)
        run = Run(
            **vars(loop),
            hooks=hooks,
            scorer=scorer,
            optimizer=optimizer,
            batches=batches,
            held_out=rows.held_out,
            say=hooks.say,
        )
        return run, first_step

    def restore(self, model: nn.Module, optimizer: Any) -> tuple[int, dict[str, Any]]:
        """Restore the newest whole checkpoint, if this run is to be resumed.

        Args:
            model: gets the trained weights.
            optimizer: gets its state.

        Returns:
            Steps already done, and what the loop stored besides the tensors.
        """
        if not self.options.resume:
            return 0, {}
        checkpoint, skipped = find_checkpoint(self.output / "checkpoints")
        for sentence in skipped:
            self.say(sentence, "warning")
        if checkpoint is None:
            self.say("no checkpoint to resume from: starting at step 1")
            return 0, {}
        load_checkpoint(checkpoint, model, optimizer)
        if checkpoint.state.get("processes") != self.accelerator.num_processes:
            self.say("the number of processes changed: sums may differ in the last bits", "note")
        self.say(f"resuming after step {checkpoint.step}")
        return checkpoint.step, checkpoint.state

    def loop(
        self,
        plan: Plan,
        first_step: int,
        parts: Sequence[TrainedPart],
        state: dict[str, Any],
        describe: Callable[[dict[str, float]], str] | None = None,
    ) -> Loop:
        """What every loop works with.

        Args:
            plan: the decisions.
            first_step: steps already done; what an interrupted run logged later is dropped.
            parts: what is trained, each part with its optimizer.
            state: of the checkpoint; {} without one.
            describe: a step's metrics -> text on the progress line; None shows the loss.
        """
        training = self.recipe.training
        metrics = None
        if self.folder is not None:
            metrics = MetricsFile(self.folder.path / "metrics.jsonl", first_step or None)
            self.say_damaged("metrics.jsonl", metrics.damaged)
        if training.trackers:
            self.accelerator.init_trackers("alignkit", config={"output": str(self.output)})
        progress = StepProgress(plan.steps, first_step, training.log_every, self.quiet, describe)
        return Loop(
            plan=plan,
            training=training,
            seed=self.recipe.seed,
            accelerator=self.accelerator,
            folder=self.folder,
            metrics=metrics,
            progress=progress,
            parts=parts,
            bad=BadSteps(training.on_bad_step, plan.steps, **state.get("bad_steps", {})),
            scale=LossScale.of(self.recipe.model.dtype, state.get("loss_scale", {})),
            best=Best.of(self.recipe, state.get("best", {})),
        )
