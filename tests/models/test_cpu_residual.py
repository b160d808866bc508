"""Addition and norm in one pass: forward the bits of both apart, backward autograd's numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import MODELS, tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from alignkit.models import cpu_norm, cpu_residual
from alignkit.models.cpu_residual import add_norm, use_cpu_residuals

HIDDEN, EPSILON = 40, 1e-5
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16),  # a wide stream around narrow products
    (torch.float32, torch.bfloat16, torch.float32),
]


@pytest.fixture(params=[1, 7 * HIDDEN, 1 << 18], ids=["row by row", "seven rows", "whole"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_norm, "ELEMENTS", request.param)


def inputs(dtypes: tuple[torch.dtype, ...]) -> tuple[torch.Tensor, torch.Tensor, LlamaRMSNorm]:
    generator = torch.Generator().manual_seed(0)
    stream, branch = (torch.randn(2, 23, HIDDEN, generator=generator) for _ in range(2))
    norm = LlamaRMSNorm(HIDDEN, EPSILON)
    norm.weight.data = 1 + 0.3 * torch.randn(HIDDEN, generator=generator)
    norm.in_blocks = True
    return stream.to(dtypes[0]), branch.to(dtypes[1]), norm.to(dtypes[2])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_forward_has_the_bits_of_both_apart(
    dtypes: tuple[torch.dtype, ...], autocast: bool
) -> None:
    stream, branch, norm = inputs(dtypes)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        total, y = add_norm(stream, branch, norm)
    expected = stream + branch
    normed = norm(expected)
    assert total.dtype == expected.dtype
    assert torch.equal(total, expected)
    assert y.dtype == (torch.bfloat16 if autocast else normed.dtype)
    assert torch.equal(y, normed.to(y.dtype))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("trained", ["inputs", "weight", "both"])
@pytest.mark.parametrize("used", ["total", "norm", "both"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_gradients_are_those_of_the_formula(
    dtypes: tuple[torch.dtype, ...], used: str, trained: str
) -> None:
    stream, branch, norm = inputs(dtypes)
    leaves = [stream, branch, norm.weight]
    for leaf, wanted in zip(leaves, ("weight", "weight", "inputs"), strict=True):
        leaf.requires_grad_(trained != wanted)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    h = exact[0] + exact[1]
    both = h, exact[2] * h / torch.sqrt(h.square().mean(-1, keepdim=True) + EPSILON)
    generator = torch.Generator().manual_seed(1)
    loss, reference = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for name, ours, theirs in zip(
        ("total", "norm"), add_norm(*leaves[:2], norm), both, strict=True
    ):
        slope = torch.randn(ours.shape, generator=generator).to(ours.dtype)
        if used in (name, "both"):
            loss = loss + (ours * slope).float().sum()
            reference = reference + (theirs * slope.double()).sum()
    if not loss.requires_grad:  # the sum does not depend on the weight
        assert (used, trained) == ("total", "weight") or trained == "weight"
        return
    loss.backward()
    reference.backward()
    close = 3e-6 if torch.bfloat16 not in dtypes else 1.5e-2
    for leaf, wide, wanted in zip(leaves, exact, ("weight", "weight", "inputs"), strict=True):
        if trained == wanted:
            assert leaf.grad is None
            continue
        assert leaf.grad.dtype == leaf.dtype
        expected = torch.zeros_like(wide) if wide.grad is None else wide.grad
        error = (leaf.grad.double() - expected).norm(dim=-1)
        assert (error <= close * expected.norm(dim=-1)).all()


@pytest.mark.parametrize("family", MODELS)
def test_a_model_computes_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model(family).eval()
    fast = copy.deepcopy(plain)
    layers = 0 if family.startswith("gemma") else plain.config.num_hidden_layers
    assert use_cpu_residuals(fast) == layers
    called: list[int] = []
    right = cpu_residual._AddNorm.apply
    monkeypatch.setattr(
        cpu_residual._AddNorm, "apply", lambda *about: called.append(1) or right(*about)
    )
    ids = torch.arange(30)[None]
    assert torch.equal(fast(ids).logits, plain(ids).logits)
    assert len(called) == layers
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(fast(ids).logits, plain(ids).logits)  # the copy has its own weights
    assert not torch.equal(twin(ids).logits, plain(ids).logits)
    for model in (fast, plain):
        model(ids).logits.square().mean().backward()
    gradients = zip(fast.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7) for a, b in gradients)


def test_layers_that_recompute_keep_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for checkpointed in (False, True):
        model = tiny_model("llama").train()
        use_cpu_residuals(model)
        if checkpointed:
            model.gradient_checkpointing_enable()
            monkeypatch.setattr(cpu_residual, "add_norm", None)  # nobody may call it
        passes: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))  # noqa: B023
        model(torch.arange(30)[None]).logits.square().mean().backward()
        assert len(passes) == 1 + checkpointed
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


class Scaled(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        return super().forward(hidden_states, **options) * 0.5


class Parallel(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        return hidden_states + branch + self.mlp(self.post_attention_layernorm(hidden_states))


class Deaf(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        return super().forward(hidden_states, **(options | {"attention_mask": None}))


class Pair(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
        return (super().forward(hidden_states, **options),)


@pytest.mark.parametrize("kind", [LlamaDecoderLayer, Scaled, Parallel, Deaf, Pair])
def test_layers_that_are_wired_otherwise_keep_their_code(kind: type) -> None:
    layer = kind(tiny_model("llama").config, 0)
    parts = dict(layer.named_children())
    assert use_cpu_residuals(nn.ModuleList([layer])) == (kind is LlamaDecoderLayer)
    assert dict(layer.named_children()) == parts  # the stubs are gone
    layer.dropout = nn.Dropout(0.5)
    assert use_cpu_residuals(nn.ModuleList([layer])) == 0
