"""Files of rows -> one file in another format, every row read back, what is lost counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.curation.converting.foreign import known_row
from alignkit.curation.converting.prepared import PREPARED, CannotSay
from alignkit.curation.converting.told import MEANT, Told, tell
from alignkit.curation.converting.written import WRITERS
from alignkit.curation.corpus import Track, untracked
from alignkit.curation.findings import PLACES, excerpt
from alignkit.curation.records import as_line
from alignkit.data.sources import Row
from alignkit.errors import DataError
from alignkit.files import replace_file

MOST_LOSSES = 20
"""Kinds of loss that are told apart: some name what stands in a row."""

UNANSWERED = "rows have no answer: they are prompts; `data clean --drop unanswered` removes them"


@dataclass(frozen=True)
class Loss:
    """Something that the new rows do not say.

    Args:
        what: in words, after their number.
        count: rows.
        places: of the first ones.
    """

    what: str
    count: int
    places: tuple[str, ...]

    def line(self) -> str:
        """For a person."""
        more = ", …" if self.count > len(self.places) else ""
        return f"{self.count:,} {self.what} ({', '.join(self.places)}{more})"


@dataclass(frozen=True)
class Converted:
    """What became of the rows.

    Args:
        rows: that were read.
        written: rows of the new file.
        losses: what it does not say; empty if nothing was lost.
    """

    rows: int
    written: int
    losses: tuple[Loss, ...]

    def lines(self) -> list[str]:
        """For a person."""
        kept = "nothing was lost" if not self.losses else "what was lost or changed:"
        said = [f"{self.rows:,} rows read, {self.written:,} written; {kept}"]
        return [*said, *(loss.line() for loss in self.losses)]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        losses = [vars(loss) | {"places": list(loss.places)} for loss in self.losses]
        return {"rows": self.rows, "written": self.written, "losses": losses}


Values = dict[str, Any]


class _Losses:
    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, what: str, place: str) -> None:
        if what not in self._counts and len(self._counts) >= MOST_LOSSES:
            what = "rows have other losses: convert fewer of them to see which"
        self._counts[what] = self._counts.get(what, 0) + 1
        places = self._places.setdefault(what, [])
        if len(places) < PLACES:
            places.append(place)

    def found(self) -> tuple[Loss, ...]:
        counts = sorted(self._counts.items(), key=lambda item: -item[1])
        return tuple(Loss(what, count, tuple(self._places[what])) for what, count in counts)


def convert_rows(
    rows: Iterator[Row],
    output: Path,
    to: str,
    *,
    read: Callable[[Row], Told] = tell,
    track: Track = untracked,
) -> Converted:
    """Write rows in another format.

    Each written row is read back: where it tells something else than the row did and no loss says
    so, that is counted, too. The same rows give the same bytes.

    Args:
        rows: of any format.
        output: the .jsonl file to write.
        to: a name of `WRITERS`.
        read: what a row tells.
        track: tells how much is done.

    Raises:
        DataError: a file cannot be read, no row can be written, or the format is not known.
    """
    if to not in WRITERS:
        raise DataError(f"--to {to} is not a format", hint=f"one of {', '.join(WRITERS)}")
    losses, asked, count, written = _Losses(), _Losses(), 0, 0
    first: DataError | None = None
    with replace_file(output) as path, path.open("w", encoding="utf-8") as file:
        for row in track(rows, "converting rows", None):
            count += 1
            try:
                told = read(row)
            except DataError as error:
                if count == 1:
                    first = error
                reason = error.message.removeprefix(f"{row.place}: ")
                losses.add(f"rows left out: {excerpt(reason)}", row.place)
                continue
            if not told.answers:
                asked.add(UNANSWERED, row.place)
            for values in convert_row(row, told, to, losses.add):
                file.write(as_line(values, row.place))
                written += 1
        if not written:
            hint = "choose another format with --to"
            if first is not None:
                hint = "rename columns, as in --columns prompt=question --columns completion=answer"
            raise DataError(
                f"none of {count:,} rows can be written as {to}: {losses.found()[0].line()}",
                hint=hint,
            )
    mixed = 0 < sum(one.count for one in asked.found()) < count and to != "prompts"
    return Converted(count, written, losses.found() + (asked.found() if mixed else ()))


def convert_row(
    row: Row, told: Told, to: str, lose: Callable[[str, str], None]
) -> list[dict[str, Any]]:
    """The row in another format: one, of a pair as labelled rows two, or none.

    Args:
        row: as it was read.
        told: what it tells.
        to: a name of `WRITERS`.
        lose: takes down what is lost, and where.
    """
    notes: list[str] = []
    try:
        said = PREPARED[to](told, notes.append)
        prepared = len(notes)
        found = WRITERS[to](said, notes.append)
    except CannotSay as reason:
        lose(f"rows left out: {to} has no place for {reason}", row.place)
        return []
    for what in dict.fromkeys(notes):
        lose(f"rows {what}", row.place)
    others = dict(told.others)
    for key in [key for key in others if any(key in values for values in found)]:
        lose(f"rows lose their column {key!r}: {to} has one of that name", row.place)
        del others[key]
    if not _read_alike([{**others, **values} for values in found], found, row.place):
        for key in [key for key in others if key in MEANT]:
            what = f"rows lose their column {key!r}, which would be read as a part of them"
            lose(what, row.place)
            del others[key]
    if said.label is not None:
        others["label"] = said.label
    found = [{**others, **values} for values in found]
    if len(notes) == prepared and not _says(found, said, row.place):
        lose("rows are read as something else", row.place)
    return found


def _read_alike(ones: Sequence[Values], others: Sequence[Values], place: str) -> bool:
    """Whether rows tell the same with further columns as without."""
    try:
        with_columns = [tell(known_row(Row(one, place))) for one in ones]
        return with_columns == [tell(known_row(Row(one, place))) for one in others]
    except DataError:
        return False


def _says(found: Sequence[dict[str, Any]], told: Told, place: str) -> bool:
    """Whether the written rows tell what the row told."""
    try:
        back = [tell(known_row(Row(values, place))) for values in found]
    except DataError:
        return False
    if len(back) == 2:  # a pair as labelled rows
        same = [(one.prompt, one.answers) for one in back]
        return same == [(told.prompt, (side,)) for side in told.answers]
    return back == [told]
