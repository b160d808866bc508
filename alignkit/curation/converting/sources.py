"""What a person names as the rows to convert -> the rows, and how each is read."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from alignkit.curation.converting.foreign import known_row
from alignkit.curation.converting.told import Told, tell
from alignkit.curation.records import Columns
from alignkit.data.files.content import USUAL, Dialect
from alignkit.data.formats import PARSERS
from alignkit.data.pairs import PAIR_PARSERS
from alignkit.data.sources import Row, stream_rows
from alignkit.errors import DataError
from alignkit.recipe.rows import SourceSpec

FORMATS = ("auto", *PARSERS, *PAIR_PARSERS)
"""Formats that rows may be said to have."""


def source_rows(
    files: Sequence[str],
    source: str,
    *,
    columns: Columns,
    take: int | None = None,
    dialect: Dialect = USUAL,
) -> tuple[Iterator[Row], Callable[[Row], Told]]:
    """The rows of some files, and what reads one.

    Args:
        files: of rows; they count as one set.
        source: a name of `FORMATS`.
        columns: that are renamed.
        take: rows of each file, the first ones.
        dialect: how the files are written.

    Raises:
        DataError: the format is not known.
    """
    try:
        codecs.lookup(dialect.encoding)
    except LookupError:
        raise DataError(
            f"--encoding {dialect.encoding} is not known", hint="utf-8, cp1252 and latin1 are usual"
        ) from None
    if len(dialect.delimiter) != 1:
        raise DataError(
            f"--delimiter {dialect.delimiter!r} must be one character", hint="as in ';' or $'\\t'"
        )
    if source not in FORMATS:
        raise DataError(f"--from {source} is not a format", hint=f"one of {', '.join(FORMATS)}")
    specs = [SourceSpec(path=file, columns=dict(columns), take=take) for file in files]
    rows = (known_row(row) for spec in specs for row in stream_rows(spec, dialect))
    return rows, partial(tell, row_format=source)
