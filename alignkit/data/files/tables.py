"""Rows of files that are tables: CSV and parquet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alignkit.data.files.json_rows import Found
from alignkit.errors import DataError

_BREAK = re.compile(r"\r\n|\r|\n")
_BATCH = 1000
"""Rows of a parquet file that are in memory at once."""


def read_csv(lines: Iterable[str], shown: str, delimiter: str = ",") -> Iterator[Found]:
    """Rows of separated values below a header.

    Args:
        lines: each with its line break.
        shown: how messages name the file.
        delimiter: between two values.

    Raises:
        DataError: a line that is no CSV, or has other columns than the header.
    """
    reader, begins = _reader(lines, delimiter), 1
    while True:
        try:
            names = list(reader.fieldnames or [])
            begins = reader.line_num + 1
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{shown}:{begins}: is not valid CSV: {error}",
                hint="close every quote, or write .jsonl, which has no such limits",
            ) from None
        if values is None:
            return
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            message = f"{shown}:1: the header has {twice[0]!r} twice"
            raise DataError(message, hint="rename one of the columns")
        first_line = reader.line_num - sum(len(_BREAK.findall(str(v))) for v in values.values())
        if None in values or None in values.values():
            other = next((c for c in ";\t|" if len(names) == 1 and c in names[0]), None)
            raise DataError(
                f"{shown}:{first_line}: does not have the header's {len(names)} columns",
                hint='quote a field that holds commas or line breaks: "like, this"'
                if other is None
                else f"the columns are separated by {other!r}: alignkit data convert --delimiter",
            )
        yield dict(values), f"{shown}:{first_line}"


def _reader(lines: Iterable[str], delimiter: str) -> csv.DictReader[str]:
    return csv.DictReader(_at_every_break(lines), strict=True, delimiter=delimiter)


def _at_every_break(lines: Iterable[str]) -> Iterator[str]:
    """Lines that end where any system ends them."""
    for line in lines:
        yield from io.StringIO(line, newline="") if "\r" in line[:-2] else (line,)


def read_parquet(path: Path, shown: str) -> Iterator[Found]:
    """Rows of a parquet file, some at a time.

    Args:
        path: of the file.
        shown: how messages name it.

    Raises:
        DataError: it cannot be read.
    """
    import pyarrow.parquet  # only parquet sources pay for its import

    start = 0
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(_BATCH)
        while (block := next(batches, None)) is not None:
            yield from _rows(block, shown, start)
            start += len(block)
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).split("\n")[0]
        raise DataError(
            f"{shown}: is not a readable parquet file: {first_line}",
            hint="download it again, or convert the rows to .jsonl",
        ) from None


def _rows(block: Any, shown: str, start: int) -> list[Found]:
    try:
        values = block.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, dates that no calendar has
        values = [_row(block, n, f"{shown} row {start + n + 1}") for n in range(len(block))]
    return [(row, f"{shown} row {start + n + 1}") for n, row in enumerate(values)]


def _row(block: Any, number: int, place: str) -> dict[str, Any]:
    try:
        (values,) = block.slice(number, 1).to_pylist()
    except (ValueError, OverflowError) as error:
        what = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise DataError(f"{place}: {what}: {error}", hint="write the column anew") from None
    return dict(values)
