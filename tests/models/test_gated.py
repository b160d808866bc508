"""Gated products: the bits of transformers, half of what is kept, and only where they fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Config
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2MLP

from alignkit.models.kernels import blocks
from alignkit.models.kernels.gated import use_gated_products
from alignkit.models.kernels.lora import use_fast_lora
from alignkit.models.kernels.norms import use_fast_norms
from alignkit.models.kernels.remade import how_made

SIZES = {"hidden_size": 32, "intermediate_size": 64}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaMLP(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2MLP(Qwen2Config(**SIZES)),
    "gemma": lambda: GemmaMLP(GemmaConfig(**SIZES)),
}
TOKENS = 48


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows, the last one short."""
    monkeypatch.setattr(blocks, "ELEMENTS", 64 * 20)


def with_lora(layer: nn.Module, dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    names = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(layer.to(dtype)), config)
    use_fast_lora(model)
    return model


def results(model: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, and gradients of the input and of all trained weights."""
    torch.manual_seed(2)
    x = torch.randn(1, TOKENS, 32).to(dtype).requires_grad_()
    y = model(x)
    (y.float() * torch.randn(y.shape)).sum().backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    for p in model.parameters():
        p.grad = None
    return [y, x.grad, *trained]


def kept_bytes(model: Any) -> int:
    """Bytes of distinct tensors that the backward pass keeps, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = model(torch.randn(1, TOKENS, 32).requires_grad_())
    total = sum(kept.values())
    del y
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_no_bit_changes(name: str, dtype: torch.dtype) -> None:
    model = with_lora(LAYERS[name](), dtype)
    before = results(model, dtype)
    assert use_gated_products(model) == 1
    after = results(model, dtype)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def test_trained_weights_get_the_same_gradients() -> None:
    layer = LlamaMLP(LlamaConfig(**SIZES))
    before = results(layer, torch.float32)
    assert use_gated_products(layer) == 1
    for one, other in zip(before, results(layer, torch.float32), strict=True):
        assert torch.equal(one, other)


def test_two_of_four_tensors_are_kept() -> None:
    model = with_lora(LAYERS["llama"](), torch.float32)
    before = kept_bytes(model)
    use_gated_products(model)
    assert before - kept_bytes(model) == 2 * TOKENS * 64 * 4  # σ(g), and the input of down_proj


def test_other_layers_keep_their_own() -> None:
    class Clamped(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1) * self.up_proj(x))

    class Scaled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(y) * self.config.initializer_range

    config = LlamaConfig(**SIZES)
    others = [Clamped(config), Scaled(config), GPT2MLP(64, GPT2Config(n_embd=32))]
    assert use_gated_products(nn.ModuleList(others)) == 0


def test_a_norm_in_float32_is_remade_to_the_bit() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64)
    nn.init.normal_(norm.weight)
    norm.weight.requires_grad_(False)
    assert use_fast_norms(nn.Sequential(norm)) == 1
    y = norm(torch.randn(1, TOKENS, 64).requires_grad_())
    made = how_made(y)
    assert made is not None
    assert torch.equal(made.make(*made.sources).view(y.shape), y)
    # In 16 bits beside a wide input, what is kept is rounded: the output itself is kept.
    norm.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert how_made(norm(torch.randn(1, TOKENS, 64).requires_grad_())) is None
