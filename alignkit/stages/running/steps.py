"""run_steps: the steps of every stage that learns from rows.

Losses are summed over micro-batches and processes and divided once by the weight of the whole
optimizer step, so neither changes the result. Every process knows all rows, so the weight needs
no communication.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.errors import TrainingError
from alignkit.runtime.devices import peak_memory
from alignkit.runtime.optim import learning_rate_at, set_learning_rate
from alignkit.runtime.processes import process_group
from alignkit.stages.running.batches import Batches, MicroBatch, StepBatches
from alignkit.stages.running.loop import Loop, Parts, run_loop, save_state
from alignkit.stages.running.stage import Measured, Stage


@dataclass
class Run(Loop):
    """Everything the loop of a supervised stage works with.

    Args:
        stage: loss and weights.
        scorer: prepared by accelerate.
        optimizer: prepared by accelerate.
        batches: what each step reads.
        held_out: rows to evaluate on, or None.
    """

    stage: Stage
    scorer: Any
    optimizer: Any
    batches: Batches
    held_out: TokenDataset | None

    @property
    def written_head(self) -> Any:
        """The scalar head that belongs into the written model, or None."""
        return self.accelerator.unwrap_model(self.scorer).head

    def say(self, values: dict[str, float]) -> str:
        """Held-out values in one line."""
        return self.stage.say(values)


def run_steps(run: Run, first_step: int) -> None:
    """Train from `first_step` to the end of the plan; see `run_loop`.

    Args:
        run: what to work with.
        first_step: optimizer steps already done.
    """
    parts = Parts(
        partial(_rehearse, run),
        partial(_train_step, run),
        partial(_evaluate, run),
        partial(_save, run),
    )
    run_loop(run, parts, first_step)


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
    packed = process_group(run.accelerator).reduce(torch.stack([sums[name] for name in names]))
    return dict(zip(names, packed.tolist(), strict=True))


def _trainable(scorer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in scorer.parameters() if parameter.requires_grad]


def _evaluate(run: Run, step: int) -> tuple[dict[str, float], str] | None:
    if run.held_out is None:
        return None
    found = run.stage.evaluate(
        run.scorer, run.held_out, run.plan.microbatch_tokens, process_group(run.accelerator)
    )
    return found, run.stage.say(found)


def _save(run: Run, step: int) -> None:
    scorer = run.accelerator.unwrap_model(run.scorer)
    save_state(run, step, scorer, getattr(run.optimizer, "optimizer", run.optimizer), {})
