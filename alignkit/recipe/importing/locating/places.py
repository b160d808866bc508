"""Where the rows of an item of `datasets:` are: a file, or a dataset on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from alignkit.errors import DataError
from alignkit.recipe.importing.datasets import (
    READ,
    UNREAD,
    ForeignRows,
    text_in,
    with_text_keys,
)


def place_of(entry: Mapping[str, Any]) -> ForeignRows:
    """Where the rows of an entry are.

    Args:
        entry: with path, name, split, data_files and ds_type.

    Raises:
        DataError: that is nowhere, in several files, or not said by text.
    """
    with_text_keys(entry, "an entry")
    path, wanted = text_in(entry, "path") or "", text_in(entry, "split") or "train"
    file = _one_file(entry, path, wanted.partition("[")[0])
    if file:
        path = _file_in(path, file, local="ds_type" in entry)
    if not path:
        raise DataError("an entry has no path", hint="as in path: rows.jsonl")
    split, _, size = wanted.partition("[:")
    take = (int(size[:-1]) or None) if re.fullmatch(r"[0-9]+\]", size) else None
    is_file = path.endswith((*READ, *UNREAD)) or path.startswith((".", "/", "~"))
    if not is_file and not entry.get("ds_type"):
        split = split if take else wanted
        return ForeignRows(path, hub=path, subset=text_in(entry, "name"), split=split, take=take)
    sliced = ("[" in wanted and take is None) or "+" in wanted
    note = f"split {wanted} is not read of a file: all its rows are taken"
    return ForeignRows(path, path=path, take=take, notes=(note,) if sliced else ())


def _one_file(entry: Mapping[str, Any], path: str, split: str) -> str | None:
    """The one of `data_files`, of the split where they are named by split.

    Raises:
        DataError: there are several, none of this split, or it is no name.
    """
    files = entry.get("data_files")
    if isinstance(files, Mapping):
        named = with_text_keys(files, f"{path}: data_files")
        if split not in named:
            raise DataError(
                f"{path}: data_files names no file for the split {split}",
                hint=f"it has {', '.join(named) or 'none'}",
            )
        files = named[split]
    if isinstance(files, list) and len(files) > 1:
        raise DataError(
            f"{path} has {len(files)} data_files", hint="write an entry for each of them"
        )
    files = (files or [None])[0] if isinstance(files, list) else files
    if files is not None and not isinstance(files, str):
        raise DataError(
            f"{path}: data_files must name a file, got {files!r}",
            hint="as in data_files: rows.jsonl, or {train: rows.jsonl}",
        )
    return files


def _file_in(path: str, file: str, *, local: bool) -> str:
    """One of `data_files`: `path` is a loader, the file itself, or the folder that holds it."""
    if path in LOADERS or path.endswith(READ):
        return file
    if local or path.startswith((".", "/", "~")):
        return str(PurePosixPath(path) / file)
    raise DataError(
        f"{path} is a hub dataset of which one file is read",
        hint="download the file, and name it as path",
    )


LOADERS = ("", "json", "csv", "parquet", "text")
"""What TRL and Axolotl call a reader of files instead of a dataset."""
