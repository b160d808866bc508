"""A model's weights by name, read and written file by file: memory holds only what is in use."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from alignkit.models.base.changes import BaseChanges
from alignkit.models.base.files import (
    INDEX,
    ONE_FILE,
    naming,
    reading,
    stored_shapes,
    weight_files,
)
from alignkit.models.base.loading import BaseModel, load_model, read_model, stored_dtype
from alignkit.models.base.skeleton import require_complete
from alignkit.models.heap import release_memory
from alignkit.models.transformers_parts import revert_weight_conversion
from alignkit.models.weights.writing import require_written, same_bits


class StoredWeights(Mapping[str, torch.Tensor]):
    """Weights in safetensors files, mapped into memory while they are used.

    Args:
        folder: holds `model.safetensors`, or several files with their index.
        tied: another name of a weight -> its name in the files.

    Raises:
        ModelError: the files cannot be read.
    """

    def __init__(self, folder: Path, tied: Mapping[str, str] | None = None) -> None:
        self.folder, self.tied = folder, dict(tied or {})
        self.files: dict[str, tuple[str, ...]] = {}
        self._file: dict[str, str] = {}
        with reading(folder, "the weights"):
            for name in weight_files(folder):
                with safe_open(folder / name, "pt") as file:
                    self.files[name] = tuple(file.keys())
                self._file.update(dict.fromkeys(self.files[name], name))

    def __getitem__(self, name: str) -> torch.Tensor:
        """One weight as it is stored; its file stays mapped as long as the tensor lives."""
        name = name if name in self._file else self.tied.get(name, name)
        with (
            naming(self.folder, "the weights"),
            safe_open(self.folder / self._file[name], "pt") as file,
        ):
            weight: torch.Tensor = file.get_tensor(name)
            return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def write(
        self, folder: Path, names: Collection[str], weight: Callable[[str], torch.Tensor]
    ) -> None:
        """Write weights of these or other names into files like these; see `write_weights`."""
        files = {name: [n for n in held if n in names] for name, held in self.files.items()}
        files = {name: held for name, held in files.items() if held}
        files[list(files)[-1]] += sorted(set(names) - set(self))
        write_weights(folder, files, weight)


class HeldWeights(Mapping[str, torch.Tensor]):
    """Weights of a model in memory: from a GGUF file, or from files that name them differently.

    Args:
        model: a transformers model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self._state: dict[str, torch.Tensor] = {
            n: w for n, w in model.state_dict().items() if n not in self.tied
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._state[self.tied.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def write(
        self, folder: Path, names: Collection[str], weight: Callable[[str], torch.Tensor]
    ) -> None:
        """Write weights of these or other names, named as in the files that were read."""
        state = revert_weight_conversion(self._model, {name: weight(name) for name in names})
        split = split_torch_state_dict_into_shards(state, max_shard_size="5GB")
        write_weights(folder, split.filename_to_tensors, state.__getitem__)


Weights = StoredWeights | HeldWeights


def open_weights(
    base: BaseModel, skeleton: PreTrainedModel, resized: Collection[str] = (), kind: Any = None
) -> Weights:
    """The base's weights under the names that transformers gives them.

    Args:
        base: a folder of safetensors, a GGUF file or a hub id.
        skeleton: the model without storage.
        resized: names of weights that have other numbers of rows in the skeleton.
        kind: class that reads a folder whose files name weights differently; None for a language
            model.

    Returns:
        The files themselves, or the loaded model if they name weights differently.

    Raises:
        ModelError: they do not hold all of the model's weights, or hold others.
    """
    if kind is None:
        require_complete(base)
    if base.gguf is None:
        folder = Path(base.location)
        if not folder.is_dir():
            patterns = ["model*.safetensors", INDEX]
            with reading(folder, "the weights"):
                folder = Path(snapshot_download(base.location, allow_patterns=patterns))
        if weight_files(folder):
            tied = skeleton.all_tied_weights_keys
            stored = StoredWeights(folder, tied)
            shapes = stored_shapes(folder)
            wanted = {n: tuple(w.shape) for n, w in skeleton.state_dict().items() if n not in tied}
            if all(
                name in shapes and (name in resized or shapes[name] == shape)
                for name, shape in wanted.items()
            ):
                return stored
    plain = replace(base, changes=BaseChanges())
    if kind is not None:
        options = {"dtype": stored_dtype(plain), "use_safetensors": True, **base.options}
        return HeldWeights(read_model(kind, base, **options))
    return HeldWeights(load_model(plain, stored_dtype(plain)))


def write_weights(
    folder: Path,
    files: Mapping[str, Sequence[str]],
    weight: Callable[[str], torch.Tensor],
) -> None:
    """Write weights file by file, and read each file back bit for bit.

    Args:
        folder: exists.
        files: name of each file -> names of the weights in it.
        weight: gives one weight by its name, as it is to be stored.

    Raises:
        ModelError: a file does not hold what was written.
    """
    size = 0
    for name, held in files.items():
        size += _write_file(folder / name, {key: weight(key).contiguous() for key in held})
        release_memory()
    if list(files) != [ONE_FILE]:
        places = {key: name for name, held in files.items() for key in held}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def _write_file(path: Path, tensors: dict[str, torch.Tensor]) -> int:
    """Write one file and read it back; returns the size of its weights in bytes."""
    save_file(tensors, path, metadata={"format": "pt"})
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        for name, weight in tensors.items():
            stored = file.get_tensor(name) if name in names else None
            require_written(name, weight, stored, same_bits)
    return sum(weight.numel() * weight.element_size() for weight in tensors.values())
