"""Supervised fine-tuning from recipe to merged model, through the real command line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine, Done
from peft import PeftModel
from running import make_recipe, make_rows, steps_of, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.runtime.metrics import read_metrics

STEP_KEYS = {
    *("step", "loss", "learning_rate", "grad_norm", "tokens", "step_seconds"),
    *("tokens_per_second", "memory_gb", "accuracy", "epoch"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def done(alignkit: CommandLine, folder: Path, tiny_base: Path) -> Done:
    write_rows(folder / "held.jsonl", make_rows(6, seed=9))
    recipe = make_recipe(
        folder,
        tiny_base,
        data__eval=[{"path": str(folder / "held.jsonl")}],
        training__max_steps=10,
        training__save_every=3,
        training__eval_every=5,
        training__keep=2,
    )
    return alignkit("sft", recipe, "training.learning_rate=4e-3", "--json", cwd=folder)


@pytest.fixture(scope="module")
def run(done: Done, folder: Path) -> Path:
    assert done.code == 0, done.stderr
    return folder / "run"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_stdout_is_the_summary_and_nothing_else(run: Path, done: Done) -> None:
    summary = json.loads(done.stdout)
    assert summary["output"] == str(run)
    assert summary["steps"] == 10
    assert summary["loss"] == steps_of(run)[-1]["loss"]
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["merge"]["positions"] > 0
    assert "Traceback" not in done.stderr
    assert "step 10/10" in done.stderr


def test_the_run_folder_is_whole(run: Path) -> None:
    names = sorted(path.name for path in run.iterdir() if path.name != ".lock")
    assert names == [
        "adapter", "checkpoints", "merged", "metrics.jsonl", "plan.json", "recipe.yaml", "run.json",
    ]  # fmt: skip
    # Saved at 3, 6, 9 and at the end; two are kept.
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000009", "step-000010",
    ]  # fmt: skip


def test_run_json_records_what_made_it(run: Path, folder: Path) -> None:
    about = read_json(run / "run.json")
    assert about["status"] == "finished"
    assert about["versions"].keys() >= {"python", "alignkit", "torch", "transformers", "peft"}
    assert about["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{64}", about["base"]["fingerprint"])
    assert re.fullmatch(r"[0-9a-f]{64}", about["data"]["train"]["fingerprint"])
    assert about["data"]["train"]["rows"] == 16
    assert about["data"]["eval"]["rows"] == 6
    assert about["command"].startswith("alignkit sft ")
    assert "training.learning_rate=4e-3" in about["command"]
    assert about["started"] <= about["ended"]
    assert about["summary"]["steps"] == 10


def test_metrics_are_one_object_a_step(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    assert len(lines) == (run / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
    steps = steps_of(run)
    assert [step["step"] for step in steps] == list(range(1, 11))
    assert {frozenset(step) for step in steps} == {frozenset(STEP_KEYS)}
    held = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in held] == [0, 5, 10]
    assert held[0].keys() == {
        "step",
        "eval/loss",
        "eval/perplexity",
        "eval/accuracy",
        "eval/tokens",
    }
    assert held[0]["eval/perplexity"] == pytest.approx(math.exp(held[0]["eval/loss"]))


def test_the_learning_rate_is_the_schedule(run: Path) -> None:
    # cosine over 10 steps without warm-up: 4e-3 · (1 + cos(π s / 10)) / 2
    rates = [step["learning_rate"] for step in steps_of(run)]
    expected = [4e-3 * (1 + math.cos(math.pi * s / 10)) / 2 for s in range(10)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_training_learns(run: Path) -> None:
    steps = steps_of(run)
    # One pass is 4 steps: the second pass is better than the first on the same rows.
    first, second = steps[:4], steps[4:8]
    assert sum(s["loss"] for s in second) < sum(s["loss"] for s in first) - 1.0
    assert steps[-1]["epoch"] == 2.5
    assert all(step["grad_norm"] > 0 for step in steps)


def test_the_plan_was_executed(run: Path) -> None:
    plan = read_json(run / "plan.json")
    assert plan["steps"] == 10
    assert plan["steps_per_epoch"] == 4
    tokens = [step["tokens"] for step in steps_of(run)]
    assert sum(tokens[:4]) == sum(tokens[4:8]) == plan["data"]["tokens"]


def test_the_recipe_is_resolved_and_runs_again(
    run: Path, folder: Path, alignkit: CommandLine
) -> None:
    again = alignkit("plan", run / "recipe.yaml", "--json", cwd=folder)
    assert again.code == 0, again.stderr
    plan = json.loads(again.stdout)
    assert plan["steps"] == 10
    assert plan["learning_rate"] == 4e-3


def test_plain_transformers_and_peft_load_the_outputs(run: Path, tiny_base: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    ids = tokenizer("the cat sat on a mat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        one, two = merged(ids).logits, adapted(ids).logits
        with adapted.disable_adapter():
            three = adapted(ids).logits
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)
    assert (one - three).abs().max() > 0.1
    assert tokenizer.chat_template
    settings = read_json(run / "merged" / "generation_config.json")
    eos = settings["eos_token_id"]
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn in (eos if isinstance(eos, list) else [eos])


def test_a_finished_run_is_not_overwritten(run: Path, folder: Path, alignkit: CommandLine) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    second = alignkit("sft", folder / "recipe.yaml", cwd=folder)
    assert second.code == 2
    assert f"error: {run} already holds a run" in second.stderr.replace("\n", "")
    assert "--resume to continue it, --overwrite to replace it" in second.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(
    run: Path, folder: Path, alignkit: CommandLine
) -> None:
    names = ("adapter/adapter_model.safetensors", "merged/model.safetensors")
    before = [(run / name).read_bytes() for name in names]
    metrics = (run / "metrics.jsonl").read_bytes()
    recipe = folder / "recipe.yaml"
    again = alignkit("sft", recipe, "training.learning_rate=4e-3", "--resume", cwd=folder)
    assert again.code == 0, again.stderr
    assert [(run / name).read_bytes() for name in names] == before
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_resuming_with_another_recipe_is_refused(
    run: Path, folder: Path, alignkit: CommandLine
) -> None:
    done = alignkit("sft", folder / "recipe.yaml", "--resume", cwd=folder)
    assert done.code == 2
    text = done.stderr.replace("\n", " ")
    assert "was started with another recipe: training.learning_rate was 0.004, is 0.002" in text
    assert "hint: put these keys back to resume, or start anew with --overwrite" in text


def test_quiet_prints_nothing(alignkit: CommandLine, tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base, training__max_steps=1)
    done = alignkit("sft", recipe, "--quiet", cwd=tmp_path)
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


def test_overwrite_starts_anew(alignkit: CommandLine, tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base, training__max_steps=2)
    assert alignkit("sft", recipe, "merge=false", cwd=tmp_path).code == 0
    assert not (tmp_path / "run" / "merged").exists()
    done = alignkit("sft", recipe, "training.max_steps=1", "--overwrite", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert len(steps_of(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "merged" / "config.json").is_file()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
