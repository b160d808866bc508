"""Rotation in blocks: forward the bits of transformers, backward autograd's numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from replaced import assert_copies_and_gradients
from tiny import MODELS, tiny_model
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from alignkit.models.kernels import blocks as cpu_blocks
from alignkit.models.kernels import rotary as cpu_rotary
from alignkit.models.kernels.rotary import rotate, use_cpu_rotation

HEADS, KEYS, TOKENS, WIDTH = 6, 2, 23, 16
Turned = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(params=[1, 7 * HEADS * WIDTH, 1 << 18], ids=["one by one", "seven", "whole"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_blocks, "ELEMENTS", request.param)


def inputs(rows: int, dtype: torch.dtype, angles: int | None = None) -> list[torch.Tensor]:
    """Queries and keys as views of what projections wrote; cosines and sines of any angles."""
    generator = torch.Generator().manual_seed(0)
    heads = [
        torch.randn(rows, TOKENS, n, WIDTH, generator=generator).to(dtype).transpose(1, 2)
        for n in (HEADS, KEYS)
    ]
    angle = torch.randn(angles or rows, TOKENS, WIDTH, generator=generator)  # halves differ
    wide = torch.promote_types(dtype, torch.float32)
    return [*heads, angle.cos().to(wide), angle.sin().to(wide)]


def outcome(turn: Any, about: list[torch.Tensor]) -> list[torch.Tensor]:
    """Turned queries and keys and the gradients of both, for slopes that are not their own."""
    leaves = [x.detach().requires_grad_() for x in about[:2]]
    turned = turn(*leaves, *about[2:])
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in turned]
    return [*turned, *torch.autograd.grad(turned, leaves, slopes)]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "angles"), [(1, 1), (3, 3), (3, 1)])
def test_the_numbers_of_transformers(rows: int, angles: int, dtype: torch.dtype) -> None:
    about = inputs(rows, dtype, angles)
    found = outcome(rotate, about)
    expected = outcome(modeling_llama.apply_rotary_pos_emb, about)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    for ours, theirs, leaf in zip(found[2:], expected[2:], about[:2], strict=True):
        assert ours.dtype == leaf.dtype
        # autograd rounds each of two parts to bfloat16; here their sum is rounded
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=0.02 if dtype == torch.bfloat16 else 1e-6,
            atol=0.02 if dtype == torch.bfloat16 else 1e-6,
        )


def test_a_quarter_turn_in_closed_form() -> None:
    # cos 0, sin 1: (x1, x2) -> (-x2, x1); back, (g1, g2) -> (g2, -g1).
    query = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4).requires_grad_()
    zeros, ones = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    turned, _ = rotate(query, query.detach(), zeros, ones)
    assert turned.flatten().tolist() == [-3.0, -4.0, 1.0, 2.0]
    turned.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 1, 1, 4))
    assert query.grad is not None
    assert query.grad.flatten().tolist() == [100.0, 1000.0, -1.0, -10.0]


@pytest.mark.usefixtures("blocks")
def test_under_autocast_it_is_rounded_once_to_what_attention_reads() -> None:
    about = inputs(1, torch.bfloat16)
    wide = modeling_llama.apply_rotary_pos_emb(*about)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(rotate, about)
    assert [x.dtype for x in found] == [torch.bfloat16] * 4
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(found[:2], wide, strict=True))


@pytest.mark.parametrize("family", MODELS)
def test_a_model_computes_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model(family).eval()
    fast = copy.deepcopy(plain)
    layers = plain.config.num_hidden_layers
    assert use_cpu_rotation(fast) == layers
    called: list[int] = []
    right = cpu_rotary.rotate
    monkeypatch.setattr(cpu_rotary, "rotate", lambda *about: called.append(1) or right(*about))
    ids = torch.arange(30)[None]
    assert torch.equal(fast(ids).logits, plain(ids).logits)
    assert len(called) == layers  # nobody else's attention has changed
    assert_copies_and_gradients(fast, plain, ids)


def test_a_part_of_each_head_is_turned_by_the_models_own_code() -> None:
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                                "partial_rotary_factor": 0.5},
    )  # fmt: skip
    torch.manual_seed(0)
    plain = Phi3ForCausalLM(config).eval()
    fast = copy.deepcopy(plain)
    use_cpu_rotation(fast)
    ids = torch.arange(30)[None]
    assert torch.equal(fast(ids).logits, plain(ids).logits)


def test_another_rotation_or_a_forward_that_is_wrapped_keeps_its_code() -> None:
    class Layer(torch.nn.Linear):
        head_dim = WIDTH

    def forward_with(function: Any) -> Any:
        names = {"apply_rotary_pos_emb": function}
        code = compile("def forward(self, x): return apply_rotary_pos_emb(x)", "layer", "exec")
        exec(code, names)
        return names["forward"]

    def count(forward: Any) -> int:
        return use_cpu_rotation(type("Other", (Layer,), {"forward": forward})(2, 2))

    llama = modeling_llama.apply_rotary_pos_emb
    assert count(forward_with(llama)) == 1
    assert count(forward_with(modeling_cohere.apply_rotary_pos_emb)) == 0  # turns neighbours
    assert count(forward_with(lambda q, k, cos, sin: (q * cos, k * cos))) == 0
    assert count(forward_with(lambda q, k: (q, k))) == 0  # takes other angles
    wrapped = forward_with(llama)
    wrapped.__wrapped__ = forward_with(llama)
    assert count(wrapped) == 0
    assert count(torch.nn.Linear.forward) == 0


def test_narrow_angles_keep_their_rounding() -> None:
    plain = tiny_model("llama").eval().to(torch.bfloat16)
    fast = copy.deepcopy(plain)
    use_cpu_rotation(fast)
    ids = torch.arange(30)[None]
    assert torch.equal(fast(ids).logits, plain(ids).logits)
