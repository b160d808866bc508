"""Starts from the base's own weights: the model is the same at first, and only half is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from running import adapter_of, make_recipe, train
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from alignkit.errors import AlignkitError, ModelError
from alignkit.jobs.merge import MergeOptions, merge_run
from alignkit.models.adapters.attach import adapters_off, attach_adapter, trainable_report
from alignkit.models.base.loading import BaseModel, load_model
from alignkit.models.kernels.quantized import dense_weight
from alignkit.models.merging.dense import stored_weights
from alignkit.recipe.adapters import LoraSpec

IDS = torch.arange(50, 90)[None]
STARTS = ["pissa", "pissa_niter_16", "olora"]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", STARTS)
def test_the_start_is_peft_s_and_changes_nothing(init: str, rslora: bool) -> None:
    untouched = logits(tiny_model())
    spec = LoraSpec(rank=4, alpha=8.0, init=init, rslora=rslora)
    ours = attach_adapter(tiny_model(), spec, 0)
    # In float32 the halves cancel up to the rounding of products near 30.
    torch.testing.assert_close(logits(ours), untouched, rtol=1e-4, atol=2e-3)
    with adapters_off(ours):
        torch.testing.assert_close(logits(ours), untouched, rtol=0, atol=0)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights=init.removesuffix("_niter_16"),
        use_rslora=rslora,
    )
    theirs = dict(get_peft_model(tiny_model(), config).named_modules())
    for name, layer in ours.named_modules():
        if isinstance(layer, LoraLayer):
            other = theirs[name]
            scale = layer.scaling["default"]
            assert scale == pytest.approx(other.scaling["default"])
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert torch.equal(a[:4], a[4:])
            assert torch.equal(b[:, :4], -b[:, 4:])
            one = scale * b[:, :4] @ a[:4]
            two = scale * other.lora_B["default"].weight @ other.lora_A["default"].weight
            # Signs of singular vectors are free, and their product's are not.
            tolerance = 2e-2 if "niter" in init else 1e-4
            assert (one - two).norm() < tolerance * two.norm()


@pytest.mark.parametrize("init", STARTS)
def test_only_half_is_trained(init: str, tiny_base: Path, tmp_path: Path) -> None:
    model = attach_adapter(tiny_model(), LoraSpec(rank=4, init=init), 0)
    plain = attach_adapter(tiny_model(), LoraSpec(rank=4), 0)
    assert trainable_report(model).trainable == trainable_report(plain).trainable
    adapter = {"kind": "lora", "rank": 4, "alpha": 8, "init": init}
    train(
        make_recipe(
            tmp_path,
            tiny_base,
            adapter=adapter,
            training__weight_decay=0.5,
            training__learning_rate=1e-2,
        )
    )
    started = attach_adapter(
        load_model(BaseModel(str(tiny_base)), torch.float32),
        LoraSpec(rank=4, alpha=8.0, init=init),
        0,
    )
    first = {
        name.replace(".default", ""): weight
        for name, weight in started.named_parameters()
        if "lora_" in name
    }
    stored = adapter_of(tmp_path / "run")
    for name, weight in stored.items():
        before, after = first[name].detach(), weight
        if "lora_A" not in name:
            before, after = before.T, after.T
        assert torch.equal(before[4:], after[4:])
        assert not torch.equal(before[:4], after[:4])
    # Plain PEFT reads ordinary LoRA of twice the rank over the ordinary base.
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    read = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged.eval()), logits(read), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loftq_makes_up_for_quantization(kind: str, tiny_base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = BaseModel(str(tiny_base))
    narrow = load_model(source, torch.float32, quantization=kind)
    original = stored_weights(source)
    spec = LoraSpec(rank=16, alpha=8.0, init="loftq")
    model = attach_adapter(narrow, spec, 0, initial=original.__getitem__)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = original[name.removeprefix("base_model.model.") + ".weight"]
            base = dense_weight(layer.get_base_layer())
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            lost = weight - base
            left = (lost - layer.scaling["default"] * b @ a).detach()
            # The best approximation of rank 16 leaves the smaller singular values.
            values = torch.linalg.svdvals(lost)
            assert left.norm() == pytest.approx(float(values[16:].norm()), rel=1e-3)


def test_loftq_goes_onto_the_weights_it_makes_up_for(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    fields = {"adapter": {"kind": "lora", "rank": 4, "init": "loftq"}}
    train(make_recipe(tmp_path, tiny_base, model__quantization="nf4", **fields))
    run = tmp_path / "run"
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))["summary"]["merge"]
    assert about["quantized"]["onto"] == "dequantized"
    with pytest.raises(ModelError, match="would count twice"):
        merge_run([str(run)], MergeOptions(onto="original", output=tmp_path / "again"))
    merged = load_file(run / "merged/model.safetensors")
    stored = load_file(tiny_base / "model.safetensors")
    assert merged.keys() == stored.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": {"kind": "lora", "init": "loftq"}}, r"needs model\.quantization"),
        ({"adapter": {"kind": "lora", "init": "pissa", "dora": True}}, "combined with dora"),
        ({"adapter": {"kind": "lora", "init": "pisa"}}, "pissa"),
    ],
)
def test_what_does_not_go_together(
    fields: dict[str, Any], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "base")
    with pytest.raises(AlignkitError, match=message):
        train(make_recipe(tmp_path, tiny_base, **fields))
