"""The shipped preference recipes on the real 135M model, a few pairs of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from commandline import CommandLine
from running import steps_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignkit.recipe.assets import assets_root

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

PAIRS = 2
FEW = [
    f"data.train.0.take={PAIRS}",
    f"training.batch_size={PAIRS}",
    "training.max_steps=2",
    "training.learning_rate=2e-4",
    "training.warmup=0",
    "data.eval=[]",
    "output=run",
]


def train(
    alignkit: CommandLine, stage: str, recipe: str, folder: Path, *options: str
) -> list[dict[str, float]]:
    done = alignkit(stage, recipe, *FEW, *options, cwd=folder)
    assert done.code == 0, done.stderr
    return steps_of(folder / "run")


@pytest.mark.parametrize(
    ("stage", "recipe", "start"),
    [
        ("dpo", "preference/smollm2-135m-dpo.yaml", math.log(2)),
        ("kto", "preference/smollm2-135m-kto.yaml", 0.5),
    ],
)
def test_a_policy_starts_at_its_reference_and_learns(
    stage: str,
    recipe: str,
    start: float,
    alignkit: CommandLine,
    real_base: Path,
    tmp_path: Path,
) -> None:
    # In any precision, policy and reference are the same numbers before the first step.
    # KTO's baseline moves, too: with fewer rows or steps its loss first rises.
    kto = ("data.train.0.take=6", "training.batch_size=6", "training.max_steps=3")
    more = kto if stage == "kto" else ()
    steps = train(alignkit, stage, recipe, tmp_path, "merge=false", *more)
    assert steps[0]["loss"] == pytest.approx(start, rel=1e-5)
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
    path = assets_root() / "data_templates" / "preference" / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:PAIRS]]
    turns = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in turns]
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        rewards = model(**inputs).logits[:, 0].view(-1, 2)
    assert (rewards[:, 0] - rewards[:, 1]).mean() > 0.0
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--data", file, "--dtype", "float32", "--json"]
    done = alignkit("eval", tmp_path / "run", *options, cwd=tmp_path)
    assert done.code == 0, done.stderr
    (values,) = json.loads(done.stdout).values()
    found = float((rewards[:, 0] - rewards[:, 1]).mean())
    assert values["rewards/margins"] == pytest.approx(found, abs=1e-4)
