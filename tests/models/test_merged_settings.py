"""What is known of a merge before any weight is read: the very files that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_model
from transformers import AutoTokenizer

from alignkit.errors import ModelError
from alignkit.models.base.changes import BaseChanges
from alignkit.models.base.loading import BaseModel, load_tokenizer, stored_dtype
from alignkit.models.merging.merge import merge_adapter
from alignkit.models.merging.settings import write_merged_settings
from alignkit.recipe.rope import RopeSpec

IDS = [torch.arange(100, 140).numpy()]


def write_adapter(folder: Path, family: str, tie: bool, **options: Any) -> None:
    """An adapter of plain PEFT with every trained weight moved."""
    torch.manual_seed(1)
    fields = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(tiny_model(family, tie_word_embeddings=tie), LoraConfig(**fields))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder, save_embedding_layers=False)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gemma3", {}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama", {"trainable_token_indices": [3, 50]}),
    ],
    ids=["plain", "gemma3", "head", "embedding", "whole head", "whole ends", "tokens"],
)
def test_the_same_files_as_the_merge(
    family: str, options: dict[str, Any], tie: bool, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "base", family, tie_word_embeddings=tie)
    write_adapter(tmp_path / "adapter", family, tie, **options)
    require_same_files(BaseModel(str(tmp_path / "base")), tmp_path)


def test_a_base_that_was_changed(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    write_adapter(tmp_path / "adapter", "llama", False)
    changes = BaseChanges(RopeSpec(kind="linear", factor=2.0), ("<tool>",))
    require_same_files(BaseModel(str(tmp_path / "base"), changes=changes), tmp_path)


def require_same_files(base: BaseModel, folder: Path) -> None:
    tokenizer, adapter = load_tokenizer(base), folder / "adapter"
    write_merged_settings(base, adapter, folder / "settings", tokenizer)
    dtype = stored_dtype(base)
    merge_adapter(base, adapter, folder / "merged", rows=IDS, dtype=dtype, tokenizer=tokenizer)
    found = {path.name: path.read_bytes() for path in (folder / "settings").iterdir()}
    merged = {path.name: path.read_bytes() for path in (folder / "merged").iterdir()}
    weights = {"model.safetensors", "generation_config.json"}
    assert found == {name: content for name, content in merged.items() if name not in weights}
    assert found.keys() >= {"config.json", "tokenizer.json"}
    assert len(AutoTokenizer.from_pretrained(folder / "settings")) == len(tokenizer)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", tie_word_embeddings=True)
    write_adapter(tmp_path / "adapter", "llama", True)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("q_proj", "c_attn"), encoding="utf-8")
    base = BaseModel(str(tmp_path / "base"))
    with pytest.raises(ModelError, match="does not fit the base"):
        write_merged_settings(base, tmp_path / "adapter", tmp_path / "out", load_tokenizer(base))
    assert not (tmp_path / "out").exists()
