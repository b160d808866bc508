"""Responses that a run has kept, chosen by step, by prompt and by reward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignkit.errors import RunError
from alignkit.runtime.metrics import read_metrics

Rows = Literal["held_out", "train"]


@dataclass(frozen=True)
class Sample:
    """One response.

    Args:
        place: `file:line` of its prompt.
        prompt: text, or turns.
        response: its text.
        finish: `stop` or `length`.
        reward: the weighted sum; NaN if no source applied.
        columns: what stands beside it: the score of each source, and that of the task.
        notes: what sources said beside their scores.
    """

    place: str
    prompt: str | list[dict[str, Any]]
    response: str
    finish: str
    reward: float
    columns: dict[str, float]
    notes: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for what did not apply."""
        known = {k: None if math.isnan(v) else v for k, v in self.columns.items()}
        reward = None if math.isnan(self.reward) else self.reward
        return {**vars(self), "reward": reward, "columns": known}


def read_samples(
    run: Path, *, step: int | None = None, rows: Rows | None = None
) -> tuple[int, Rows, list[Sample]]:
    """The responses of one step.

    Args:
        run: its folder.
        step: steps done; None takes the last one of which there are any.
        rows: of which prompts; None takes held-out ones where there are any.

    Returns:
        The step, the rows, and the responses in the order of the file.

    Raises:
        RunError: the run has kept none, or none like these.
    """
    path = run / "samples.jsonl"
    if not path.is_file():
        raise RunError(
            f"{run} has no samples.jsonl", hint="name the run folder of a ppo or grpo stage"
        )
    lines = read_metrics(path)
    kept = [line for line in lines if rows is None or line.get("rows", "train") == rows]
    steps = sorted({line["step"] for line in kept})
    step = steps[-1] if step is None and steps else step
    of_step = [line for line in kept if line["step"] == step]
    if not of_step:
        known = ", ".join(map(str, steps)) or "no step"
        raise RunError(
            f"{path} has no {'' if rows is None else f'{rows} '}responses"
            + ("" if step is None else f" of step {step}"),
            hint=f"there are some of {known}",
        )
    found: Rows = "held_out" if any(line.get("rows") == "held_out" for line in of_step) else "train"
    chosen = [line for line in of_step if line.get("rows", "train") == found]
    return int(of_step[0]["step"]), found, [_sample(line) for line in chosen]


def by_reward(samples: Iterable[Sample], *, best: bool) -> list[Sample]:
    """The responses by reward; those without one are left out.

    Args:
        samples: in any order.
        best: the highest first.
    """
    known = [sample for sample in samples if not math.isnan(sample.reward)]
    return sorted(known, key=lambda sample: sample.reward, reverse=best)


def by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The responses to each prompt, in the order of the prompts.

    Args:
        samples: in the order of the file.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.place, []).append(sample)
    return list(groups.values())


def _sample(line: dict[str, Any]) -> Sample:
    rewards, notes = line.get("rewards"), line.get("notes")
    scores = rewards.items() if isinstance(rewards, dict) else ()
    columns = {str(name): _number(value) for name, value in scores}
    if "task" in line:
        columns["task"] = _number(line["task"])
    return Sample(
        str(line.get("place", "")),
        line.get("prompt", ""),
        str(line.get("response", "")),
        str(line.get("finish", "")),
        _number(line.get("reward")),
        columns,
        notes if isinstance(notes, dict) else {},
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
