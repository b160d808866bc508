"""A GGUF file as an ordinary model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from alignkit.models.base.loading import BaseModel, load_model, load_tokenizer
from alignkit.models.base.transformers4 import add_older_names
from alignkit.models.quiet import quiet_transformers


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write an ordinary model folder from a GGUF file: weights in bf16, tokenizer, template.

    Args:
        gguf: the file.
        folder: to fill.
    """
    base = BaseModel(str(gguf.parent), gguf.name)
    tokenizer = load_tokenizer(base)
    model = load_model(base, torch.float32).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.name_or_path = ""
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    add_older_names(folder)
