"""What a base says wrongly, known before training: generation settings, tokens without rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import make_recipe, train
from tiny import save_tiny
from transformers import GenerationConfig

from alignkit.errors import ModelError
from alignkit.generation.rollout import stop_tokens
from alignkit.models.base.generation import generation_settings, repaired
from alignkit.models.base.loading import BaseModel
from alignkit.models.opening import open_model
from alignkit.recipe.reading.load import load_recipe
from alignkit.stages.registry import plan_stage


def stored(folder: Path, values: Any) -> BaseModel:
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    return BaseModel(str(folder))


@pytest.mark.parametrize(
    ("values", "kept", "said"),
    [
        ({}, {}, ""),
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}, ""),
        (
            {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 0},
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 0},
            "do_sample is set to true, without which transformers refuses temperature, top_p",
        ),
        (
            {"num_beams": 1, "length_penalty": 2.0},
            {"num_beams": 1},
            "length_penalty left out, which transformers refuses",
        ),
    ],
)
def test_repairs(values: dict[str, Any], kept: dict[str, Any], said: str, tmp_path: Path) -> None:
    settings, change = generation_settings(stored(tmp_path, values))
    assert settings is not None
    assert change == (said and f"generation_config.json of {tmp_path}: {said}")
    assert repaired(settings) == (settings, "")
    settings.save_pretrained(tmp_path / "again")
    found = GenerationConfig.from_pretrained(tmp_path / "again").to_diff_dict()
    assert {k: v for k, v in found.items() if k != "transformers_version"} == kept


@pytest.mark.parametrize(
    ("ids", "kept"), [(10**30, None), (700, None), ([3, 10**30], [3]), (699, 699)]
)
def test_ids_beyond_the_vocabulary(ids: Any, kept: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    base = stored(tmp_path, {"eos_token_id": ids})
    settings, change = generation_settings(base)
    assert settings is not None
    assert settings.eos_token_id == kept
    assert ("eos_token_id beyond the vocabulary of 700 left out" in change) == (ids != kept)
    opened = open_model(str(tmp_path), dtype=torch.float32)
    assert max(stop_tokens(opened.model, opened.tokenizer)) < 700


@pytest.mark.parametrize("values", [[], {"cache_implementation": "x"}, {"max_new_tokens": -1}])
def test_files_that_cannot_be_read(values: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"generation_config.json of '.*' could not be read"):
        generation_settings(stored(tmp_path, values))


def test_no_settings(tmp_path: Path) -> None:
    assert generation_settings(BaseModel(str(tmp_path))) == (None, "")


@pytest.mark.parametrize("kind", [{"kind": "lora", "rank": 2}, {"kind": "full"}])
def test_a_run_over_them_ends(
    kind: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "base")
    stored(tmp_path / "base", {"temperature": 0.6, "eos_token_id": 0})
    recipe = make_recipe(tmp_path / "r", tmp_path / "base", adapter=kind, training__max_steps=1)
    train(recipe)
    assert "do_sample is set to true, without which" in capsys.readouterr().err
    merged = GenerationConfig.from_pretrained(tmp_path / "r" / "run" / "merged")
    assert (merged.do_sample, merged.temperature) == (True, 0.6)
    card = (tmp_path / "r" / "run" / "merged" / "README.md").read_text(encoding="utf-8")
    assert "4.57 reads it with the same logits" in card


def test_tokens_without_rows(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", vocab_size=400)
    recipe = load_recipe(str(make_recipe(tmp_path / "r", tmp_path / "base"))).recipe
    with pytest.raises(ModelError, match=r"rows.jsonl:\d+ has the token \d+, but the model's emb"):
        plan_stage(recipe, 1)
