"""Files of rows -> a report of what is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.curation.check import CheckOptions, check_files
from alignkit.curation.corpus import Track, untracked
from alignkit.curation.findings import Report
from alignkit.curation.languages import language_of
from alignkit.curation.page import render_page
from alignkit.curation.recognizers import with_entities
from alignkit.curation.records import Columns
from alignkit.errors import DataError
from alignkit.files import output_path, write_text


@dataclass(frozen=True)
class CheckRequest:
    """What the command line asks for.

    Args:
        files: of rows.
        held_out: files of held-out or evaluation rows.
        words: file with a word on each line that must not stand in a row.
        languages: look at languages.
        near: look for near-duplicates.
        threshold: Jaccard similarity of near-duplicates.
        take: rows of each file, the first ones.
        html: page to write.
        entities: of presidio that count as personal data.
        columns: of the files that are renamed.
    """

    files: Sequence[str]
    held_out: Sequence[str] = ()
    words: Path | None = None
    languages: bool = False
    near: bool = True
    threshold: float = 0.8
    take: int | None = None
    html: Path | None = None
    entities: Sequence[str] = ()
    columns: Columns | None = None


def check_data(
    request: CheckRequest,
    count: Callable[[str], int] | None = None,
    track: Track = untracked,
) -> Report:
    """Look at every row of some files.

    Args:
        request: what is asked for.
        count: length of a text in a model's tokens; None counts words.
        track: tells how much is done.

    Raises:
        DataError: a file cannot be read, or an option is out of range.
    """
    options = CheckOptions(
        near=request.near,
        threshold=request.threshold,
        held_out=request.held_out,
        words=_listed(request.words),
        count=count,
        language=language_of if request.languages else None,
        take=request.take,
        recognize=with_entities(request.entities),
        columns=request.columns,
        track=track,
    )
    report = check_files(request.files, options)
    if request.html is not None:
        write_text(output_path(request.html), render_page(report))
    return report


def _listed(file: Path | None) -> list[str]:
    """The words of a file, a line each."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be read: {error}", hint="name a text file with a word on each line"
        ) from None
    return [line.strip() for line in lines if line.strip()]
