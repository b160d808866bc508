"""A tiny model that answers in words and stops, and a reward model that likes some of them."""

from __future__ import annotations

import random
from pathlib import Path

from running import BAD, GOOD, make_pairs, make_preference_recipe, make_recipe, train, write_rows


def make_models(folder: Path, base: Path) -> tuple[Path, Path]:
    """Runs of an SFT model and of a reward model over it.

    The SFT model answers every question with GOOD and BAD words in any order, so that its answers
    differ; the reward model has seen GOOD words win.
    """
    (folder / "sft").mkdir(parents=True)
    rng = random.Random(0)
    rows = [
        {
            "prompt": row["prompt"],
            "completion": [
                {
                    "role": "assistant",
                    "content": " ".join(rng.choices(GOOD + BAD, k=rng.randint(1, 4))),
                }
            ],
        }
        for row in make_pairs(64)
    ]
    write_rows(folder / "sft" / "rows.jsonl", rows)
    loop = {"max_steps": 40, "batch_size": 16, "learning_rate": 4e-3, "warmup": 0}
    train(make_recipe(folder / "sft", base, adapter={"kind": "full"}, training=loop))
    policy = folder / "sft" / "run"
    (folder / "rm").mkdir()
    write_rows(folder / "rm" / "rows.jsonl", make_pairs(32, evident=True))
    loop = {"max_steps": 20, "batch_size": 16, "learning_rate": 1e-2, "warmup": 0}
    train(make_preference_recipe(folder / "rm", policy, "reward", training=loop, merge=True))
    return policy, folder / "rm" / "run"
