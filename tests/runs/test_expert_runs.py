"""Runs over mixtures of experts: trained, merged, continued, over a quantized base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mixtures import save_mixture
from running import make_preference_recipe, make_recipe, train
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # whole runs

STACKS = {"kind": "lora", "rank": 2, "targets": ["q_proj", "experts.down_proj"]}


def run_of(folder: Path, base: Path, **fields: Any) -> Path:
    rows = [{"path": "data_templates/sft/messages_eval.jsonl", "take": 4}]
    train(make_recipe(folder, base, **{"data__eval": rows, **fields}))
    return folder / "run"


def about(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("mixture"), "Mixtral")


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    return run_of(folder, base, training__save_every=2, training__learning_rate=2e-2)


def test_a_run_ends_with_merged_experts(first: Path, base: Path) -> None:
    stored = load_file(first / "adapter" / "adapter_model.safetensors")
    assert any(".experts.base_layer.lora_B" in name for name in stored)
    before, after = (load_file(f / "model.safetensors") for f in (base, first / "merged"))
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert all(not before[name].equal(after[name]) for name in experts)


def test_it_is_trained_on_from_where_it_ended(first: Path, base: Path, tmp_path: Path) -> None:
    second = run_of(tmp_path, base, adapter={"kind": "lora", "from": str(first)}, merge=False)
    loss = about(second)["summary"]["before"]["loss"]
    assert loss == about(first)["summary"]["after"]["loss"]
    assert loss != about(first)["summary"]["before"]["loss"]


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_over_a_quantized_base(stage: str, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    fields: dict[str, Any] = {"model__quantization": "nf4", "adapter": STACKS, "merge": True}
    if stage == "sft":
        run = run_of(tmp_path, base, **fields)
    else:
        train(make_preference_recipe(tmp_path, base, stage, **fields))
        run = tmp_path / "run"
    assert about(run)["status"] == "finished"
    after = load_file(run / "merged" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    moved = {name for name in before.keys() & after.keys() if not before[name].equal(after[name])}
    ends = {name.split(".")[-2] for name in moved}
    # Linear layers may be written as they were after quantization; stacks are never quantized.
    assert {"q_proj", "w2"} <= ends <= {"q_proj", "k_proj", "v_proj", "o_proj", "w2"}
