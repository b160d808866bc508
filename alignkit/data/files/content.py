"""The bytes of a file as lines of text: unpacked, decoded, and never more of them than fit."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from alignkit.errors import DataError

_SHARE = 4
"""Rows take about four times the memory of their text."""
_BLOCK = 1 << 20
_MARK = b"\xef\xbb\xbf"
_PACKED = {b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip file or a spreadsheet"}
_PACKED_HINT = "unpack or convert it; only a file whose name ends in .gz is unpacked"


@dataclass(frozen=True)
class Dialect:
    """How a file is written, where it is not as usual.

    Args:
        encoding: of its text.
        delimiter: between the columns of a CSV file.
    """

    encoding: str = "utf-8"
    delimiter: str = ","


USUAL = Dialect()


def read_content(path: Path, shown: str) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: their rows would not fit in memory.
    """
    size = path.stat().st_size
    if size > _room():
        raise _too_large(f"{shown}: has")
    return path.read_bytes()


def read_lines(
    content: BinaryIO, shown: str, *, packed: bool, held: bool, encoding: str = USUAL.encoding
) -> Iterator[str]:
    """The lines of a file, each with its line break.

    Args:
        content: bytes of the file.
        shown: how messages name it.
        packed: by gzip.
        held: all of it will be in memory at once, not a line at a time.
        encoding: of its text; each line must end in the byte 0x0a.

    Raises:
        DataError: it is empty, in another encoding, a damaged gzip file, or too large.
    """
    raw: Any = gzip.GzipFile(fileobj=content) if packed else content
    limit, total, blank = _room(), 0, True
    with _intact(shown), io.BufferedReader(raw, _BLOCK) as stream:
        head = stream.peek(_BLOCK)[:_BLOCK]
        _require_text(head, shown)
        if head.startswith(_MARK):
            stream.read(len(_MARK))
        number = 0
        while line := stream.readline(limit + 1):
            number += 1
            total = total + len(line) if held else len(line)
            if total > limit:
                what = "unpacks to" if packed else "has"
                raise _too_large(f"{shown}: {what}" if held else f"{shown}:{number}: has")
            text = _decode(line, f"{shown}:{number}", encoding)
            blank = blank and not text.strip()
            yield text
    if blank:
        raise DataError(f"{shown}: the file is empty", hint="every source needs at least one row")


def _room() -> int:
    return int(psutil.virtual_memory().available) // _SHARE


def _too_large(what: str) -> DataError:
    return DataError(
        f"{what} more than {_room() / 1e6:,.0f} MB, whose rows would not fit in memory",
        hint="split the file, and name the parts that are used",
    )


@contextlib.contextmanager
def _intact(shown: str) -> Iterator[None]:
    """Faults of gzip as errors that name the file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{shown}: is not an intact gzip file ({error})", hint="download it again"
        ) from None


def _require_text(head: bytes, shown: str) -> None:
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


def _decode(line: bytes, place: str, encoding: str) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: is not {encoding.upper()} text (byte 0x{line[error.start]:02x})",
            hint="convert it: alignkit data convert --encoding cp1252, or iconv -f cp1252 -t utf-8",
        ) from None
