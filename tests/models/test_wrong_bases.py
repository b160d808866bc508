"""Values in a base's files that no model can have: one sentence each, wherever it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import ModelError
from alignkit.models.base.loading import BaseModel, load_config, load_tokenizer
from alignkit.models.base.skeleton import require_complete
from alignkit.models.opening import open_model

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
    ({"hidden_size": 10**9}, "is [700, 64] in its file, but [700, 1000000000] by its"),
    ({"max_position_embeddings": None}, "Validation error for field 'max_position_embeddings'"),
    ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
    ({"num_attention_heads": 3}, "the configuration of"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
    ({"dtype": "float13"}, "module 'torch' has no attribute 'float13'"),
    ({"hidden_act": "nope"}, "as its configuration says: it knows no hidden_act 'nope'"),
    (
        {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
        "as its configuration says: it knows no rope_type 'nope'",
    ),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, and its files hold only 21"),
    ({"vocab_size": 10**12}, "but [1000000000000, 64] by its configuration"),
    ({"attention_dropout": 7}, "says attention_dropout = 7, which must be 0 to 1"),
    ({"model_type": 5}, "has model type `5`"),
    ({"architectures": [5]}, "architectures must be a list of names, got [5]"),
    ({"quantization_config": 5}, "the configuration of"),
]

TOKENIZERS: list[tuple[str, Any, str]] = [
    *((name, [], "of '") for name in ("tokenizer.json", "tokenizer_config.json")),
    ("tokenizer_config.json", {"eos_token": 5}, "eos_token has to be either str or AddedToken"),
    ("tokenizer_config.json", {"chat_template": 5}, "chat_template must be text, got 5"),
    (
        "tokenizer_config.json",
        {"chat_template": [{"name": "rag", "template": "x"}]},
        "of its chat templates (rag) none is the default",
    ),
    ("tokenizer_config.json", {"model_max_length": "x"}, "the tokenizer of"),
]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def put(file: Path, values: Any) -> None:
    if isinstance(values, dict):
        values = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(("values", "sentence"), CONFIGS)
def test_configurations(values: dict[str, Any], sentence: str, base: Path) -> None:
    put(base / "config.json", values)
    with pytest.raises(ModelError) as raised:
        require_complete(BaseModel(str(base)))
    assert sentence in raised.value.message
    assert raised.value.hint
    with pytest.raises(ModelError):
        open_model(str(base), dtype=torch.float32)


@pytest.mark.parametrize("values", [[], 5, None])
def test_configurations_of_another_type(values: Any, base: Path) -> None:
    put(base / "config.json", values)
    with pytest.raises(ModelError, match="the configuration of"):
        load_config(BaseModel(str(base)))


@pytest.mark.parametrize(("file", "values", "sentence"), TOKENIZERS)
def test_tokenizers(file: str, values: Any, sentence: str, base: Path) -> None:
    if "chat_template" in values:
        (base / "chat_template.jinja").unlink()
    put(base / file, values)
    with pytest.raises(ModelError) as raised:
        load_tokenizer(BaseModel(str(base)))
    assert raised.value.message.startswith(f"the tokenizer of {str(base)!r} could not be read: ")
    assert sentence in raised.value.message
