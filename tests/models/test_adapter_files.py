"""Adapter folders that are damaged, or belong to another base: one sentence each, nothing left."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine
from peft import LoraConfig, get_peft_model
from running import make_recipe, train
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model

from alignkit.errors import ModelError
from alignkit.models.adapters import patterns
from alignkit.models.adapters.files import (
    TRAINED_OVER,
    WEIGHTS,
    TrainedOver,
    has_head,
    load_adapter,
    read_adapter_config,
    require_base,
    save_adapter,
    trained_over,
)
from alignkit.models.adapters.tensors import read_weights
from alignkit.models.base.adapter_kinds import peft_kind, require_mergeable
from alignkit.models.base.identity import weights_fingerprint
from alignkit.models.base.loading import BaseModel
from alignkit.models.opening import open_model

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter-files")
    train(make_recipe(folder, tiny_base, merge=False, training__max_steps=1))
    return folder / "run"


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        weights = load_file(adapter / WEIGHTS)
        change(weights)
        contiguous = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(contiguous, adapter / WEIGHTS, metadata={"format": "pt"})

    return damage


def lose(weights: Tensors) -> None:
    for name in [name for name in weights if ".layers.1.mlp." in name]:
        del weights[name]


def spoil(weights: Tensors) -> None:
    weights[min(weights)][0, 0] = float("nan")


def widen(weights: Tensors) -> None:
    name = next(name for name in weights if "q_proj.lora_B" in name)
    weights[name] = torch.zeros(65, weights[name].shape[1])


def deepen(weights: Tensors) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        weights[name.replace(".layers.1.", ".layers.2.")] = weights[name].clone()


def cut(adapter: Path) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[: len(data) // 2])


def no_json(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")


def other_rank(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "r": 8}), encoding="utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (cut, "the adapter weights in .* cannot be read: "),
    "empty": (lambda a: (a / WEIGHTS).write_bytes(b""), "the adapter weights in .* cannot be read"),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), "the adapter weights in .* cannot be read"),
    "configuration": (no_json, "adapter_config.json cannot be read: "),
    "tensors missing": (rewrite(lose), "is incomplete: 6 of 28 tensors are missing, such as .*mlp"),
    "not finite": (rewrite(spoil), "holds values that are not finite, in base_model"),
    "shape": (rewrite(widen), "does not fit the base: .*size mismatch"),
    "rank": (other_rank, "says r = 8, but its weights are of rank 4, in model.layers.0"),
    "deeper model": (rewrite(deepen), "does not fit the base: 14 of its 42 tensors have no place"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_adapter(fault: str, adapter: Path, tiny_base: Path) -> None:
    damage, sentence = DAMAGE[fault]
    load_adapter(tiny_model(), adapter)  # whole before
    damage(adapter)
    with pytest.raises(ModelError, match=sentence) as raised:
        load_adapter(tiny_model(), adapter)
    assert raised.value.hint


@pytest.mark.parametrize("fault", ["cut off", "tensors missing", "not finite", "shape"])
def test_merging_it_leaves_no_output(fault: str, adapter: Path, alignkit: CommandLine) -> None:
    damage, _ = DAMAGE[fault]
    damage(adapter)
    done = alignkit(
        "merge-lora", str(adapter), "--output", str(adapter.parent / "merged"), cwd=adapter
    )
    assert done.code == 2
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_the_file_names_the_weights_it_was_trained_over(run: Path, tiny_base: Path) -> None:
    fingerprint = weights_fingerprint(BaseModel(str(tiny_base)))
    expected = TrainedOver(str(tiny_base), fingerprint, "none", "float32", device="cpu")
    assert trained_over(run / "adapter") == expected
    require_base(run / "adapter", BaseModel(str(tiny_base)))
    about = json.loads((run / "adapter" / TRAINED_OVER).read_text(encoding="utf-8"))
    assert about == {**dataclasses.asdict(expected), "tokens": []}


def test_a_record_that_is_none(adapter: Path, tiny_base: Path) -> None:
    (adapter / TRAINED_OVER).write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"trained_over\.json cannot be read"):
        require_base(adapter, BaseModel(str(tiny_base)))


def test_weights_of_the_same_shape_are_not_the_same_base(
    run: Path, alignkit: CommandLine, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "other", seed=1)
    arguments = ["merge-lora", str(run), "--base", str(tmp_path / "other")]
    done = alignkit(*arguments, "--output", "merged", cwd=tmp_path)
    assert done.code == 2
    assert "was trained over other weights than those of" in done.stderr
    assert "--any-base" in done.stderr
    assert not (tmp_path / "merged").exists()
    done = alignkit(*arguments, "--output", "merged", "--any-base", cwd=tmp_path)
    assert done.code == 0
    assert (tmp_path / "merged/config.json").is_file()


def test_a_copy_of_the_base_is_the_base(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    copy = BaseModel(str(shutil.copytree(tiny_base, tmp_path / "copy")))
    require_base(run / "adapter", copy)
    over = trained_over(run / "adapter")
    assert over is not None
    assert weights_fingerprint(copy) == over.fingerprint
    path = tmp_path / "copy/model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1.0
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="was trained over other weights"):
        require_base(run / "adapter", BaseModel(str(tmp_path / "copy")))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_an_adapter_of_plain_peft_names_none(safe: bool, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=2))
    model.save_pretrained(tmp_path / "plain", safe_serialization=safe)
    assert trained_over(tmp_path / "plain") is None
    save_tiny(tmp_path / "other", seed=1)
    require_base(tmp_path / "plain", BaseModel(str(tmp_path / "other")))
    load_adapter(tiny_model(), tmp_path / "plain")


@torch.no_grad()
def test_trained_embeddings_of_plain_peft_are_no_surplus(tmp_path: Path) -> None:
    ids = torch.arange(20, 40)[None]
    bare = tiny_model()(ids).logits
    for more, saving in (
        ({"modules_to_save": ["embed_tokens"]}, {}),
        ({}, {"save_embedding_layers": True}),
    ):
        model: Any = get_peft_model(
            tiny_model(), LoraConfig(target_modules=["q_proj"], r=2, **more)
        )
        weight = model.get_input_embeddings().weight
        weight += 0.1 * torch.randn_like(weight)
        model.save_pretrained(tmp_path / str(len(more)), **saving)
        expected = model.eval()(ids).logits
        assert (expected - bare).abs().max() > 0.1
        loaded = load_adapter(tiny_model(), tmp_path / str(len(more)))
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{"])
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    assert peft_kind(tmp_path) == ""
    require_mergeable(tmp_path)
    assert not has_head(tmp_path)
    with pytest.raises(ModelError):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"base_model_name_or_path": 5}, "does not say which base it belongs to"),
        ({"base_model_name_or_path": "x" * 5000}, "is not a model: no such folder"),
        ({"peft_type": 5}, "adapter_config.json cannot be read: KeyError: 5"),
        ({"rank_pattern": 5}, "does not fit the base"),
        ({"r": 10**9}, "says r = 1000000000, but its weights are of rank "),
        ({"rank_pattern": {"q_proj": 10**9}}, "says rank_pattern.q_proj = 1000000000, but its"),
        ({"target_modules": "("}, "a pattern is no regular expression: '('"),
        ({"rank_pattern": {"([a-z0-9_.]+)+x": 1}}, "a pattern takes more than 1 s to match"),
        ({"alpha_pattern": {"(.|..|...)?" * 40 + "zz": 1}}, "a pattern takes more than 1 s"),
        ({"target_modules": "([a-z0-9_.]+)+,"}, "a pattern takes more than 1 s to match"),
    ],
)
def test_wrong_values(
    values: dict[str, Any], sentence: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    file = adapter / "adapter_config.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(stored | values), encoding="utf-8")
    with pytest.raises(ModelError) as raised:
        open_model(str(adapter), dtype=torch.float32)
    assert sentence in raised.value.message


@pytest.mark.parametrize("held", [[1], {"a": 5}, {"a": Path("x")}])
def test_pickles_that_hold_more_than_tensors(held: Any, adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    torch.save(held, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="are a pickle of more than named tensors"):
        read_weights(adapter)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    next(w for w in model.parameters() if w.requires_grad).data[0] = torch.nan
    with pytest.raises(ModelError, match="the trained weights are not finite, in base_model"):
        save_adapter(model, tmp_path / "adapter", "base")
    assert not (tmp_path / "adapter").exists()
