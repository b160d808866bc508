"""Models on disk: what belongs to one, and whether the files hold what was written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignkit.errors import ModelError
from alignkit.files import list_folder, replace_folder
from alignkit.models.base.loading import BaseModel
from alignkit.models.quiet import quiet_transformers


@contextlib.contextmanager
def replace_model(
    output: Path, replace: Callable[[Path], AbstractContextManager[Path]] = replace_folder
) -> Iterator[Path]:
    """`replace_folder`, where what the disk refuses becomes a sentence.

    Args:
        output: replaced if it exists.
        replace: or `replace_file`.

    Raises:
        ModelError: the disk refuses.
    """
    try:
        with replace(output) as written:
            yield written
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{output} could not be written: {error}", hint="free disk space; nothing was kept"
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
    children = list_folder(folder)
    held, folders = {child.name for child in children}, any(child.is_dir() for child in children)
    return not held or ("config.json" in held and "run.json" not in held and not folders)


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
            add_stops(settings, stop_tokens)
            settings.save_pretrained(folder)
    if base.trust_remote_code and Path(base.location).is_dir():
        for code in Path(base.location).glob("*.py"):
            shutil.copy(code, folder / code.name)


def add_stops(settings: Any, stop_tokens: Sequence[int]) -> None:
    """Add ids that end an answer to generation settings."""
    known = settings.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    stops = list(dict.fromkeys([*known, *map(int, stop_tokens)]))
    settings.eos_token_id = stops[0] if len(stops) == 1 else stops or None


def write_and_read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    read: Callable[[Path], Any],
) -> Any:
    """Write a model and its tokenizer, and read the model back bit for bit.

    Args:
        model: a transformers model in the dtype to write.
        tokenizer: saved beside it, with its chat template.
        folder: to write.
        read: loads it, as a user would.

    Returns:
        What is on disk, in evaluation mode.

    Raises:
        ModelError: the files do not hold what was written.
    """
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = read(folder)
    wanted, stored = model.state_dict(), found.state_dict()
    for name in wanted.keys() | stored.keys():
        require_written(name, wanted.get(name), stored.get(name), same_values)
    return found.eval()


def same_values(wanted: Any, found: Any) -> bool:
    """Whether two tensors agree everywhere, of whatever types, or two other values.

    Some weights are read in a wider type than they are stored in.
    """
    if isinstance(wanted, torch.Tensor) and isinstance(found, torch.Tensor):
        return torch.equal(wanted.cpu(), found.cpu())
    return type(wanted) is type(found) and wanted == found


def same_bits(wanted: torch.Tensor, found: torch.Tensor | None) -> bool:
    """Whether two tensors are of one type and agree everywhere."""
    return found is not None and wanted.dtype == found.dtype and same_values(wanted, found)


def require_written(name: str, wanted: Any, found: Any, same: Callable[[Any, Any], bool]) -> None:
    """Refuse a file that holds something else than was written.

    Args:
        name: of what is compared.
        wanted: what was to be written; None for nothing.
        found: what was read back; None for nothing.
        same: whether the two agree.

    Raises:
        ModelError: they do not.
    """
    if not same(wanted, found):
        raise ModelError(
            f"the file does not hold what was written: {name} differs",
            hint="the disk may be full or failing; nothing was kept",
        )
