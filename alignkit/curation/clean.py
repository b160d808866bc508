"""Files of rows -> one without what was asked to be left out, and what became of every other row.

Nothing is removed or changed that was not named. The same files and options give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.curation.duplicates import groups, near_duplicates
from alignkit.curation.findings import excerpt
from alignkit.curation.overlap import Measured
from alignkit.curation.patterns import personal_data
from alignkit.curation.records import (
    Columns,
    Record,
    Unread,
    fingerprint,
    read_all,
    read_records,
)
from alignkit.curation.rules import RULES
from alignkit.errors import DataError
from alignkit.files import replace_file

UNREADABLE, UNANSWERED, EQUAL, NEAR = "unreadable", "unanswered", "equal", "near"
HELD_OUT, MASKED = "held-out", "masked"

DROPS = (UNREADABLE, UNANSWERED, *RULES, EQUAL, NEAR)
"""What can be removed by name, in the order in which it is looked for."""

PRESETS = {"standard": (UNREADABLE, "placeholders", "repetition", EQUAL, NEAR)}
"""Name -> what it removes."""


@dataclass(frozen=True)
class CleanOptions:
    """What is removed and changed.

    Args:
        drop: names of `DROPS`.
        held_out: files whose rows are removed from these.
        mask: replace personal data by its kind, as in `[EMAIL]`.
        threshold: Jaccard similarity of near-duplicates.
        columns: of all files that are renamed.
    """

    drop: Sequence[str] = ()
    held_out: Sequence[str] = ()
    mask: bool = False
    threshold: float = 0.8
    columns: Columns | None = None


@dataclass
class Cleaned:
    """What became of the rows.

    Args:
        rows: that were read.
        kept: that were written.
        removed: reason -> rows.
        masked: kind -> places of personal data that were masked.
    """

    rows: int = 0
    kept: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        counts = {"removed": dict(self.removed), "masked": dict(self.masked)}
        return {"rows": self.rows, "kept": self.kept, **counts}

    def lines(self) -> list[str]:
        """For a person."""
        said = [f"{self.kept:,} of {self.rows:,} rows kept"]
        said += [f"{count:,} removed: {reason}" for reason, count in self.removed.most_common()]
        said += [f"{count:,} masked: {kind}" for kind, count in self.masked.most_common()]
        return said


def clean_files(files: Sequence[str], output: Path, options: CleanOptions) -> Cleaned:
    """Write the rows that stay, and beside them every removed or changed one with its reason.

    Args:
        files: of rows, in any format; they count as one set.
        output: the .jsonl file of rows, with the columns that they had; beside it `side_of` it
            becomes a .jsonl file of `{"place", "reason", "partner"?, "row"}`.
        options: what is removed and changed.

    Raises:
        DataError: an unknown name, or a file that cannot be read.
    """
    for name in options.drop:
        if name not in DROPS:
            raise DataError(
                f"--drop {name} is not known", hint=f"one or more of {', '.join(DROPS)}"
            )
    done = Cleaned()
    with (
        replace_file(output) as kept,
        replace_file(side_of(output)) as removed,
        kept.open("w", encoding="utf-8") as rows,
        removed.open("w", encoding="utf-8") as gone,
    ):
        for record, reason, partner in _judged(files, options, done):
            if reason or isinstance(record, Unread):
                done.removed[reason] += 1
                _write(gone, _fate(record, reason, partner))
                continue
            values = record.columns
            if options.mask:
                values, kinds = mask(values)
                done.masked.update(kinds)
                if kinds:
                    _write(gone, _fate(record, MASKED, ""))
            done.kept += 1
            _write(rows, values)
    return done


def side_of(output: Path) -> Path:
    """The file beside the rows that were kept.

    Args:
        output: of `clean_files`.
    """
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.removed.jsonl")


def mask(values: Any) -> tuple[Any, Counter[str]]:
    """Values of a row with personal data replaced by its kind, and how often each was.

    Args:
        values: texts, lists and objects, to any depth.
    """
    counts: Counter[str] = Counter()

    def inner(value: Any) -> Any:
        if isinstance(value, str):
            parts, end = [], 0
            for kind, begin, stop in personal_data(value):
                counts[kind] += 1
                parts += [value[end:begin], f"[{kind.upper()}]"]
                end = stop
            return "".join([*parts, value[end:]])
        if isinstance(value, dict):
            return {key: inner(one) for key, one in value.items()}
        return [inner(one) for one in value] if isinstance(value, list | tuple) else value

    return inner(values), counts


def _judged(
    files: Sequence[str], options: CleanOptions, done: Cleaned
) -> Iterator[tuple[Record | Unread, str, str]]:
    """Every row with the first reason to remove it, and its partner; both empty if it stays."""
    records = [one for file in files for one in read_records(file, columns=options.columns)]
    done.rows = len(records)
    reasons: dict[int, tuple[str, str]] = {}
    seen: dict[bytes, str] = {}
    measured = None
    if options.held_out:
        measured = Measured(read_all(options.held_out, options.columns))
    for number, record in enumerate(records):
        reason = _alone(record, options, seen, measured)
        if reason is not None:
            reasons[number] = reason
    if NEAR in options.drop:
        left = [n for n, one in enumerate(records) if n not in reasons and isinstance(one, Record)]
        texts = [one.text for n in left if isinstance(one := records[n], Record)]
        for text, first in groups(near_duplicates(texts, options.threshold)).items():
            if text != first:
                reasons[left[text]] = (NEAR, records[left[first]].place)
    for number, record in enumerate(records):
        yield record, *reasons.get(number, ("", ""))


def _alone(
    record: Record | Unread,
    options: CleanOptions,
    seen: dict[bytes, str],
    measured: Measured | None,
) -> tuple[str, str] | None:
    """Why a row is removed, without a look at those that are only like it."""
    if isinstance(record, Unread):
        if UNREADABLE not in options.drop:
            raise DataError(
                f"{record.place}: {record.reason}",
                hint="mend the row, or remove such rows with --drop unreadable",
            )
        return UNREADABLE, ""
    if UNANSWERED in options.drop and not record.answers:
        return UNANSWERED, ""
    for name, rule in RULES.items():
        if name in options.drop and rule.hit(record) is not None:
            return name, ""
    place = None if measured is None else measured.place_of(record)
    if place is not None:
        return HELD_OUT, place
    if EQUAL in options.drop:  # the last: the partner is a row that stays
        partner = seen.setdefault(fingerprint(record.text), record.place)
        if partner != record.place:
            return EQUAL, partner
    return None


def _fate(record: Record | Unread, reason: str, partner: str) -> dict[str, Any]:
    said: dict[str, Any] = {"place": record.place, "reason": reason}
    if partner:
        said["partner"] = partner
    if isinstance(record, Record):
        return {**said, "row": record.columns}
    return {**said, "why": excerpt(record.reason)}


def _write(file: Any, value: Any) -> None:
    file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
