"""A file -> its rows, by its suffix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from alignkit.data.files.content import USUAL, Dialect, read_lines
from alignkit.data.files.json_rows import Found, read_json, read_jsonl
from alignkit.data.files.tables import read_csv, read_parquet
from alignkit.errors import DataError

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet", ".csv")


def suffix_of(path: Path, shown: str) -> str:
    """How the file is read: its suffix without `.gz`.

    Args:
        path: of the file.
        shown: how messages name it.

    Raises:
        DataError: no reader knows the suffix.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in {*_READERS, ".csv", ".parquet"}:
        raise DataError(
            f"{shown}: a {suffix or 'nameless'} file is not one of {', '.join(SUFFIXES)}",
            hint="convert the file; one JSON object per line (.jsonl) is the simplest",
        )
    return suffix


def read_values(
    path: Path, content: BinaryIO, shown: str, *, held: bool, dialect: Dialect = USUAL
) -> Iterator[Found]:
    """The rows of a file, read as they are asked for.

    Args:
        path: of the file.
        content: its bytes.
        shown: how messages name it.
        held: all rows will be in memory at once.
        dialect: how the file is written.

    Raises:
        DataError: a broken file or line.
    """
    suffix = suffix_of(path, shown)
    if suffix == ".parquet":
        return read_parquet(path, shown)
    packed = path.name.lower().endswith(".gz")
    held = held or suffix == ".json"
    lines = read_lines(content, shown, packed=packed, held=held, encoding=dialect.encoding)
    if suffix == ".csv":
        return read_csv(lines, shown, dialect.delimiter)
    return _READERS[suffix](lines, shown)


_READERS: dict[str, Callable[[Iterable[str], str], Iterator[Found]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
}
