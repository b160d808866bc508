"""Whether a GGUF file is the model it was made from.

Every tensor is read back and compared with the source, up to the rounding of its type. The
tokenizer is rebuilt from the file alone and splits real text. If transformers reads the
architecture, it loads the whole file, and the logits are compared with the source's.
"""

from __future__ import annotations

import copy
import operator
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from alignkit.errors import ModelError
from alignkit.models.base.loading import BaseModel, load_model, read_model
from alignkit.models.export.gguf_files import ROPE_FACTORS, WrittenFile, stored_type
from alignkit.models.export.gguf_names import PlannedTensor, SourceWeights, stored_tensors
from alignkit.models.export.gguf_settings import Settings
from alignkit.models.export.gguf_tokens import CONTROL, Vocabulary, tokenizer_from
from alignkit.models.quiet import quiet_transformers
from alignkit.models.weights.comparing import Closeness, Sample, closeness, read_logits
from alignkit.models.weights.writing import require_written
from alignkit.packed import IntArray

MAX_KL = {"f32": 1e-5, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}
"""Nats per token that rounding to a type may move the model."""

TRICKY_TEXTS = (
    "It's 3:45 pm; they'll pay $1,234,567.89 (50%)!",
    "def f(x):\n\treturn  x**2   # two  spaces\r\n\n\nend",
    "naïve café, Ünïcödé, Ελληνικά, русский, 漢字かな, 한국어, العربية, 🙂👩‍👩‍👧",
    "\ttab first\n",
    "a",
)

_STATED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size", "tie_word_embeddings"),
)


def check_tensors(
    file: WrittenFile, plan: list[PlannedTensor], weights: SourceWeights, wanted: str
) -> None:
    """Compare every tensor of the file with the source.

    Raises:
        ModelError: one is missing, extra, of another type, or off by more than its rounding.
    """
    extra = file.names() - {tensor.target for tensor in plan} - {ROPE_FACTORS}
    for name in extra:
        require_written(name, None, file.kind(name), operator.eq)
    for tensor, exact in stored_tensors(plan, weights):
        kind = stored_type(tensor.shape, wanted)
        there = tensor.target in file.names() and file.kind(tensor.target) == kind
        stored = file.read(tensor.target) if there else None
        require_written(tensor.target, exact, stored, partial(_within, kind=kind))


def _within(exact: torch.Tensor, stored: torch.Tensor | None, kind: str) -> bool:
    """Whether a tensor is the exact one, rounded to its type."""
    if stored is None or stored.shape != exact.shape:
        return False
    if kind != "q8_0":
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
        return torch.equal(stored, exact.to(dtype).float())
    blocks = exact.reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 127
    # The step itself is stored as f16: up to 127 steps, each off by half a unit in the last place.
    step_error = torch.maximum(step * 2.0**-11, torch.tensor(2.0**-25))
    allowed = 0.5 * step * (1 + 1e-5) + 127 * step_error
    return bool(((stored.reshape(-1, 32) - blocks).abs() <= allowed).all())


def check_settings(file: WrittenFile, architecture: str, settings: Settings) -> None:
    """Compare every setting of the file with what was to be written.

    Raises:
        ModelError: one differs.
    """
    wanted = {f"{architecture}.{name}": value for name, value in settings.values.items()}
    for key, value in wanted.items():
        exact = float(torch.tensor(value)) if isinstance(value, float) else value
        require_written(key, exact, file.fields.get(key), operator.eq)


def check_tokenizer(
    file: WrittenFile,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[IntArray],
) -> int:
    """Split text with the tokenizer that the file describes and with the model's own.

    Args:
        file: written.
        vocabulary: what was to be written.
        tokenizer: of the model.
        rows: token ids of real rows, special tokens included.

    Returns:
        How many texts were split.

    Raises:
        ModelError: the two differ.
    """
    stored = file.vocabulary()
    same = ("kind", "cut", "tokens", "types", "scores", "merges", "special", "add_bos", "add_space")
    for name in same:
        require_written(name, getattr(vocabulary, name), getattr(stored, name), operator.eq)
    built = tokenizer_from(stored)
    texts = [*TRICKY_TEXTS, *(tokenizer.decode(row) for row in rows)]
    marks = [t for t, k in zip(stored.tokens, stored.types, strict=True) if k == CONTROL]
    if vocabulary.space_after_special:
        texts += [f"{mark}user\nHi{mark}\n" for mark in marks[:64]]
    else:
        texts = [text for text in texts if not any(mark in text for mark in marks)]
    for text in texts:
        # Readers of the format do not compose characters; the report says so.
        composed = unicodedata.normalize("NFC", text)
        own = tokenizer(composed, add_special_tokens=False)["input_ids"]
        if built.encode(composed, add_special_tokens=False).ids != list(own):
            raise ModelError(
                "readers of GGUF would split text differently from this tokenizer: "
                f"{composed[:60]!r}",
                hint="its merges do not follow the rules of the format; serve the folder itself",
            )
    return len(texts)


def load_back(path: Path, config: PreTrainedConfig) -> Any:
    """The file as transformers reads it, in float32; None if it does not know the architecture.

    Args:
        path: of the file.
        config: of the source: transformers reads only part of the settings from a file. Those are
            compared here, the others in `check_settings`.

    Raises:
        ModelError: a setting read from the file differs.
    """
    written = BaseModel(str(path.parent), path.name)
    try:
        with quiet_transformers():
            stated = AutoConfig.from_pretrained(path.parent, **written.options)
    except ValueError as error:
        if "not supported" not in str(error):
            raise
        return None
    for name in _STATED:
        if getattr(stated, name) != getattr(config, name):
            raise ModelError(
                f"transformers reads {name} = {getattr(stated, name)!r} from the file, "
                f"not {getattr(config, name)!r}",
                hint="serve the safetensors folder instead; nothing was kept",
            )
    return read_model(
        AutoModelForCausalLM,
        written,
        config=_as_read(config, stated),
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **written.options,
    ).eval()


def _as_read(config: PreTrainedConfig, stated: Any) -> Any:
    """The source's configuration, in the class that transformers takes the file for."""
    if config.model_type == stated.model_type:
        return copy.deepcopy(config)
    # Mistral is written as a Llama: the same model within its window.
    values, names = config.to_dict(), stated.to_dict().keys() - {"model_type", "architectures"}
    return type(stated)(**{name: values[name] for name in names if name in values})


def check_logits(
    path: Path, base: BaseModel, config: PreTrainedConfig, samples: Sequence[Sample], wanted: str
) -> Closeness | None:
    """Compare the file's logits with the source's, both in float32.

    Args:
        path: of the file.
        base: the source.
        config: of the source.
        samples: rows.
        wanted: type of the file.

    Returns:
        The differences; None if transformers cannot read the architecture.

    Raises:
        ModelError: KL is above the limit of the type.
    """
    model = load_back(path, config)
    if model is None:
        return None
    logits = read_logits(model, samples)
    del model  # one model in memory
    measured = closeness(read_logits(load_model(base, torch.float32), samples), logits)
    if not measured.mean_kl <= MAX_KL[wanted]:
        raise ModelError(
            f"the file is not the model: KL {measured.mean_kl:.2g} nats/token is more than "
            f"{MAX_KL[wanted]:.2g}, the limit of {wanted}",
            hint="export with a wider --type; nothing was written",
        )
    return measured
