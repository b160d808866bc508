"""What a name means: a fetched model, a hub id, a folder, a GGUF file, a run or an adapter.

Resolved once where a name comes in, and then passed on. Only names of files are looked at.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from os.path import exists, expanduser, isdir, isfile
from pathlib import Path
from typing import Literal

from alignkit.errors import ModelError
from alignkit.models.base.adapter_kinds import CONFIG, require_mergeable
from alignkit.models.base.inside import require_inside
from alignkit.models.base.known import KNOWN_MODELS, model_folder
from alignkit.models.base.loading import BaseModel

Kind = Literal["known", "hub", "gguf", "model", "run", "adapter", "folder", "nothing"]


@dataclass(frozen=True)
class Place:
    """What a name stands for.

    Args:
        name: as the user wrote it.
        kind: `known` of a model that alignkit fetches, `hub` of what looks like a hub id, `gguf` of
            such a file, `model` of a model folder, `run` of a folder with merged/ or adapter/,
            `adapter` of an adapter folder, `folder` of any other one, or `nothing`.
        model: the whole model that it is or holds, if there is one.
        adapter: the adapter folder that it is or holds, if there is one.
    """

    name: str
    kind: Kind
    model: BaseModel | None = None
    adapter: Path | None = None

    @property
    def unmerged(self) -> Path | None:
        """The adapter of a place that holds no whole model."""
        return self.adapter if self.model is None else None

    def whole(self) -> BaseModel:
        """The whole model.

        Returns:
            A model whose files exist, or a hub id.

        Raises:
            ModelError: there is none.
        """
        if self.model is not None:
            return self.model
        if self.kind == "known":
            raise ModelError(
                f"{self.name} is not here yet", hint=f"run `alignkit fetch {self.name}`"
            )
        if self.kind == "nothing":
            near = difflib.get_close_matches(self.name, KNOWN_MODELS, n=1)
            hint = f"did you mean {near[0]}?" if near else "name a folder, a .gguf file or a hub id"
            what = "is not a model: no such folder, file or known name"
            raise ModelError(f"{self.name[:200]!r} {what}", hint=hint)
        folder = Path(expanduser(self.name))
        if self.kind == "folder":
            raise ModelError(
                f"{folder} is not a model folder: it has no config.json",
                hint="name the folder with config.json and *.safetensors",
            )
        for adapter in (folder, folder / "adapter"):
            require_mergeable(adapter)
        raise ModelError(
            f"{folder} holds an adapter, not a whole model",
            hint=f"run `alignkit merge-lora {folder}` first",
        )


def resolve(name: str, *, trust_remote_code: bool = False) -> Place:
    """What a name stands for; what is missing there is reported only when it is needed.

    Args:
        name: known name, hub id, folder, `.gguf` file, run folder or adapter folder.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: its folder uses files that are not in it.
    """
    path = Path(expanduser(name))
    if isfile(path) and path.suffix == ".gguf":
        return Place(name, "gguf", BaseModel(str(path.parent), path.name, trust_remote_code))
    if isdir(path):
        whole = _holding("config.json", path, path / "merged")
        adapter = _holding(CONFIG, path, path / "adapter")
        require_inside(path, {part for part in (whole, adapter) if part is not None})
        kind: Kind = "folder"
        if path in (whole, adapter):
            kind = "model" if path == whole else "adapter"
        elif whole is not None or (path / "adapter").is_dir():
            kind = "run"
        return Place(name, kind, _model(whole, trust_remote_code), adapter)
    if name in KNOWN_MODELS:
        folder = _holding("config.json", model_folder(name))
        return Place(name, "known", _model(folder, trust_remote_code))
    if exists(path) or path.is_absolute() or name.count("/") != 1 or name.startswith("."):
        return Place(name, "nothing")
    return Place(name, "hub", BaseModel(name, None, trust_remote_code))


def _holding(file: str, *folders: Path) -> Path | None:
    """The first of some folders that holds a file."""
    return next((folder for folder in folders if (folder / file).is_file()), None)


def _model(folder: Path | None, trust_remote_code: bool) -> BaseModel | None:
    return None if folder is None else BaseModel(str(folder), None, trust_remote_code)
