"""Imported losses, steps, lengths and trained tokens mean what they mean in the other toolkit."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from test_importing import (
    AXOLOTL,
    LLAMA_FACTORY,
    imported,
    reasons,
    refused,
    said,
    values,
    write_info,
)
from test_importing import work as work  # the working folder of each test

PAIRS = "--model_name_or_path org/base --dataset_name org/pairs"
GROUPS = "trl grpo --model_name_or_path org/base --dataset_name org/rows --reward_funcs r.score"


@pytest.mark.parametrize(
    ("command", "objective"),
    [
        ("cpo", {"kind": "cpo", "beta": 0.1, "nll_weight": 1}),
        ("cpo --loss_type sigmoid --cpo_alpha 0.5", {"kind": "cpo", "nll_weight": 0.5}),
        ("cpo --loss_type simpo", {"kind": "simpo", "gamma": 0.5}),
        ("orpo --loss_type hinge", {"kind": "orpo"}),
        ("dpo --loss_type hinge", {"kind": "hinge"}),
    ],
)
def test_losses_of_trl_are_those_of_the_script(command: str, objective: dict[str, Any]) -> None:
    done = imported(f"trl {command} {PAIRS}\n", "run.sh")
    found = values(done)["objective"]
    usual = {"nll_weight": 1.0, "gamma": 0.5, "beta": 0.1}
    assert {key: found.get(key, usual.get(key)) for key in objective} == objective
    assert ("loss_type" in reasons(done)) == command.startswith("orpo")


@pytest.mark.parametrize("name", ["hinge", "ipo", "alphapo"])
def test_losses_of_cpo_without_counterpart_are_refused(name: str) -> None:
    error = refused(f"trl cpo {PAIRS} --loss_type {name}\n", "run.sh")
    assert "run.sh:1: loss_type names a loss of CPO that alignkit does not have" in str(error)
    assert "sigmoid and simpo" in error.problems[0].hint


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [("", "cpo_alpha: 1, the default"), ("0.3", "cpo_alpha: 0.3;"), ("0", "")],
)
def test_simpo_through_cpo_says_that_its_likelihood_is_missing(alpha: str, expected: str) -> None:
    given = f"--cpo_alpha {alpha}" if alpha else ""
    ours = imported(f"trl cpo {PAIRS} --loss_type simpo {given}\n", "run.sh")
    axolotl = AXOLOTL.replace("TYPE", "chatml.intel") + "rl: simpo\n"
    theirs = imported(axolotl + (f"cpo_alpha: {alpha}\n" if alpha else ""))
    for notes in (said(ours, "loss_type"), said(theirs, "rl")):
        assert expected in notes
        assert ("here it is not added" in notes) == bool(expected)
    assert ("cpo_alpha" in reasons(theirs)) == (alpha == "0.3")


def rollout(more: str, **options: Any) -> tuple[int, int]:
    recipe = values(imported(f"{GROUPS} --num_generations 4 {more}\n", "run.sh", **options))
    updates = recipe.get("objective", {}).get("minibatches", 1)
    return recipe["rollout"]["prompts_per_step"], updates


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--gradient_accumulation_steps 4", (8, 1)),
        ("--gradient_accumulation_steps 4 --steps_per_generation 2", (8, 1)),
        ("--gradient_accumulation_steps 4 --generation_batch_size 16", (8, 1)),
        ("--gradient_accumulation_steps 2 --steps_per_generation 4", (8, 2)),
    ],
)
def test_a_step_has_the_prompts_of_an_optimizer_step(more: str, expected: tuple[int, int]) -> None:
    assert rollout(f"--per_device_train_batch_size 8 {more}") == expected


def test_generations_that_do_not_fill_whole_steps_are_refused() -> None:
    more = "--gradient_accumulation_steps 4 --steps_per_generation"
    error = refused(f"{GROUPS} {more} 3\n", "run.sh")
    assert "steps_per_generation samples 24 responses at once" in str(error)
    assert "an optimizer step reads 32" in str(error)
    again = refused(f"{GROUPS} {more} 2 --num_iterations 2\n", "run.sh")
    assert "read the same responses several times" in str(again)


def test_optimizer_steps_of_grpo_become_rollouts() -> None:
    counts = "--max_steps 41 --warmup_steps 8 --save_steps 10 --logging_steps 4"
    more = "--steps_per_generation 2 --num_iterations 2 --eval_strategy steps --eval_steps 20"
    done = imported(f"{GROUPS} {counts} {more}\n", "run.sh")
    training = values(done)["training"]
    wanted = {"max_steps": 11, "warmup": 2, "save_every": 3, "log_every": 1, "eval_every": 5}
    assert {key: training.get(key, 1) for key in wanted} == wanted
    assert "41 optimizer steps there are 11 here" in said(done, "max_steps")
    (shown,) = (one.settings for one in done.translated if one.key == "max_steps")
    assert shown == {"training.max_steps": 11}
    shares = values(imported(f"{GROUPS} --steps_per_generation 2 --warmup_ratio 0.1\n", "run.sh"))
    assert shares["training"]["warmup"] == 0.1


def test_steps_of_ppo_are_rollouts_there_too() -> None:
    write_info({"mine": {"file_name": "m.json"}})
    more = "reward_model: runs/rm\nppo_epochs: 4\nppo_buffer_size: 2\nmax_steps: 40\n"
    done = imported(LLAMA_FACTORY.replace("STAGE", "ppo") + more)
    assert values(done)["training"]["max_steps"] == 40


def test_long_texts_of_axolotl_are_trained_as_far_as_they_fit() -> None:
    done = imported(AXOLOTL.replace("TYPE", "completion"))
    assert values(done)["data"]["too_long"] == "truncate_right"
    assert "the rest of it is not trained: split such texts before" in said(done, "sequence_len")
    strict = AXOLOTL.replace("TYPE", "completion") + "excess_length_strategy: raise\n"
    assert values(imported(strict))["data"].get("too_long", "error") == "error"


@pytest.mark.parametrize("ratio", ["1.0", "5"])
def test_a_ratio_of_warm_up_is_no_number_of_steps(ratio: str) -> None:
    error = refused(AXOLOTL.replace("TYPE", "alpaca") + f"warmup_ratio: {ratio}\n")
    assert "warmup_ratio must be less than 1" in str(error)
    assert "warmup_steps" in error.problems[0].hint


ROW = '{"prompt": "a", "completion": "b"}'
FILES = {
    "rows.json": f"[\n{ROW}]".encode(),
    "lines.json": f"\ufeff{ROW}\n{ROW}\n".encode(),
    "rows.jsonl": f"\ufeff{ROW}\n".encode(),
    "rows.jsonl.gz": gzip.compress(ROW.encode()),
    "rows.csv": b"prompt,completion\na,b\n",
}


@pytest.mark.parametrize("name", FILES)
def test_the_completion_is_trained_whatever_the_file(name: str) -> None:
    Path(name).write_bytes(FILES[name])
    text = f"model_name_or_path: org/base\ndataset_name: {name}\n"
    done = imported(text, stage="sft")
    assert values(done)["data"].get("train_on", "completions") == "completions"
    assert "TRL trains every token" not in said(done)


@pytest.mark.parametrize(
    ("name", "content"),
    [("org/rows", b""), ("rows.parquet", b"PAR1"), ("rows.json", b"{"), ("x.jsonl", b"")],
)
def test_columns_that_are_not_known_are_said(name: str, content: bytes) -> None:
    if "/" not in name:
        Path(name).write_bytes(content)
    text = f"model_name_or_path: org/base\ndataset_name: {name}\n"
    done = imported(text, stage="sft")
    assert values(done)["data"]["train_on"] == "everything"
    assert "the columns of the rows are not known here" in said(done)
    assert "trains the completion alone" in said(done)


def test_rows_without_completion_are_trained_whole() -> None:
    Path("rows.json").write_text('[{"messages": []}]', encoding="utf-8")
    text = "model_name_or_path: org/base\ndataset_name: rows.json\n"
    done = imported(text, stage="sft")
    assert values(done)["data"]["train_on"] == "everything"
    assert "not known here" not in said(done)
