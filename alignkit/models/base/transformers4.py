"""What transformers 4 reads in a model folder, beside what transformers 5 writes there.

4.57 takes positions from `rope_theta` and `rope_scaling`, without them it computes with its own
defaults and says nothing; and it does not know the names that 5 gives to plain tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAME_LOGITS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2")
"""Kinds of models for which a test found the same logits with 4.57."""

_LAYER_KINDS = {"full_attention", "sliding_attention"}


def add_older_names(folder: Path) -> None:
    """Add the names of transformers 4 to configuration and tokenizer; 5 reads the same as before.

    Args:
        folder: just written by `save_pretrained`; either file may be absent.
    """
    _rewrite(folder / "config.json", _with_older_positions)
    _rewrite(folder / "tokenizer_config.json", _with_older_tokenizer)


def reader_line(model_type: str) -> str:
    """Which transformers reads a written model, for its card."""
    if model_type in SAME_LOGITS:
        eager = " under `attn_implementation='eager'`" if model_type == "gemma2" else ""
        return f"Written by transformers 5; 4.57 reads it with the same logits{eager}."
    return f"Read it with transformers 5: {model_type} models were not compared with 4.57."


def _rewrite(path: Path, change: Any) -> None:
    if path.is_file():
        values = change(json.loads(path.read_text(encoding="utf-8")))
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _with_older_positions(values: dict[str, Any]) -> dict[str, Any]:
    if isinstance(values.get("text_config"), dict):
        values = values | {"text_config": _with_older_positions(values["text_config"])}
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return values
    if rope.keys() == _LAYER_KINDS:  # Gemma 3: only layers of full attention are ever scaled
        local = rope["sliding_attention"]
        rope = rope["full_attention"]
        if local.get("rope_type", "default") != "default" or "rope_theta" not in local:
            return values
        values = values | {"rope_local_base_freq": local["rope_theta"]}
    if "rope_theta" not in rope:
        return values
    scaled = rope.get("rope_type", "default") != "default"
    apart = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    rest = {key: value for key, value in rope.items() if key not in apart}
    return values | apart | {"rope_scaling": rest if scaled else None}


def _with_older_tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    if values.get("tokenizer_class") == "TokenizersBackend":
        values = values | {"tokenizer_class": "PreTrainedTokenizerFast"}
    extra = values.get("extra_special_tokens")
    if isinstance(extra, list):  # a dictionary in 4, which has another key for the list
        values = {k: v for k, v in values.items() if k != "extra_special_tokens"}
        values["additional_special_tokens"] = extra
    return values
