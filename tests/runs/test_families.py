"""Whole runs of families with LayerNorms, transposed layers (GPT-2) and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from running import adapter_of, losses, make_preference_recipe, make_recipe, train
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from alignkit.errors import ModelError

pytestmark = pytest.mark.slow

IDS = torch.arange(20, 80)[None]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPTNeoX": {**SIZES, "intermediate_size": 64, "max_position_embeddings": 512},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "Falcon": SIZES,  # its attention cannot be packed
    # experts, which PEFT adapts as parameters
    "Mixtral": {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4},
    "Qwen3Moe": {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def make_base(folder: Path, family: str) -> Path:
    tokenizer = tiny_tokenizer()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **FAMILIES[family]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "stage"),
    [*((family, "sft") for family in FAMILIES), ("GPT2", "dpo"), ("Mixtral", "dpo")],
)
def test_lora_in_bfloat16_ends_in_a_merged_model(family: str, stage: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    fields: dict[str, Any] = {
        "model__dtype": "bfloat16",
        "training__max_steps": 4,
        "training__learning_rate": 1e-2,
        "merge": True,
        "adapter": {"kind": "lora", "rank": 4},
    }
    if stage == "sft":
        train(make_recipe(tmp_path, base, **fields))
        assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    else:
        train(make_preference_recipe(tmp_path, base, stage, **fields))
    run = tmp_path / "run"
    planned = json.loads((run / "plan.json").read_text(encoding="utf-8"))["model"]["trainable"]
    assert planned == sum(weight.numel() for weight in adapter_of(run).values())
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        before, found = plain(IDS).logits, merged(IDS).logits
        expected = PeftModel.from_pretrained(plain, str(run / "adapter")).eval()(IDS).logits
    assert (found - expected).abs().max() < 0.02 * (expected - before).abs().max()


def test_tokens_are_added_where_files_name_the_head_otherwise(tmp_path: Path) -> None:
    """Files of GPT-NeoX call the head `embed_out`, transformers calls it `lm_head`."""
    base = make_base(tmp_path / "base", "GPTNeoX")
    rows, _ = load_file(base / "model.safetensors")["embed_out.weight"].shape
    train(make_recipe(tmp_path, base, model__add_tokens=["<tool>"], merge=True))
    merged = load_file(tmp_path / "run/merged/model.safetensors")
    assert merged["embed_out.weight"].shape == (rows + 1, 32)


@pytest.mark.parametrize("projection", [False, True])
def test_no_prefix_over_a_base_that_keeps_one_key_head(projection: bool, tmp_path: Path) -> None:
    """Its configuration says four."""
    base = make_base(tmp_path / "base", "Falcon")
    adapter = {"kind": "prefix", "tokens": 4, "projection": projection}
    with pytest.raises(ModelError, match="a 'falcon' model has 1 key heads of 8 numbers"):
        train(make_recipe(tmp_path, base, adapter=adapter))
