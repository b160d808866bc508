"""Files and hub datasets -> rows that know where they come from.

A row keeps its file and line, so that an error can name them. Weights are sampling weights and
deterministic: the same seed draws the same rows.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignkit.data.report import DataReport
from alignkit.errors import DataError
from alignkit.recipe.assets import find_path
from alignkit.recipe.rows import SourceSpec

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet", ".csv")


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Args:
        values: column -> value.
        place: `file:line` (or `file row n` if the format has no lines).
    """

    values: dict[str, Any]
    place: str


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
    parse: Callable[[], list[Row]]

    @cached_property
    def rows(self) -> list[Row]:
        """All rows in file order, at least one.

        Raises:
            DataError: an empty file, a broken line, or a renamed column that does not exist.
        """
        rows, label, columns = self.parse(), self.spec.label, self.spec.columns
        if not rows:
            raise DataError(f"{label}: holds no rows", hint="check the path and the split")
        return [_rename(row, columns) for row in rows] if columns else rows


def load_source(spec: SourceSpec) -> Source:
    """Open one source.

    Args:
        spec: where the rows are.

    Raises:
        DataError: no such file, or an unknown suffix.
    """
    return _open_hub(spec) if spec.hub is not None else _open_file(spec)


def _rename(row: Row, columns: dict[str, str]) -> Row:
    for old in columns.values():
        if old not in row.values:
            names = ", ".join(map(str, row.values))
            raise DataError(
                f"{row.place}: columns names {old!r}, which the row does not have",
                hint=f"the row's columns: {names}",
            )
    kept = {key: value for key, value in row.values.items() if key not in columns.values()}
    return Row(kept | {new: row.values[old] for new, old in columns.items()}, row.place)


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
        lambda: [Row(dict(values), f"{spec.label} row {n + 1}") for n, values in enumerate(table)],
    )


def _open_file(spec: SourceSpec) -> Source:
    path = find_path(spec.path or "")
    if path is None or not path.is_file():
        raise DataError(f"{spec.path}: no such file", hint="paths are relative to the recipe")
    name = path.name.lower()
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in {*readers, ".parquet"}:
        raise DataError(
            f"{spec.path}: a {suffix or 'nameless'} file is not one of {', '.join(SUFFIXES)}",
            hint="convert the file; one JSON object per line (.jsonl) is the simplest",
        )
    content = path.read_bytes()
    shown = str(spec.path)

    def parse() -> list[Row]:
        if suffix == ".parquet":
            return _read_parquet(path, shown, spec.take)
        text = _decode(content, name, shown)
        if not text.strip():
            raise DataError(
                f"{shown}: the file is empty", hint="every source needs at least one row"
            )
        return list(itertools.islice(readers[suffix](text, shown), spec.take))

    return Source(spec, hashlib.sha256(content).hexdigest(), parse)


def _decode(content: bytes, name: str, shown: str) -> str:
    if name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{shown}: is not an intact gzip file ({error})", hint="download it again"
            ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{shown}:{line}: is not UTF-8 text (byte 0x{content[error.start]:02x})",
            hint="convert it: iconv -f latin1 -t utf-8 old > new",
        ) from None


def _read_jsonl(text: str, shown: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{shown}:{number}: is not valid JSON: {error.msg} at column {error.colno}",
                hint="a .jsonl file holds one whole JSON object on each line",
            ) from None
        yield _object(values, f"{shown}:{number}")


def _read_json(text: str, shown: str) -> Iterator[Row]:
    """Rows of a JSON array, each with the line it starts on."""
    decoder, position, line = json.JSONDecoder(), 0, 1

    def skip(to_skip: str, position: int, line: int) -> tuple[int, int]:
        while position < len(text) and text[position] in to_skip:
            line += text[position] == "\n"
            position += 1
        return position, line

    position, line = skip(" \t\r\n", position, line)
    if text[position] != "[":
        if "\n{" in text:
            yield from _read_jsonl(text, shown)
            return
        raise DataError(
            f"{shown}:{line}: a .json file must hold a list of rows, but starts with "
            f"{text[position]!r}",
            hint="one object per line belongs in a .jsonl file",
        )
    position += 1
    while True:
        position, line = skip(" \t\r\n,", position, line)
        if position < len(text) and text[position] == "]":
            break
        try:
            values, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{shown}:{error.lineno}: is not valid JSON: {error.msg} at column {error.colno}",
                hint="the list must close with ] and its rows be separated by commas",
            ) from None
        yield _object(values, f"{shown}:{line}")
        line += text.count("\n", position, end)
        position = end
    position, line = skip(" \t\r\n", position + 1, line)
    if position < len(text):
        raise DataError(
            f"{shown}:{line}: text follows the end of the list",
            hint="a .json file holds one list; join the lists, or write .jsonl",
        )


def _read_csv(text: str, shown: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{shown}:{reader.reader.line_num}: is not valid CSV: {error}",
                hint="write the rows as .jsonl, which has no such limits",
            ) from None
        if values is None:
            return
        first_line = reader.line_num - sum(str(value).count("\n") for value in values.values())
        if None in values or None in values.values():
            wanted = len(reader.fieldnames or [])
            raise DataError(
                f"{shown}:{first_line}: does not have the header's {wanted} columns",
                hint='quote a field that holds commas or line breaks: "like, this"',
            )
        yield Row(dict(values), f"{shown}:{first_line}")


def _read_parquet(path: Path, shown: str, take: int | None) -> list[Row]:
    import pyarrow.parquet  # only parquet sources pay for its import

    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:
        first_line = str(error).split("\n")[0]
        raise DataError(
            f"{shown}: is not a readable parquet file: {first_line}",
            hint="download it again, or convert the rows to .jsonl",
        ) from None
    rows = table.slice(0, take).to_pylist()
    return [Row(values, f"{shown} row {n + 1}") for n, values in enumerate(rows)]


def _object(values: Any, place: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(
            f"{place}: a row must be a JSON object, got {type(values).__name__}",
            hint='as in {"messages": [...]}; see data_templates/formats for every row format',
        )
    return Row(values, place)


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
            hint="raise data.max_length, or choose another data.too_long",
        )
    order = mix_rows(num_rows, [spec.weight for spec in specs], seed)
    if not len(order):
        raise DataError(
            f"{labels}: the weights draw no row from {', '.join(map(str, num_rows))}",
            hint="raise the weights of the sources",
        )
    return order
