"""The model to start from, as recipes name it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignkit.recipe.rope import RopeSpec
from alignkit.recipe.section import Section


class ModelSpec(Section):
    """The model to start from."""

    base: Annotated[str, Field(min_length=1)]
    """Hub id, folder, `.gguf` file, run folder (its `merged/`) or a name `alignkit fetch` knows."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute precision. Trainable weights and loss arithmetic are float32 in every case."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Storage of the frozen base weights: `nf4` keeps them in 4 bits with double quantization
    (QLoRA, https://arxiv.org/abs/2305.14314), `int8` in 8 bits with one scale a row. Products are
    computed in `dtype`; merging goes onto the original weights where the adapter is as good."""
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` packs rows without padding and checks itself against the model's own attention at
    the start; `packed` insists on it; the others are padded batches through transformers."""
    chat_template: str | None = None
    """A template file or a shipped name; null keeps the model's own."""
    rope_scaling: RopeSpec | None = None
    """Longer context, as in {kind: yarn, factor: 4}; written into the merged configuration."""
    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that become one token each. Their rows of embedding and output head start as the mean
    of the pieces they were cut into, are trained, and are saved with the adapter."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""
