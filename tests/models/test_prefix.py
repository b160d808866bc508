"""A trained prefix: packed rows, padded rows and sampling against PEFT's own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from tiny import MODELS, save_tiny, tiny_model
from torch.nn.functional import log_softmax

from alignkit.errors import ModelError
from alignkit.generation.answers import generate_answers
from alignkit.generation.rollout import RolloutSettings, TransformersEngine
from alignkit.generation.sampling import SamplingSettings
from alignkit.models.adapters import prefix
from alignkit.models.adapters.attach import adapters_off, attach_adapter, trainable_report
from alignkit.models.adapters.files import load_adapter, put_weights, save_adapter
from alignkit.models.adapters.prefix import (
    STATES,
    require_kept_keys,
    start_prefix,
    start_words,
    text_states,
)
from alignkit.models.adapters.sizes import measure_model
from alignkit.models.adapters.tensors import read_weights
from alignkit.models.attention.packed import packed_attention
from alignkit.models.attention.prefix import prefix_length, prefix_states
from alignkit.models.attention.prefix_rows import longer_segments
from alignkit.models.base.loading import BaseModel
from alignkit.models.opening import open_model
from alignkit.models.scoring.padded import PaddedScorer
from alignkit.models.scoring.scorer import TokenScorer, sequence_rows
from alignkit.models.scoring.selfcheck import packed_fault, probe_batch
from alignkit.packed import Segment
from alignkit.recipe.adapters import LoraSpec, PrefixSpec

TOKENS = 5
SPEC = PrefixSpec(kind="prefix", tokens=TOKENS)
PROJECTED = PrefixSpec(kind="prefix", tokens=TOKENS, projection=True, projection_width=24)
VOCABULARY = 600


def prefixed(family: str = "llama", spec: PrefixSpec = SPEC, **overrides: Any) -> Any:
    return attach_adapter(tiny_model(family, **overrides), spec, 0)


def trained_weights(model: Any) -> list[torch.Tensor]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def by_peft(model: Any) -> torch.Tensor:
    """`[N]` log-probs of the probe's targets: one row at a time through PEFT's own forward."""
    batch, found = probe_batch(VOCABULARY), []
    rows = sequence_rows(batch)
    for row, sequence in zip(batch.target_rows, batch.target_sequences, strict=True):
        ids = torch.from_numpy(batch.input_ids[rows[sequence]])[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        found.append(log_softmax(logits[batch.position_ids[row]].float(), -1))
    return torch.stack(found).gather(1, torch.from_numpy(batch.target_ids)[:, None])[:, 0]


# Mistral, Gemma 2 and Gemma 3 see 8 tokens back; Gemma 2 caps scores.
@pytest.mark.parametrize("spec", [SPEC, PROJECTED], ids=["raw", "projection"])
@pytest.mark.parametrize("family", MODELS)
def test_packed_rows_agree_with_peft(family: str, spec: PrefixSpec) -> None:
    model = prefixed(family, spec)
    weights = trained_weights(model)
    expected = by_peft(model)
    wanted = torch.autograd.grad(expected.sum(), weights)
    for scorer in (TokenScorer, PaddedScorer):
        found = scorer(model, torch.float32)(probe_batch(VOCABULARY)).logprobs
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-5)
        for mine, theirs in zip(torch.autograd.grad(found.sum(), weights), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
    assert all(float(gradient.abs().max()) > 0.05 for gradient in wanted)
    assert packed_fault(model, torch.float32) is None


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"softcap": 2.0}])
def test_attention_over_a_prefix_in_float64(options: dict[str, Any]) -> None:
    """softmax over prefix, prompt and own keys, spelt out for each token."""
    segments = (Segment(0, 3), Segment(3, 4), Segment(7, 2, 3, 4), Segment(9, 5, 3, 4))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 14, 8, generator=generator).double() for n in (4, 2, 2))
    states = torch.randn(3, 2, 2, 2, 8, generator=generator).double().requires_grad_()
    layer = torch.nn.Identity()
    layer.layer_idx = 1
    found, _ = packed_attention(
        layer, q, k, v, None, segments=segments, prefix_states=states, **options
    )
    keys, values = states[1]
    expected = torch.zeros_like(found)
    for segment in segments:
        before = list(range(segment.prefix_start, segment.prefix_start + segment.prefix_length))
        for own in range(segment.start, segment.start + segment.length):
            seen = [*before, *range(segment.start, own + 1)]
            for head in range(4):
                ks = torch.cat([keys[head // 2], k[0, head // 2, seen]])
                vs = torch.cat([values[head // 2], v[0, head // 2, seen]])
                scores = ks @ q[0, head, own] / 8**0.5
                if "softcap" in options:
                    scores = 2.0 * torch.tanh(scores / 2.0)
                last = -options.get("sliding_window", 99)
                expected[0, own, head] = torch.softmax(scores[last:], -1) @ vs[last:]
    close = 1e-6 if "softcap" in options else 1e-12  # capped weights are float32
    torch.testing.assert_close(found, expected, rtol=0.0, atol=close)
    mine, theirs = (torch.autograd.grad(x.square().sum(), states)[0] for x in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=0.0, atol=10 * close)
    assert not mine[0].any()
    assert not mine[2].any()


def test_segments_with_room() -> None:
    segments = (Segment(0, 3), Segment(3, 4), Segment(7, 2, 3, 4), Segment(9, 5, 3, 4))
    assert longer_segments(segments, 2) == (
        Segment(0, 5),
        Segment(5, 6),
        Segment(11, 2, 5, 6),
        Segment(13, 5, 5, 6),
    )


def test_without_a_prefix_attention_is_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.models.attention.packed.put_before", None)
    monkeypatch.setattr("alignkit.models.attention.packed.longer_segments", None)
    model = attach_adapter(tiny_model(), LoraSpec(rank=2), 0)
    assert prefix_states(model) is None
    assert prefix_length(model) == 0
    TokenScorer(model, torch.float32)(probe_batch(VOCABULARY))


@pytest.mark.parametrize("scorer", [TokenScorer, PaddedScorer])
def test_off_is_the_base_bit_for_bit(scorer: Any) -> None:
    batch = probe_batch(VOCABULARY)
    model = prefixed()
    with adapters_off(model):
        assert prefix_states(model) is None
        assert prefix_length(model) == 0
        off = scorer(model, torch.float32)(batch).logprobs
    on = scorer(model, torch.float32)(batch).logprobs
    base = scorer(tiny_model(), torch.float32)(batch).logprobs
    assert torch.equal(off, base)
    assert float((on - base).detach().abs().max()) > 0.5


@pytest.mark.parametrize("spec", [SPEC, PROJECTED], ids=["raw", "projection"])
def test_the_file_is_pefts_and_gives_the_same(spec: PrefixSpec, tmp_path: Path) -> None:
    model = prefixed(spec=spec).eval()
    save_adapter(model, tmp_path, "somewhere")
    assert {n: w.shape for n, w in read_weights(tmp_path).items()} == {
        "prompt_embeddings": (TOKENS, 2 * 2 * 2 * 16)
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["prefix_projection"] is False  # the network is not in the file
    ids = torch.arange(5, 65).view(3, 20)
    read = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for found in (read, load_adapter(tiny_model(), tmp_path)):
            torch.testing.assert_close(found(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    assert float((tiny_model()(input_ids=ids).logits - expected).abs().max()) > 0.1


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stored, **fields}), encoding="utf-8")


def test_a_prefix_without_a_task_is_read_all_the_same(tmp_path: Path) -> None:
    """PEFT leaves it out of the forward pass of a model that has no task."""
    model = prefixed().eval()
    save_adapter(model, tmp_path, "somewhere")
    change_config(tmp_path, task_type=None)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = load_adapter(tiny_model(), tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_virtual_tokens": 0},
        {"num_virtual_tokens": None},
        {"num_virtual_tokens": "5"},
        {"num_transformer_submodules": 2},
    ],
)
def test_a_stored_prefix_of_another_kind(fields: dict[str, Any], tmp_path: Path) -> None:
    save_adapter(prefixed(), tmp_path, "somewhere")
    change_config(tmp_path, **fields)
    with pytest.raises(ModelError, match="is not a prefix of a causal model"):
        load_adapter(tiny_model(), tmp_path)


def test_a_stored_prefix_may_be_longer_than_recipes_allow(tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4100)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    assert prefix_length(load_adapter(tiny_model(), tmp_path)) == 4100


KEEPS_OTHERWISE = {
    "one key head": (
        transformers.FalconConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True
        ),
        "has 1 key heads of 8 numbers",
    ),
    "nothing": (transformers.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4), "keys of 0 layers"),
}


@pytest.mark.parametrize("kind", KEEPS_OTHERWISE)
def test_a_base_that_keeps_other_keys_than_it_says(kind: str) -> None:
    config, sentence = KEEPS_OTHERWISE[kind]
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=f"of one shape in every layer.*{sentence}"):
        require_kept_keys(model)


@pytest.mark.parametrize("family", MODELS)
def test_families_keep_what_they_say(family: str) -> None:
    model = tiny_model(family)
    require_kept_keys(model)
    ids = torch.arange(20, 20 + TOKENS)[None]
    kept = model(ids, use_cache=True).past_key_values.layers
    states = prefix_states(attach_adapter(model, SPEC, 0))
    assert states is not None
    assert len(states) == len(kept)
    for layer, stated in zip(kept, states, strict=True):
        assert layer.keys[0].shape == stated[0].shape


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_that_peft_wrote(projection: bool, tmp_path: Path) -> None:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        prefix_projection=projection,
        encoder_hidden_size=24,
    )
    model = get_peft_model(tiny_model(), config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path)
    states = prefix_states(loaded)
    assert states is not None
    assert states.shape == (2, 2, 2, 4, 16)
    with torch.no_grad():
        found = TokenScorer(loaded, torch.float32)(probe_batch(VOCABULARY)).logprobs
        torch.testing.assert_close(found, by_peft(model), rtol=0.0, atol=2e-5)


def test_stored_weights_are_put_back_or_refused(tmp_path: Path) -> None:
    model = prefixed()
    save_adapter(model, tmp_path / "five", "somewhere")
    other = attach_adapter(tiny_model(), SPEC, 7)
    put_weights(other, tmp_path / "five")
    assert torch.equal(prefix_states(other), prefix_states(model))
    four = prefixed(spec=PrefixSpec(kind="prefix", tokens=4))
    with pytest.raises(ModelError, match="does not fit the base"):
        put_weights(four, tmp_path / "five")
    with pytest.raises(ModelError, match="does not fit the base"):
        put_weights(attach_adapter(tiny_model(), LoraSpec(rank=2), 0), tmp_path / "five")
    with pytest.raises(ModelError, match="it has 2 layers, and the base has 3"):
        load_adapter(tiny_model(num_hidden_layers=3), tmp_path / "five")
    with pytest.raises(ModelError, match="it has 2 key heads, and the base has 1"):
        load_adapter(tiny_model(num_key_value_heads=1), tmp_path / "five")


@pytest.mark.parametrize("spec", [SPEC, PROJECTED], ids=["raw", "projection"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_plan_counts_what_is_trained(family: str, spec: PrefixSpec) -> None:
    model = tiny_model(family)
    facts = measure_model(model.config, spec)
    report = trainable_report(attach_adapter(model, spec, 0))
    assert facts.trainable == report.trainable
    assert facts.prefix == TOKENS
    layers = 4 if family == "gemma3" else 2
    name = "prefix through a network" if spec.projection else "prefix"
    assert report.modules == {(name, TOKENS, layers * 2 * 2 * 16): 1}
    if not spec.projection:
        assert report.trainable == TOKENS * layers * 2 * 2 * 16


def test_it_starts_as_the_text_it_is_given(tmp_path: Path) -> None:
    # Where rows stand behind the text itself, the model gives them the same log-probs.
    model, words = prefixed(), [11, 12, 13, 14, 15]
    start_prefix(model, {STATES: text_states(tiny_model(), words)}.__getitem__)
    ids = torch.arange(40, 60)[None]
    whole = torch.cat([torch.tensor([words]), ids], dim=1)
    with torch.no_grad():
        expected = tiny_model()(input_ids=whole).logits[:, TOKENS:]
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_it_starts_as_a_text_longer_than_the_window(family: str) -> None:
    spec = PrefixSpec(kind="prefix", tokens=12)
    model, words = prefixed(family, spec), list(range(11, 23))
    start_prefix(model, {STATES: text_states(tiny_model(family), words)}.__getitem__)
    ids = torch.arange(40, 60)[None]
    whole = torch.cat([torch.tensor([words]), ids], dim=1)
    with torch.no_grad():
        expected = tiny_model(family)(input_ids=whole).logits[:, 12:]
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_words_of_a_start(tiny_base: Path) -> None:
    base = BaseModel(str(tiny_base))
    tokenizer = open_model(str(tiny_base), dtype=torch.float32).tokenizer
    said: list[str] = []
    for text, tokens in (("the cat sat on a mat", 3), ("the cat", 40)):
        spec = PrefixSpec(kind="prefix", tokens=tokens, text=text)
        words = start_words(spec, base, said.append)
        once = tokenizer(text)["input_ids"]
        assert len(words) == tokens
        assert words[: len(once)] == once[:tokens]
    whole = len(tokenizer("the cat sat on a mat")["input_ids"])
    assert said == [f"the prefix starts from the first 3 of {whole} tokens of adapter.text"]
    assert len(start_words(PrefixSpec(kind="prefix", tokens=100), base, print)) == 100
    assert start_words(PROJECTED, base, print) == []
    assert start_words(LoraSpec(), base, print) == []


def test_a_text_without_tokens(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "load_tokenizer", lambda base: lambda *a, **k: {"input_ids": []})
    with pytest.raises(ModelError, match=r"turns adapter\.text = .* into no tokens"):
        start_words(PrefixSpec(kind="prefix", text="the cat"), BaseModel(str(tiny_base)), print)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3"])
def test_sampling_sees_the_prefix(family: str, tmp_path: Path) -> None:
    """Prompts of two lengths, so that one is padded where that changes nothing."""
    model = prefixed(family).eval()
    prompts, new = [list(range(20, 29)), list(range(40, 46)), list(range(60, 69))], 6
    expected = [greedy(model, prompt, new) for prompt in prompts]
    settings = RolloutSettings(new, 0.01, frozenset())
    states = prefix_states(model)
    assert states is not None
    engine = TransformersEngine(
        model.get_base_model(), torch.float32, settings, prefix=states.detach()
    )
    arrays = [np.asarray(prompt) for prompt in prompts]
    found = [c.ids.tolist() for c in engine.generate(arrays, [[1], [2], [3]])]
    assert found == expected
    without = TransformersEngine(model.get_base_model(), torch.float32, settings)
    assert [c.ids.tolist() for c in without.generate(arrays, [[1], [2], [3]])] != expected
    assert [len(b) for b in engine._batches([9, 9, 6])] == ([3] if family == "llama" else [2, 1])


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    """Continued one token at a time, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_answers_see_the_prefix(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family)
    model = prefixed(family).eval()
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    opened = open_model(str(tmp_path / "adapter"), dtype=torch.float32)
    opened.tokenizer.chat_template = None
    opened.model.generation_config.eos_token_id = None
    texts = ["the cat sat on a mat and saw many red birds", "the cat"]
    settings = SamplingSettings(max_new_tokens=5, temperature=0.0)
    found = generate_answers(opened, [[{"role": "user", "content": t}] for t in texts], settings)
    for text, answer in zip(texts, found, strict=True):
        ids = opened.tokenizer(text)["input_ids"]
        expected = opened.tokenizer.decode(greedy(model, ids, 5), skip_special_tokens=True)
        assert answer == expected.strip()


def test_rows_and_prefix_must_fit_the_context(tiny_base: Path) -> None:
    context = tiny_model().config.max_position_embeddings
    with pytest.raises(ModelError, match=f"adapter.tokens = {context} leaves no room"):
        prefixed(spec=PrefixSpec(kind="prefix", tokens=context))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"kv_lora_rank": 8}, "compressed keys"),
        ({"num_kv_shared_layers": 1}, "layers that share their keys"),
        ({"global_head_dim": 32}, "head dimensions that differ"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of linear_attention"),
    ],
)
def test_layers_that_a_prefix_does_not_fit(values: dict[str, Any], what: str) -> None:
    model = tiny_model()
    for name, value in values.items():
        setattr(model.config, name, value)
    with pytest.raises(
        ModelError, match=f"one shape in every layer, but a 'llama' model has {what}"
    ):
        attach_adapter(model, SPEC, 0)


def test_checkpointing_is_exact_packed_and_refused_padded() -> None:
    model = prefixed()
    weights = trained_weights(model)
    batch = probe_batch(VOCABULARY)
    wanted = torch.autograd.grad(TokenScorer(model, torch.float32)(batch).logprobs.sum(), weights)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    again = torch.autograd.grad(TokenScorer(model, torch.float32)(batch).logprobs.sum(), weights)
    for mine, theirs in zip(again, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    with pytest.raises(ModelError, match="does not work with gradient checkpointing"):
        PaddedScorer(model, torch.float32)(batch)
