"""An adapter trained over a quantized base can go onto either set of weights, and both are told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_merging import logits, merge, write_adapter
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from alignkit.errors import ModelError, RoundingError
from alignkit.models.adapters.files import TRAINED_OVER, TrainedOver, load_adapter
from alignkit.models.base.loading import BaseModel, load_model
from alignkit.models.kernels.quantized import dense_weight, is_quantized
from alignkit.models.kernels.requantized import as_trained, quantized_names
from alignkit.models.merging import merge as merging
from alignkit.models.weights.streaming import build_without_weights

pytest.importorskip("bitsandbytes")
KINDS = ["nf4", "int8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requantized") / "base"
    save_tiny(folder, dtype=torch.bfloat16)
    return folder


def adapter_over(folder: Path, kind: str, dtype: str = "bfloat16", device: str = "cpu") -> Path:
    """A small adapter that says it was trained over a quantized base."""
    write_adapter(folder, size=0.02)
    over = TrainedOver("the/base", "hub@1", kind, dtype, device=device)
    (folder / TRAINED_OVER).write_text(json.dumps(dataclasses.asdict(over)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_weights_a_run_computes_with(
    kind: str, dtype: torch.dtype, family: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "base", family)
    source = BaseModel(str(tmp_path / "base"))
    model = load_model(source, dtype, quantization=kind)
    stored = load_file(tmp_path / "base/model.safetensors")
    empty = build_without_weights(AutoModelForCausalLM, model.config)
    found = as_trained(empty, stored.__getitem__, kind, dtype, torch.device("cpu"))
    names = {f"{name}.weight" for name, m in model.named_modules() if is_quantized(m)}
    assert names == quantized_names(empty)
    assert len(names) == 14
    for name in names:
        dense = dense_weight(model.get_submodule(name.removesuffix(".weight")))
        assert torch.equal(found(name), dense)
        assert not torch.equal(dense.float(), stored[name].float())
    for name in set(stored) - names:
        assert found(name) is stored[name]


def test_a_base_that_a_card_quantized_is_told_without_one(base: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the card makes the same codes again")
    adapter = adapter_over(tmp_path / "adapter", "nf4", "float32", "cuda")
    report = merge(base, adapter, tmp_path / "merged", onto="dequantized")
    assert "quantized on cuda, which is not here" in report.lines()[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_onto_either(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = adapter_over(tmp_path / "adapter", kind, "float32")
    merging_limit = merging.MAX_DRIFT
    reports = {
        onto: merge(base, adapter, tmp_path / onto, onto=onto) for onto in ("dequantized", "auto")
    }
    source = BaseModel(str(base))
    trained = logits(load_adapter(load_model(source, torch.float32, quantization=kind), adapter))
    original = logits(load_adapter(load_model(source, torch.float32), adapter))
    folder = tmp_path / "dequantized"
    found = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=3e-4)
    assert (original - trained).abs().max() > 0.01
    quantized = reports["dequantized"].quantized
    assert quantized is not None
    assert (quantized.kind, quantized.onto) == (kind, "dequantized")
    assert reports["dequantized"].loss == pytest.approx(quantized.drift.trained)
    assert reports["dequantized"].mean_kl < 1e-6
    drift = quantized.drift
    chosen = reports["auto"].quantized
    assert chosen is not None
    assert chosen.drift == drift
    exceeds = drift.original - drift.trained > merging_limit
    assert chosen.onto == ("dequantized" if exceeds else "original")
    assert f"loss {drift.trained:.4f} there" in reports["auto"].lines()[-1]


def test_original_weights_that_do_worse_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_over(tmp_path / "adapter", "nf4")
    for limit, expected in ((-10.0, "dequantized"), (10.0, "original")):
        monkeypatch.setattr(merging, "MAX_DRIFT", limit)
        report = merge(base, adapter, tmp_path / expected, dtype=torch.bfloat16)
        assert report.quantized is not None
        assert report.quantized.onto == expected
    monkeypatch.setattr(merging, "MAX_DRIFT", -10.0)
    with pytest.raises(RoundingError, match="over the original weights the adapter differs") as no:
        merge(base, adapter, tmp_path / "no", dtype=torch.bfloat16, onto="original")
    assert no.value.hint == "merge with --onto dequantized"
    assert not (tmp_path / "no").exists()


def test_nothing_to_dequantize(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", size=0.02)
    with pytest.raises(ModelError, match="was not trained over one quantized base"):
        merge(base, adapter, tmp_path / "out", dtype=torch.bfloat16, onto="dequantized")


def test_a_kind_of_the_future(base: Path, tmp_path: Path) -> None:
    adapter = adapter_over(tmp_path / "adapter", "int2")
    with pytest.raises(ModelError, match="weights in 'int2', which are not known here"):
        merge(base, adapter, tmp_path / "out", dtype=torch.bfloat16)
