"""Files of rows -> what is in them that a person would want to know before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from alignkit.curation.corpus import Corpus, Track, untracked
from alignkit.curation.duplicates import can_look
from alignkit.curation.facts import Facts
from alignkit.curation.findings import Collector, Report, ordered
from alignkit.curation.looks import (
    Contradictions,
    Look,
    Near,
    Openings,
    Overlap,
    Pairs,
    Repeated,
    Rules,
    Unanswered,
)
from alignkit.curation.patterns import Recognize, personal_data
from alignkit.curation.records import Columns, Record, Unread, read_all, read_records
from alignkit.curation.rules import PERSONAL, RULES, listed_words, personal


@dataclass(frozen=True)
class CheckOptions:
    """What is looked for.

    Args:
        near: look for near-duplicates.
        threshold: Jaccard similarity from which two rows are near-duplicates.
        held_out: files of held-out or evaluation rows that must not be in these; all must be read.
        words: that must not stand in a row.
        count: length of a text in the model's tokens; None counts words.
        language: text -> its language; None does not look.
        take: rows of each file, the first ones; None takes all.
        recognize: says where personal data stands.
        columns: of all files that are renamed.
        track: tells how much is done.
    """

    near: bool = True
    threshold: float = 0.8
    held_out: Sequence[str] = ()
    words: Sequence[str] = ()
    count: Callable[[str], int] | None = None
    language: Callable[[str], str] | None = None
    take: int | None = None
    recognize: Recognize = personal_data
    columns: Columns | None = None
    track: Track = untracked


def check_files(files: Sequence[str], options: CheckOptions) -> Report:
    """Read some files and look at every row.

    Args:
        files: of rows, in any format; they count as one set.
        options: what is looked for.

    Returns:
        What was found, and facts about the rows.

    Raises:
        DataError: a file cannot be read at all, or a held-out row cannot.
    """
    corpus, first = Corpus(), dict[bytes, int]()
    unread, same = _unreadable(), _equal()
    looks, facts = _looks(options), Facts(options.count, options.language)
    for row in options.track(_rows(files, options), "reading rows", None):
        number = corpus.append(row)
        if isinstance(row, Unread):
            unread.add(row.place, row.reason)
            continue
        before = first.setdefault(row.identity, number)
        if before != number:
            same.add(row.place, f"as {corpus[before].place}: {row.text}")
        facts.see(row)
        for look in looks:
            look.see(number, row, first=before == number)
    found = [unread, same, *(one for look in looks for one in look.found(corpus, options.track))]
    said = facts.found()
    if options.near and not can_look():
        said["near-duplicates"] = "not looked for: they need pip install 'alignkit[data]'"
    findings = ordered([one.finding() for one in found])
    return Report(tuple(files), len(corpus), said, findings)


def _rows(files: Sequence[str], options: CheckOptions) -> Iterator[Record | Unread]:
    for file in files:
        yield from read_records(file, options.take, options.columns)


def _looks(options: CheckOptions) -> list[Look]:
    rules = [*(RULES | {PERSONAL: personal(options.recognize)}).values()]
    if options.words:
        rules.append(listed_words(options.words))
    looks: list[Look] = [
        Rules(rules),
        Unanswered(),
        Repeated(),
        Contradictions(),
        Pairs(),
        Openings(),
    ]
    if options.near and can_look():
        looks.append(Near(options.threshold))
    if options.held_out:
        looks.append(Overlap(read_all(options.held_out, options.columns)))
    return looks


def _unreadable() -> Collector:
    return Collector(
        "unreadable rows",
        "fault",
        "no stage can train on them: a run ends there, or drops and counts them",
        "write what the sentence asks for, name the columns with --columns, or remove the rows "
        "(clean --drop unreadable)",
    )


def _equal() -> Collector:
    return Collector(
        "equal rows",
        "fault",
        "they count several times, and may stand on both sides of a split",
        "keep one of each (clean --drop equal)",
    )
