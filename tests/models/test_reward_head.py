"""The scalar head: how it is drawn, stored, read and counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import PAIRS, gradients, random_batch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import save_tiny, tiny_model, trained_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from alignkit.errors import ModelError
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.adapters.files import save_adapter
from alignkit.models.adapters.sizes import measure_model
from alignkit.models.rewards.head import (
    STATISTICS,
    RewardStatistics,
    freeze_unused_head,
    new_head,
    read_head,
    read_statistics,
)
from alignkit.models.scoring.scorer import TokenScorer, causal_model
from alignkit.recipe.adapters import FullSpec, LoraSpec

TIED = {"llama": False, "qwen2": False, "mistral": False, "gemma": True, "gemma3": True}
"""Family -> whether its vocabulary head is the input embedding."""


def test_the_seed_alone_draws_the_head() -> None:
    model = tiny_model()
    one = new_head(model, 1)
    torch.rand(5)  # what was drawn before does not matter, nor which weights it stands on
    two = new_head(trained_model("llama", "lora"), 1)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, new_head(model, 2).weight)
    assert one.weight.shape == (1, 64)
    assert one.weight.requires_grad
    assert one.bias is None


def test_a_head_is_float32_on_any_model() -> None:
    head = new_head(tiny_model(dtype=torch.bfloat16), 0)
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight, new_head(tiny_model(), 0).weight)


@pytest.mark.parametrize(("hidden", "seeds"), [(8, 3000), (64, 400)])
def test_the_head_has_the_stated_deviation(hidden: int, seeds: int) -> None:
    # 24,000 numbers from N(0, 1 / (H + 1)): their deviation is known to 1 / sqrt(2 · 24,000) =
    # 0.5 %, so 2 % is four times that; without the + 1 it would be off by 6 % for H = 8.
    model = tiny_model(hidden_size=hidden, num_attention_heads=2)
    drawn = torch.cat([new_head(model, seed).weight.detach()[0] for seed in range(seeds)])
    expected = (hidden + 1) ** -0.5
    assert float(drawn.std()) == pytest.approx(expected, rel=0.02)
    assert abs(float(drawn.mean())) < 4 * expected / len(drawn) ** 0.5


STATED = RewardStatistics(0.25, 1.5, 0.75, -0.25, 0.8125, 64, "held_out")


def test_statistics_are_read_as_they_were_saved(tmp_path: Path) -> None:
    assert read_statistics(tmp_path) is None
    STATED.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STATISTICS]
    assert read_statistics(tmp_path) == STATED


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"mean": "x"}, "mean cannot be 'x'"),
        ({"mean": 1e39}, "mean must be -1e[+]30 to 1e[+]30, got 1e[+]39"),
        ({"std": 1e-300}, "std must be 0 or 1e-30 to 1e[+]30, got 1e-300"),
        ({"std": -1.0}, "std must be 0 or 1e-30 to 1e[+]30, got -1.0"),
        ({"std": float("nan")}, "std must be 0 or 1e-30 to 1e[+]30, got nan"),
    ],
)
def test_statistics_that_are_none(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    dataclasses.replace(STATED, **values).save(tmp_path)
    with pytest.raises(ModelError, match=sentence):
        read_statistics(tmp_path)


def write_classifier(folder: Path, labels: int, **options: Any) -> nn.Linear:
    """A sequence classifier written by plain transformers, and its head."""
    config = tiny_model().config
    config.num_labels = labels
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.save_pretrained(folder, **options)
    return classifier.score


def write_peft(folder: Path, labels: int) -> nn.Linear:
    """An adapter of a sequence classifier written by plain PEFT, and its head."""
    config = tiny_model().config
    config.num_labels = labels
    classifier = AutoModelForSequenceClassification.from_config(config)
    spec = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = get_peft_model(classifier, spec)
    head = model.base_model.model.score.modules_to_save["default"]
    torch.manual_seed(0)
    nn.init.normal_(head.weight)
    model.save_pretrained(folder)
    return head


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}], ids=["one file", "shards"])
def test_the_head_of_a_classifier_folder(options: dict[str, Any], tmp_path: Path) -> None:
    head = write_classifier(tmp_path, 1, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(options)
    found = read_head(tmp_path)
    assert torch.equal(found.weight, head.weight)
    assert found.weight.abs().max() > 0
    assert not found.weight.requires_grad


def test_a_narrow_head_is_read_as_float32(tmp_path: Path) -> None:
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"score.weight": weight}, tmp_path / "model.safetensors")
    found = read_head(tmp_path)
    assert found.weight.dtype == torch.float32
    assert torch.equal(found.weight, weight.float())


def test_the_head_of_an_adapter_folder(tmp_path: Path) -> None:
    model = trained_model("llama", "lora")
    head = new_head(model, 9)
    save_adapter(model, tmp_path / "ours", "the/base", head)
    assert torch.equal(read_head(tmp_path / "ours").weight, head.weight)
    theirs = write_peft(tmp_path / "theirs", 1)
    assert torch.equal(read_head(tmp_path / "theirs").weight, theirs.weight)


def test_folders_without_a_head(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_tiny(tmp_path / "language")
    save_adapter(trained_model("llama", "lora"), tmp_path / "adapter", "the/base")
    for name in ("empty", "language", "adapter"):
        with pytest.raises(ModelError) as raised:
            read_head(tmp_path / name)
        assert raised.value.message == (
            f"{tmp_path / name} is not a reward model: it holds no scalar head"
        )
        assert "adapter/ or its merged/" in raised.value.hint


@pytest.mark.parametrize("write", [write_classifier, write_peft])
def test_two_labels_are_no_reward(write: Any, tmp_path: Path) -> None:
    write(tmp_path, 2)
    with pytest.raises(ModelError) as raised:
        read_head(tmp_path)
    assert raised.value.message == (
        f"{tmp_path} is a classifier with 2 labels, but a reward model has one"
    )


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", TIED)
def test_only_an_unused_vocabulary_head_is_frozen(family: str) -> None:
    model = trained_model(family, "full")
    before = trained_names(model)
    freeze_unused_head(model)
    assert before - trained_names(model) == (set() if TIED[family] else {"lm_head.weight"})
    # What is still trained is just what a reward has a gradient in.
    scorer = TokenScorer(model, torch.float32, new_head(model, 0))
    rewards = scorer(random_batch(PAIRS, 600))
    found = gradients(scorer, rewards)
    assert all(value.abs().max() > 0 for value in found.values())
    assert found.keys() == trained_names(scorer)


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=4),
        LoraSpec(rank=2, targets=("q_proj", "v_proj")),
        LoraSpec(rank=2, targets=("q_proj", "lm_head")),
        FullSpec(kind="full"),
    ],
    ids=["all-linear", "names", "with vocabulary head", "full"],
)
@pytest.mark.parametrize("family", [*TIED, "llama tied"])
def test_the_plan_counts_what_a_reward_model_trains(family: str, spec: LoraSpec | FullSpec) -> None:
    name, _, tied = family.partition(" ")
    tied = bool(tied) or TIED[name]
    if tied and getattr(spec, "targets", ())[-1:] == ("lm_head",):
        pytest.skip("PEFT cannot adapt a head whose matrix is the embedding's")
    model = tiny_model(name, tie_word_embeddings=tied)
    facts = measure_model(model.config, spec, scalar_head=True)
    model = attach_adapter(model, spec, 0)
    head = new_head(model, 0)
    freeze_unused_head(model)
    trained = [p.numel() for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    assert facts.trainable == sum(trained)
    # In closed form: the head has 64 weights, and only it comes on top.
    without = measure_model(causal_model(model).config, spec).trainable
    if isinstance(spec, LoraSpec) and "lm_head" in spec.targets:
        assert facts.trainable == 2 * 2 * (128 + 0) + 64
    elif isinstance(spec, LoraSpec) or tied:
        assert facts.trainable == without + 64
    else:
        assert facts.trainable == without + 64 - 64 * model.config.vocab_size
