"""4-bit bases: the fast LoRA path equals plain LoRA over the dequantized weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")

from alignkit.errors import ModelError
from alignkit.models.adapters import adapters_off, attach_adapter
from alignkit.models.loading import BaseModel, find_base, load_model
from alignkit.models.quantized import dense_weight, is_quantized
from alignkit.recipe.adapters import LoraSpec
from alignkit.runtime.metrics import read_metrics

SPEC = LoraSpec(rank=4, alpha=8.0)


def quantized_pair(base: Path) -> tuple[nn.Module, nn.Module]:
    """The 4-bit model, and a plain one with its dequantized weights; both with one adapter."""
    narrow = load_model(find_base(str(base)), torch.float32, quantization="nf4")
    dense = load_model(find_base(str(base)), torch.float32)
    plain = dict(dense.named_modules())
    for name, module in narrow.named_modules():
        if isinstance(module, nn.Linear) and is_quantized(module):
            plain[name].weight.data = dense_weight(module).clone()
    adapted = [attach_adapter(model, SPEC, seed=0) for model in (narrow, dense)]
    for model in adapted:
        generator = torch.Generator().manual_seed(1)
        for name, weight in sorted(model.named_parameters()):
            if "lora_B" in name:
                weight.data.normal_(0.0, 0.1, generator=generator)
    return adapted[0], adapted[1]


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(40).view(2, 20)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_loss_and_gradients_are_those_of_the_dequantized_weights(tiny_base: Path) -> None:
    narrow, dense = quantized_pair(tiny_base)
    layers = [m for m in narrow.modules() if isinstance(m, nn.Linear) and is_quantized(m)]
    assert len(layers) == 2 * 7
    # Evaluation must not leave the layers in a layout without gradients.
    narrow.eval()(input_ids=torch.arange(8)[None])
    narrow.train()
    loss, gradients = loss_and_gradients(narrow)
    expected_loss, expected = loss_and_gradients(dense)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        assert scale > 0
        assert (gradient - expected[name]).abs().max() <= 1e-5 * scale, name


def test_adapters_off_is_the_quantized_base(tiny_base: Path) -> None:
    narrow, _ = quantized_pair(tiny_base)
    bare = load_model(find_base(str(tiny_base)), torch.float32, quantization="nf4")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected = bare(input_ids=ids).logits
        moved = narrow(input_ids=ids).logits
    with adapters_off(narrow):
        found = narrow(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(moved, expected, atol=1e-2)


def test_gguf_cannot_be_quantized(tmp_path: Path) -> None:
    base = BaseModel(str(tmp_path), "x.gguf")
    with pytest.raises(ModelError, match=r"GGUF file, which model\.quantization = nf4 cannot read"):
        load_model(base, torch.float32, quantization="nf4")


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_a_run_trains_saves_and_merges_into_the_original_weights(
    stage: str, tmp_path: Path, tiny_base: Path
) -> None:
    from running import make_recipe, train

    data = {
        "sft": {"path": "data_templates/sft/messages.jsonl", "take": 16},
        "dpo": {"path": "data_templates/preference/pairs.jsonl", "take": 16},
        "reward": {"path": "data_templates/preference/pairs.jsonl", "take": 16},
    }[stage]
    recipe = make_recipe(
        tmp_path,
        tiny_base,
        stage=stage,
        model__quantization="nf4",
        data__train=[copy.deepcopy(data)],
        data__max_length=512,
        training__learning_rate=2e-3,
        training__batch_size=16,  # every step reads all rows, so the loss can only fall
    )
    summary = train(recipe)
    losses = [m["loss"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in m]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert summary.merge is not None
    assert summary.merge.modules == 2 * 7
    merged = load_model(find_base(str(tmp_path / "run" / "merged")), torch.float32)
    original = load_model(find_base(str(tiny_base)), torch.float32)
    one, two = (
        model.model.layers[0].self_attn.q_proj.weight.detach() for model in (merged, original)
    )
    # Far nearer to the original weights than 4 bits could keep them.
    assert 0 < (one - two).abs().max() < 0.05 * two.abs().max()
