"""A run folder -> what a person wants to know of the run, and what looks wrong."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import FileError
from alignkit.files import read_json
from alignkit.report.history import History, read_history
from alignkit.report.run_files import read_about

SPIKE = 5.0
"""A gradient norm so many times the median stands out."""

MUCH_DROPPED = 0.05
"""Share of rows that are dropped or cut from which that is told."""

TURNED = 0.02
"""A held-out loss so much above its lowest, as a share, has turned up."""


@dataclass(frozen=True)
class RunFacts:
    """A run.

    Args:
        folder: of the run.
        about: run.json.
        plan: plan.json; empty if it cannot be read.
        recipe: text of recipe.yaml; empty if it cannot be read.
        history: its metrics.
    """

    folder: Path
    about: Mapping[str, Any]
    plan: Mapping[str, Any]
    recipe: str
    history: History

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.resolve().name

    @property
    def stage(self) -> str:
        """Of the run."""
        return str(self.plan.get("stage", "run"))

    @property
    def status(self) -> str:
        """`running`, `finished`, `interrupted` or `failed`."""
        return str(self.about.get("status", "unknown"))

    @property
    def summary(self) -> Mapping[str, Any]:
        """How it ended; empty if it did not."""
        return mapping(self.about.get("summary"))

    @property
    def steps(self) -> int:
        """Done."""
        return max((s.steps[-1] for s in self.history.values()), default=0)

    @property
    def seconds(self) -> float | None:
        """From its start to its end, in its last session; None if it has not ended."""
        times = [self.about.get(key) for key in ("started", "ended")]
        if not all(isinstance(time, str) for time in times):
            return None
        try:
            begun, ended = (datetime.datetime.fromisoformat(str(time)) for time in times)
        except ValueError:
            return None
        return (ended - begun).total_seconds()

    def results(self) -> list[tuple[str, float | None, float, str]]:
        """Held-out values: name, before training, last, and its 95% interval in words."""
        rows = []
        for name, series in self.history.items():
            plain = name.removeprefix("eval/")
            if plain == name or plain.endswith(("_low", "_high")) or plain in COUNTS:
                continue
            before = series.first if series.steps[0] == 0 and len(series.steps) > 1 else None
            low, high = (self.history.get(f"{name}_{side}") for side in ("low", "high"))
            interval = f"{low.last:.4g} to {high.last:.4g}" if low and high else ""
            rows.append((plain, before, series.last, interval))
        return rows


COUNTS = ("tokens", "pairs", "rows", "prompts")
"""Held-out values that only say how many there were."""


def read_run(folder: Path) -> RunFacts:
    """A run, whether it has ended or not.

    Args:
        folder: of the run.

    Raises:
        RunError: it is no run folder.
    """
    about = read_about(folder)
    try:
        plan = read_json(folder / "plan.json")
    except FileError:
        plan = {}
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    return RunFacts(folder, about, plan, text, read_history(folder))


def findings(run: RunFacts) -> Iterator[str]:
    """What a person should look at, a sentence each; nothing if all is as it should be.

    Args:
        run: finished or not.
    """
    if run.status != "finished":
        yield f"The run is {run.status}, after {run.steps} of {run.plan.get('steps', '?')} steps."
    yield from _held_out(run)
    skipped = run.history.get("skipped_steps")
    if skipped is not None and skipped.last:
        yield f"{skipped.last:.0f} steps were skipped: their loss or gradients were not finite."
    norms = run.history.get("grad_norm")
    if norms is not None and len(norms.values) >= 10:
        median = sorted(norms.values)[len(norms.values) // 2]
        high = [s for s, v in zip(norms.steps, norms.values, strict=True) if v > SPIKE * median]
        if high and median > 0:
            shown = ", ".join(map(str, high[:5])) + (", …" if len(high) > 5 else "")
            yield f"The gradient norm was more than {SPIKE:g} times its median at steps {shown}."
    yield from _rows(run)
    yield from _promised(run)
    merge = mapping(run.summary.get("merge"))
    if merge.get("same_top_token", 1.0) < 0.99:
        yield (
            f"The merged model has the same likeliest token in {merge['same_top_token']:.1%} of "
            "the places only: merge with --dtype float32."
        )


def _held_out(run: RunFacts) -> Iterator[str]:
    losses = run.history.get("eval/loss")
    if losses is None:
        if not any(name.startswith("eval/") for name in run.history):
            yield "Nothing was held out, so nothing says whether the run helped: set data.eval."
        return
    lowest = min(losses.values)
    if losses.last > lowest + TURNED * abs(lowest):
        at = losses.steps[losses.values.index(lowest)]
        where = "before the first step" if at == 0 else f"after step {at}"
        yield (
            f"The held-out loss was lowest {where}, at {lowest:.4g}, and is {losses.last:.4g} at "
            "the end: train for fewer steps, or at a lower rate."
        )


def _rows(run: RunFacts) -> Iterator[str]:
    for name, rows in mapping(run.about.get("data")).items():
        counts = mapping(rows)
        total = counts.get("rows") or 0
        dropped = sum(mapping(counts.get("dropped")).values())
        for count, what in ((dropped, "dropped"), (counts.get("truncated") or 0, "cut")):
            if total and count > MUCH_DROPPED * total:
                yield f"{count:,} of {total:,} rows of {name} were {what}."


def _promised(run: RunFacts) -> Iterator[str]:
    planned, peak = run.plan.get("seconds"), mapping(run.plan.get("memory")).get("peak")
    if planned and run.seconds and run.seconds > 2 * planned and run.seconds - planned > 60:
        yield (
            f"The run took {run.seconds / planned:.1f} times as long as planned: other work on "
            "this machine, or a plan that is wrong."
        )
    memory = run.history.get("memory_gb")
    if memory is not None and peak and memory.last * 1e9 > 1.25 * peak:
        yield f"It took {memory.last:.1f} GB, and {peak / 1e9:.1f} were planned."


def mapping(value: Any) -> Mapping[str, Any]:
    """A value of a JSON file, if it is a mapping; else an empty one.

    Args:
        value: any.
    """
    return value if isinstance(value, Mapping) else {}
