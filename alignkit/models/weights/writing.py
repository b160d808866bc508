"""Models on disk: what belongs to one, and whether the files hold what was written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.files import list_folder, replace_folder
from alignkit.models.base.generation import generation_settings, repaired
from alignkit.models.base.loading import BaseModel
from alignkit.models.base.transformers4 import add_older_names
from alignkit.models.quiet import quiet_transformers


@contextlib.contextmanager
def replace_model(
    output: Path, replace: Callable[[Path], AbstractContextManager[Path]] = replace_folder
) -> Iterator[Path]:
    """`replace_folder`, with the disk's errors turned into one sentence.

    Args:
        output: replaced if it exists.
        replace: or `replace_file`.

    Raises:
        ModelError: the output could not be written.
    """
    try:
        with replace(output) as written:
            yield written
    except Exception as error:
        # On a full disk tokenizers raise a bare Exception, which names the system's error.
        if not isinstance(error, OSError | SafetensorError) and "(os error " not in str(error):
            raise
        raise ModelError(
            f"{output} could not be written: {error}", hint="free disk space; nothing was kept"
        ) from error


def require_free(output: Path, *, overwrite: bool) -> None:
    """Refuse to overwrite an existing output unless the user allowed it.

    Args:
        output: file or folder.
        overwrite: the user allowed it.

    Raises:
        ModelError: the output exists.
    """
    if output.exists() and not overwrite:
        raise ModelError(
            f"{output} already exists", hint="add --overwrite, or name another --output"
        )


def is_plain_model(folder: Path) -> bool:
    """Whether it is a model folder or an empty one; never a run, a home or a checkout."""
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
    """Write what weights need to be a model: configuration, tokenizer, generation settings.

    Args:
        base: its generation settings, and its own code if it has any, are copied.
        model: of the class that the weights are for; needs no storage.
        dtype: of the weights.
        tokenizer: saved with its chat template.
        folder: that holds the weights.
        stop_tokens: ids that end a response; None for a model that generates nothing.
    """
    config = model.config
    config.dtype, config.architectures = dtype, [type(model).__name__]
    with quiet_transformers():
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if stop_tokens is not None:
            settings = generation_settings(base)[0] or repaired(model.generation_config)[0]
            add_stops(settings, stop_tokens)
            settings.save_pretrained(folder)
    add_older_names(folder)
    if base.trust_remote_code and Path(base.location).is_dir():
        for code in Path(base.location).glob("*.py"):
            shutil.copy(code, folder / code.name)


def add_stops(settings: Any, stop_tokens: Sequence[int]) -> None:
    """Add ids that end a response to generation settings."""
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
        tokenizer: saved with it, and with its chat template.
        folder: to write.
        read: loads it, as a user would.

    Returns:
        The model as it is on disk, in evaluation mode.

    Raises:
        ModelError: a weight is not finite, or the files do not hold what was written.
    """
    require_finite(model.state_dict())
    if getattr(model, "generation_config", None) is not None:
        rows = model.config.get_text_config().vocab_size
        model.generation_config = repaired(model.generation_config, rows)[0]
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        add_older_names(folder)
        read_back = read(folder)
    wanted, stored = model.state_dict(), read_back.state_dict()
    for name in wanted.keys() | stored.keys():
        require_written(name, wanted.get(name), stored.get(name), same_values)
    return read_back.eval()


def require_finite(weights: Mapping[str, Any]) -> None:
    """Refuse to write weights that no longer compute anything.

    Raises:
        ModelError: a value is NaN or infinite.
    """
    for name, weight in weights.items():
        numbers = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        if numbers and not bool(torch.isfinite(weight).all()):
            raise ModelError(
                f"the trained weights are not finite, in {name}: nothing was written",
                hint="training diverged: lower training.learning_rate or weight_decay, and "
                "start again or from an earlier checkpoint",
            )


def same_values(wanted: Any, stored: Any) -> bool:
    """Whether two tensors of any types agree everywhere, or two other values are equal.

    Some weights are read in a wider type than they are stored in.
    """
    if isinstance(wanted, torch.Tensor) and isinstance(stored, torch.Tensor):
        return torch.equal(wanted.cpu(), stored.cpu())
    return type(wanted) is type(stored) and wanted == stored


def same_bits(wanted: torch.Tensor, stored: torch.Tensor | None) -> bool:
    """Whether two tensors are of one type and agree everywhere."""
    return stored is not None and wanted.dtype == stored.dtype and same_values(wanted, stored)


def require_written(name: str, wanted: Any, stored: Any, same: Callable[[Any, Any], bool]) -> None:
    """Refuse a file that holds something other than what was written.

    Args:
        name: of what is compared.
        wanted: what was to be written; None for nothing.
        stored: what was read back; None for nothing.
        same: whether the two agree.

    Raises:
        ModelError: they do not.
    """
    if not same(wanted, stored):
        raise ModelError(
            f"the file does not hold what was written: {name} differs",
            hint="the disk may be full or failing; nothing was kept",
        )
