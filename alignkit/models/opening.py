"""Open a model for inference: a whole model, a run folder, or an adapter over its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.models.adapters.files import (
    has_head,
    load_adapter,
)
from alignkit.models.adapters.finding import base_of_adapter, tokenizer_of
from alignkit.models.base.fitness import is_classifier, require_language_model
from alignkit.models.base.generation import repaired
from alignkit.models.base.loading import load_model, load_tokenizer
from alignkit.models.base.places import resolve
from alignkit.models.base.skeleton import require_complete
from alignkit.models.rewards.head import read_head
from alignkit.terminal import print_line


@dataclass(frozen=True)
class OpenModel:
    """A model ready for inference.

    Args:
        model: in evaluation mode.
        tokenizer: with its chat template.
        name: as the user gave it.
        head: scalar head of a reward model; None for a language model.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    head: nn.Linear | None = None


def open_model(
    name: str, *, dtype: torch.dtype, device: str = "cpu", base: str | None = None
) -> OpenModel:
    """Load a model by any of its names.

    Args:
        name: known name, hub id, folder, `.gguf` file, run folder or adapter folder.
        dtype: of the weights.
        device: where they go.
        base: for an adapter, the base to put it on.

    Returns:
        The merged model of a run if there is one, else base + adapter; with the scalar head if it
        is a reward model.
    """
    place = resolve(name)
    adapter = place.unmerged if base is None else place.adapter
    if adapter is None:
        source = place.whole()
        require_complete(source)
        # A classifier's decoder loads as a language model; its vocabulary head is never used.
        head = read_head(Path(source.location)) if is_classifier(source) else None
        model = _repaired(load_model(source, dtype, device), name)
        return OpenModel(model, load_tokenizer(source), name, _to(head, device))
    source = base_of_adapter(adapter, base)
    require_language_model(source)
    require_complete(source)
    model = load_adapter(_repaired(load_model(source, dtype, device), name), adapter)
    tokenizer = load_tokenizer(tokenizer_of(adapter, source))
    head = read_head(adapter) if has_head(adapter) else None
    return OpenModel(model, tokenizer, name, _to(head, device))


def open_language_model(
    name: str, *, dtype: torch.dtype, device: str = "cpu", base: str | None = None
) -> OpenModel:
    """Load a model that has to generate text, by any of its names.

    Raises:
        ModelError: it is a reward model.
    """
    opened = open_model(name, dtype=dtype, device=device, base=base)
    if opened.head is not None:
        raise ModelError(
            f"{name} is a reward model: it scores answers and writes none",
            hint=f"score with `alignkit eval {name} --prompt TEXT --answer TEXT`",
        )
    return opened


def _repaired(model: Any, name: str) -> Any:
    """The model with generation settings that transformers can follow."""
    rows = model.config.get_text_config().vocab_size
    model.generation_config, change = repaired(model.generation_config, rows)
    if change:
        print_line(f"generation_config.json of {name}: {change}", "note")
    return model


def _to(head: nn.Linear | None, device: str) -> nn.Linear | None:
    return None if head is None else head.to(device)
