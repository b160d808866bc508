"""Files and hub datasets -> rows that know where they come from.

A row keeps its file and line, so that an error can name them. Weights are sampling weights and
deterministic: the same seed draws the same rows.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.data.files.content import USUAL, Dialect, read_content
from alignkit.data.files.json_rows import Found, load_json
from alignkit.data.files.rows import read_values, suffix_of
from alignkit.data.report import DataReport
from alignkit.errors import DataError
from alignkit.recipe.assets import find_path
from alignkit.recipe.rows import SourceSpec

MOST_ROWS = 50_000_000
"""Longest epoch in rows: its order alone takes 400 MB."""


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Args:
        values: column -> value.
        place: `file:line` (or `file row n` if the format has no lines).
        filled: the file has a null wherever other rows have a key that this one lacks.
    """

    values: dict[str, Any]
    place: str
    filled: bool = False


@dataclass(frozen=True)
class Source:
    """One source, whose rows are parsed only when they are asked for.

    Args:
        spec: where the rows are, their renamed `columns` and how many to `take`.
        fingerprint: hash of the content, whatever the file is called.
        parse: reads the rows.
    """

    spec: SourceSpec
    fingerprint: str
    parse: Callable[[], Iterable[Row]]

    @cached_property
    def rows(self) -> list[Row]:
        """All rows in file order, at least one.

        Raises:
            DataError: an empty file, a broken line, or a renamed column that does not exist.
        """
        return list(_renamed(self.parse(), self.spec))


def load_source(spec: SourceSpec) -> Source:
    """Open one source.

    Args:
        spec: where the rows are.

    Raises:
        DataError: no such file, or an unknown suffix.
    """
    return _open_hub(spec) if spec.hub is not None else _open_file(spec)


def stream_rows(spec: SourceSpec, dialect: Dialect = USUAL) -> Iterator[Row]:
    """The rows of a file, read as they are asked for: one at a time is in memory.

    Args:
        spec: where the rows are; a path.
        dialect: how the file is written.

    Raises:
        DataError: as `load_source` and `Source.rows`, once the fault is reached.
    """
    path, shown = _find(spec)
    with path.open("rb") as content:
        found = read_values(path, content, shown, held=False, dialect=dialect)
        yield from _renamed(_parsed(found, path, shown, spec.take), spec)


def _renamed(rows: Iterable[Row], spec: SourceSpec) -> Iterator[Row]:
    """The rows, at least one, under the names that `columns` gives."""
    empty = True
    for row in rows:
        empty = False
        yield _rename(row, spec.columns) if spec.columns else row
    if empty:
        raise DataError(f"{spec.label}: holds no rows", hint="check the path and the split")


def _rename(row: Row, columns: dict[str, str]) -> Row:
    for old in columns.values():
        if old not in row.values:
            names = ", ".join(map(str, row.values))
            raise DataError(
                f"{row.place}: columns names {old!r}, which the row does not have",
                hint=f"the row's columns: {names}",
            )
    kept = {key: value for key, value in row.values.items() if key not in columns.values()}
    for new, old in columns.items():
        if kept.get(new) is not None:
            raise DataError(
                f"{row.place}: columns calls {old!r} {new!r}, and the row has a {new!r} already",
                hint=f"rename that one too, as in columns: {{{new}: {old}, other: {new}}}",
            )
    return replace(row, values=kept | {new: row.values[old] for new, old in columns.items()})


def _open_hub(spec: SourceSpec) -> Source:
    import datasets  # optional backend: only hub sources pay for its import

    try:
        table = datasets.load_dataset(spec.hub, spec.name, split=spec.split)
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise DataError(
            f"{spec.label}: could not be loaded from the hub: {first_line}",
            hint="check the name, the split and the network; a downloaded file works as `path`",
        ) from error
    if spec.take is not None:
        table = table.select(range(min(spec.take, len(table))))
    return Source(
        spec,
        str(table._fingerprint),
        lambda: (Row(dict(v), f"{spec.label} row {n + 1}", True) for n, v in enumerate(table)),
    )


def _open_file(spec: SourceSpec) -> Source:
    path, shown = _find(spec)
    content = read_content(path, shown)
    return Source(
        spec,
        hashlib.sha256(content).hexdigest(),
        lambda: _parsed(
            read_values(path, io.BytesIO(content), shown, held=True), path, shown, spec.take
        ),
    )


def _find(spec: SourceSpec) -> tuple[Path, str]:
    """The file, and how messages name it."""
    path, shown = find_path(spec.path or ""), str(spec.path)
    if shown == "-" or (path is not None and not path.is_file() and not path.is_dir()):
        raise DataError(
            f"{shown}: rows cannot come from standard input or a pipe: --resume reads them again",
            hint="write them to a file, and name that",
        )
    if path is None or not path.is_file():
        raise DataError(f"{spec.path}: no such file", hint="paths are relative to the recipe")
    suffix_of(path, shown)
    return path, shown


def _parsed(found: Iterable[Found], path: Path, shown: str, take: int | None) -> Iterator[Row]:
    filled = suffix_of(path, shown) == ".parquet"
    for values, place in itertools.islice(found, take):
        yield Row(values, place, filled)


def need(row: Row, key: str, kind: type) -> Any:
    """The value of a key; a list may be stored as JSON text.

    Args:
        row: to read from.
        key: that the row must have.
        kind: `str` or `list`.

    Raises:
        DataError: no such key, or another type.
    """
    if key not in row.values:
        keys = ", ".join(map(str, row.values))
        raise DataError(
            f"{row.place}: the row has no `{key}`",
            hint=f"its keys are {keys}; rename with columns, as in columns: {{{key}: ...}}",
        )
    value = row.values[key]
    if kind is list and isinstance(value, str):
        value = parse_json(value, row, key)
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "text"
        raise DataError(
            f"{row.place}: `{key}` must be {wanted}, got {type(value).__name__}",
            hint=f"change the value, or name another column, as in columns: {{{key}: ...}}",
        )
    return value


def parse_json(value: str, row: Row, key: str) -> Any:
    """The value of a JSON text; `key` names it in the error."""
    hint = "write keys and texts in double quotes, and true, false and null in lower case"
    return load_json(value, f"{row.place}: `{key}`", hint)


def plain_text(value: Any, row: Row, key: str) -> str:
    """Text of a value: a text, None, or a list of text parts; `key` names it in errors."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list):
        parts = []
        for part in value:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            text = (part.get("text") or part.get("value")) if isinstance(part, dict) else part
            if kind != "text" or not isinstance(text, str):
                raise DataError(
                    f"{row.place}: {key} holds a part of type {kind!r}",
                    hint="alignkit trains on text; images and audio are not supported",
                )
            parts.append(text)
        return "".join(parts)
    raise DataError(
        f"{row.place}: {key} must be text, got {type(value).__name__}",
        hint='write text, or a list of parts such as {"type": "text", "text": "Hello"}',
    )


def mix_rows(num_rows: list[int], weights: list[float], seed: int) -> npt.NDArray[np.int64]:
    """Rows of one epoch when sources have weights.

    Args:
        num_rows: rows of each source; their indices run on from source to source.
        weights: how often each source's rows count, > 0.
        seed: draws the fractional part.

    Returns:
        `[n]` indices into the concatenated sources. A weight of 2.5 gives every row twice and
        half of the rows, drawn without replacement, once more.
    """
    picked, offset = [], 0
    for number, (count, weight) in enumerate(zip(num_rows, weights, strict=True)):
        rows = np.arange(count)
        whole = int(weight)
        part = round((weight - whole) * count)
        drawn = np.random.default_rng([seed, 7, number]).permutation(count)[:part]
        picked.append(offset + np.concatenate([np.tile(rows, whole), np.sort(drawn)]))
        offset += count
    return np.concatenate(picked).astype(np.int64)


def mix_sources(
    specs: Sequence[SourceSpec], num_rows: list[int], seed: int, report: DataReport
) -> npt.NDArray[np.int64]:
    """Rows of one epoch by the weights of their sources, as `mix_rows` draws them.

    Args:
        specs: the sources.
        num_rows: rows of each that are used.
        seed: draws the fractional part.
        report: says why rows are not used.

    Raises:
        DataError: no row is used, or the weights draw none at all.
    """
    labels = ", ".join(spec.label for spec in specs)
    if not sum(num_rows):
        nothing = "no prompt is left" if report.prompts else "no row is left to train on"
        raise DataError(
            f"{labels}: {nothing}: {'; '.join(report.lines()[1:])}",
            hint=_way_out(report),
        )
    wanted = sum(count * spec.weight for count, spec in zip(num_rows, specs, strict=True))
    if not wanted <= MOST_ROWS:
        raise DataError(
            f"{labels}: the weights make an epoch of {wanted:,.0f} rows, more than {MOST_ROWS:,}",
            hint="lower the weights of the sources; training.epochs repeats all rows",
        )
    order = mix_rows(num_rows, [spec.weight for spec in specs], seed)
    if not len(order):
        raise DataError(
            f"{labels}: the weights draw no row from {', '.join(map(str, num_rows))}",
            hint="raise the weights of the sources",
        )
    return order


def _way_out(report: DataReport) -> str:
    """What to do when every row is dropped, by the most frequent reason."""
    reason = max(report.dropped, key=lambda name: report.dropped[name], default="")
    if "max_length" in reason:
        return "raise data.max_length, or choose another data.too_long"
    if reason == "nothing to train on":
        return "every row needs an answer to train on: see data.train_on and the marks of turns"
    return "correct the rows, or name other columns of the file with columns"
