"""Runs on pairs and labelled completions: what must not change them, and what they leave."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commandline import CommandLine
from running import (
    adapter_of,
    assert_same,
    break_off,
    furthest,
    losses,
    make_labelled,
    make_pairs,
    make_preference_recipe,
    make_recipe,
    steps_of,
    train,
    without_times,
    write_rows,
)
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.errors import ModelError
from alignkit.models.adapters.files import HEAD_KEY
from alignkit.models.rewards import classifier
from alignkit.models.scoring.scorer import sum_by_sequence
from alignkit.recipe.reading.load import load_recipe
from alignkit.runtime.metrics import read_metrics
from alignkit.stages.inputs.base import start_model
from alignkit.stages.inputs.rows import load_rows
from alignkit.stages.running import finish as outputs
from alignkit.stages.running.session import Session
from alignkit.stages.supervised.preference import preference_hooks

pytestmark = pytest.mark.slow  # whole runs

ADAPTER = "adapter/adapter_model.safetensors"
DENSE = "merged/model.safetensors"
FULL: dict[str, Any] = {"adapter": {"kind": "full"}, "training__learning_rate": 3e-4}
CACHED = {"reference": {"kind": "cached"}}


def run_of(folder: Path, base: Path, stage: str, *overrides: str, **fields: Any) -> Path:
    train(make_preference_recipe(folder, base, stage, **fields), *overrides)
    return folder / "run"


def plan_of(run: Path) -> Any:
    return json.loads((run / "plan.json").read_text(encoding="utf-8"))


def about(run: Path) -> Any:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def evaluations(run: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "eval/loss" in line]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ALIGNKIT_HOME."""
    folder = tmp_path / "home"
    monkeypatch.setenv("ALIGNKIT_HOME", str(folder))
    return folder


def stored(home: Path) -> dict[str, tuple[int, int]]:
    """Name -> inode and time of every file of reference log-probs."""
    files = (home / "cache" / "references").glob("*")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


# Invariance ------------------------------------------------------------------------------------

INVARIANT: dict[str, tuple[str, dict[str, Any]]] = {
    "reward": ("reward", {}),
    "dpo": ("dpo", CACHED),
    "orpo": ("dpo", {"objective": {"kind": "orpo"}}),
    "kto": ("kto", {"reference": {"kind": "adapter_off"}}),
}
ROWS = 13
"""In steps of 5, so that the last step of a pass has 3."""


def several_passes(folder: Path, base: Path, case: str, **fields: Any) -> Path:
    """Four steps of 5, 5, 3 and 5 rows."""
    stage, more = INVARIANT[case]
    folder.mkdir(parents=True)
    rows = make_pairs(ROWS)
    if stage == "kto":  # mostly good completions, all alike, so that the baseline leaves zero
        rows = make_labelled(ROWS, evident=True)
        rows = [{**row, "label": number % 4 > 0} for number, row in enumerate(rows)]
    write_rows(folder / "rows.jsonl", rows)
    shape: dict[str, Any] = {"training__batch_size": 5, "training__max_steps": 4}
    shape["training__learning_rate"] = 5e-4
    return make_preference_recipe(folder, base, stage, **{**shape, **more, **fields})


def assert_equal_runs(one: Path, two: Path) -> None:
    # A log-prob of 100 nats is exact to 1e-5: a millionth of the loss of DPO, which scales it by
    # β = 0.1.
    for mine, other in zip(steps_of(one), steps_of(two), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6, abs=1e-6)
        assert mine.keys() == other.keys()
        for name in mine.keys() & {"rewards/margins", "logps/chosen", "kl"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=2e-5)
        assert mine["tokens"] == other["tokens"]
    assert furthest(adapter_of(one), adapter_of(two)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", INVARIANT)
def test_micro_batches(case: str, tiny_base: Path, tmp_path: Path) -> None:
    runs = {}
    for tokens in (60, "auto"):
        recipe = several_passes(
            tmp_path / str(tokens), tiny_base, case, training__microbatch_tokens=tokens
        )
        train(recipe)
        runs[tokens] = tmp_path / str(tokens) / "run"
    assert plan_of(runs[60])["microbatches"] >= 4 > plan_of(runs["auto"])["microbatches"] == 1
    assert_equal_runs(runs[60], runs["auto"])
    assert len({round(loss, 4) for loss in losses(runs["auto"])}) == 4  # something moves
    if case == "kto":
        assert max(step["kl"] for step in steps_of(runs["auto"])) > 0.1


@pytest.mark.parametrize("case", [pytest.param("dpo", marks=pytest.mark.slow), "kto"])
def test_processes(
    case: str, alignkit: CommandLine, tiny_base: Path, tmp_path: Path, home: Path
) -> None:
    held = (make_labelled if case == "kto" else make_pairs)(5, seed=8)
    runs = []
    for count in (1, 2):
        recipe = several_passes(
            tmp_path / str(count),
            tiny_base,
            case,
            training__microbatch_tokens=200,
            data__eval=[{"path": str(write_rows(tmp_path / "held.jsonl", held))}],
            reference={"kind": {"dpo": "cached", "kto": "adapter_off"}[case]},
        )
        if count == 1:
            train(recipe)
        else:
            here = f"import os; os.environ['ALIGNKIT_HOME'] = {str(home)!r}"
            done = alignkit.together(2, case, recipe, cwd=tmp_path, before=here)
            assert done.code == 0, done.stderr
            scored = done.stderr.count("with the reference model, once")
            assert scored == (2 if case == "dpo" else 0), "training rows and held-out rows"
        runs.append(tmp_path / str(count) / "run")
    one, two = runs
    assert_equal_runs(one, two)
    if case == "kto":  # of the whole step, not of one process's rows
        kl = [[step["kl"] for step in steps_of(run)] for run in runs]
        assert max(kl[0]) > 0.1
        assert kl[1] == pytest.approx(kl[0], rel=1e-4, abs=2e-5)
    for before, after in zip(evaluations(one), evaluations(two), strict=True):
        assert before == pytest.approx(after, rel=1e-4, abs=2e-5)


# The first step --------------------------------------------------------------------------------

LN2 = math.log(2.0)
AT_THE_START: dict[str, tuple[dict[str, Any], float]] = {
    # The loss if policy and reference agree, with the defaults except for the numbers named here.
    "dpo": ({}, LN2),
    "ipo": ({"tau": 0.2}, (1 / (2 * 0.2)) ** 2),
    "cdpo": ({}, LN2),
    "robust": ({}, LN2),
    "hinge": ({}, 1.0),
    "apo_zero": ({}, 1.0),
    "apo_down": ({}, 1.0),
    "nca": ({}, 2 * LN2),
    "sppo": ({"beta": 0.5}, 2 * (1 / (2 * 0.5)) ** 2),
}


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_first_step_with_a_reference(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    fields, expected = AT_THE_START[kind]
    run = run_of(
        tmp_path,
        tiny_base,
        "dpo",
        objective={"kind": kind, **fields},
        reference={"kind": "adapter_off"},
        training__max_steps=2,
    )
    first, second = steps_of(run)
    assert first["loss"] == pytest.approx(expected, abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0
    assert first["rewards/accuracies"] == 0.5  # ties
    assert first["logps/chosen"] < -10 > first["logps/rejected"]
    assert second["rewards/chosen"] != 0.0
    assert_not_merged(run)


def assert_not_merged(run: Path) -> None:
    assert not (run / "merged").exists()
    assert (run / ADAPTER).is_file()
    assert about(run)["summary"]["merge"] is None


class Alike(torch.nn.Module):
    """A policy that agrees with its reference."""

    def forward(self, batch: Any) -> Any:
        return SimpleNamespace(logprobs=torch.linspace(-3.0, -1.0, len(batch.target_ids)))


def test_every_objective_with_a_reference_and_its_defaults(tiny_base: Path, tmp_path: Path) -> None:
    def reference(scorer: Any, batch: Any) -> torch.Tensor:
        return sum_by_sequence(scorer(batch).logprobs, batch)

    for kind, (fields, expected) in AT_THE_START.items():
        path = make_preference_recipe(
            tmp_path, tiny_base, "dpo", objective={"kind": kind, **fields}
        )
        recipe: Any = load_recipe(str(path)).recipe
        rows = load_rows(recipe, start_model(recipe.model)).train
        found = preference_hooks(recipe, rows, reference).loss(  # type: ignore[arg-type]
            Alike(), [rows.document(item) for item in range(4)], {}
        )
        assert float(found.loss) / 4 == pytest.approx(expected, abs=1e-6), kind
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert float(found.metrics[name]) == 0.0, kind


def test_first_step_of_kto_and_its_weights(tiny_base: Path, tmp_path: Path) -> None:
    # Half the weight of each completion if policy and reference agree.
    fields: dict[str, Any] = {
        "objective": {"desirable_weight": 3.0, "undesirable_weight": 0.5},
        "reference": {"kind": "adapter_off"},
        "training__batch_size": 16,
        "training__max_steps": 2,
    }
    run = run_of(tmp_path, tiny_base, "kto", **fields)
    first, second = steps_of(run)
    assert first["loss"] == pytest.approx((8 * 1.5 + 8 * 0.25) / 16, abs=1e-6)
    assert first["kl"] == 0.0
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert second["rewards/chosen"] != 0.0
    assert_not_merged(run)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_sliding_windows(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family)
    run = run_of(tmp_path, tmp_path / "base", "dpo", **CACHED, training__max_steps=1)
    assert losses(run) == pytest.approx([LN2], abs=1e-5)


# References ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_kinds_of_reference_agree(stage: str, tiny_base: Path, tmp_path: Path, home: Path) -> None:
    """Over rows that are repeated."""
    rows = write_rows(tmp_path / "rows.jsonl", (make_labelled if stage == "kto" else make_pairs)(8))
    source = [{"path": str(rows), "weight": 2.0}]
    runs = {
        kind: run_of(
            tmp_path / kind, tiny_base, stage, reference={"kind": kind}, data__train=source
        )
        for kind in ("adapter_off", "cached", "frozen_copy")
    }
    assert [plan_of(run)["reference"] for run in runs.values()] == list(runs)
    for kind in ("cached", "frozen_copy"):
        assert losses(runs[kind]) == pytest.approx(losses(runs["adapter_off"]), abs=1e-5)
    assert abs(losses(runs["cached"])[-1] - losses(runs["cached"])[0]) > 1e-3
    assert plan_of(runs["cached"])["steps_per_epoch"] == 4
    (path,) = (home / "cache" / "references").iterdir()
    with np.load(path) as file:
        assert file["rows"].tolist() == list(range(8)), "each row is scored once"


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_kinds_of_reference_agree_for_full_weights(
    stage: str, tiny_base: Path, tmp_path: Path
) -> None:
    runs = [
        run_of(
            tmp_path / kind,
            tiny_base,
            stage,
            reference={"kind": kind},
            training__max_steps=2,
            **FULL,
        )
        for kind in ("cached", "frozen_copy")
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)
    assert losses(runs[0])[0] == pytest.approx(LN2 if stage == "dpo" else 0.5, abs=1e-5)
    assert abs(losses(runs[0])[-1] - losses(runs[0])[0]) > 1e-3


@pytest.fixture
def no_scoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on scoring with the reference model is an error."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("scored again")

    return lambda: monkeypatch.setattr(
        "alignkit.stages.supervised.reference.score_sequences", refuse
    )


@pytest.mark.slow
def test_scored_once_for_all_later_runs(
    tiny_base: Path, tmp_path: Path, home: Path, no_scoring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = write_rows(tmp_path / "held.jsonl", make_pairs(5, seed=8))
    fields = {**CACHED, "data__eval": [{"path": str(held)}], "training__max_steps": 2}
    run_of(tmp_path / "first", tiny_base, "dpo", **fields)
    files = stored(home)
    assert len(files) == 2  # training rows and held-out rows
    other = {"objective": {"kind": "dpo", "beta": 0.3}, "training__learning_rate": 5e-4}
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "empty"))
    fresh = run_of(tmp_path / "fresh", tiny_base, "dpo", **fields, **other)
    assert stored(tmp_path / "empty").keys() == files.keys()
    monkeypatch.setenv("ALIGNKIT_HOME", str(home))
    no_scoring()
    again = run_of(tmp_path / "again", tiny_base, "dpo", **fields, **other)
    assert stored(home) == files, "the files were read, not written"
    assert (again / ADAPTER).read_bytes() == (fresh / ADAPTER).read_bytes()
    assert without_times(again) == without_times(fresh)


OTHER_QUESTIONS: dict[str, list[str]] = {
    "another model": ["model.base=other"],
    "a length that cuts rows": ["data.max_length=24", "data.too_long=truncate_right"],
    "another precision": ["model.dtype=bfloat16"],
}


@pytest.mark.slow
def test_not_reused_for_another_model_or_other_rows(
    tiny_base: Path, tmp_path: Path, home: Path, no_scoring: Any
) -> None:
    save_tiny(tmp_path / "other", seed=1)
    recipe = make_preference_recipe(tmp_path, tiny_base, "dpo", **CACHED, training__max_steps=1)

    def run(name: str, *overrides: str) -> None:
        places = [o.replace("=other", f"={tmp_path / 'other'}") for o in overrides]
        train(recipe, *places, f"output={tmp_path / name}")

    run("one")
    for count, overrides in enumerate(OTHER_QUESTIONS.values(), 2):
        run(f"two-{count}", *overrides)
        assert len(stored(home)) == count
    no_scoring()
    for count, overrides in enumerate(OTHER_QUESTIONS.values(), 2):
        run(f"three-{count}", *overrides)
    with pytest.raises(AssertionError, match="scored again"):
        run("four", "seed=1")


def test_bfloat16_of_lora_and_of_full_weights_are_stored_apart(
    tiny_base: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A frozen base is stored in bfloat16, weights that are trained in float32.
    fields: dict[str, Any] = {"model__dtype": "bfloat16", "training__max_steps": 2}
    run_of(tmp_path / "lora", tiny_base, "dpo", **fields, **CACHED)
    after_lora = run_of(tmp_path / "one", tiny_base, "dpo", **fields, **FULL)
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "empty"))
    fresh = run_of(tmp_path / "two", tiny_base, "dpo", **fields, **FULL)
    assert losses(after_lora) == losses(fresh)
    assert (after_lora / DENSE).read_bytes() == (fresh / DENSE).read_bytes()


def test_a_frozen_copy_of_full_weights_starts_as_the_policy(
    tiny_base: Path, tmp_path: Path
) -> None:
    fields = {"model__dtype": "bfloat16", "reference": {"kind": "frozen_copy"}, **FULL}
    fields["training__max_steps"] = 2
    first, second = steps_of(run_of(tmp_path, tiny_base, "dpo", **fields))
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["rewards/chosen"] == 0.0 != second["rewards/chosen"]


ALL_ROWS: dict[str, Any] = {"training__batch_size": 16, "training__max_steps": 1, **CACHED}


@pytest.fixture(scope="module")
def scored(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one step over all rows, with the home in which its reference is stored."""
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNKIT_HOME", str(folder / "home"))
        run_of(folder, tiny_base, "dpo", **ALL_ROWS)
    return folder


@pytest.mark.parametrize("damage", ["cut", "empty", "other rows", "not a number"])
def test_an_incomplete_file_is_scored_again(
    damage: str, scored: Path, tiny_base: Path, tmp_path: Path, home: Path
) -> None:
    shutil.copytree(scored / "home", home)
    (path,) = (home / "cache" / "references").iterdir()
    with np.load(path) as file:
        rows, values = file["rows"], file["values"]
    assert values.shape == (16, 2)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other rows":
        np.savez(path, rows=rows[:-1], values=values[:-1])
    else:
        np.savez(path, rows=rows, values=np.where(rows[:, None] == 3, np.nan, values))
    run = run_of(tmp_path, tiny_base, "dpo", **ALL_ROWS)
    assert (run / ADAPTER).read_bytes() == (scored / "run" / ADAPTER).read_bytes()
    assert len(stored(home)) == 1
    with np.load(path) as file:
        assert (file["values"] == values).all()


def test_the_stored_values_are_plain_transformers(scored: Path, tiny_base: Path) -> None:
    (path,) = (scored / "home" / "cache" / "references").iterdir()
    with np.load(path) as file:
        values = file["values"]
    tokenizer = tiny_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for number, row in enumerate(make_pairs()[:4]):
        for column, side in enumerate(("chosen", "rejected")):
            head = tokenizer.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            )
            answer = row[side][0]["content"] + "<|im_end|>"
            start, end = (
                tokenizer(t, add_special_tokens=False)["input_ids"] for t in (head, answer)
            )
            ids = torch.tensor([start + end])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            targets = torch.arange(len(start), ids.shape[1])
            total = float(logprobs[targets - 1, ids[0, targets]].sum())
            assert values[number, column] == pytest.approx(total, rel=1e-5)


# Resuming --------------------------------------------------------------------------------------


def test_resumed_with_and_without_the_stored_log_probs(
    alignkit: CommandLine, tiny_base: Path, tmp_path: Path, home: Path
) -> None:
    # All weights are trained: scored with the checkpoint, the reference would be another model.
    fields = {**FULL, **CACHED, "training__save_every": 2, "training__max_steps": 4}
    recipe = make_preference_recipe(tmp_path, tiny_base, "dpo", merge=True, **fields)
    place, said = {"ALIGNKIT_HOME": str(home)}, "with the reference model, once"
    done = alignkit("dpo", recipe, cwd=tmp_path, **place)
    assert said in done.stderr
    for forgotten in (False, True):
        whole = break_off(tmp_path / "run", 2)
        if forgotten:
            shutil.rmtree(home / "cache" / "references")
        done = alignkit("dpo", recipe, "--resume", cwd=tmp_path, **place)
        assert done.code == 0, done.stderr
        assert "resuming after step 2" in done.stderr
        assert (said in done.stderr) == forgotten
        assert_same(tmp_path / "run", whole)
        shutil.rmtree(whole)  # the same bytes as run/


# Learning --------------------------------------------------------------------------------------

PAIR_VALUES = {
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("rewards/accuracies_low", "rewards/accuracies_high", "rewards/mean", "rewards/std"),
    *("calibration_error", "pairs"),
}
LOGPS = {"logps/chosen", "logps/rejected"}
LABELLED_VALUES = {
    *("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("rewards/accuracies", "rewards/accuracies_low", "rewards/accuracies_high", "auc", "rows"),
}
LEARNERS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "reward": ("reward", {}, PAIR_VALUES),
    "dpo": ("dpo", {}, PAIR_VALUES | LOGPS),
    "simpo": ("dpo", {"objective": {"kind": "simpo"}}, PAIR_VALUES | LOGPS),
    "kto": ("kto", {}, LABELLED_VALUES),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LEARNERS)
def test_an_evident_preference_is_learned(case: str, tiny_base: Path, tmp_path: Path) -> None:
    stage, fields, names = LEARNERS[case]
    make = make_labelled if stage == "kto" else make_pairs
    write_rows(tmp_path / "rows.jsonl", make(24, evident=True))
    held = write_rows(tmp_path / "held.jsonl", make(20, seed=8, evident=True))
    run = run_of(
        tmp_path,
        tiny_base,
        stage,
        data__eval=[{"path": str(held)}],
        training__max_steps=16,
        training__batch_size=8,
        training__learning_rate=1e-2,
        training__eval_every=8,
        merge=case in ("dpo", "kto"),
        **fields,
    )
    found = evaluations(run)
    assert [values["step"] for values in found] == [0, 8, 16]
    assert {name.removeprefix("eval/") for name in found[0] if "eval/" in name} == names
    first, last = found[0], found[-1]
    if case in ("dpo", "kto"):
        assert first["eval/rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert last["eval/rewards/accuracies"] > 0.9
    assert last["eval/rewards/margins"] > first["eval/rewards/margins"] + 0.5
    assert last["eval/loss"] < first["eval/loss"]
    for values in found:
        low, high = values["eval/rewards/accuracies_low"], values["eval/rewards/accuracies_high"]
        assert 0.0 <= low < values["eval/rewards/accuracies"] <= high <= 1.0
    if stage == "kto":
        assert last["eval/auc"] > 0.9
        assert first["eval/kl"] < 1e-4
        assert last["eval/rows"] == 20
    else:
        assert last["eval/calibration_error"] < 0.2
        assert last["eval/pairs"] == 20
    summary = about(run)["summary"]
    for when, values in (("before", first), ("after", last)):
        assert summary[when] == {n: values[f"eval/{n}"] for n in names}
        assert f"{values['eval/rewards/accuracies']:.1%}" in summary["held_out"]
    if case in ("dpo", "kto"):
        assert_a_merged_language_model(run)


def assert_a_merged_language_model(run: Path) -> None:
    config = json.loads((run / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    AutoModelForCausalLM.from_pretrained(run / "merged")
    assert not (run / "merged" / "reward.json").exists()
    summary = about(run)["summary"]
    assert summary["merge"]["mean_kl"] < 1e-6 < summary["merge"]["mean_kl_to_base"]


# What a run leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_folder_of_a_reward_run(
    adapter: str, reward_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run = reward_run
    if adapter == "full":
        run = run_of(tmp_path, tiny_base, "reward", merge=True, **FULL)
    merged = run / "merged"
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(merged)
    assert classifier.score.weight.shape == (1, 64)
    statistics = json.loads((merged / "reward.json").read_text(encoding="utf-8"))
    assert statistics["rows"] == "train"
    assert statistics["pairs"] == 16
    assert statistics["std"] > 0
    assert statistics["mean"] == pytest.approx(
        (statistics["chosen"] + statistics["rejected"]) / 2, abs=1e-6
    )
    assert (run / "adapter").exists() == (adapter == "lora")
    if adapter == "lora":
        assert json.loads((run / "adapter" / "reward.json").read_text("utf-8")) == statistics
        with safe_open(run / ADAPTER, "pt") as file:
            names = list(file.keys())
            head = file.get_tensor(HEAD_KEY)
        assert HEAD_KEY in names
        assert any("lora_A" in name for name in names)
        assert torch.equal(head, classifier.score.weight.detach())
    summary = about(run)["summary"]
    assert summary["steps"] == 4
    assert summary["loss"] == losses(run)[-1]
    assert summary["merge"]["output"] == str(merged)
    assert summary["merge"]["max_difference"] < 1e-4
    assert summary["before"] == summary["after"] == {}


def test_statistics_are_those_of_held_out_pairs(tiny_base: Path, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", make_pairs(5, seed=8))
    fields = {"data__eval": [{"path": str(held)}], "training__max_steps": 2}
    run = run_of(tmp_path, tiny_base, "reward", **fields)
    statistics = json.loads((run / "adapter" / "reward.json").read_text(encoding="utf-8"))
    last = evaluations(run)[-1]
    names = {"mean": "rewards/mean", "std": "rewards/std", "accuracy": "rewards/accuracies"}
    for mine, logged in {**names, "chosen": "rewards/chosen"}.items():
        assert statistics[mine] == pytest.approx(last[f"eval/{logged}"], rel=1e-6)
    assert (statistics["rows"], statistics["pairs"]) == ("held_out", 5)
    assert_not_merged(run)


@pytest.fixture(scope="module")
def reward_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("reward"), tiny_base, "reward", merge=True)


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "reward"])
@pytest.mark.parametrize("name", [".", "merged"])
def test_a_reward_model_is_not_a_base(
    stage: str, name: str, reward_run: Path, tmp_path: Path
) -> None:
    make = make_recipe if stage == "sft" else make_preference_recipe
    arguments = [tmp_path, reward_run / name, *[stage] * (stage != "sft")]
    recipe = make(*arguments)
    with pytest.raises(ModelError, match=r"merged is a reward model, not a language model\n"):
        train(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", [True, False])
def test_kto_with_one_kind_of_completion_warns(
    label: bool, tiny_base: Path, tmp_path: Path
) -> None:
    rows = [{**row, "label": label} for row in make_labelled(8)]
    write_rows(tmp_path / "rows.jsonl", rows)
    run = run_of(tmp_path, tiny_base, "kto", training__max_steps=1)
    side = "desirable" if label else "undesirable"
    assert f"all 8 rows are {side}: there is nothing to tell apart" in plan_of(run)["warnings"]
    for step in steps_of(run):
        assert ("rewards/chosen" in step, "rewards/rejected" in step) == (label, not label)
        assert "rewards/margins" not in step


def test_kto_splits_pairs(tiny_base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", make_pairs(6))
    run = run_of(tmp_path, tiny_base, "kto", training__max_steps=1)
    data = plan_of(run)["data"]
    assert (data["rows"], data["chosen"], data["rejected"]) == (12, 6, 6)
    assert not [w for w in plan_of(run)["warnings"] if "desirable" in w]


# Rewards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [None, 1.5])
def test_the_margin_of_one_pair_exactly(
    margin: float | None, tiny_base: Path, tmp_path: Path
) -> None:
    more = {} if margin is None else {"margin": margin}
    write_rows(tmp_path / "rows.jsonl", [{**make_pairs(1)[0], **more}])
    shape = {"training__batch_size": 1, "training__max_steps": 1, "objective": {"center": 0.25}}
    (step,) = steps_of(run_of(tmp_path, tiny_base, "reward", **shape))
    chosen, rejected = step["rewards/chosen"], step["rewards/rejected"]
    short = (margin or 0.0) - (chosen - rejected)
    expected = math.log1p(math.exp(short)) + 0.25 * (chosen + rejected) ** 2
    assert step["loss"] == pytest.approx(expected, rel=1e-5)
    assert step["rewards/margins"] == pytest.approx(chosen - rejected, abs=1e-6)


def test_a_reward_model_that_narrow_weights_would_change_is_merged_wide(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Session, "say", lambda session, line, *_: said.append(line))
    monkeypatch.setattr(outputs, "stored_dtype", lambda base: torch.bfloat16)
    monkeypatch.setattr(classifier, "MAX_SHIFT", 0.0)
    monkeypatch.setattr(classifier, "MIN_SHIFT", 2e-5)  # rounding a tiny model moves more
    run = run_of(tmp_path, tiny_base, "reward", merge=True, training__max_steps=1)
    weights = load_file(run / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    (line,) = (line for line in said if "is not faithful" in line)
    assert line.endswith("merging into float32 weights instead")
    # Wider weights do not help against what is not rounding.
    monkeypatch.setattr(classifier, "MIN_SHIFT", -1.0)
    with pytest.raises(ModelError, match="is not faithful"):
        run_of(tmp_path / "other", tiny_base, "reward", merge=True, training__max_steps=1)
    assert not (tmp_path / "other" / "run" / "merged").exists()
