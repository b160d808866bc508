"""What a person names as the rows to convert -> the rows, and how each is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml

from alignkit.curation.converting.foreign import known_row, rewriter
from alignkit.curation.converting.told import Told, tell
from alignkit.curation.records import Columns
from alignkit.data.files.content import USUAL, Dialect
from alignkit.data.sources import Row, load_source, stream_rows
from alignkit.errors import DataError
from alignkit.recipe.importing.datasets import ForeignRows, llama_factory_rows
from alignkit.recipe.importing.entries import axolotl_rows
from alignkit.recipe.rows import RowFormat, SourceSpec

FORMATS: tuple[RowFormat, ...] = get_args(RowFormat)
"""Formats that rows may be said to have."""

AXOLOTL = "axolotl:"
"""Before a dataset type of Axolotl."""

Found = tuple[Iterator[Row], Callable[[Row], Told]]
"""Rows, and what reads one."""


def source_rows(
    files: Sequence[str],
    source: str,
    *,
    name: str | None = None,
    columns: Columns,
    take: int | None = None,
    dialect: Dialect = USUAL,
) -> tuple[Found, tuple[str, ...]]:
    """The rows of some files, what reads one, and what is different about them.

    Args:
        files: of rows, which count as one set; with `name` the one file that describes them.
        source: a name of `FORMATS`, or `axolotl:TYPE`.
        name: of a dataset in LLaMA-Factory's dataset_info.json, or the path of one in Axolotl's
            YAML file.
        columns: that are renamed.
        take: rows of each file, the first ones.
        dialect: how the files are written.

    Raises:
        DataError: an unknown format, name or encoding, or a description that is not understood.
    """
    _require_dialect(dialect)
    if name is not None:
        found = _described(files, name)
    elif source.startswith(AXOLOTL):
        found = [_of_type(file, source.removeprefix(AXOLOTL)) for file in files]
    elif source in FORMATS:
        known_as = FORMATS[FORMATS.index(source)]
        found = [ForeignRows(file, path=file, format=known_as) for file in files]
    else:
        hint = f"one of {', '.join(FORMATS)}, or {AXOLOTL}TYPE as in Axolotl's datasets"
        raise DataError(f"--from {source} is not a format", hint=hint)
    rewrite, row_format = rewriter(found[0]), found[0].format  # they differ in the path only

    def read(row: Row) -> Told:
        return tell(known_row(rewrite(row)), row_format)

    rows = (row for one in found for row in _open(one, columns, take or one.take, dialect))
    return (rows, read), tuple(dict.fromkeys(note for one in found for note in one.notes))


def _open(rows: ForeignRows, columns: Columns, take: int | None, dialect: Dialect) -> Iterator[Row]:
    spec = SourceSpec(
        path=rows.path,
        hub=rows.hub,
        name=rows.subset,
        split=rows.split,
        columns=dict(columns),
        take=take,
    )
    return stream_rows(spec, dialect) if rows.hub is None else iter(load_source(spec).rows)


def _require_dialect(dialect: Dialect) -> None:
    try:
        b"a".decode(dialect.encoding)
    except (LookupError, ValueError):
        raise DataError(
            f"--encoding {dialect.encoding} is not known", hint="utf-8, cp1252 and latin1 are usual"
        ) from None
    if len(dialect.delimiter) != 1:
        raise DataError(
            f"--delimiter {dialect.delimiter!r} must be one character", hint="as in ';' or $'\\t'"
        )


def _of_type(file: str, kind: str) -> ForeignRows:
    """A file of a type of Axolotl's, whatever is trained on it."""
    entry = {"path": file, "type": kind, "ds_type": "json"}
    try:
        return axolotl_rows(entry)
    except DataError as error:
        for rl in ("dpo", "kto"):
            try:
                return axolotl_rows(entry, rl)
            except DataError:
                continue
        raise error from None


def _described(files: Sequence[str], name: str) -> list[ForeignRows]:
    if len(files) != 1:
        raise DataError("--name goes with one file that describes rows", hint="name that alone")
    path = Path(files[0])
    described = _read(path)
    if path.suffix in (".yaml", ".yml"):
        return [_of_axolotl(described, name, path)]
    entry = described.get(name)
    if not isinstance(entry, Mapping):
        raise DataError(f"{path} has no {name}", hint=f"it has {', '.join(map(str, described))}")
    rows = llama_factory_rows(name, entry)
    return [replace(rows, path=str(path.parent / rows.path)) if rows.path else rows]


def _beside(path: Path, file: str) -> str:
    """A file as a configuration names it, from the working folder or one above its own."""
    folders = [Path(), *path.resolve().parents]
    return str(next((f / file for f in folders if (f / file).is_file()), file))


def _of_axolotl(described: Mapping[str, Any], name: str, path: Path) -> ForeignRows:
    """The one of Axolotl's datasets that has this path."""
    lists = (described.get(key) for key in ("datasets", "test_datasets"))
    items = [one for found in lists if isinstance(found, list) for one in found]
    entries = [one for one in items if isinstance(one, Mapping)]
    chosen = next((one for one in entries if one.get("path") == name), None)
    if chosen is None:
        known = ", ".join(str(one.get("path")) for one in entries) or "no datasets"
        raise DataError(f"{path} has no dataset with the path {name}", hint=f"it has {known}")
    rl = "reward" if described.get("reward_model") else described.get("rl")
    rows = axolotl_rows(chosen, rl if isinstance(rl, str) else None)
    return replace(rows, path=_beside(path, rows.path)) if rows.path else rows


def _read(path: Path) -> Mapping[str, Any]:
    """The mapping that a file holds."""
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = str(error).split("\n")[0]
        raise DataError(f"{path}: cannot be read: {said}", hint="name the file itself") from None
    if not isinstance(found, Mapping):
        raise DataError(f"{path}: holds no mapping of names", hint="as dataset_info.json does")
    return found
