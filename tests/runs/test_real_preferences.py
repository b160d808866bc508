"""The shipped preference recipes on the real 135M model, with a few short pairs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine
from running import steps_of, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

ANSWERS = [
    ("Name a fruit.", "An apple.", "I would rather not."),
    ("What is 2 + 2?", "4.", "Who knows."),
    ("Say hello.", "Hello!", "No."),
]
FEW = [
    "data.train=[{path: pairs.jsonl}]",
    "training.batch_size=6",
    "training.max_steps=2",
    "training.learning_rate=2e-4",
    "training.warmup=0",
    "data.eval=[]",
    "output=run",
]


def pairs() -> list[dict[str, Any]]:
    """Pairs behind a short system message, which takes the place of the template's long one."""
    return [
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": question},
            ],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for question, chosen, rejected in ANSWERS
    ]


def train(
    alignkit: CommandLine, stage: str, recipe: str, folder: Path, *options: str
) -> list[dict[str, float]]:
    write_rows(folder / "pairs.jsonl", pairs())
    done = alignkit(stage, recipe, *FEW, *options, cwd=folder)
    assert done.code == 0, done.stderr
    return steps_of(folder / "run")


def test_a_policy_starts_at_its_reference_and_learns(
    alignkit: CommandLine, real_base: Path, tmp_path: Path
) -> None:
    # In any precision, policy and reference are the same numbers before the first step.
    recipe = "preference/smollm2-135m-dpo.yaml"
    steps = train(alignkit, "dpo", recipe, tmp_path, "merge=false")
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["rewards/margins"] > 0.0


def test_a_reward_model_in_plain_transformers(
    alignkit: CommandLine, real_base: Path, tmp_path: Path
) -> None:
    steps = train(alignkit, "reward", "reward/smollm2-135m-lora.yaml", tmp_path)
    assert steps[1]["loss"] < steps[0]["loss"]
    merged = tmp_path / "run" / "merged"
    model = AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rows = pairs()
    turns = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in turns]
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        rewards = model(**inputs).logits[:, 0].view(-1, 2)
    assert (rewards[:, 0] - rewards[:, 1]).mean() > 0.0
