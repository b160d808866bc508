"""The start-up check: packed rows where they reproduce the model, padded ones where they do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from documents import naive_logprobs, random_documents
from tiny import MODELS, tiny_model

from alignkit.data.packing import pack_documents
from alignkit.errors import ModelError
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.attention import blocks as attention_blocks
from alignkit.models.attention import plain
from alignkit.models.attention import processor as cpu_attention
from alignkit.models.kernels.vocab_head import LogitTransform
from alignkit.models.scoring import scorer
from alignkit.models.scoring.padded import PaddedScorer
from alignkit.models.scoring.scorer import TokenScorer
from alignkit.models.scoring.selfcheck import build_scorer, packed_fault, probe_batch
from alignkit.packed import PackedBatch, Segment
from alignkit.recipe.adapters import LoraSpec

COMMON = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OTHERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    # scaled logits
    "cohere": ("CohereConfig", {"logit_scale": 0.25}, True),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "attention_multiplier": 0.3}, True),
    # biases, learned positions
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": None}, True),
    "gpt2": ("GPT2Config", {}, True),
    # attention sinks, no attention interface, no attention
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4}, False),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, False),
    "codegen": ("CodeGenConfig", {"n_layer": 2, "n_head": 4, "n_embd": 64, "rotary_dim": 8}, False),
    # every other layer a convolution over all tokens, no attention at all
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, False),
    "mamba": ("MambaConfig", {"state_size": 8}, False),
}


def other_model(name: str) -> Any:
    config_name, fields, _ = OTHERS[name]
    values = {k: v for k, v in {**COMMON, **fields}.items() if v is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**values)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", MODELS)
def test_every_family_is_packed(family: str, dtype: torch.dtype, adapter: bool) -> None:
    model = tiny_model(family, dtype=dtype)
    if adapter:
        model = attach_adapter(model, LoraSpec(rank=4), 0)
    said: list[str] = []
    assert isinstance(build_scorer(model, dtype, "auto", said.append), TokenScorer)
    assert said == []


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_packed_or_fall_back(name: str) -> None:
    model = other_model(name)
    said: list[str] = []
    chosen = build_scorer(model, torch.float32, "auto", said.append)
    assert isinstance(chosen, TokenScorer if OTHERS[name][2] else PaddedScorer)
    assert len(said) == (0 if OTHERS[name][2] else 1)
    # Whichever was chosen gives the model's own numbers.
    shapes = ((0, (21,)), (0, (9,)), (0, (33,)))
    documents = random_documents(shapes, 590)
    with torch.no_grad():
        found = chosen(pack_documents(documents)).logprobs
        expected = naive_logprobs(other_model(name), documents)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OTHERS)
def test_weights_that_say_little_do_not_change_the_choice(name: str, dtype: torch.dtype) -> None:
    """Which layers mix tokens is looked at, not only what comes of it."""
    model = other_model(name)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data *= 0.05
    said: list[str] = []
    chosen = build_scorer(model.to(dtype), dtype, "auto", said.append)
    assert isinstance(chosen, TokenScorer if OTHERS[name][2] else PaddedScorer), said


def wrong_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "logit_transform", lambda config: LogitTransform(scale=0.5))


def window_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_blocks.layout
    monkeypatch.setattr(
        attention_blocks, "layout", lambda segments, window, *rest: right(segments, None, *rest)
    )


def window_forgotten_by_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    right = plain._masks
    monkeypatch.setattr(
        plain,
        "_masks",
        lambda segments, window, device, rounding: right(segments, None, device, rounding),
    )


def wrong_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_attention.cpu_attention
    monkeypatch.setattr(
        cpu_attention,
        "cpu_attention",
        lambda *inputs, **options: right(*inputs, **{**options, "scaling": 0.5}),
    )


def branches_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scorer.round_up

    def joined(batch: PackedBatch, multiple: int) -> PackedBatch:
        # The probe ends with a prompt of 5 and branches of 6 and 4: here one plain run of 15.
        start = batch.segments[-3].start
        segments = (*batch.segments[:-3], Segment(start, 15))
        return right(dataclasses.replace(batch, segments=segments), multiple)

    monkeypatch.setattr(scorer, "round_up", joined)


FAULTS = {
    "logits scaled": ("llama", wrong_transform),
    "scores scaled": ("llama", wrong_scaling),
    "window forgotten": ("mistral", window_forgotten),
    # capped scores, which take the plain path on a processor too
    "window forgotten there": ("gemma2", window_forgotten_by_the_plain_path),
    "branches joined": ("llama", branches_see_each_other),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_said(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, spoil = FAULTS[fault]
    spoil(monkeypatch)
    model = tiny_model(family, dtype=dtype)
    said: list[str] = []
    chosen = build_scorer(model, dtype, "auto", said.append)
    assert isinstance(chosen, PaddedScorer)
    capped = family == "gemma2"  # no kernel of torch caps scores
    assert model.config._attn_implementation == ("eager" if capped else "sdpa")
    (sentence,) = said
    assert sentence.startswith("packed rows do not reproduce this model (log-probs differ by up to")
    assert sentence.endswith("training on padded rows, slower")
    with pytest.raises(ModelError, match="packed rows do not reproduce this model: log-") as raised:
        build_scorer(model, dtype, "packed", said.append)
    assert "model.attention to auto" in raised.value.hint


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(name: str, value: float) -> None:
    model = tiny_model()
    model.get_parameter(name).data[5] = value
    with pytest.raises(ModelError, match=f"^the model's {name} holds values that are not finite"):
        build_scorer(model, torch.float32, "auto", print)


def test_what_packed_rows_cannot_do_is_named() -> None:
    with pytest.raises(ModelError, match="packed attention does not support s_aux"):
        build_scorer(other_model("gpt_oss"), torch.float32, "packed", print)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_named_implementation_is_padded(name: str) -> None:
    model = tiny_model()
    assert isinstance(build_scorer(model, torch.float32, name, print), PaddedScorer)
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("training", [False, True])
def test_the_check_leaves_the_model_as_it_was(training: bool) -> None:
    # With dropout in training mode both sides would be random: the check must switch it off.
    model = attach_adapter(tiny_model(), LoraSpec(dropout=0.5), 0).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert packed_fault(model, torch.float32) is None
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_probe_holds_every_kind_of_segment() -> None:
    batch = probe_batch(50)
    lengths = [segment.length for segment in batch.segments]
    assert sum(lengths) == batch.num_tokens == len(batch.position_ids)
    assert sum(segment.prefix_length > 0 for segment in batch.segments) == 2
    assert batch.num_sequences == 4
    assert batch.input_ids.max() < 50
    # Each target stands right after its predictor in its own sequence.
    rows = scorer.sequence_rows(batch)
    for row, target, number in zip(
        batch.target_rows, batch.target_ids, batch.target_sequences, strict=True
    ):
        own = rows[number].tolist()
        assert batch.input_ids[own[own.index(row) + 1]] == target
    assert (probe_batch(50).input_ids == batch.input_ids).all()
