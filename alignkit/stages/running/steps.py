"""run_steps: the steps of every stage that learns from rows.

Losses are summed over micro-batches and processes and divided once by the weight of the whole
optimizer step, so neither changes the result. Every process knows all rows, so the weight needs
no communication.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from alignkit.data.dataset import TokenDataset
from alignkit.models.heap import release_memory
from alignkit.models.kernels.factors import fixed_factors
from alignkit.models.kernels.precision import sum_dtype
from alignkit.runtime.optim import step_parts
from alignkit.runtime.processes import process_group
from alignkit.stages.running.batches import Batches, MicroBatch, StepBatches
from alignkit.stages.running.hooks import LossSums, RowHooks, StageHooks, StepSums
from alignkit.stages.running.loop import (
    NAMED,
    Loop,
    load_best,
    require_finite,
    run_loop,
    save_state,
    seed_step,
)
from alignkit.stages.running.memory import OutOfMemoryError, within_memory

T = TypeVar("T")


@dataclass(kw_only=True)
class Run(Loop):
    """Everything the loop of a supervised stage works with.

    Args:
        hooks: of the stage.
        scorer: prepared by accelerate.
        optimizer: prepared by accelerate.
        batches: what each step reads.
        held_out: rows to evaluate on, or None.
        say: held-out values in one line.
    """

    hooks: RowHooks
    scorer: Any
    optimizer: Any
    batches: Batches
    held_out: TokenDataset | None
    say: Callable[[dict[str, float]], str]

    @property
    def written_head(self) -> Any:
        """The scalar head of the written model, or None."""
        return self.accelerator.unwrap_model(self.scorer).head

    def release(self) -> None:
        """Let go of all weights, so that a merge has their memory."""
        self.scorer = self.optimizer = None
        self.parts = ()
        del self.hooks  # they may hold a reference model


def run_steps(run: Run, first_step: int) -> None:
    """Train from `first_step` to the end of the plan; see `run_loop`. The best weights are left, if
    the recipe asks for them.

    Args:
        run: what to work with.
        first_step: optimizer steps already done.
    """
    hooks = StageHooks(
        partial(_dry_run, run),
        partial(_train, run),
        partial(_evaluate, run),
        partial(_save, run),
        lambda step: run.batches.places(run.batches.step(step).items[:NAMED]),
    )
    run_loop(run, hooks, first_step)
    load_best(run, run.accelerator.unwrap_model(run.scorer))


def _dry_run(run: Run) -> None:
    """Run the largest micro-batch once and drop its gradients.

    Memory that would run out after hours runs out now, and the allocator's blocks fit every
    later batch.
    """
    _within_passes(run, 0, lambda: _try_largest(run))
    run.optimizer.zero_grad(set_to_none=True)


def _try_largest(run: Run) -> None:
    batch = run.batches.largest()
    with within_memory(f"a micro-batch of {batch.num_tokens} tokens"):
        result = next(_losses(run, [MicroBatch(batch.documents, 1.0)], {}))
        run.accelerator.backward(result.loss * 0.0)


def _within_passes(run: Run, step: int, work: Callable[[], T]) -> T:
    """The work, once more with passes of half the tokens if memory runs out.

    Sums in another order differ in the last bits. Several processes would have to agree; they
    stop instead.
    """
    try:
        return work()
    except OutOfMemoryError:
        half = run.plan.microbatch_tokens // 2
        longest = int(run.batches.dataset.lengths.max())
        if run.accelerator.num_processes > 1 or half < longest:
            raise
    run.optimizer.zero_grad(set_to_none=True)
    release_memory()
    run.plan = dataclasses.replace(run.plan, microbatch_tokens=half)
    run.batches = dataclasses.replace(run.batches, plan=run.plan)
    if run.folder is not None:
        run.folder.replace_plan(run.plan)
    run.progress.say(
        f"memory ran out: passes have at most {half:,} tokens from step {step + 1} on, half as many"
    )
    seed_step(run, step)
    return work()


def _train(run: Run, step: int) -> dict[str, float]:
    """Gradients of the step's rows, and the optimizer step."""
    with fixed_factors(run.scorer):
        means, tokens = _within_passes(run, step, lambda: _accumulate(run, step))
    loss = means["loss"]
    require_finite(
        loss,
        f"the loss of step {step + 1} is {loss}",
        "lower training.learning_rate, look at these rows with `alignkit inspect`, or set "
        "training.on_bad_step=skip",
    )
    norms = step_parts(
        run.parts,
        step,
        loss,
        limit=run.training.max_grad_norm,
        clip=run.accelerator.clip_grad_norm_,
        scale=run.scale,
    )
    return {**norms, **means, "tokens": tokens}


def _accumulate(run: Run, step: int) -> tuple[dict[str, float], int]:
    """Gradients of the whole step, its mean loss and metrics, and the tokens it read."""
    with within_memory(f"step {step + 1}"):
        return _sum_passes(run, run.batches.step(step))


def _sum_passes(run: Run, batches: StepBatches) -> tuple[dict[str, float], int]:
    accelerator = run.accelerator
    measured: StepSums = {}
    sums: dict[str, torch.Tensor] = {}
    tokens = 0
    losses = _losses(run, batches.micro_batches, measured)
    for number, micro in enumerate(batches.micro_batches):
        last = number == len(batches.micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(run.scorer):
            result = next(losses)
            # Gradients are averaged over processes, hence the factor.
            factor = micro.share * accelerator.num_processes / batches.weight * run.scale.value
            accelerator.backward(result.loss * factor)
        tokens += round(micro.num_tokens * micro.share)
        _add(sums, {"loss": result.loss, **result.metrics}, micro.share)
    totals = _over_processes(run, {**sums, "tokens": torch.tensor(float(tokens)).double()})
    read = int(totals.pop("tokens"))
    means = {name: total / batches.weight for name, total in totals.items()}
    if run.hooks.finish is not None:
        means = run.hooks.finish(means, measured)
    return means, read


def _losses(
    run: Run, micro_batches: Sequence[MicroBatch], measured: StepSums
) -> Iterator[LossSums]:
    """Losses of a step's micro-batches, each computed when it is asked for; before the first of
    them, what the stage measures of the whole step goes into `measured`."""
    hooks, left = run.hooks, None
    if hooks.measure is not None:
        alone = len(micro_batches) == 1
        sums: dict[str, torch.Tensor] = {}
        for micro in micro_batches:
            found = hooks.measure(run.scorer, micro.documents, alone)
            _add(sums, found.sums, micro.share)
            left = found.loss
        measured.update(_over_processes(run, sums))
    for micro in micro_batches:
        if left is not None:
            yield left(measured)
        else:
            yield hooks.loss(run.scorer, micro.documents, measured)


def _add(sums: dict[str, torch.Tensor], values: dict[str, torch.Tensor], share: float) -> None:
    for name, value in values.items():
        part = value.detach().to(sum_dtype(value.device)) * share
        sums[name] = sums[name] + part if name in sums else part


def _over_processes(run: Run, sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """The sums of all processes; each has the same names."""
    names = sorted(sums, key=lambda name: (sums[name].device.type, name))
    by_device = itertools.groupby((sums[name] for name in names), lambda value: value.device)
    parts = [torch.stack([*values]).cpu().double() for _, values in by_device]
    packed = process_group(run.accelerator).reduce(torch.cat(parts))
    return dict(zip(names, packed.tolist(), strict=True))


def _evaluate(run: Run, step: int) -> tuple[dict[str, float], str] | None:
    if run.held_out is None:
        return None
    values = run.hooks.evaluate(
        run.scorer, run.held_out, run.plan.microbatch_tokens, process_group(run.accelerator)
    )
    return values, run.say(values)


def _save(run: Run, step: int) -> None:
    scorer = run.accelerator.unwrap_model(run.scorer)
    save_state(run, step, scorer, getattr(run.optimizer, "optimizer", run.optimizer), {})
