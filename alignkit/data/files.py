"""Files -> rows as plain values, each with its place; every fault with file and line."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from alignkit.errors import DataError

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet", ".csv")

Found = tuple[dict[str, Any], str]
"""Values of a row, and its place."""

_SHARE = 4
"""Rows take about four times the memory of their text."""
_BLOCK = 1 << 20
_PACKED = {b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip file or a spreadsheet"}
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_PACKED_HINT = "unpack or convert it; only a file whose name ends in .gz is unpacked"
_LIST_HINT = "the list must close with ] and its rows be separated by commas"


def suffix_of(path: Path, shown: str) -> str:
    """How the file is read: its suffix without `.gz`.

    Args:
        path: of the file.
        shown: how messages name it.

    Raises:
        DataError: no reader knows the suffix.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in {*_READERS, ".parquet"}:
        raise DataError(
            f"{shown}: a {suffix or 'nameless'} file is not one of {', '.join(SUFFIXES)}",
            hint="convert the file; one JSON object per line (.jsonl) is the simplest",
        )
    return suffix


def read_content(path: Path, shown: str) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: their rows would not fit in memory.
    """
    _require_room(path.stat().st_size, shown, "has")
    return path.read_bytes()


def read_values(path: Path, content: bytes, shown: str, take: int | None) -> list[Found]:
    """The rows of a file.

    Args:
        path: of the file.
        content: its bytes.
        shown: how messages name it.
        take: only the first so many.

    Raises:
        DataError: a broken file or line.
    """
    suffix = suffix_of(path, shown)
    if suffix == ".parquet":
        return _read_parquet(path, shown, take)
    text = _decode(_unpack(content, shown) if path.name.lower().endswith(".gz") else content, shown)
    if not text.strip():
        raise DataError(f"{shown}: the file is empty", hint="every source needs at least one row")
    return list(itertools.islice(_READERS[suffix](text, shown), take))


def load_json(text: str, where: str, hint: str) -> Any:
    """The value of a JSON text.

    Args:
        text: to read.
        where: beginning of the error, which is followed by ` is not valid JSON` or the like.
        hint: what to do about broken JSON.

    Raises:
        DataError: it is not JSON, too deep, or holds what nothing can use, as a key twice.
    """
    try:
        values = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _json_fault(error, where, hint) from None
    _require_whole(values, text, where)
    return values


class _TwiceError(ValueError):
    """A key that an object has twice."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _TwiceError(next(key for key in values if sum(k == key for k, _ in pairs) > 1))
    return values


def _json_fault(error: Exception, where: str, hint: str) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        return DataError(
            f"{where} is not valid JSON: {error.msg} at column {error.colno}", hint=hint
        )
    if isinstance(error, _TwiceError):
        return DataError(f"{where} has the key {error.args[0]!r} twice", hint="remove one of them")
    if isinstance(error, RecursionError):
        return DataError(f"{where} is nested too deeply", hint="remove what nests, or the row")
    return DataError(
        f"{where} holds a number with more digits than can be read",
        hint="write such a number as text, in double quotes",
    )


def _require_whole(values: Any, text: str, where: str) -> None:
    """Refuse half of a surrogate pair: no encoding has it, so no tokenizer and no file can."""
    if _HALF.search(text) is None:
        return
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise DataError(
                f"{where} holds half of a character, as a cut-off emoji leaves it: {value[-40:]!a}",
                hint="write the whole character, or remove the half",
            )


def _require_room(size: int, shown: str, verb: str) -> None:
    limit = int(psutil.virtual_memory().available) // _SHARE
    if size > limit:
        raise DataError(
            f"{shown}: {verb} more than {limit / 1e6:,.0f} MB, whose rows would not fit in memory",
            hint="split the file, and name the parts that are used",
        )


def _unpack(content: bytes, shown: str) -> bytes:
    unpacked = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            while block := file.read(_BLOCK):
                unpacked += block
                _require_room(len(unpacked), shown, "unpacks to")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{shown}: is not an intact gzip file ({error})", hint="download it again"
        ) from None
    return bytes(unpacked)


def _decode(content: bytes, shown: str) -> str:
    head = content[:_BLOCK]
    for start, kind in _PACKED.items():
        if head.startswith(start):
            raise DataError(f"{shown}: is {kind}, not text", hint=_PACKED_HINT)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or 4 * head.count(0) > len(head) > 0:
        kind = "utf-16" if head[:1] in (b"\xff", b"\xfe") else "utf-16le"
        kind = "utf-16be" if head[:1] == b"\0" else kind
        raise DataError(
            f"{shown}: is UTF-16 text, and rows are UTF-8",
            hint=f"convert it: iconv -f {kind} -t utf-8 old > new",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{shown}:{line}: is not UTF-8 text (byte 0x{content[error.start]:02x})",
            hint="convert it: iconv -f latin1 -t utf-8 old > new",
        ) from None


def _read_jsonl(text: str, shown: str) -> Iterator[Found]:
    hint = "a .jsonl file holds one whole JSON object on each line"
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{shown}:{number}"
            yield _object(load_json(line, f"{place}:", hint), place)


def _read_json(text: str, shown: str) -> Iterator[Found]:
    """Rows of a JSON array, each with the line it starts on."""
    decoder, position, line = json.JSONDecoder(object_pairs_hook=_distinct), 0, 1

    def skip(position: int, line: int) -> tuple[int, int]:
        while position < len(text) and text[position] in " \t\r\n":
            line += text[position] == "\n"
            position += 1
        return position, line

    position, line = skip(position, line)
    if text[position] != "[":
        if "\n{" in text:
            yield from _read_jsonl(text, shown)
            return
        raise DataError(
            f"{shown}:{line}: a .json file must hold a list of rows, but starts with "
            f"{text[position]!r}",
            hint="one object per line belongs in a .jsonl file",
        )
    position, line = skip(position + 1, line)
    closed = text.startswith("]", position)
    while not closed:
        try:
            start = position
            values, end = decoder.raw_decode(text, start)
            position, after = skip(end, line + text.count("\n", start, end))
            closed = text.startswith("]", position)
            if not closed and not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise _json_fault(error, f"{shown}:{at}:", _LIST_HINT) from None
        place = f"{shown}:{line}"
        _require_whole(values, text[start:end], f"{place}:")
        yield _object(values, place)
        line = after
        if not closed:
            position, line = skip(position + 1, line)
    position, line = skip(position + 1, line)
    if position < len(text):
        raise DataError(
            f"{shown}:{line}: text follows the end of the list",
            hint="a .json file holds one list; join the lists, or write .jsonl",
        )


def _read_csv(text: str, shown: str) -> Iterator[Found]:
    reader, begins = csv.DictReader(io.StringIO(text, newline=""), strict=True), 1
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
        first_line = reader.line_num - sum(str(value).count("\n") for value in values.values())
        if None in values or None in values.values():
            raise DataError(
                f"{shown}:{first_line}: does not have the header's {len(names)} columns",
                hint='quote a field that holds commas or line breaks: "like, this"',
            )
        yield dict(values), f"{shown}:{first_line}"


def _read_parquet(path: Path, shown: str, take: int | None) -> list[Found]:
    import pyarrow.parquet  # only parquet sources pay for its import

    try:
        table = pyarrow.parquet.read_table(path).slice(0, take)
    except Exception as error:
        first_line = str(error).split("\n")[0]
        raise DataError(
            f"{shown}: is not a readable parquet file: {first_line}",
            hint="download it again, or convert the rows to .jsonl",
        ) from None
    rows: list[Found] = []
    for start in range(0, table.num_rows, 1000):
        block = table.slice(start, 1000)
        try:
            values = block.to_pylist()
        except (ValueError, OverflowError):  # text that is not UTF-8, dates that no calendar has
            values = [
                _parquet_row(block, n, f"{shown} row {start + n + 1}") for n in range(len(block))
            ]
        rows += [(row, f"{shown} row {start + n + 1}") for n, row in enumerate(values)]
    return rows


def _parquet_row(table: Any, number: int, place: str) -> dict[str, Any]:
    try:
        (values,) = table.slice(number, 1).to_pylist()
    except (ValueError, OverflowError) as error:
        what = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise DataError(f"{place}: {what}: {error}", hint="write the column anew") from None
    return dict(values)


def _object(values: Any, place: str) -> Found:
    if not isinstance(values, dict):
        raise DataError(
            f"{place}: a row must be a JSON object, got {type(values).__name__}",
            hint='as in {"messages": [...]}; see data_templates/formats for every row format',
        )
    return values, place


_READERS: dict[str, Callable[[str, str], Iterator[Found]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}
