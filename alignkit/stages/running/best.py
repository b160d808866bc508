"""The best evaluation of a run: which it is, and whether the run ends for want of a better one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alignkit.errors import TrainingError
from alignkit.recipe.stages.base import Recipe, metric_family
from alignkit.runtime.checkpoint import load_weights, step_folder


@dataclass
class Best:
    """Watches one held-out metric. The evaluation before the first step does not count.

    Args:
        metric: which one, without `eval/`.
        higher: whether higher values are better.
        kept: whether the best evaluation's checkpoint is kept, and the model is made of it.
        patience: evaluations in a row without a better value that end the run; None never does.
        step: of the best evaluation; 0 before there is one.
        value: of the metric then.
        seen: step of the last evaluation.
        last: value of the metric then; None if it is not finite.
        since: evaluations after the best one.
    """

    metric: str
    higher: bool
    kept: bool = False
    patience: int | None = None
    step: int = 0
    value: float | None = None
    seen: int = 0
    last: float | None = None
    since: int = 0

    @classmethod
    def of(cls, recipe: Recipe, state: Mapping[str, Any]) -> Best:
        """What a run watches.

        Args:
            recipe: of the run.
            state: of the checkpoint that it goes on from; empty without one.
        """
        named, patience = recipe.training.keep_best, recipe.training.early_stop
        metric = named or next(iter(recipe.better))
        higher = recipe.better.get(metric_family(metric)) == "higher"
        return cls(metric, higher, named is not None, patience, **state)

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """Compare an evaluation with the best so far.

        Args:
            step: steps done.
            values: held out, without `eval/`.

        Raises:
            TrainingError: the metric is not among them.
        """
        if not self.kept and self.patience is None:
            return
        name = self.metric if self.metric in values else f"task/{self.metric}"
        if name not in values:
            raise TrainingError(
                f"training.keep_best = {self.metric} is not measured on the held-out rows",
                hint=f"these are: {', '.join(values)}",
            )
        if step == 0:
            return
        self.seen, self.last = step, values[name] if math.isfinite(values[name]) else None
        if self.last is not None and (self.value is None or self._better(self.last, self.value)):
            self.step, self.value, self.since = step, self.last, 0
        else:
            self.since += 1

    def _better(self, new: float, old: float) -> bool:
        return new > old if self.higher else new < old

    def is_new(self, step: int) -> bool:
        """Whether the checkpoint after this step is the best one."""
        return self.kept and 0 < step == self.step

    @property
    def ended(self) -> bool:
        """Whether the run ends here, before its last step."""
        return self.patience is not None and self.since >= self.patience

    @property
    def held(self) -> int | None:
        """Step whose checkpoint stays, however old it is."""
        return self.step if self.kept and self.step else None

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in ("step", "value", "seen", "last", "since")}

    def ending(self, steps: int) -> str:
        """Why the run ends early, in words; empty if it does not.

        Args:
            steps: of the plan.
        """
        if not self.ended or self.seen >= steps:
            return ""
        best = f": {self.value:.4g} after step {self.step} is the best" if self.step else ""
        return (
            f"ended early, after step {self.seen} of {steps}: no better {self.metric} in "
            f"{self.since} evaluations in a row{best}"
        )

    def to_json(self) -> dict[str, Any] | None:
        """What run.json says of the best evaluation; None if no checkpoint is kept for it."""
        if not self.kept:
            return None
        better = "higher" if self.higher else "lower"
        return {"metric": self.metric, "better": better, **self.state}

    def load(self, checkpoints: Path, model: nn.Module, say: Callable[[str], None]) -> None:
        """Put the weights of the best evaluation into the model, if they are kept.

        Args:
            checkpoints: folder of the run's checkpoints.
            model: after its last step.
            say: prints a line.

        Raises:
            RunError: they cannot be read.
        """
        if not self.kept:
            return
        if not self.step:
            say(f"best: no evaluation had a finite {self.metric}, the last weights are taken")
            return
        last = "is not finite" if self.last is None else f"had {self.last:.4g}"
        line = f"best: step {self.step}, {self.metric} {self.value:.4g}"
        say(line + (f"; the last step {last}" if self.step != self.seen else ", the last step"))
        if self.step != self.seen:
            load_weights(step_folder(checkpoints, self.step), model)
