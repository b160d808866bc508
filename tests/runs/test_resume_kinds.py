"""Every kind of run that keeps a state of its own, interrupted and resumed in another process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine
from mixtures import save_mixture
from running import (
    assert_same,
    break_off,
    make_ppo_recipe,
    make_preference_recipe,
    make_recipe,
    steps_of,
    train,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 8}
EVA: dict[str, Any] = {**LORA, "init": "eva", "eva": {"rho": 2.0}}
PREFIX: dict[str, Any] = {"kind": "prefix", "tokens": 6}
FULL: dict[str, Any] = {"adapter": {"kind": "full"}, "training__learning_rate": 3e-4}
INT8, EIGHT_BIT_STATE = {"model__quantization": "int8"}, {"training__optimizer": "adamw_8bit"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "merged": ("sft", {"merge": True}),
    "dropout, dora and lora+ over bfloat16": (
        "sft",
        {
            "adapter": {**LORA, "dropout": 0.2, "dora": True, "b_learning_rate": 16},
            "model__dtype": "bfloat16",
        },
    ),
    "eva": ("sft", {"adapter": {**EVA, "rslora": True, "alpha_pattern": {"up_proj": 3}}}),
    "ia3": ("sft", {"adapter": {"kind": "ia3"}, "training__learning_rate": 5e-2}),
    "prefix": ("sft", {"adapter": PREFIX, "training__learning_rate": 5e-2}),
    "projected prefix": (
        "sft",
        {"adapter": {**PREFIX, "projection": True, "projection_width": 24}},
    ),
    "frozen, with 8-bit state": (
        "sft",
        {**FULL, **EIGHT_BIT_STATE, "adapter": {"kind": "full", "freeze": ["model.layers.0"]}},
    ),
    "over int8": ("sft", INT8),
    "experts": ("sft", {"training__learning_rate": 2e-2}),
    "reward": ("reward", {}),
    "full dpo": ("dpo", {**FULL, "reference": {"kind": "cached"}}),
    "kto": ("kto", {}),
    "ppo": ("ppo", {}),
    "eva ppo": ("ppo", {"adapter": EVA, "value": {"kind": "head"}}),
    "full ppo with 8-bit state": ("ppo", {**FULL, **EIGHT_BIT_STATE}),  # from 4,096 elements on
}
RESUMED_AT, STEPS = 2, 4


def make(case: str, folder: Path, base: Path) -> Path:
    stage, own = CASES[case]
    fields: dict[str, Any] = {
        "training__max_steps": STEPS,
        "training__save_every": RESUMED_AT,
        "training__keep": 3,
        "training__learning_rate": 2e-3,
        "training__microbatch_tokens": 200,
        "training__eval_every": 2,
        "data__eval_fraction": 0.2,
        "merge": False,
    }
    if stage != "ppo":
        make_any = make_recipe if stage == "sft" else make_preference_recipe
        more = () if stage == "sft" else (stage,)
        return make_any(folder, base, *more, **{**fields, **own})
    # The price of KL changes after each step.
    fields["objective"] = {"kl_target": 0.01, "kl_horizon": 8, "epochs": 2}
    fields["rollout"] = {"prompts_per_step": 4, "max_new_tokens": 6, "samples_every": 1}
    return make_ppo_recipe(folder, base, **{**fields, **own})


def assert_moved(run: Path) -> None:
    """Every weight was trained after the checkpoint: else the same bytes would prove nothing."""
    before, after = (
        load_file(run / f"checkpoints/step-{step:06d}/trainable.safetensors")
        for step in (RESUMED_AT, STEPS)
    )
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still
    losses = [step["loss"] for step in steps_of(run)]
    assert len(set(losses)) == STEPS
    if "ppo" in json.loads((run / "plan.json").read_text(encoding="utf-8"))["stage"]:
        assert len({step["kl_coef"] for step in steps_of(run)}) == STEPS


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes(case: str, alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    if any(sign in case for sign in ("8-bit", "int8")) and not importlib.util.find_spec(
        "bitsandbytes"
    ):
        pytest.skip("needs bitsandbytes")
    base = save_mixture(tmp_path / "base", "Mixtral") if case == "experts" else tiny_base
    recipe = make(case, tmp_path, base)
    train(recipe)
    run = tmp_path / "run"
    assert_moved(run)
    start = json.loads((run / "run.json").read_text(encoding="utf-8")).get("start")
    whole = break_off(run, RESUMED_AT)
    done = alignkit(CASES[case][0], recipe, "--resume", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert f"resuming after step {RESUMED_AT}" in done.stderr
    assert_same(run, whole)
    assert json.loads((run / "run.json").read_text(encoding="utf-8")).get("start") == start
    assert (start is not None) == ("eva" in case)
