"""RMSNorm in blocks: forward the bits of transformers, backward autograd's numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from replaced import assert_copies_and_gradients
from tiny import MODELS, tiny_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from alignkit.models.kernels import blocks as cpu_blocks
from alignkit.models.kernels import norms as cpu_norm
from alignkit.models.kernels.norms import rms_norm, use_fast_norms

HIDDEN, EPSILON = 40, 1e-5
SHAPES = [(1, 1, HIDDEN), (1, 23, HIDDEN), (2, 5, 3, HIDDEN)]
DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]


@pytest.fixture(params=[1, 7 * HIDDEN, 1 << 18], ids=["row by row", "seven rows", "whole"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_blocks, "ELEMENTS", request.param)


def inputs(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> tuple[Any, Any, Any]:
    """x, w and the slope of y, of which two rows are large and one is zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    rows = x.view(-1, HIDDEN)
    rows[:2] *= 300
    rows[2:3] = 0
    weight = 1 + 0.3 * torch.randn(HIDDEN, generator=generator)
    slope = torch.randn(shape, generator=generator)
    return x.to(dtypes[0]), weight.to(dtypes[1]), slope


def naive(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPSILON)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtypes", DTYPES, ids=["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_has_the_bits_of_transformers(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    x, weight, _ = inputs(shape, dtypes)
    norm = LlamaRMSNorm(HIDDEN, EPSILON).to(dtypes[1])
    norm.weight.data.copy_(weight)
    expected = norm(x)
    found = rms_norm(x, weight, EPSILON)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("trained", ["x", "weight", "both"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], trained: str
) -> None:
    x, weight, slope = inputs(shape, dtypes)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y = rms_norm(
        x.requires_grad_(trained != "weight"), weight.requires_grad_(trained != "x"), EPSILON
    )
    slope = slope.to(y.dtype)
    y.backward(slope)
    naive(*exact).backward(slope.double())
    close = 3e-6 if torch.bfloat16 not in dtypes else 8e-3
    for found, reference, wanted in ((x, exact[0], "weight"), (weight, exact[1], "x")):
        if trained == wanted:
            assert found.grad is None
            continue
        assert found.grad.dtype == found.dtype
        rows = found.grad.double() - reference.grad
        assert (rows.norm(dim=-1) <= close * reference.grad.norm(dim=-1)).all()


@pytest.mark.usefixtures("blocks")
def test_under_autocast_the_result_is_rounded_once_to_what_products_read() -> None:
    x, weight, slope = inputs(SHAPES[2], (torch.float32, torch.bfloat16))
    leaves = [t.requires_grad_() for t in (x, weight)]
    expected = rms_norm(x, weight, EPSILON)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rms_norm(x, weight, EPSILON)
    assert (expected.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(found, expected.bfloat16())
    narrow = slope.bfloat16()
    ours = torch.autograd.grad(found, leaves, narrow)
    theirs = torch.autograd.grad(expected, leaves, narrow.float())
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16]
    for a, b in zip(ours, theirs, strict=True):  # the direction of x is kept in bfloat16
        error = (a.float() - b.float()).norm(dim=-1)
        assert (error <= 8e-3 * b.float().norm(dim=-1)).all()


@pytest.mark.parametrize("family", MODELS)
def test_a_model_computes_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model(family).eval()
    fast = copy.deepcopy(plain)
    count = use_fast_norms(fast)
    assert count == (0 if family.startswith("gemma") else 2 * plain.config.num_hidden_layers + 1)
    ids = torch.arange(30)[None]
    called: list[int] = []
    right = cpu_norm.rms_norm
    monkeypatch.setattr(cpu_norm, "rms_norm", lambda *about: called.append(1) or right(*about))
    assert torch.equal(fast(ids).logits, plain(ids).logits)
    assert len(called) == count
    assert_copies_and_gradients(fast, plain, ids)


def test_other_formulas_and_devices_keep_their_code() -> None:
    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + self.weight * 1e-3

    class Plain(LlamaRMSNorm):
        pass

    class Gated(LlamaRMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x if gate is None else x * gate)

    assert use_fast_norms(Gated(HIDDEN)) == 0
    assert use_fast_norms(Olmo2RMSNorm(HIDDEN)) == 0  # rounds after the weight, not before
    assert use_fast_norms(Olmo2RMSNorm(HIDDEN).bfloat16()) == 0
    assert use_fast_norms(Shifted(HIDDEN)) == 0
    assert use_fast_norms(Plain(HIDDEN)) == 1
    assert use_fast_norms(Plain(HIDDEN).to("meta")) == 0
    moved = Plain(HIDDEN)
    use_fast_norms(moved)
    assert moved.to("meta")(torch.empty(2, HIDDEN, device="meta")).device.type == "meta"
