"""Files of rows -> one without what was asked to be left out, and what became of every other row.

Nothing is removed or changed that was not named. The same files and options give the same bytes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.curation.corpus import Corpus, Texts, Track, untracked
from alignkit.curation.duplicates import kind_of, repeated
from alignkit.curation.findings import excerpt
from alignkit.curation.overlap import Measured
from alignkit.curation.patterns import Recognize, personal_data
from alignkit.curation.records import (
    Columns,
    Record,
    Unread,
    as_line,
    read_all,
    read_records,
    too_deep,
)
from alignkit.curation.rules import (
    FILTERS,
    PERSONAL,
    RULES,
    Rule,
    languages,
    lengths,
    personal,
)
from alignkit.errors import DataError
from alignkit.files import replace_file

UNREADABLE, UNANSWERED, EQUAL, NEAR = "unreadable", "unanswered", "equal", "near"
HELD_OUT, MASKED, LANGUAGE, LENGTH = "held-out", "masked", "language", "length"

DROPS = (UNREADABLE, UNANSWERED, *RULES, *FILTERS, EQUAL, NEAR)
"""What can be removed by name, in the order in which it is looked for."""


@dataclass(frozen=True)
class Preset:
    """Removals under one name.

    Args:
        drop: names of `DROPS`.
        least: words that an answer must have; None for any.
        most: words that it may have; None for any.
    """

    drop: tuple[str, ...]
    least: int | None = None
    most: int | None = None

    def line(self) -> str:
        """For a person."""
        words = f"; answers of {self.least:,} to {self.most:,} words stay" if self.least else ""
        return ", ".join(self.drop) + words


PRESETS = {
    "standard": Preset((UNREADABLE, "placeholders", "repetition", EQUAL, NEAR)),
    "gopher": Preset(
        ("repetition", "lines", "ellipses", *FILTERS),
        50,
        100_000,
    ),
}
"""Name -> what it removes: what hardly anyone wants, and pages of the web that are no prose."""


@dataclass(frozen=True)
class CleanOptions:
    """What is removed and changed.

    Args:
        drop: names of `DROPS`.
        held_out: files whose rows are removed from these.
        mask: replace personal data by its kind, as in `[EMAIL]`.
        threshold: Jaccard similarity of near-duplicates.
        least: words that an answer must have; None for any.
        most: words that it may have; None for any.
        kept: languages that stay; none keeps all.
        language: text -> its language.
        recognize: says where personal data stands.
        columns: of all files that are renamed.
        track: tells how much is done.
    """

    drop: Sequence[str] = ()
    held_out: Sequence[str] = ()
    mask: bool = False
    threshold: float = 0.8
    least: int | None = None
    most: int | None = None
    kept: Sequence[str] = ()
    language: Callable[[str], str] | None = None
    recognize: Recognize = personal_data
    columns: Columns | None = None
    track: Track = untracked

    def rules(self) -> dict[str, Rule]:
        """Reason -> the rule of what a row has by itself."""
        known = RULES | FILTERS | {PERSONAL: personal(self.recognize)}
        chosen = {name: rule for name, rule in known.items() if name in self.drop}
        if self.least is not None or self.most is not None:
            chosen[LENGTH] = lengths(self.least, self.most)
        if self.kept and self.language is not None:
            chosen[LANGUAGE] = languages(self.kept, self.language)
        return chosen


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
    corpus, reasons = _judged(files, options)
    done = Cleaned(rows=len(corpus))
    with (
        replace_file(output) as kept,
        replace_file(side_of(output)) as removed,
        kept.open("w", encoding="utf-8") as rows,
        removed.open("w", encoding="utf-8") as gone,
    ):
        for number in options.track(range(len(corpus)), "writing rows", len(corpus)):
            row, (reason, partner) = corpus[number], reasons.get(number, ("", ""))
            if reason or isinstance(row, Unread):
                done.removed[reason] += 1
                like = corpus[partner].place if isinstance(partner, int) else partner
                gone.write(as_line(_fate(row, reason, like), row.place))
                continue
            values = row.columns
            if options.mask:
                values, kinds = _masked(row, options.recognize)
                done.masked.update(kinds)
                if kinds:
                    gone.write(as_line(_fate(row, MASKED, ""), row.place))
            done.kept += 1
            rows.write(as_line(values, row.place))
        if not done.kept:
            raise DataError(
                f"no row is left: {'; '.join(done.lines()[1:])}",
                hint="ask for less; `data check` says what is there",
            )
    return done


def _masked(row: Record, recognize: Recognize) -> tuple[Any, Counter[str]]:
    try:
        return mask(row.columns, recognize)
    except RecursionError:
        raise too_deep(row.place) from None


def side_of(output: Path) -> Path:
    """The file beside the rows that were kept.

    Args:
        output: of `clean_files`.
    """
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.removed.jsonl")


def mask(values: Any, recognize: Recognize = personal_data) -> tuple[Any, Counter[str]]:
    """Values of a row with personal data replaced by its kind, and how often each was.

    Args:
        values: texts, lists and objects, to any depth.
        recognize: says where it stands.
    """
    counts: Counter[str] = Counter()

    def inner(value: Any) -> Any:
        if isinstance(value, str):
            parts, end = [], 0
            for kind, begin, stop in recognize(value):
                counts[kind] += 1
                parts += [value[end:begin], f"[{kind.upper()}]"]
                end = stop
            return "".join([*parts, value[end:]])
        if isinstance(value, dict):
            return {key: inner(one) for key, one in value.items()}
        return [inner(one) for one in value] if isinstance(value, list | tuple) else value

    return inner(values), counts


Reason = tuple[str, str | int]
"""Why a row is removed, and the place or number of the row that it is like; empty without one."""


def _judged(files: Sequence[str], options: CleanOptions) -> tuple[Corpus, dict[int, Reason]]:
    """All rows, and the first reason to remove each that does not stay."""
    corpus, reasons, kinds = Corpus(), dict[int, Reason](), array("b")
    alone = _alone(options)
    for row in options.track(_rows(files, options), "reading rows", None):
        number = corpus.append(row)
        kinds.append(kind_of(row) if isinstance(row, Record) else 0)
        reason = alone(number, row)
        if reason is not None:
            reasons[number] = reason
    if NEAR in options.drop:
        left = array("q", (number for number in range(len(corpus)) if number not in reasons))
        of_left = array("b", (kinds[number] for number in left))
        found = repeated(Texts(corpus, left), options.threshold, options.track, of_left)
        reasons |= {left[later]: (NEAR, left[kept]) for later, kept in found.items()}
    return corpus, reasons


def _rows(files: Sequence[str], options: CleanOptions) -> Iterator[Record | Unread]:
    for file in files:
        yield from read_records(file, columns=options.columns)


def _alone(options: CleanOptions) -> Callable[[int, Record | Unread], Reason | None]:
    """Why a row is removed, without a look at those that are only like it."""
    measured = None
    if options.held_out:
        measured = Measured(read_all(options.held_out, options.columns))
    rules, seen = options.rules(), dict[bytes, int]()

    def reason(number: int, row: Record | Unread) -> Reason | None:
        if isinstance(row, Unread):
            if UNREADABLE in options.drop:
                return UNREADABLE, ""
            raise DataError(
                f"{row.place}: {row.reason}",
                hint="mend the row, or remove such rows with --drop unreadable",
            )
        if UNANSWERED in options.drop and row.is_unanswered:
            return UNANSWERED, ""
        for name, rule in rules.items():
            if rule.hit(row) is not None:
                return name, ""
        place = None if measured is None else measured.place_of(row)
        if place is not None:
            return HELD_OUT, place
        if EQUAL in options.drop:  # the last: the partner is a row that stays
            partner = seen.setdefault(row.identity, number)
            if partner != number:
                return EQUAL, partner
        return None

    return reason


def _fate(record: Record | Unread, reason: str, partner: str) -> dict[str, Any]:
    said: dict[str, Any] = {"place": record.place, "reason": reason}
    if partner:
        said["partner"] = partner
    if isinstance(record, Record):
        return {**said, "row": record.columns}
    return {**said, "why": excerpt(record.reason)}
