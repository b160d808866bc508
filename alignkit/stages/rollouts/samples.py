"""samples.jsonl: responses with their rewards, for a person to read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from alignkit.runtime.metrics import read_metrics, start_lines
from alignkit.stages.rollouts.judging import Rewards
from alignkit.stages.rollouts.sampling import Rollout


class SamplesFile:
    """Appends responses to a file, one JSON object each.

    Args:
        path: of the file.
        resume_step: keep what an interrupted run wrote up to this step; None starts a new file.

    Attributes:
        damaged: its lines that cannot be read; see `start_lines`.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.damaged = start_lines(path, resume_step)
        self.path = path

    def write(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        rewards: Rewards,
        kl: torch.Tensor,
        *,
        rows: str,
        limit: int | None,
        task: torch.Tensor | None = None,
    ) -> None:
        """Append responses.

        Args:
            step: steps done.
            rollouts: prompts with their responses.
            rewards: of all of them.
            kl: `[B]` k1 of each response, in nats.
            rows: `train` or `held_out`.
            limit: only this many, the first ones, and those of which a source said more than a
                number; None appends all.
            task: `[B]` what the task's verifier gave.
        """
        lines = []
        number = 0
        for rollout in rollouts:
            for text, response in zip(rollout.texts, rollout.sampled, strict=True):
                parts = {name: _rounded(v[number]) for name, v in rewards.parts.items()}
                notes = rewards.notes.get(number)
                if limit is not None and number >= limit and notes is None:
                    number += 1
                    continue
                lines.append(
                    {
                        "step": step,
                        "rows": rows,
                        "place": rollout.prompt.place,
                        "prompt": rollout.prompt.shown,
                        "response": text,
                        "finish": response.finish,
                        "reward": _rounded(rewards.plain[number]),
                        "rewards": parts,
                        "kl": round(float(kl[number]), 4),
                        **({} if task is None else {"task": _rounded(task[number])}),
                        **({} if notes is None else {"notes": notes}),
                    }
                )
                number += 1
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _rounded(value: torch.Tensor) -> float | None:
    """A number as it is written; null where there is none."""
    number = float(value)
    return None if math.isnan(number) else round(number, 6)


def read_values(path: Path, step: int, rows: str, key: str) -> dict[str, list[float]]:
    """Values of one step's responses by the place of their prompt, NaN where there is none.

    Args:
        path: of samples.jsonl.
        step: steps done.
        rows: `train` or `held_out`.
        key: `reward` or `task`.
    """
    values: dict[str, list[float]] = {}
    for line in read_metrics(path):
        if line["step"] == step and line.get("rows") == rows:
            value = line.get(key)
            values.setdefault(line["place"], []).append(math.nan if value is None else value)
    return values
