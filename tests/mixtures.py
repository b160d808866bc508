"""Tiny mixtures of experts of several families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import tiny_tokenizer

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {**_EXPERTS, "head_dim": 8},
    "Qwen2Moe": {**_EXPERTS, "shared_expert_intermediate_size": 24},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},  # its stacks are transposed
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    # One dense layer before one with experts.
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


def mixture(family: str) -> Any:
    """A random causal model of two layers, hidden size 32, in evaluation mode.

    Args:
        family: one whose experts are stacked.
    """
    tokenizer = tiny_tokenizer("chatml")
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = getattr(transformers, f"{family}Config")(**{**common, **_FAMILIES[family]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def save_mixture(folder: Path, family: str) -> Path:
    """The same as an ordinary model folder, with a tokenizer."""
    mixture(family).save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)
    return folder
