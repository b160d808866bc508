"""Files of a model as they are found: which hold weights, and what reading them may raise."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from transformers import PreTrainedModel

from alignkit.errors import AlignkitError, ModelError
from alignkit.models.quiet import quiet_transformers

INDEX = "model.safetensors.index.json"
"""Name of the file that says which file holds which weight, if there are several."""

ONE_FILE = "model.safetensors"

_MAX_REASON = 300
"""Characters of a library's own words that are shown."""


@contextlib.contextmanager
def reading(place: str | Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises over a model's files into one sentence.

    Everything is caught: a wrong type in a file may end in any error.

    Args:
        place: folder, file or hub id.
        what: is read, in words.

    Raises:
        ModelError: it cannot be read.
    """
    with naming(place, what), quiet_transformers():
        yield


@contextlib.contextmanager
def naming(place: str | Path, what: str) -> Iterator[None]:
    """The same for what prints nothing, and is read many times."""
    try:
        yield
    except (AlignkitError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{what} of {str(place)!r} could not be read: {reason(error)}",
            hint=_hint(place, error),
        ) from error


def reason(error: BaseException) -> str:
    """The first line of an error; with its kind where the words alone say too little."""
    lines = [line.strip() for line in str(error).strip().split("\n")]
    line = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:_MAX_REASON]
    plain = isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) and " " in line
    return line if plain else f"{type(error).__name__}{f': {line}' if line else ''}"


def _hint(place: str | Path, error: BaseException) -> str:
    line = str(error).strip().split("\n")[0]
    if isinstance(error, ImportError):
        for word, extra in (("gguf", "gguf"), ("bitsandbytes", "quantization")):
            if word in line.lower():
                return f"pip install 'alignkit[{extra}]'"
    if "trust_remote_code" in str(error):
        return (
            "it comes with Python code, which runs only if you name this model yourself: with "
            "model.trust_remote_code: true in a recipe, or --base NAME --trust-remote-code"
        )
    if Path(place).exists():
        return "check the name and the files"
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if os.environ.get("HF_HUB_OFFLINE"):
        return "HF_HUB_OFFLINE is set and the local cache does not hold the whole model"
    if any(isinstance(one, GatedRepoError) for one in chain):
        return "accept its terms on its page on the hub, then log in with `hf auth login`"
    if any(isinstance(one, RepositoryNotFoundError) for one in chain):
        return "check the name; a private model needs `hf auth login`"
    known = (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError)
    if any(isinstance(one, known) for one in chain) or "connect" in line:
        return "the hub cannot be reached and the local cache does not hold the whole model"
    return "check the name and the files"


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's weight files, those that transformers reads; none if it holds none.

    Raises:
        ModelError: the index names no files, or files outside the folder; or the weights are
            pickled, which may run code.
    """
    if (folder / ONE_FILE).is_file():
        return [ONE_FILE]
    if (folder / INDEX).is_file():
        with reading(folder, "the weights"):
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        places = index.get("weight_map") if isinstance(index, dict) else None
        names = list(places.values()) if isinstance(places, dict) else []
        odd = [name for name in names if not isinstance(name, str) or PurePath(name).name != name]
        if odd or not names or not isinstance(index.get("metadata"), dict):
            rule = f"names {str(odd[0])!r}, which is not a file beside it" if odd else "is not one"
            raise ModelError(f"{folder / INDEX} {rule}", hint="copy the folder again")
        return sorted(set(names))
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise ModelError(
            f"{folder} holds its weights as a pickle ({pickled[0]}), which may run code and is "
            "not read",
            hint="convert them where you trust them: load the model with transformers, then "
            "save_pretrained writes safetensors",
        )
    return []


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights in a folder's files, from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in weight_files(folder):
        with reading(folder, "the weights"), safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118  it is not a dictionary
                shapes[key] = tuple(file.get_slice(key).get_shape())
    return shapes


def integer_weights(folder: Path) -> list[str]:
    """Names of the weights in a folder's files that are stored as integers, from their headers."""
    found = []
    for name in weight_files(folder):
        with reading(folder, "the weights"), safe_open(folder / name, "pt") as file:
            for key in list(file.keys()):
                if key.endswith(".weight") and file.get_slice(key).get_dtype()[0] in "IU":
                    found.append(key)
    return found


def require_whole(place: str, model: Any, found: dict[str, Any]) -> None:
    """Refuse weights that are not those of the model that the configuration describes.

    transformers would fill what is missing with random numbers and leave out what is left over.

    Args:
        place: of the files, for the message.
        model: that was read. A sequence classifier's decoder may be read as a language model, whose
            vocabulary head it lacks.
        found: transformers' loading info.

    Raises:
        ModelError: a weight is missing, left over or of another shape.
    """
    hint = "copy the folder again, with the config.json that belongs to its weights"
    for name, stored, wanted in sorted(found.get("mismatched_keys", ())):
        raise ModelError(
            f"{name} of {place} is {list(stored)} in its file, but {list(wanted)} by its "
            "configuration",
            hint=hint,
        )
    missing, odd = sorted(found.get("missing_keys", ())), sorted(found.get("unexpected_keys", ()))
    named = getattr(model.config, "architectures", None) or []
    head = model.get_output_embeddings()
    if head is not None and any(one.endswith("ForSequenceClassification") for one in named):
        unused = {name for name, module in model.named_modules() if module is head}
        missing = [name for name in missing if name.rpartition(".")[0] not in unused]
        odd = [name for name in odd if not name.startswith("score.")]
    if missing:
        what = "is missing" if len(missing) == 1 else "are missing"
        such = (
            f"{missing[0]}" if len(missing) == 1 else f"{len(missing)} weights, {missing[0]} first,"
        )
        raise ModelError(f"{place} is incomplete: {such} {what} in its files", hint=hint)
    if odd:
        raise ModelError(
            f"{place} holds weights that its configuration has no place for: {len(odd)}, such as "
            f"{odd[0]}",
            hint=hint,
        )


def forget_gguf(model: PreTrainedModel) -> None:
    """Clear the marks that make transformers refuse to save dequantized weights."""
    model.hf_quantizer = None
    model.is_quantized = False
    for holder, mark in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(holder, mark):
            delattr(holder, mark)
