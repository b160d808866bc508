"""A trained prefix: keys and values in each layer that come before every row's own.

Li & Liang (https://arxiv.org/abs/2101.00190), in PEFT's files. PEFT gives the prefix to the model
as a cache of earlier tokens: position embedding is not applied to it, and the row's own positions
start after it. Packed rows have no cache, so there it travels with the segments and attention
puts it before each document; padded rows and sampling use the cache.

Shapes: `L` layers, `K` key heads, `P` tokens of the prefix, `D` head dimension, `B` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig
from peft.tuners import PrefixEncoder
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.attention.prefix import SLIDING
from alignkit.models.base.loading import BaseModel, load_tokenizer
from alignkit.recipe.adapters import AnySpec, PrefixSpec, continues

_PLAIN = {"full_attention", SLIDING}
"""Kinds of layers whose attention reads keys that come before a row's own."""


STATES = "prompt_embeddings"
"""PEFT's name of a prefix in its file."""

_TEXT = "Read the request with care, and give an answer that is true, helpful and clear."


def prefix_config(
    model: PreTrainedModel, spec: PrefixSpec, task: str = "CAUSAL_LM"
) -> PrefixTuningConfig:
    """PEFT's configuration of a prefix.

    Args:
        model: with or without storage.
        spec: of the recipe.
        task: PEFT's name for the model's task.

    Raises:
        ModelError: the model's layers do not all keep keys and values of one shape, or the prefix
            takes its whole context.
    """
    text = model.config.get_text_config()
    sizes: dict[str, Any] = {**_key_sizes(model)}
    context = int(getattr(text, "max_position_embeddings", 0) or 0)
    if context and spec.tokens >= context:
        raise ModelError(
            f"adapter.tokens = {spec.tokens} leaves no room in the model's context of {context} "
            "tokens",
            hint="lower adapter.tokens: 20 is usual, a few hundred the most",
        )
    return PrefixTuningConfig(
        **sizes,
        num_virtual_tokens=spec.tokens,
        num_transformer_submodules=1,
        prefix_projection=spec.projection,
        encoder_hidden_size=spec.projection_width if spec.projection else None,  # type: ignore[arg-type]
        task_type=task,
    )


def _key_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Layers, key heads and width of a token's keys, under PEFT's names."""
    text = model.config.get_text_config()
    odd = _unlike_layers(text)
    if odd:
        raise _no_prefix(model, odd)
    query_heads = int(text.num_attention_heads)
    heads = int(getattr(text, "num_key_value_heads", None) or query_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // query_heads)
    layers = int(text.num_hidden_layers)
    return {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * width}


def _no_prefix(model: PreTrainedModel, odd: str) -> ModelError:
    return ModelError(
        "adapter.kind = prefix needs keys and values of one shape in every layer, but a "
        f"{model.config.get_text_config().model_type!r} model has {odd}",
        hint="use adapter.kind=lora",
    )


@torch.no_grad()
def require_kept_keys(model: PreTrainedModel) -> None:
    """Refuse a base that caches other keys than its configuration says.

    Args:
        model: the bare base.

    Raises:
        ModelError: the cache has another shape.
    """
    sizes, cache = _key_sizes(model), DynamicCache()
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.get_input_embeddings().weight.device)
    model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
    heads = sizes["num_attention_heads"]
    wanted = torch.Size((1, heads, 2, sizes["token_dim"] // heads))
    if len(cache.layers) != sizes["num_layers"]:
        raise _no_prefix(model, f"keys of {len(cache.layers)} layers")
    for layer in cache.layers:
        if {layer.keys.shape, layer.values.shape} != {wanted}:
            raise _no_prefix(
                model, f"{layer.keys.shape[1]} key heads of {layer.keys.shape[3]} numbers"
            )


def require_fitting_prefix(config: PreTrainedConfig, model: PreTrainedModel, folder: Path) -> None:
    """Refuse a stored prefix for other layers than the base's: PEFT leaves the rest without one.

    Args:
        config: of the stored adapter; one of another kind passes.
        model: the base.
        folder: of the adapter, for the message.

    Raises:
        ModelError: it is not a prefix of tokens, or the number of layers, of key heads or their
            width differs.
    """
    if not isinstance(config, PrefixTuningConfig):
        return
    tokens, modules = config.num_virtual_tokens, config.num_transformer_submodules
    if not isinstance(tokens, int) or tokens < 1 or modules not in (1, None):
        raise ModelError(
            f"the adapter in {folder} is not a prefix of a causal model: num_virtual_tokens is "
            f"{tokens!r}, num_transformer_submodules {modules!r}",
            hint="check its adapter_config.json",
        )
    fitting = _key_sizes(model)
    names = {
        "num_layers": "layers",
        "num_attention_heads": "key heads",
        "token_dim": "key dimensions per token",
    }
    for name, what in names.items():
        stored, own = getattr(config, name), fitting[name]
        if stored != own:
            raise ModelError(
                f"the adapter in {folder} does not fit the base: it has {stored} {what}, and the "
                f"base has {own}",
                hint="name the base it was trained on with --base",
            )


def _unlike_layers(text: Any) -> str:
    """What a configuration has that rules out a prefix; empty if there is nothing."""
    if getattr(text, "kv_lora_rank", None):
        return "compressed keys (kv_lora_rank)"
    if getattr(text, "num_kv_shared_layers", 0):
        return "layers that share their keys (num_kv_shared_layers)"
    if getattr(text, "global_head_dim", None):
        return "head dimensions that differ (global_head_dim)"
    other = sorted(set(getattr(text, "layer_types", None) or ()) - _PLAIN)
    return f"layers of {other[0]}" if other else ""


def start_words(spec: AnySpec, base: BaseModel, say: Callable[[str], None]) -> list[int]:
    """Tokens whose keys and values a prefix starts from.

    Args:
        spec: of the recipe.
        base: its tokenizer splits the text.
        say: called with one sentence if the recipe's text is longer than the prefix.

    Returns:
        `P` token ids; none if the adapter is not a prefix or starts otherwise.

    Raises:
        ModelError: the tokenizer turns the text into no tokens.
    """
    if not isinstance(spec, PrefixSpec) or spec.projection or continues(spec):
        return []
    tokenizer, text = load_tokenizer(base), spec.text or _TEXT
    once = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not once:
        raise ModelError(
            f"the tokenizer of {base.location} turns adapter.text = {text!r} into no tokens",
            hint="choose another text",
        )
    if spec.text and once > spec.tokens:
        say(f"the prefix starts from the first {spec.tokens} of {once} tokens of adapter.text")
    ids: list[int] = tokenizer(" ".join([text] * (spec.tokens // max(1, once) + 1)))["input_ids"]
    return (ids * spec.tokens)[: spec.tokens]  # joined text may have fewer tokens


@torch.no_grad()
def text_states(model: PreTrainedModel, words: Sequence[int]) -> torch.Tensor:
    """`[P, L · 2 · K · D]` keys and values of a text, in the order in which PEFT stores them.

    Args:
        model: the bare base.
        words: `P` token ids.
    """
    cache = DynamicCache()
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([list(words)], device=device)
    model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
    states = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    return states.permute(3, 0, 1, 2, 4).flatten(1)


@torch.no_grad()
def start_prefix(model: Any, initial: Callable[[str], torch.Tensor]) -> None:
    """Start a fresh prefix as a text: random keys and values would draw each row's attention away
    from its own first tokens.

    Args:
        model: a PEFT model with a prefix, without a network.
        initial: gives its values by their name in PEFT's file.
    """
    model.prompt_encoder[model.active_adapter].load_prompt_embeddings(initial(STATES))


def count_weights(config: PrefixTuningConfig) -> int:
    """Number of weights that are trained for a prefix."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in PrefixEncoder(config).parameters())


def prefix_shape(encoder: PrefixEncoder) -> tuple[str, int, int]:
    """What is trained, its number of tokens, and the width of each over all layers."""
    tokens, width = encoder.embedding.num_embeddings, encoder.embedding.embedding_dim
    if encoder.prefix_projection:
        last: Any = encoder.transform[-1]
        return "prefix through a network", tokens, last.out_features
    return "prefix", tokens, width
