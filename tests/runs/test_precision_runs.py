"""`model.dtype: auto`: chosen once, stored with the run, and kept by all that comes later."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from running import (
    KILL_AFTER,
    adapter_of,
    losses,
    make_ppo_recipe,
    make_preference_recipe,
    make_recipe,
    train,
)

from alignkit.recipe.reading.load import load_recipe
from alignkit.recipe.reading.stored import stored_recipe
from alignkit.stages.inputs import precision
from alignkit.stages.registry import plan_stage

SPEEDS = """
from alignkit.runtime import precision
precision.precision_speeds = lambda device, layers: {"bfloat16": NARROW, "float32": 1e11}
import os
os.environ["ALIGNKIT_HOME"] = "FOLDER"
"""


def machine(narrow: float, home: Path) -> str:
    """Code for `before`: a machine that multiplies bfloat16 this fast, and float32 at 1e11."""
    return SPEEDS.replace("NARROW", str(narrow)).replace("FOLDER", str(home))


def open_recipe(folder: Path, base: Path, **fields: Any) -> Path:
    """A recipe that leaves the precision open."""
    few = {"model__dtype": "auto", "training__max_steps": 2, "merge": False}
    return make_recipe(folder, base, **{**few, **fields})


def dtype_of(run: Path) -> str:
    return str(stored_recipe(run / "recipe.yaml").model.dtype)


@pytest.mark.parametrize(("narrow", "chosen"), [(5e11, "bfloat16"), (1.1e11, "float32")])
def test_what_is_measured_decides(
    narrow: float, chosen: str, alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = open_recipe(tmp_path, tiny_base)
    before = machine(narrow, tmp_path / "home")
    shown = alignkit("plan", recipe, "--json", cwd=tmp_path, before=before)
    assert json.loads(shown.stdout)["dtype"] == chosen, shown.stderr
    done = alignkit("sft", recipe, cwd=tmp_path, before=before)
    said = f"precision: {chosen} on 1 threads, bfloat16 {narrow / 1e9:,.0f} and float32 100 GFLOP/s"
    assert said in done.stderr
    assert dtype_of(tmp_path / "run") == chosen
    train(recipe, f"model.dtype={chosen}", f"output={tmp_path / 'twin'}")
    assert losses(tmp_path / "run") == losses(tmp_path / "twin")


def test_a_resumed_run_keeps_it(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    recipe = open_recipe(tmp_path, tiny_base, training__max_steps=4, training__save_every=2)
    quick, slow = (machine(speed, tmp_path / "home") for speed in (5e11, 1e9))
    killed = alignkit("sft", recipe, cwd=tmp_path, before=quick + KILL_AFTER.replace("STEP", "3"))
    assert killed.code == -9
    elsewhere = slow.replace(str(tmp_path / "home"), str(tmp_path / "another"))
    done = alignkit("sft", recipe, "--resume", cwd=tmp_path, before=elsewhere)
    assert done.code == 0, done.stderr
    assert "precision: bfloat16 on 1 threads, as the run was started" in done.stderr
    whole = alignkit("sft", recipe, f"output={tmp_path / 'whole'}", cwd=tmp_path, before=quick)
    assert whole.code == 0, whole.stderr
    one, two = adapter_of(tmp_path / "run"), adapter_of(tmp_path / "whole")
    assert all(one[name].equal(two[name]) for name in one)


def test_it_is_the_default_of_what_comes_after(
    alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = open_recipe(tmp_path, tiny_base, data__eval_fraction=0.25)
    wide, narrow = (machine(speed, tmp_path / "home") for speed in (1e9, 5e11))
    assert alignkit("sft", recipe, cwd=tmp_path, before=wide).code == 0
    elsewhere = narrow.replace(str(tmp_path / "home"), str(tmp_path / "another"))
    answers = {}
    for dtype in ("auto", "float32", "bfloat16"):
        done = alignkit(
            *("eval", tmp_path / "run", "--trust-recipe", "--json", "--dtype", dtype),
            cwd=tmp_path,
            before=elsewhere,
        )
        assert done.code == 0, done.stderr
        answers[dtype] = json.loads(done.stdout)
    assert answers["auto"] == answers["float32"]
    assert answers["auto"] != answers["bfloat16"]
    done = alignkit("eval", tmp_path / "run", "--dtype", "fp8", cwd=tmp_path)
    assert done.code == 2
    assert "hint: one of auto, bfloat16, float16, float32" in done.stderr


def test_all_processes_choose_alike(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    recipe = open_recipe(tmp_path, tiny_base)
    by_rank = (
        "import os\nfrom alignkit.runtime import precision\n"
        "speed = {'0': 5e11, '1': 1e9}[os.environ['RANK']]\n"
        "precision.precision_speeds = lambda *_: {'bfloat16': speed, 'float32': 1e11}\n"
        f"os.environ['ALIGNKIT_HOME'] = {str(tmp_path)!r} + os.environ['RANK']\n"
    )
    done = alignkit.together(2, "sft", recipe, cwd=tmp_path, before=by_rank)
    assert done.code == 0, done.stderr
    assert "precision: bfloat16" in done.stderr
    assert dtype_of(tmp_path / "run") == "bfloat16"


def test_where_float32_does_not_fit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(open_recipe(tmp_path, tiny_base))).recipe
    hardware = precision.describe_hardware()
    monkeypatch.setattr(precision, "fastest", lambda device, layers: ("float32", "measured"))
    assert plan_stage(recipe, 1)[1].dtype == "float32"
    small = dataclasses.replace(hardware, memory=10**8)
    monkeypatch.setattr(precision, "describe_hardware", lambda processes=1: small)
    plan = plan_stage(recipe, 1)[1]
    assert (plan.dtype, plan.dtype_reason) == (
        "bfloat16",
        "float32 needs more than the 0.1 GB free here",
    )


def test_the_reference_follows_the_precision(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_preference_recipe(
        tmp_path, tiny_base, "dpo", model__dtype="auto", training={"epochs": 3, "batch_size": 4}
    )
    recipe = load_recipe(str(path)).recipe
    for dtype, kind in (("bfloat16", "adapter_off"), ("float32", "cached")):
        monkeypatch.setattr(
            precision, "fastest", lambda device, layers, dtype=dtype: (dtype, "measured")
        )
        assert plan_stage(recipe, 1)[1].reference == kind


@pytest.mark.parametrize("stage", ["reward", "dpo", "kto", "ppo"])
def test_every_stage_computes_in_what_was_chosen(
    stage: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "fastest", lambda device, layers: ("float32", "measured"))
    fields = {"model__dtype": "auto", "training__max_steps": 1}
    if stage == "ppo":
        recipe = make_ppo_recipe(tmp_path, tiny_base, **fields)
    else:
        recipe = make_preference_recipe(tmp_path, tiny_base, stage, **fields)
    train(recipe)
    assert dtype_of(tmp_path / "run") == "float32"
    train(recipe, "model.dtype=float32", f"output={tmp_path / 'twin'}")
    assert losses(tmp_path / "run") == losses(tmp_path / "twin")


def test_ppo_takes_float16_where_only_float16_is_fast(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "fastest", lambda device, layers: ("float16", "an old card"))
    recipe = load_recipe(str(make_ppo_recipe(tmp_path, tiny_base, model__dtype="auto"))).recipe
    plan = plan_stage(recipe, 1)[1]
    assert plan.dtype == "float16"
    assert plan.dtype_reason == "an old card"
