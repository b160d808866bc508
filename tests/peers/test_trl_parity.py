"""The same recipe through alignkit and through stock TRL trainers: the same numbers in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from alignkit.errors import AlignkitError
from alignkit.peers.trl import DPO_LOSSES, PeerResult, run_trl
from alignkit.recipe.reading.load import load_recipe
from alignkit.recipe.stages.base import Recipe
from alignkit.runtime.metrics import read_metrics
from alignkit.stages.inputs.base import start_model
from alignkit.stages.inputs.rows import load_rows
from alignkit.stages.registry import run_stage
from alignkit.stages.running.session import RunOptions

pytestmark = pytest.mark.slow

STEPS = 2
PAIRS = "data_templates/preference/pairs.jsonl"


def both(folder: Path, base: Path, **parts: Any) -> tuple[list[dict[str, float]], PeerResult]:
    """Two steps of a recipe through both engines."""
    recipe = recipe_of(folder, base, **parts)
    rows = load_rows(recipe, start_model(recipe.model))
    theirs = run_trl(recipe, rows.base, rows.tokenizer, rows.train, folder / "trl", max_steps=STEPS)
    run_stage(recipe, RunOptions(quiet=True))
    ours = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in line]
    assert len(ours) == len(theirs.metrics) == STEPS
    return ours, theirs


def recipe_of(folder: Path, base: Path, **parts: Any) -> Recipe:
    values: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"base": str(base), "dtype": "float32"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "data": {"train": [{"path": PAIRS, "take": 16}], "max_length": 512},
        "training": {
            "max_steps": STEPS,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "warmup": 0,
            "schedule": "constant",
            "microbatch_tokens": 700,  # several micro-batches a step
        },
        "merge": False,
        **parts,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return load_recipe(str(path)).recipe


def assert_same(
    ours: list[dict[str, float]], theirs: PeerResult, names: dict[str, str], tolerance: float = 1e-4
) -> None:
    for step, (mine, other) in enumerate(zip(ours, theirs.metrics, strict=True)):
        for name, peer_name in names.items():
            difference = abs(mine[name] - other[peer_name])
            scale = max(1.0, abs(other[peer_name]))
            assert difference <= tolerance * scale, (step, name, mine[name], other[peer_name])


SHARED = (
    *("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)


def test_sft(tmp_path: Path, tiny_base: Path) -> None:
    data = {"train": [{"path": "data_templates/sft/messages.jsonl", "take": 16}], "max_length": 512}
    ours, theirs = both(tmp_path, tiny_base, stage="sft", data=data)
    assert_same(ours, theirs, {"loss": "loss", "grad_norm": "grad_norm"})
    assert ours[0]["loss"] != ours[1]["loss"]


@pytest.mark.parametrize("kind", [k for k in DPO_LOSSES if k != "ipo"])
def test_preference(kind: str, tmp_path: Path, tiny_base: Path) -> None:
    objective = {"kind": kind, "beta": 0.1}
    ours, theirs = both(tmp_path, tiny_base, stage="dpo", objective=objective)
    assert_same(ours, theirs, {name: name for name in SHARED})
    assert ours[1]["rewards/margins"] != 0.0
    # At the first step policy and reference agree: a tie, which TRL counts as wrong.
    assert ours[0]["rewards/accuracies"] == 0.5
    assert theirs.metrics[0]["rewards/accuracies"] == 0.0
    later = PeerResult(theirs.metrics[1:], [])
    assert_same(ours[1:], later, {"rewards/accuracies": "rewards/accuracies"})


def test_ipo_averages_over_tokens_in_trl(tmp_path: Path, tiny_base: Path) -> None:
    """With `per_token` both agree; the paper's sum starts at 1 / (2 τ)² too, and then parts."""
    objective = {"kind": "ipo", "tau": 0.1, "per_token": True}
    ours, theirs = both(tmp_path, tiny_base, stage="dpo", objective=objective)
    assert_same(ours, theirs, {name: name for name in SHARED})
    assert ours[0]["loss"] == pytest.approx(25.0)  # (1 / (2 · 0.1))²
    summed = tmp_path / "summed"
    summed.mkdir()
    recipe = recipe_of(summed, tiny_base, stage="dpo", objective={"kind": "ipo", "tau": 0.1})
    run_stage(recipe, RunOptions(quiet=True))
    found = [m["loss"] for m in read_metrics(summed / "run" / "metrics.jsonl") if "loss" in m]
    assert found[0] == pytest.approx(25.0)
    assert abs(found[1] - theirs.losses[1]) > 0.01
    rows = load_rows(recipe, start_model(recipe.model))
    with pytest.raises(AlignkitError, match="TRL has no equivalent of the objective ipo"):
        run_trl(recipe, rows.base, rows.tokenizer, rows.train, summed, max_steps=1)


def test_full_weights_with_cached_reference(tmp_path: Path, tiny_base: Path) -> None:
    ours, theirs = both(
        tmp_path,
        tiny_base,
        stage="dpo",
        adapter={"kind": "full"},
        reference={"kind": "cached"},
    )
    assert_same(ours, theirs, {name: name for name in SHARED})


def test_kto(tmp_path: Path, tiny_base: Path) -> None:
    """On the same mismatched completions and steps of one batch, the baselines are the same."""
    ours, theirs = both(tmp_path, tiny_base, stage="kto")
    assert_same(ours, theirs, {"loss": "loss", "grad_norm": "grad_norm"})
    assert_same(ours, theirs, {"kl": "kl"})
    sides = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    present = [n for n in sides if all(n in m for m in (*ours, *theirs.metrics))]
    assert_same(ours, theirs, {name: name for name in present})
    for mine, other in zip(ours, theirs.metrics, strict=True):
        assert {n for n in sides if n in mine} == {n for n in sides if n in other}


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward(center: float, tmp_path: Path, tiny_base: Path) -> None:
    margins = "data_templates/formats/preference_margin.jsonl"
    ours, theirs = both(
        tmp_path,
        tiny_base,
        stage="reward",
        objective={"center": center},
        data={"train": [{"path": PAIRS, "take": 8}, {"path": margins}], "max_length": 512},
    )
    names = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
    }
    assert_same(ours, theirs, names)
    for mine, other in zip(ours, theirs.metrics, strict=True):
        mean = (mine["rewards/chosen"] + mine["rewards/rejected"]) / 2
        assert mean == pytest.approx(other["mean_reward"], abs=1e-4)
