"""run_loop: what happens around the optimizer steps of every stage.

Evaluate, step, log, save, stop on request. The stage defines what a step is.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from alignkit.errors import NotFiniteError, RewardError
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.training import LoopSpec
from alignkit.runtime.checkpoint import save_checkpoint
from alignkit.runtime.devices import peak_memory
from alignkit.runtime.loss_scale import LossScale
from alignkit.runtime.metrics import MetricsFile, read_metrics
from alignkit.runtime.optim import TrainedPart, set_rates
from alignkit.runtime.progress import StepProgress
from alignkit.stages.running.bad_steps import BadSteps, Spikes
from alignkit.stages.running.best import Best
from alignkit.stages.running.hooks import StageHooks
from alignkit.stages.running.memory import within_memory
from alignkit.stages.running.run_folder import RunFolder
from alignkit.stages.running.stopping import interrupted, stop_on_signal

METRICS = {
    "loss": "what the step lowers, a mean over all its items",
    "learning_rate": "of this step",
    "grad_norm": "norm of the gradient before clipping",
    "loss_scale": "factor on the loss in float16",
    "overflows": "steps so far that were skipped because float16 gradients overflowed",
    "epoch": "passes over the rows so far",
    "skipped_steps": "steps so far without a finite loss or gradient, if these are skipped",
    "tokens": "tokens read in this step, without padding",
    "step_seconds": "time of the step",
    "tokens_per_second": "of this step",
    "memory_gb": "largest memory that a process has held so far",
}
"""Name of each metric that every stage logs -> what it means."""


NAMED = 5
"""Rows of a step that a message names."""


@dataclass(kw_only=True)
class Loop:
    """What every loop works with.

    Args:
        plan: the decisions.
        training: intervals and clipping of the recipe.
        seed: of the recipe.
        accelerator: device and processes.
        folder: of the run; None on every process but the first.
        metrics: metrics.jsonl; None on every process but the first.
        progress: what the user sees.
        parts: what is trained, each part with its optimizer.
        bad: counts the steps that cannot be taken.
        scale: factor on the losses.
        best: watches the held-out metric that decides.
        spikes: finds losses that stand out.
    """

    plan: Plan
    training: LoopSpec
    seed: int
    accelerator: Accelerator
    folder: RunFolder | None
    metrics: MetricsFile | None
    progress: StepProgress
    parts: Sequence[TrainedPart]
    bad: BadSteps
    scale: LossScale
    best: Best
    spikes: Spikes = field(default_factory=Spikes)


def run_loop(loop: Loop, hooks: StageHooks, first_step: int) -> None:
    """Train from `first_step` to the end of the plan.

    Args:
        loop: what to work with.
        hooks: of the stage.
        first_step: steps already done.

    Raises:
        Interrupted: the user pressed Ctrl-C, or SIGTERM came; a checkpoint was saved.
        RewardError: responses could not be scored; the steps done until then were saved.
        TrainingError: the loss is not finite, memory ran out, a checkpoint could not be written,
            or the stage halted the run.
    """
    training, steps, best = loop.training, loop.plan.steps, loop.best
    with stop_on_signal() as stop:
        if first_step < steps and not best.ended:
            hooks.dry_run()
        if first_step == 0 or (first_step == steps and _any_process(loop, _lacks_evaluation(loop))):
            _evaluate(loop, hooks, first_step)
            if best.is_new(first_step):
                hooks.save(first_step)
        saved = first_step
        for step in range(first_step, first_step if best.ended else steps):
            try:
                with within_memory(f"step {step + 1}"):
                    metrics = _train_step(loop, hooks, step)
            except RewardError:
                if step > saved:
                    hooks.save(step)
                raise
            done = step + 1
            if loop.metrics is not None:
                loop.metrics.write(done, metrics)
            loop.accelerator.log(metrics, step=done)
            _show_step(loop, hooks, done, metrics)
            stopped, halted = _any_process(loop, bool(stop)), hooks.halt()
            if done == steps or (training.eval_every and done % training.eval_every == 0):
                try:
                    _evaluate(loop, hooks, done)
                except RewardError:
                    hooks.save(done)
                    raise
            over = done == steps or best.ended
            if done % training.save_every == 0 or over or stopped or halted or best.is_new(done):
                hooks.save(done)
                saved = done
            if over:
                break
            if halted:
                raise halted
            if stopped:
                raise interrupted(done, steps, stop)
    if best.ending(steps):
        loop.progress.say(best.ending(steps))


def _train_step(loop: Loop, hooks: StageHooks, step: int) -> dict[str, float]:
    """One step of the stage, and what all stages do before and after it."""
    started = time.monotonic()
    plan, accelerator = loop.plan, loop.accelerator
    seed_step(loop, step)
    rates = set_rates(
        loop.parts,
        step,
        peaks=plan.peak_rates,
        steps=plan.steps,
        warmup_steps=plan.warmup_steps,
        schedule=plan.schedule,
        decay_steps=plan.decay_steps,
        min_rate=plan.min_rate,
    )
    overflows = loop.scale.overflows
    try:
        metrics = hooks.train(step)
    except NotFiniteError as error:
        metrics = _skip(loop, hooks, step, error)
    else:
        loop.bad.passed()
    if loop.scale.overflows > overflows:
        loop.progress.say(
            f"step {step + 1}: gradients overflowed in float16 and were dropped; losses are now "
            f"multiplied by {loop.scale.value:.0f}"
        )
    seconds = time.monotonic() - started
    skipped = {"skipped_steps": loop.bad.skipped} if loop.bad.action == "skip" else {}
    return {
        "loss": metrics.pop("loss"),
        **rates,
        **metrics,
        **skipped,
        **loop.scale.metrics,
        "epoch": (step + 1) / plan.steps_per_epoch,
        "step_seconds": seconds,
        "tokens_per_second": metrics.get("tokens", 0) / seconds,
        "memory_gb": peak_memory(accelerator.device.type) / 1e9,
    }


def _skip(loop: Loop, hooks: StageHooks, step: int, error: NotFiniteError) -> dict[str, float]:
    """Metrics of a step that cannot be taken; every process raised the same error.

    Raises:
        TrainingError: the run stops here.
    """
    places = ", ".join(hooks.rows(step))
    named = NotFiniteError(f"{error.message}; its rows begin with {places}", hint=error.hint)
    loop.bad.skip(named)
    for part in loop.parts:
        part.optimizer.zero_grad(set_to_none=True)
    loop.progress.say(f"step {step + 1} is skipped: {named.message}")
    return {"loss": math.nan}


def _show_step(loop: Loop, hooks: StageHooks, done: int, metrics: dict[str, float]) -> None:
    """The progress of a good step, and whether its loss stands out."""
    loss = metrics["loss"]
    if not math.isfinite(loss):
        return
    loop.progress.step(done, metrics)
    median = loop.spikes.look(loss)
    if median is not None:
        loop.progress.say(
            f"spike: the loss of step {done} is {loss:.4g}, far above the last steps' median "
            f"{median:.4g}; its rows begin with {', '.join(hooks.rows(done - 1))}"
        )


def seed_step(loop: Loop, step: int) -> None:
    """Dropout and the user's functions draw the same numbers after an interruption.

    Args:
        loop: knows the run's seed and this process.
        step: from 0.
    """
    world, rank = loop.accelerator.num_processes, loop.accelerator.process_index
    seed = (loop.seed * 1_000_003 + step) * world + rank
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def require_finite(loss: float, sentence: str, hint: str) -> None:
    """End the run if a loss is not finite.

    Args:
        loss: of a step.
        sentence: which step.
        hint: what to do.

    Raises:
        NotFiniteError: the loss is not finite.
    """
    if not math.isfinite(loss):
        raise NotFiniteError(sentence, hint=hint)


def _lacks_evaluation(loop: Loop) -> bool:
    """Whether the last step was saved, but its evaluation failed."""
    if loop.folder is None:
        return False
    lines = read_metrics(loop.folder.path / "metrics.jsonl")
    last = [line for line in lines if line["step"] == loop.plan.steps]
    return not any(key.startswith("eval/") for line in last for key in line)


def _evaluate(loop: Loop, hooks: StageHooks, step: int) -> None:
    with within_memory("the evaluation"):
        result = hooks.evaluate(step)
    if result is None:
        return
    values, line = result
    loop.best.look(step, values)
    named = {f"eval/{name}": value for name, value in values.items()}
    if loop.metrics is not None:
        loop.metrics.write(step, named)
    loop.accelerator.log(named, step=step)
    when = "before training" if step == 0 else f"after step {step}"
    loop.progress.say(f"held out, {when}: {line}")


def save_state(loop: Loop, step: int, model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """A checkpoint of the leading process; the others wait for it to begin.

    Args:
        loop: knows where, and how many to keep.
        step: steps done.
        model: its trained weights are stored.
        optimizer: its state is stored.
        state: further plain values.
    """
    loop.accelerator.wait_for_everyone()
    if loop.folder is None:
        return
    save_checkpoint(
        loop.folder.checkpoints,
        step,
        model,
        optimizer,
        {
            "processes": loop.accelerator.num_processes,
            "run": loop.folder.record,
            "bad_steps": loop.bad.state,
            "loss_scale": loop.scale.state,
            "best": loop.best.state,
            **state,
        },
        loop.training.keep,
        loop.best.held,
    )


def load_best(loop: Loop, model: nn.Module) -> None:
    """Leave the weights of the best evaluation, where the recipe asks for them.

    Args:
        loop: knows which they are.
        model: after the last step.
    """
    loop.accelerator.wait_for_everyone()
    loop.best.load(Path(loop.accelerator.project_dir) / "checkpoints", model, loop.progress.say)


def _any_process(loop: Loop, flag: bool) -> bool:
    if loop.accelerator.num_processes == 1:
        return flag
    number = torch.tensor(float(flag), device=loop.accelerator.device)
    return bool(loop.accelerator.reduce(number, "sum") > 0)
