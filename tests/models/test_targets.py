"""What an adapter changes and what stays frozen: ranks, patterns, names that mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from alignkit.errors import ModelError
from alignkit.models.adapters import patterns
from alignkit.models.adapters.attach import attach_adapter, trainable_report
from alignkit.models.adapters.files import load_adapter, save_adapter
from alignkit.models.adapters.sizes import measure_model
from alignkit.models.adapters.targets import adapted_layers, layer_ranks
from alignkit.recipe.adapters import FullSpec, Ia3Spec, LoraSpec

QUESTION = torch.arange(12)[None]


def layers_of(model: Any) -> dict[str, LoraLayer]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def test_ranks_are_those_that_peft_gives() -> None:
    pattern = {r"layers\.1\..*": 7, "q_proj": 2, "mlp.up_proj": 9, "(k|v)_proj": 3}
    spec = LoraSpec(rank=4, rank_pattern=pattern)
    model = tiny_model()
    names = adapted_layers(model, spec)
    ranks = layer_ranks(names, spec)
    layers = layers_of(attach_adapter(model, spec, 0))
    assert ranks == {name: layer.r["default"] for name, layer in layers.items()}
    assert sorted(set(ranks.values())) == [2, 3, 4, 7, 9]
    # The first pattern that fits counts, in the order of the recipe.
    assert ranks["model.layers.1.self_attn.q_proj"] == 7
    assert ranks["model.layers.0.self_attn.q_proj"] == 2


def test_scales() -> None:
    spec = LoraSpec(rank=4, alpha=8.0, alpha_pattern={"v_proj": 2.0}, rank_pattern={"k_proj": 16})
    for rslora in (False, True):
        layers = layers_of(
            attach_adapter(tiny_model(), spec.model_copy(update={"rslora": rslora}), 0)
        )
        for name, layer in layers.items():
            alpha = 2.0 if name.endswith("v_proj") else 8.0
            rank = 16 if name.endswith("k_proj") else 4
            assert layer.scaling["default"] == alpha / (rank**0.5 if rslora else rank)


@pytest.mark.parametrize(
    ("spec", "sentence", "hint"),
    [
        (
            LoraSpec(rank=33),
            "adapter.rank = 33 is more than model.layers.0.self_attn.k_proj can hold: 64 × 32",
            "at most 32 there: adapter.rank_pattern={k_proj: 32}",
        ),
        (
            LoraSpec(rank_pattern={"v_proj": 40}),
            "adapter.rank = 40 is more than model.layers.0.self_attn.v_proj can hold: 64 × 32",
            "at most 32",
        ),
        (
            LoraSpec(rank_pattern={"q_prj": 4}),
            "adapter.rank_pattern matches no adapted layer: 'q_prj'",
            "did you mean q_proj, ",
        ),
        (
            LoraSpec(targets=("q_proj",), alpha_pattern={"v_proj": 4.0}),
            "adapter.alpha_pattern matches no adapted layer: 'v_proj'",
            "this model has q_proj",
        ),
        (
            LoraSpec(rank_pattern={"(": 4}),
            "adapter.rank_pattern is not a regular expression: ",
            "use module names",
        ),
        (
            Ia3Spec(kind="ia3", targets=("k_prj",), feedforward=()),
            "adapter.targets matches no linear layer: 'k_prj'",
            "did you mean k_proj, ",
        ),
        (
            Ia3Spec(kind="ia3", targets=("k_proj",), feedforward=("down_proj",)),
            "adapter.feedforward names 'down_proj', which is not among adapter.targets",
            "targets: k_proj",
        ),
        (
            FullSpec(kind="full", freeze=("model.embed_token",)),
            "adapter.freeze matches no weight: 'model.embed_token'",
            "did you mean model.embed_tokens",
        ),
        (
            FullSpec(kind="full", freeze=(".*",)),
            "adapter.freeze leaves nothing to train",
            "name fewer modules",
        ),
        (
            LoraSpec(targets=r"(\w|\w\w|[a-z_.0-9])*\.zz"),
            "adapter.targets: a pattern takes more than 1 s to match",
            "name the modules in a list",
        ),
    ],
    ids=[
        *("rank", "rank of a pattern", "rank_pattern", "alpha_pattern", "expression"),
        *("ia3 target", "ia3 feed-forward", "freeze", "everything frozen", "endless"),
    ],
)
def test_what_means_nothing(
    spec: Any, sentence: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    for use in (
        lambda: attach_adapter(tiny_model(), spec, 0),
        lambda: measure_model(tiny_model().config, spec),
    ):
        with pytest.raises(ModelError) as raised:
            use()
        assert raised.value.message.startswith(sentence)
        assert hint in raised.value.hint


def test_a_family_that_ia3_does_not_know() -> None:
    model = tiny_model()
    model.config.model_type = "novel"
    with pytest.raises(ModelError, match="not know what to scale in a 'novel' model") as raised:
        attach_adapter(model, Ia3Spec(kind="ia3"), 0)
    assert "this model has q_proj, k_proj" in raised.value.hint


def test_ia3_starts_as_the_base_and_scales_what_it_says() -> None:
    base = tiny_model()
    with torch.no_grad():
        expected = base(QUESTION).logits
    model = attach_adapter(tiny_model(), Ia3Spec(kind="ia3"), 0)
    with torch.no_grad():
        assert torch.equal(model(QUESTION).logits, expected)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"k_proj", "v_proj", "down_proj"}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    # (w ∘ l) x for keys and values, w (l ∘ x) for the feed-forward layer's input.
    torch.manual_seed(0)
    for weight in trained.values():
        weight.data = 0.5 + torch.rand_like(weight)
    for name, weight in trained.items():
        path = name.removeprefix("base_model.model.").rsplit(".", 2)[0]
        layer = base.get_submodule(path)
        scale = weight.flatten()
        layer.weight.data *= scale if path.endswith("down_proj") else scale[:, None]
    with torch.no_grad():
        found, scaled = model(QUESTION).logits, base(QUESTION).logits
    assert (scaled - expected).abs().max() > 0.1
    torch.testing.assert_close(found, scaled, rtol=1e-5, atol=1e-4)


def test_frozen_weights_stay() -> None:
    spec = FullSpec(kind="full", freeze=("model.layers.0", "lm_head", r".*norm\.weight"))
    model = attach_adapter(tiny_model(dtype=torch.bfloat16), spec, 0)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert frozen == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("model.layers.0.", "lm_head")) or "norm" in name
    }
    report = trainable_report(model)
    assert 0 < report.trainable < report.total
    assert report.line().endswith(": the rest")


def test_the_report_in_one_sentence() -> None:
    spec = LoraSpec(rank=2, targets=("q_proj", "v_proj"))
    report = trainable_report(attach_adapter(tiny_model(), spec, 0))
    # 2 layers of 2 (64 + 64) + 2 (64 + 32) weights.
    assert report.line() == (
        f"trains 896 weights ({896 / report.total:.2%}): 2×q_proj 64→64, 2×v_proj 64→32"
    )


def test_overlapping_patterns_mean_the_same_after_reading(tmp_path: Path) -> None:
    # The first that fits counts, and PEFT's files are sorted: "[" comes before "l".
    ranks = {r"layers\.0\.self_attn\.q_proj": 2, "[qv]_proj": 5}
    spec = LoraSpec(
        rank=4, rank_pattern=ranks, alpha_pattern={n: 8.0 * r for n, r in ranks.items()}
    )
    model = attach_adapter(tiny_model(), spec, 0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    save_adapter(model, tmp_path, "the/base")
    read = load_adapter(tiny_model(), tmp_path)
    ours, theirs = layers_of(model), layers_of(read)
    for name, layer in ours.items():
        assert theirs[name].scaling == layer.scaling
        assert theirs[name].r == layer.r
    assert ours["model.layers.0.self_attn.q_proj"].scaling["default"] == 8.0
    with torch.no_grad():
        torch.testing.assert_close(read(QUESTION).logits, model.eval()(QUESTION).logits)


def test_ia3_targets_by_more_of_their_name() -> None:
    spec = Ia3Spec(kind="ia3", targets=("self_attn.k_proj", "mlp.down_proj"))
    model = attach_adapter(tiny_model(), spec, 0)
    report = trainable_report(model)
    # 2 layers, 32 outputs of the keys and 96 inputs of the feed-forward layer's last module.
    assert report.trainable == measure_model(tiny_model().config, spec).trainable == 2 * (32 + 96)


def test_layers_that_are_no_linear_ones_are_reported() -> None:
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    report = trainable_report(attach_adapter(GPT2LMHeadModel(config), LoraSpec(rank=2), 0))
    assert report.modules[("c_attn", 8, 24)] == 1
