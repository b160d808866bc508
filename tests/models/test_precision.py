"""Products in bfloat16 around a residual stream in float32."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import transformers
from documents import PAIRS, random_documents
from tiny import MODELS, tiny_model
from torch import nn

from alignkit.data.packing import pack_documents
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.kernels.precision import compute_context, product_dtype, widen_layer_norms
from alignkit.models.scoring.padded import PaddedScorer
from alignkit.models.scoring.scorer import TokenScorer
from alignkit.recipe.adapters import LoraSpec

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 256}
LAYER_NORMS = {
    "GPTNeoX": WIDE,
    "Phi": WIDE,
    "StableLm": {**WIDE, "num_key_value_heads": 2},
    "Starcoder2": {**WIDE, "num_key_value_heads": 2},
    "Nemotron": {
        **WIDE,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "OPT": {**SIZES, "ffn_dim": 64, "max_position_embeddings": 256, "word_embed_proj_dim": 32},
    "Falcon": SIZES,
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
}
"""Families that normalise with mean and bias -> fields of a small configuration."""
PACKED = ("GPTNeoX", "Phi", "Starcoder2", "OPT", "GPT2")
"""Those of them whose attention can be packed."""

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


def layer_norm_model(family: str) -> transformers.PreTrainedModel:
    fields = {**LAYER_NORMS[family], "vocab_size": 600, "bos_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, f"{family}Config")(pad_token_id=1, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, weight in model.named_parameters():
            weight.data += 0.2 * torch.randn(weight.shape)
            assert weight.std() > 0, name
    return model.to(torch.bfloat16).eval()


@pytest.mark.parametrize(
    ("family", "scorer"),
    [*((name, PaddedScorer) for name in LAYER_NORMS), *((name, TokenScorer) for name in PACKED)],
)
def test_layer_norms_read_a_wide_stream(family: str, scorer: type) -> None:
    narrow = layer_norm_model(family)
    with torch.no_grad():
        exact = PaddedScorer(copy.deepcopy(narrow).double(), torch.float32)(BATCH).logprobs
        plain = PaddedScorer(copy.deepcopy(narrow), torch.float32)(BATCH).logprobs
    norms = [name for name, m in narrow.named_modules() if isinstance(m, nn.LayerNorm)]
    model = attach_adapter(narrow, LoraSpec(rank=2), seed=0)
    read = []
    for name in norms:
        norm = model.base_model.model.get_submodule(name)
        norm.register_forward_hook(lambda module, args, y: read.append((args[0].dtype, y.dtype)))
    found = scorer(model, torch.bfloat16)(BATCH).logprobs
    assert len(read) >= len(norms) > 2
    assert set(read) == {(torch.float32, torch.float32)}
    errors = [float((one.double() - exact).square().mean()) for one in (found, plain)]
    assert errors[0] < 2 * errors[1] < 1e-2  # no worse than all in bfloat16, chance apart
    found.sum().backward()
    slopes = {n: w.grad for n, w in model.named_parameters() if "lora_B" in n}
    assert slopes
    assert all(slope is not None and bool(slope.any()) for slope in slopes.values())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_of_one_dtype_is_its_class(dtype: torch.dtype, affine: bool) -> None:
    norm = nn.LayerNorm(48, elementwise_affine=affine, dtype=dtype)
    torch.manual_seed(0)
    for weight in norm.parameters():
        weight.data.normal_()
    x = torch.randn(3, 5, 48, dtype=dtype)
    expected = norm(x)
    assert widen_layer_norms(nn.Sequential(norm, nn.Linear(48, 1))) == 1
    assert torch.equal(norm(x), expected)
    assert norm(x).dtype == expected.dtype
