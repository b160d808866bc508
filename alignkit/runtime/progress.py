"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere.

Everything goes to stderr; stdout is for data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from alignkit.terminal import print_line, stderr

T = TypeVar("T")


def show_duration(seconds: float) -> str:
    """`75` as `1:15`, `7325` as `2:02:05`."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe_loss(metrics: dict[str, float]) -> str:
    """Loss, learning rate and gradient norm of a step.

    Args:
        metrics: of the step.
    """
    return (
        f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
        f"grad {metrics['grad_norm']:.2f}"
    )


_SPOKEN = 15.0
"""Seconds between two lines where there is no live one."""


def track(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    """The items; a live line says how many are done, and where none can be, one now and then.

    Args:
        items: any.
        what: happens to them, in a few words.
        total: how many there are; None if that is not known.
    """
    of = "" if total is None else f"/{total:,}"
    if not stderr.is_terminal:
        said = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            if time.monotonic() - said > _SPOKEN:
                said = time.monotonic()
                print_line(f"{what}: {done:,}{of}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as live:
        task = live.add_task(what, total=total)
        for done, item in enumerate(items, start=1):
            yield item
            if done % 100 == 0 or done == total:
                live.update(task, completed=done, description=f"{what}: {done:,}{of}")


class StepProgress:
    """Progress of the training steps.

    Args:
        steps: of the whole run.
        first_step: steps already done.
        log_every: steps between plain lines.
        quiet: show nothing.
        describe: a step's metrics in a few words.
    """

    def __init__(
        self,
        steps: int,
        first_step: int,
        log_every: int,
        quiet: bool,
        describe: Callable[[dict[str, float]], str] | None = None,
    ) -> None:
        self.describe = describe or describe_loss
        self.steps, self.first, self.log_every, self.quiet = steps, first_step, log_every, quiet
        self.begun = 0.0
        """When the first step was done, which is no measure of the others: it compiles kernels."""
        self.live: Progress | None = None
        self.task: TaskID | None = None
        if stderr.is_terminal and not quiet:
            self.live = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=stderr,
            )
            self.live.start()
            self.task = self.live.add_task("", total=steps, completed=first_step)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show one finished step.

        Args:
            step: steps done, from 1.
            metrics: must hold step_seconds, tokens_per_second, memory_gb, and what `describe`
                reads.
        """
        if self.quiet:
            return
        done, now = step - self.first, time.monotonic()
        if done <= 1:
            self.begun = now
        each = (now - self.begun) / (done - 1) if done > 1 else metrics["step_seconds"]
        left = each * (self.steps - step)
        line = (
            f"{self.describe(metrics)}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"{metrics['memory_gb']:.1f} GB  {show_duration(left)} left"
        )
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=step, description=line)
        elif step % self.log_every == 0 or step == self.steps:
            print_line(f"step {step}/{self.steps}  {line}")

    def say(self, text: str) -> None:
        """Print one line above the progress."""
        if not self.quiet:
            print_line(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live is not None:
            self.live.stop()
