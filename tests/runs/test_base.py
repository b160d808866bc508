"""A recipe that starts from an adapter starts from the adapted model, and compares with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers
from running import make_ppo_recipe, make_preference_recipe, make_recipe, steps_of, train

from alignkit.cli.training.inspect import inspect
from alignkit.errors import ModelError
from alignkit.models.adapters import files, tensors
from alignkit.models.base import loading
from alignkit.models.base.loading import load_model
from alignkit.models.base.places import resolve
from alignkit.models.merging import dense, merge
from alignkit.models.opening import open_model
from alignkit.models.weights import shards
from alignkit.recipe.model import ModelSpec
from alignkit.recipe.reading.load import load_recipe
from alignkit.stages.inputs import base as start
from alignkit.stages.inputs.base import start_model
from alignkit.stages.registry import plan_stage
from alignkit.stages.running import session

READERS = (
    (merge, "merge_adapter"),
    (start, "merge_adapter"),
    (loading, "load_model"),
    (session, "load_model"),
    (shards, "open_weights"),
    (dense, "open_weights"),
    (files, "read_weights"),
    (tensors, "load_peft_weights"),
    (transformers.AutoModelForCausalLM, "from_pretrained"),
    (safetensors, "safe_open"),
    (safetensors.torch, "load_file"),
    (torch, "load"),
)
"""Everything that reads weights."""


def refuse_to_read(*_: Any, **__: Any) -> None:
    raise AssertionError("weights were read")


PAIRS = [{"path": "data_templates/preference/pairs.jsonl", "take": 8}]
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """An SFT run that was not merged, with a large update."""
    folder = tmp_path_factory.mktemp("sft")
    train(make_recipe(folder, tiny_base, merge=False, training__learning_rate=2e-2))
    return folder / "run"


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


def test_a_plan_merges_nothing(
    adapter_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "home"))
    fields: dict[str, Any] = {"data__eval_fraction": 0.25, "training__max_steps": 1}
    path = make_recipe(tmp_path / "next", adapter_run, **fields)
    recipe = load_recipe(str(path)).recipe
    with monkeypatch.context() as patch:
        for module, reader in READERS:
            patch.setattr(module, reader, refuse_to_read)
        rows, planned = plan_stage(recipe, 1)
        inspect(str(path), as_json=True)
    said = capsys.readouterr().err
    assert said.count("adapter is merged first when the run starts: training starts from") == 2
    assert {child.name for child in (tmp_path / "home").iterdir()} == {"cache"}
    assert not (tmp_path / "next" / "run").exists()
    kept = list((tmp_path / "home" / "cache" / "tokens").iterdir())
    train(path)
    assert "adapter is merged first: training starts from it" in capsys.readouterr().err
    run = tmp_path / "next" / "run"
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert Path(about["base"]["location"]).parent == tmp_path / "home" / "merged"
    for name, dataset in (("train", rows.train), ("eval", rows.held_out)):
        assert dataset is not None
        assert about["data"][name]["fingerprint"] == dataset.fingerprint
    # The run's own tokens were those of the plan; only the rows of the merge's check are new.
    assert set(kept) < set((tmp_path / "home" / "cache" / "tokens").iterdir())
    stored = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    expected = json.loads(json.dumps(planned.to_json()))
    del stored["hardware"]["memory"], expected["hardware"]["memory"]  # free at that moment
    assert stored == expected
    again = plan_stage(recipe, 1)[0]
    assert again.base.location == about["base"]["location"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("separate", [False, True])
def test_a_plan_of_ppo_merges_nothing(
    separate: bool, adapter_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a reward model has the same base weights is known only once they are there."""
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "home"))
    fields: dict[str, Any] = {"training__max_steps": 1, "merge": True}
    train(make_preference_recipe(tmp_path / "reward", adapter_run, "reward", **fields))
    named = {"model": str(tmp_path / "reward" / "run"), "separate": separate}
    path = make_ppo_recipe(tmp_path / "ppo", adapter_run, reward=named, training__max_steps=1)
    recipe = load_recipe(str(path)).recipe
    merged = plan_stage(recipe, 1)[1]
    shutil.move(tmp_path / "home" / "merged", tmp_path / "home" / "elsewhere")
    adapter = tmp_path / "reward" / "run" / "adapter" / "adapter_config.json"
    config = json.loads(adapter.read_text(encoding="utf-8"))
    place = Path(config["base_model_name_or_path"])
    config["base_model_name_or_path"] = str(tmp_path / "home" / "elsewhere" / place.name)
    adapter.write_text(json.dumps(config), encoding="utf-8")
    for module, reader in READERS:
        monkeypatch.setattr(module, reader, refuse_to_read)
    rows, planned = plan_stage(recipe, 1)
    assert rows.base.unmerged == adapter_run / "adapter"
    assert (planned.roles, planned.memory) == (merged.roles, merged.memory)
    assert any("a model of its own" in role for role in planned.roles) == separate
    assert not (tmp_path / "home" / "merged").exists()


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


def test_training_cannot_start_from_a_reward_model(tmp_path: Path, tiny_base: Path) -> None:
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
