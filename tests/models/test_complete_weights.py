"""A base is whole or refused, before a weight is read and when it is: nothing is random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import save_mixture
from safetensors.torch import load_file, save_file
from tiny import MODELS, save_tiny, tiny_model

from alignkit.errors import ModelError
from alignkit.models.base.files import weight_files
from alignkit.models.base.loading import BaseModel, load_model
from alignkit.models.base.skeleton import require_complete
from alignkit.models.export.gguf import export_gguf
from alignkit.models.merging.dense import stored_weights

Weights = dict[str, torch.Tensor]
MLP, EXPERT = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"


def save(folder: Path, family: str) -> None:
    (save_tiny if family in MODELS else save_mixture)(folder, family)


def edit(folder: Path, change: Callable[[Weights], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(base: BaseModel) -> Any:
    return load_model(base, torch.float32)


READERS = [require_complete, load, stored_weights]


@pytest.mark.parametrize("family", [*MODELS, "Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3"])
def test_whole_models(family: str, tmp_path: Path) -> None:
    save(tmp_path, family)
    for read in READERS:
        read(BaseModel(str(tmp_path)))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop(MLP), f"is incomplete: {MLP} is missing in its files"),
        (
            lambda w: [w.pop(name) for name in list(w) if "layers.1." in name],
            "is incomplete: 9 weights, model.layers.1.input_layernorm.weight first, are missing",
        ),
        (lambda w: w.update({MLP: torch.ones(3, 5)}), "is [3, 5] in its file, but [96, 64] by its"),
        (
            lambda w: w.update({MLP.replace("1", "2"): torch.ones(3)}),
            "has no place for: 1, such as model.layers.2.mlp.up_proj.weight",
        ),
    ],
)
def test_dense_weights_that_do_not_fit(
    change: Callable[[Weights], Any], sentence: str, read: Callable[..., Any], tmp_path: Path
) -> None:
    save(tmp_path, "llama")
    edit(tmp_path, change)
    with pytest.raises(ModelError) as raised:
        read(BaseModel(str(tmp_path)))
    assert sentence in raised.value.message


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop(EXPERT), f"is incomplete: {EXPERT} is missing"),
        (lambda w: w.update({EXPERT: torch.ones(3, 5)}), f"{EXPERT} of "),
    ],
)
def test_experts_that_do_not_fit(
    change: Callable[[Weights], Any], sentence: str, tmp_path: Path
) -> None:
    save(tmp_path, "Qwen3Moe")
    edit(tmp_path, change)
    with pytest.raises(ModelError) as raised:
        require_complete(BaseModel(str(tmp_path)))
    assert sentence in raised.value.message
    with pytest.raises(ModelError):
        load(BaseModel(str(tmp_path)))


def test_integers_without_their_meaning(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    edit(tmp_path, lambda w: w.update({MLP: (w[MLP] * 10).to(torch.int8)}))
    with pytest.raises(ModelError, match=f"^{MLP} of .* is stored as integers, but its config"):
        require_complete(BaseModel(str(tmp_path)))


@pytest.mark.parametrize("layers", [4, 10**6])
def test_more_layers_than_weights(layers: int, tmp_path: Path) -> None:
    save(tmp_path, "llama")
    file = tmp_path / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(values | {"num_hidden_layers": layers}), encoding="utf-8")
    sentence = (
        "is incomplete: 18 weights" if layers == 4 else "num_hidden_layers = 1000000, and its"
    )
    for read in READERS[:2]:
        with pytest.raises(ModelError, match=sentence):
            read(BaseModel(str(tmp_path)))


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ([], "is not one"),
        ({"weight_map": []}, "is not one"),
        ({"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}, "names '../outside.safe"),
        ({"metadata": {}, "weight_map": {"a": 5}}, "names '5', which is not a file beside it"),
    ],
)
def test_an_index_that_is_none(index: Any, sentence: str, tmp_path: Path) -> None:
    save(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index), encoding="utf-8")
    for read in READERS:
        with pytest.raises(ModelError) as raised:
            read(BaseModel(str(tmp_path)))
        assert sentence in raised.value.message


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    (tmp_path / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    assert weight_files(tmp_path) == ["model.safetensors"]
    load(BaseModel(str(tmp_path)))


def test_the_named_gguf_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("here", 1), ("there", 2)):
        save_tiny(tmp_path / name / "source", seed=seed)
        source = BaseModel(str(tmp_path / name / "source"))
        rows = [torch.arange(9).numpy()]
        export_gguf(source, tmp_path / name / "m.gguf", kind="f32", rows=rows, title="tiny")
    monkeypatch.chdir(tmp_path / "here")
    name = "model.layers.1.mlp.up_proj.weight"
    read = load(BaseModel("../there", "m.gguf")).state_dict()[name]
    assert torch.equal(read, tiny_model(seed=2).state_dict()[name])
