"""Models on disk: written beside their final place, read back bit for bit, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignkit.errors import ModelError
from alignkit.models.base.loading import BaseModel, share_files
from alignkit.models.quiet import quiet_transformers


@contextlib.contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A folder or file that takes the output's name when the block ends well, else vanishes.

    Args:
        output: replaced if it exists.

    Raises:
        ModelError: the disk refuses.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".merging-") as scratch:
        written = Path(scratch) / output.name
        try:
            yield written
            replaced = Path(scratch) / ".replaced"
            if output.exists():
                os.rename(output, replaced)
            try:
                os.rename(written, output)
            except OSError:
                if replaced.exists():
                    os.rename(replaced, output)
                raise
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{output} could not be written: {error}",
                hint="free disk space; nothing was kept",
            ) from error


def require_free(output: Path, *, overwrite: bool) -> None:
    """Refuse to write over something.

    Args:
        output: file or folder.
        overwrite: the user said so.

    Raises:
        ModelError: the output exists.
    """
    if output.exists() and not overwrite:
        raise ModelError(
            f"{output} already exists", hint="add --overwrite, or name another --output"
        )


def is_plain_model(folder: Path) -> bool:
    """A model folder or an empty one; never a run, a home or a checkout."""
    if not folder.is_dir():
        return False
    held = {child.name for child in folder.iterdir()}
    folders = any(child.is_dir() for child in folder.iterdir())
    return not held or ("config.json" in held and "run.json" not in held and not folders)


def write_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    stop_tokens: Sequence[int],
) -> Any:
    """Write weights, tokenizer, chat template and generation settings.

    Args:
        model: causal language model in the dtype to write.
        tokenizer: saved with its chat template.
        folder: to write.
        stop_tokens: ids that end an answer, added to the generation settings.

    Returns:
        The model that is on disk.

    Raises:
        ModelError: the files do not hold what was written.
    """
    _add_stops(model.generation_config, stop_tokens)
    return write_and_read(model, tokenizer, folder, AutoModelForCausalLM)


def write_settings(
    base: BaseModel,
    model: PreTrainedModel,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    stop_tokens: Sequence[int] | None = None,
) -> None:
    """Write everything that makes weights a model: configuration, tokenizer, how it generates.

    Args:
        base: whose generation settings, and code if it has its own, are carried along.
        model: of the class that the weights are for; needs no storage.
        dtype: of the weights.
        tokenizer: saved with its chat template.
        folder: that holds the weights.
        stop_tokens: ids that end an answer; None for a model that generates nothing.
    """
    config = model.config
    config.dtype, config.architectures = dtype, [type(model).__name__]
    with quiet_transformers():
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if stop_tokens is not None:
            try:
                settings = GenerationConfig.from_pretrained(base.location)
            except OSError:
                settings = model.generation_config
            _add_stops(settings, stop_tokens)
            settings.save_pretrained(folder)
    if base.trust_remote_code and Path(base.location).is_dir():
        for code in Path(base.location).glob("*.py"):
            shutil.copy(code, folder / code.name)
    share_files(folder)


def _add_stops(settings: Any, stop_tokens: Sequence[int]) -> None:
    known = settings.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    stops = list(dict.fromkeys([*known, *map(int, stop_tokens)]))
    settings.eos_token_id = stops[0] if len(stops) == 1 else stops or None


def write_and_read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, kind: Any
) -> Any:
    """Write a model and its tokenizer, and read the model back.

    Args:
        model: a transformers model in the dtype to write.
        tokenizer: saved beside it.
        folder: to write.
        kind: the transformers class that a user would load it with.

    Returns:
        What is on disk, in evaluation mode.

    Raises:
        ModelError: the files do not hold what was written.
    """
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        share_files(folder)
        found = kind.from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    stored = found.state_dict()
    for name, weight in model.state_dict().items():
        if name not in stored or not torch.equal(stored[name], weight.cpu()):
            raise ModelError(
                f"the merged file does not hold what was written: {name} differs",
                hint="the disk may be full or failing; nothing was kept",
            )
    return found.eval()
