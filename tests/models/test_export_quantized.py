"""Quantized folders: what is on disk is what was quantized, and how far it is from the source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.errors import ModelError
from alignkit.models.base.loading import BaseModel
from alignkit.models.export import bitsandbytes as exporting
from alignkit.models.export.bitsandbytes import QuantizedReport, export_quantized
from alignkit.models.kernels.quantized import multiply_dense

ROWS = [np.random.default_rng(n).integers(0, 600, 40) for n in range(4)]
UP = "model.layers.1.mlp.up_proj.weight"


def export(base: Path, output: Path, bits: int = 8, **options: Any) -> QuantizedReport:
    return export_quantized(BaseModel(str(base)), output, bits=bits, rows=ROWS, **options)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_an_ordinary_folder(bits: int, family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family)
    report = export(tmp_path / "base", tmp_path / "out", bits)
    names = names_in(tmp_path / "out")
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(names)
    assert {"tokenizer.json", "chat_template.jinja"} <= set(names)
    about = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    settings = about["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes"
    assert (settings["load_in_8bit"], settings["load_in_4bit"]) == (bits == 8, bits == 4)
    if bits == 4:
        assert settings["bnb_4bit_quant_type"] == "nf4"
        assert settings["bnb_4bit_use_double_quant"]
    assert report.layers == 14  # seven a layer; the head stays
    assert report.megabytes < report.source_megabytes
    # The report's numbers, measured again.
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("base", "out")
    )
    multiply_dense(two, torch.float32)  # the weights, without what a processor makes of them
    with torch.no_grad():
        exact, found = (
            torch.cat([m(torch.as_tensor(row)[None]).logits[0] for row in ROWS]) for m in (one, two)
        )
    assert report.logits.positions == len(exact) == 160
    difference = float((exact - found).abs().max())
    assert report.logits.max_logit_difference == pytest.approx(difference, rel=1e-3)
    p, q = (torch.log_softmax(x.double(), -1) for x in (exact, found))
    assert report.logits.mean_kl == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2
    )
    assert report.logits.mean_kl > 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tmp_path / "base").chat_template


def test_int8_weights_in_closed_form(tiny_base: Path, tmp_path: Path) -> None:
    export(tiny_base, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    source = load_file(tiny_base / "model.safetensors")[UP]
    # Row by row the largest weight is 127 steps; bitsandbytes rounds through half precision.
    step = source.abs().amax(1, keepdim=True) / 127
    found = stored[UP].float() * stored[UP.replace("weight", "SCB")][:, None] / 127
    assert ((found - source).abs() <= 0.57 * step).all()
    torch.testing.assert_close(
        stored[UP.replace("weight", "SCB")] / 127, step[:, 0], rtol=1e-3, atol=0
    )


def test_nf4_weights(tiny_base: Path, tmp_path: Path) -> None:
    export(tiny_base, tmp_path / "out", 4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    weight = model.get_submodule(UP.removesuffix(".weight")).weight
    found = bitsandbytes.dequantize_4bit(weight.data, weight.quant_state).float()
    source = load_file(tiny_base / "model.safetensors")[UP]
    blocks = source.reshape(-1, 64)
    # The widest gap between two of the 16 levels of NF4 is 0.304 of a block's largest weight:
    # half of it, and a tenth for the scale, which double quantization keeps in 8 bits.
    allowed = (0.152 + 0.1) * blocks.abs().amax(1, keepdim=True)
    difference = (found.reshape(-1, 64) - blocks).abs()
    assert (difference <= allowed).all()
    assert difference.max() > 0


def test_a_far_model_is_said_to_be_far(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = export(tiny_base, tmp_path / "near")
    assert near.logits.mean_kl < 0.1
    assert len(near.lines()) == 3
    monkeypatch.setattr(exporting, "FAR", 1e-9)
    assert "expect answers that differ" in near.lines()[3]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_file_that_does_not_hold_what_was_written(
    bits: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporting.write_and_read

    def spoil(model: Any, tokenizer: Any, folder: Path, read: Callable[[Path], Any]) -> Any:
        return right(model, tokenizer, folder, lambda folder: read(spoiled(folder)))

    def spoiled(folder: Path) -> Path:
        weights = load_file(folder / "model.safetensors")
        weights[UP].view(torch.uint8)[3, 0] ^= 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    monkeypatch.setattr(exporting, "write_and_read", spoil)
    with pytest.raises(ModelError, match=f"does not hold what was written: {UP} differs"):
        export(tiny_base, tmp_path / "out", bits)
    assert names_in(tmp_path) == []


def test_an_existing_output_is_kept(tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match="already exists"):
        export(tiny_base, output)
    with pytest.raises(ModelError, match="is not a model folder, so it is not overwritten"):
        export(tiny_base, output, overwrite=True)
    assert names_in(output) == ["mine.txt"]
    export(tiny_base, tmp_path / "model")
    export(tiny_base, tmp_path / "model", 4, overwrite=True)
    about = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    assert about["quantization_config"]["load_in_4bit"]


def test_what_cannot_be_quantized(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    with pytest.raises(ModelError, match="--bits cannot be 3"):
        export(tmp_path / "base", tmp_path / "out", 3)
    with pytest.raises(ModelError, match="holds the model itself"):
        export(tmp_path / "base", tmp_path / "base", overwrite=True)
    export(tmp_path / "base", tmp_path / "out")
    with pytest.raises(ModelError, match="are quantized already"):
        export(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ModelError, match="GGUF file, which bitsandbytes cannot quantize"):
        export_quantized(BaseModel(str(tmp_path), "m.gguf"), tmp_path / "again", bits=8, rows=ROWS)
    config = tmp_path / "base/config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ModelError, match="is a reward model"):
        export(tmp_path / "base", tmp_path / "again")
    assert names_in(tmp_path) == ["base", "out"]
