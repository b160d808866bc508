"""samples.jsonl: responses with their rewards, for a person to read."""

from __future__ import annotations

import json
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
    ) -> None:
        """Append responses.

        Args:
            step: steps done.
            rollouts: prompts with their responses.
            rewards: of all of them.
            kl: `[B]` k1 of each response, in nats.
            rows: `train` or `held_out`.
            limit: only this many, the first ones; None appends all.
        """
        lines = []
        number = 0
        for rollout in rollouts:
            for text, response in zip(rollout.texts, rollout.sampled, strict=True):
                parts = {name: round(float(v[number]), 6) for name, v in rewards.parts.items()}
                lines.append(
                    {
                        "step": step,
                        "rows": rows,
                        "place": rollout.prompt.place,
                        "prompt": rollout.prompt.shown,
                        "response": text,
                        "finish": response.finish,
                        "reward": round(float(rewards.plain[number]), 6),
                        "rewards": parts,
                        "kl": round(float(kl[number]), 4),
                    }
                )
                number += 1
        with self.path.open("a", encoding="utf-8") as file:
            for line in lines[:limit]:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_rewards(path: Path, step: int, rows: str) -> dict[str, list[float]]:
    """Rewards of one step's responses by the place of their prompt.

    Args:
        path: of samples.jsonl.
        step: steps done.
        rows: `train` or `held_out`.
    """
    rewards: dict[str, list[float]] = {}
    for line in read_metrics(path):
        if line["step"] == step and line.get("rows") == rows:
            rewards.setdefault(line["place"], []).append(line["reward"])
    return rewards
