"""4-bit and 8-bit bases: every layer computes with its dequantized weight, in any mode."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import plain_lora
from torch import nn

pytest.importorskip("bitsandbytes")

from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit

from alignkit.errors import ModelError
from alignkit.models.adapters.attach import adapters_off, attach_adapter
from alignkit.models.base.loading import BaseModel, load_model
from alignkit.models.base.places import resolve
from alignkit.models.kernels.quantized import dense_weight, is_quantized, multiply_dense
from alignkit.recipe.adapters import Ia3Spec, LoraSpec
from alignkit.runtime.metrics import read_metrics

LORA = LoraSpec(rank=4, alpha=8.0)
SPECS = {"lora": LORA, "dora": LORA.model_copy(update={"dora": True}), "ia3": Ia3Spec(kind="ia3")}
"""LoRA computes through our function, the others through PEFT's over the layer's own forward."""

both = pytest.mark.parametrize("quantization", ["nf4", "int8"])


def layers_of(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear) and is_quantized(m)]


def quantized_pair(base: Path, quantization: str, spec: Any) -> tuple[nn.Module, nn.Module]:
    """The quantized model, and one with its dequantized weights in PEFT's own code and autograd.

    Both carry the same adapter.
    """
    narrow = load_model(resolve(str(base)).whole(), torch.float32, quantization=quantization)
    dense = load_model(resolve(str(base)).whole(), torch.float32)
    plain = dict(dense.named_modules())
    for name, module in narrow.named_modules():
        if is_quantized(module):
            plain[name].weight.data = dense_weight(module).clone()
    adapted = [attach_adapter(model, spec, seed=0) for model in (narrow, dense)]
    for model in adapted:
        generator = torch.Generator().manual_seed(1)
        for name, weight in sorted(model.named_parameters()):
            if "lora_B" in name or "ia3_l" in name:
                weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return adapted[0], plain_lora(adapted[1])


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(40).view(2, 20)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("columns", [64, 96, 40])
def test_nf4_in_closed_form_whatever_the_rows(columns: int) -> None:
    """w = code[i] * scale of its block of 64, in the order of the flat weight."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(48, columns, generator=generator)
    layer = Linear4bit(columns, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    layer.to("cpu")
    state = layer.weight.quant_state
    scales = torch.cat([block.abs().amax()[None] for block in weight.flatten().split(64)])
    scales = scales.repeat_interleave(64)[: weight.numel()].view_as(weight)
    nearest = (weight / scales).unsqueeze(-1).sub(state.code).abs().argmin(-1)
    expected = state.code[nearest] * scales
    # Scales are kept in 8 bits of a nonlinear code: within a hundredth of their largest.
    assert (dense_weight(layer) - expected).abs().max() <= 0.01 * scales.max()


@both
@pytest.mark.parametrize("kind", SPECS)
def test_loss_and_gradients_are_those_of_the_dequantized_weights(
    kind: str, quantization: str, tiny_base: Path
) -> None:
    narrow, dense = quantized_pair(tiny_base, quantization, SPECS[kind])
    assert len(layers_of(narrow)) == 2 * 7
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


@both
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_off_is_the_base_bit_for_bit_in_any_mode(
    dtype: torch.dtype, kind: str, quantization: str, tiny_base: Path
) -> None:
    ids = torch.arange(16)[None]
    bare = load_model(resolve(str(tiny_base)).whole(), dtype, quantization=quantization)
    expected = bare.eval()(input_ids=ids).logits.detach()
    assert torch.equal(bare.train()(input_ids=ids).logits, expected)
    adapted = attach_adapter(bare, SPECS[kind], seed=0)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.1
    moved = []
    for mode in (True, False, True):
        adapted.train(mode)
        with adapters_off(adapted):
            assert torch.equal(adapted(input_ids=ids).logits, expected)
        with torch.no_grad():
            moved.append(adapted(input_ids=ids).logits)
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0], moved[2])
    assert not torch.allclose(moved[0], expected, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_keeps_every_weight_within_half_a_step(dtype: torch.dtype, tiny_base: Path) -> None:
    narrow = load_model(resolve(str(tiny_base)).whole(), dtype, quantization="int8")
    original = load_model(resolve(str(tiny_base)).whole(), dtype)
    assert narrow.model.embed_tokens.weight.dtype == dtype
    assert not is_quantized(narrow.get_output_embeddings())
    assert len(layers_of(narrow)) == 2 * 7
    for name, layer in narrow.named_modules():
        if not is_quantized(layer):
            continue
        assert layer.weight.dtype == torch.int8
        weight = original.get_submodule(name).weight.detach().float()
        found = dense_weight(layer)
        assert found.dtype == dtype
        largest = weight.abs().amax(1, keepdim=True)
        # A step is largest / 127. bitsandbytes reads float16; what is multiplied is rounded last.
        rounding = (torch.finfo(torch.float16).eps + torch.finfo(dtype).eps) / 2
        error = (found.float() - weight).abs()
        assert (error <= largest * (1 / 254 + rounding)).all(), name
        assert (error > largest / 254 / 2).float().mean() > 0.2, name  # it is quantized


def test_an_int8_layer_with_bias_and_a_row_of_zeros() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 5), torch.randn(6)
    weight[2] = 0.0
    layer = Linear8bitLt(5, 6, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer = layer.to("cpu").requires_grad_(False)
    multiply_dense(nn.Sequential(layer), torch.float32)
    dense = dense_weight(layer)
    assert torch.equal(dense[2], torch.zeros(5))
    x = torch.randn(2, 3, 5, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    expected = nn.functional.linear(x, dense, bias)
    (right,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, right)


@both
def test_gguf_cannot_be_quantized(quantization: str, tmp_path: Path) -> None:
    base = BaseModel(str(tmp_path), "x.gguf")
    rule = rf"GGUF file, which model\.quantization = {quantization} cannot read"
    with pytest.raises(ModelError, match=rule):
        load_model(base, torch.float32, quantization=quantization)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "quantization"),
    [("sft", "nf4"), ("dpo", "nf4"), ("reward", "nf4"), ("kto", "int8")],
)
def test_a_run_trains_saves_and_merges_into_the_weights_it_names(
    stage: str, quantization: str, tmp_path: Path, tiny_base: Path
) -> None:
    from running import make_recipe, train

    data = {
        "sft": {"path": "data_templates/sft/messages.jsonl", "take": 16},
        "dpo": {"path": "data_templates/preference/pairs.jsonl", "take": 16},
        "reward": {"path": "data_templates/preference/pairs.jsonl", "take": 16},
        "kto": {"path": "data_templates/preference/pairs.jsonl", "take": 8},
    }[stage]
    recipe = make_recipe(
        tmp_path,
        tiny_base,
        stage=stage,
        model__quantization=quantization,
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
    merged = load_model(resolve(str(tmp_path / "run" / "merged")).whole(), torch.float32)
    original = load_model(resolve(str(tiny_base)).whole(), torch.float32)
    narrow = load_model(resolve(str(tiny_base)).whole(), torch.float32, quantization=quantization)
    one, two, three = (
        dense_weight(model.model.layers[0].self_attn.q_proj).detach().double()
        for model in (merged, original, narrow)
    )
    assert summary.merge.quantized is not None
    onto = {"original": two, "dequantized": three}[summary.merge.quantized.onto]
    other = three if onto is two else two
    # The same update of those weights, of low rank, and nothing of the other ones.
    change = one - onto
    assert 0 < change.abs().max() < 0.05 * two.abs().max()
    assert torch.linalg.svdvals(change)[4] < 1e-4 * torch.linalg.svdvals(change)[0]
    assert torch.linalg.svdvals(one - other)[4] > 1e-2 * torch.linalg.svdvals(change)[0]
