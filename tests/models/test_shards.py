"""Merging file by file: the same bits however the base is cut, and nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_merging import adapted, logits, merge, write_adapter
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from alignkit.errors import ModelError
from alignkit.models.base.loading import BaseModel
from alignkit.models.weights.shards import INDEX, HeldWeights, StoredWeights, open_weights
from alignkit.models.weights.streaming import build_without_weights, streaming


def cut(folder: Path, size: str = "60KB", family: str = "llama", **options: Any) -> Path:
    """A tiny base in several files."""
    tiny_model(family, **options).save_pretrained(folder, max_shard_size=size)
    tiny_tokenizer("chatml").save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: weight
        for path in folder.glob("*.safetensors")
        for name, weight in load_file(path).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cut_does_not_matter(dtype: torch.dtype, tmp_path: Path) -> None:
    base, whole = cut(tmp_path / "cut", dtype=dtype), tmp_path / "whole"
    save_tiny(whole, dtype=dtype)
    adapter = write_adapter(tmp_path / "adapter", size=0.02)
    reports = [
        merge(folder, adapter, tmp_path / f"out-{folder.name}", dtype=dtype)
        for folder in (base, whole)
    ]
    names = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(p.name for p in (tmp_path / "out-cut").glob("*.safetensors")) == names
    ours, other = weights_of(tmp_path / "out-cut"), weights_of(tmp_path / "out-whole")
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    assert reports[0].survived == pytest.approx(reports[1].survived, rel=1e-9)
    assert reports[0].mean_kl == pytest.approx(reports[1].mean_kl, rel=1e-6, abs=1e-9)
    index = json.loads((tmp_path / "out-cut" / INDEX).read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == set(names)
    bytes_ = sum(w.numel() * w.element_size() for w in ours.values())
    assert index["metadata"]["total_size"] == bytes_
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out-cut", dtype=torch.float32)
    exact = logits(adapted(base, adapter))
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), exact, rtol=1e-5, atol=3e-4)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    base = cut(tmp_path / "cut")
    adapter = write_adapter(tmp_path / "adapter")
    sorted(base.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match="could not be read"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_streaming_is_the_model(tmp_path: Path) -> None:
    for family in ("llama", "gemma2", "qwen2"):
        save_tiny(tmp_path / family, family)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32)
        empty = build_without_weights(AutoModelForCausalLM, model.config)
        ids = torch.arange(100, 130)[None]
        with torch.no_grad():
            exact = model(ids).logits
            assert empty(ids).logits.isnan().all()  # nothing computes without its weights
            stored = open_weights(BaseModel(str(tmp_path / family)), empty)
            with streaming(empty, stored.__getitem__):
                assert torch.equal(empty(ids).logits, exact)
            assert empty(ids).logits.isnan().all()  # and nothing is kept


def test_one_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    base = cut(tmp_path / "cut")
    empty = build_without_weights(AutoModelForCausalLM, tiny_model().config)
    stored, most = StoredWeights(base), 0

    def held(name: str) -> torch.Tensor:
        nonlocal most
        real = [n for n, w in empty.named_parameters() if any(w.stride())]
        most = max(most, len({".".join(n.split(".")[:3]) for n in real}))
        return stored[name]

    with streaming(empty, held):
        empty(torch.arange(5)[None])
    assert most == 1


def mixture() -> Any:
    """A mixture of experts: transformers renames and joins what its files hold."""
    config = transformers.MixtralConfig(
        vocab_size=len(tiny_tokenizer("chatml")),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_files_that_name_weights_otherwise(tmp_path: Path) -> None:
    base = tmp_path / "base"
    mixture().save_pretrained(base)
    tiny_tokenizer("chatml").save_pretrained(base)
    empty = build_without_weights(AutoModelForCausalLM, mixture().config)
    assert isinstance(open_weights(BaseModel(str(base)), empty), HeldWeights)
    model = get_peft_model(mixture(), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.5 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert report.modules == 4
    before, after = weights_of(base), weights_of(tmp_path / "merged")
    assert before.keys() == after.keys()  # as other programs expect them
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{n}.self_attn.{which}_proj.weight" for n in (0, 1) for which in "qo"
    }
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    exact = logits(adapted(base, tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged), exact, rtol=1e-5, atol=1e-4)


def test_an_adapter_on_a_shared_head_unties_it(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", tie_word_embeddings=True)
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_model(tie_word_embeddings=True), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert report.mean_kl < 1e-6 < report.mean_kl_to_base
    config = json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    before, after = weights_of(tmp_path / "base"), weights_of(tmp_path / "merged")
    assert "lm_head.weight" not in before
    embedding = "model.embed_tokens.weight"
    assert torch.equal(before[embedding], after[embedding])
    assert not torch.equal(after["lm_head.weight"], after[embedding])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    exact = logits(adapted(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged), exact, rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, 2),
        ({"modules_to_save": ["norm"]}, 5),  # PEFT takes every name that ends so
        ({"trainable_token_indices": [3, 50]}, 1),
    ],
    ids=["embeddings", "norm", "tokens"],
)
def test_weights_trained_as_a_whole(options: dict[str, Any], whole: int, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], **options))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    exact = logits(model.eval())
    torch.testing.assert_close(logits(merged), exact, rtol=1e-5, atol=3e-4)
    assert report.mean_kl < 1e-6 < report.mean_kl_to_base
    before, after = weights_of(tmp_path / "base"), weights_of(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert len(changed) == 2 + whole


def test_repeating_gives_the_same_bytes(tmp_path: Path) -> None:
    base = cut(tmp_path / "cut", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", size=0.02)
    for name in ("one", "two"):
        merge(base, adapter, tmp_path / name, dtype=torch.bfloat16)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
