"""What must not change the result: micro-batches, processes, attention, checkpointing, resuming.

Float32 sums in another order differ by some 1e-7; Adam divides by the root of the second moment,
which makes 1e-5 of it where a gradient is near zero.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import CommandLine
from running import (
    adapter_of,
    furthest,
    losses,
    make_recipe,
    make_rows,
    steps_of,
    train,
    write_rows,
)
from tiny import MODELS, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow  # whole runs

GOLDEN = Path(__file__).parent.parent / "golden" / "sft_losses.json"


def run_of(folder: Path, base: Path, *overrides: str, **fields: Any) -> Path:
    make_recipe(folder, base, merge=False, **fields)
    train(folder / "recipe.yaml", *overrides)
    return folder / "run"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run with everything in one micro-batch."""
    folder = tmp_path_factory.mktemp("reference")
    return run_of(folder, tiny_base, "training.microbatch_tokens=4096", "training.max_steps=3")


@pytest.mark.parametrize("tokens", [16, 256])
def test_micro_batches(tokens: int, reference: Path, tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(
        tmp_path, tiny_base, f"training.microbatch_tokens={tokens}", "training.max_steps=3"
    )
    assert losses(run) == pytest.approx(losses(reference), rel=1e-6)
    assert furthest(adapter_of(run), adapter_of(reference)) < 1e-5
    norms = [[step["grad_norm"] for step in steps_of(path)] for path in (run, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for key in ("accuracy", "tokens", "learning_rate", "epoch"):
        assert [s[key] for s in steps_of(run)] == [s[key] for s in steps_of(reference)]


def test_processes(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    # Equal shares of the first step; its fifth row leaves one process nothing in the second.
    runs = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_rows(folder / "rows.jsonl", make_rows(5))
        write_rows(folder / "held.jsonl", make_rows(3, seed=5))
        recipe = make_recipe(
            folder,
            tiny_base,
            data__eval=[{"path": str(folder / "held.jsonl")}],
            training__max_steps=3,
            training__microbatch_tokens=128,
        )
        if count == 1:
            train(recipe)
        else:
            done = alignkit("sft", recipe, "--processes", "2", cwd=folder)
            assert done.code == 0, done.stderr
            assert done.stdout == ""
            assert done.stderr.count("step 3/3") == 1, "one process speaks"
        runs.append(folder / "run")
    one, two = runs
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    assert furthest(adapter_of(one), adapter_of(two)) < 1e-5
    assert [s["tokens"] for s in steps_of(one)] == [s["tokens"] for s in steps_of(two)]
    for key in ("loss", "accuracy", "tokens"):
        found = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in runs]
        after = [about["summary"]["after"][key] for about in found]
        assert after[0] == pytest.approx(after[1], rel=1e-6)
    assert (two / "merged" / "config.json").is_file()


def test_attention(reference: Path, tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, tiny_base, "model.attention=sdpa", "training.max_steps=3")
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_every_family_packed_and_padded(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family)
    found = []
    for attention in ("packed", "eager"):
        folder = tmp_path / attention
        overrides = (f"model.attention={attention}", "training.max_steps=2")
        run = run_of(folder, tmp_path / "base", *overrides)
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_gradient_checkpointing(reference: Path, tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(
        tmp_path, tiny_base, "training.gradient_checkpointing=true", "training.max_steps=3"
    )
    assert losses(run) == pytest.approx(losses(reference), rel=1e-6)
    assert furthest(adapter_of(run), adapter_of(reference)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "dtype", "checkpointing"),  # every pair of two of them
    [
        ("lora", "float32", "true"),
        ("lora", "bfloat16", "false"),
        ("full", "float32", "false"),
        ("full", "bfloat16", "true"),
    ],
)
def test_everything_learns(
    kind: str, dtype: str, checkpointing: str, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = {"kind": "full"} if kind == "full" else {"kind": "lora", "rank": 8, "alpha": 16}
    run = run_of(
        tmp_path,
        tiny_base,
        f"training.gradient_checkpointing={checkpointing}",
        f"model.dtype={dtype}",
        adapter=adapter,
        training__max_steps=12,
        training__learning_rate=5e-3 if kind == "lora" else 1e-3,
    )
    found = losses(run)
    # Random weights start at about log(700) = 6.6 nats or above, for words from a list of 17.
    assert np.mean(found[-4:]) < np.mean(found[:4]) - 1.0
    assert all(math.isfinite(loss) for loss in found)


def test_the_first_loss_is_plain_transformers(tiny_base: Path, tmp_path: Path) -> None:
    # B = 0, so the first step's loss is the base's: Σ -log p over the completions of all rows,
    # divided by the number of their tokens. Here prompt and completion are tokenized apart.
    rows = make_rows(16)
    run = run_of(tmp_path, tiny_base, training__batch_size=16, training__max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    total, count = 0.0, 0
    for row in rows:
        ids: list[int] = []
        labels: list[int] = []
        for turn in row["messages"]:
            own = turn["role"] == "assistant"
            head = f"<|im_start|>{turn['role']}\n"
            parts = [(head, False), (f"{turn['content']}<|im_end|>", own), ("\n", False)]
            for text, trained in parts:
                new = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += new
                labels += new if trained else [-100] * len(new)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.double()
        trained_tokens = sum(label != -100 for label in labels[1:])
        total += float(loss) * trained_tokens
        count += trained_tokens
    (step,) = steps_of(run)
    assert step["loss"] == pytest.approx(total / count, rel=1e-5)
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert plan["data"]["trained_tokens"] == count


def test_golden_losses(tmp_path: Path) -> None:
    # After a change that is meant to move them:
    #   ALIGNKIT_UPDATE_GOLDEN=1 python -m pytest tests/runs/test_invariance.py -k golden
    save_tiny(tmp_path / "base")
    run = run_of(tmp_path, tmp_path / "base", training__max_steps=10)
    found = losses(run)
    if os.environ.get("ALIGNKIT_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(golden) == 10
    assert found == pytest.approx(golden, rel=1e-4)


def test_the_seed_matters(reference: Path, tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, tiny_base, "seed=1", "training.max_steps=3")
    assert losses(run) != pytest.approx(losses(reference), rel=1e-3)


def test_the_name_of_the_folder_does_not_matter(
    reference: Path, tiny_base: Path, tmp_path: Path
) -> None:
    overrides = ("training.microbatch_tokens=4096", "training.max_steps=3")
    run = run_of(tmp_path / "another", tiny_base, *overrides)
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (reference / name).read_bytes()


EVERY_ROW = {
    "training__batch_size": 16,
    "training__schedule": "constant",
    "training__max_steps": 3,
}


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("plain"), tiny_base, **EVERY_ROW)


@pytest.mark.parametrize(
    ("train_on", "share"), [("completions", 0.0), ("last_turn", -1.0), ("everything", 1.0)]
)
def test_train_on(
    train_on: str, share: float, plain: Path, tiny_base: Path, tmp_path: Path
) -> None:
    # All rows in each step, so that each is better than the one before: by 0.04 to 0.08 nats.
    run = run_of(tmp_path, tiny_base, f"data.train_on={train_on}", **EVERY_ROW)
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))["data"]
    usual = json.loads((plain / "plan.json").read_text(encoding="utf-8"))["data"]
    assert np.sign(plan["trained_tokens"] - usual["trained_tokens"]) == share
    assert plan["tokens"] == usual["tokens"]
    if train_on == "everything":  # all but the first token of each row
        assert plan["trained_tokens"] == plan["tokens"] - plan["rows"]
    for before, after in itertools.pairwise(losses(run)):
        assert after < before - 0.03
    assert (losses(run)[0] == pytest.approx(losses(plain)[0], rel=1e-6)) == (share == 0)


@pytest.mark.parametrize("too_long", ["drop", "truncate_left", "truncate_right"])
def test_too_long(too_long: str, tiny_base: Path, tmp_path: Path) -> None:
    overrides = (f"data.too_long={too_long}", "data.max_length=100", "training.max_steps=1")
    run = run_of(tmp_path, tiny_base, *overrides)
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]["train"]
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))["data"]
    assert about["rows"] == 16
    assert plan["longest"] <= 100 < about["lengths"]["max"]
    if too_long == "drop":
        assert about["kept"] == plan["rows"] < 16
        (reason,) = about["dropped"]
        assert reason == "longer than max_length = 100 tokens"
        assert about["dropped"][reason] == 16 - about["kept"]
        assert about["truncated"] == 0
    else:
        dropped = sum(about["dropped"].values())
        assert about["kept"] == plan["rows"] == 16 - dropped
        assert about["truncated"] > 0
        assert (about["lost_ends"] > 0) == (too_long == "truncate_right")


def test_a_share_of_the_rows_is_held_out(tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, tiny_base, "data.eval_fraction=0.25")
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))["data"]
    assert (plan["rows"], plan["eval_rows"], plan["overlap"]) == (12, 4, 0)
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))["summary"]
    assert about["before"]["tokens"] == about["after"]["tokens"] > 0
    assert about["after"]["loss"] < about["before"]["loss"]


def test_the_tiny_tokenizer_is_the_one_of_the_base(tiny_base: Path) -> None:
    text = "the cat sat<|im_end|>"
    saved = AutoTokenizer.from_pretrained(tiny_base)
    assert saved(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
