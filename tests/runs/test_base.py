"""A recipe that starts from an adapter starts from the adapted model, and compares with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import make_recipe, steps_of, train

from alignkit.errors import ModelError
from alignkit.models.base.loading import load_model
from alignkit.models.base.places import resolve
from alignkit.models.opening import open_model
from alignkit.recipe.model import ModelSpec
from alignkit.recipe.reading.load import load_recipe
from alignkit.stages.inputs.base import start_model

PAIRS = [{"path": "data_templates/preference/pairs.jsonl", "take": 8}]
IDS = torch.arange(12)[None]


@pytest.fixture
def adapter_run(tmp_path: Path, tiny_base: Path) -> Path:
    """An SFT run that was not merged, with a large update."""
    recipe = make_recipe(tmp_path / "sft", tiny_base, merge=False, training__learning_rate=2e-2)
    train(recipe)
    return tmp_path / "sft" / "run"


def test_an_unmerged_run_is_merged_first(
    adapter_run: Path,
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "home"))
    start = start_model(ModelSpec(base=str(adapter_run)))
    said = capsys.readouterr().err
    assert "adapter is merged first: training starts from it, not from its base" in said
    with torch.no_grad():
        adapted = open_model(str(adapter_run), dtype=torch.float32).model(IDS).logits
        merged = load_model(start, torch.float32)(IDS).logits
        bare = load_model(resolve(str(tiny_base)).whole(), torch.float32)(IDS).logits
    moved = (adapted - bare).abs().max()
    assert moved > 0.05
    assert (merged - adapted).abs().max() < 0.05 * moved
    assert start_model(ModelSpec(base=str(adapter_run / "adapter"))).location == start.location
    assert capsys.readouterr().err == ""  # merged once


def test_the_reference_of_dpo_is_the_adapted_model(adapter_run: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path / "dpo",
        adapter_run,
        stage="dpo",
        data__train=PAIRS,
        data__max_length=512,
        training__max_steps=1,
    )
    train(recipe)
    (step,) = steps_of(tmp_path / "dpo" / "run")
    assert step["loss"] == pytest.approx(0.693147, abs=1e-6)
    about = json.loads((tmp_path / "dpo" / "run" / "run.json").read_text())
    loaded = load_recipe(str(recipe)).recipe
    assert about["base"]["location"] == start_model(loaded.model).location


def test_a_changed_adapter_is_merged_again(adapter_run: Path, tmp_path: Path) -> None:
    first = start_model(ModelSpec(base=str(adapter_run)))
    other = tmp_path / "other"
    shutil.copytree(adapter_run / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    config["lora_alpha"] = 1
    (other / "adapter_config.json").write_text(json.dumps(config))
    assert start_model(ModelSpec(base=str(other))).location != first.location


def test_a_reward_model_is_no_start(tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        tiny_base,
        stage="reward",
        data__train=PAIRS,
        data__max_length=512,
        training__max_steps=1,
        merge=False,
    )
    train(recipe)
    with pytest.raises(ModelError, match="is a reward model, not a language model"):
        start_model(ModelSpec(base=str(tmp_path / "run")))
