"""Products in bfloat16 around a residual stream in float32."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from documents import PAIRS, random_documents
from tiny import MODELS, tiny_model

from alignkit.data.packing import pack_documents
from alignkit.models.precision import compute_context, product_dtype
from alignkit.models.scorer import PaddedScorer, TokenScorer

BATCH = pack_documents(random_documents(PAIRS, 600))


@pytest.mark.parametrize("scorer", [TokenScorer, PaddedScorer])
@pytest.mark.parametrize("family", MODELS)
def test_the_stream_is_wide_and_products_are_narrow(family: str, scorer: type) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    streams, products = [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: streams.append(output.dtype))
        layer.self_attn.o_proj.register_forward_hook(
            lambda module, args, output: products.append((args[0].dtype, output.dtype))
        )
    scorer(model, torch.bfloat16)(BATCH)
    assert streams == [torch.float32] * len(model.model.layers)
    assert products == [(torch.bfloat16, torch.bfloat16)] * len(model.model.layers)


@pytest.mark.parametrize("scorer", [TokenScorer, PaddedScorer])
def test_log_probs_are_nearer_to_exact_ones(scorer: type) -> None:
    """The same bfloat16 weights in float64, in alignkit's precision and in plain bfloat16."""
    narrow = tiny_model("llama", num_hidden_layers=12).to(torch.bfloat16)
    with torch.no_grad():
        exact = TokenScorer(copy.deepcopy(narrow).double(), torch.float32)(BATCH).logprobs
        ours = scorer(copy.deepcopy(narrow), torch.bfloat16)(BATCH).logprobs
        plain = PaddedScorer(narrow, torch.float32)(BATCH).logprobs  # no autocast: all bfloat16
    errors = [float((found.double() - exact).square().mean()) for found in (ours, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_it_ends_with_the_block() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    ids = torch.arange(5)[None]
    with contextlib.suppress(KeyError), compute_context(model, torch.bfloat16):
        assert model.get_input_embeddings()(ids).dtype == torch.float32
        assert product_dtype(torch.zeros(1)) == torch.bfloat16
        raise KeyError
    assert model.get_input_embeddings()(ids).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert product_dtype(torch.zeros(1)) == torch.float32
    assert product_dtype(torch.zeros(1), torch.float64) == torch.float64


def test_float32_changes_nothing() -> None:
    model = tiny_model("llama")
    with compute_context(model, torch.float32):
        assert not model.get_input_embeddings()._forward_hooks
        assert not torch.is_autocast_enabled("cpu")
