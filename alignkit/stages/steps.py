"""run_steps: the loop of every stage.

Losses are summed over micro-batches and processes and divided once by the weight of the whole
optimizer step, so neither changes the result. Every process knows all rows, so the weight needs
no communication.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.errors import Interrupted, TrainingError
from alignkit.evaluation.columns import WHOLE, Share
from alignkit.recipe.plan import Plan
from alignkit.recipe.schema import TrainingSpec
from alignkit.runtime.checkpoint import save_checkpoint
from alignkit.runtime.devices import peak_memory
from alignkit.runtime.metrics import MetricsFile
from alignkit.runtime.optim import learning_rate_at, set_learning_rate
from alignkit.runtime.progress import StepProgress
from alignkit.stages.batches import Batches, MicroBatch, StepBatches
from alignkit.stages.run_folder import RunFolder
from alignkit.stages.stage import Measured, Stage


@dataclass
class Run:
    """Everything the loop works with.

    Args:
        plan: the decisions.
        training: intervals and clipping of the recipe.
        seed: of the recipe.
        stage: loss and weights.
        scorer: prepared by accelerate.
        optimizer: prepared by accelerate.
        accelerator: device and processes.
        batches: what each step reads.
        held_out: rows to evaluate on, or None.
        folder: of the run; None on every process but the first.
        metrics: metrics.jsonl; None on every process but the first.
        progress: what the user sees.
    """

    plan: Plan
    training: TrainingSpec
    seed: int
    stage: Stage
    scorer: Any
    optimizer: Any
    accelerator: Accelerator
    batches: Batches
    held_out: TokenDataset | None
    folder: RunFolder | None
    metrics: MetricsFile | None
    progress: StepProgress


def run_steps(run: Run, first_step: int) -> None:
    """Train from `first_step` to the end of the plan.

    Args:
        run: what to work with.
        first_step: optimizer steps already done.

    Raises:
        Interrupted: the user pressed Ctrl-C; a checkpoint was saved.
        TrainingError: the loss is not finite, memory ran out, or a checkpoint could not be
            written.
    """
    training, steps = run.training, run.plan.steps
    with _stop_on_signal() as stop:
        if first_step < steps:
            _rehearse(run)
        if first_step == 0:
            _evaluate(run, 0)
        for step in range(first_step, steps):
            metrics = _train_step(run, step)
            done = step + 1
            if run.metrics is not None:
                run.metrics.write(done, metrics)
            run.accelerator.log(metrics, step=done)
            run.progress.step(done, metrics)
            stopped = _any_process(run.accelerator, stop)
            if done == steps or (training.eval_every and done % training.eval_every == 0):
                _evaluate(run, done)
            if done % training.save_every == 0 or done == steps or stopped:
                _save(run, done)
            if stopped and done < steps:
                raise Interrupted(
                    f"stopped after step {done} of {steps}; a checkpoint was saved",
                    hint="continue with --resume",
                )


def _rehearse(run: Run) -> None:
    """Run the largest micro-batch once and forget its gradients.

    Memory that would run out after hours runs out now, and the allocator's blocks fit every
    later batch.
    """
    batch = run.batches.largest()
    try:
        measured = _measure(run, [MicroBatch(batch.documents, 1.0)])
        result = run.stage.loss(run.scorer, batch.documents, measured)
        run.accelerator.backward(result.loss * 0.0)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower():
            raise
        raise TrainingError(
            f"a micro-batch of {batch.num_tokens} tokens does not fit the memory",
            hint="lower training.microbatch_tokens or data.max_length, or set "
            "training.gradient_checkpointing=true",
        ) from error
    run.optimizer.zero_grad(set_to_none=True)


def _train_step(run: Run, step: int) -> dict[str, float]:
    """One optimizer step."""
    started = time.monotonic()
    accelerator, plan = run.accelerator, run.plan
    batches = run.batches.step(step)
    torch.manual_seed(
        (run.seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index
    )
    rate = learning_rate_at(
        step,
        peak=plan.learning_rate,
        steps=plan.steps,
        warmup_steps=plan.warmup_steps,
        schedule=run.training.schedule,
    )
    set_learning_rate(run.optimizer, rate)
    means, tokens = _accumulate(run, batches)
    if not math.isfinite(means["loss"]):
        places = ", ".join(run.batches.places(batches.items[:5]))
        raise TrainingError(
            f"the loss of step {step + 1} is {means['loss']}; its rows begin with {places}",
            hint="lower training.learning_rate, or look at these rows with `alignkit inspect`",
        )
    limit = run.training.max_grad_norm or math.inf
    norm = accelerator.clip_grad_norm_(_trainable(run.scorer), limit)
    scaled = accelerator.scaler is not None  # float16 skips such a step by itself
    if norm is not None and not scaled and not math.isfinite(float(norm)):
        raise TrainingError(
            f"the gradient of step {step + 1} is not finite; its loss is {means['loss']:.4g}",
            hint="lower training.learning_rate, or set training.max_grad_norm",
        )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    seconds = time.monotonic() - started
    return {
        "loss": means.pop("loss"),
        "learning_rate": rate,
        "grad_norm": float(norm) if norm is not None else math.nan,
        **means,
        "epoch": (step + 1) / plan.steps_per_epoch,
        "tokens": tokens,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "memory_gb": peak_memory(accelerator.device.type) / 1e9,
    }


def _accumulate(run: Run, batches: StepBatches) -> tuple[dict[str, float], int]:
    """Gradients of the whole step, its mean loss and metrics, and the tokens it read."""
    accelerator = run.accelerator
    measured = _measure(run, batches.micro_batches)
    sums: dict[str, torch.Tensor] = {}
    tokens = 0
    for number, micro in enumerate(batches.micro_batches):
        last = number == len(batches.micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(run.scorer):
            result = run.stage.loss(run.scorer, micro.documents, measured)
            # Gradients are averaged over processes, hence the factor.
            factor = micro.share * accelerator.num_processes / batches.weight
            accelerator.backward(result.loss * factor)
        tokens += round(micro.num_tokens * micro.share)
        _add(sums, {"loss": result.loss, **result.metrics}, micro.share)
    totals = _over_processes(run, {**sums, "tokens": torch.tensor(float(tokens)).double()})
    read = int(totals.pop("tokens"))
    means = {name: total / batches.weight for name, total in totals.items()}
    if run.stage.finish is not None:
        means = run.stage.finish(means, measured)
    return means, read


def _measure(run: Run, micro_batches: Sequence[MicroBatch]) -> Measured:
    """What the stage measures of a whole step before its losses."""
    if run.stage.measure is None:
        return {}
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for micro in micro_batches:
            _add(sums, run.stage.measure(run.scorer, micro.documents), micro.share)
    return _over_processes(run, sums)


def _add(sums: dict[str, torch.Tensor], values: dict[str, torch.Tensor], share: float) -> None:
    for name, value in values.items():
        part = value.detach().cpu().double() * share
        sums[name] = sums[name] + part if name in sums else part


def _over_processes(run: Run, sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """The sums of all processes; each has the same names."""
    names = sorted(sums)
    packed = share_of(run.accelerator).reduce(torch.stack([sums[name] for name in names]))
    return dict(zip(names, packed.tolist(), strict=True))


def _trainable(scorer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in scorer.parameters() if parameter.requires_grad]


def _evaluate(run: Run, step: int) -> None:
    if run.held_out is None:
        return
    accelerator = run.accelerator
    found = run.stage.evaluate(
        run.scorer, run.held_out, run.plan.microbatch_tokens, share_of(accelerator)
    )
    named = {f"eval/{name}": value for name, value in found.items()}
    if run.metrics is not None:
        run.metrics.write(step, named)
    accelerator.log(named, step=step)
    when = "before training" if step == 0 else f"after step {step}"
    run.progress.say(f"held out, {when}: {run.stage.say(found)}")


def share_of(accelerator: Accelerator) -> Share:
    """This process's part of an evaluation."""
    if accelerator.num_processes == 1:
        return WHOLE
    return Share(
        accelerator.process_index,
        accelerator.num_processes,
        lambda sums: accelerator.reduce(sums.to(accelerator.device), "sum").cpu(),
    )


def _save(run: Run, step: int) -> None:
    run.accelerator.wait_for_everyone()
    if run.folder is None:
        return
    save_checkpoint(
        run.folder.checkpoints,
        step,
        run.accelerator.unwrap_model(run.scorer),
        getattr(run.optimizer, "optimizer", run.optimizer),
        {"processes": run.accelerator.num_processes},
        run.training.keep,
    )


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[list[bool]]:
    """A list that becomes non-empty at the first Ctrl-C; the second one interrupts at once."""
    stop: list[bool] = []
    before = {}

    def handle(number: int, frame: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(True)

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread
            before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any_process(accelerator: Accelerator, stop: list[bool]) -> bool:
    if accelerator.num_processes == 1:
        return bool(stop)
    flag = torch.tensor(float(bool(stop)), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)
