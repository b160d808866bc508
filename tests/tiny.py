"""Tiny tokenizers and random models of every supported family, made offline in a second.

The tokenizers are trained on the shipped example rows, have about 700 tokens and behave as their
families do: which token ends a turn, whether BOS is added, how white space and unknown characters
are cut. The models are random with large weights, so that their logits are not flat and a wrong
mask, position or attention pattern moves every number.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignkit.models.adapters.attach import attach_adapter
from alignkit.recipe.adapters import LoraSpec
from alignkit.recipe.assets import assets_root

NUM_TEXTS = 200
NUM_TOKENS = 700

# Where Llama 3 and Qwen cut words: line breaks stand alone, digits in groups of up to DIGITS.
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"llama3": 3, "qwen": 1}

_CHATML = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
_MISTRAL_MARKS = [
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
]
_ROLES: dict[str, dict[str, str]] = {
    # SmolLM2-Instruct: BOS is the opener of a turn and never added, pad is EOS.
    "chatml": {**_CHATML, "unk_token": "<|endoftext|>"},
    "llama3": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
    },
    # Mistral Nemo: byte level.
    "mistral": {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    },
    # Mistral 7B v0.3: words start with ▁, unknown characters fall back to bytes, no pad token.
    "mistral-sentencepiece": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    # Gemma: a turn ends with <end_of_turn>, which is not EOS.
    "gemma": {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
    },
    # Qwen 2.5 Instruct: no BOS, pad is not EOS.
    "qwen": {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    },
}
_MORE_SPECIALS = {
    "llama3": ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    "mistral": _MISTRAL_MARKS,
    "mistral-sentencepiece": _MISTRAL_MARKS,
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "qwen": ["<|im_start|>"],
}
TOKENIZERS = tuple(_ROLES)

END_OF_TURN = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "mistral-sentencepiece": "</s>",
    "gemma": "<end_of_turn>",
    "qwen": "<|im_end|>",
}
"""Text of the token that ends an assistant's turn."""

TOKENIZER_OF = {
    "llama": "chatml",
    "qwen2": "qwen",
    "mistral": "mistral",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
}
"""Model family -> the tokenizer its tiny model is saved with."""
MODELS = tuple(TOKENIZER_OF)

_SLIDING = ("sliding_attention", "full_attention")
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "num_hidden_layers": 4,
        },
    ),
}


def chat_template(name: str) -> str:
    """Source of a shipped chat template."""
    path = assets_root() / "data_templates" / "chat" / f"{name}.jinja"
    return path.read_text(encoding="utf-8").rstrip("\n")


def tiny_tokenizer(family: str = "chatml", template: str | None = "") -> PreTrainedTokenizerFast:
    """A tokenizer of one of `TOKENIZERS`.

    Args:
        family: which one.
        template: chat template source; empty for the family's shipped one, None for none.

    Returns:
        A fresh object; change it freely.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(family)), **_ROLES[family]
    )
    shipped = chat_template(family.partition("-")[0]) if template == "" else template
    tokenizer.chat_template = shipped
    return tokenizer


def tiny_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random causal model in evaluation mode.

    Args:
        family: one of `MODELS`.
        seed: of its weights; the global generator is left alone.
        dtype: of its weights, drawn in float32 and then rounded.
        **overrides: fields of its configuration.

    Returns:
        Two layers (four for gemma3), hidden size 64, four heads over two key-value heads, and as
        many tokens as the family's tokenizer.
    """
    tokenizer = tiny_tokenizer(TOKENIZER_OF[family])
    class_name, fields = _CONFIGS[family]
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values = {**common, **fields, **overrides}
    if family in ("gemma2", "gemma3"):
        layers = range(values["num_hidden_layers"])
        values.setdefault("layer_types", [_SLIDING[layer % 2] for layer in layers])
    config = getattr(transformers, class_name)(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases, which start at exactly 1 or 0
                    parameter += 0.1 * torch.randn_like(parameter)
    turn_end = tokenizer.convert_tokens_to_ids(END_OF_TURN[TOKENIZER_OF[family]])
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, turn_end})
    return model.to(dtype).eval()


def trained_model(family: str, adapter: str, checkpointing: bool = False, **overrides: Any) -> Any:
    """A tiny model that trains all weights, or a LoRA adapter whose B is not zero.

    Args:
        family: one of `MODELS`.
        adapter: `full` or `lora`.
        checkpointing: in training mode, activations recomputed in the backward pass.
        **overrides: as for `tiny_model`; `dropout` is that of the adapter.
    """
    dropout = overrides.pop("dropout", 0.0)
    model: Any = tiny_model(family, **overrides)
    if adapter == "full":
        model.requires_grad_(True)
    else:
        model = attach_adapter(model, LoraSpec(rank=4, alpha=8.0, dropout=dropout), seed=1)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def plain_lora(model: Any) -> Any:
    """The model with PEFT's own forward in every adapted layer."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model


def save_tiny(folder: Path, family: str = "llama", seed: int = 0, **overrides: Any) -> None:
    """Write a tiny model and its tokenizer as an ordinary model folder.

    Args:
        folder: made if it does not exist.
        family: one of `MODELS`.
        seed: of the weights.
        **overrides: as for `tiny_model`, `dtype` included.
    """
    tiny_model(family, seed, **overrides).save_pretrained(folder)
    tiny_tokenizer(TOKENIZER_OF[family]).save_pretrained(folder)


@functools.cache
def _trained(family: str) -> str:
    """The family's tokenizer as JSON; training is deterministic and fast."""
    specials = list(dict.fromkeys([*_ROLES[family].values(), *_MORE_SPECIALS.get(family, [])]))
    if family == "mistral-sentencepiece":
        tokenizer = _sentencepiece(specials, [t.replace("\n", " ") for t in _texts()])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*fused, decoders.Strip(content=" ", left=1)])
    elif family == "gemma":
        tokenizer = _sentencepiece(specials, _texts())
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(fused)
    else:
        tokenizer = _byte_level(specials, _DIGITS.get(family))
        if family == "qwen":
            tokenizer.normalizer = normalizers.NFC()
    bos = _ROLES[family].get("bos_token")
    if bos is not None and family != "chatml":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return str(tokenizer.to_str())


@functools.cache
def _texts() -> list[str]:
    path = assets_root() / "data_templates" / "sft" / "messages.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:NUM_TEXTS]
    return [turn["content"] for line in lines for turn in json.loads(line)["messages"]]


def _byte_level(specials: list[str], digits: int | None) -> Tokenizer:
    """Byte-level BPE, cut as by GPT-2 or, with groups of `digits`, as by Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    if digits is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        cut = _CUT.replace("{1,DIGITS}", f"{{1,{digits}}}" if digits > 1 else "")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(cut), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _sentencepiece(specials: list[str], texts: list[str]) -> Tokenizer:
    """BPE over characters with ▁ for spaces and the 256 bytes for characters it does not know."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    size = NUM_TOKENS - 256 - len(specials)
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    bpe = json.loads(trained.to_str())["model"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *bpe["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in bpe["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return tokenizer
