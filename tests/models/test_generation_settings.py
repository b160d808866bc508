"""Generation settings that transformers would refuse to save: repaired, and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from alignkit.errors import ModelError
from alignkit.models.base.generation import generation_settings, repaired
from alignkit.models.base.loading import BaseModel


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


@pytest.mark.parametrize("values", [[], {"cache_implementation": "x"}, {"max_new_tokens": -1}])
def test_files_that_cannot_be_read(values: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"generation_config.json of '.*' could not be read"):
        generation_settings(stored(tmp_path, values))


def test_no_settings(tmp_path: Path) -> None:
    assert generation_settings(BaseModel(str(tmp_path))) == (None, "")
