"""What is disturbed: training in five stages, merging, exporting, replacing, a pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import make_labelled, make_pairs, make_prompts, make_rows, write_rows

STEPS, EVERY = 6, 2
"""Steps of a run, and steps between its checkpoints."""


@dataclass(frozen=True)
class Work:
    """A command, what it needs, and what it makes.

    Args:
        name: of the work.
        command: arguments of `alignkit`.
        again: those that go on after a fault.
        before: work whose result is there first; empty for none.
        made: patterns of what it makes, to the byte.
        metrics: its files of measurements.
    """

    name: str
    command: tuple[str, ...]
    again: tuple[str, ...]
    before: str = ""
    made: tuple[str, ...] = ("run/adapter/**/*", "run/value/**/*", "run/merged/**/*")
    metrics: tuple[str, ...] = ("run/metrics.jsonl",)

    @property
    def trains(self) -> bool:
        """Whether it is one run of a stage, which has checkpoints."""
        return self.name in STAGES


STAGES = ("sft", "reward", "dpo", "kto", "ppo", "grpo")

_TRAINING = [
    Work(stage, (stage, f"{stage}.yaml"), (stage, f"{stage}.yaml", "--resume")) for stage in STAGES
]
_OTHERS = [
    Work(
        "merge",
        ("merge-lora", "run", "--output", "dense"),
        ("merge-lora", "run", "--output", "dense", "--overwrite"),
        before="sft",
        made=("dense/**/*",),
    ),
    Work(
        "merge again",
        ("merge-lora", "run", "--overwrite"),
        ("merge-lora", "run", "--overwrite"),
        before="sft",
    ),
    Work(
        "export",
        ("export", "gguf", "run", "--output", "model.gguf"),
        ("export", "gguf", "run", "--output", "model.gguf", "--overwrite"),
        before="sft",
        made=("model.*",),
    ),
    Work(
        "replace",
        ("sft", "sft.yaml", "--overwrite"),
        ("sft", "sft.yaml", "--overwrite"),
        before="sft",
    ),
    Work(
        "pipeline",
        ("run", "pipeline.yaml"),
        ("run", "pipeline.yaml"),
        made=("out/*/adapter/**/*", "out/*/merged/**/*"),
        metrics=("out/first/metrics.jsonl", "out/second/metrics.jsonl"),
    ),
]
WORKS = {work.name: work for work in (*_TRAINING, *_OTHERS)}
"""Name -> work."""

_ROWS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "sft": make_rows,
    "reward": make_pairs,
    "dpo": make_pairs,
    "kto": make_labelled,
    "ppo": make_prompts,
    "grpo": make_prompts,
}


def lay_out(folder: Path, base: Path) -> None:
    """Write the recipes and rows of all works.

    Args:
        folder: working folder of the commands.
        base: the tiny model.
    """
    folder.mkdir()
    for stage, make in _ROWS.items():
        write_rows(folder / f"{stage}.jsonl", make(12))
        (folder / f"{stage}.yaml").write_text(json.dumps(_recipe(stage, base)), encoding="utf-8")
    template = Path(__file__).parents[2] / "data_templates" / "chat" / "chatml.jinja"
    (folder / "chat.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    first, second = {"recipe": "sft.yaml"}, {"recipe": "dpo.yaml", "model": {"base": "${first}"}}
    pipeline = {"output": "out", "stages": {"first": first, "second": second}}
    (folder / "pipeline.yaml").write_text(json.dumps(pipeline), encoding="utf-8")


def _recipe(stage: str, base: Path) -> dict[str, Any]:
    training = {
        "max_steps": STEPS,
        "learning_rate": 2e-3,
        "warmup": 0,
        "save_every": EVERY,
        "eval_every": 3,
        "microbatch_tokens": 256,
    }
    recipe: dict[str, Any] = {
        "stage": stage,
        "output": "run",
        "model": {"base": str(base), "dtype": "float32", "chat_template": "chat.jinja"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "data": {"train": [{"path": f"{stage}.jsonl"}], "max_length": 256, "eval_fraction": 0.2},
        "training": training,
        "merge": stage in ("sft", "reward"),
    }
    if stage in ("ppo", "grpo"):
        recipe["reward"] = {"rule": "regex", "pattern": "e"}
        recipe["rollout"] = {"prompts_per_step": 4, "max_new_tokens": 6, "samples_every": 1}
        if stage == "grpo":
            recipe["objective"] = {"resample": 1}
            recipe["rollout"]["samples_per_prompt"] = 4
    else:
        training["batch_size"] = 4
    return recipe
