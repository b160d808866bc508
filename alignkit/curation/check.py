"""Files of rows -> what is in them that a person would want to know before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.curation.duplicates import can_look, equal, groups, near_duplicates
from alignkit.curation.findings import Collector, Report, ordered
from alignkit.curation.overlap import Measured
from alignkit.curation.patterns import opening
from alignkit.curation.records import (
    Columns,
    Record,
    Unread,
    fingerprint,
    read_all,
    read_records,
    words,
)
from alignkit.curation.rules import RULES, listed_words

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Values of max_length whose price is told."""


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
        columns: of all files that are renamed.
    """

    near: bool = True
    threshold: float = 0.8
    held_out: Sequence[str] = ()
    words: Sequence[str] = ()
    count: Callable[[str], int] | None = None
    language: Callable[[str], str] | None = None
    take: int | None = None
    columns: Columns | None = None


SAME_ANSWERS = 0.95
"""Share of common words from which two answers say nearly the same."""

FREQUENT = 0.05
"""Share of rows that begin alike that is told."""


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
    records: list[Record] = []
    unread = Collector(
        "unreadable rows",
        "fault",
        "no stage can train on them: a run ends there, or drops and counts them",
        "write what the sentence asks for, name the columns with --columns, or remove the rows "
        "(clean --drop unreadable)",
    )
    for file in files:
        for record in read_records(file, options.take, options.columns):
            if isinstance(record, Unread):
                unread.add(record.place, record.reason)
            else:
                records.append(record)
    found = [unread, _unanswered(records), *_each(records, options)]
    found += _compared(records, options)
    if options.held_out:
        found.append(_overlap(records, options))
    rows = len(records) + unread.count
    return Report(
        tuple(files), rows, _facts(records, options), ordered([one.finding() for one in found])
    )


def _unanswered(records: Sequence[Record]) -> Collector:
    """Rows without an answer among others that have one."""
    found = Collector(
        "rows without an answer",
        "fault",
        "the others have one: supervised stages end or drop them",
        "write the answers, or remove the rows (clean --drop unanswered)",
    )
    if any(record.answers for record in records):
        for record in records:
            if not record.answers:
                found.add(record.place, record.prompt)
    return found


def _each(records: Iterable[Record], options: CheckOptions) -> list[Collector]:
    """What a row has by itself."""
    rules = [*RULES.values(), *([listed_words(options.words)] if options.words else [])]
    found = [(rule, rule.collector()) for rule in rules]
    for record in records:
        for rule, collector in found:
            hit = rule.hit(record)
            if hit is not None:
                collector.add(record.place, hit)
    return [collector for _, collector in found]


def _compared(records: list[Record], options: CheckOptions) -> list[Collector]:
    """What rows have with each other, and the two answers of a pair."""
    same = Collector(
        "equal rows",
        "fault",
        "they count several times, and may stand on both sides of a split",
        "keep one of each (clean --drop equal)",
    )
    prompts = Collector(
        "prompts with several answers",
        "look",
        "fine for preferences; elsewhere the answers compete",
        "keep one, or split by prompt",
    )
    alike = Collector(
        "near-duplicates",
        "look",
        "as equal rows: they count several times and leak across a split",
        "keep one of each group (clean --drop near)",
    )
    twins = Collector(
        "pairs whose answers hardly differ",
        "look",
        "there is little to prefer",
        "remove the pairs",
    )
    cut = Collector(
        "pairs that differ only in length",
        "look",
        "one answer is the beginning of the other: the model learns the length",
        "remove the pairs",
    )
    openings = Collector(
        "answers that begin alike",
        "look",
        "the model learns the phrase before anything else",
        "rewrite them, or keep fewer",
    )
    whole = equal([fingerprint(record.text) for record in records])
    repeated = {place for places in whole.values() for place in places[1:]}
    for places in whole.values():
        for place in places[1:]:
            same.add(records[place].place, f"as {records[places[0]].place}: {records[place].text}")
    asked = [record for number, record in enumerate(records) if number not in repeated]
    for places in equal([fingerprint(record.prompt) for record in asked]).values():
        if asked[places[0]].prompt.strip():
            for place in places[1:]:
                prompts.add(asked[place].place, asked[places[0]].prompt)
    for record in asked:
        _look_at_pair(record, twins, cut)
    _look_at_openings(asked, openings)
    if options.near and can_look():
        for text, first in _near(asked, options.threshold):
            alike.add(text.place, first.text, text.text)
    return [same, prompts, alike, twins, cut, openings]


def _near(records: list[Record], threshold: float) -> list[tuple[Record, Record]]:
    """Rows with the first row of their group."""
    leaders = groups(near_duplicates([record.text for record in records], threshold))
    pairs = sorted((text, first) for text, first in leaders.items() if text != first)
    return [(records[text], records[first]) for text, first in pairs]


def _look_at_pair(record: Record, twins: Collector, cut: Collector) -> None:
    if len(record.answers) != 2:
        return
    one, other = (words(answer) for answer in record.answers)
    short, long = sorted((one, other), key=len)
    if short and len(short) < len(long) and long[: len(short)] == short:
        cut.add(record.place, *record.answers)
        return
    together = sum((Counter(one) & Counter(other)).values())
    if together >= SAME_ANSWERS * max(len(one), len(other), 1):
        twins.add(record.place, *record.answers)


def _look_at_openings(records: list[Record], openings: Collector) -> None:
    begun = [(record, opening(record.answers[0])) for record in records if record.answers]
    counts = Counter(text for _, text in begun if len(text.split()) == 4)
    if len(begun) < 20:
        return
    frequent = {text for text, count in counts.items() if count > FREQUENT * len(begun)}
    for record, text in begun:
        if text in frequent:
            openings.add(record.place, record.answers[0])


def _overlap(records: list[Record], options: CheckOptions) -> Collector:
    found = Collector(
        "rows of the held-out files",
        "fault",
        "what is measured there was trained on: the numbers are too good",
        "remove the rows from one of the two (clean --held-out)",
    )
    measured = Measured(read_all(options.held_out, options.columns))
    for record in records:
        place = measured.place_of(record)
        if place is not None:
            found.add(record.place, f"as {place}: {record.text}")
    return found


def _facts(records: list[Record], options: CheckOptions) -> dict[str, Any]:
    """What is so, where nothing is wrong."""
    facts: dict[str, Any] = {}
    kinds = Counter(_kind(record) for record in records)
    facts["kinds"] = dict(kinds.most_common())
    roles = Counter(" ".join(record.roles) or "plain text" for record in records)
    facts["roles"] = dict(roles.most_common(6))
    facts["lengths"] = _lengths(records, options)
    if options.near and not can_look():
        facts["near-duplicates"] = "not looked for: they need pip install 'alignkit[data]'"
    labels = Counter(record.label for record in records if record.label is not None)
    if labels:
        facts["labels"] = {str(key).lower(): count for key, count in labels.most_common()}
    pairs = [record.answers for record in records if len(record.answers) == 2]
    if pairs:
        longer = sum(len(chosen) > len(rejected) for chosen, rejected in pairs)
        facts["chosen is longer"] = round(longer / len(pairs), 3)
    if options.language is not None:
        spoken = Counter(options.language(r.text) for r in records if len(r.text) >= 40)
        facts["languages"] = dict(spoken.most_common(8))
    return facts


def _kind(record: Record) -> str:
    if len(record.answers) == 2:
        return "pairs"
    if not record.answers:
        return "prompts"
    return "answers" if record.label is None else "labelled"


def _lengths(records: list[Record], options: CheckOptions) -> dict[str, Any]:
    """Percentiles of a row, and what each max_length would cut."""
    count = options.count or (lambda text: len(words(text)))
    own = [
        count(record.prompt) + max((count(answer) for answer in record.answers), default=0)
        for record in records
    ]
    if not own:
        return {}
    found = np.asarray(own)
    names = {"median": 50, "90%": 90, "99%": 99, "longest": 100}
    percentiles = {n: int(np.percentile(found, p, method="higher")) for n, p in names.items()}
    cut = {str(limit): int((found > limit).sum()) for limit in LENGTHS if (found > limit).any()}
    unit = "words" if options.count is None else "tokens, without those of the template"
    return {"unit": unit, **percentiles, "longer than": cut}
